"""What operators over lists refuse: tensors that do not fit each other.

An operator writes through addresses, or by ``out=``, which resizes what does not fit: so whether
everything fits is checked before anything is written. A twin needs no check of its own: PyTorch's
operations refuse what does not fit, and `unstack`, by which a twin writes, is an operator. No
Python code runs per tensor: for 144 matrices they cost 16 us in unstack and apply, 31 in advance
and 63 in adamw (one core of a 2-core CPU machine, torch 2.13.0,
2026-11-28). All tensors of a list have one dtype; the first is asked for it.

Every function takes the arguments of the operator that it is named for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def alike(operator: str, **lists: Sequence[Tensor]) -> None:
    """Every list has the shapes of the first, tensor by tensor."""
    (name, first), *others = lists.items()
    shapes = list(map(Tensor.size, first))
    for other, tensors in others:
        found = list(map(Tensor.size, tensors))
        if found != shapes:
            raise ValueError(
                f"{operator}: expected {other} of the shapes of {name}, "
                f"{list(map(list, shapes[:8]))}, got {list(map(list, found[:8]))}"
            )


def fits(operator: str, name: str, tensors: Sequence[Tensor], what: str, stacked: Tensor) -> None:
    """The matrices of a list are those of a stack [n, rows, cols]."""
    shapes = list(map(Tensor.size, tensors))
    if stacked.ndim == 3 and shapes.count(stacked.shape[1:]) == len(shapes) == stacked.shape[0]:
        return
    counts = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
    ends = {shape[-2:] for shape in shapes}
    if stacked.ndim != 3 or ends != {stacked.shape[1:]} or sum(counts) != stacked.shape[0]:
        raise ValueError(
            f"{operator}: expected {what} to be a stack of the matrices of {name}, "
            f"{list(map(list, shapes[:8]))}, got {list(stacked.shape)}"
        )


def of_dtype(operator: str, what: str, x: Tensor, *expected: torch.dtype) -> None:
    if x.dtype not in expected:
        raise TypeError(
            f"{operator}: expected {what} of {' or '.join(map(str, expected))}, got {x.dtype}"
        )


def _sized(operator: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    if sum(sizes) != len(tensors):
        raise ValueError(f"{operator}: expected sizes of {len(tensors)} tensors, got {sizes}")


# ------------------------------------------------------------------------- one for every operator


def unstack(tensors: list[Tensor], stacked: Tensor, start: int | None = None) -> None:
    if start is not None:
        matrices = sum(x.shape[0] if x.ndim == 3 else 1 for x in tensors)
        if not 0 <= start <= stacked.shape[0] - matrices:
            raise ValueError(
                f"unstack: expected {matrices} matrices from {start} on in stacked, got "
                f"{list(stacked.shape)}"
            )
        stacked = stacked.narrow(0, start, matrices)
    fits("unstack", "tensors", tensors, "stacked", stacked)
    of_dtype("unstack", "tensors", tensors[0], stacked.dtype)


def advance(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, keep: Any, sizes: list[int], *_: Any
) -> None:
    alike("advance", momentums=momentums, grads=grads)
    _sized("advance", momentums, sizes)


def lookahead(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, sizes: list[int], *_: Any
) -> None:
    alike("lookahead", momentums=momentums, grads=grads)
    _sized("lookahead", momentums, sizes)


def measured(tensors: list[Tensor], sizes: list[int]) -> None:
    _sized("measure", tensors, sizes)


def gather(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, power: Tensor, inverse: Tensor,
    sizes: list[int], form: str, nesterov: bool, ahead: bool, *_: Any,
) -> None:  # fmt: skip
    if ahead or nesterov:
        alike("gather", momentums=momentums, grads=grads)
    _sized("gather", momentums, sizes)
    alike("gather", power=[power], inverse=[inverse])


def apply(params: list[Tensor], update: Tensor, factor: Tensor, *_: Any) -> None:
    fits("apply", "params", params, "update", update)
    n, rows, cols = update.shape
    if factor.shape not in ((n, rows, 1), (n, 1, cols)):
        raise ValueError(
            f"apply: expected factor of shape {[n, rows, 1]} or {[n, 1, cols]}, got "
            f"{list(factor.shape)}"
        )
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    of_dtype("apply", "factor", factor, wide)


def apply_wide(
    params: list[Tensor], rests: list[Tensor], update: Tensor, factor: Tensor, *_: Any
) -> None:
    apply(params, update, factor)
    _rests("apply_wide", params, rests)


def adamw(
    params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    *_: Any,
) -> None:  # fmt: skip
    alike("adamw", params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, grads=grads)


def adamw_wide(params: list[Tensor], rests: list[Tensor], *moments: Any) -> None:
    adamw(params, *moments)
    _rests("adamw_wide", params, rests)


def lion(params: list[Tensor], exp_avgs: list[Tensor], grads: list[Tensor], *_: Any) -> None:
    alike("lion", params=params, exp_avgs=exp_avgs, grads=grads)


def lion_wide(params: list[Tensor], rests: list[Tensor], *moments: Any) -> None:
    lion(params, *moments)
    _rests("lion_wide", params, rests)


def adamw_flags(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor], *_: Any
) -> None:
    alike("adamw_flags", exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, grads=grads)


def _rests(operator: str, params: list[Tensor], rests: list[Tensor]) -> None:
    """int16 or float32: see rounding.py."""
    alike(operator, params=params, rests=rests)
    of_dtype(operator, "rests", rests[0], torch.int16, torch.float32)
