"""Tiny runs of pretrain.py and train_ddp.py, and what they left in their folders."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests import processes, scripts
from tests.processes import ROOT

STEPS, SAVED = 8, 4
COLUMNS = ("step", "loss", "validation", "lr", "tokens_per_second", "skipped")
TINY = f"--steps {STEPS} --log-every 2 --save-every {SAVED} --batch 4 --context 16 --width 16"

ON_THE_CPU = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
Row = dict[str, float]


def by_itself(world: int, command: Sequence[object], env: dict[str, str]) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    ranks = [{**told, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    file, *arguments = command
    own = [{"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in of.items()}} for of in ranks]
    found = scripts.run_all([scripts.Script(str(file), arguments, {**env, **of}) for of in own])
    assert not any(done.returncode for done in found), [done.stderr[-4000:] for done in found]
    return "".join(done.stdout for done in found)


def run(
    world: int,
    folder: Path,
    *arguments: object,
    example: str = "pretrain.py",
    torchrun: bool = False,
    **env: object,
) -> list[Row]:
    """The rows of metrics.csv. ``env``: what watched.py reads."""
    file = ROOT / "examples" / example
    options = [*TINY.split(), "--layers", 1, "--heads", 2, "--sample", 3, "--out", folder]
    told = {**ON_THE_CPU, "BOARD": "none", **{k: str(v) for k, v in env.items()}}
    command = [ROOT / "tests" / "examples" / "watched.py", file, *options, *arguments]
    if torchrun:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world)
        processes.run([sys.executable, *launcher, *command[1:]], env=told)
    elif world == 1:
        scripts.run(*command, env=told)
    else:
        printed = by_itself(world, command, told)
        left = re.findall(r"^threads: (\d+), then (\d+)$", printed, re.MULTILINE)
        assert len(left) + printed.count("no shutdown\n") == world
        assert all(int(after) < int(before) for before, after in left), (
            f"threads of the process group outlive it, and may abort the process: {left}"
        )
    assert (folder / "loss.png").stat().st_size > 1000
    head, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert tuple(head.split(",")) == COLUMNS
    return [dict(zip(COLUMNS, map(float, line.split(",")), strict=True)) for line in lines]


def trace(rows: list[Row]) -> list[list[float]]:
    """All but the speed; of a step that was logged again the last row."""
    each = {row["step"]: row for row in rows}
    return [[row[name] for name in COLUMNS if name != "tokens_per_second"] for row in each.values()]


def difference(one: list[Row], other: list[Row]) -> float:
    return float((torch.tensor(trace(one)) - torch.tensor(trace(other))).abs().max())


def from_the_checkpoint(folder: Path, to: Path) -> Path:
    """A copy of a run that was killed after its first checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / f"step-{STEPS}")
    return to
