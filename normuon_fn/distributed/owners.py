"""Which rank owns which matrix of a group, and which part of every matrix each rank stores.

The ranks that together store a matrix once are its shards. Where several such sets of ranks store
the same matrix, each set is a replica. Every matrix has one owner, the rank that orthogonalizes it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, TypeVar

from ..compat import Ranks, process_group
from .mesh_ranks import ALONE, RankGroup
from .placements import ShardedLayout
from .shards import Rect


@dataclass(frozen=True)
class Ownership:
    """How the matrices of one group are divided among ranks, and how many each rank owns."""

    group: str
    shards: RankGroup
    replicas: RankGroup
    ranks: tuple[tuple[int, ...], ...]  # [replicas, shards]: the rank in the process group
    rects: tuple[Rect, ...]  # by shard: its part of every matrix
    counts: tuple[tuple[int, ...], ...] = ()  # [replicas, shards]: matrices owned, in order
    # There are more replicas than these, which do the same work by themselves: see sharing.py.
    narrowed: bool = False
    # Then as `ranks`, of the first block of replicas: the same on all ranks of the process group.
    first: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(
        rects: Sequence[Rect],  # by rank of the process group; unused for plain tensors
        rows: int,
        cols: int,
        layout: ShardedLayout | Ranks | None,
    ) -> Ownership | None:
        """The ownership with no counts yet, or ``None`` if only one rank stores the matrices."""
        if layout is None:
            return None
        if isinstance(layout, ShardedLayout):
            parts = tuple(rects[rank] for rank in layout.ranks[0])
            found = Ownership(layout.group, layout.shards, layout.replicas, layout.ranks, parts)
        else:
            ranks = process_group(layout)
            numbers = tuple(range(ranks.size()))
            replicas = RankGroup(ranks.group_name, ranks.rank(), numbers)
            whole = (Rect(0, rows, 0, cols),)
            table = tuple((k,) for k in numbers)
            found = Ownership(ranks.group_name, ALONE, replicas, table, whole)
        return found if found.shards.size * found.replicas.size > 1 else None

    @property
    def local_rect(self) -> Rect:
        """This rank's part of every matrix."""
        return self.rects[self.shards.number]

    @property
    def replica_share(self) -> slice:
        """The matrices that are owned by ranks of this rank's replica."""
        start = sum(map(sum, self.counts[: self.replicas.number]))
        return slice(start, start + sum(self.replica_counts))

    @property
    def replica_counts(self) -> tuple[int, ...]:
        """By shard: how many matrices it owns in this rank's replica."""
        return self.counts[self.replicas.number]

    @property
    def local_count(self) -> int:
        """How many matrices this rank owns."""
        return self.replica_counts[self.shards.number]

    @property
    def by_rank(self) -> dict[int, int]:
        """How many matrices each rank of the process group owns."""
        return {
            rank: n
            for ranks, counts in zip(self.ranks, self.counts, strict=True)
            for rank, n in zip(ranks, counts, strict=True)
        }


def with_owners(
    ownership: Ownership,
    owners: Sequence[int],  # of replicas of whole matrices: by block, in order, its owner's number
    matrices: Sequence[int],  # in each block
) -> Ownership:
    """The ownership where whole blocks are given to the replicas, in the order of these."""
    counts = [0] * ownership.replicas.size
    for owner, n in zip(owners, matrices, strict=True):
        counts[owner] += n
    return replace(ownership, counts=tuple((n,) for n in counts))


class Shared(NamedTuple):
    """The matrices of one group that ranks share, as `balance` knows them."""

    ownership: Ownership
    matrices: int
    rows: int
    cols: int

    @property
    def cost(self) -> float:
        """Of one matrix, in multiples of the work of Newton-Schulz."""
        short, long = sorted((self.rows, self.cols))
        return float(short * short * (short + long))


T = TypeVar("T")


def scattered(shards: Sequence[T]) -> list[T]:
    """The same with the bits of their places reversed: the first lie far from one another.

    If a few of many ranks own the matrices, they shall be of many nodes, whose links they use.
    """
    bits = (len(shards) - 1).bit_length()
    mirrored = [int(f"{k:0{bits}b}"[::-1], 2) for k in range(2**bits)] if bits else [0]
    return [shards[k] for k in mirrored if k < len(shards)]


