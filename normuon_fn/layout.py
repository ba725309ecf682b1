"""How a tensor is read as matrices, and how matrices become the tensor again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A slice of a tensor read as one matrix [rows, cols], or as a stack of matrices [count, rows, cols]."""

    base: tuple[int, ...]  # the shape of the whole tensor
    shape: tuple[int, ...]  # the slice's shape as it is read, before `swap`
    dim: int = 0
    start: int = 0
    length: int | None = None  # None: all of the tensor
    swap: bool = False  # the count lies in the middle: [rows, count, cols]

    def read(self, tensor: Tensor, *, writable: bool = True) -> Tensor:
        """A view of the tensor; where it is only read, a copy if its strides allow no view."""
        part = tensor if self.length is None else tensor.narrow(self.dim, self.start, self.length)
        if tuple(part.shape) != self.shape:
            part = part.view(self.shape) if writable else part.reshape(self.shape)
        return part.transpose(0, 1) if self.swap else part

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
    variance: View
    salts: tuple[int, ...] = ()  # one a matrix, where parameters are rounded by chance

    def view(self, suffix: str) -> View:
        return self.variance if suffix == ".variance" else self.param


def pick(tensors: Sequence[Tensor], at: slice) -> list[Tensor]:
    """The matrices ``at`` of all those of a list, as a list."""
    found, start = [], 0
    for x in tensors:
        n = x.shape[0] if x.ndim == 3 else 1
        low, high = max(at.start - start, 0), min(at.stop - start, n)
        if low < high:
            found.append(x if high - low == n else x[low:high])
        start += n
    return found


def join(parts: Sequence[tuple[View | None, Tensor]]) -> Tensor:
    """The whole tensor from its parts, in any order; no view: the part is the whole."""
    if len(parts) == 1:
        view, part = parts[0]
        return part if view is None else view.restore(part)
    placed = sorted(((view, part) for view, part in parts if view is not None), key=lambda entry: entry[0].start)
    return torch.cat([view.restore(part) for view, part in placed], placed[0][0].dim)


