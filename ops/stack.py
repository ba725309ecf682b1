"""``stack``: a list of matrices as one tensor.  ``unstack``: the tensor back into the list."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .registration import empty_like, register, stack_shape


def _stack_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(stack_shape(tensors))


def _unstack_fake(tensors: list[Tensor], stacked: Tensor, skip: Tensor | None) -> list[Tensor]:
    return empty_like(tensors)


stack, _ = register("stack", "(Tensor[] tensors) -> Tensor", reference.stack, _stack_fake)
unstack, unstack_ = register(
    "unstack",
    "(Tensor[] tensors, Tensor stacked, Tensor? skip) -> Tensor[]",
    reference.unstack,
    _unstack_fake,
    writes=("tensors",),
)
