"""How a tensor is read as matrices, and how matrices become the tensor again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..distributed.shards import Rect, Span


@dataclass(frozen=True)
class View:
    """A slice of a tensor read as a matrix [rows, cols] or a stack [count, rows, cols]."""

    base: tuple[int, ...]  # the shape of the whole tensor
    shape: tuple[int, ...]  # the slice's shape as it is read, before `swap`
    dim: int = 0
    start: int = 0
    length: int | None = None  # None: all of the tensor
    swap: bool = False  # the count lies in the middle: [rows, count, cols]
    flat: bool = False  # the dimensions behind the second one are read into the columns

    @property
    def is_whole(self) -> bool:
        """Whether `read` gives every tensor as it is."""
        return self.base == self.shape and self.length is None and not self.swap

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The shape of what `read` gives."""
        first, second, *rest = self.shape
        return (second, first, *rest) if self.swap else self.shape

    @property
    def is_one_piece(self) -> bool:
        """Whether what it reads of a contiguous tensor is one piece of memory."""
        return not self.swap and (self.length is None or size_of(self.base[: self.dim]) == 1)

    def read(self, tensor: Tensor) -> Tensor:
        """A view of the tensor, or a copy where its strides allow none: see `is_view`."""
        part = self._slice(tensor)
        if tuple(part.shape) != self.shape:
            part = part.reshape(self.shape)
        return part.transpose(0, 1) if self.swap else part

    @property
    def of_flattened(self) -> View:
        """The same slice of the tensor that is flattened to [base[0], base[1] * ...]."""
        if not self.flat:
            return self
        each = size_of(self.base[2:])
        by = each if self.dim == 1 else 1
        return replace(
            self,
            base=(self.base[0], self.base[1] * each),
            start=self.start * by,
            length=None if self.length is None else self.length * by,
            flat=False,
        )

    def of_tensor(self, base: tuple[int, ...]) -> View:
        """The inverse of `of_flattened`, for a tensor of the shape ``base``."""
        by = size_of(base[2:]) if self.dim == 1 else 1
        length = None if self.length is None else self.length // by
        return replace(self, base=base, start=self.start // by, length=length, flat=True)

    def is_view(self, tensor: Tensor) -> bool:
        """Whether `read` gives a view. Of channels_last filters it does not: a copy, row by row."""
        if tensor.is_contiguous() or tensor.ndim <= len(self.shape):
            return True
        part = self._slice(tensor)
        merged = slice(1, None) if self.flat else slice(0, -2)
        pairs = zip(part.shape[merged], part.stride()[merged], strict=True)
        kept = [(n, stride) for n, stride in pairs if n != 1]
        return all(outer == n * inner for (_, outer), (n, inner) in pairwise(kept))

    def write(self, tensor: Tensor, part: Tensor) -> None:
        """Copies to its place what `read` copied, and what has changed since."""
        self._slice(tensor).copy_(self.restore(part))

    def _slice(self, tensor: Tensor) -> Tensor:
        return tensor if self.length is None else tensor.narrow(self.dim, self.start, self.length)

    def restore(self, part: Tensor) -> Tensor:
        """What `read` gave, in the shape that the slice has in the tensor."""
        part = part.transpose(0, 1) if self.swap else part
        shape = list(self.base)
        if self.length is not None:
            shape[self.dim] = self.length
        return part if list(part.shape) == shape else part.reshape(shape)


@dataclass(frozen=True)
class Block:
    """``count`` matrices of one shape in one parameter: all of it, or one of its splits."""

    name: str
    count: int
    param: View
    line: View  # of a state with one number per row (or column) of every matrix
    scale: View  # of a state with one number per block of columns of every row: ops/codes.py
    salts: tuple[int, ...] = ()  # one per matrix, where parameters are rounded by chance
    # What its momentum takes of a slot on the device, in bytes, where it is in host memory: see
    # streaming.py. 0: it is on the device.
    staged: int = 0


def join(parts: Sequence[tuple[View | None, Tensor]]) -> Tensor:
    """The whole tensor from its parts, in any order; no view: the part is the whole."""
    if len(parts) == 1:
        view, part = parts[0]
        return part if view is None else view.restore(part)
    placed = sorted(
        ((view, part) for view, part in parts if view is not None), key=lambda entry: entry[0].start
    )
    return torch.cat([view.restore(part) for view, part in placed], placed[0][0].dim)


def part_of(
    view: View, count: int, rows: int, cols: int, part: Sequence[Span]
) -> tuple[View, int, Rect]:
    """What a shard has of a block: how to read it, of how many matrices, which part of each.

    Raises:
        ValueError: the shard begins or ends inside a head, or has some columns of a dimension that
            is flattened.
    """
    here = tuple(length for _, length in part)
    if view.flat:
        if any(span != (0, size) for span, size in zip(part[2:], view.base[2:], strict=True)):
            raise ValueError("a flattened dimension other than the first is sharded")
        each = size_of(view.base[2:])
        flat = part[0], (part[1][0] * each, part[1][1] * each)
        found, n, rect = part_of(view.of_flattened, count, rows, cols, flat)
        return found.of_tensor(here), n, rect
    if len(view.base) > 2:
        spans, n = list(part[-2:]), size_of(here[:-2])
        if view.length is None:
            rect = Rect(*spans[0], *spans[1])
            return View(here, (n, rect.rows, rect.cols)), n, rect
        cut = view.dim - len(here) + 2
        (start, size) = spans[cut]
        low, high = max(start, view.start), min(start + size, view.start + view.length)
        kept = max(0, high - low)
        spans[cut] = (low - view.start if kept else 0, kept)
        rect = Rect(*spans[0], *spans[1])
        return (
            View(here, (n, rect.rows, rect.cols), view.dim, low - start if kept else 0, kept),
            n,
            rect,
        )
    length = view.base[view.dim] if view.length is None else view.length
    (start, size), (other, across) = part[view.dim], part[1 - view.dim]
    low, high = max(start, view.start), min(start + size, view.start + length)
    kept = max(0, high - low)
    begin = low - view.start if kept else 0
    n = count
    if len(view.shape) == 3:
        head = length // count
        if begin % head or kept % head:
            raise ValueError(
                f"a shard of {kept} from {begin} on cuts through heads of {head} along dimension "
                f"{view.dim}"
            )
        n, along = kept // head, (0, head)
    else:
        along = (begin, kept)
    rect = Rect(*along, other, across) if view.dim == 0 else Rect(other, across, *along)
    stacked = (rect.rows, n, rect.cols) if view.swap else (n, rect.rows, rect.cols)
    read = stacked if len(view.shape) == 3 else (rect.rows, rect.cols)
    return (
        View(
            here,
            read,
            view.dim,
            low - start if kept else 0,
            None if view.length is None else kept,
            view.swap,
        ),
        n,
        rect,
    )


def size_of(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