def balance(groups: Sequence[Shared]) -> list[Ownership]:
    """The ownerships of all groups of a plan, in their order, with the counts filled in.

    Every rank owns an equal number of each group's matrices. The remainder goes to the ranks with
    the least work so far, scattered over all of them; groups of the most expensive matrices come
    first.
    """
    found = [group.ownership for group in groups]
    load: dict[tuple[str, frozenset[int]], dict[int, float]] = {}
    for k in sorted(range(len(groups)), key=lambda k: groups[k].cost, reverse=True):
        ownership, matrices, _, _ = group = groups[k]
        # Alternately from all replicas, so that the remainder is divided among them too.
        by_shard = scattered([*zip(*ownership.ranks, strict=True)])
        ranks = [rank for of_shard in by_shard for rank in of_shard]
        # Blocks of replicas that work by themselves must all divide their work in the same way.
        among = ownership.group, frozenset(ranks)
        busy = load.setdefault(among, dict.fromkeys(ranks, 0.0))
        base, rest = divmod(matrices, len(ranks))
        extra = set(sorted(ranks, key=lambda rank: busy[rank])[:rest])
        counts = tuple(
            tuple(base + (rank in extra) for rank in of_replica) for of_replica in ownership.ranks
        )
        found[k] = replace(ownership, counts=counts)
        for rank, n in found[k].by_rank.items():
            busy[rank] += n * group.cost
    return found


@dataclass(frozen=True)
class Grid:
    """The parts into which a matrix is divided."""

    # Shard -> its position among the senders: first the shards that store entries, row by row,
    # then those that store only per-row state.
    places: dict[int, int]
    rows: tuple[int, ...]  # the first row of each band of parts
    cols: tuple[int, ...]  # the first column of each band of parts

    @property
    def parts(self) -> int:
        return len(self.rows) * len(self.cols)


@dataclass(frozen=True)
class GroupShards:
    """The matrices of one group as they are sent: tall ones transposed.

    A "line" is a row or a column of the matrix, whichever has a factor and per-row state.
    """

    ownership: Ownership
    rows: int
    cols: int
    tall: bool
    by_row: bool  # a line is a row of the parameter; otherwise a column
    states: int  # tensors of per-row state
    start: int  # the index of the group's first matrix in the bucket

    def rect(self, shard: int) -> Rect:
        """The shard's part of every matrix."""
        rect = self.ownership.rects[shard]
        return rect.mT if self.tall else rect

    def lines(self, shard: int) -> tuple[int, int]:
        """The first line of which the shard stores a part, and the number of such lines."""
        rect = self.ownership.rects[shard]
        return (rect.row, rect.rows) if self.by_row else (rect.col, rect.cols)

    def stores_states(self, shard: int) -> bool:
        """Whether a shard stores per-row state. It may do so without storing any entry."""
        return self.states > 0 and self.lines(shard)[1] > 0

    @property
    def along_rows(self) -> bool:
        """Whether a line is a row of the matrix as it is sent."""
        return self.by_row != self.tall

    @property
    def length(self) -> int:
        """The number of lines of a matrix."""
        return self.rows if self.along_rows else self.cols

    @property
    def count(self) -> int:
        return sum(map(sum, self.ownership.counts))

    @functools.cached_property
    def grid(self) -> Grid:
        shards = range(self.ownership.shards.size)
        senders = sorted((shard for shard in shards if self.rect(shard).size), key=self.rect)
        rects = [self.rect(shard) for shard in senders]
        senders += [
            shard for shard in shards if not self.rect(shard).size and self.stores_states(shard)
        ]
        rows, cols = ({rect[k] for rect in rects} for k in (0, 2))
        places = {shard: k for k, shard in enumerate(senders)}
        return Grid(places, tuple(sorted(rows)), tuple(sorted(cols)))

    @functools.cached_property
    def firsts(self) -> tuple[tuple[int, ...], ...]:
        """[replicas, shards]: the index of the first matrix that the rank owns."""
        counts = self.ownership.counts
        firsts = iter(accumulate((n for replica in counts for n in replica), initial=0))
        return tuple(tuple(next(firsts) for _ in replica) for replica in counts)
