"""How many replicas share a bucket's matrices: by what it is predicted to cost, alike on all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.distributed.cost import NODE, Load
from normuon_fn.distributed.groups import group_of
from normuon_fn.distributed.sharing import replicas_to_share

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
STANDARD = 20 * 2048.0**3  # FLOP of one matrix of 2048 rows and columns
CONFIG = nm.Config(orthogonalize_dtype=torch.float16)


def replicated(ranks: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank,) for rank in range(ranks))


def plan_of(world: int, rank: int, shapes: Sequence[tuple[int, ...]]) -> nm.Plan:
    """Of replicas in one process, which is ``rank``."""
    with graphs.fake_ranks(world, rank=rank) as ranks:
        params = {f"w.{k}": torch.empty(s, device="meta") for k, s in enumerate(shapes)}
        return nm.make_plan(params, CONFIG, routes={"*": nm.Route("normuon")}, mesh=ranks)


@pytest.mark.parametrize("matrices", [1, 96])
@pytest.mark.parametrize("rows", [8, 2048])
def test_within_a_node_all_replicas_share(matrices: int, rows: int) -> None:
    load = Load(matrices, rows, rows, STANDARD, 2, replicated(NODE))
    assert replicas_to_share(load) == NODE


def test_beyond_a_node_few_share_what_takes_longer_to_send_than_to_compute() -> None:
    load = Load(96, 2048, 2048, STANDARD, 2, replicated(512))
    assert replicas_to_share(load) == NODE
    assert load.step(NODE) < load.step(512) / 10


def test_what_takes_longer_to_compute_than_to_send_all_replicas_share() -> None:
    load = Load(96, 2048, 2048, 1000 * STANDARD, 2, replicated(96))
    assert replicas_to_share(load) == 96


def test_all_share_where_the_prediction_says_nothing() -> None:
    assert replicas_to_share(Load(8, 16, 16, 1e5, 2, replicated(16))) == 16


@pytest.mark.parametrize("ranks", [17, 23])  # which no block but one or all divides
def test_each_does_all_the_work_where_blocks_would_not_be_alike(ranks: int) -> None:
    assert replicas_to_share(Load(96, 256, 4096, 1e9, 2, replicated(ranks))) == 1


def test_all_ranks_decide_alike_and_blocks_divide_their_work_in_the_same_way() -> None:
    # The second shape is shared by all, with a remainder that makes their loads unlike.
    shapes = [(2048, 2048)] * 20 + [(8, 24)] * 5
    plans = [plan_of(16, rank, shapes) for rank in (0, 7, 8, 15)]
    assert len({plan.notes for plan in plans}) == 1 and len(plans[0].notes) == 1
    assert "8 of 16 replicas share the work" in plans[0].notes[0]
    assert plans[0].notes[0] in str(plans[0])
    few, every = (
        [b.groups[0].ownership for plan in plans for b in plan.buckets if b.rows == rows]
        for rows in (2048, 8)
    )
    assert all(x is not None and x.narrowed for x in few)
    assert len({x.counts for x in few if x is not None}) == 1
    assert [x.replicas.number for x in few if x is not None] == [0, 7, 0, 7]
    assert all(x is not None and not x.narrowed for x in every)


@pytest.mark.parametrize(
    ("replicas", "shards", "shapes"),
    [
        (6, 4, [(1, 2048, 8192), (1, 2048, 2048), (96, 256, 1024), (8, 1024, 2048)]),
        (6, 2, [(24, 512, 8192), (32, 256, 4096), (64, 2048, 4096), (16, 512, 4096)]),
        (2, 12, [(16, 1024, 4096), (16, 512, 1024), (16, 2048, 2048), (96, 768, 4096)]),
    ],
)
def test_all_ranks_have_their_buckets_in_one_order_however_blocks_lie_on_nodes(
    replicas: int, shards: int, shapes: list[tuple[int, int, int]]
) -> None:
    """Of 6 replicas of 4 ranks each, some lie in one node of 8 and others in two."""
    found = set()
    for replica in range(replicas):
        with graphs.fake_ranks(replicas * shards, rank=replica * shards):
            mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("copies", "shards"))
            params = {}
            for n, rows, cols in shapes:
                part = torch.empty(n, -(-rows // shards), cols, device="meta")
                params[f"{rows}x{cols}"] = DTensor.from_local(
                    part, mesh, [Replicate(), Shard(1)], run_check=False,
                    shape=torch.Size((n, rows, cols)), stride=(rows * cols, cols, 1),
                )  # fmt: skip
            config = nm.Config(method="standard", orthogonalize_dtype=torch.bfloat16)
            plan = nm.make_plan(params, config, routes={"*": nm.Route("normuon")})
            found.add(tuple(bucket.names[0] for bucket in plan.buckets))
    assert len(found) == 1


@pytest.mark.parametrize("world", [NODE, 2 * NODE])
def test_ranks_of_several_nodes_compare_what_they_decide_before_one_waits_for_another(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    sharing = import_module("normuon_fn.planning.sharing")
    monkeypatch.setattr(sharing, "check_alike", lambda lines, group: said.append(lines))
    plan_of(world, 0, [(8, 24)] * 5)
    asked = ["5 matrices 8x24: 16 of 16 replicas share"]
    assert said == ([] if world == NODE else [asked])


def test_a_group_is_not_split_off_a_world_that_is_bound_to_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL would wait for the ranks that are not in it."""
    with graphs.fake_ranks(4):
        world, seen = dist.group.WORLD, []
        assert world is not None
        new_group = dist.new_group

        def watched(*given: Any, **options: Any) -> Any:
            seen.append(world.bound_device_id)
            return new_group(*given, **options)

        monkeypatch.setattr(dist, "new_group", watched)
        world.bound_device_id = torch.device("cuda:0")
        first = group_of((0, 2))
        assert seen == [None] and world.bound_device_id == torch.device("cuda:0")
        assert group_of((0, 2)) is first and len(seen) == 1


def test_an_orthogonalizer_of_ones_own_is_shared_by_all() -> None:
    with graphs.fake_ranks(16) as ranks:
        params = {"w": torch.empty(96, 2048, 2048, device="meta")}
        config = nm.Config(orthogonalizer=lambda x: x)
        plan = nm.make_plan(params, config, routes={"w": nm.Route("normuon")}, mesh=ranks)
        assert plan.notes == ()
