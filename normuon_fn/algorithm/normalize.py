"""The variance of every neuron, and the one factor a row that everything after the orthogonalization comes down to.

    q = mean(o^2)  ->  v = lerp(v, q)  ->  1/sqrt(v)  ->  renormalize  ->  scale

One read of the update gives q. The Frobenius norms before and after the division are sums of q and q/v, and whether
everything was finite is read off those sums: no second pass over the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Config


def per_row(config: Config, rows: int, cols: int, transposed: bool = False) -> bool:
    """Whether a matrix has one variance a row; otherwise one a column. ``transposed``: its outputs are its columns."""
    if transposed:
        return config.reduction == "short" and cols < rows
    return config.reduction == "rows" or rows >= cols


def normalize(
    update: Tensor,  # [n, rows, cols], `carried` times the orthogonalized momentum
    variance: Tensor
    | None,  # [n, rows, 1], or [n, 1, cols] where `per_row` says so; None: not normalized
    beta2: Tensor,  # 0-d
    config: Config,
    carried: float = 1.0,
    transposed: bool = False,  # the outputs are the columns
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(factor, variance, finite)``: the step's update is ``factor * update``; ``finite`` [n] bool.

    Source: arXiv 2510.05491, Algorithm 1; renormalization and the axis by shape: KellerJordan/modded-nanogpt#141.
    """
    rows, cols = update.shape[-2:]
    axis = -1 if per_row(config, rows, cols, transposed) else -2
    compute = torch.promote_types(
        update.dtype, torch.float32 if variance is None else variance.dtype
    )
    moment = update.to(compute).square().mean(axis, keepdim=True) * carried**-2
    count = update.shape[axis]
    norm = (moment.sum((-2, -1), keepdim=True) * count).sqrt()

    if variance is None:
        divisor, normalized = torch.ones_like(moment), norm
    else:
        variance = variance.to(compute) * beta2 + moment * (1 - beta2)
        divisor = _inverse_root(variance, config)
        normalized = ((moment * divisor.square()).sum((-2, -1), keepdim=True) * count).sqrt()

    if config.scale == "paper":
        divisor = divisor * _divide(config.rms * (rows * cols) ** 0.5, normalized)
    else:
        divisor = divisor * _shape_factor(config, *((cols, rows) if transposed else (rows, cols)))
        if config.renormalize:
            divisor = divisor * _divide(norm, normalized)
    finite = norm.isfinite() & normalized.isfinite()
    if variance is not None:  # 1 / sqrt(inf) is a finite 0: such a neuron would be dead for good
        finite = finite & variance.isfinite().all((-2, -1), keepdim=True)
    return divisor * (1.0 / carried), variance, finite.flatten()


def _inverse_root(variance: Tensor, config: Config) -> Tensor:
    """1 / sqrt(v), and 0 for a dead neuron. NaN stays NaN: it must reach the guard."""
    if config.eps and config.eps_form == "add":
        return 1.0 / (variance.sqrt() + config.eps)
    if config.eps:
        return variance.clamp(min=config.eps).rsqrt()
    dead = (
        variance < torch.finfo(variance.dtype).tiny
    )  # v is in units of o^2, which no gradient's scale changes
    return torch.where(dead, 0.0, variance.rsqrt())


def _divide(numerator: Tensor | float, norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 0.0, numerator / norm)


def _shape_factor(config: Config, rows: int, cols: int) -> float:
    match config.scale:
        case "spectral":
            return (rows / cols) ** 0.5
        case "rms":
            return config.rms * max(rows, cols) ** 0.5
        case "muon":
            return max(1.0, rows / cols) ** 0.5
        case _:
            return 1.0
