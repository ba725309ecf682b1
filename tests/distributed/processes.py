"""Ranks as processes of their own: each runs one function, and whoever started them gets what it returned."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

Main = Callable[[int, int, torch.device], Any]  # rank, world, device -> what JSON holds


def run_ranks(
    main: Main,
    world: int,
    folder: Path,
    *,
    deadline: float,
    timeout: float = 60,
    devices: bool = False,
    dying: int = 0,
) -> list[Any]:
    """By rank, what ``main`` returned there.

    gloo on CPU; with ``devices`` NCCL and a device a rank where there are GPUs enough. ``deadline``: seconds, of everything;
    ``timeout``: of one collective. The last ``dying`` ranks end somewhere in ``main``: nobody waits for them.
    """
    given = (main, world, str(folder), timeout, devices, dying > 0)
    context = multiprocessing.start_processes(
        _rank, given, nprocs=world, join=False, start_method="spawn"
    )
    assert context is not None
    end = time.monotonic() + deadline
    while not context.join(timeout=0.5):  # raises what a rank raised
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{world} ranks did not end within {deadline} s: some of them hang")
    return [
        json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world - dying)
    ]


def _rank(
    rank: int, main: Main, world: int, folder: str, timeout: float, devices: bool, dying: bool
) -> None:
    torch.set_num_threads(1)
    cuda = devices and torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
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
    # Without the interpreter's end, which is not what is tested: of some hundred starts one rank ended with "terminate called
    # without an active exception". That it happened there is a guess: threads of C++ that want the interpreter then say so.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
