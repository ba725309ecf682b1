"""Who holds which part of the matrices of a group, and who orthogonalizes which of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from ..compat import Ranks, process_group
from .placements import ALONE, Sharded, Team
from .shards import Rect


@dataclass(frozen=True)
class Spread:
    """How the matrices of one group lie on the ranks of a process group, and who orthogonalizes which."""

    group: str
    shards: Team
    copies: Team
    cells: tuple[tuple[int, ...], ...]  # [copies, shards]: the rank in the group
    rects: tuple[Rect, ...]  # by shard: what it holds of every matrix
    counts: tuple[tuple[int, ...], ...] = ()  # [copies, shards]: so many of the matrices, in order

    @staticmethod
    def of(
        rects: Sequence[Rect], rows: int, cols: int, how: Sharded | Ranks | None
    ) -> Spread | None:
        """``rects`` by rank of the group. ``None``: whole matrices on one rank, that nobody shares the work on."""
        if how is None:
            return None
        if isinstance(how, Sharded):
            own = tuple(rects[rank] for rank in how.cells[0])
            found = Spread(how.group, how.shards, how.copies, how.cells, own)
        else:
            ranks = process_group(how)
            numbers = tuple(range(ranks.size()))
            copies = Team(ranks.group_name, ranks.rank(), numbers)
            found = Spread(
                ranks.group_name,
                ALONE,
                copies,
                tuple((k,) for k in numbers),
                (Rect(0, rows, 0, cols),),
            )
        return found if found.shards.size * found.copies.size > 1 else None

    @property
    def here(self) -> Rect:
        return self.rects[self.shards.number]

    @property
    def share(self) -> slice:
        """The matrices that this copy orthogonalizes."""
        start = sum(map(sum, self.counts[: self.copies.number]))
        return slice(start, start + sum(self.counts[self.copies.number]))

    @property
    def owned(self) -> tuple[int, ...]:
        """By shard: how many matrices of the share it orthogonalizes, in order."""
        return self.counts[self.copies.number]

    @property
    def own(self) -> int:
        return self.owned[self.shards.number]

    @property
    def by_rank(self) -> dict[int, int]:
        """How many matrices each rank of the group orthogonalizes."""
        return {rank: n for ranks, counts in zip(self.cells, self.counts, strict=True)
                for rank, n in zip(ranks, counts, strict=True)}  # fmt: skip


def balance(groups: Sequence[Any]) -> dict[int, Spread]:
    """The spreads of these `Group`s by their id, with the work shared out: by what matrices cost, over all groups of the ranks.

    Every rank takes its equal share of each group; what is left over goes to whoever has least to do, the dearest first.
    """
    found: dict[int, Spread] = {}
    load: dict[str, list[float]] = {}

    def cost(group: Any) -> float:
        short, long = sorted((group.rows, group.cols))
        return float(short * short * (short + long))

    for group in sorted((g for g in groups if g.ownership is not None), key=cost, reverse=True):
        spread: Spread = group.ownership
        ranks = [
            rank for of_shard in zip(*spread.cells, strict=True) for rank in of_shard
        ]  # alternately of all copies
        busy = load.setdefault(spread.group, [0.0] * len(ranks))
        base, rest = divmod(group.count, len(ranks))
        extra = set(sorted(ranks, key=lambda rank: busy[rank])[:rest])
        counts = tuple(
            tuple(base + (rank in extra) for rank in of_copy) for of_copy in spread.cells
        )
        found[id(group)] = replace(spread, counts=counts)
        for rank, n in found[id(group)].by_rank.items():
            busy[rank] += n * cost(group)
    return found


@dataclass(frozen=True)
class Grid:
    """The parts of a matrix."""

    places: dict[
        int, int
    ]  # of the shards that hold a part, row by row; then of those that hold variances alone
    rows: tuple[int, ...]  # where in the matrix the parts begin
    cols: tuple[int, ...]

    @property
    def parts(self) -> int:
        return len(self.rows) * len(self.cols)


@dataclass(frozen=True)
class Lane:
    """One group on its way."""

    spread: Spread
    rows: int  # as the matrices are sent: tall ones transposed
    cols: int
    tall: bool
    by_row: bool  # one variance a row of the parameter; otherwise one a column
    normalize: bool
    start: int  # its first matrix among those of the bucket

    def rect(self, shard: int) -> Rect:
        rect = self.spread.rects[shard]
        return rect.mT if self.tall else rect

    def reduced(self, shard: int) -> tuple[int, int]:
        """The first row (or column) that a shard holds a part of, and how many."""
        rect = self.spread.rects[shard]
        return (rect.row, rect.rows) if self.by_row else (rect.col, rect.cols)

    def variances(self, shard: int) -> int:
        """How many variances of a matrix a shard holds: of every row, even if it holds none of its entries."""
        return self.reduced(shard)[1] if self.normalize else 0

    @property
    def along_rows(self) -> bool:
        """Whether there is one variance a row of what is sent."""
        return self.by_row != self.tall

    @property
    def length(self) -> int:
        """How many rows (or columns) have a factor each, and a variance."""
        return self.rows if self.along_rows else self.cols

    @property
    def count(self) -> int:
        return sum(map(sum, self.spread.counts))

    @functools.cached_property
    def grid(self) -> Grid:
        shards = range(self.spread.shards.size)
        held = sorted((shard for shard in shards if self.rect(shard).size), key=self.rect)
        rects = [self.rect(shard) for shard in held]
        held += [shard for shard in shards if not self.rect(shard).size and self.variances(shard)]
        starts = (
            tuple(sorted({rect.row for rect in rects})),
            tuple(sorted({rect.col for rect in rects})),
        )
        return Grid({shard: k for k, shard in enumerate(held)}, *starts)

    @functools.cached_property
    def firsts(self) -> tuple[tuple[int, ...], ...]:
        """[copies, shards]: the first of the matrices that are theirs."""
        owners = iter(accumulate((n for counts in self.spread.counts for n in counts), initial=0))
        return tuple(tuple(next(owners) for _ in counts) for counts in self.spread.counts)
