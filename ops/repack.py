"""`repack`: copies boxes of bytes between tensors, to pack and unpack the messages of ranks.

It is one node in the graph for any number of ranks, and it does no arithmetic, so that NaNs keep
their bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .handles import input_for
from .launch import HAS_TRITON, INTERPRETED, jit, launch, tl
from .registration import define

# In bytes: from, to, row stride of the source, row stride of the target, rows, bytes per row.
Box = tuple[int, int, int, int, int, int]
UNITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 8192


@jit
def repack_kernel(
    table, source, target, ROW: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of a box. ``ROW``: it is one row; ``EVEN``: of pairs of units, loaded together."""
    entry = table + tl.program_id(0).to(tl.int64) * 6
    at, to, cols = tl.load(entry), tl.load(entry + 1), tl.load(entry + 5).to(tl.int32)
    if EVEN:
        at, to, cols = tl.multiple_of(at, 2), tl.multiple_of(to, 2), tl.multiple_of(cols, 2)
    source += at
    target += to
    k = tl.arange(0, BLOCK)
    if ROW:
        tl.store(target + k, tl.load(source + k, k < cols), k < cols)
    else:
        source_stride, target_stride = tl.load(entry + 2), tl.load(entry + 3)
        row, mask = k // cols, k < tl.load(entry + 4).to(tl.int32) * cols
        col = k - row * cols
        tl.store(
            target + row * target_stride + col,
            tl.load(source + row * source_stride + col, mask),
            mask,
        )


def _shape(tiles: Sequence[Sequence[int]]) -> int:
    """0: tiles of any shape; 1: each of one row; 2: each of one row of pairs of units."""
    if any(tile[4] > 1 for tile in tiles):
        return 0
    return 1 if any(tile[k] % 2 for tile in tiles for k in (0, 1, 5)) else 2


