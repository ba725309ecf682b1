"""The ranks of a mesh: where each one is, and which of them differ along some dimensions.

That is read once per mesh, in time that grows with the number of ranks, and not once per
parameter: a `DeviceMesh` works its table of ranks out anew whenever it is asked for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..compat import process_group, process_group_of

Coordinate = tuple[int, ...]


class RankGroup(NamedTuple):
    """Some ranks, numbered from 0 in the order of the mesh."""

    group: str  # the name of their process group
    number: int  # the number of this rank
    order: tuple[int, ...]  # the number of each rank, by its rank in the process group

    @property
    def size(self) -> int:
        return len(self.order)


ALONE = RankGroup("", 0, (0,))


@dataclass(frozen=True, eq=False)
class MeshRanks:
    """What a mesh says of its ranks, in numbers and names alone: it keeps no mesh and no group."""

    group: str  # of all ranks of the mesh
    rank: int  # of this process in the group
    sizes: tuple[int, ...]  # of the dimensions
    by_rank: tuple[Coordinate, ...]  # by rank in the group
    global_at: Mapping[Coordinate, int]  # the rank as the whole process group numbers it
    rank_at: Mapping[Coordinate, int]  # the rank in the group
    _groups: dict[tuple[int, ...], RankGroup] = field(default_factory=dict)
    _tables: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def along(self, mesh: DeviceMesh, dims: Sequence[int]) -> RankGroup:
        """The ranks that differ from this one at most along ``dims``, in the order of the mesh."""
        key = tuple(k for k in dims if self.sizes[k] > 1)
        if not key:
            return ALONE
        if key not in self._groups:
            group = process_group_of(mesh, key)
            mine = dict(enumerate(self.by_rank[self.rank]))
            places = (self._coordinate({**mine, **at}) for at in self._places(key))
            number = {self.global_at[place]: k for k, place in enumerate(places)}
            order = tuple(number[rank] for rank in dist.get_process_group_ranks(group))
            self._groups[key] = RankGroup(group.group_name, order[group.rank()], order)
        return self._groups[key]

    def table(self, replicas: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The ranks in the group, [along the dimensions ``replicas``, along all others]."""
        key = tuple(replicas)
        if key not in self._tables:
            shards = [k for k in range(len(self.sizes)) if k not in key]
            self._tables[key] = tuple(
                tuple(self.rank_at[self._coordinate({**r, **s})] for s in self._places(shards))
                for r in self._places(key)
            )
        return self._tables[key]

    def _places(self, dims: Sequence[int]) -> list[dict[int, int]]:
        """All coordinates along some dimensions, in order, each by dimension."""
        ranges = (range(self.sizes[k]) for k in dims)
        return [dict(zip(dims, at, strict=True)) for at in product(*ranges)]

    def _coordinate(self, at: Mapping[int, int]) -> Coordinate:
        return tuple(at[k] for k in range(len(self.sizes)))


# By the identity of the mesh: meshes of two process groups, one after the other, may be equal.
_known: dict[int, MeshRanks] = {}


def mesh_ranks(mesh: DeviceMesh) -> MeshRanks:
    """What a mesh says of its ranks, which is remembered for as long as there is the mesh."""
    group = process_group(mesh)
    found = _known.get(id(mesh))
    if found is None or (found.group, found.rank) != (group.group_name, group.rank()):
        if found is None:
            weakref.finalize(mesh, _known.pop, id(mesh), None).atexit = False
        found = _known[id(mesh)] = _read(mesh, group)
    return found


def _read(mesh: DeviceMesh, group: dist.ProcessGroup) -> MeshRanks:
    table = mesh.mesh
    sizes = tuple(table.shape)
    ranks = table.flatten().tolist()
    global_at = dict(zip(product(*map(range, sizes)), ranks, strict=True))
    place_of = {rank: place for place, rank in global_at.items()}
    by_rank = tuple(place_of[rank] for rank in dist.get_process_group_ranks(group))
    rank_at = {place: k for k, place in enumerate(by_rank)}
    return MeshRanks(group.group_name, group.rank(), sizes, by_rank, global_at, rank_at)
