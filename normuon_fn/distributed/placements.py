"""How a DTensor is divided among ranks: the part of each rank, and the ranks that share work on it.

The mesh dimensions of a DTensor fall into two kinds. Ranks along a dimension of Shard are shards
of one tensor; ranks along a dimension of Replicate are replicas of the same part.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..compat import (
    Ranks,
    gather_objects,
    group_named,
    is_strided,
    process_group,
)
from .dtensors import from_local, is_dtensor, replicate
from .mesh_ranks import MeshRanks, RankGroup, mesh_ranks
from .shards import Span


@dataclass(frozen=True, eq=False)
class ShardedLayout:
    """How a DTensor is divided among the ranks of its mesh."""

    shape: tuple[int, ...]  # of the whole tensor
    mesh: DeviceMesh
    placements: tuple[Any, ...]
    group: str  # of all ranks of the mesh
    rank: int  # of this process in the group
    parts: tuple[tuple[Span, ...], ...]  # by rank: (start, length) in every dimension
    shards: RankGroup  # the ranks that together store the tensor once, with this one
    replicas: RankGroup  # the ranks that store the same part as this one
    ranks: tuple[tuple[int, ...], ...]  # [replicas, shards]: the rank in the group

    @property
    def local_part(self) -> tuple[Span, ...]:
        """(start, length) in every dimension of the part that this rank stores."""
        return self.parts[self.rank]


def sharded_layout(name: str, tensor: Tensor) -> ShardedLayout | None:
    """The layout of a DTensor; ``None`` for a plain tensor.

    Raises:
        ValueError: a placement is neither Shard nor Replicate (as Partial is), or the local tensor
            does not have the shape that the placements imply.
    """
    if not is_dtensor(tensor):
        return None
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard() or is_strided(placement)):
            raise ValueError(
                f"params[{name!r}]: expected Shard and Replicate placements, got {placements}; "
                "redistribute it"
            )
    ranks = mesh_ranks(mesh)
    parts = _parts(tuple(tensor.shape), placements, ranks)
    replicas = [k for k, p in enumerate(placements) if p.is_replicate()]
    shards = [k for k in range(len(placements)) if k not in replicas]
    mine = tuple(length for _, length in parts[ranks.rank])
    if mine != tuple(tensor.to_local().shape):
        raise ValueError(
            f"params[{name!r}]: expected a local tensor of shape {mine} for {placements}, got "
            f"{tuple(tensor.to_local().shape)}; create it by distribute_tensor"
        )
    return ShardedLayout(
        tuple(tensor.shape), mesh, placements, ranks.group, ranks.rank, parts,
        ranks.along(mesh, shards), ranks.along(mesh, replicas), ranks.table(replicas),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _parts(
    shape: tuple[int, ...],
    placements: tuple[Any, ...],
    ranks: MeshRanks,
) -> tuple[tuple[Span, ...], ...]:
    """By rank."""
    return tuple(_part(shape, placements, ranks.sizes, at) for at in ranks.by_rank)


def _part(
    shape: tuple[int, ...],
    placements: Sequence[Any],
    sizes: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[Span, ...]:
    """The part of the rank at a coordinate. Strided shards (FSDP over TP) are cut last."""
    part = [(0, size) for size in shape]
    order = sorted(range(len(placements)), key=lambda k: is_strided(placements[k]))
    for k in order:
        if placements[k].is_replicate():
            continue
        start, length = part[placements[k].dim]
        chunk = -(-length // sizes[k])
        before = min(length, chunk * coordinate[k])
        part[placements[k].dim] = start + before, min(length, chunk * (coordinate[k] + 1)) - before
    return tuple(part)


def mesh_and_placements(tensor: Tensor) -> tuple[Any, ...]:
    """The mesh and the placements of a DTensor; nothing for a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else ()


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    return tensor.to_local() if torch.compiler.is_dynamo_compiling() else tensor._local_tensor


def local_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: local(tensor) for name, tensor in tensors.items()}


def has_layout(tensor: Tensor, layout: ShardedLayout | None) -> bool:
    """Whether a tensor has the layout of the plan. A plain tensor counts as the local part."""
    if not is_dtensor(tensor):
        return True
    return (
        layout is not None
        and tuple(tensor.placements) == layout.placements
        and tensor.device_mesh == layout.mesh
    )


