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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import Config, MomentumForm
from .state import State

MOMENTUM = State("momentum", "entry", "momentum")
# Beside a momentum of one byte an entry: ops/codes.py.
SCALE = State("momentum_scale", "block", torch.uint8)


@dataclass(frozen=True)
class Momentum:
    """One entry of `MOMENTA`."""

    operator_form: MomentumForm  # as the operators of ops/ call it
    # beta -> the largest gradient that is safe, as a share of the largest momentum.
    headroom: Callable[[Tensor], Tensor | float]
    source: str
    states: tuple[State, ...] = (MOMENTUM,)

    @property
    def coded(self) -> bool:
        """Whether the momentum is one byte an entry, and has scales beside it."""
        return SCALE in self.states

    def as_codes(self) -> Momentum:
        """The same with a momentum of one byte an entry."""
        return replace(self, states=(*self.states, SCALE))


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
    own = MOMENTUM.dtype_for(config, largest.dtype)
    dtypes = (torch.float32 if own == torch.int8 else own, largest.dtype)
    limit = min(torch.finfo(dtype).max for dtype in dtypes)
    return largest <= limit * MOMENTA[config.momentum_form].headroom(beta.to(largest.dtype))
