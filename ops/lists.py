"""From a list of matrices to one tensor, and back: ``stack`` and ``unstack``.

A *list* consists of matrices ``[rows, cols]`` and stacks of matrices ``[b, rows, cols]``. Together
they are n matrices, in the order of the stack ``[n, rows, cols]`` that goes with the list. The two
operators are the border between tensors, of which there are hundreds, and stacks, of which there
are a few: operators on one side, and PyTorch, which Inductor compiles, on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .handles import is_handle, joined, remembered
from .registration import Lists, register


def count(x: Tensor) -> int:
    """How many matrices a tensor from a list is."""
    return x.shape[0] if x.ndim == 3 else 1


def total(tensors: Sequence[Any]) -> int:
    """How many matrices a list is."""
    real = tensors and isinstance(tensors[0], Tensor) and not torch.compiler.is_dynamo_compiling()
    if real and _are_matrices(tensors):
        return len(tensors)
    return sum(map(count, tensors))


def part_of_list(tensors: list[Tensor], part: slice) -> list[Tensor]:
    """Some of a list; if it is all of it, the same list."""
    return tensors if part == slice(0, len(tensors)) else tensors[part]


def chained(lists: Sequence[list[Tensor]]) -> list[Tensor]:
    """Several lists as one."""
    if len(lists) == 1:
        return lists[0]
    if lists and is_handle(lists[0]):
        return joined(lists)  # type: ignore[arg-type,return-value]
    return [x for tensors in lists for x in tensors]


def cut(tensors: list[Tensor], k: int, low: int, high: int) -> list[Tensor]:
    """Of the stack at ``k`` of a list the matrices from ``low`` to ``high``, as a list of one."""
    handle: Any = tensors
    return handle.cut(k, low, high) if is_handle(handle) else [tensors[k][low:high]]


def _are_matrices(tensors: Sequence[Tensor]) -> bool:
    return remembered(tensors, _most_dimensions) == 2


def _most_dimensions(tensors: Sequence[Tensor]) -> int:
    return max(map(Tensor.dim, tensors))  # no Python code runs per tensor


def _stack(tensors: list[Tensor]) -> Tensor:
    if _are_matrices(tensors):
        return torch.stack(tensors)
    return torch.cat([x if x.ndim == 3 else x.unsqueeze(0) for x in tensors])


def _stack_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((total(tensors), *tensors[0].shape[-2:]))


def _unstack(into: Lists, tensors: list[Tensor], stacked: Tensor, start: int | None = None) -> None:
    (targets,) = into
    if start is not None:
        stacked = stacked.narrow(0, start, total(targets))
    if stacked.numel() == 0:
        return
    if not _are_matrices(targets):
        parts = stacked.split([count(x) for x in targets])
        parts = tuple(
            part if x.ndim == 3 else part.squeeze(0) for x, part in zip(targets, parts, strict=True)
        )
        torch._foreach_copy_(targets, parts)
    elif stacked.device.type == "cpu":
        torch.unbind_copy(stacked, out=targets)
    else:  # a few kernels for all tensors; unbind_copy would launch one per tensor
        torch._foreach_copy_(targets, stacked.unbind(0))


stack, _ = register("stack", "(Tensor[] tensors) -> Tensor", _stack, _stack_fake)
_unstack_op, _unstack_op_ = register(
    "unstack",
    # start: where the matrices of the list begin in the stack; None: they are all of it
    "(Tensor[] tensors, Tensor stacked, int? start=None) -> Tensor[]",
    _unstack,
    check=checks.unstack,
    writes=("tensors",),
)


def unstack(tensors: list[Tensor], stacked: Tensor) -> list[Tensor]:
    """The matrices of the stack [n, rows, cols] as new tensors of the list's shapes."""
    return _in_parts(_unstack_op, tensors, stacked)


def unstack_(tensors: list[Tensor], stacked: Tensor) -> list[Tensor]:
    """The same list, into which the matrices of the stack [n, rows, cols] were written."""
    return _in_parts(_unstack_op_, tensors, stacked)


# Inductor looks, for every tensor that an operator returns, at all that it returns, twice: a time
# that grows with their square. 640 matrices of 64 x 64: 29.6 CPU seconds for the first step with
# lists as they are, 26.3 in parts of 128 (2 busy CPU cores, torch 2.13.0, 2026-11-28).
_MOST = 128


def _in_parts(
    operator: Callable[..., list[Tensor]], tensors: list[Tensor], stacked: Tensor
) -> list[Tensor]:
    if len(tensors) <= _MOST or is_handle(tensors):
        return operator(tensors, stacked)
    if not torch.compiler.is_dynamo_compiling():  # all of it, before a part is written
        checks.unstack(tensors, stacked)
    found: list[Tensor] = []
    start = 0
    for k in range(0, len(tensors), _MOST):
        part = tensors[k : k + _MOST]
        found += operator(part, stacked, start)
        start += sum(map(count, part))
    return found


def _all_finite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.isfinite().all() for x in tensors])


def _all_finite_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors),), dtype=torch.bool)


# [n] bool: whether every entry of each tensor is finite; they may have any shapes.
all_finite, _ = register(
    "all_finite", "(Tensor[] tensors) -> Tensor", _all_finite, _all_finite_fake
)