def _tiles(box: Sequence[int], block: int) -> Iterator[list[int]]:
    at, to, stride, stride_to, rows, cols = box
    if block == 0:
        yield list(box)
        return
    wide = min(cols, block)
    high = max(1, block // wide)
    for row in range(0, rows, high):
        for col in range(0, cols, wide):
            size = min(high, rows - row), min(wide, cols - col)
            yield [at + row * stride + col, to + row * stride_to + col, stride, stride_to, *size]


@dataclass(frozen=True, eq=False)
class Moves:
    """Which boxes go where, for `repack`."""

    table: Tensor  # [tiles, 6] int64 on the device: a box or a part of one, in units
    # Six numbers per pair of source and target: their positions, bytes per unit, first tile, number
    # of tiles, `_shape`.
    parts: tuple[int, ...]
    narrow: tuple[int, ...]  # sizes of the results of one dtype
    dtype: torch.dtype
    wide: tuple[int, ...] = ()  # and of those after them, of another
    wide_dtype: torch.dtype = torch.float32


@dataclass
class Boxes:
    """Collects what goes where, in bytes."""

    found: dict[tuple[int, int], list[Box]] = field(default_factory=dict)

    def add(
        self, source: int, target: int, at: int, to: int, shape: tuple[int, int, int],
        strides: tuple[int, int], strides_to: tuple[int, int],
    ) -> None:  # fmt: skip
        """[n, rows, bytes of a row], with the strides of the first two."""
        n, rows, cols = shape
        if n * rows * cols == 0:
            return
        boxes = self.found.setdefault((source, target), [])
        (outer, inner), (outer_to, inner_to) = strides, strides_to
        if rows == 1 or inner == inner_to == cols:  # rows lie one behind the other
            n, rows, cols = 1, n, rows * cols
            inner, inner_to = outer, outer_to
            if rows == 1 or inner == inner_to == cols:
                rows, cols = 1, rows * cols
        elif outer == rows * inner and outer_to == rows * inner_to:
            n, rows = 1, n * rows
        boxes += [
            (at + k * outer, to + k * outer_to, inner, inner_to, rows, cols) for k in range(n)
        ]

    def row(self, source: int, target: int, at: int, to: int, size: int) -> None:
        self.add(source, target, at, to, (1, 1, size), (size, size), (size, size))

    def moves(
        self, device: torch.device, narrow: Sequence[int], dtype: torch.dtype,
        wide: Sequence[int] = (), wide_dtype: torch.dtype = torch.float32,
    ) -> Moves:  # fmt: skip
        block = _BLOCK if device.type == "cuda" or INTERPRETED else 0
        sizes = [n * dtype.itemsize for n in narrow] + [n * wide_dtype.itemsize for n in wide]
        tiles: list[list[int]] = []
        parts: list[int] = []
        for (source, target), boxes in sorted(self.found.items()):
            numbers = [n for at, to, _, _, _, cols in boxes for n in (at, to, cols)]
            numbers += [n for _, _, *strides, rows, _ in boxes if rows > 1 for n in strides]
            unit = math.gcd(8, sizes[target], *numbers)
            first = len(tiles)
            for at, to, stride, to_stride, rows, cols in boxes:
                box = (
                    at // unit,
                    to // unit,
                    stride // unit,
                    to_stride // unit,
                    rows,
                    cols // unit,
                )
                tiles += _tiles(box, block)
            parts += [source, target, unit, first, len(tiles) - first, _shape(tiles[first:])]
        table = torch.tensor(tiles, dtype=torch.int64, device=device).reshape(-1, 6)
        return Moves(table, tuple(parts), tuple(narrow), dtype, tuple(wide), wide_dtype)


def _units(x: Tensor, unit: int) -> Tensor:
    """[n] integers of ``unit`` bytes; a tensor that is not aligned to them is copied."""
    x = x.contiguous()
    if x.storage_offset() * x.element_size() % unit:
        x = x.clone()
    x = x.reshape(-1)
    rest = x.numel() * x.element_size() % unit  # no box covers these bytes
    return (x[: x.numel() - rest // x.element_size()] if rest else x).view(UNITS[unit])


def _repack(
    sources: list[Tensor], table: Tensor, parts: list[int],
    narrow: list[int], dtype: torch.dtype, wide: list[int], wide_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    results = _repack_fake(sources, table, parts, narrow, dtype, wide, wide_dtype)
    rows = None
    for k in range(0, len(parts), 6):
        source, target, unit, first, count, shape = parts[k : k + 6]
        x, into = _units(sources[source], unit), results[target].view(UNITS[unit])
        if HAS_TRITON and (table.is_cuda or INTERPRETED):
            launch(
                repack_kernel,
                count,
                (table[first:], x, into),
                (shape > 0, shape > 1, _BLOCK),
                num_warps=8,
                enable_fp_fusion=False,
            )
            continue
        rows = table.tolist() if rows is None else rows
        for at, to, stride, to_stride, high, cols in rows[first : first + count]:
            from_ = x.as_strided((high, cols), (stride, 1), x.storage_offset() + at)
            into.as_strided((high, cols), (to_stride, 1), to).copy_(from_)
    return results


def _repack_fake(
    sources: list[Tensor], table: Tensor, parts: list[int],
    narrow: list[int], dtype: torch.dtype, wide: list[int], wide_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return [table.new_empty(n, dtype=dtype) for n in narrow] + [
        table.new_empty(n, dtype=wide_dtype) for n in wide
    ]


_repack_op = define(
    "repack",
    "(Tensor[] sources, Tensor table, int[] parts, int[] narrow, ScalarType dtype, int[] wide, "
    "ScalarType wide_dtype) -> Tensor[]",
    _repack,
    _repack_fake,
)


def repack(sources: Sequence[Tensor], moves: Moves) -> list[Tensor]:
    """The targets, each [size], from sources of any shape. Uncovered bytes are undefined."""
    m = moves
    return _repack_op(
        list(sources),
        input_for(m.table),
        list(m.parts),
        list(m.narrow),
        m.dtype,
        list(m.wide),
        m.wide_dtype,
    )
