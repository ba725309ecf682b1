"""What a message says about every matrix, and where each number lies in it: the one byte layout.

A message from one rank to another consists of up to two sections per group of matrices:

    narrow   [n, rows * cols of the shard's part]   in the dtype of the products
    wide     [n, numbers per matrix]                in float32 or float64

Each section is exactly the shard's own tensor for these ``n`` matrices, filled up to 8 bytes.
The owner's tensors describe whole matrices. Where a shard's numbers lie in them follows from the
list of `Field`s alone, for both directions and for packing as for unpacking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from ..ops.repack import Boxes
from .owners import GroupShards

# "entries": the shard's rectangle of the matrix. "lines": one number per line of the shard.
# "one": one number per matrix, the same for all shards. "one per shard": each shard has its own.
Extent = Literal["entries", "lines", "one", "one per shard"]


class Field(NamedTuple):
    """One kind of number that a message carries."""

    name: str
    extent: Extent
    wide: bool = True  # float32 or float64; otherwise the dtype of the products


class Spot(NamedTuple):
    """Where the numbers of one field and matrix lie in the tensors of a shard and of the owner."""

    name: str
    rows: int
    cols: int
    at_shard: int  # index of the first number in the shard's tensor
    at_owner: int  # index of the first number in the owner's tensor
    stride: int  # from row to row of the owner's tensor
    sent: bool  # False: the owner takes these numbers from another shard


class Section(NamedTuple):
    """``n`` matrices of one group and dtype in a message."""

    group: int
    wide: bool
    n: int
    at: int  # bytes


class Message(NamedTuple):
    start: int  # bytes
    sections: list[Section]
    end: int


class Copy(NamedTuple):
    """A box of bytes that a tensor and a message share. It is read in either direction."""

    tensor: int  # its position in the lists of `repack`
    at_tensor: int
    at_message: int
    shape: tuple[int, int, int]  # [n, rows, bytes of a row]
    strides: tuple[int, int]  # in the tensor, of the first two
    message_strides: tuple[int, int]


class Schema:
    """The layout of all messages of one direction between the owners of a bucket and its shards."""

    def __init__(
        self,
        groups: Sequence[GroupShards],
        fields: Sequence[Field],
        narrow: torch.dtype,
        wide: torch.dtype,
        flags: int = 0,  # wide numbers at the beginning of every message, for the whole bucket
    ) -> None:
        self.groups, self.fields, self.narrow, self.wide = groups, fields, narrow, wide
        self.flags = flags

    def itemsize(self, wide: bool) -> int:
        return (self.wide if wide else self.narrow).itemsize

    def tensor(self, group: int, wide: bool) -> int:
        """The position of a group's tensor in the lists of `repack`; the flags come last."""
        return group + wide * len(self.groups)

    def owner_size(self, group: int, extent: Extent) -> int:
        """How many numbers per matrix a field has in the owner's tensor."""
        x = self.groups[group]
        whole, senders = x.rows * x.cols, len(x.grid.places)
        return {"entries": whole, "lines": x.length, "one": 1, "one per shard": senders}[extent]

    def owner_slices(self, group: int, wide: bool) -> dict[str, slice]:
        """By name of a field: its numbers per matrix in the owner's tensor."""
        sizes = {
            field.name: self.owner_size(group, field.extent)
            for field in self.fields
            if field.wide == wide
        }
        ends = accumulate(sizes.values())
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    def spots(self, group: int, shard: int, wide: bool) -> list[Spot]:
        """Where the fields of one dtype lie, one behind the other in both tensors."""
        x, owner, found, at_shard = self.groups[group], self.owner_slices(group, wide), [], 0
        rect, (first, lines) = x.rect(shard), x.lines(shard)
        # Several shards may store the same lines: those send them that store the first entries.
        sends_lines = rect.size > 0 and (rect.col if x.along_rows else rect.row) == 0
        for field in self.fields:
            if field.wide != wide:
                continue
            rows, cols, at, stride, sent = 1, 1, 0, 1, True
            if field.extent == "entries":
                rows, cols, stride = rect.rows, rect.cols, x.cols
                at = rect.row * x.cols + rect.col
            elif field.extent == "lines":
                cols, at, sent = lines, first, sends_lines
            elif field.extent == "one per shard":
                at = x.grid.places[shard]
            at += owner[field.name].start
            found.append(Spot(field.name, rows, cols, at_shard, at, stride, sent))
            at_shard += rows * cols
        return found

    def shard_slices(self, group: int, shard: int, wide: bool) -> dict[str, slice]:
        """By name of a field: its numbers per matrix in the shard's tensor."""
        return {
            spot.name: slice(spot.at_shard, spot.at_shard + spot.rows * spot.cols)
            for spot in self.spots(group, shard, wide)
        }

    def shard_size(self, group: int, shard: int, wide: bool) -> int:
        """How many numbers per matrix the shard's tensor has."""
        return sum(spot.rows * spot.cols for spot in self.spots(group, shard, wide))

    def message(self, start: int, counts: Sequence[int], shard: int) -> Message:
        """The message that begins at byte ``start`` and is about ``counts`` matrices by group."""
        at, sections = start + _filled(self.flags * self.wide.itemsize), []
        for group, n in enumerate(counts):
            for wide in (False, True) if n else ():
                sections.append(Section(group, wide, n, at))
                size = self.shard_size(group, shard, wide) * self.itemsize(wide)
                at += _filled(n * size)
        return Message(start, sections, at)

    def shard_copies(self, message: Message, shard: int, firsts: Sequence[int]) -> Iterator[Copy]:
        """Between the shard's tensors and a message about its matrices from ``firsts`` on."""
        for group, wide, n, at in message.sections:
            size = self.shard_size(group, shard, wide) * self.itemsize(wide)
            shape, strides = (1, 1, n * size), (n * size, n * size)
            tensor = self.tensor(group, wide)
            yield Copy(tensor, firsts[group] * size, at, shape, strides, strides)

    def owner_copies(self, message: Message, shard: int, every: bool) -> Iterator[Copy]:
        """Between the owner's tensors and a message; with ``every``, also what is not `sent`."""
        for group, wide, n, at in message.sections:
            size = self.itemsize(wide)
            of_shard = self.shard_size(group, shard, wide) * size
            of_owner = max(x.stop for x in self.owner_slices(group, wide).values()) * size
            for spot in self.spots(group, shard, wide):
                if every or spot.sent:
                    row = spot.cols * size
                    yield Copy(
                        self.tensor(group, wide),
                        spot.at_owner * size,
                        at + spot.at_shard * size,
                        (n, spot.rows, row),
                        (of_owner, spot.stride * size),
                        (of_shard, row),
                    )

    def flags_copy(self, message: Message, index: int = 0) -> Copy:
        """Between the flags of a message and row ``index`` of the tensor of flags."""
        size = self.flags * self.wide.itemsize
        shape, strides = (1, 1, size), (size, size)
        return Copy(2 * len(self.groups), index * size, message.start, shape, strides, strides)


def pack(boxes: Boxes, copies: Iterable[Copy]) -> None:
    """Adds the way from the tensors into the message."""
    for tensor, at, to, shape, strides, message_strides in copies:
        boxes.add(tensor, 0, at, to, shape, strides, message_strides)


def unpack(boxes: Boxes, copies: Iterable[Copy]) -> None:
    """Adds the way from the message into the tensors."""
    for tensor, to, at, shape, strides, message_strides in copies:
        boxes.add(0, tensor, at, to, shape, message_strides, strides)


def _filled(size: int) -> int:
    """Bytes, filled up to a multiple of 8."""
    return -(-size // 8) * 8
