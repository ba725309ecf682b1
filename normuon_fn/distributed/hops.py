"""An all-to-all of very many ranks in several hops, so that each rank meets few others.

The ranks form a grid, and a hop goes along one of its dimensions. Six ranks in a grid of 3 x 2, of
which rank 1 owns a matrix: rank 4 sends it its part, and gets its part of the update.

    0  1          parts, the outermost dimension first:       4 -> 0 -> 1
    2  3          updates, the innermost dimension first:     1 -> 0 -> 4
    4  5

So 4096 ranks in a grid of 64 x 64 meet 126 others in the place of 4095, and where a row is a node,
all its links take part in what one owner sends and receives. Between two hops the words are sorted
by where they go. What arrives has the same bits as after one hop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from ..compat import all_to_all
from ..ops.repack import Boxes, Moves
from .cost import grid_for_hops
from .groups import group_of
from .mesh_ranks import RankGroup
from .placements import check_alike, ranks_of


class Hop(NamedTuple):
    """One all-to-all: the words that come from and go to each rank of its process group."""

    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    group: str

    def start(self, words: Tensor) -> Tensor:
        return all_to_all(words, list(self.incoming), list(self.outgoing), self.group)


class Hops(NamedTuple):
    """The hops of an all-to-all, how words are sorted between them, and in which order they lie."""

    first: Hop
    onward: tuple[tuple[Moves, Hop], ...]  # what sorts the words before each other hop, and the hop
    leaving: tuple[int, ...]  # the ranks to which the messages go that are packed
    arriving: tuple[int, ...]  # the ranks from which those come that are unpacked


@dataclass(frozen=True)
class RankGrid:
    """The ranks of a process group as a grid, in row-major order."""

    shape: tuple[int, ...]
    place: tuple[int, ...]  # of this rank
    groups: tuple[str, ...]  # by dimension: the process group of its line through this rank

    @staticmethod
    def of(shards: RankGroup, size: float, owners: int) -> RankGrid:
        """The grid that is predicted to be fastest. A collective where it is of several dimensions.

        ``size``: bytes that an owner sends or receives; ``owners``: how many of the shards own
        matrices. Both are the same on all ranks.
        """
        if shards.size == 1:
            return RankGrid((1,), (0,), (shards.group,))
        ranks, here = ranks_of(shards.group), shards.order.index(shards.number)
        shape = grid_for_hops(tuple(ranks), size, owners)
        if len(shape) == 1 or ranks != sorted(ranks):  # the groups made below are sorted
            return RankGrid((len(ranks),), (here,), (shards.group,))
        check_alike([f"{size:.0f} bytes of {owners} owners over a grid of {shape}"], shards.group)
        strides = _strides(shape)
        place = tuple(here // stride % n for stride, n in zip(strides, shape, strict=True))
        groups = []
        for at, stride, n in zip(place, strides, shape, strict=True):
            first = here - at * stride
            groups.append(group_of(ranks[first : first + n * stride : stride]).group_name)
        return RankGrid(shape, place, tuple(groups))

    def hops(self, words: Callable[[int, int], int], device: torch.device, inwards: bool) -> Hops:
        """``words(k, j)``: how many rank k of the process group sends to rank j.

        ``inwards``: the first hop is along the outermost dimension. Before a hop, this rank holds
        what goes from k to j if j has its place along the dimensions that are done, and k along the
        others. So a message is known by k's places along the former and j's along the latter, and
        messages lie in the order of these places, those of the latest hop's dimension first.
        """
        strides, dims = _strides(self.shape), [*range(len(self.shape))]
        made, between = list[Hop](), list[Moves]()
        done: set[int] = set()

        def held(places: Sequence[int]) -> int:
            k = j = 0
            for dim, (at, here, stride) in enumerate(zip(places, self.place, strides, strict=True)):
                k += stride * (at if dim in done else here)
                j += stride * (here if dim in done else at)
            return words(k, j)

        def along(dim: int, sizes: dict[tuple[int, ...], int]) -> tuple[int, ...]:
            found = [0] * self.shape[dim]
            for places, n in sizes.items():
                found[places[dim]] += n
            return tuple(found)

        axes, sizes = dims, {places: held(places) for places in self._places(dims)}
        leaving: tuple[int, ...] = ()
        for dim in dims if inwards else reversed(dims):
            before, axes = axes, [dim, *(axis for axis in axes if axis != dim)]
            if made:
                between.append(_sorted(sizes, self._places(before), self._places(axes), device))
            else:
                leaving = self._ranks(axes)
            outgoing = along(dim, sizes)
            done.add(dim)
            sizes = {places: held(places) for places in sizes}
            made.append(Hop(along(dim, sizes), outgoing, self.groups[dim]))
        onward = tuple(zip(between, made[1:], strict=True))
        return Hops(made[0], onward, leaving, self._ranks(axes))

    def _places(self, axes: Sequence[int]) -> list[tuple[int, ...]]:
        """All places of the grid, of which those along the first of ``axes`` change last."""
        found = product(*(range(self.shape[axis]) for axis in axes))
        order = [axes.index(dim) for dim in range(len(axes))]
        return [tuple(places[k] for k in order) for places in found]

    def _ranks(self, axes: Sequence[int]) -> tuple[int, ...]:
        strides = _strides(self.shape)
        return tuple(sum(map(mul, places, strides)) for places in self._places(axes))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _sorted(
    sizes: dict[tuple[int, ...], int],
    before: Sequence[tuple[int, ...]],
    after: Sequence[tuple[int, ...]],
    device: torch.device,
) -> Moves:
    """From one order of messages to another."""
    ends = accumulate(sizes[places] for places in before)
    starts = {places: end - sizes[places] for places, end in zip(before, ends, strict=True)}
    boxes, to = Boxes(), 0
    for places in after:
        boxes.row(0, 0, 4 * starts[places], 4 * to, 4 * sizes[places])
        to += sizes[places]
    return boxes.moves(device, [to], torch.int32)
