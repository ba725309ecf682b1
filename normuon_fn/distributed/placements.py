"""Where the parts of a tensor lie: which rank holds what of a DTensor, and the process groups between them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..compat import gather_objects, is_strided, process_group, process_group_of
from .shards import Span


class Team(NamedTuple):
    """Some ranks, numbered from 0. ``order``: by rank of the process group, the number."""

    group: str
    number: int  # this rank's
    order: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.order)


ALONE = Team("", 0, (0,))


@dataclass(frozen=True, eq=False)
class Sharded:
    """How a DTensor lies on its mesh. ``parts``: by rank of the group, (start, length) in every dimension."""

    shape: tuple[int, ...]  # of the whole tensor
    mesh: DeviceMesh
    placements: tuple[Any, ...]
    group: str  # of all ranks of the mesh
    rank: int  # this one's in the group
    parts: tuple[tuple[Span, ...], ...]
    shards: Team  # the ranks that hold the tensor between them, this one included
    copies: Team  # the ranks that hold what this one does
    cells: tuple[tuple[int, ...], ...]  # [copies, shards]: the rank in the group

    @property
    def here(self) -> tuple[Span, ...]:
        return self.parts[self.rank]


def sharded(name: str, tensor: Tensor) -> Sharded | None:
    """Of a DTensor; ``None`` for a plain tensor.

    Raises:
        ValueError: placements that are no parts of a tensor (Partial), or that this cannot tell the parts of.
    """
    if not isinstance(tensor, DTensor):
        return None
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    for placement in placements:
        if not (isinstance(placement, Replicate) or placement.is_shard() or is_strided(placement)):
            raise ValueError(
                f"params[{name!r}]: expected Shard and Replicate placements, got {placements}; redistribute it"
            )
    group = process_group(mesh)
    places = dict(
        zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.mesh.shape)), strict=True)
    )
    by_rank = [places[dist.get_global_rank(group, k)] for k in range(group.size())]
    parts = _parts(tuple(tensor.shape), placements, tuple(mesh.mesh.shape), tuple(by_rank))
    copies = [k for k, p in enumerate(placements) if isinstance(p, Replicate)]
    shards = [k for k in range(len(placements)) if k not in copies]
    grid = {place: k for k, place in enumerate(by_rank)}
    cells = tuple(
        tuple(grid[_place(len(placements), {**c, **s})] for s in _places(mesh, shards))
        for c in _places(mesh, copies)
    )
    mine = tuple(length for _, length in parts[group.rank()])
    if mine != tuple(tensor.to_local().shape):
        raise ValueError(
            f"params[{name!r}]: {placements} should leave {mine} here, the local tensor is {tuple(tensor.to_local().shape)}"
        )
    rank = group.rank()
    teams = _team(mesh, shards), _team(mesh, copies)
    return Sharded(
        tuple(tensor.shape), mesh, placements, group.group_name, rank, parts, *teams, cells
    )


def _places(mesh: DeviceMesh, dims: Sequence[int]) -> list[dict[int, int]]:
    """All coordinates along some dimensions of a mesh, in order."""
    return [
        dict(zip(dims, at, strict=True)) for at in product(*(range(mesh.size(k)) for k in dims))
    ]


def _place(ndim: int, at: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(at[k] for k in range(ndim))


def _team(mesh: DeviceMesh, dims: Sequence[int]) -> Team:
    """The ranks that differ from this one in some dimensions of a mesh alone, numbered in the order of the mesh."""
    dims = [k for k in dims if mesh.size(k) > 1]
    if not dims:
        return ALONE
    group = process_group_of(mesh, dims)
    mine = mesh.get_coordinate()
    assert mine is not None
    ranks = [
        int(mesh.mesh[_place(mesh.ndim, {**dict(enumerate(mine)), **at})])
        for at in _places(mesh, dims)
    ]
    order = tuple(ranks.index(dist.get_global_rank(group, k)) for k in range(group.size()))
    return Team(group.group_name, order[group.rank()], order)


@functools.lru_cache(maxsize=64)
def _parts(
    shape: tuple[int, ...],
    placements: tuple[Any, ...],
    sizes: tuple[int, ...],
    places: tuple[tuple[int, ...], ...],
) -> tuple[tuple[Span, ...], ...]:
    return tuple(_part(shape, placements, sizes, place) for place in places)


def _part(
    shape: tuple[int, ...],
    placements: Sequence[Any],
    sizes: tuple[int, ...],
    place: tuple[int, ...],
) -> tuple[Span, ...]:
    """What the rank at ``place`` of a mesh holds. A strided shard (FSDP of what is sharded already) is cut last."""
    part = [(0, size) for size in shape]
    order = sorted(range(len(placements)), key=lambda k: is_strided(placements[k]))
    for k in order:
        if isinstance(placements[k], Replicate):
            continue
        start, length = part[placements[k].dim]
        chunk = -(-length // sizes[k])
        before = min(length, chunk * place[k])
        part[placements[k].dim] = start + before, min(length, chunk * (place[k] + 1)) - before
    return tuple(part)


def is_dtensor(tensor: object) -> bool:
    return isinstance(tensor, DTensor)


def mesh_and_placements(tensor: Tensor) -> tuple[Any, ...]:
    """The mesh and the placements of a DTensor; nothing for a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


