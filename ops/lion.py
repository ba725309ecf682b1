"""Lion over a list of tensors of any shapes, in plain PyTorch on every device.

Per tensor, with b1, b2 the coefficients (arXiv 2302.06675, Algorithm 2):

    u = sign(b1 m + (1 - b1) g),   w <- w - (decay w + lr u),   m <- b2 m + (1 - b2) g

Those with norms: see measured.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import checks
from .adamw_reference import each, kept, moved, narrowed, norms_of
from .registration import Lists, register
from .rounding import joined_with, parted


def _run(
    into: Lists,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    skip: Tensor | None,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
    *,
    norms: bool = False,
) -> Tensor | None:
    updates, averages = _update(exp_avgs, grads, beta1, beta2)
    olds = [param.to(x.dtype) for param, x in zip(params, averages, strict=True)]
    found = _norms(grads, averages, olds, updates, lr) if norms else None
    news = narrowed(params, moved(olds, updates, lr, decay), step, salts)
    torch._foreach_copy_(into[0], kept(skip, params, news))
    torch._foreach_copy_(into[1], kept(skip, exp_avgs, averages))
    return found


def _run_wide(
    into: Lists,
    params: list[Tensor],
    rests: list[Tensor],
    exp_avgs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    skip: Tensor | None,
    *,
    norms: bool = False,
) -> Tensor | None:
    """The same of parameters with float32 masters: see rounding.py."""
    updates, averages = _update(exp_avgs, grads, beta1, beta2)
    olds = [joined_with(param, rest) for param, rest in zip(params, rests, strict=True)]
    found = _norms(grads, averages, olds, updates, lr) if norms else None
    masters = moved(olds, updates, lr, decay)
    new = [
        parted(x, param.dtype, rest.dtype)
        for x, param, rest in zip(masters, params, rests, strict=True)
    ]
    torch._foreach_copy_(into[0], kept(skip, params, [param for param, _ in new]))
    torch._foreach_copy_(into[1], kept(skip, rests, [rest for _, rest in new]))
    torch._foreach_copy_(into[2], kept(skip, exp_avgs, averages))
    return found


def _norms(
    grads: list[Tensor],
    averages: list[Tensor],  # the new ones
    olds: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
) -> Tensor:
    """[4, n]: of gradients, new exp_avgs, old parameters and their updates."""
    subtracted = list(torch._foreach_mul(updates, each(lr)))
    return norms_of((grads, averages, olds, subtracted), averages[0].dtype)


def _update(
    exp_avgs: list[Tensor], grads: list[Tensor], beta1: Tensor, beta2: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """``(updates, exp_avgs)``, all new tensors. NaN stays NaN, of which the sign would be 0."""
    dtype = exp_avgs[0].dtype
    news = [grad.to(dtype) for grad in grads]

    def averages(beta: Tensor) -> list[Tensor]:
        found = torch._foreach_mul(exp_avgs, each(beta.to(dtype)))
        torch._foreach_add_(found, torch._foreach_mul(news, each(1 - beta.to(dtype))))
        return list(found)

    ahead = averages(beta1)
    updates = torch._foreach_sign(ahead)
    torch._foreach_add_(updates, torch._foreach_sub(ahead, ahead))  # NaN where they are not finite
    return list(updates), averages(beta2)


_TENSORS = "Tensor[] exp_avgs, Tensor[] grads, Tensor lr, Tensor decay, Tensor beta1, Tensor beta2"
_LION = f"(Tensor[] params, {_TENSORS}, Tensor? skip, Tensor? step=None, int[] salts=[])"
_WIDE = f"(Tensor[] params, Tensor[] rests, {_TENSORS}, Tensor? skip)"
_LISTS, _LISTS_WIDE = "Tensor[], Tensor[]", "Tensor[], Tensor[], Tensor[]"

lion, lion_ = register(
    "lion",
    f"{_LION} -> ({_LISTS})",
    _run,
    check=checks.lion,
    writes=("params", "exp_avgs"),
)
lion_wide, lion_wide_ = register(
    "lion_wide",
    f"{_WIDE} -> ({_LISTS_WIDE})",
    _run_wide,
    check=checks.lion_wide,
    writes=("params", "rests", "exp_avgs"),
)
lion_measured = register(
    "lion_measured",
    f"{_LION} -> ({_LISTS}, Tensor)",
    partial(_run, norms=True),
    lambda params, exp_avgs, *rest: exp_avgs[0].new_empty((4, len(exp_avgs))),
    check=checks.lion,
    writes=("params", "exp_avgs"),
)
lion_wide_measured = register(
    "lion_wide_measured",
    f"{_WIDE} -> ({_LISTS_WIDE}, Tensor)",
    partial(_run_wide, norms=True),
    lambda params, rests, exp_avgs, *rest: exp_avgs[0].new_empty((4, len(exp_avgs))),
    check=checks.lion_wide,
    writes=("params", "rests", "exp_avgs"),
)
