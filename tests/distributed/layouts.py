"""What every rank of `test_layouts` runs: steps of sharded and shared parameters beside the same
steps of one device.

gloo on CPU; NCCL and a device a rank where there are GPUs enough. Every rank computes the
single-device result itself, cuts from it what should lie here, and writes how far off its own is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.step import local_update_
from tests.distributed.processes import run_ranks

Seen = dict[str, Any]

SHAPES = {
    "square": (8, 8),
    "uneven": (7, 10),
    "few": (3, 8),  # fewer rows than ranks
    "tall": (20, 8),
    "wide": (6, 24),
    "half": (12, 8),
    "conv": (6, 4, 3, 3),  # flattened to 6x36
    **{f"layers.{k}": (8, 12) for k in range(5)},
    "experts.even": (4, 8, 12),
    "experts.uneven": (5, 6, 10),
    "experts.few": (2, 6, 10),
    "heads": (16, 4),
    "gqa": (24, 3),  # heads of 3 rows
    "qkv": (16, 4),  # splits that a shard cuts
    "embed.weight": (11, 6),
    "bias": (10,),
    "gain": (3,),
    "frozen": (4, 4),
}
MAIN = tuple(name for name in SHAPES if name != "conv")  # which has its own cases
ROUTES = {
    "conv": nm.Route(flatten=True),
    "heads": nm.Route(heads=4),
    "gqa": nm.Route(splits=(12, 6, 6), heads=(4, 2, 2)),
    "qkv": nm.Route(splits=(6, 5, 5)),
    "gain": nm.Route("adamw", lr_mul=0.5),
    "frozen": nm.Route("frozen"),
}
COUNTERS = ("guard.step", "guard.skipped", "guard.consecutive")
GUARDS = ("off", "output", "full")
ON = [("output", "step"), ("output", "bucket"), ("full", "step"), ("full", "bucket")]
STAGES = ("gradient", "momentum", "variance")
STATES = ("momentum", "variance", "exp_avg", "exp_avg_sq", "master")
# Layouts, some with one of `VARIANTS`, of which shards alone know whether their part is finite.
FAULTED = {
    1: (),
    2: ("owned", "Shard(0)", "Shard(1)", "Shard(1) adamuon"),
    4: ("HSDP", "strided", "HSDP adamuon"),
}
COMPILED = {1: (), 2: ("ddp", "owned", "Shard(0)", "Shard(1)"), 4: ()}
SMALL = ("uneven",)  # what is compiled: a compiler's time is by the parameter
EVEN = ("square",)  # shards alike: the ranks share what Inductor compiles
MISSING = ("ddp", "Shard(0)", "Shard(1)", "Replicate")
SAVED = ("Shard(0)", "Shard(1)", "HSDP")
LOADED = ("Shard(0)", "Shard(1)")
CUT = ("ddp", "HSDP", "Shard(0)")
HOPS = ("Shard(0)", "Shard(1)", "2-D")  # of four ranks, in two hops
# Of four ranks: a layout, and how many of its replicas share the matrices of a bucket.
NARROWED = (("ddp", 2), ("ddp", 1), ("HSDP", 1))


def own(x: Tensor) -> Tensor:
    """An orthogonalizer [n, rows, cols] of the caller's."""
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
    for _ in range(6):
        x = 1.5 * x - 0.5 * torch.bmm(torch.bmm(x, x.mT), x)
    return x


def config(form: str, **overrides: Any) -> nm.Config:
    overrides = {"orthogonalize_dtype": torch.float32, **overrides}
    if form in ("standard", "gram"):
        return nm.Config(method=form, **overrides)
    if form in ("dion", "modded_nanogpt"):
        return nm.Config.preset(form, **overrides)
    if form in VARIANTS:
        return nm.Config.preset(**{"name": "paper", **VARIANTS[form], **overrides})
    if form == "own":
        return nm.Config(orthogonalizer=own, **overrides)
    if form == "muon":
        return nm.Config(normalize=False, **overrides)
    assert form == "bfloat16"
    return nm.Config(method="standard", **{**overrides, "orthogonalize_dtype": torch.bfloat16})


# What is decided by numbers of whole matrices, of which a shard has a part.
VARIANTS: dict[str, dict[str, Any]] = {
    "nanochat": {"name": "nanochat"},
    "adamuon": {"name": "adamuon", "cautious_update": True},
    "hyperball": {"weight_decay_form": "hyperball", "master": "fp32"},
    "floor": {"update_floor": 0.5, "reduction": "short", "cautious_update": True},
}
FORMS = ("standard", "gram", "dion", "modded_nanogpt", "own", "muon", "bfloat16", *VARIANTS)
LONG = {
    ("Shard(0)", "standard", "full"),
    ("Shard(1)", "gram", "full"),
    ("ddp", "modded_nanogpt", "full"),
}
LONG |= {("HSDP", "standard", "full"), ("strided", "standard", "off"), ("0 and 0", "dion", "full")}


WITHOUT_FOUR = ("ddp", "group", "owned", "Shard(0)", "Shard(1)", "Replicate")
ON_FOUR = ("HSDP", "2-D", "0 and 0", "strided")  # these need four ranks


def guards_of(layout: str, form: str, world: int) -> tuple[str, ...]:
    """Two ranks have tried the other guards on the layouts that they can have."""
    few = form != "standard" or (world == 4 and layout not in ON_FOUR)
    return ("full",) if few else GUARDS


