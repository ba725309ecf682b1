"""What both ranks of `test_agreement` run: found_inf, gradients of None and guards that differ
between ranks. gloo on the CPU, eagerly.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import normuon_fn as nm
from normuon_fn.compat import host_store
from normuon_fn.distributed import agreement
from normuon_fn.distributed.placements import local

SHAPES = {"square": (8, 8), "tall": (12, 8), "embed.weight": (10, 8), "bias": (6,)}
COUNTERS = ("guard.step", "guard.skipped", "guard.consecutive")
EXACT: dict[str, Any] = {"orthogonalize_dtype": torch.float32}
SHORT = 1.0  # seconds that a rank waits for others that do not come
Seen = dict[str, Any]


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def placed(kind: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind in ("mesh", "guard_mesh", "stages"):
        return given
    placement = Shard(0) if kind == "sharded" else Replicate()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(x, mesh, [placement]) for name, x in given.items()}


def plan_of(kind: str, params: dict[str, Tensor], **options: Any) -> nm.Plan:
    on: dict[str, Any] = {
        "mesh": {"mesh": dist.group.WORLD},
        "guard_mesh": {"guard_mesh": dist.group.WORLD},
        "stages": {"guard_mesh": dist.group.WORLD, "mesh": "alone"},
    }
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return nm.make_plan(params, nm.Config(**EXACT, **options), **on.get(kind, {}))


def bits(given: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: local(x).flatten().tolist() for name, x in given.items()}


# ------------------------------------------------------------------------------------- found_inf


def found_inf(rank: int, kind: str, guard: str, scope: str) -> Seen:
    """A step without found_inf anywhere, one with it on rank 1 alone, and one more without."""
    params = placed(kind, tensors(0))
    plan = plan_of(kind, params, guard=guard, guard_scope=scope)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)

    def step(seed: int, found: float) -> nm.StepResult:
        grads = placed(kind, tensors(seed))
        return nm.update(params, grads, state, hyper, plan, found_inf=torch.tensor(found))

    before = step(1, 0.0)
    params, state = before.params, before.state
    skipped = step(2, float(rank == 1))
    old, new = bits({**params, **state}), bits({**skipped.params, **skipped.state})
    params, state = skipped.params, skipped.state
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        nm.check(skipped, plan)
    after = step(3, 0.0)
    return {
        "skipped": [bool(x.skipped) for x in (before, skipped, after)],
        "moved": sorted(name for name in old.keys() - set(COUNTERS) if old[name] != new[name]),
        "flags": skipped.flags.tolist(),
        "counters": [int(after.state[name]) for name in COUNTERS],
        "params": bits(after.params),
        "said": [str(w.message) for w in said],
    }


def found_inf_of_one_rank_alone(rank: int, kind: str) -> str:
    params = placed(kind, tensors(0))
    plan = plan_of(kind, params)
    found = torch.zeros(()) if rank == 1 else None
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    return error_of(
        lambda: nm.update(params, placed(kind, tensors(1)), state, hyper, plan, found_inf=found)
    )


# -------------------------------------------------------------------------------- gradients of None


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def none_at_first(rank: int, kind: str, guard: str, lacking: str) -> Seen:
    """At the first step rank 1 has no gradient for one parameter; then all have all."""
    params = placed(kind, tensors(0))
    plan = plan_of(kind, params, guard=guard)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    grads: dict[str, Tensor | None] = {**placed(kind, tensors(1))}
    missing = {**grads, lacking: None} if rank == 1 else grads
    old = bits(params)
    error = error_of(lambda: nm.update(params, missing, state, hyper, plan))
    result = nm.update(params, grads, state, hyper, plan)
    everywhere = {**grads, "bias": None}
    without = nm.update(params, everywhere, state, hyper, plan)
    return {
        "error": error,
        "kept": bits(params) == old,
        "steps again": not result.skipped and bits(result.params) != old,
        "on all": bits(without.params)["bias"] == old["bias"],
    }


def none_later(rank: int) -> Seen:
    """At the second step rank 1 lacks an AdamW gradient, raises, and makes the step with it."""
    params = placed("replicated", tensors(0))
    plan = plan_of("replicated", params, guard="full")
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    first = nm.update(params, placed("replicated", tensors(1)), state, hyper, plan)
    grads: dict[str, Tensor | None] = {**placed("replicated", tensors(2))}
    dist.barrier()
    error, waited = "", 0.0
    if rank == 1:
        missing, start = {**grads, "embed.weight": None}, time.monotonic()
        error = error_of(lambda: nm.update(first.params, missing, first.state, hyper, plan))
        waited = time.monotonic() - start
    second = nm.update(first.params, grads, first.state, hyper, plan)
    return {"error": error, "waited": waited, "params": bits(second.params)}


def by_optimizer(rank: int, kind: str, late: int, **options: Any) -> Seen:
    """`NorMuon`: in step ``late`` rank 1 lacks the gradients of the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    if kind == "fsdp2":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ranks: Any = {} if kind == "fsdp2" else {"mesh": dist.group.WORLD}
    optimizer = nm.NorMuon(model, lr=0.02, config=nm.Config(**EXACT), **ranks, **options)
    errors = []
    for k in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(k))
        model(x).square().mean().backward()
        kept = {name: p.grad for name, p in model.named_parameters()}
        if k == late and rank == 1:
            for name, p in model.named_parameters():
                if name.startswith("2."):
                    p.grad = None
        failing = k == late and (rank == 1 or late == 0)
        errors.append(error_of(optimizer.step) if failing else "")
        for name, p in model.named_parameters():
            p.grad = kept[name]
        optimizer.step()
    steps = int(next(iter(optimizer.state.values()))["step"])
    return {"errors": errors, "steps": steps, "params": bits(dict(model.named_parameters()))}