def local(tensor: Tensor) -> Tensor:
    """The part that lies here; a plain tensor is one already."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else tensor._local_tensor


def local_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: local(tensor) for name, tensor in tensors.items()}


def lies_as(tensor: Tensor, of: Sharded | None) -> bool:
    """Whether a tensor lies as the plan says. A plain tensor counts as the part that lies here."""
    if not isinstance(tensor, DTensor):
        return True
    return (
        of is not None
        and tuple(tensor.placements) == of.placements
        and tensor.device_mesh == of.mesh
    )


def describe(tensor: Tensor) -> str:
    return (
        f"{tuple(tensor.placements)} on {tensor.device_mesh}"
        if isinstance(tensor, DTensor)
        else "a plain tensor"
    )


def whole(tensor: Tensor, of: Sharded | None) -> Tensor:
    """The DTensor of which ``tensor`` is the part that lies here."""
    if of is None or isinstance(tensor, DTensor):
        return tensor
    shape = torch.Size(of.shape)
    stride = tuple(torch.Size(shape[k + 1 :]).numel() for k in range(len(shape)))
    return DTensor.from_local(
        tensor, of.mesh, of.placements, run_check=False, shape=shape, stride=stride
    )


def reduced(of: Sharded | None, shape: tuple[int, ...]) -> Sharded | None:
    """How a tensor lies that has ``shape`` in the place of ``of.shape``: whole where a dimension is another one."""
    if of is None:
        return None
    if len(shape) == 2 < len(of.shape):  # of a tensor that is read as one matrix
        each = torch.Size(of.shape[2:]).numel()
        flat: list[tuple[Span, ...]] = [
            (part[0], (part[1][0] * each, part[1][1] * each)) for part in of.parts
        ]
        of = replace(of, shape=(of.shape[0], of.shape[1] * each), parts=tuple(flat))
    if len(shape) != len(of.shape):
        raise ValueError(
            f"no placements for a state of shape {shape} of a parameter {of.shape} that is sharded"
        )
    kept = [isinstance(p, Replicate) or shape[p.dim] == of.shape[p.dim] for p in of.placements]
    placements = tuple(
        p if keep else Replicate() for p, keep in zip(of.placements, kept, strict=True)
    )
    parts = tuple(
        tuple(
            own if size == all_ else (0, size)
            for own, size, all_ in zip(part, shape, of.shape, strict=True)
        )
        for part in of.parts
    )
    return replace(of, shape=shape, placements=placements, parts=parts)


def covering(lie: Sequence[Sharded | None]) -> str | None:
    """The process group of all ranks that hold a part of one of these: their one mesh, or everybody."""
    meshes = {id(of.mesh): of for of in lie if of is not None}
    groups = {of.group: of for of in meshes.values() if len(of.parts) > 1}
    if len(groups) < 2:
        return next(iter(groups), None)
    return dist.group.WORLD.group_name if dist.group.WORLD is not None else None


def check_alike(lines: Sequence[str], group: str) -> None:
    """That every rank of a group has the same lines. A collective, on the host.

    Raises:
        ValueError: on every rank, naming the first lines that differ.
    """
    mine = list(lines)
    for rank, theirs in enumerate(gather_objects(mine, group)):
        if theirs != mine:
            pairs = [(a, b) for a, b in zip_longest(mine, theirs, fillvalue="nothing") if a != b]
            shown = "; ".join(f"here {a}, there {b}" for a, b in pairs[:3])
            raise ValueError(
                f"the plans of the ranks differ: rank {rank} of the group has another one in {len(pairs)} lines: {shown}"
            )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, which is a collective; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