def forms_of(layout: str, world: int) -> tuple[str, ...]:
    """What four ranks send does not depend on the form: two ranks have tried all of them. Each
    other form has a turn on one or two of the layouts of four.
    """
    if world < 4 or layout == "HSDP":
        without = layout in ("group", "Replicate")  # for `VARIANTS` they are as ddp
        refused = ("adamuon", "floor") if layout == "owned" else ()  # they read more than owners do
        return tuple(x for x in FORMS if x not in (VARIANTS if without else refused))
    return (FORMS[0], *(FORMS[ON_FOUR.index(layout) :: 3] if layout in ON_FOUR else ()))


def kinds_of(world: int) -> tuple[str, ...]:
    """The layouts that fewer ranks cannot have."""
    return ON_FOUR if world == 4 else WITHOUT_FOUR


def faulty_ranks(guard: str, scope: str, stage: str, world: int) -> tuple[int, ...]:
    """Every rank of two; of four, each has three turns over the guards, scopes and stages."""
    turn = ON.index((guard, scope)) + STAGES.index(stage)
    return tuple(range(world)) if world < 4 else (turn % world,)


def steps_of(layout: str, form: str, guard: str) -> int:
    return 5 if (layout, form, guard) in LONG else 2


def device_of(world: int) -> torch.device:
    """Of this rank."""
    return (
        torch.device("cuda", dist.get_rank())
        if torch.cuda.device_count() >= world
        else torch.device("cpu")
    )


@functools.cache
def tensors(seed: int, names: tuple[str, ...] = MAIN) -> dict[str, Tensor]:
    generator, device = torch.Generator().manual_seed(seed), device_of(dist.get_world_size())
    made = {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()
    }
    return {name: made[name].bfloat16() if name == "half" else made[name] for name in names}


def routes_of(params: Mapping[str, Tensor]) -> dict[str, nm.Route]:
    return {name: ROUTES[name] for name in params if name in ROUTES}


def hyper_of(params: Mapping[str, Tensor]) -> nm.Hyper:
    return nm.Hyper.of(params, lr=0.02, weight_decay=0.1)


@functools.cache
def alone(form: str, steps: int, names: tuple[str, ...] = MAIN) -> dict[str, Tensor]:
    """The parameters and state of a run on one device."""
    params = dict(tensors(0, names))
    plan = nm.make_plan(params, config(form), routes=routes_of(params))
    state = nm.init(plan, params)
    for step in range(steps):
        params, state, _, _ = nm.update(
            params, tensors(1 + step, names), state, hyper_of(params), plan
        )
    return {**params, **state}


@functools.cache
def alone_metrics(form: str) -> tuple[Tensor, Tensor]:
    """The metrics of a first step on one device, and of a second one that is skipped."""
    params = dict(tensors(0))
    plan = nm.make_plan(params, config(form, guard="full", metrics=True), routes=routes_of(params))
    result: Any = nm.update(params, tensors(1), nm.init(plan, params), hyper_of(params), plan)
    skipped: Any = nm.update(
        result.params, with_fault(tensors(2)), result.state, hyper_of(params), plan
    )
    return result.metrics, skipped.metrics


