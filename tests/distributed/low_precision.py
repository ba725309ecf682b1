"""What both ranks of tests/step/test_low_precision.py run: bfloat16 DTensors beside float32 ones
that lie alike. gloo on CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import normuon_fn as nm
from normuon_fn.ops.rounding import joined_with
from normuon_fn.step import local_update_
from tests.distributed.processes import run_ranks

SHAPES = {
    "uneven": (7, 10),
    "qkv": (12, 6),
    "experts": (3, 4, 6),
    "bias": (5,),
    "embed.weight": (6, 4),
}
ROUTES = {"qkv": nm.Route(splits=(4, 4, 4))}
CONFIGS = {
    "float64 products": {"orthogonalize_dtype": torch.float64, "master": "mantissa"},
    "float64 momentum": {"orthogonalize_dtype": torch.float64, "momentum_dtype": torch.float64},
    "own in float64": {"orthogonalizer": lambda x: (x / 4).double()},
    "own in bfloat16": {"orthogonalizer": lambda x: x.bfloat16(), "momentum_dtype": torch.float64},
    "muon in float64": {"orthogonalize_dtype": torch.float64, "normalize": False},
    # In float32, so that products of one matrix and of several have the same bits.
    "int8 momentum": {"momentum_dtype": "int8", "orthogonalize_dtype": torch.float32},
    "int8 momentum, agreed late": {
        "momentum_dtype": "int8", "orthogonalize_dtype": torch.float32, "guard": "full",
    },
    "int8 momentum of owners": {
        "momentum_dtype": "int8", "orthogonalize_dtype": torch.float32, "replicas": "share",
    },
    # The floor ends updates after the messages, so gradients are agreed on late.
    "int8 momentum of owners, agreed late": {
        "momentum_dtype": "int8", "orthogonalize_dtype": torch.float32, "replicas": "share",
        "guard": "full", "update_floor": 0.5,
    },
}  # fmt: skip
# Of Shard(1): two blocks of columns, and a shard that cuts one.
COLUMNS = {"blocks": (5, 128), "tall": (130, 128), "stack": (3, 4, 200)}
LAYOUTS = {"Shard(0)": Shard(0), "Replicate": Replicate(), "Shard(1)": Shard(1)}


def run(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(_main, 2, folder)


def _main(rank: int, world: int, device: torch.device) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    seen = {kind: _layout(mesh, kind) for kind in [*LAYOUTS, "plain"]}
    seen["Shard(0)"]["foreach_step_ is the step by name"] = _by_lists(mesh)
    return seen


def _tensors(seed: int, dtype: torch.dtype, mesh: DeviceMesh, kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator).bfloat16().to(dtype)
        for name, shape in SHAPES.items()
    }
    if kind == "plain":
        return made
    if kind == "Shard(1)":
        made = {name: x for name, x in made.items() if name in ("uneven", "embed.weight")}
    return {name: distribute_tensor(x, mesh, [LAYOUTS[kind]]) for name, x in made.items()}


def _run(
    mesh: DeviceMesh, kind: str, master: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict, dict]:
    params = _tensors(0, dtype, mesh, kind)
    routes = {name: route for name, route in ROUTES.items() if name in params}
    plan = nm.make_plan(
        params,
        nm.Config(master=master, orthogonalize_dtype=torch.float32, guard="full"),
        routes=routes,
        mesh=mesh if kind == "plain" else None,
    )
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=1e-4, weight_decay=1e-2)
    for step in range(6):
        grads = _tensors(1 + step, dtype, mesh, kind)
        if step == 3 and dist.get_rank() == 1:  # a skipped step, on both ranks
            _local(grads["uneven"]).fill_(float("nan"))
        result = local_update_(params, grads, state, hyper, plan)
        assert bool(result.skipped) == (step == 3)
    return params, state


def _by_lists(mesh: DeviceMesh) -> bool:
    """Whether `foreach_step_` of DTensors is the step of the same by name."""
    names, config = (
        ("uneven", "experts"),
        nm.Config(master="mantissa", orthogonalize_dtype=torch.float32, guard="full"),
    )
    params, own, grads = (
        {k: _tensors(seed, torch.bfloat16, mesh, "Shard(0)")[k] for k in names}
        for seed in (0, 0, 1)
    )
    plan = nm.make_plan(params, config)
    state, again, hyper = nm.init(plan, params), nm.init(plan, params), nm.Hyper.of(params, lr=0.01)
    for _ in range(2):
        local_update_(params, grads, state, hyper, plan)
        lists = [
            [again[f"{k}.{what}"] for k in names] for what in ("momentum", "variance", "mantissa")
        ]
        nm.foreach_step_(
            list(own.values()),
            list(grads.values()),
            *lists,
            lr=0.01,
            momentum=0.95,
            beta2=0.95,
            weight_decay=0.0,
            config=config,
            compiled=False,
        )
    both = [(params[k], own[k]) for k in names] + [
        (state[k], again[k]) for k in state if not k.startswith("guard.")
    ]
    return all(torch.equal(_local(a), _local(b)) for a, b in both)


def _overflow_is_agreed(mesh: DeviceMesh, kind: str) -> bool:
    """Whether an update that float16 cannot hold, in one entry of a matrix and of an AdamW
    parameter, is flagged on both ranks, and all but momentums keep their bits.
    """
    right = []
    for victim in ("uneven", "embed.weight"):
        params = _tensors(0, torch.float16, mesh, kind)
        where = {name: _local(x) for name, x in params.items()}
        if dist.get_rank() == 1 or kind in ("Replicate", "plain"):
            where[victim].view(-1)[:4] = torch.tensor([65504.0, -65504.0, 65504.0, -65504.0])
        plan = nm.make_plan(
            params,
            nm.Config(orthogonalize_dtype=torch.float32, guard="full"),
            routes={name: route for name, route in ROUTES.items() if name in params},
            mesh=mesh if kind == "plain" else None,
        )
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=3000.0)
        grads = _tensors(1, torch.float16, mesh, kind)
        before = {name: x.clone() for name, x in where.items()}
        result = local_update_(params, grads, state, hyper, plan)
        right += [
            result.flags[0].tolist() == [int(name == victim) for name in plan.names],
            bool(result.skipped),
            all(torch.equal(x, before[name]) for name, x in where.items()),
            not any(
                bool(_local(x).any())
                for name, x in state.items()
                if not name.startswith("guard.") and not name.endswith(".momentum")
            ),
        ]
    return all(right)


def _as_on_one_device(mesh: DeviceMesh, kind: str, which: str) -> bool:
    """Whether two steps of DTensors or replicas have the bits and dtypes of whole tensors."""
    config = nm.Config(**CONFIGS[which])
    if kind == "Shard(1)" and config.momentum_dtype == torch.int8:
        return _codes_by_columns(mesh, config)
    params = _tensors(0, torch.bfloat16, mesh, kind)
    routes = {name: route for name, route in ROUTES.items() if name in params}
    wholes, grads = _whole(params), [_tensors(k, torch.bfloat16, mesh, kind) for k in (1, 2)]
    results = []
    for given, each, ranks in ((params, grads, mesh), (wholes, map(_whole, grads), None)):
        plan = nm.make_plan(given, config, routes=routes, mesh=ranks if kind == "plain" else None)
        state, hyper = nm.init(plan, given), nm.Hyper.of(given, lr=0.01)
        for own in each:
            local_update_(given, own, state, hyper, plan)
        results.append(_whole(given | state))
    return all(torch.equal(x, results[1][k]) for k, x in results[0].items())


def _codes_by_columns(mesh: DeviceMesh, config: nm.Config) -> bool:
    """Whether shards of whole blocks have the codes of whole tensors, and others are refused."""
    generator = torch.Generator().manual_seed(0)
    routes, results = {name: nm.Route() for name in COLUMNS}, []
    made = [
        {k: torch.randn(x, generator=generator).bfloat16() for k, x in COLUMNS.items()}
        for _ in range(3)
    ]
    for sharded in (True, False):
        params, *grads = (
            {
                k: distribute_tensor(x.clone(), mesh, [Shard(1)]) if sharded else x.clone()
                for k, x in each.items()
            }
            for each in made
        )
        plan = nm.make_plan(params, config, routes=routes)
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.01)
        for own in grads:
            local_update_(params, own, state, hyper, plan)
        results.append(_whole(params | state))
    alike = all(torch.equal(x, results[1][k]) for k, x in results[0].items())
    cut = {"w": distribute_tensor(torch.zeros(4, 130), mesh, [Shard(1)])}
    try:
        nm.make_plan(cut, config, routes={"w": nm.Route()})
    except ValueError as error:
        named = "params['w']" in str(error) and "multiples of 64 columns" in str(error)
        return alike and named
    return False


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what gloo cannot gather."""
    return {
        k: x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for k, x in tensors.items()
        if x.dtype != torch.int16
    }


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _layout(mesh: DeviceMesh, kind: str) -> dict[str, Any]:
    """What must be true of one layout, by claim; and the bits of what was rounded by chance."""
    wide, _ = _run(mesh, kind, "none", torch.float32)
    seen: dict[str, Any] = {}
    for master, suffix in (("mantissa", ".mantissa"), ("fp32", ".master")):
        params, state = _run(mesh, kind, master)
        rests = {name: state[name + suffix] for name in params}
        if kind != "plain":
            seen[f"{master} lies like the parameter"] = all(
                isinstance(rest, DTensor)
                and rest.placements == params[name].placements
                and rest.shape == params[name].shape
                for name, rest in rests.items()
            )
        seen[f"{master} is float32 bit for bit"] = all(
            torch.equal(joined_with(_local(params[name]), _local(rests[name])), _local(wide[name]))
            for name in params
        )
        seen[f"{master} moved"] = all(bool(_local(rest).any()) for rest in rests.values())
    (params, _), (again, _) = (_run(mesh, kind, "stochastic") for _ in range(2))
    seen["by chance again the same"] = all(
        torch.equal(_local(params[name]), _local(again[name])) for name in params
    )
    seen["an overflow of float16 is agreed"] = _overflow_is_agreed(mesh, kind)
    for which, options in CONFIGS.items():
        if kind == "plain" or "replicas" not in options:
            seen[f"{which}: as on one device"] = _as_on_one_device(mesh, kind, which)
    seen["bits"] = {name: _local(x).view(torch.int16).tolist() for name, x in params.items()}
    return seen