def without_any(rank: int) -> str:
    """Rank 1 has no gradient at all at the first step."""
    model = nn.Linear(4, 4)
    optimizer = nm.NorMuon(model, mesh=dist.group.WORLD)
    if rank == 0:
        model(torch.randn(2, 4)).sum().backward()
    return error_of(optimizer.step)


# ------------------------------------------------------------------------------- who decides alone


def warned(function: Callable[[], Any]) -> list[list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [[str(w.message), w.filename] for w in found]


def alone(rank: int) -> Seen:
    params, on = tensors(0), dist.group.WORLD
    model = nn.Linear(4, 4)
    config, off = nm.Config(guard="full"), nm.Config()
    quiet: dict[str, Callable[[], Any]] = {
        "off": lambda: nm.make_plan(params, off),
        "mesh": lambda: nm.make_plan(params, config, mesh=on),
        "alone": lambda: nm.make_plan(params, config, mesh="alone"),
        "sharded": lambda: nm.make_plan(placed("sharded", params), config),
        "NorMuon, mesh": lambda: nm.NorMuon(model, guard="full", mesh=on),
        "NorMuon, alone": lambda: nm.NorMuon(model, guard="full", mesh="alone"),
    }
    said = {name: warned(function) for name, function in quiet.items()}
    said["make_plan"] = warned(lambda: nm.make_plan(params, config))
    said["NorMuon"] = warned(lambda: nm.NorMuon(model, guard="output"))
    plan = nm.make_plan(params, config, mesh="alone")
    grads = tensors(1)
    if rank == 1:
        grads["tall"][0, 0] = torch.nan
    result = nm.update(params, grads, nm.init(params, plan), nm.Hyper.of(params, lr=0.1), plan)
    said["a skip"] = warned(lambda: nm.check(result, plan))
    return said


# ------------------------------------------------------------------ gradients that nobody averaged


def unlike(rank: int) -> Seen:
    """First steps of plain tensors that ranks are said to have alike: in the last ones the ranks
    have the gradients of batches of their own.
    """

    def with_plan(grads: dict[str, Tensor], **on: Any) -> Callable[[], Any]:
        params = tensors(0)
        plan = nm.make_plan(params, nm.Config(guard="full", **EXACT), **on)
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
        return lambda: nm.update(params, grads, state, hyper, plan)

    def with_optimizer() -> None:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        optimizer = nm.NorMuon(model, mesh=dist.group.WORLD)
        for _ in range(3):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(rank))
            model(x).square().sum().backward()
            optimizer.step()

    mesh: dict[str, Any] = {"mesh": dist.group.WORLD}
    own, rounded = tensors(10 + rank), {n: x * (1 + 1e-4 * rank) for n, x in tensors(1).items()}
    bad = tensors(1)
    if rank == 1:
        bad["tall"][0, 0] = torch.nan
    return {
        "alike": warned(with_plan(tensors(1), **mesh)),
        "rounded": warned(with_plan(rounded, **mesh)),
        "a NaN": warned(with_plan(bad, **mesh)),
        "alone": warned(with_plan(own, mesh="alone")),
        "stages": warned(with_plan(own, mesh="alone", guard_mesh=dist.group.WORLD)),
        "their own": warned(with_optimizer),
        "again": warned(with_plan(own, **mesh)),
    }


# ------------------------------------------------------------------------------------------ stages


def stages(rank: int, kind: str) -> Seen:
    """Two stages whose parameters have the same names: with other shapes, or said to be alone."""
    shape = (4, 6) if rank == 0 or kind == "alone" else (6, 6)
    params = {"layer.weight": torch.randn(shape, generator=torch.Generator().manual_seed(rank))}
    ranks: Any = {"guard_mesh": dist.group.WORLD}
    if kind == "alone":
        ranks["mesh"] = "alone"
    plan: list[nm.Plan] = []
    said = warned(lambda: plan.append(nm.make_plan(params, nm.Config(guard="full"), **ranks)))
    grads = {"layer.weight": torch.randn(shape)}
    if rank == 1:
        grads["layer.weight"][0, 0] = torch.nan
    state, hyper = nm.init(params, plan[0]), nm.Hyper.of(params, lr=0.1)
    result = nm.update(params, grads, state, hyper, plan[0])
    return {
        "said": said,
        "skipped": bool(result.skipped),
        "flags": result.flags.tolist(),
        "report": warned(lambda: nm.check(result, plan[0])),
    }


