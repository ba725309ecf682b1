"""Ranks as processes of their own: each runs one function, and whoever started them gets what it
returned.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.processes import PATIENCE, TICK, Progress, StalledError, end
from tests.scripts import IMPORTED

Main = Callable[[int, int, torch.device], Any]  # rank, world, device -> something for JSON
# Of one collective. Under gloo it is longer than `Progress` waits: ranks may be any time apart, and
# only a hang ends them. Ranks of NCCL spin while they wait, so that NCCL itself has to find the
# hang.
GLOO_TIMEOUT, NCCL_TIMEOUT = timedelta(seconds=20 * PATIENCE), timedelta(seconds=PATIENCE)
# Ranks on the CPU are forked by a server that has imported these, as scripts are.
set_forkserver_preload(IMPORTED)


def run_ranks(
    main: Main,
    world: int,
    folder: Path,
    *,
    devices: bool = False,
    eagerly: bool = False,
    dying: int = 0,
) -> list[Any]:
    """By rank, what ``main`` returned there.

    gloo on the CPU; with ``devices`` NCCL and a device per rank where there are enough GPUs.
    ``eagerly``: torch.compile does nothing there. The last ``dying`` ranks end somewhere in
    ``main``, and nobody waits for them.

    Raises:
        StalledError: no rank has used the processor for a long time: they hang, and are killed.
    """
    cuda = devices and torch.cuda.device_count() >= world
    context = multiprocessing.start_processes(
        _rank,
        (main, world, str(folder), cuda, eagerly, dying > 0),
        nprocs=world,
        join=False,
        start_method="spawn" if cuda else "forkserver",
    )
    assert context is not None
    progress = Progress(context.pids())
    try:
        while not context.join(timeout=TICK):  # raises what a rank raised
            if progress.stalled():
                raise StalledError(f"{world} ranks used no processor time in {PATIENCE} s")
    finally:
        if alive := [process.pid for process in context.processes if process.is_alive()]:
            end(pid for pid in alive if pid is not None)
    return [
        json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world - dying)
    ]


def _rank(
    rank: int, main: Main, world: int, folder: str, cuda: bool, eagerly: bool, dying: bool
) -> None:
    torch.set_num_threads(1)
    if eagerly:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=NCCL_TIMEOUT if cuda else GLOO_TIMEOUT,
        device_id=device if cuda else None,
    )
    try:
        seen = main(rank, world, device)
    finally:
        if not dying:
            dist.destroy_process_group()
    partial = Path(folder) / f"{world}-{rank}.partial"
    partial.write_text(json.dumps(seen))
    os.replace(partial, Path(folder) / f"{world}-{rank}.json")
    # Without the interpreter's shutdown: DTensor's cache keeps the process group, and a thread of
    # gloo that frees a tensor meanwhile aborts the process, "terminate called without an active
    # exception" (pytorch#190489; main() of examples/pretrain.py has what a script can do).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
