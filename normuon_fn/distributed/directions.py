"""The two directions of a bucket's messages: their fields, sizes and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..ops.repack import Boxes, Moves
from .fields import Field, Message, Schema, pack, unpack
from .hops import Hops, RankGrid
from .owners import GroupShards

_PART = (
    Field("x", "entries", wide=False),
    Field("power", "one per shard"),
    Field("squares", "one per shard"),
)
_UPDATE = (
    Field("x", "entries", wide=False),
    Field("finite", "one"),
    Field("factor", "lines"),
)


@dataclass(frozen=True, eq=False)
class Direction:
    """The tables and sizes of one direction of a bucket's messages."""

    pack: Moves
    unpack: Moves
    hops: Hops


class Layout:
    """The layouts of both directions of one bucket, from which the tables are generated."""

    def __init__(
        self,
        groups: Sequence[GroupShards],
        dtype: torch.dtype,  # of the products
        wide: torch.dtype,  # of everything else
        device: torch.device,
        grid: RankGrid,  # of the shards, over which messages go in a hop along each dimension
    ) -> None:
        self.groups, self.dtype, self.wide, self.device = groups, dtype, wide, device
        self.grid = grid
        self.shards, self.replicas = groups[0].ownership.shards, groups[0].ownership.replicas
        self.matrices = sum(group.count for group in groups)
        self.state_names = tuple(f"state {k}" for k in range(groups[0].states))
        states = tuple(Field(name, "lines") for name in self.state_names)
        flags = self.matrices if self.replicas.size > 1 else 0
        self.parts = Schema(groups, _PART + states, dtype, wide)
        self.updates = Schema(groups, _UPDATE + states, dtype, wide, flags)

    def _part_message(self, start: int, owner: int, shard: int) -> Message:
        """The parts that ``shard`` sends ``owner``; of a group it stores nothing of, nothing."""
        counts = [
            x.ownership.replica_counts[owner] if shard in x.grid.places else 0 for x in self.groups
        ]
        return self.parts.message(start, counts, shard)

    def _update_message(self, start: int, replica: int, owner: int, shard: int) -> Message:
        """The updates that ``shard`` receives of ``owner`` in a replica."""
        counts = [x.ownership.counts[replica][owner] for x in self.groups]
        return self.updates.message(start, counts, shard)

    def to_owners(self) -> Direction:
        here, replica, schema = self.shards.number, self.replicas.number, self.parts
        packing, unpacking = Boxes(), Boxes()
        outgoing: list[Message] = []
        incoming: list[Message] = []
        hops = self._hops(lambda shard, owner: self._part_message(0, owner, shard), inwards=True)
        for owner in self._numbers(hops.leaving):
            message = self._part_message(_end(outgoing), owner, here)
            firsts = [x.firsts[replica][owner] - x.firsts[replica][0] for x in self.groups]
            pack(packing, schema.shard_copies(message, here, firsts))
            outgoing.append(message)
        for shard in self._numbers(hops.arriving):
            message = self._part_message(_end(incoming), here, shard)
            unpack(unpacking, schema.owner_copies(message, shard, every=False))
            incoming.append(message)
        counts = [x.ownership.local_count for x in self.groups]
        narrow, wide = (
            [
                n * max(x.stop for x in schema.owner_slices(k, is_wide).values())
                for k, n in enumerate(counts)
            ]
            for is_wide in (False, True)
        )
        return Direction(
            packing.moves(self.device, [_end(outgoing) // 4], torch.int32),
            unpacking.moves(self.device, narrow, self.dtype, wide, self.wide),
            hops,
        )

    def back(self) -> tuple[Direction, int]:
        """And the words that are gathered from each replica: those of the longest message."""
        here, replica, schema = self.shards.number, self.replicas.number, self.updates
        packing, unpacking = Boxes(), Boxes()
        outgoing: list[Message] = []
        hops = self._hops(
            lambda owner, shard: self._update_message(0, replica, owner, shard), inwards=False
        )
        for shard in self._numbers(hops.leaving):
            message = self._update_message(_end(outgoing), replica, here, shard)
            if schema.flags:
                pack(packing, [schema.flags_copy(message)])
            pack(packing, schema.owner_copies(message, shard, every=True))
            outgoing.append(message)

        incoming = {k: self._incoming(0, k) for k in self.replicas.order}
        most = max(_end(messages) for messages in incoming.values())
        index = 0
        for slot, source in enumerate(self.replicas.order):
            messages = self._incoming(slot * most, source)
            for owner, message in zip(self.shards.order, messages, strict=True):
                if schema.flags:
                    unpack(unpacking, [schema.flags_copy(message, index)])
                    index += 1
                firsts = [x.firsts[source][owner] for x in self.groups]
                unpack(unpacking, schema.shard_copies(message, here, firsts))
        narrow, wide = (
            [x.count * schema.shard_size(k, here, is_wide) for k, x in enumerate(self.groups)]
            for is_wide in (False, True)
        )
        wide.append(index * self.matrices)
        # Without shards the packed message is gathered as it is, so it has the common length.
        total = _end(outgoing) if self.shards.size > 1 else most
        direction = Direction(
            packing.moves(self.device, [total // 4], torch.int32),
            unpacking.moves(self.device, narrow, self.dtype, wide, self.wide),
            hops,
        )
        return direction, most // 4

    def _hops(self, message: Callable[[int, int], Message], inwards: bool) -> Hops:
        """``message(a, b)``: what number a sends to number b."""
        order = self.shards.order

        def words(rank: int, other: int) -> int:
            found = message(order[rank], order[other])
            return (found.end - found.start) // 4

        return self.grid.hops(words, self.device, inwards)

    def _numbers(self, ranks: Sequence[int]) -> list[int]:
        """Of ranks of the process group of the shards: their numbers."""
        return [self.shards.order[rank] for rank in ranks]

    def _incoming(self, start: int, replica: int) -> list[Message]:
        """The messages of all owners of a replica to this rank's shard, one behind the other.

        In the order of the ranks, as they arrive after hops outwards.
        """
        messages: list[Message] = []
        for owner in self.shards.order:
            at = _end(messages, start)
            messages.append(self._update_message(at, replica, owner, self.shards.number))
        return messages


def _end(messages: Sequence[Message], start: int = 0) -> int:
    return messages[-1].end if messages else start