def untold(rank: int) -> list[list[str]]:
    params = tensors(0)
    plan = nm.Config(guard="full")
    return warned(lambda: nm.make_plan(params, plan, guard_mesh=dist.group.WORLD))


def guards(rank: int, first: str, second: str) -> str:
    params = {f"stage{rank}.weight": torch.randn(4, 4)}
    config: Any = nm.Config(guard=second if rank else first)  # type: ignore[arg-type]
    return error_of(lambda: nm.make_plan(params, config, guard_mesh=dist.group.WORLD))


def late_stage(rank: int) -> list[bool]:
    """One stage has a late gradient, the other one plans nothing new."""
    model = nn.ModuleDict({f"stage{rank}": nn.Linear(4, 4), "late": nn.Linear(4, 4)})
    optimizer = nm.NorMuon(model, guard="full", mesh="alone", guard_mesh=dist.group.WORLD)
    skipped = []
    for k in range(2):
        parts = list(model.values()) if rank == 0 and k == 1 else [model[f"stage{rank}"]]
        sum(part(torch.randn(2, 4)).sum() for part in parts).backward()
        optimizer.step()
        assert optimizer.result is not None
        skipped.append(bool(optimizer.result.skipped))
    return skipped


def made_anew(rank: int) -> list[str]:
    """The errors of steps with process groups of the same name that one store served in turn.

    gloo has a part of the store to itself: it sometimes connects to the addresses of the last time.
    """
    store, world = host_store(), dist.get_world_size()
    agreement.host_store = lambda: store  # type: ignore[attr-defined]
    errors = []
    for steps in (1, 2, 3):
        dist.destroy_process_group()
        own = dist.PrefixStore(f"time {steps}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
        params = tensors(0)
        plan = plan_of("mesh", params, guard="full")
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)

        def step(*lacking: str) -> None:
            grads = {name: x for name, x in tensors(1).items() if name not in lacking}
            nm.update(params, {**dict.fromkeys(lacking), **grads}, state, hyper, plan)  # noqa: B023

        errors += [error_of(step) for _ in range(steps)]
        errors.append(error_of(lambda: step("bias")) if rank else "")
        step()  # in which rank 0 waits for rank 1
        errors.append(error_of(lambda: step("bias")))
    return errors


def the_end(rank: int) -> str:
    """As `none_later`, but rank 1 does not make the step again: it ends."""
    params = placed("sharded", tensors(0))
    plan = plan_of("sharded", params, guard="full")
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    first = nm.update(params, placed("sharded", tensors(1)), state, hyper, plan)
    grads: dict[str, Tensor | None] = {**placed("sharded", tensors(2))}
    if rank == 1:
        grads["bias"] = None
    try:
        nm.update(first.params, grads, first.state, hyper, plan)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, world: int, device: torch.device) -> Seen:
    agreement.PATIENCE = SHORT
    seen: Seen = {}
    for kind in KINDS:
        for guard, scope in GUARDS:
            if (kind, scope) != ("stages", "bucket"):
                seen[f"found {kind} {guard} {scope}"] = found_inf(rank, kind, guard, scope)
    for kind in ("mesh", "sharded"):
        seen[f"found alone {kind}"] = found_inf_of_one_rank_alone(rank, kind)
    for kind, guard, lacking in NONE:
        seen[f"none {kind} {guard} {lacking}"] = none_at_first(rank, kind, guard, lacking)
    seen["none later"] = none_later(rank)
    for kind in ("fsdp2", "ddp"):
        for late in (-1, 0, 1):
            seen[f"optimizer {kind} {late}"] = by_optimizer(rank, kind, late)
    seen["without any"] = without_any(rank)
    seen["alone"] = alone(rank)
    for kind in ("shapes", "alone"):
        seen[f"stages {kind}"] = stages(rank, kind)
    seen["untold"] = untold(rank)
    for pair in (("off", "full"), ("output", "full")):
        seen[f"guards {' '.join(pair)}"] = guards(rank, *pair)
    seen["unlike"] = unlike(rank)
    seen["late stage"] = late_stage(rank)
    seen["made anew"] = made_anew(rank)
    seen["the end"] = the_end(rank)  # the last one: rank 1 leaves
    return seen


KINDS = ("mesh", "guard_mesh", "replicated", "sharded", "stages")
GUARDS = [
    ("off", "step"), ("output", "step"), ("output", "bucket"), ("full", "step"), ("full", "bucket"),
]  # fmt: skip
NONE = [
    ("sharded", "off", "tall"), ("sharded", "full", "bias"), ("replicated", "full", "embed.weight"),
    ("mesh", "off", "bias"), ("mesh", "full", "tall"), ("guard_mesh", "full", "bias"),
]  # fmt: skip
