"""What every rank of `test_guard_ranks` runs: many cases in one process, each a step with a fault
on one rank alone.

gloo on CPU; NCCL and a device a rank where there are GPUs enough. Every rank writes what it saw,
case by case, to a file.
"""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.step import local_update_
from tests.distributed.processes import run_ranks
from tests.faults import (
    COUNTERS,
    NAN,
    ROUTES,
    SHAPES,
    STAGES,
    VALUES,
    VICTIMS,
    bits,
    brittle,
    hyper_of,
    plant,
    tensors,
)

ON = [("output", "step"), ("output", "bucket"), ("full", "step"), ("full", "bucket")]
Seen = dict[str, Any]


def key(kind: str, guard: str, scope: str, stage: str, rank: int) -> str:
    return f"{kind} {guard} {scope} {stage} {rank}"


def faulty_ranks(kind: str, stage: str, world: int) -> tuple[int, ...]:
    """Every rank, or of four ranks whose kind is not "eager" a different one for each stage."""
    every = tuple(range(world))
    return every if world < 4 or kind == "eager" else every[STAGES.index(stage) :: 3]


def fault(stage: str, rank: int) -> tuple[str, str, str]:
    """Which fault a rank has in a stage: over the ranks and stages, all values and parameters come
    up.
    """
    at = 3 * STAGES.index(stage) + rank
    what, name = VALUES[at % len(VALUES)], VICTIMS[at % len(VICTIMS)]
    return stage, what, name


def run(world: int, folder: Path) -> list[dict[str, Seen]]:
    """case -> what it saw, for every rank."""
    return run_ranks(_main, world, folder, devices=True)


def _main(rank: int, world: int, device: torch.device) -> dict[str, Seen]:
    return _Rank(rank, world, device).everything()


class _Rank:
    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.logged: list[str] = []
        logger = logging.getLogger("normuon_fn")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(record.levelname)
        logger.addHandler(handler)

        mesh = init_device_mesh(device.type, (world,))
        # With `guard_mesh` alone every rank orthogonalizes everything, so that each fault shows on
        # the rank that has it.
        self.meshes: dict[str, dict[str, Any]] = {
            "mesh": {"guard_mesh": mesh},
            "group": {"guard_mesh": dist.group.WORLD},
            "shared": {"mesh": mesh},
            "alone": {},
        }
        if world == 4:
            square = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicate", "shard"))
            self.meshes["2-D"] = {"guard_mesh": square}
            self.meshes["row"] = {"guard_mesh": square["shard"]}
        plan, params = self.plan("alone", "off", "step"), self.here(tensors())
        warm = nm.update(
            params, self.here(tensors(1)), nm.init(plan, params), hyper_of(params), plan
        )
        self.params, self.state = warm.params, warm.state
        self.functions: dict[str, Callable[..., nm.StepResult]] = {}

    def here(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.device, copy=True) for name, x in given.items()}

    def plan(self, mesh: str, guard: str, scope: str) -> nm.Plan:
        config = nm.Config(guard=guard, guard_scope=scope, orthogonalizer=brittle)
        return nm.make_plan(self.here(tensors()), config, routes=ROUTES, **self.meshes[mesh])

    def everything(self) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}

        def cases(
            kind: str, mesh: str, function: Callable[..., nm.StepResult], on: list[tuple[str, str]]
        ) -> None:
            for guard, scope in on:
                plan = self.plan(mesh, guard, scope)
                for stage in STAGES:
                    for rank in faulty_ranks(kind, stage, self.world):
                        seen[key(kind, guard, scope, stage, rank)] = self.case(
                            function, plan, fault(stage, rank), rank
                        )
                seen[key(kind, guard, scope, "clean", 0)] = self.case(function, plan, None, 0)

        cases("eager", "mesh", nm.update, [*ON, ("off", "step")])
        cases("in place", "mesh", local_update_, [("full", "step")])
        cases(
            "compiled",
            "2-D" if self.world == 4 else "mesh",
            compile_whole(nm.update, "aot_eager"),
            [("full", "step")],
        )
        cases("alone", "alone", nm.update, [("full", "step")])
        for mesh in ("group", *(("2-D",) if self.world == 4 else ())):
            cases(mesh, mesh, nm.update, [("full", "step")])
        if self.world == 4:
            cases("row", "row", nm.update, [("full", "step")])
        seen["run"], seen["run without them"] = (
            self.run(sees_faults=True),
            self.run(sees_faults=False),
        )
        seen["raises"] = self.raises()
        return seen

    def case(
        self,
        function: Callable[..., nm.StepResult],
        plan: nm.Plan,
        planted: tuple | None,
        rank: int,
    ) -> Seen:
        params, state, grads = self.here(self.params), self.here(self.state), self.here(tensors(2))
        if planted is not None and rank == self.rank:
            plant(*planted, grads, state)
        before = self.here({**params, **state})
        result = function(params, grads, state, hyper_of(params), plan)
        after = {**result.params, **result.state}
        self.logged.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            said = nm.check(result, plan)
        return {
            "flags": result.flags.tolist(),
            "skipped": [bool(result.skipped), said],
            "counters": [int(result.state[name]) for name in COUNTERS],
            "kept": sorted(
                name
                for name in before.keys() - set(COUNTERS)
                if _digest(before[name]) == _digest(after[name])
            ),
            "not finite": sorted(name for name, x in after.items() if not x.isfinite().all()),
            "digests": {name: _digest(x) for name, x in after.items()},
            "warned": [f"{w.category.__name__}: {w.message}" for w in warned],
            "logged": list(self.logged),
        }

    def run(self, *, sees_faults: bool) -> Seen:
        """Twenty steps, eight of them with a faulty gradient on one rank."""
        dice = random.Random(0)  # the same on every rank
        faulty = {
            step: (dice.randrange(self.world), dice.choice(list(SHAPES)), dice.random())
            for step in dice.sample(range(20), 8)
        }
        params = self.here(tensors())
        plan = nm.make_plan(params, nm.Config(guard="full"), routes=ROUTES, **self.meshes["shared"])
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
        for step in range(20):
            grads = self.here(tensors(100 + step))
            if step in faulty:
                if not sees_faults:
                    continue
                rank, name, where = faulty[step]
                if rank == self.rank:
                    grads[name].view(-1)[int(where * grads[name].numel())] = NAN
            result = nm.update(params, grads, state, hyper, plan)
            params, state = result.params, result.state
        return {
            "digests": {
                name: _digest(x) for name, x in {**params, **state}.items() if name not in COUNTERS
            },
            "counters": [int(state[name]) for name in COUNTERS],
        }

    def raises(self) -> Seen:
        plan, state, messages = self.plan("mesh", "full", "step"), self.here(self.state), []
        for _ in range(2):
            grads = self.here(tensors(2))
            if self.rank == self.world - 1:
                grads["tall"][0, 0] = NAN
            result = nm.update(self.here(self.params), grads, state, hyper_of(self.params), plan)
            state = result.state
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    nm.check(result, plan, max_consecutive=2)
                    messages.append("")
                except nm.NonFiniteStepError as error:
                    messages.append(str(error))
        return {"messages": messages}


def _digest(x: Tensor) -> str:
    return hashlib.sha1(bits(x.cpu()).numpy().tobytes()).hexdigest()