def with_fault(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one entry of one matrix that is not finite."""
    found = {name: grad.clone() for name, grad in grads.items()}
    name = next(name for name, grad in found.items() if grad.ndim == 2)
    found[name][0, 0] = float("nan")
    return found


# --------------------------------------------------------------------------------------- placements


def cut(x: Tensor, mesh: DeviceMesh, placements: Iterable[Any]) -> Tensor:
    """What this rank should hold of a tensor: cut mesh dimension by mesh dimension, the strided one
    last, as FSDP does.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    by_dim = sorted(enumerate(placements), key=lambda entry: isinstance(entry[1], _StridedShard))
    for k, placement in by_dim:
        if not isinstance(placement, Replicate):
            chunks = torch.chunk(x, mesh.size(k), placement.dim)
            at = coordinate[k]
            x = chunks[at] if at < len(chunks) else x.narrow(placement.dim, 0, 0)
    return x.clone(memory_format=torch.contiguous_format)


class Layout(NamedTuple):
    mesh: DeviceMesh
    default: tuple[Any, ...] | None  # None: plain tensors
    matrices: tuple[
        Any, ...
    ] = ()  # of experts and heads, where the default would cut matrices and the stack of them
    given: Any = None  # make_plan's mesh=
    replicas: str = "each"  # Config's

    def placements(self, name: str) -> tuple[Any, ...] | None:
        if self.default is None:
            return None
        if self.matrices and name.startswith(("experts", "heads", "gqa")):
            return self.matrices
        dims = len(SHAPES[name])
        return tuple(
            p if isinstance(p, Replicate) or p.dim < dims else Shard(0) for p in self.default
        )

    def cut(self, name: str, x: Tensor) -> Tensor:
        placements = self.placements(name)
        return x.clone() if placements is None else cut(x, self.mesh, placements)

    def place(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.wrap(name, self.cut(name, x)) for name, x in given.items()}

    def wrap(self, name: str, part: Tensor, placements: tuple[Any, ...] | None = None) -> Tensor:
        placements = placements or self.placements(name)
        if placements is None:
            return part
        shape = torch.Size(SHAPES[name])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def plan(self, params: Mapping[str, Tensor], config: nm.Config) -> nm.Plan:
        config = dataclasses.replace(config, replicas=self.replicas)  # type: ignore[arg-type]
        return nm.make_plan(params, config, routes=routes_of(params), mesh=self.given)


def layouts(world: int) -> dict[str, Layout]:
    kind = device_of(world).type
    mesh = init_device_mesh(kind, (world,))
    found = {
        "ddp": Layout(mesh, None, given=mesh),
        "group": Layout(mesh, None, given=dist.group.WORLD),
        "owned": Layout(mesh, None, given=mesh, replicas="share"),
        "Shard(0)": Layout(mesh, (Shard(0),)),
        "Shard(1)": Layout(mesh, (Shard(1),)),
        "Replicate": Layout(mesh, (Replicate(),)),
    }
    if world == 4:
        square = init_device_mesh(kind, (2, 2), mesh_dim_names=("outer", "inner"))
        found |= {
            "HSDP": Layout(square, (Replicate(), Shard(0))),
            "2-D": Layout(square, (Shard(0), Shard(1)), (Replicate(), Shard(0))),
            "0 and 0": Layout(square, (Shard(0), Shard(0))),
            "strided": Layout(square, (_StridedShard(0, split_factor=2), Shard(0))),
        }
    return found


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def owner(name: str) -> str:
    """The parameter that a state tensor belongs to."""
    return next(
        (p for p in SHAPES if name in (p, *(f"{p}.{k}" for k in STATES))),
        "",
    )


def reduced(
    placements: tuple[Any, ...], shape: tuple[int, ...], param: tuple[int, ...]
) -> tuple[Any, ...]:
    """The placements of a state of that shape: the parameter's, whole where its dimension is 1
    instead.
    """
    if len(shape) == 2 < len(param):  # flattened
        param = param[0], torch.Size(param[1:]).numel()
    return tuple(
        p if isinstance(p, Replicate) or shape[p.dim] == param[p.dim] else Replicate()
        for p in placements
    )


# ------------------------------------------------------------------------------------------- worlds


def run_worlds(folder: Path) -> dict[int, list[dict[str, Seen]]]:
    """What all ranks of 4, 2 and 1 saw. In this order: the first saves what the others load."""
    main = functools.partial(_main, folder)
    return {world: run_ranks(main, world, folder, devices=True) for world in (4, 2, 1)}


def run_dying(kind: str, world: int, folder: Path) -> list[Seen]:
    """What the survivors saw of a step whose last rank has died."""
    folder.mkdir()
    main = functools.partial(_dying, kind)
    return run_ranks(main, world, folder, devices=True, dying=1)


def _main(folder: Path, rank: int, world: int, device: torch.device) -> dict[str, Seen]:
    torch._inductor.config.compile_threads = 1
    return _Rank(rank, world, str(folder)).everything()


def _dying(kind: str, rank: int, world: int, device: torch.device) -> Seen:
    """One good step, then a step that the last rank never begins."""
    layout = layouts(world)[kind]
    params = layout.place({name: tensors(0)[name] for name in SMALL})
    plan = layout.plan(params, config("standard", guard="full"))
    state, grads = nm.init(plan, params), layout.place({name: tensors(1)[name] for name in SMALL})
    params, state, _, _ = nm.update(params, grads, state, hyper_of(params), plan)
    seen = {
        "first": bool(torch.stack([local(x).isfinite().all() for x in params.values()]).all()),
        "error": "",
    }
    if rank == world - 1:
        os._exit(0)
    try:
        result = nm.update(params, grads, state, hyper_of(params), plan)
        bool(result.skipped)
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    return seen


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d" in name and "wait_tensor" not in name and "_wrap_tensor" not in name:
            self.counts[name.split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


class _Rank:
    def __init__(self, rank: int, world: int, folder: str) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.device, self.layouts = device_of(world), layouts(world)

    def everything(self) -> dict[str, Seen]:
        parts = [self.matrix, self.conv, self.lies, self.missing, self.checkpoints, self.captured]
        parts += [self.metrics, self.clip]
        if self.world > 1:  # nothing to send, and nothing to differ in, with one rank
            parts += [self.faults, self.counts, self.errors, self.fsdp_tp, self.compiled]
            parts += [self.narrowed, self.cut, self.hops]
        parts += [self.owned]
        return {part.__name__: part() for part in parts}

    def matrix(self) -> Seen:
        seen = {}
        for kind, layout in self.layouts.items():
            for form in forms_of(kind, self.world):
                for guard in guards_of(kind, form, self.world):
                    steps = steps_of(kind, form, guard)
                    run = self.run(layout, config(form, guard=guard), steps)
                    seen[f"{kind} {form} {guard}"] = self.compare(layout, run, alone(form, steps))
        return seen

    def metrics(self) -> Seen:
        """How far off the metrics are from those of one device, and whether they change a bit."""
        seen: Seen = {}
        cases: list[tuple[str, Layout, dict[str, Any]]] = [
            *((kind, layout, {}) for kind, layout in self.layouts.items()),
            ("ddp, state divided", self.layouts["ddp"], {"replicas": "share"}),
        ]
        for kind, layout, options in cases:
            params = layout.place(tensors(0))
            results = []
            for metrics in (False, True):
                options = {**options, "guard": "full", "metrics": metrics}
                plan = layout.plan(params, config("standard", **options))
                with Collectives() as sent:
                    results.append(
                        nm.update(
                            params, layout.place(tensors(1)), nm.init(plan, params),
                            hyper_of(params), plan,
                        )
                    )  # fmt: skip
                results[-1] = (results[-1], sent.counts)
            (plain, few), (measured, more) = results
            skipped: Any = nm.update(
                measured.params, layout.place(with_fault(tensors(2))), measured.state,
                hyper_of(params), plan,
            )  # fmt: skip
            expected = torch.cat(alone_metrics("standard"))
            found = torch.cat([measured.metrics, skipped.metrics])
            off = (found - expected).abs() / expected.abs().clamp(min=1e-30)
            pairs = [*zip(plain.params.values(), measured.params.values(), strict=True)]
            pairs += zip(plain.state.values(), measured.state.values(), strict=True)
            seen[kind] = {
                "off": off.nan_to_num(0.0).max().item(),
                "other nan": (found.isnan() != expected.isnan()).sum().item(),
                "updates of a skipped step": skipped.metrics[[0, 4]].nan_to_num(0.0).max().item(),
                "same bits": all(torch.equal(local(a), local(b)) for a, b in pairs),
                "more": dict(more - few),
            }
        return seen

    def clip(self) -> Seen:
        """By layout, which parameters QK-clip gives other bits than on one device."""
        whole = dict(tensors(0))
        maxima = {"a": torch.tensor([400.0, 1.0, 150.0, float("nan")], device=self.device)}
        names = {"a": {"q": "square", "k": "layers.0"}}
        plan = nm.make_plan(whole, routes=routes_of(whole))
        expected, _ = nm.qk_clip(whole, maxima, plan, projections=names)
        assert not torch.equal(expected["square"], whole["square"])
        seen: Seen = {}
        for kind, layout in self.layouts.items():
            params = layout.place(whole)
            plan = layout.plan(params, config("standard"))
            pure, _ = nm.qk_clip(params, maxima, plan, projections=names)
            nm.qk_clip_(params, maxima, plan, projections=names)
            seen[kind] = [
                name
                for name, x in expected.items()
                if not torch.equal(local(params[name]), layout.cut(name, x))
                or not torch.equal(local(pure[name]), local(params[name]))
            ]
        return seen

    def conv(self) -> Seen:
        seen: Seen = {}
        for kind in kinds_of(self.world):
            layout = self.layouts[kind]
            for form in ("standard", "gram", "modded_nanogpt", "muon"):
                try:
                    run = self.run(layout, config(form, guard="full"), 2, ("conv", "bias"))
                except ValueError as error:  # of make_plan, the same on every rank
                    seen[f"{kind} {form}"] = {"error": str(error)}
                else:
                    seen[f"{kind} {form}"] = self.compare(
                        layout, run, alone(form, 2, ("conv", "bias"))
                    )
        return seen

    def run(
        self, layout: Layout, config: nm.Config, steps: int, names: tuple[str, ...] = MAIN
    ) -> dict[str, Tensor]:
        params = layout.place(tensors(0, names))
        plan = layout.plan(params, config)
        state = nm.init(plan, params)
        for step in range(steps):
            params, state, _, _ = nm.update(
                params, layout.place(tensors(1 + step, names)), state, hyper_of(params), plan
            )
        if layout.replicas == "share":
            whole = nm.gather_state(state, plan)
            assert all(torch.equal(x.cpu(), whole[key].cpu()) for key, x in state.items())
            state = {key: x.to(self.device) for key, x in whole.items()}
        return {**params, **state}

    def compare(
        self, layout: Layout, run: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> Seen:
        """The error of what lies here, relative to the whole tensor's norm, by name; and which have
        other bits.
        """
        errors, bits = {}, []
        assert run.keys() <= expected.keys()
        for name, x in run.items():
            whole, placements = (
                expected[name],
                None if name in COUNTERS else layout.placements(owner(name)),
            )
            if placements is not None:
                placements = reduced(placements, tuple(whole.shape), SHAPES[owner(name)])
            part = whole if placements is None else cut(whole, layout.mesh, placements)
            assert local(x).shape == part.shape, (name, local(x).shape, part.shape)
            norm = whole.double().norm().item()
            off = (local(x).double() - part.double()).norm().item()
            errors[name] = off / norm if norm else off
            if not torch.equal(local(x), part):
                bits.append(name)
        return {"errors": errors, "other bits": bits, "names": sorted(run)}

    def lies(self) -> Seen:
        """What of the state does not lie as its parameter, before and after a step."""
        seen = {}
        for kind in kinds_of(self.world):
            layout = self.layouts[kind]
            for form in ("standard", "modded_nanogpt"):
                params = layout.place(tensors(0))
                plan = layout.plan(params, config(form))
                state = nm.init(plan, params)
                result = nm.update(params, layout.place(tensors(1)), state, hyper_of(params), plan)
                wrong, sharded = [], 0
                for name, x in {
                    **state,
                    **result.params,
                    **result.state,
                    **{f"init {k}": v for k, v in state.items()},
                }.items():
                    name = name.removeprefix("init ")
                    placements = None if name in COUNTERS else layout.placements(owner(name))
                    if placements is None:
                        wrong += [f"{name} is a DTensor"] if isinstance(x, DTensor) else []
                        continue
                    param = SHAPES[owner(name)]
                    expected = reduced(placements, tuple(x.shape), param)
                    rows_first = form == "standard" and owner(name) not in (
                        "conv",
                        "heads",
                        "gqa",
                        "qkv",
                    )
                    if (
                        not isinstance(x, DTensor)
                        or x.placements != expected
                        or x.device_mesh != layout.mesh
                    ):
                        wrong.append(f"{name}: {expected}, got {getattr(x, 'placements', None)}")
                    shape = (*param[:-1], 1) if name.endswith(".variance") else param
                    if (rows_first or shape == param) and tuple(x.shape) != shape:
                        wrong.append(f"{name}: shape {tuple(x.shape)}")
                    sharded += 1
                seen[f"{kind} {form}"] = {"wrong": wrong, "sharded": sharded}
        for kind in ("Shard(0)", "Shard(1)"):  # and `cut` is what torch calls these placements
            layout = self.layouts[kind]
            seen[kind] = {"as torch": True}
            for name, x in layout.place(tensors(0)).items():
                torchs = distribute_tensor(
                    tensors(0)[name], layout.mesh, layout.placements(name), src_data_rank=None
                )
                seen[kind]["as torch"] &= torch.equal(torchs.to_local(), local(x))
        return seen

    def faults(self) -> Seen:
        seen = {}
        for kind in FAULTED[self.world]:
            place, _, form = kind.partition(" ")
            layout = self.layouts[place]
            for guard, scope in ON:
                params = layout.place(tensors(0))
                own = config(form or "standard", guard=guard, guard_scope=scope)
                plan = layout.plan(params, own)
                warm = nm.update(
                    params, layout.place(tensors(1)), nm.init(plan, params), hyper_of(params), plan
                )
                clean = nm.update(
                    warm.params, layout.place(tensors(2)), warm.state, hyper_of(params), plan
                )
                before = {**warm.params, **warm.state}
                seen[f"{kind} {guard} {scope}"] = {
                    "kept": self.kept(before, clean),
                    "flags": clean.flags.tolist(),
                    "names": list(plan.names),
                }
                for stage in STAGES:
                    for rank in faulty_ranks(guard, scope, stage, self.world):
                        seen[f"{kind} {guard} {scope} {stage} {rank}"] = self.fault(
                            layout, plan, warm, stage, rank
                        )
        return seen

    def fault(
        self, layout: Layout, plan: nm.Plan, warm: nm.StepResult, stage: str, rank: int
    ) -> Seen:
        params, state = ({k: self.copy(v) for k, v in x.items()} for x in (warm.params, warm.state))
        grads, victim = layout.place(tensors(2)), ""
        if rank == self.rank:
            kind = {"gradient": "", "momentum": ".momentum", "variance": ".variance"}[stage]
            given = grads if stage == "gradient" else state
            turn = (
                5 * rank
                + 3 * STAGES.index(stage)
                + ON.index((plan.config.guard, plan.config.guard_scope))
            )
            names = [
                n
                for n in MAIN
                if n != "frozen" and n + kind in given and local(given[n + kind]).numel()
            ]
            if stage == "gradient":  # an owner alone reads it
                names = [n for n in names if plan.owned.owners.get(n, rank) == rank]
            victim = names[turn % len(names)]
            local(given[victim + kind]).view(-1)[-1] = float("nan") if turn % 2 else float("inf")
        before = {**{k: self.copy(v) for k, v in {**params, **state}.items()}}
        result = nm.update(params, grads, state, hyper_of(params), plan)
        finite = all(bool(local(x).isfinite().all()) for x in result.params.values())
        return {
            "victim": victim,
            "flags": result.flags.tolist(),
            "skipped": bool(result.skipped),
            "counters": [int(result.state[name]) for name in COUNTERS],
            "kept": self.kept(before, result),
            "finite": finite,
        }

    def narrowed(self) -> Seen:
        """Where not all replicas share the work: a run, and steps with a fault on one rank."""
        seen: Seen = {}
        for kind, replicas in NARROWED if self.world == 4 else ():
            layout, key = self.layouts[kind], f"{kind} {replicas}"
            with mock.patch.object(
                import_module("normuon_fn.planning.sharing"),
                "replicas_to_share",
                lambda load, replicas=replicas: replicas,
            ):
                run = self.run(layout, config("standard"), 3)
                seen[key] = self.compare(layout, run, alone("standard", 3))
                params = layout.place(tensors(0))
                plan = layout.plan(params, config("standard", guard="full"))
            seen[key]["table"] = str(plan)
            warm = nm.update(
                params, layout.place(tensors(1)), nm.init(plan, params), hyper_of(params), plan
            )
            for stage in STAGES:
                for rank in range(self.world):
                    seen[f"{key} {stage} {rank}"] = self.fault(layout, plan, warm, stage, rank)
        return seen

    def owned(self) -> Seen:
        """Saved after three steps by ranks that share the state, loaded by others, three more."""
        layout, folder, seen = self.layouts["owned"], Path(self.folder), Seen()

        def started() -> tuple[dict[str, Tensor], nm.Plan, dict[str, Tensor]]:
            params = layout.place({k: torch.full_like(x, 7.0) for k, x in tensors(0).items()})
            plan = layout.plan(params, config("standard", guard="full"))
            return params, plan, nm.init(plan, params)

        def went_on(params: dict[str, Tensor], plan: nm.Plan, state: dict[str, Tensor]) -> Seen:
            for step in range(3, 6):
                grads = layout.place(tensors(1 + step))
                params, state, _, _ = nm.update(params, grads, state, hyper_of(params), plan)
            whole = {k: x.to(self.device) for k, x in nm.gather_state(state, plan).items()}
            return self.compare(layout, {**params, **whole}, alone("standard", 6))

        params, plan, state = started()
        own = {key.rpartition(".")[0] for key in state if key.endswith(".momentum")}
        seen["owned"] = sorted(own)
        params = layout.place(tensors(0))
        for step in range(3):
            grads = layout.place(tensors(1 + step))
            params, state, _, _ = nm.update(params, grads, state, hyper_of(params), plan)
        dcp.save({"run": {**params, **state}}, checkpoint_id=folder / f"owned-{self.world}")
        whole = nm.gather_state(state, plan)
        one = folder / f"owned-{self.world}.safetensors"
        if self.rank == 0:
            nm.save(one, params, whole, plan)
        if self.rank == 0 and self.world > 1:
            try:
                nm.save(folder / "never", params, state, plan)
            except ValueError as error:
                seen["error"] = str(error)
        dist.barrier()
        # What one rank saves: the same names, and all of them.
        if self.rank == 0:
            dcp.save({"run": {**params, **whole}}, checkpoint_id=folder / "owned-one", no_dist=True)
        dist.barrier()
        for saved in ("owned-4", f"owned-{self.world}", "owned-one"):
            params, plan, state = started()
            run = {**params, **state}
            dcp.load({"run": run}, checkpoint_id=folder / saved)
            params, state = {k: run[k] for k in params}, {k: run[k] for k in state}
            seen[saved.replace(str(self.world), "same")] = went_on(params, plan, state)
        for saved in ("owned-4.safetensors", one.name):
            params, plan, state = started()
            loaded = nm.load(folder / saved, plan, params=params)
            assert loaded.state.keys() == state.keys()
            seen[saved.replace(str(self.world), "same")] = went_on(params, plan, loaded.state)
        grads, hyper = layout.place(tensors(6)), hyper_of(params)
        grads["uneven"][0, 0] = float("nan")
        result = nm.update(params, grads, loaded.state, hyper, plan)
        file = nm.capture(
            result, grads, plan, folder / f"owned-{self.world}-{self.rank}", hyper=hyper
        )
        seen["captured"] = sorted(load_file(file.with_suffix(".safetensors")))
        return seen

    def cut(self) -> Seen:
        """Where the matrices of one shape are two buckets."""
        seen: Seen = {}
        order = import_module("normuon_fn.planning.order")
        for kind in CUT if self.world == 4 else ():
            layout = self.layouts[kind]
            with mock.patch.multiple(order, _GAIN=float("-inf"), _OWNED=0):
                run = self.run(layout, config("standard", guard="full"), 3)
                plan = layout.plan(layout.place(tensors(0)), config("standard"))
            before = layout.plan(layout.place(tensors(0)), config("standard"))
            seen[kind] = self.compare(layout, run, alone("standard", 3))
            seen[kind]["buckets"] = [len(before.buckets), len(plan.buckets)]
        return seen

    def hops(self) -> Seen:
        """The bits of a run whose messages go in two hops, beside one hop."""
        seen: Seen = {}
        for kind in HOPS if self.world == 4 else ():
            layout, runs, sent = self.layouts[kind], [], []
            for grid in ((4,), (2, 2)):
                with (
                    mock.patch.object(
                        import_module("normuon_fn.distributed.hops"),
                        "grid_for_hops",
                        lambda *_, grid=grid: grid,
                    ),
                    Collectives() as collectives,
                ):
                    runs.append(self.run(layout, config("standard", guard="full"), 3))
                sent.append(collectives.counts["all_to_all_single"])
            same = [name for name, x in runs[0].items() if _digest(x) == _digest(runs[1][name])]
            seen[kind] = {"all": [*runs[0]], "same": same, "sent": sent}
        return seen

    def kept(self, before: Mapping[str, Tensor], result: nm.StepResult) -> dict[str, bool]:
        """Whether a tensor kept its bits, for all of which something lies here."""
        after = {**result.params, **result.state}
        here = [
            name
            for name, x in before.items()
            if name not in COUNTERS and owner(name) != "frozen" and local(x).numel()
        ]
        return {name: _digest(before[name]) == _digest(after[name]) for name in here}

    @staticmethod
    def copy(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x.clone()
        return DTensor.from_local(
            x.to_local().clone(),
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )

    def counts(self) -> Seen:
        """The collectives of a step of one parameter, or of a few."""
        seen = {}
        sets = {
            "heads": ["heads"],
            "experts": ["experts.even", "experts.uneven", "experts.few"],
            "qkv": ["qkv"],
        }
        sets |= {
            "one bucket": [f"layers.{k}" for k in range(5)],
            "two buckets": ["uneven", "tall"],
            "adamw": ["bias"],
        }
        for kind in kinds_of(self.world):
            layout = self.layouts[kind]
            for which, names in sets.items():
                for guard in ("off", "full"):
                    params = layout.place({name: tensors(0)[name] for name in names})
                    plan = layout.plan(params, config("standard", guard=guard))
                    grads, state = (
                        layout.place({name: tensors(1)[name] for name in names}),
                        nm.init(plan, params),
                    )
                    # At the first step hosts compare what they have.
                    warm = nm.update(params, grads, state, hyper_of(params), plan)
                    with Collectives() as collectives:
                        nm.update(warm.params, grads, warm.state, hyper_of(params), plan)
                    seen[f"{kind} {which} {guard}"] = dict(collectives.counts)
        return seen

    def errors(self) -> Seen:
        mesh = self.layouts["Shard(0)"].mesh
        layout, names = self.layouts["Shard(0)"], ("square", "bias")
        params = layout.place({name: tensors(0)[name] for name in names})
        grads = layout.place({name: tensors(1)[name] for name in names})
        plan = layout.plan(params, config("standard"))
        state, hyper = nm.init(plan, params), hyper_of(params)

        def plan_of(x: Tensor, route: nm.Route, **overrides: Any) -> nm.Plan:
            return nm.make_plan({"w": x}, config("standard", **overrides), routes={"w": route})

        def stepped(function: Callable[..., Any], **given: Any) -> Any:
            return function(
                given.get("params", params),
                given.get("grads", grads),
                given.get("state", state),
                hyper,
                plan,
            )

        whole = torch.randn(12 if self.world == 4 else 6, 8, device=self.device)
        dtensor = distribute_tensor(whole, mesh, (Shard(0),), src_data_rank=None)
        short = distribute_tensor(
            torch.randn(16, 8, device=self.device), mesh, (Shard(0),), src_data_rank=None
        )
        partial = DTensor.from_local(
            torch.randn(8, 8, device=self.device), mesh, (Partial(),), run_check=False
        )
        conv = distribute_tensor(
            torch.randn(4, 4, 4, 4, device=self.device), mesh, (Shard(2),), src_data_rank=None
        )
        cols = self.layouts["Shard(1)"].place({"square": tensors(1)["square"]})["square"]
        other = {**grads, "square": cols}
        none = {**grads, "square": None}
        cases: dict[str, Callable[[], Any]] = {
            "heads cut by a shard": lambda: plan_of(dtensor, nm.Route(heads=3)),
            "variance without placements": lambda: plan_of(
                short, nm.Route(heads=4), reduction="short"
            ),
            "flattened dimension": lambda: plan_of(conv, nm.Route(flatten=True)),
            "Partial": lambda: plan_of(partial, nm.Route()),
            "grad's placements": lambda: stepped(nm.update, grads=other),
            "grad's placements, compiled": lambda: stepped(nm.step, grads=other),
            "grad's placements, in place": lambda: stepped(nm.step_, grads=other),
            "state's placements": lambda: stepped(
                nm.update, state={**state, "square.momentum": cols}
            ),
            "param's placements": lambda: stepped(nm.update, params={**params, "square": cols}),
            "None": lambda: stepped(nm.update, grads=none),
            "None, compiled": lambda: stepped(nm.step, grads=none),
        }
        if self.world == 4:
            square = self.layouts["2-D"]
            stack = distribute_tensor(
                torch.randn(4, 8, 8, device=self.device),
                square.mesh,
                (Shard(0), Shard(1)),
                src_data_rank=None,
            )
            cases["matrices and their stack"] = lambda: plan_of(stack, nm.Route())
        seen = {}
        for case, function in cases.items():
            try:
                function()
                seen[case] = ""
            except Exception as error:
                seen[case] = f"{type(error).__name__}: {error}"
        return seen

    def missing(self) -> Seen:
        """A gradient that only some ranks lack, against zeros in its place; and one that no rank
        shares.
        """
        seen = {}
        for kind in ("ddp", "Shard(0)") if self.world == 4 else MISSING:
            layout, name = self.layouts[kind], "layers.2"
            params = layout.place(tensors(0))
            plan = layout.plan(params, config("standard", guard="full", missing_grads="zeros"))
            runs = []
            for lacks in (False, True):
                now, state = params, nm.init(plan, params)
                for step in range(3):
                    grads: dict[str, Tensor | None] = dict(layout.place(tensors(1 + step)))
                    if self.rank % 2 or layout.default is None or layout.default == (Replicate(),):
                        zeros = torch.zeros_like(local(params[name]))
                        grads[name] = layout.wrap(name, zeros)
                    if lacks and self.rank % 2:
                        grads[name] = None
                    now, state, _, _ = nm.update(now, grads, state, hyper_of(now), plan)
                runs.append({k: _digest(v) for k, v in {**now, **state}.items()})
            seen[kind] = {"same": runs[0] == runs[1], "replica": runs[1][name]}
        return seen

    def checkpoints(self) -> Seen:
        """Saved after three steps on four ranks, loaded by fewer, three steps more: against six on
        one device.
        """
        kinds = SAVED if self.world == 4 else LOADED
        seen = {}
        for saved in SAVED:
            path = Path(self.folder) / f"checkpoint-{SAVED.index(saved)}"
            for kind in (saved,) if self.world == 4 else kinds:
                layout = self.layouts[kind]
                if self.world == 4:
                    run = self.run(layout, config("standard", guard="full"), 3)
                    dcp.save({"run": run}, checkpoint_id=path)
                    seen[f"{saved} {kind}"] = self.compare(layout, run, alone("standard", 3))
                    continue
                params = layout.place(
                    {name: torch.full_like(x, 7.0) for name, x in tensors(0).items()}
                )
                plan = layout.plan(params, config("standard", guard="full"))
                run = {**params, **nm.init(plan, params)}
                dcp.load({"run": run}, checkpoint_id=path)
                params, state = {k: run[k] for k in MAIN}, {k: run[k] for k in plan.state}
                for step in range(3, 6):
                    params, state, _, _ = nm.update(
                        params, layout.place(tensors(1 + step)), state, hyper_of(params), plan
                    )
                seen[f"{saved} {kind}"] = self.compare(
                    layout, {**params, **state}, alone("standard", 6)
                )
                seen[f"{saved} {kind}"]["counters"] = [int(state[name]) for name in COUNTERS]
        return seen

    def fsdp_tp(self) -> Seen:
        """Two steps of a module of torch's own FSDP2 and tensor parallelism, against one device
        with the same gradients.
        """
        if self.world != 4:
            return {}
        mesh = init_device_mesh(self.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False)).to(
            self.device
        )
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        params: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        plan = nm.make_plan(params, config("standard", guard="full"))
        state, hyper = nm.init(plan, params), hyper_of(params)
        whole = {name: p.full_tensor().clone() for name, p in params.items()}
        one = nm.make_plan(whole, config("standard"))
        one_state = nm.init(one, whole)
        for step in range(2):
            torch.manual_seed(1 + step)
            model.zero_grad()
            model(torch.randn(4, 8, device=self.device)).square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            full = {name: g.full_tensor() for name, g in grads.items()}
            result = nm.update(params, grads, state, hyper, plan)
            state = result.state
            for name, new in result.params.items():
                local(params[name]).copy_(local(new))
            whole, one_state, _, _ = nm.update(whole, full, one_state, hyper, one)
        errors = {}
        for name, x in {**whole, **one_state}.items():
            got = {**params, **state}[name]
            got = got.full_tensor() if isinstance(got, DTensor) else got
            errors[name] = ((got - x).double().norm() / x.double().norm().clamp(min=1e-30)).item()
        return {
            "placements": {name: str(p.placements) for name, p in params.items()},
            "errors": errors,
        }

    def captured(self) -> Seen:
        """What a step with a NaN on the last rank was given, beside what one device saves of it."""
        seen, names = {}, ("uneven", "tall", "bias")
        for kind in ("Shard(0)", "Shard(1)"):
            layout, folder = self.layouts[kind], Path(self.folder) / f"captured-{self.world}-{kind}"
            params = layout.place({name: tensors(0)[name] for name in names})
            plan = layout.plan(params, config("standard", guard="full"))
            grads, hyper = {name: tensors(1)[name].clone() for name in names}, hyper_of(params)
            grads["tall"][-1, -1] = float("nan")
            result = nm.update(params, layout.place(grads), nm.init(plan, params), hyper, plan)
            path = nm.capture(
                result, plan, layout.place(grads), folder / f"ranks-{self.rank}", hyper=hyper
            )
            whole = {name: tensors(0)[name] for name in names}
            one = nm.make_plan(whole, config("standard", guard="full"))
            alone = nm.update(whole, grads, nm.init(one, whole), hyper, one)
            other = nm.capture(alone, one, grads, folder / f"alone-{self.rank}", hyper=hyper)
            files = [load_file(file.with_suffix(".safetensors")) for file in (path, other)]
            seen[kind] = {
                "keys": sorted(files[0]),
                "same": [
                    name
                    for name in files[1]
                    if torch.equal(files[0][name].nan_to_num(), files[1][name].nan_to_num())
                ],
                "blocks": json.loads(path.read_text())["blocks"]
                == json.loads(other.read_text())["blocks"],
            }
        return seen

    def compiled(self) -> Seen:
        seen = {}
        for kind in COMPILED[self.world]:
            layout = self.layouts[kind]
            functions: list[Callable[..., nm.StepResult]] = [nm.update, nm.step, nm.step_]
            names = EVEN if kind == "Shard(0)" else SMALL
            if kind != "Shard(0)":  # without Inductor, which takes most of the time
                functions[1:] = [compile_whole(f, "aot_eager") for f in (nm.update, local_update_)]
            runs: list[dict[str, Tensor]] = []
            for function in functions:
                params = layout.place({name: tensors(0)[name] for name in names})
                plan = layout.plan(params, config("standard", guard="full", steps=1))
                state = nm.init(plan, params)
                for step in range(2):
                    grads = layout.place({name: tensors(1 + step)[name] for name in names})
                    params, state, _, _ = function(params, grads, state, hyper_of(params), plan)
                runs.append({**params, **state})
            eager, pure, inplace = runs
            off = {}
            for name, x in eager.items():
                norm = local(x).double().norm().item()
                off[name] = (local(pure[name]).double() - local(x).double()).norm().item() / (
                    norm or 1.0
                )
            seen[kind] = {
                "off": off,
                "same": [name for name in pure if _digest(pure[name]) == _digest(inplace[name])],
                "names": list(eager),
                "lies": all(
                    not isinstance(x, DTensor) or x.placements == eager[name].placements
                    for name, x in [*pure.items(), *inplace.items()]
                )
                and all(
                    isinstance(pure[name], DTensor) == isinstance(x, DTensor)
                    for name, x in eager.items()
                ),
            }
        return seen


def _digest(x: Tensor) -> str:
    x = local(x).contiguous()
    return hashlib.sha1(
        x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).cpu().numpy().tobytes()
    ).hexdigest()
