"""The back pass: scale the update, decay, subtract, or keep every bit where ``skip`` says so."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .registration import empty_like, register


def _apply_fake(
    params: list[Tensor], update: Tensor, scale: Tensor, decay: Tensor, skip: Tensor | None, cautious: bool
) -> list[Tensor]:
    return empty_like(params)


apply, apply_ = register(
    "apply",
    "(Tensor[] params, Tensor update, Tensor scale, Tensor decay, Tensor? skip, bool cautious) -> Tensor[]",
    reference.apply,
    _apply_fake,
    writes=("params",),
)
