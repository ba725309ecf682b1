"""Precondition: what is done to the momentum before it is orthogonalized.

    none    nothing: its rows keep their sizes
    rows    every output (row of the parameter) to the same norm: Newton-Schulz then begins with
            singular values that are closer together
    sign    every entry to +1, 0 or -1: an entry counts by its direction alone

With one of the last two a stack is gathered in float32 (float64), and only the result is cast to
the dtype of the products. So a small row loses no bits, on one device and on many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..types import Config, Precondition
from .state import State


@dataclass(frozen=True)
class Preconditioner:
    """One entry of `PRECONDITIONERS`.

    ``function`` takes a stack of matrices [n, rows, cols] in float32 or float64 with largest
    entries in [2, 4), and the dimension along which one output lies. It returns a stack like it,
    whose squares can be summed. ``None``: nothing is done.
    """

    function: Callable[[Tensor, int], Tensor] | None
    source: str
    states: tuple[State, ...] = ()


def _equal_rows(stack: Tensor, along: int) -> Tensor:
    """Every output to norm 1. A zero one stays zero; NaN stays NaN.

    An output is first multiplied by a power of two of its own, so that no square underflows.
    """
    scaled = stack * ops.power_of_two(stack.abs().amax(along, keepdim=True))
    return scaled * _inverse(scaled.square().sum(along, keepdim=True))


def _signs(stack: Tensor, along: int) -> Tensor:
    """+1, 0 and -1. NaN stays NaN."""
    return torch.where(stack.isnan(), stack, stack.sign())


def _inverse(squares: Tensor) -> Tensor:
    """1 / sqrt(squares), and 0 for 0."""
    return torch.where(squares == 0, 0.0, squares.rsqrt())


PRECONDITIONERS: dict[Precondition, Preconditioner] = {
    "none": Preconditioner(None, "arXiv 2510.05491, Algorithm 1"),
    "rows": Preconditioner(_equal_rows, "MuonEq-R, arXiv 2603.28254; karpathy/nanochat optim.py"),
    "sign": Preconditioner(_signs, "AdaMuon, arXiv 2507.11005, Algorithm 1"),
}


def gathered_wide(config: Config) -> bool:
    """Whether what is orthogonalized is gathered in float32 (float64), and cast only later."""
    wide = PRECONDITIONERS[config.precondition].function is not None
    return wide or config.orthogonalizer is not None


def preconditioned(
    stack: Tensor,  # [n, rows <= cols], in the dtype of the products unless `gathered_wide`
    config: Config,
    *,
    along: int,  # the dimension along which one output lies
    norm: float,  # of every matrix, by Frobenius, so that no spectral norm is above it
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """What is orthogonalized; without a preconditioner the stack itself, and no node in a graph."""
    function = PRECONDITIONERS[config.precondition].function
    if function is None:
        return stack
    found = function(stack, along)
    return (found * (norm * _inverse(found.square().sum((-2, -1), keepdim=True)))).to(dtype)
