"""The messages that bring a bucket's matrices to their owners and the updates back.

Every matrix of a bucket has one owner, the rank that orthogonalizes it. For a matrix of two shards
A and B in two replicas, owned by rank A of replica 0:

    replica 0            replica 1
    A: upper half        A: upper half     1. send, receive        all-to-all within a replica:
    B: lower half        B: lower half        B sends its half to A, which then has the whole
                                           2. (the caller orthogonalizes what a rank owns)
    B --1--> A                             3. send_back            all-to-all within a replica:
    A --3--> B                                A sends B the lower half of the update
    A ----4----------->  A                 4. relay                all-gather between replicas:
    B ----4----------->  B                    every rank passes on what came for its own part
                                           5. receive_back         every rank has its part of every
                                              update, of all owners in all replicas

Each replica owns as equal a share of the matrices as can be, so nothing is sent between replicas
before step 4. FSDP2 and tensor parallelism (one replica) need steps 1 and 3: two collectives per
bucket. Replicated parameters (one shard) need only one all-gather, which is started in send_back.
HSDP needs three collectives. Matrices that no rank stores in part (experts, heads) are never sent.
Among very many ranks, steps 1 and 3 go in several hops each: see hops.py.

directions.py lists the fields that a message carries per matrix in either direction, and fields.py
derives from that list which byte lies where. All ranks derive the same layout from the plan,
so no message describes itself. Entries travel in the dtype of the products, multiplied by a power
of two that each part chooses for itself; everything else travels in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..compat import all_gather, wait
from ..ops.repack import Moves
from .directions import Direction, Layout
from .hops import Hop, RankGrid
from .owners import GroupShards

# How an error names the collectives.
GATHER = "the all_to_all that gathers matrices at their owners"
SCATTER = "the all_to_all that scatters the updates"
RELAY = "the all_gather of the updates"
TOTALS = "the all_gather of sums over the matrices"


class Part(NamedTuple):
    """A rank's parts of one group's matrices of its replica's share, tall ones transposed."""

    x: Tensor  # [n, rows, cols] times `power`, in the dtype of the products
    power: Tensor  # [n]; NaN to make the matrix not finite, inf if the rank stores only states
    squares: Tensor  # [n] sum((x * power)**2), before it was rounded
    states: tuple[Tensor, ...]  # each [n, rows or cols], in the order of the normalize stage


class Whole(NamedTuple):
    """The matrices of one group that a rank owns, tall ones transposed."""

    x: Tensor  # [n, rows, cols], each part times its own power, in the dtype of the products
    shift: Tensor  # [n, rows or 1, cols or 1]: x * shift is the matrix times `power`
    power: Tensor  # [n]
    squares: Tensor  # [n] sum((x * shift)**2)
    states: tuple[Tensor, ...]  # each [n, rows or cols]


class Update(NamedTuple):
    """The updates that an owner sends back; or, received, a rank's parts of all updates."""

    x: Tensor  # [n, rows, cols], tall ones transposed
    factor: Tensor  # [n, rows or cols]
    states: tuple[Tensor, ...]  # each [n, rows or cols]
    finite: Tensor  # [n] bool, the same on all ranks that receive it


class Sent(NamedTuple):
    """The 32-bit words of a message, in transfer unless they have ``arrived``."""

    words: Tensor
    arrived: bool
    name: str  # of the collective
    onward: tuple[tuple[Moves, Hop], ...] = ()  # the hops that are left

    def received(self) -> Tensor:
        """The words, after the transfer has ended: what the next hop sends, if one is left."""
        return self.words if self.arrived else wait(self.words, self.name)


