"""Newton-Schulz coefficient sets, each with its source.

One step maps every singular value ``x`` of a matrix to ``a*x + b*x**3 + c*x**5``. A set is a
sequence of ``(a, b, c)`` rows, one a step, together with what the iteration has to do around them:
how the matrix is brought to spectral norm <= 1 first, by which factor that norm is enlarged for
safety, and what follows when more steps are asked for than rows are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from ..types import CheckedCoefficients, Row, check_coefficients


@dataclass(frozen=True)
class CoefficientSet:
    """``rows``: the polynomial of each step. ``beyond``: what follows the last row."""

    rows: tuple[Row, ...]
    source: str
    beyond: Literal["repeat", "cycle"] = "repeat"
    # the Frobenius norm is multiplied by it, so that rounding never leaves a singular value above 1
    norm_factor: float = 1.0
    rescale: Literal["frobenius", "aol"] = "frobenius"
    safety_factor: float | None = (
        None  # default divisor of the polynomial's argument; None: the rows are used as they are
    )


_SIMPLE: Row = (3.4445, -4.7750, 2.0315)
_YOU: tuple[Row, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

COEFFICIENTS: dict[str, CoefficientSet] = {
    "polar_express": CoefficientSet(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        "arXiv 2505.16932, Algorithm 1 (minimax quintics from sigma 1e-3); the last row, which "
        "converges, is never divided",
        safety_factor=1.05,
    ),
    "polar_express_cushioned": CoefficientSet(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "modded-nanogpt, microsoft/dion, nanochat: arXiv 2505.16932 with cushion 2, 1.02 divided "
        "in",
        norm_factor=1.02,
    ),
    "quintic": CoefficientSet(
        _YOU, "YouJiacheng / leloykun; NVIDIA-NeMo/Emerging-Optimizers `quintic`", "cycle",
    ),
    "you": CoefficientSet(_YOU, "YouJiacheng / leloykun, the same rows as `quintic`", "cycle"),
    "cans": CoefficientSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "arXiv 2506.10935 (Chebyshev-accelerated Newton-Schulz)",
    ),
    "aol": CoefficientSet(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        "flash-newton-schulz; the almost-orthogonal-layer row rescale of arXiv 2208.03160 in the "
        "place of the Frobenius norm",
        rescale="aol",
    ),
    "deepseekv4": CoefficientSet(
        (_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        "DeepSeek-V4 report: 8 fast steps, 2 that converge",
    ),
    "cubic5": CoefficientSet(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        "arXiv 2606.00371: five cubics, 10 products instead of 15",
    ),
    "simple": CoefficientSet((_SIMPLE,), "Keller Jordan, Muon (2024); torch.optim.Muon"),
}  # fmt: skip


def resolve(
    coefficients: object,  # a name, or rows: checked here
    steps: int,
    safety_factor: float | None = None,
) -> CoefficientSet:
    """The set with exactly ``steps`` rows and the safety factor divided in.

    ``safety_factor`` sf >= 1 replaces p(x) by p(x / sf) in every row but the last of the table, so
    that a singular value that rounding pushed above 1 is still mapped to at most 1 (arXiv
    2505.16932, section 4). ``None`` takes the set's own.

    Raises:
        TypeError, ValueError: as `check_coefficients`.
    """
    return _resolved(check_coefficients(coefficients, steps, safety_factor), steps, safety_factor)


@cache
def _resolved(
    checked: CheckedCoefficients,  # which can be found again
    steps: int,
    safety_factor: float | None,
) -> CoefficientSet:
    if isinstance(checked, str):
        found = COEFFICIENTS[checked]
    else:
        found = CoefficientSet(checked, "the caller's own")
    factor = found.safety_factor if safety_factor is None else safety_factor
    factor = 1.0 if factor is None else factor

    table = found.rows
    converged = len(table) - 1 if len(table) > 1 else len(table)
    rows = [divided(row, factor) if k < converged else row for k, row in enumerate(table)]
    index = [
        k % len(table) if found.beyond == "cycle" else min(k, len(table) - 1) for k in range(steps)
    ]
    return replace(found, rows=tuple(rows[k] for k in index), safety_factor=factor)


def divided(row: Row, factor: float) -> Row:
    """The row of p(x / factor)."""
    a, b, c = row
    return a / factor, b / factor**3, c / factor**5


@cache
def gram_restarts(rows: tuple[Row, ...], careful: bool = False) -> tuple[int, ...]:
    """The steps before which the Gram iteration must recompute ``x x^T``: as few as keep it well
    conditioned.

    In 16 bits ``x x^T`` has spurious eigenvalues near -4e-4, which the Gram recursion amplifies
    without bound. The recursion is simulated on the spectrum ``sigma**2 - 4e-4``; a choice of
    restarts is judged by the worst condition number that any factor ``q`` reaches, and restarts are
    added, the best one first, until it is below 1e3 (Gram Newton-Schulz, Dao-AILab).

    ``careful`` adds steps 2 and 3. Matrices with few rows or nearly square need it: Gaussian, Polar
    Express, float16, median error of a row with restarts (2,) against (2, 3): 32x64 .56 against .21
    %, 128x128 1.8 against .21 %, 128x256 .19 against .18 % (2026-11-22, CPU). ``cans`` restarts at
    every step, which is the standard form: nothing less keeps it below 1e3.
    """
    chosen: tuple[int, ...] = ()
    while len(chosen) < len(rows) - 1 and _worst_condition(rows, chosen) >= 1e3:
        left = (k for k in range(1, len(rows)) if k not in chosen)
        chosen = min(
            (tuple(sorted((*chosen, k))) for k in left),
            key=lambda at: (_worst_condition(rows, at), at),
        )
    return tuple(sorted({*chosen, *(k for k in (2, 3) if k < len(rows))})) if careful else chosen


def _worst_condition(rows: tuple[Row, ...], restarts: tuple[int, ...]) -> float:
    sigma = [k / 400 for k in range(401)]
    worst, q, r = 1.0, [1.0] * len(sigma), [x * x - 4e-4 for x in sigma]
    for k, (a, b, c) in enumerate(rows):
        if k in restarts:
            sigma = [x * y for x, y in zip(q, sigma, strict=True)]
            q, r = [1.0] * len(sigma), [x * x - 4e-4 for x in sigma]
        h = [a + b * x + c * x * x for x in r]
        q = [x * y for x, y in zip(h, q, strict=True)]
        r = [x * y * y for x, y in zip(r, h, strict=True)]
        low, high = min(map(abs, q)), max(map(abs, q))
        if not (low > 0.0 and high < 1e30):
            return math.inf
        worst = max(worst, high / low)
    return worst