def matrices(
    shape: tuple[int, ...],
    *,
    flatten: bool,
    heads: tuple[int | None, ...],
    splits: tuple[int, ...] | None,
    dim: int,
) -> list[tuple[View, int, int, int]]:
    """(view, count, rows, cols) of every block of a parameter of that shape. ``heads`` has one entry a split."""
    if len(shape) > 2 and splits is not None:
        return _split_stack(shape, splits, dim)
    if flatten or len(shape) > 2:
        rows, cols = (shape[0], _size(shape[1:])) if flatten else shape[-2:]
        count = 1 if flatten else _size(shape[:-2])
        read = (rows, cols) if flatten else (count, rows, cols)
        return [(View(shape, read), count, rows, cols)]
    blocks, start = [], 0
    whole = splits is None
    for length, cut in zip(splits or (shape[dim],), heads, strict=True):
        count = 1 if cut is None else cut
        rows, cols = (length, shape[1]) if dim == 0 else (shape[0], length)
        rows, cols = (rows // count, cols) if dim == 0 else (rows, cols // count)
        read = (rows, cols) if cut is None else (count, rows, cols) if dim == 0 else (rows, count, cols)
        view = View(shape, read, dim, start, None if whole else length, swap=cut is not None and dim == 1)
        blocks.append((view, count, rows, cols))
        start += length
    return blocks


def _split_stack(shape: tuple[int, ...], splits: tuple[int, ...], dim: int) -> list[tuple[View, int, int, int]]:
    """Of every matrix of a stack the same parts."""
    blocks, start, count = [], 0, _size(shape[:-2])
    for length in splits:
        rows, cols = (length, shape[-1]) if dim == 0 else (shape[-2], length)
        blocks.append((View(shape, (count, rows, cols), len(shape) - 2 + dim, start, length), count, rows, cols))
        start += length
    return blocks


class Rect(NamedTuple):
    """A part of a matrix [rows, cols]."""

    row: int
    rows: int
    col: int
    cols: int

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def mT(self) -> Rect:  # noqa: N802 - as of a tensor
        return Rect(self.col, self.cols, self.row, self.rows)


Span = tuple[int, int]  # start and length along a dimension


def part_of(view: View, count: int, rows: int, cols: int, part: Sequence[Span]) -> tuple[View, int, Rect]:
    """What a part of the tensor holds of a block: how to read it there, of how many of its matrices, and what of each.

    Raises:
        ValueError: the part begins or ends inside a head, or has some columns of a dimension that is flattened.
    """
    here = tuple(length for _, length in part)
    if len(view.base) > 2 and len(view.shape) == 2:  # flattened
        if any(span != (0, size) for span, size in zip(part[2:], view.base[2:], strict=True)):
            raise ValueError("a flattened dimension other than the first is sharded")
        each = _size(view.base[2:])
        rect = Rect(*part[0], part[1][0] * each, part[1][1] * each)
        return View(here, (rect.rows, rect.cols)), count, rect
    if len(view.base) > 2:
        spans, n = list(part[-2:]), _size(here[:-2])
        if view.length is None:
            rect = Rect(*spans[0], *spans[1])
            return View(here, (n, rect.rows, rect.cols)), n, rect
        cut = view.dim - len(here) + 2
        (start, size) = spans[cut]
        low, high = max(start, view.start), min(start + size, view.start + view.length)
        kept = max(0, high - low)
        spans[cut] = (low - view.start if kept else 0, kept)
        rect = Rect(*spans[0], *spans[1])
        return View(here, (n, rect.rows, rect.cols), view.dim, low - start if kept else 0, kept), n, rect
    length = view.base[view.dim] if view.length is None else view.length
    (start, size), (other, across) = part[view.dim], part[1 - view.dim]
    low, high = max(start, view.start), min(start + size, view.start + length)
    kept = max(0, high - low)
    begin = low - view.start if kept else 0
    n = count
    if len(view.shape) == 3:
        head = length // count
        if begin % head or kept % head:
            raise ValueError(f"a shard of {kept} from {begin} on cuts through heads of {head} along dimension {view.dim}")
        n, along = kept // head, (0, head)
    else:
        along = (begin, kept)
    rect = Rect(*along, other, across) if view.dim == 0 else Rect(other, across, *along)
    stacked = (rect.rows, n, rect.cols) if view.swap else (n, rect.rows, rect.cols)
    read = stacked if len(view.shape) == 3 else (rect.rows, rect.cols)
    return View(here, read, view.dim, low - start if kept else 0, None if view.length is None else kept, view.swap), n, rect


def variances(blocks: Sequence[tuple[View, int, int, int]], per_row: Sequence[bool]) -> tuple[tuple[int, ...], list[View]]:
    """The shape of a parameter's variance in the state, and the view of it that belongs to each block.

    It is the parameter's shape with the reduced axis 1 (every head or split its own), where that can be said; blocks of one
    parameter that reduce different axes lie one behind the other in a vector.
    """
    first, count, rows, cols = blocks[0]
    parts = len(blocks) > 1 or first.length is not None or (len(first.base) == 2 and count > 1) or first.swap
    if not parts:
        lead = () if len(first.base) == 2 or len(first.shape) == 2 else first.base[:-2]
        across = (rows, 1) if per_row[0] else (1, cols)
        base = (*lead, *across)
        return base, [View(base, (count, *across) if len(first.shape) == 3 else across)]
    if len(first.base) > 2 and len(set(per_row)) == 1:
        return _stack_variances(blocks, per_row[0])
    if not any(per_row) and first.dim == 1:  # one a column, and the columns are what is split
        base = (1, first.base[1])
        return base, [
            View(base, (1, n, c) if len(view.shape) == 3 else (1, c), 1, view.start, n * c, view.swap)
            for view, n, _, c in blocks
        ]
    if not all(per_row):
        sizes = [n * (r if by_row else c) for (_, n, r, c), by_row in zip(blocks, per_row, strict=True)]
        base, views = (sum(sizes),), []
        for k, ((view, n, r, c), by_row) in enumerate(zip(blocks, per_row, strict=True)):
            across = (r, 1) if by_row else (1, c)
            stacked = len(view.shape) == 3
            views.append(View(base, (n, *across) if stacked else across, 0, sum(sizes[:k]), sizes[k]))
        return base, views
    dim = first.dim
    base = (first.base[0], 1) if dim == 0 else (first.base[0], sum(n for _, n, _, _ in blocks))
    views, start = [], 0
    for view, n, r, _ in blocks:
        length = n * r if dim == 0 else n
        shape = (length, 1) if len(view.shape) == 2 else (n, r, 1) if dim == 0 else (r, n, 1)
        if dim == 1 and len(view.shape) == 2:
            shape = (r, 1)
        views.append(View(base, shape, dim, start, length, swap=view.swap))
        start += length
    return base, views


def _stack_variances(blocks: Sequence[tuple[View, int, int, int]], per_row: bool) -> tuple[tuple[int, ...], list[View]]:
    """Of a stack with splits: the stack's shape with the reduced axis 1, or one for every split."""
    first = blocks[0][0]
    lead, along = first.base[:-2], first.dim - len(first.base) + 2  # the dimension that is split
    lengths = [(r, 1) if per_row else (1, c) for _, _, r, c in blocks]
    total = sum(across[along] for across in lengths)
    base = (*lead, total, lengths[0][1]) if along == 0 else (*lead, lengths[0][0], total)
    views, start = [], 0
    for (_, count, _, _), across in zip(blocks, lengths, strict=True):
        views.append(View(base, (count, *across), first.dim, start, across[along]))
        start += across[along]
    return base, views


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