class Exchange:
    """Both directions for all groups of one bucket. It does not change after construction."""

    def __init__(
        self,
        groups: Sequence[GroupShards],
        dtype: torch.dtype,  # of the products
        wide: torch.dtype,  # of everything else
        device: torch.device,
        overlaps: bool,  # several collectives may be in transfer at once
    ) -> None:
        self.groups, self.dtype, self.wide = tuple(groups), dtype, wide
        self.device, self.overlaps = device, overlaps
        ownership = groups[0].ownership
        self.group, self.shards = ownership.group, ownership.shards
        self.replicas = ownership.replicas
        self.matrices = sum(group.count for group in groups)
        self.grid = RankGrid.of(self.shards, *self._of_owners())
        layout = Layout(self.groups, dtype, wide, device, self.grid)
        self._parts, self._updates = layout.parts, layout.updates
        self.state_names = layout.state_names
        self.to_owners = layout.to_owners() if self.sharded else None
        self.back, self.gathered = layout.back()
        # For every row and column of a matrix: the index of the band of parts in which it lies.
        self.bands = [
            (_bands(x.grid.rows, x.rows, device), _bands(x.grid.cols, x.cols, device))
            for x in groups
        ]
        self._grids = [(x.grid.parts, len(x.grid.rows), len(x.grid.cols)) for x in groups]

    @property
    def sharded(self) -> bool:
        return self.shards.size > 1

    def _of_owners(self) -> tuple[float, int]:
        """Bytes of an owner's matrices, and how many ranks of a replica own any.

        The same on all ranks, whatever the remainder of a division gave them.
        """
        ranks, replicas = self.shards.size, self.replicas.size
        owners = min(ranks, -(-self.matrices // replicas))
        entries = sum(group.count * group.rows * group.cols for group in self.groups)
        return entries * self.dtype.itemsize / (replicas * owners), owners

    @property
    def moves(self) -> list[Moves]:
        directions = (self.to_owners, self.back) if self.to_owners else (self.back,)
        found = [moves for x in directions for moves in (x.pack, x.unpack)]
        return found + [moves for x in directions for moves, _ in x.hops.onward]

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        bands = [band for each in self.bands for band in each if band is not None]
        return [*(moves.table for moves in self.moves), *bands]

    # -------------------------------------------------------------------------- parts to owners

    def send(self, parts: Sequence[Part | None]) -> Sent:
        """Sends every part of the replica's share to the owner of its matrix.

        ``parts``: by group; ``None`` where this rank stores neither entries nor states.
        """
        assert self.to_owners is not None
        sources = self._sources(
            [None if x is None else (x.x, x.power, x.squares, x.states) for x in parts]
        )
        (words,) = ops.repack(sources, self.to_owners.pack)
        return self._exchanged(words, self.to_owners, GATHER)

    def pass_on(self, sent: Sent) -> Sent:
        """The next hop, after the one in transfer has ended; the same if it was the last."""
        if not sent.onward:
            return sent
        moves, hop = sent.onward[0]
        (words,) = ops.repack([sent.received()], moves)
        return self._sent(hop.start(words), sent.name, sent.onward[1:])

    def _arrived(self, sent: Sent) -> Tensor:
        """The words of a message after its last hop."""
        while sent.onward:
            sent = self.pass_on(sent)
        return sent.received()

    def receive(self, sent: Sent) -> list[Whole | None]:
        """The matrices that this rank owns, by group; ``None`` where it owns none."""
        assert self.to_owners is not None
        found = ops.repack([self._arrived(sent)], self.to_owners.unpack)
        return [
            self._whole(k, found[k], found[k + len(self.groups)])
            if group.ownership.local_count
            else None
            for k, group in enumerate(self.groups)
        ]

    def _whole(self, k: int, x: Tensor, numbers: Tensor) -> Whole:
        group, (parts, rows, cols) = self.groups[k], self._grids[k]
        at = self._parts.owner_slices(k, wide=True)
        n = group.ownership.local_count
        numbers = numbers.view(n, -1)
        # The least power is that of the largest entry; 0 or NaN where something is not finite.
        power = numbers[:, at["power"]].amin(1)
        shift = power[:, None] / numbers[:, _first(at["power"], parts)]
        squares = (numbers[:, _first(at["squares"], parts)] * shift.square()).sum(1)
        shift = shift.view(n, rows, cols)
        for dim, band in enumerate(self.bands[k]):
            shift = shift if band is None else shift.index_select(dim + 1, ops.input_for(band))
        x = x.view(n, group.rows, group.cols)
        if torch.promote_types(self.dtype, self.wide) == self.dtype:
            # Nothing was rounded: the same sums as on one device.
            squares = (x * shift).to(self.wide).square().sum((1, 2))
        states = tuple(numbers[:, at[name]] for name in self.state_names)
        return Whole(x, shift, power, squares, states)

    # ----------------------------------------------------------------------------- updates back

    def send_back(self, updates: Sequence[Update | None], finite: Tensor | None) -> Sent:
        """Sends the updates of the matrices that this rank owns to all of their shards.

        ``updates``: by group; ``None`` where this rank owns no matrix. ``finite``: [matrices of
        the bucket] bool, whether this rank's own momentum and state are finite. It is needed
        only where there are replicas: a replica's owners do not see the tensors of the others.
        """
        sources = self._sources(
            [None if x is None else (x.x, x.finite, x.factor, x.states) for x in updates]
        )
        sources += [] if finite is None else [finite.to(self.wide)]
        (words,) = ops.repack(sources, self.back.pack)
        if self.sharded:
            return self._exchanged(words, self.back, SCATTER)
        return self._sent(all_gather(words, self.replicas.size, self.replicas.group), RELAY)

    def relay(self, sent: Sent) -> Sent:
        """Passes the updates of this replica's share on to the other replicas."""
        if not self.sharded or self.replicas.size == 1:
            return sent
        words = self._arrived(sent)
        if len(words) < self.gathered:
            words = torch.nn.functional.pad(words, (0, self.gathered - len(words)))
        return self._sent(all_gather(words, self.replicas.size, self.replicas.group), RELAY)

    def receive_back(self, sent: Sent) -> list[Update]:
        """This rank's parts of the updates of all matrices, by group."""
        found = ops.repack([self._arrived(sent)], self.back.unpack)
        everywhere = None
        if self.replicas.size > 1:
            everywhere = (found[-1].view(-1, self.matrices) > 0).all(0)
        updates = []
        for k, group in enumerate(self.groups):
            here = self.shards.number
            rect, at = group.rect(here), self._updates.shard_slices(k, here, wide=True)
            size = self._updates.shard_size(k, here, wide=True)
            numbers = found[k + len(self.groups)].view(group.count, size)
            finite = numbers[:, at["finite"].start] > 0
            if everywhere is not None:
                finite = finite & everywhere[group.start : group.start + group.count]
            x = found[k].view(group.count, rect.rows, rect.cols)
            states = tuple(numbers[:, at[name]] for name in self.state_names)
            updates.append(Update(x, numbers[:, at["factor"]], states, finite))
        return updates

    # ------------------------------------------------------------------------------------- both

    def _sources(
        self, groups: Sequence[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]] | None]
    ) -> list[Tensor]:
        """The tensors to pack: entries by group, then by group its wide fields as one tensor."""
        nothing = torch.empty(0, dtype=self.wide, device=self.device)
        narrow, wide = [], []
        for fields in groups:
            if fields is None:
                narrow.append(nothing)
                wide.append(nothing)
                continue
            x, first, second, states = fields
            columns = [x if x.ndim == 2 else x[:, None] for x in (first, second, *states)]
            narrow.append(x)
            wide.append(torch.cat([column.to(self.wide) for column in columns], 1))
        return [*narrow, *wide]

    def _exchanged(self, words: Tensor, direction: Direction, name: str) -> Sent:
        hops = direction.hops
        return self._sent(hops.first.start(words), name, hops.onward)

    def _sent(self, words: Tensor, name: str, onward: tuple[tuple[Moves, Hop], ...] = ()) -> Sent:
        if self.overlaps:
            return Sent(words, False, name, onward)
        return Sent(wait(words, name), True, name, onward)


def _first(numbers: slice, count: int) -> slice:
    return slice(numbers.start, numbers.start + count)


def _bands(starts: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """[size] int64: the index of the band of each row or column; ``None`` if there is one band."""
    if len(starts) < 2:
        return None
    lengths = [end - start for start, end in zip(starts, [*starts[1:], size], strict=True)]
    bands = [k for k, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(bands, dtype=torch.int64, device=device)
