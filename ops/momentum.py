"""The front pass: gradients and momentums in, the stack of updates to orthogonalize and the gradients' largest entries out.

``advance`` also gives the new momentums. Where those may be written only once every rank agrees (``guard="full"``),
``lookahead`` reads without writing and ``hold`` writes at the end.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from .registration import empty_like, register, stack_shape


def _advance(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, form: str, nesterov: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    updates, largest = reference.lookahead(grads, momentums, beta, form, nesterov)
    return reference.hold(momentums, grads, beta, None, form), updates, largest


def _lookahead_fake(
    grads: list[Tensor], momentums: list[Tensor], beta: Tensor, form: str, nesterov: bool
) -> tuple[Tensor, Tensor]:
    n, rows, cols = stack_shape(grads)
    update = grads[0].new_empty((n, rows, cols), dtype=reference.compute_dtype(momentums[0].dtype))
    return update, grads[0].new_empty(n, dtype=reference.compute_dtype(grads[0].dtype))


def _advance_fake(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, form: str, nesterov: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    return empty_like(momentums), *_lookahead_fake(grads, momentums, beta, form, nesterov)


def _hold_fake(momentums: list[Tensor], grads: list[Tensor], beta: Tensor, keep: Tensor | None, form: str) -> list[Tensor]:
    return empty_like(momentums)


advance, advance_ = register(
    "advance",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, str form, bool nesterov) -> (Tensor[], Tensor, Tensor)",
    _advance,
    _advance_fake,
    writes=("momentums",),
)
lookahead, _ = register(
    "lookahead",
    "(Tensor[] grads, Tensor[] momentums, Tensor beta, str form, bool nesterov) -> (Tensor, Tensor)",
    reference.lookahead,
    _lookahead_fake,
)
hold, hold_ = register(
    "hold",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor? keep, str form) -> Tensor[]",
    reference.hold,
    _hold_fake,
    writes=("momentums",),
)
