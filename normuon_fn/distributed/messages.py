"""How ranks share a bucket: who orthogonalizes which matrix, and the messages that bring it there and its update back.

    parts  --send, receive-->  whole matrices, each on one rank  --send_back, relay, receive_back-->  parts of all updates

Every matrix has one owner. Ranks that hold a tensor between them are its shards; where that is so several times over, each set
is a copy, and takes an equal share of the matrices. Within a copy the parts of its share go to the owners and the updates come
back, one all-to-all each; between copies the updates are gathered, one all-gather. So FSDP2 and tensor parallelism take two
collectives a bucket, replicated parameters one and HSDP three. Matrices that no rank holds in part (experts, heads) are stepped
where they lie and go nowhere.

A message holds the entries of every group's matrices in the dtype of the products, times a power of two of each part's own, and
what else there is to say of them in 32 bits. All ranks reckon from the plan what lies where in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..compat import all_gather, all_to_all, wait
from ..ops.repack import Boxes, Moves
from .owners import Lane


class Part(NamedTuple):
    """What a rank sends of its share of one group's matrices, tall ones transposed."""

    x: Tensor  # [n, rows, cols] times `power`, in the dtype of the products
    power: Tensor  # [n]; not finite where the variance is not, inf where nothing lies here but variances
    squares: Tensor  # [n] sum((x * power)**2), before it was rounded
    states: tuple[Tensor, ...]  # [n, rows or cols]


class Whole(NamedTuple):
    """The matrices of one group that a rank owns, tall ones transposed."""

    x: Tensor  # [n, rows, cols], each part times its own power, in the dtype of the products
    shift: Tensor  # [n, rows or 1, cols or 1]: times this, all parts are times `power`
    power: Tensor  # [n]
    squares: Tensor  # [n] sum((x * shift)**2)
    states: tuple[Tensor, ...]  # [n, rows or cols]


class Update(NamedTuple):
    """What an owner sends back of its matrices, and what a rank has then of its parts of all matrices."""

    x: Tensor  # [n, rows, cols], tall ones transposed
    factor: Tensor  # [n, rows or cols]
    states: tuple[Tensor, ...]  # [n, rows or cols]
    finite: Tensor  # [n] bool, alike on all ranks that get it


class Sent(NamedTuple):
    """32-bit words, on their way unless they have ``arrived``."""

    words: Tensor
    arrived: bool

    def there(self) -> Tensor:
        return self.words if self.arrived else wait(self.words)


class _Piece(NamedTuple):
    """Where in a message the entries of a group's matrices begin, and what else is said of them; in bytes."""

    x: int
    extra: int
    end: int


@dataclass(frozen=True, eq=False)
class Way:
    """One way of a bucket's messages."""

    pack: Moves
    unpack: Moves
    incoming: tuple[int, ...]  # words, by rank of the shards' group
    outgoing: tuple[int, ...]


