"""Python scripts in processes of their own that a server forks, which has imported torch and the
package: 0.1 s each, where a new interpreter needs 4 s.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import connection, forkserver
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import torch

from tests.processes import PATIENCE, ROOT, TICK, Progress, StalledError, end

IMPORTED = [
    "normuon_fn",
    "normuon_fn.optim.normuon",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "matplotlib.pyplot",
]
forkserver.set_forkserver_preload(IMPORTED)  # what is not installed is left out


class Script(NamedTuple):
    """``python file arguments``; where ``file`` is no path, ``python -m file arguments``."""

    file: str | Path
    arguments: Sequence[object] = ()
    env: Mapping[str, str] = {}  # beside the environment of this process


def run(
    file: str | Path,
    *arguments: object,
    code: int | None = 0,  # the expected exit code; None: any
    env: Mapping[str, str] | None = None,
) -> CompletedProcess[str]:
    """What a script printed, as `processes.run` gives it.

    AssertionError for another exit code.

    Raises:
        StalledError: the script hung, and is killed.
    """
    (done,) = run_all([Script(file, arguments, env or {})])
    assert code in (None, done.returncode), (
        f"{done.args} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


def run_all(scripts: Sequence[Script]) -> list[CompletedProcess[str]]:
    """The same for several at a time. When one of them fails, the others are killed."""
    start = multiprocessing.get_context("forkserver").Process
    with ExitStack() as stack:
        files = [
            [Path(stack.enter_context(tempfile.NamedTemporaryFile()).name) for _ in range(2)]
            for _ in scripts
        ]
        running = [
            start(target=_main, args=(script, *printed))
            for script, printed in zip(scripts, files, strict=True)
        ]
        for process in running:
            process.start()
        pids = [process.pid for process in running if process.pid is not None]
        progress = Progress(pids)
        while any(process.is_alive() for process in running):
            connection.wait([process.sentinel for process in running if process.is_alive()], TICK)
            stalled = progress.stalled()
            if stalled or any(process.exitcode not in (None, 0) for process in running):
                end(process.pid for process in running if process.is_alive() and process.pid)
                if stalled:
                    raise StalledError(f"{scripts} used no processor time in {PATIENCE} s")
        return [
            CompletedProcess(
                [str(script.file), *map(str, script.arguments)],
                process.exitcode if process.exitcode is not None else -1,
                *(file.read_text() for file in printed),
            )
            for script, process, printed in zip(scripts, running, files, strict=True)
        ]


def _main(script: Script, printed: Path, errors: Path) -> None:
    os.environ.update({"OMP_NUM_THREADS": "1", **script.env})
    torch.set_num_threads(1)
    for descriptor, file in ((1, printed), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = [str(script.file), *map(str, script.arguments)]
    code: object = 0
    try:
        if Path(script.file).exists():
            sys.path[0:0] = [str(Path(script.file).parent), str(ROOT)]
            runpy.run_path(str(script.file), run_name="__main__")
        else:
            sys.path.insert(0, str(ROOT))
            runpy.run_module(str(script.file), run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))
