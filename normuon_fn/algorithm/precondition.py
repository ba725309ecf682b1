"""Precondition: what is done to the momentum before it is orthogonalized. Today nothing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .state import State


@dataclass(frozen=True)
class Preconditioner:
    """One entry of `PRECONDITIONERS`.

    ``function`` takes a stack [n, rows, cols] with rows <= cols whose spectral norms are at most 1,
    and returns one like it. A scale common to a whole matrix does not matter to what follows,
    except that this bound must hold.
    """

    function: Callable[[Tensor], Tensor]
    source: str
    states: tuple[State, ...] = ()


PRECONDITIONERS: dict[str, Preconditioner] = {
    "none": Preconditioner(lambda stack: stack, "arXiv 2510.05491, Algorithm 1"),
}