def describe(tensor: Tensor) -> str:
    return (
        f"{tuple(tensor.placements)} on {tensor.device_mesh}"
        if is_dtensor(tensor)
        else "a plain tensor"
    )


def to_dtensor(tensor: Tensor, layout: ShardedLayout | None) -> Tensor:
    """The DTensor whose local part is ``tensor``; without a layout, ``tensor`` itself."""
    if layout is None or is_dtensor(tensor):
        return tensor
    return from_local(tensor, layout.mesh, layout.placements, layout.shape)


def times_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """``tensor * factors``, where ``factors`` [rows, 1] has all rows of a DTensor."""
    if not is_dtensor(tensor):
        return tensor * factors
    mesh = tensor.device_mesh
    return tensor * from_local(factors, mesh, [replicate()] * mesh.ndim, factors.shape)


def per_row_layout(
    layout: ShardedLayout | None, shape: tuple[int, ...], reduced: int | None = None
) -> ShardedLayout | None:
    """The layout of a state of ``shape`` with one entry per row, for a parameter of ``layout``.

    It is sharded as the parameter, but replicated where it has another size, and along ``reduced``.

    Raises:
        ValueError: the state has another number of dimensions than the parameter.
    """
    if layout is None:
        return None
    if len(shape) == 2 < len(layout.shape):  # the parameter is read as one matrix
        each = torch.Size(layout.shape[2:]).numel()
        flat: list[tuple[Span, ...]] = [
            (part[0], (part[1][0] * each, part[1][1] * each)) for part in layout.parts
        ]
        read = layout.shape[0], layout.shape[1] * each
        layout = replace(layout, shape=read, parts=tuple(flat))
    if len(shape) != len(layout.shape):
        raise ValueError(
            f"no placements for a state of shape {shape} of a sharded parameter {layout.shape}"
        )
    alike = [a == b for a, b in zip(shape, layout.shape, strict=True)]
    if reduced is not None and shape[reduced] == 1:
        alike[reduced] = False
    placements = [p if p.is_replicate() or alike[p.dim] else replicate() for p in layout.placements]
    parts = tuple(
        tuple(span if same else (0, n) for span, n, same in zip(part, shape, alike, strict=True))
        for part in layout.parts
    )
    return replace(layout, shape=shape, placements=tuple(placements), parts=parts)


def block_layout(layout: ShardedLayout, shape: tuple[int, ...]) -> ShardedLayout:
    """The layout of a state of ``shape`` with fewer columns, placed as its parameter is."""
    parts = _parts(shape, layout.placements, mesh_ranks(layout.mesh))
    return replace(layout, shape=shape, parts=parts)


def covering(layouts: Sequence[ShardedLayout | None]) -> str | None:
    """The process group of all ranks that store a part: that of the one mesh, or of all ranks."""
    meshes = {id(layout.mesh): layout for layout in layouts if layout is not None}
    groups = {layout.group for layout in meshes.values() if len(layout.parts) > 1}
    if len(groups) < 2:
        return next(iter(groups), None)
    return dist.group.WORLD.group_name if dist.group.WORLD is not None else None


def check_alike(lines: Sequence[str], group: str) -> None:
    """Checks that every rank of a group has the same lines. A collective, on the host.

    Raises:
        ValueError: on every rank, naming the first lines that differ.
    """
    mine = list(lines)
    for rank, theirs in enumerate(gather_objects(mine, group)):
        if theirs != mine:
            pairs = [(a, b) for a, b in zip_longest(mine, theirs, fillvalue="nothing") if a != b]
            shown = "; ".join(f"here {a}, there {b}" for a, b in pairs[:3])
            raise ValueError(
                f"the plans of the ranks differ: rank {rank} of the group has another one in "
                f"{len(pairs)} lines: {shown}"
            )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, which is a collective; a plain tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ranks_of(ranks: Ranks | str) -> list[int]:
    """The ranks of a mesh or a process group, as the whole process group numbers them."""
    group = group_named(ranks) if isinstance(ranks, str) else process_group(ranks)
    return dist.get_process_group_ranks(group)
