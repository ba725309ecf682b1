"""What a plan costs per parameter where there are many ranks, counted and not timed."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from compile_tests import graphs
from normuon_fn.distributed.placements import sharded_layout

LAYOUTS = {
    "FSDP2": ((-1,), [Shard(0)]),
    "HSDP": ((4, -1), [Replicate(), Shard(0)]),
    "FSDP2 and TP": ((-1, 8), [Shard(0), Shard(1)]),
}
IN = pytest.mark.parametrize("kind", LAYOUTS)


def mesh_of(kind: str, world: int) -> DeviceMesh:
    given, _ = LAYOUTS[kind]
    rest = world // -torch.Size(given).numel()
    sizes = tuple(rest if size == -1 else size for size in given)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])


def parameter(kind: str, mesh: DeviceMesh, rows: int) -> DTensor:
    shape = (mesh.size() * rows, 64)
    local = list(shape)
    for k, placement in enumerate(LAYOUTS[kind][1]):
        if isinstance(placement, Shard):
            local[placement.dim] //= mesh.size(k)
    return DTensor.from_local(
        torch.empty(local), mesh, LAYOUTS[kind][1], run_check=False, shape=shape, stride=(64, 1)
    )


def calls_of(function: Any, *given: Any) -> int:
    """How many functions, of Python or of C, a call calls."""
    count = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function(*given)
    finally:
        sys.setprofile(None)
    return count


@IN
def test_another_parameter_of_a_mesh_costs_as_much_at_512_ranks_as_at_64(kind: str) -> None:
    counts = []
    for world in (64, 512):
        with graphs.fake_ranks(world):
            mesh = mesh_of(kind, world)
            sharded_layout("first", parameter(kind, mesh, 1))
            counts.append(calls_of(sharded_layout, "p", parameter(kind, mesh, 1)))
    assert counts[0] == counts[1]


@IN
def test_the_table_of_ranks_is_read_once_per_mesh(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, table = [], DeviceMesh.mesh.fget  # type: ignore[attr-defined]
    with graphs.fake_ranks(64):
        mesh = mesh_of(kind, 64)
        given = [parameter(kind, mesh, rows) for rows in (1, 2, 3, 1)]
        monkeypatch.setattr(DeviceMesh, "mesh", property(lambda m: (read.append(m), table(m))[1]))
        for each in given:
            sharded_layout("p", each)
    assert len(read) <= 3  # once here; a product of two groups reads it to make one of both


@IN
def test_ranks_are_where_their_shards_are_and_in_the_order_of_the_mesh(kind: str) -> None:
    with graphs.fake_ranks(64, rank=37):
        mesh = mesh_of(kind, 64)
        layout = sharded_layout("p", parameter(kind, mesh, 1))
        assert layout is not None and layout.rank == 37
        placements = LAYOUTS[kind][1]
        replicas = [k for k, p in enumerate(placements) if p.is_replicate()]
        for number, of_replica in enumerate(layout.ranks):
            for shard, rank in enumerate(of_replica):
                (place,) = (mesh.mesh == rank).nonzero().tolist()
                own = [at for k, at in enumerate(place) if k not in replicas]
                rest = [size for k, size in enumerate(mesh.shape) if k not in replicas]
                assert shard == (own[0] if len(own) == 1 else own[0] * rest[1] + own[1])
                assert number == (place[replicas[0]] if replicas else 0)
        assert layout.ranks[layout.replicas.number][layout.shards.number] == 37
        assert sorted(layout.shards.order) == list(range(layout.shards.size))


def test_a_mesh_of_a_later_process_group_is_not_taken_for_an_equal_one_before_it() -> None:
    kept = []
    for rank in (3, 5):
        with graphs.fake_ranks(8, rank=rank):
            mesh = mesh_of("FSDP2", 8)
            layout = sharded_layout("p", parameter("FSDP2", mesh, 1))
            assert layout is not None and layout.rank == layout.shards.number == rank
            kept.append(mesh)
    assert kept[0] is not kept[1]


def test_no_mesh_and_no_group_is_kept() -> None:
    with graphs.fake_ranks(8):
        mesh = mesh_of("HSDP", 8)
        sharded_layout("p", parameter("HSDP", mesh, 1))
        group = weakref.ref(mesh.get_group(1))
    gone = weakref.ref(mesh)
    del mesh
    gc.collect()
    assert gone() is None and group() is None
    assert not dist.is_initialized()
