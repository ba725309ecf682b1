"""Ranks that are killed or frozen at a stage of a step; run by `test_dying_ranks` as a process of
its own, which has imported everything once and forks all ranks.

    python -m tests.distributed.dying folder
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import normuon_fn as nm
from normuon_fn.algorithm import guard
from normuon_fn.distributed import hops, messages
from normuon_fn.planning import tensors as written
from normuon_fn.runtime import outside
from tests.distributed.processes import GLOO_TIMEOUT

STAGES = ("before the guard", "before the gather", "between", "after", "while it is written")
REPLICATED = "before the relay of replicated parameters"
WORLDS = {"kill": (2, 4), "freeze": (2,)}
TIMEOUT = 15.0  # seconds, of the group of the steps; 6 were few for 24 ranks on 2 busy cores
SAVED, FAULTY, STEPS = 2, 3, 4
SHAPES = {"first.weight": (8, 12), "second.weight": (9, 12), "bias": (8,)}


class Case(NamedTuple):
    how: str
    world: int
    victim: int
    stage: str
    compiled: bool = False  # the survivors' steps; the victim ends at a stage of one that is not

    @property
    def replicated(self) -> bool:
        return self.stage == REPLICATED

    @property
    def whole(self) -> str:
        """The name of the run that never failed."""
        return f"{'replicated' if self.replicated else 'sharded'} {self.world}"

    @property
    def name(self) -> str:
        graph = ", compiled" if self.compiled else ""
        return f"{self.how}, {self.stage}, rank {self.victim} of {self.world}{graph}"


CASES = [
    Case(how, world, victim, stage)
    for how, worlds in WORLDS.items()
    for world in worlds
    for k, stage in enumerate((*STAGES, REPLICATED))
    # Of four, the first or the last by the stage: two have tried both.
    for victim in ((0, world - 1) if world == 2 else (k % 2 * (world - 1),))
]

COMPILED = [Case("kill", 2, 1, "between", compiled=True)]


def error_of(case: Case) -> tuple[int, str]:
    """The step in which the others notice, and the collective that they name."""
    if case.replicated:
        return FAULTY, messages.RELAY
    if case.stage == "before the gather":
        return FAULTY, messages.GATHER
    if case.stage == "between":
        return FAULTY, messages.SCATTER
    return FAULTY if case.stage == "before the guard" else STEPS, "the guard's all_reduce"


def end(how: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def die_at(case: Case, patch: Callable[[Any, str, Any], None]) -> None:
    """Lets this rank end where the stage says, the next time a step gets there."""
    exchanges = [0]
    reduce, exchange, gather = guard.all_reduce_max, hops.all_to_all, messages.all_gather
    count, after = written.CallersDicts.count, guard.Agreement.after

    def all_reduce_max(*given: Any) -> Tensor:
        if case.stage == "before the guard":
            end(case.how)
        return reduce(*given)

    def all_to_all(*given: Any) -> Tensor:
        exchanges[0] += 1  # two buckets: two gathers, then two scatters
        if (case.stage, exchanges[0]) in (("before the gather", 1), ("between", 3)):
            end(case.how)
        return exchange(*given)

    def all_gather(*given: Any) -> Tensor:
        if case.replicated:
            end(case.how)
        return gather(*given)

    def counted(tensors: Any, counters: Any) -> None:
        if case.stage == "while it is written":  # parameters are, the counters are not
            end(case.how)
        count(tensors, counters)

    patch(guard, "all_reduce_max", all_reduce_max)
    patch(hops, "all_to_all", all_to_all)
    patch(messages, "all_gather", all_gather)
    patch(written.CallersDicts, "count", counted)

    def agreed(agreement: Any, works: Any) -> None:
        if case.stage == "after":
            end(case.how)
        after(agreement, works)

    patch(guard.Agreement, "after", agreed)


class Run:
    """Sharded or replicated parameters, their state, and steps that are the same in every run."""

    def __init__(self, replicated: bool, timeout: float = TIMEOUT) -> None:
        self.replicated = replicated
        group = dist.new_group(timeout=timedelta(seconds=timeout))
        self.mesh = DeviceMesh.from_group(group, "cpu")
        self.params = self.drawn(0)
        own = self.mesh if replicated else None
        self.plan = nm.make_plan(self.params, nm.Config(guard="full"), mesh=own)
        self.state, self.step = nm.init(self.plan, self.params), 0

    def drawn(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        if self.replicated:
            return whole
        # Every rank has drawn the same: nothing is sent.
        return {
            name: distribute_tensor(x, self.mesh, [Shard(0)], src_data_rank=None)
            for name, x in whole.items()
        }

    @property
    def saved(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state}

    def advance(self) -> None:
        self.step += 1
        hyper = nm.Hyper.of(self.params, lr=0.02, weight_decay=0.1)
        nm.step_(self.params, self.drawn(self.step), self.state, hyper, self.plan)

    def digest(self) -> str:
        found = hashlib.sha1()
        for name, x in sorted({**self.params, **self.state}.items()):
            part = x.to_local() if isinstance(x, DTensor) else x
            found.update(name.encode() + part.reshape(-1).numpy().tobytes())
        return found.hexdigest()


def failing(case: Case, folder: Path, rank: int) -> dict[str, Any]:
    """What a survivor saw. The step before was saved."""
    if case.compiled and rank != case.victim:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        torch._dynamo.config.disable = False
        outside.compile_whole = functools.partial(outside.compile_whole, backend="aot_eager")
    # The victim waits for those that compile.
    run = Run(case.replicated, GLOO_TIMEOUT.total_seconds() if case.compiled else TIMEOUT)
    for _ in range(SAVED):
        run.advance()
    dcp.save(run.saved, checkpoint_id=folder / "saved")
    dist.barrier()
    began = time.monotonic()
    try:
        if rank == case.victim:
            die_at(case, setattr)
        for _ in range(SAVED, STEPS):
            run.advance()
    except Exception as error:
        took = time.monotonic() - began
        return {"error": str(error), "step": run.step, "seconds": took, "graphs": graphs()}
    return {"error": "", "step": run.step, "seconds": time.monotonic() - began}


def graphs() -> int:
    """How many there are in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def resumed(replicated: bool, saved: Path | None, rank: int) -> dict[str, Any]:
    run = Run(replicated)
    if saved:
        dcp.load(run.saved, checkpoint_id=saved)
        run.step = SAVED
    while run.step < STEPS:
        run.advance()
    dist.barrier()
    return {"digest": run.digest()}