class Exchange:
    """Both ways of one bucket, for all of its groups. Nothing here changes after it is made."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        dtype: torch.dtype,  # of the products
        wide: torch.dtype,  # of everything else
        device: torch.device,
        overlaps: bool,  # several of these may be on their way at once
    ) -> None:
        self.lanes, self.dtype, self.wide = tuple(lanes), dtype, wide
        self.device, self.overlaps, self.normalize = device, overlaps, lanes[0].normalize
        spread = lanes[0].spread
        self.group, self.shards, self.copies = spread.group, spread.shards, spread.copies
        self.matrices = sum(lane.count for lane in lanes)
        self.there = self._there() if self.sharded else None
        self.back, self.gathered = self._back()
        # Of every entry of a matrix along rows and columns: whose part it is of.
        self.bands = [
            (_bands(x.grid.rows, x.rows, device), _bands(x.grid.cols, x.cols, device))
            for x in lanes
        ]
        self._grids = [
            (len(x.grid.places), x.grid.parts, len(x.grid.rows), len(x.grid.cols)) for x in lanes
        ]

    @property
    def sharded(self) -> bool:
        return self.shards.size > 1

    @property
    def moves(self) -> list[Moves]:
        ways = (self.there, self.back) if self.there else (self.back,)
        return [moves for way in ways for moves in (way.pack, way.unpack)]

    @property
    def _here(self) -> int:
        return self.shards.number

    # ------------------------------------------------------------------------------------------------------------ parts there

    def _piece(self, at: int, lane: Lane, n: int, shard: int, each: int) -> _Piece:
        """Of ``n`` matrices' parts that a shard holds, with ``each`` numbers besides."""
        extra = at + _fill(n * lane.rect(shard).size * self.dtype.itemsize)
        return _Piece(at, extra, extra + _fill(n * each * self.wide.itemsize))

    def _there(self) -> Way:
        pack, unpack, outgoing, incoming = Boxes(), Boxes(), [], []
        at = 0
        for owner in self.shards.order:
            start = at
            for k, lane in enumerate(self.lanes):
                n, size = lane.spread.owned[owner], lane.rect(self._here).size
                if not n or self._here not in lane.grid.places:
                    continue
                each, copy = 2 + lane.variances(self._here), self.copies.number
                first = lane.firsts[copy][owner] - lane.firsts[copy][0]
                piece = self._piece(at, lane, n, self._here, each)
                for source, to, one in ((2 * k, piece.x, size * self.dtype.itemsize),
                                        (2 * k + 1, piece.extra, each * self.wide.itemsize)):  # fmt: skip
                    pack.row(source, 0, first * one, to, n * one)
                at = piece.end
            outgoing.append((at - start) // 4)
        sizes: list[int] = []
        extras: list[int] = []
        for lane in self.lanes:
            sizes.append(lane.spread.own * lane.rows * lane.cols)
            extras.append(
                lane.spread.own * (2 * len(lane.grid.places) + lane.length * self.normalize)
            )
        at = 0
        for shard in self.shards.order:
            start = at
            for k, lane in enumerate(self.lanes):
                n = lane.spread.own
                if not n or shard not in lane.grid.places:
                    continue
                piece = self._piece(at, lane, n, shard, 2 + lane.variances(shard))
                self._place(unpack, k, lane, n, shard, piece)
                at = piece.end
            incoming.append((at - start) // 4)
        packed = pack.moves(self.device, [sum(outgoing)], torch.int32)
        unpacked = unpack.moves(self.device, sizes, self.dtype, extras, self.wide)
        return Way(packed, unpacked, tuple(incoming), tuple(outgoing))

    def _place(self, unpack: Boxes, k: int, lane: Lane, n: int, shard: int, piece: _Piece) -> None:
        """A shard's piece into the whole matrices, and [n, powers of all parts, their squares, variances]."""
        rect, size, wide = lane.rect(shard), self.dtype.itemsize, self.wide.itemsize
        row, whole_row = rect.cols * size, lane.cols * size
        unpack.add(
            0, k, piece.x, (rect.row * lane.cols + rect.col) * size, (n, rect.rows, row),
            (rect.rows * row, row), (lane.rows * whole_row, whole_row),
        )  # fmt: skip
        places, along = lane.grid.places, lane.variances(shard)
        each, all_ = (2 + along) * wide, (2 * len(places) + lane.length * self.normalize) * wide
        target = len(self.lanes) + k
        for number in range(2):
            to = (number * len(places) + places[shard]) * wide
            unpack.add(
                0, target, piece.extra + number * wide, to, (n, 1, wide), (each, each), (all_, all_)
            )
        if (
            rect.size and (rect.col if lane.along_rows else rect.row) == 0
        ):  # others hold the same variances
            to = (2 * len(places) + lane.reduced(shard)[0]) * wide
            unpack.add(
                0,
                target,
                piece.extra + 2 * wide,
                to,
                (n, 1, along * wide),
                (each, each),
                (all_, all_),
            )

    def send(self, parts: Sequence[Part | None]) -> Sent:
        """Every part of the share to the owner of its matrix; ``None`` for a group of which there is nothing here."""
        assert self.there is not None
        nothing = torch.empty(0, dtype=self.wide, device=self.device)
        sources = []
        for part in parts:
            if part is None:
                sources += [nothing, nothing]
                continue
            extra = [
                part.power[:, None],
                part.squares[:, None],
                *part.states,
            ]
            sources += [part.x, torch.cat([x.to(self.wide) for x in extra], 1)]
        (words,) = ops.repack(sources, self.there.pack)
        return self._exchanged(words, self.there)

    def receive(self, sent: Sent) -> list[Whole | None]:
        """The matrices that this rank owns, by group; ``None`` where it owns none."""
        assert self.there is not None
        found = ops.repack([sent.there()], self.there.unpack)
        wholes: list[Whole | None] = []
        for k, (lane, x, extra) in enumerate(
            zip(self.lanes, found, found[len(self.lanes) :], strict=False)
        ):
            n = lane.spread.own
            if not n:
                wholes.append(None)
                continue
            places, parts, rows, cols = self._grids[k]
            extra = extra.view(n, -1)
            power = extra[:, :places].amin(
                1
            )  # that of the largest entry of all; 0 or NaN where something is not finite
            shift = power[:, None] / extra[:, :parts]
            squares = (extra[:, places : places + parts] * shift.square()).sum(1)
            shift = shift.view(n, rows, cols)
            for dim, of in enumerate(self.bands[k]):
                shift = shift if of is None else shift.index_select(dim + 1, of)
            x = x.view(n, lane.rows, lane.cols)
            if self.dtype == self.wide:  # as exact as can be: the same sums as on one device
                squares = (x * shift).square().sum((1, 2))
            variance = (extra[:, 2 * places :],) if self.normalize else ()
            wholes.append(Whole(x, shift, power, squares, variance))
        return wholes

    # ---------------------------------------------------------------------------------------------------------- updates back

    def _answered_with(self, lane: Lane, shard: int) -> int:
        """Numbers of a matrix beside its update: whether it is finite, factors, variances."""
        return 1 + lane.reduced(shard)[1] * (1 + self.normalize)

    def _message(
        self, at: int, copy: int, owner: int, shard: int
    ) -> tuple[int, list[_Piece | None], int]:
        """What an owner sends a shard: the flags of this copy's own state, its updates by group, and where it ends."""
        flags, pieces = at, list[_Piece | None]()
        at += _fill(self.matrices * self.wide.itemsize) if self.copies.size > 1 else 0
        for lane in self.lanes:
            n = lane.spread.counts[copy][owner]
            pieces.append(
                self._piece(at, lane, n, shard, self._answered_with(lane, shard)) if n else None
            )
            at = at if pieces[-1] is None else pieces[-1].end
        return flags, pieces, at

    def _length(self, copy: int, owner: int, shard: int) -> int:
        return self._message(0, copy, owner, shard)[2] // 4

    def _back(self) -> tuple[Way, int]:
        """And how many words a copy gathers from each: those of the copy with the most to say."""
        here, copy = self._here, self.copies.number
        outgoing = tuple(self._length(copy, here, shard) for shard in self.shards.order)
        incoming = tuple(self._length(copy, owner, here) for owner in self.shards.order)
        most = max(
            sum(self._length(c, owner, here) for owner in self.shards.order)
            for c in self.copies.order
        )
        pack, at = Boxes(), 0
        for shard in self.shards.order:
            flags, pieces, at = self._message(at, copy, here, shard)
            if self.copies.size > 1:
                pack.row(2 * len(self.lanes), 0, 0, flags, self.matrices * self.wide.itemsize)
            for k, (lane, piece) in enumerate(zip(self.lanes, pieces, strict=True)):
                if piece is not None:
                    self._cut(pack, k, lane, shard, piece)
        total = most if not self.sharded else sum(outgoing)  # replicated, it is gathered as it is
        packed = pack.moves(self.device, [total], torch.int32)
        return Way(packed, self._unpacked(most), incoming, outgoing), most

    def _cut(self, pack: Boxes, k: int, lane: Lane, shard: int, piece: _Piece) -> None:
        """A shard's parts of the updates, and of what is said of them: [n, finite, factors, variances]."""
        n, rect, size, wide = (
            lane.spread.own,
            lane.rect(shard),
            self.dtype.itemsize,
            self.wide.itemsize,
        )
        row, whole_row = rect.cols * size, lane.cols * size
        pack.add(
            2 * k, 0, (rect.row * lane.cols + rect.col) * size, piece.x, (n, rect.rows, row),
            (lane.rows * whole_row, whole_row), (rect.rows * row, row),
        )  # fmt: skip
        first, along = lane.reduced(shard)
        length = lane.length
        all_, each = (
            (1 + length * (1 + self.normalize)) * wide,
            self._answered_with(lane, shard) * wide,
        )
        spans = [(0, 0, 1), (1 + first, 1, along)]
        spans += [(1 + length + first, 1 + along, along)] if self.normalize else []
        for at, to, numbers in spans:
            pack.add(
                2 * k + 1, 0, at * wide, piece.extra + to * wide, (n, 1, numbers * wide), (all_, all_), (each, each)
            )  # fmt: skip

    def _unpacked(self, most: int) -> Moves:
        """Of the messages of all copies and owners, the parts of all matrices that lie here, and the flags of each message."""
        here, unpack = self._here, Boxes()
        flags, messages = 2 * len(self.lanes), 0
        for slot, copy in enumerate(self.copies.order):
            at = 4 * slot * most
            for owner in self.shards.order:
                start, pieces, at = self._message(at, copy, owner, here)
                if self.copies.size > 1:
                    size = self.matrices * self.wide.itemsize
                    unpack.row(0, flags, start, messages * size, size)
                    messages += 1
                for k, (lane, piece) in enumerate(zip(self.lanes, pieces, strict=True)):
                    if piece is None:
                        continue
                    n = lane.spread.counts[copy][owner]
                    first = lane.firsts[copy][owner]
                    each = self._answered_with(lane, here) * self.wide.itemsize
                    size = lane.rect(here).size * self.dtype.itemsize
                    unpack.row(0, k, piece.x, first * size, n * size)
                    unpack.row(0, len(self.lanes) + k, piece.extra, first * each, n * each)
        sizes = [lane.count * lane.rect(here).size for lane in self.lanes]
        extras = [lane.count * self._answered_with(lane, here) for lane in self.lanes]
        return unpack.moves(
            self.device, sizes, self.dtype, [*extras, messages * self.matrices], self.wide
        )

    def send_back(self, updates: Sequence[Update | None], finite: Tensor | None) -> Sent:
        """An owner's updates to whoever holds a part; ``None`` for a group of which this rank owns nothing.

        ``finite``: [matrices of the bucket] bool, of what lies here, where there are copies: others do not see it otherwise.
        """
        nothing = torch.empty(0, dtype=self.wide, device=self.device)
        sources = []
        for update in updates:
            if update is None:
                sources += [nothing, nothing]
                continue
            extra = [
                update.finite[:, None],
                update.factor,
                *update.states,
            ]
            sources += [update.x, torch.cat([x.to(self.wide) for x in extra], 1)]
        sources += [] if finite is None else [finite.to(self.wide)]
        (words,) = ops.repack(sources, self.back.pack)
        if self.sharded:
            return self._exchanged(words, self.back)
        return self._sent(all_gather(words, self.copies.size, self.copies.group))

    def relay(self, sent: Sent) -> Sent:
        """What came of this copy's share, to the other copies."""
        if not self.sharded or self.copies.size == 1:
            return sent
        words = sent.there()
        if len(words) < self.gathered:
            words = torch.nn.functional.pad(words, (0, self.gathered - len(words)))
        return self._sent(all_gather(words, self.copies.size, self.copies.group))

    def receive_back(self, sent: Sent) -> list[Update]:
        """This rank's parts of the updates of all matrices, by group."""
        found = ops.repack([sent.there()], self.back.unpack)
        alike = None
        if self.copies.size > 1:
            alike = (found[-1].view(-1, self.matrices) > 0).all(0)
        updates = []
        for lane, x, extra in zip(self.lanes, found, found[len(self.lanes) :], strict=False):
            rect, along = lane.rect(self._here), lane.reduced(self._here)[1]
            extra = extra.view(lane.count, self._answered_with(lane, self._here))
            finite = extra[:, 0] > 0
            if alike is not None:
                finite = finite & alike[lane.start : lane.start + lane.count]
            variance = (extra[:, 1 + along :],) if self.normalize else ()
            updates.append(
                Update(
                    x.view(lane.count, rect.rows, rect.cols),
                    extra[:, 1 : 1 + along],
                    variance,
                    finite,
                )
            )
        return updates

    def _exchanged(self, words: Tensor, way: Way) -> Sent:
        return self._sent(
            all_to_all(words, list(way.incoming), list(way.outgoing), self.shards.group)
        )

    def _sent(self, words: Tensor) -> Sent:
        return Sent(words, False) if self.overlaps else Sent(wait(words), True)


def _fill(size: int) -> int:
    """Bytes, filled up to a multiple of 8."""
    return -(-size // 8) * 8


def _bands(starts: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """[size] int64: in which of the bands that begin at ``starts`` each entry lies; ``None`` for one band."""
    if len(starts) < 2:
        return None
    lengths = [end - start for start, end in zip(starts, [*starts[1:], size], strict=True)]
    return torch.tensor(
        [k for k, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64, device=device
    )
