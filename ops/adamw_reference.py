"""The twins of the AdamW operators, over lists of tensors of any shapes: see adamw.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rounding import joined_with, noise, parted, places, rounded_by_chance


def adamw_flags(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    *rates: Tensor,
) -> Tensor:
    updates, _, seconds = update_of(exp_avgs, exp_avg_sqs, grads, *rates)
    bad_updates = [
        ~(update.isfinite() & second.isfinite()).all()
        for update, second in zip(updates, seconds, strict=True)
    ]
    bad_grads = [~grad.isfinite().all() for grad in grads]
    return torch.stack([torch.stack(bad_updates), torch.stack(bad_grads)])


def adamw(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    skip: Tensor | None,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """With ``step`` and ``salts`` (one per tensor), parameters are rounded by chance."""
    rates = (beta1, beta2, eps, correction1, correction2)
    updates, first, second = update_of(exp_avgs, exp_avg_sqs, grads, *rates)
    olds = [param.to(x.dtype) for param, x in zip(params, first, strict=True)]
    news = moved(olds, updates, lr, decay)
    news = narrowed(params, news, step, salts)
    return (
        kept(skip, params, news),
        kept(skip, exp_avgs, first),
        kept(skip, exp_avg_sqs, second),
    )


def adamw_wide(
    params: list[Tensor],
    rests: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    skip: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """`adamw` of parameters with float32 masters: see rounding.py."""
    rates = (beta1, beta2, eps, correction1, correction2)
    updates, first, second = update_of(exp_avgs, exp_avg_sqs, grads, *rates)
    olds = [joined_with(param, rest) for param, rest in zip(params, rests, strict=True)]
    masters = moved(olds, updates, lr, decay)
    new = [
        parted(x, param.dtype, rest.dtype)
        for x, param, rest in zip(masters, params, rests, strict=True)
    ]
    return (
        kept(skip, params, [param for param, _ in new]),
        kept(skip, rests, [rest for _, rest in new]),
        kept(skip, exp_avgs, first),
        kept(skip, exp_avg_sqs, second),
    )


def update_of(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    *rates: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``(updates, exp_avgs, exp_avg_sqs)``, all new tensors."""
    dtype = exp_avgs[0].dtype
    beta1, beta2, eps, correction1, correction2 = (x.to(dtype) for x in rates)
    news = [grad.to(dtype) for grad in grads]
    first = torch._foreach_mul(exp_avgs, each(beta1))
    second = torch._foreach_mul(exp_avg_sqs, each(beta2))
    torch._foreach_add_(first, torch._foreach_mul(news, each(1 - beta1)))
    squares = torch._foreach_mul(news, news)
    torch._foreach_mul_(squares, each(1 - beta2))
    torch._foreach_add_(second, squares)
    root = torch._foreach_div(second, each(correction2))
    torch._foreach_sqrt_(root)
    # as one scalar it would be read on the host
    torch._foreach_add_(root, list(eps.expand(len(root)).unbind()))
    updates = torch._foreach_div(first, each(correction1))
    torch._foreach_div_(updates, root)
    return list(updates), list(first), list(second)


def narrowed(
    params: list[Tensor], news: list[Tensor], step: Tensor | None, salts: Sequence[int]
) -> list[Tensor]:
    """``news`` in the dtypes of the parameters; with ``step``, rounded by chance."""
    if step is not None:
        own_salts = torch.tensor(salts, dtype=torch.int64, device=step.device).unbind(0)
        drawn = [
            noise(salt, places(x.shape, x.device), step)
            for salt, x in zip(own_salts, news, strict=True)
        ]
        news = [
            rounded_by_chance(x, old.dtype, bits)
            for x, old, bits in zip(news, params, drawn, strict=True)
        ]
    return [x.to(param.dtype) for x, param in zip(news, params, strict=True)]


def each(rate: Tensor) -> Tensor | list[Tensor]:
    """One for all tensors, or each its own."""
    return rate if rate.ndim == 0 else list(rate.unbind())


def moved(olds: list[Tensor], updates: list[Tensor], lr: Tensor, decay: Tensor) -> list[Tensor]:
    """New tensors; ``updates`` are overwritten."""
    torch._foreach_mul_(updates, each(lr))
    torch._foreach_add_(updates, torch._foreach_mul(olds, each(decay)))
    return list(torch._foreach_sub(olds, updates))


def norms_of(lists: Sequence[list[Tensor]], dtype: torch.dtype) -> Tensor:
    """[len(lists), n] in ``dtype``, summed in float64."""
    rows = [
        torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in each_list])
        for each_list in lists
    ]
    return torch.stack(rows).to(dtype)


def kept(skip: Tensor | None, olds: list[Tensor], news: list[Tensor]) -> list[Tensor]:
    if skip is None:
        return news
    return [torch.where(skip, old, new) for old, new in zip(olds, news, strict=True)]
