"""The part of a tensor or of a matrix that a shard stores."""

from __future__ import annotations

from typing import NamedTuple


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