class Ranks:
    """Forked ranks of one group, which write what ``main`` returns."""

    def __init__(self, world: int, folder: Path, main: Callable[[int], dict[str, Any]]) -> None:
        self.folder, self.pids = folder, {}
        folder.mkdir(parents=True)
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                self._rank(rank, world, main)
            self.pids[rank] = pid

    def _rank(self, rank: int, world: int, main: Callable[[int], dict[str, Any]]) -> None:
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{self.folder}/store", rank=rank, world_size=world,
                timeout=GLOO_TIMEOUT,
            )  # fmt: skip
            seen = main(rank)
            (self.folder / f"{rank}.json").write_text(json.dumps(seen))
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{self.folder.name}, rank {rank}: {type(error).__name__}: {error}\n")
            code = 1
        sys.stderr.flush()
        os._exit(code)

    def seen(self, victim: int | None = None) -> list[dict[str, Any]]:
        """By rank, without the victim. A frozen one is killed when the others have ended."""
        for rank, pid in self.pids.items():
            if rank != victim:
                os.waitpid(pid, 0)
        if victim is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pids[victim], signal.SIGKILL)
            os.waitpid(self.pids[victim], 0)
        files = [self.folder / f"{rank}.json" for rank in self.pids if rank != victim]
        return [json.loads(x.read_text()) if x.exists() else {"error": "no report"} for x in files]


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in {case.whole: case for case in CASES}.values():
        main = functools.partial(resumed, case.replicated, None)
        found[case.whole] = Ranks(case.world, folder / case.whole, main).seen()
    # Frozen ranks cost the others the timeout, and nobody any work: all of them at once.
    every = [*CASES, *COMPILED]
    kills = [case for case in every if case.how == "kill"]
    waves = [[case for case in every if case.how == "freeze"]]
    for wave in waves + [kills[k : k + 3] for k in range(0, len(kills), 3)]:
        places = {case: folder / str(every.index(case)) for case in wave}
        ranks = {
            case: Ranks(case.world, place, functools.partial(failing, case, place))
            for case, place in places.items()
        }
        survivors = {case: x.seen(case.victim) for case, x in ranks.items()}
        found |= {case.name: {"survivors": survivors[case]} for case in wave}
        again = {
            case: Ranks(
                case.world,
                place / "again",
                functools.partial(resumed, case.replicated, place / "saved"),
            )
            for case, place in places.items()
            if not case.compiled
        }
        for case, restarted in again.items():
            found[case.name]["restarted"] = restarted.seen()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    into = Path(sys.argv[1])
    (into / "seen.json").write_text(json.dumps(everything(into)))
