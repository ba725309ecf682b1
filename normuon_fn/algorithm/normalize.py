"""NorMuon's own step: one variance per neuron, and one number per row that says how far that row
moves.

Everything comes from one read of the update: with ``moment = mean(o*o, cols)`` the variance, the
renormalization (sums over ``moment`` and ``moment / v``) and the finite test. The matrix itself is
read again only when it is applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Config, EpsForm, Reduction, Scale
from .state import State

States = tuple[Tensor, ...]  # in the order of `Normalizer.states`


class Normalized(NamedTuple):
    """What `normalize` finds out about a stack."""

    factor: Tensor  # [n, rows, 1] or [n, 1, cols]: the step's update is ``factor * update``
    states: States  # the new ones
    finite: Tensor  # [n] bool: and not absurdly long


@dataclass(frozen=True)
class Normalizer:
    """One entry of `NORMALIZERS`.

    ``divide`` takes (moment, states, beta2, config) and returns (divisor, new states).
    """

    divide: Callable[[Tensor, States, Tensor, Config], tuple[Tensor, States]] | None
    source: str
    states: tuple[State, ...] = ()
    of_entries: bool = False  # divided entry by entry: see finishing.py


def normalize(
    update: Tensor,  # [n, rows, cols], `carried` times the orthogonalized momentum
    # of the stage that `config` names: [n, rows, 1], or [n, 1, cols] where `per_row` is False
    states: States,
    beta2: Tensor,  # 0-d
    config: Config,
    wide: torch.dtype = torch.float32,  # of the results; products may be wider
    carried: float = 1.0,
    transposed: bool = False,  # the outputs are the columns
    most: float = math.inf,  # Frobenius norm of an update that can be right
) -> Normalized:
    """By what factor every row (or column) of an update enters the step, and the new state.

    Source: arXiv 2510.05491, Algorithm 1; renormalization and the axis by shape:
    KellerJordan/modded-nanogpt#141.
    """
    rows, cols = update.shape[-2:]
    axis = -1 if per_row(config, rows, cols, transposed) else -2
    compute = torch.promote_types(update.dtype, wide)
    moment = update.to(compute).square().mean(axis, keepdim=True) * carried**-2
    count = update.shape[axis]
    norm = (moment.sum((-2, -1), keepdim=True) * count).sqrt()
    carried_norm = norm  # which the guard looks at
    if config.snap:
        to_whole = _divided(min(rows, cols) ** 0.5, norm)
        moment, norm = moment * to_whole.square(), norm * to_whole

    normalizer = NORMALIZERS[normalizer_of(config)]
    if normalizer.divide is None:
        divisor, normalized = torch.ones_like(moment), norm
    else:
        divisor, states = normalizer.divide(moment, states, beta2, config)
        normalized = ((moment * divisor.square()).sum((-2, -1), keepdim=True) * count).sqrt()

    if not normalizer.of_entries:
        divisor = scaled(divisor, norm, normalized, config, rows, cols, transposed)
    if config.snap:
        divisor = divisor * to_whole
    finite = (carried_norm < most) & normalized.isfinite()
    for state in states:  # 1 / sqrt(inf) is a finite 0: such a neuron would be dead for good
        finite = finite & state.isfinite().all((-2, -1), keepdim=True)
    factor = (divisor * (1.0 / carried)).to(wide)
    return Normalized(factor, tuple(state.to(wide) for state in states), finite.flatten())


def scaled(
    divisor: Tensor,  # [n, rows, 1], [n, 1, cols] or [n, 1, 1]
    norm: Tensor,  # [n, 1, 1], of the orthogonalized matrix
    normalized: Tensor,  # [n, 1, 1], of the same after the division
    config: Config,
    rows: int,  # of the whole matrix
    cols: int,
    transposed: bool,
) -> Tensor:
    """``divisor`` times what gives the update the length that ``config.scale`` asks for."""
    if config.scale == "paper":
        return divisor * _divided(config.rms * (rows * cols) ** 0.5, normalized)
    outputs, inputs = (cols, rows) if transposed else (rows, cols)
    divisor = divisor * SCALES[config.scale](config, outputs, inputs)
    return divisor * _divided(norm, normalized) if config.renormalize else divisor


def normalizer_of(config: Config) -> str:
    """The entry of `NORMALIZERS` that ``config`` names."""
    if not config.normalize:
        return "none"
    return "entry" if config.reduction == "entries" else "neuron"


def per_row(config: Config, rows: int, cols: int, transposed: bool = False) -> bool:
    """Whether a matrix has one variance per row; otherwise it has one per column.

    ``transposed``: the outputs of the matrix are its columns.
    """
    return REDUCTIONS[config.reduction](rows, cols, transposed)


# (rows, cols, transposed) -> whether the mean is taken over the columns, which leaves one number
# per row.
REDUCTIONS: dict[Reduction, Callable[[int, int, bool], bool]] = {
    # One per neuron (output): arXiv 2510.05491.
    "rows": lambda rows, cols, transposed: not transposed,
    # Over the shorter axis, per output where both are as long: KellerJordan/modded-nanogpt,
    # Emerging-Optimizers.
    "short": lambda rows, cols, transposed: rows > cols or (rows == cols and not transposed),
    # There is no mean; of the factors there is one per output.
    "entries": lambda rows, cols, transposed: not transposed,
}

# (config, outputs, inputs) -> what multiplies the update. "paper" fixes its RMS instead, which
# needs its norm.
SCALES: dict[Scale, Callable[[Config, int, int], float]] = {
    "spectral": lambda config, outputs, inputs: (outputs / inputs) ** 0.5,  # microsoft/dion
    "rms": lambda config, outputs, inputs: (
        config.rms * max(outputs, inputs) ** 0.5
    ),  # Emerging-Optimizers
    "muon": lambda config, outputs, inputs: (
        max(1.0, outputs / inputs) ** 0.5
    ),  # Keller Jordan, Muon
    "none": lambda config, outputs, inputs: 1.0,
}


def _neuron(moment: Tensor, states: States, beta2: Tensor, config: Config) -> tuple[Tensor, States]:
    """v <- b2 v + (1 - b2) moment, and 1 / sqrt(v)."""
    (variance,) = states
    variance = variance.to(moment.dtype) * beta2 + moment * (1 - beta2)
    return INVERSE_ROOTS[config.eps_form if config.eps else "none"](variance, config.eps), (
        variance,
    )


NORMALIZERS: dict[str, Normalizer] = {
    "neuron": Normalizer(_neuron, "arXiv 2510.05491, Algorithm 1", (State("variance", "line"),)),
    "entry": Normalizer(
        None, "AdaMuon, arXiv 2507.11005, Algorithm 1", (State("variance", "entry"),), True
    ),
    "none": Normalizer(None, "Keller Jordan, Muon (2024)"),
}


def _inverse_root(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(v), and 0 for a dead neuron. NaN stays NaN: it must reach the guard."""
    # v is in units of o^2, which no gradient's scale changes.
    dead = variance < torch.finfo(variance.dtype).tiny
    return torch.where(dead, 0.0, variance.rsqrt())


INVERSE_ROOTS: dict[EpsForm | str, Callable[[Tensor, float], Tensor]] = {
    "none": _inverse_root,
    "add": lambda variance, eps: (
        1.0 / (variance.sqrt() + eps)
    ),  # arXiv 2510.05491; zichongli5/NorMuon; dion
    "floor": lambda variance, eps: variance.clamp(
        min=eps
    ).rsqrt(),  # modded-nanogpt, Emerging-Optimizers
}


def _divided(numerator: Tensor | float, norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 0.0, numerator / norm)
