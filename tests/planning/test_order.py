"""In which order buckets go through a step: nobody waits for a large answer at its end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.planning.order import Times, best_order, duration

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)


def test_the_last_update_to_wait_for_is_the_cheapest() -> None:
    small, large = Times(1e-4, 1e-4, 1e-3, 1e-4), Times(1e-3, 5e-4, 9e-3, 4e-3)
    order = best_order([small, large, large])
    assert order[-1] == 0 and duration([small, large, large], order) < duration(
        [small, large, large], (0, 1, 2)
    )


def test_no_order_of_three_is_better() -> None:
    times = [Times(2e-4, 3e-3, 1e-3, 2e-3), Times(5e-4, 1e-3, 6e-3, 1e-3), Times(1e-3, *[5e-3] * 3)]
    orders = list(itertools.permutations(range(3)))
    best = min(duration(times, order) for order in orders)
    assert duration(times, best_order(times)) == best
    assert best < max(duration(times, order) for order in orders)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_what_is_alike_stays_in_the_order_of_the_parameters(count: int) -> None:
    assert best_order([Times(1e-6, 1e-6, 1e-6, 1e-6)] * count) == tuple(range(count))


def plan_of_a_model(*, width: int = 2048, **options: Any) -> nm.Plan:
    """24 layers under FSDP2 on 8 ranks, without values."""
    shapes: dict[str, tuple[int, int]] = {}
    for k in range(24):
        shapes |= {f"{k}.{x}": (width, width) for x in "qkvo"}
        shapes |= {f"{k}.up": (4 * width, width), f"{k}.down": (width, 4 * width)}
    with graphs.fake_ranks(8, "1-D mesh") as mesh:
        assert isinstance(mesh, DeviceMesh)
        params: dict[str, torch.Tensor] = {
            name: DTensor.from_local(
                torch.empty(rows // 8, cols, device="meta"), mesh, [Shard(0)],
                run_check=False, shape=torch.Size((rows, cols)), stride=(cols, 1),
            )
            for name, (rows, cols) in shapes.items()
        }  # fmt: skip
        config = nm.Config(orthogonalize_dtype=torch.float16, **options)
        return nm.make_plan(params, config, routes={"*": nm.Route("normuon")})


def test_of_a_model_under_fsdp2_half_of_the_small_matrices_are_first_and_half_last() -> None:
    plan = plan_of_a_model()
    assert [(bucket.rows, bucket.cols) for bucket in plan.buckets] == [
        (2048, 2048),
        (2048, 8192),
        (2048, 2048),
    ]
    names = [bucket.names for bucket in plan.buckets]
    assert sorted(itertools.chain(*names)) == sorted(plan.names)
    assert len(names[0]) == len(names[2]) == 48
    owned = [0] * 8
    for bucket in plan.buckets:
        for group in bucket.groups:
            assert group.ownership is not None
            for rank, n in group.ownership.by_rank.items():
                owned[rank] += n
    assert set(owned) == {18}


def test_small_matrices_are_not_cut_and_a_bucket_that_skips_together_neither() -> None:
    assert len(plan_of_a_model(width=64).buckets) == 2
    assert len(plan_of_a_model(guard="full", guard_scope="bucket").buckets) == 2
