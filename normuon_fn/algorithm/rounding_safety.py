"""How far rounding pushes singular values, and the safety factor that a set needs in 16 bits.

A polynomial is bounded where it was designed to be, for singular values up to 1. Above, it grows:
five steps of ``cans`` map 1 to 1.005 and 1.004 to 8e57. Rounding moves every singular value: in
bfloat16 those of a matrix of ones are 1.004 before the first step. The maximum inside [0, 1] is at
the end of the next step's range too, so that a larger norm alone would not help; the safety factor
of arXiv 2505.16932, section 4, does: p(x / f) in the place of p(x) in every row but the last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch

from ..types import Row
from .coefficients import CoefficientSet, divided

# Half the distance between neighbours, over their size.
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FACTORS = (1.0, 1.005, 1.01, 1.015, 1.02, 1.03, 1.05, 1.1)
ROOM = 1.5  # of the polynomial's own maximum; see `is_safe`
POINTS = 400


@cache
def secured(chosen: CoefficientSet, dtype: torch.dtype) -> CoefficientSet:
    """The set with the smallest of `FACTORS` that makes it safe for products in ``dtype``.

    Of the named sets, with their own steps, only these change: ``cans`` (bfloat16 1.015, float16
    1.005) and ``cubic5`` (bfloat16 1.005). Rows of the caller's own are treated alike. Rows that
    leave their range without any rounding are used as they are: nothing is known of their purpose.

    Raises:
        ValueError: none of the factors makes it safe.
    """
    unit = UNIT_ROUNDOFF.get(dtype)
    if unit is None or not math.isfinite(largest(chosen)):
        return chosen
    for factor in FACTORS:
        *rows, last = chosen.rows
        rows = [divided(row, factor) for row in rows] if factor > 1.0 else rows
        found = replace(chosen, rows=(*rows, last))
        if is_safe(found, chosen, unit):
            return chosen if factor == 1.0 else found
    raise ValueError(
        f"coefficients: these rows amplify the rounding of {dtype} without bound, even with a "
        f"safety factor of {FACTORS[-1]}; use float32 products: "
        "Config(orthogonalize_dtype=torch.float32), orthogonalize(dtype=torch.float32)"
    )


def is_safe(chosen: CoefficientSet, exact: CoefficientSet, unit: float) -> bool:
    """Whether rounding by ``unit`` leaves singular values near the range of the polynomial.

    None ends above 1.5 times the maximum without rounding, and the only one of a matrix of rank 1
    keeps its sign: ``cubic5`` maps 1 to 0.77 and 1.008 to -0.95, the opposite direction.
    """
    most = largest(exact)
    lowest = min(-most / 4, reached(exact, 1.0, 0.0)[0])
    return reached(chosen, 0.0, unit)[1] <= ROOM * most and (
        reached(chosen, 1.0, unit)[0] >= lowest
    )


def absurd(chosen: CoefficientSet, rows: int) -> float:
    """The Frobenius norm from which on an update of matrices rows <= cols is a fault.

    Ten times what the polynomial can make it, and 16 bits 1.5 times that: see `is_safe`.
    """
    return 10.0 * largest(chosen) * rows**0.5


def largest(chosen: CoefficientSet) -> float:
    """The largest absolute value that singular values in [0, 1] end at, without rounding."""
    low, high = reached(chosen, 0.0, 0.0)
    return max(-low, high)


@cache
def reached(chosen: CoefficientSet, start: float, unit: float) -> tuple[float, float]:
    """The range in which singular values in [start, 1] end, when every product is rounded.

    Each step stores x x^T, what it is multiplied by, and its result; each entry is off by at most
    ``unit`` of its size, and all by the same share in the worst case (a matrix of equal entries).
    """
    low = start * (1.0 - unit) / chosen.norm_factor
    high = (1.0 + unit) / chosen.norm_factor
    for row in chosen.rows:
        ends = [_step(row, low + (high - low) * k / POINTS, unit) for k in range(POINTS + 1)]
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        if not max(-low, high) < 1e30:
            return -math.inf, math.inf
    return low, high


def _step(row: Row, sigma: float, unit: float) -> tuple[float, float]:
    a, b, c = row
    square = sigma * sigma
    inner = (b + c * square) * square
    exact = sigma * (a + inner)
    off = abs(sigma) * (abs(b + 2.0 * c * square) * square + abs(inner)) + abs(exact)
    return exact - unit * off, exact + unit * off
