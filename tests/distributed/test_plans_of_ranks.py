"""Ranks whose plans differ: by mistake, which `init` says, and on purpose, as the stages of a
pipeline do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import normuon_fn as nm
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)


SCOPES = ("step", "bucket")
# A shape and the dimension that is sharded: the first rank has all of it.
ONE_LINE = (((1, 8), 0), ((8, 1), 1))
# Fused projections that are convolutions: a shape, the dimension that is sharded, and a route.
CONVOLUTIONS = {
    "rows": ((12, 4, 1, 1), 0, nm.Route(flatten=True, splits=(5, 4, 3))),
    "inputs": ((12, 4, 3), 1, nm.Route(flatten=True, splits=(6, 6), heads=(3, 2))),
    "whole heads": ((12, 4, 1, 1), 0, nm.Route(flatten=True, heads=4)),
    "columns": (
        (6, 12, 2, 2), 1, nm.Route(flatten=True, splits=(7, 5), dim=1, transposed=True)
    ),
}  # fmt: skip
CODED: dict[str, Any] = {"momentum_dtype": "int8", "guard_scope": "step"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_main, 2, tmp_path_factory.mktemp("plans"))


def _main(rank: int, world: int, device: torch.device) -> dict[str, Any]:
    return {
        "mistakes": _mistakes(rank),
        **{guard: _stages(rank, guard) for guard in ("output", "full")},
        "few": {scope: _as_on_one_device((1, 4, 6), 0, guard_scope=scope) for scope in SCOPES},
        "one": {
            str(case): _as_on_one_device(*case, guard_scope="step", reduction="short")
            for case in ONE_LINE
        },
        "convolutions": {
            case: _as_on_one_device(*given, guard_scope="step")
            for case, given in CONVOLUTIONS.items()
        }
        | {"int8": _as_on_one_device(*CONVOLUTIONS["rows"], **CODED)},
    }


def _mistakes(rank: int) -> list[str]:
    """What `init` says where rank 1 has another shape, another Config, or one parameter more."""
    group, messages = dist.group.WORLD, []
    params = {"a": torch.randn(4, 6), "b": torch.randn(6, 4)}
    others = [{**params, "b": torch.randn(8, 4)}, params, {**params, "c": torch.randn(4, 4)}]
    configs = [nm.Config(), nm.Config(steps=4), nm.Config()]
    for other, config in zip(others, configs, strict=True):
        given = other if rank else params
        plan = nm.make_plan(given, config if rank else nm.Config(), mesh=group)
        try:
            nm.init(plan, given)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def _stages(rank: int, guard: Any) -> dict[str, Any]:
    """Two stages of a pipeline, one parameter and two: a NaN in a gradient of stage 1, then a clean
    step.
    """
    shapes: dict[str, tuple[int, ...]] = (
        {"first": (4, 6)} if rank == 0 else {"second": (6, 4), "head.bias": (3,)}
    )
    generator = torch.Generator().manual_seed(rank)

    def tensors() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    params = tensors()
    plan = nm.make_plan(params, nm.Config(guard=guard), guard_mesh=dist.group.WORLD)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    grads = tensors()
    if rank == 1:
        grads["second"][0, 0] = torch.nan
    bad = nm.update(params, grads, state, hyper, plan)
    good = nm.update(bad.params, tensors(), bad.state, hyper, plan)
    return {
        "flags": bad.flags.tolist(),
        "skipped": [bool(bad.skipped), bool(good.skipped)],
        "kept": all(torch.equal(params[name], bad.params[name]) for name in params),
        "momentum kept": not any(
            bad.state[f"{name}.momentum"].any() for name in params if name != "head.bias"
        ),
        "moved": not any(torch.equal(params[name], good.params[name]) for name in params),
    }


def _as_on_one_device(
    shape: tuple[int, ...],
    dim: int,
    route: nm.Route = nm.Route(),  # noqa: B008
    **options: Any,
) -> bool:
    """Whether two steps of what the first of two ranks has alone are those of one device."""
    generator = torch.Generator().manual_seed(0)
    whole, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    config = nm.Config(guard="full", orthogonalize_dtype=torch.float32, **options)
    found = []
    for place in (
        lambda x: x,
        lambda x: distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(dim)]),
    ):
        params, grads = {"w": place(whole)}, {"w": place(grad)}
        plan = nm.make_plan(params, config, routes={"w": route}, mesh=None)
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
        for _ in range(2):
            params, state, *_ = nm.update(params, grads, state, hyper, plan)
        both = params["w"], state["w.variance"]
        found.append([x.full_tensor() if isinstance(x, DTensor) else x for x in both])
    return all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_rank_may_have_no_expert_at_all(seen: list[dict[str, Any]], scope: str) -> None:
    assert [found["few"][scope] for found in seen] == [True, True]


@pytest.mark.parametrize("case", [*CONVOLUTIONS, "int8"])
def test_a_shard_of_a_split_convolution_gives_what_one_device_gives(
    seen: list[dict[str, Any]], case: str
) -> None:
    assert [found["convolutions"][case] for found in seen] == [True, True]


@pytest.mark.parametrize("case", ONE_LINE)
def test_a_matrix_of_one_row_or_column_may_be_sharded_along_it(
    seen: list[dict[str, Any]], case: Any
) -> None:
    assert [found["one"][str(case)] for found in seen] == [True, True]


def test_init_names_what_differs_on_every_rank(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        shape, config, more = found["mistakes"]
        assert "b: (6, 4)" in shape and "b: (8, 4)" in shape
        assert "Config.steps: 5" in config and "Config.steps: 4" in config
        assert "c: (4, 4)" in more and "in 1 lines" in config


@pytest.mark.parametrize("guard", ["output", "full"])
def test_stages_with_other_parameters_skip_together(seen: list[dict[str, Any]], guard: str) -> None:
    first, second = (found[guard] for found in seen)
    poisoned = guard == "output"  # the momentum of the faulty parameter took the NaN
    assert first["skipped"] == second["skipped"] == [True, poisoned]
    assert first["kept"] and second["kept"] and first["moved"] == second["moved"] == (not poisoned)
    assert first["flags"] == [[0], [0]] and second["flags"] == [[1, 0], [1, 0]]
    if guard == "full":
        assert first["momentum kept"] and second["momentum kept"]
