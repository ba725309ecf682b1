"""Momentum: how the gradients of many steps become one direction.

With M the momentum, G the gradient and b its coefficient (`Hyper.momentum`):

    ema    M <- b M + (1 - b) G;   with Nesterov, b M + (1 - b) G is what is orthogonalized
    sum    M <- b M + G;           with Nesterov, b M + G

One pass over memory does it: the operators ``advance``, ``lookahead`` and ``gather`` of ops/, which
know the forms by name. Multiplying by b and adding, instead of a ``lerp``, keeps the sum finite
where G - M would overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Config, MomentumForm
from .state import State


@dataclass(frozen=True)
class Momentum:
    """One entry of `MOMENTA`."""

    operator_form: MomentumForm  # as the operators of ops/ call it
    # beta -> the largest gradient that is safe, as a share of the largest momentum.
    headroom: Callable[[Tensor], Tensor | float]
    source: str
    states: tuple[State, ...] = (State("momentum", "entry", "momentum"),)


MOMENTA: dict[MomentumForm, Momentum] = {
    "ema": Momentum(
        "ema", lambda beta: 1.0, "arXiv 2510.05491, Algorithm 1; Keller Jordan, Muon since 2025"
    ),
    "sum": Momentum("sum", lambda beta: 1.0 - beta, "microsoft/dion muon.py, 0a059a4"),
}


def keeps_momentum_finite(
    largest: Tensor,  # [n] the largest absolute entry of every gradient
    beta: Tensor,  # 0-d or [n]
    config: Config,
) -> Tensor:
    """[n] bool: whether such gradients keep the momentum finite. Non-finite, it would stay so."""
    if config.momentum_dtype is None and config.momentum_form == "ema":
        return largest.isfinite()
    dtypes = (config.momentum_dtype or largest.dtype, largest.dtype)
    limit = min(torch.finfo(dtype).max for dtype in dtypes)
    return largest <= limit * MOMENTA[config.momentum_form].headroom(beta.to(largest.dtype))
