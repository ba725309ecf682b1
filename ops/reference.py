"""The eager twin of every op: what it computes, in plain PyTorch. The path of every device that has no kernel for it.

A *list* argument holds one tensor a matrix ``[rows, cols]``, or a stack of matrices ``[b, rows, cols]``, in the order of the
stack ``[n, rows, cols]`` that goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _as_stack(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.unsqueeze(0)


def _slices(like: Sequence[Tensor], stacked: Tensor) -> list[Tensor]:
    """``stacked`` [n, rows | 1, cols | 1] cut and shaped as the tensors of ``like``."""
    counts = [x.shape[0] if x.ndim == 3 else 1 for x in like]
    parts = stacked.split(counts) if like else ()
    return [part if x.ndim == 3 else part.squeeze(0) for x, part in zip(like, parts, strict=True)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stack(tensors: list[Tensor]) -> Tensor:
    return torch.cat([_as_stack(x) for x in tensors])


def unstack(tensors: list[Tensor], stacked: Tensor, skip: Tensor | None) -> list[Tensor]:
    parts = [part.to(x.dtype, copy=True) for x, part in zip(tensors, _slices(tensors, stacked), strict=True)]
    return parts if skip is None else [torch.where(skip, x, part) for x, part in zip(tensors, parts, strict=True)]


def advanced(grad: Tensor, momentum: Tensor, beta: Tensor, form: str) -> Tensor:
    """The next momentum, in the compute dtype. Two products: ``lerp`` would overflow where ``grad - momentum`` does."""
    dtype = compute_dtype(momentum.dtype)
    beta, new = beta.to(dtype), grad.to(dtype)
    old = momentum.to(dtype) * beta
    return old + (new * (1 - beta) if form == "ema" else new)


def lookahead(grads: list[Tensor], momentums: list[Tensor], beta: Tensor, form: str, nesterov: bool) -> tuple[Tensor, Tensor]:
    updates, largest = [], []
    for grad, momentum in zip(grads, momentums, strict=True):
        update = advanced(grad, momentum, beta, form)
        if nesterov:
            new, decayed = grad.to(update.dtype), beta.to(update.dtype)
            update = update * decayed + (new * (1 - decayed) if form == "ema" else new)
        updates.append(_as_stack(update))
        largest.append(
            _as_stack(grad).abs().amax((1, 2)) if grad.numel() else _as_stack(grad).new_zeros(_as_stack(grad).shape[0])
        )
    return torch.cat(updates), torch.cat(largest).to(compute_dtype(grads[0].dtype))


def hold(momentums: list[Tensor], grads: list[Tensor], beta: Tensor, keep: Tensor | None, form: str) -> list[Tensor]:
    new = [advanced(grad, momentum, beta, form).to(momentum.dtype) for grad, momentum in zip(grads, momentums, strict=True)]
    return new if keep is None else [torch.where(keep, old, x) for old, x in zip(momentums, new, strict=True)]


def apply(
    params: list[Tensor], update: Tensor, scale: Tensor, decay: Tensor, skip: Tensor | None, cautious: bool
) -> list[Tensor]:
    new = []
    for param, part, factor in zip(params, _slices(params, update), _slices(params, scale), strict=True):
        dtype = compute_dtype(param.dtype)
        old, delta = param.to(dtype), part.to(dtype) * factor
        share = torch.where(delta * old >= 0, decay, 0.0) if cautious else decay
        x = (old - (old * share + delta)).to(param.dtype)  # 1 - share would lose a small decay to rounding
        new.append(x if skip is None else torch.where(skip, param, x))
    return new


def _adamw_update(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    new = grad.to(exp_avg.dtype)
    beta1, beta2, eps, step = (x.to(exp_avg.dtype) for x in (beta1, beta2, eps, step))
    exp_avg = exp_avg * beta1 + new * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + new * new * (1 - beta2)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    return exp_avg / (1 - beta1**step) / root, exp_avg, exp_avg_sq


def adamw_flags(
    grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    beta1: Tensor, beta2: Tensor, eps: Tensor, step: Tensor,
) -> Tensor:  # fmt: skip
    flags = []
    for grad, exp_avg, exp_avg_sq in zip(grads, exp_avgs, exp_avg_sqs, strict=True):
        update, _, second = _adamw_update(grad, exp_avg, exp_avg_sq, beta1, beta2, eps, step)
        flags.append(torch.stack([~(update.isfinite() & second.isfinite()).all(), ~grad.isfinite().all()]))
    return torch.stack(flags, 1)


def adamw(
    params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    lr: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, step: Tensor, skip: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    new: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for param, exp_avg, exp_avg_sq, grad in zip(params, exp_avgs, exp_avg_sqs, grads, strict=True):
        update, first, second = _adamw_update(grad, exp_avg, exp_avg_sq, beta1, beta2, eps, step)
        old = param.to(exp_avg.dtype)
        x = (old - (old * decay + lr * update)).to(param.dtype)
        for kept, olds, news in zip(new, (param, exp_avg, exp_avg_sq), (x, first, second), strict=True):
            kept.append(news if skip is None else torch.where(skip, olds, news))
    return new
