"""The twin of every op over lists: what it computes, in plain PyTorch. The path of every device without a kernel for it.

All arithmetic is on stacks, so that Inductor fuses it and the graph grows with buckets, not with parameters; `stack` and the
`write` that an op is given (`unstack` or `unstack_`) lead from lists to stacks and back. See lists.py for what a list is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .lists import count, stack
from .reinterpret import reinterpret
from .rounding import joined_with, noise, parted, places, rounded_by_chance

Write = Callable[[list[Tensor], Tensor], list[Tensor]]
Measures = tuple[Tensor, Tensor, Tensor]  # largest, power, squares; each [n]: see advance.py


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs(sizes: list[int], tensors: list[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Neighbours of the same shape and dtype, so many tensors each: as parts of the list, and as parts of the stack."""
    start = at = 0
    for size in sizes:
        end = at + sum(map(count, tensors[start : start + size]))
        yield slice(start, start + size), slice(at, end)
        start, at = start + size, end


# --- measuring ---


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two that brings ``largest`` into [2, 4): 2**-126 to 2**127, and 0 for inf and NaN.

    Taken from the exponent's bits. A subnormal ``largest`` is brought to at least 2**-22.
    """
    bits, mantissa, twice_bias = (
        (torch.int64, 52, 2047) if largest.dtype == torch.float64 else (torch.int32, 23, 255)
    )
    exponent = (reinterpret(largest, bits) >> mantissa).clamp(min=1)  # biased; the sign bit is 0
    return reinterpret((twice_bias - exponent) << mantissa, largest.dtype)


def measured(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(power, squares)`` of every matrix of [n, rows, cols] in the compute dtype: sum((x * power)**2), which cannot overflow.

    Multiplying by a normal power of two is exact, so ``squares`` is the same for ``x`` and ``2**k * x``. Sums over another
    layout would have other bits, so tall matrices are transposed and every product is made contiguous.
    """
    if x.numel() == 0:
        return x.new_ones(x.shape[0]), x.new_zeros(x.shape[0])
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    power = power_of_two(x.abs().amax((-2, -1)))
    return power, (x * power[:, None, None]).contiguous().square().sum((-2, -1))


def measures(grad: Tensor, update: Tensor) -> Measures:
    """The gradient's largest entry, and what brings the update to norm 1."""
    return largest_of(grad).to(update.dtype), *measured(update)


def measure(tensors: list[Tensor], sizes: list[int]) -> Measures:
    found = []
    for part, _ in runs(sizes, tensors):
        x = stack(tensors[part]).to(compute_dtype(tensors[0].dtype))
        found.append(measures(x, x))
    return together(found)


def largest(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return joined([largest_of(stack(tensors[part])) for part, _ in runs(sizes, tensors)], 0)


def largest_of(x: Tensor) -> Tensor:
    found = x.abs().amax((-2, -1)) if x.numel() else x.new_zeros(x.shape[0])
    return found.to(compute_dtype(x.dtype))


def together(found: list[Measures]) -> Measures:
    largest, power, squares = (joined(list(parts), 0) for parts in zip(*found, strict=True))
    return largest, power, squares


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# --- the front pass ---


def advanced(momentum: Tensor, grad: Tensor, beta: Tensor, form: str) -> Tensor:
    """The next momentum, in its dtype. Two products: ``lerp`` would overflow where ``grad - momentum`` does."""
    dtype = compute_dtype(momentum.dtype)
    beta, new = beta.to(dtype), grad.to(dtype)
    old = momentum.to(dtype) * beta
    return (old + (new * (1 - beta) if form == "ema" else new)).to(momentum.dtype)


def update_of(momentum: Tensor, grad: Tensor, beta: Tensor, form: str, nesterov: bool) -> Tensor:
    """What is orthogonalized, from the advanced momentum, in the compute dtype."""
    update = momentum.to(compute_dtype(momentum.dtype))
    if not nesterov:
        return update
    new, beta = grad.to(update.dtype), beta.to(update.dtype)
    return update * beta + (new * (1 - beta) if form == "ema" else new)


def advance(
    write: Write, momentums: list[Tensor], grads: list[Tensor], beta: Tensor, keep: Tensor | None, sizes: list[int],
    form: str, nesterov: bool,
) -> tuple[list[Tensor], Measures, list[Tensor]]:  # fmt: skip
    """The new momentums, measures; and the new momentums as stacks, which `gather` need not make again."""
    written, found, stacks = [], [], []
    for part, _ in runs(sizes, momentums):
        old, grad = stack(momentums[part]), stack(grads[part])
        new = advanced(old, grad, beta, form)
        found.append(measures(grad, update_of(new, grad, beta, form, nesterov)))
        stacks.append(new if keep is None else torch.where(keep, old, new))
        written += write(momentums[part], stacks[-1])
    return written, together(found), stacks


def lookahead(
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Measures:
    found = []
    for part, _ in runs(sizes, momentums):
        grad = stack(grads[part])
        new = advanced(stack(momentums[part]), grad, beta, form)
        found.append(measures(grad, update_of(new, grad, beta, form, nesterov)))
    return together(found)


def gather(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, power: Tensor, inverse: Tensor,
    sizes: list[int], form: str, nesterov: bool, ahead: bool, dtype: torch.dtype, turn: list[bool],
    stacks: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    parts = []
    for k, (part, at) in enumerate(runs(sizes, momentums)):
        momentum = stacks[k] if stacks else stack(momentums[part])
        grad = stack(grads[part]) if ahead or nesterov else momentum  # not read otherwise
        if ahead:
            momentum = advanced(momentum, grad, beta, form)
        x = update_of(momentum, grad, beta, form, nesterov)
        x = x * power[at, None, None] * inverse[at, None, None]
        parts.append((x.mT if turn[k] else x).to(dtype))
    return joined(parts, 0).contiguous()


# --- the back pass ---


def apply(
    write: Write, params: list[Tensor], update: Tensor, factor: Tensor, decay: Tensor, skip: Tensor | None, cautious: bool,
    step: Tensor | None = None, salts: Sequence[int] = (),
) -> tuple[list[Tensor]]:  # fmt: skip
    """``step`` and ``salts`` (one a matrix): round by chance."""
    olds = stack(params)
    new = _moved(olds.to(compute_dtype(olds.dtype)), update, factor, decay, cautious)
    if step is not None:
        of = torch.tensor(salts, dtype=torch.int64, device=olds.device)[:, None, None]
        new = rounded_by_chance(
            new, olds.dtype, noise(of, places(olds.shape[1:], olds.device), step)
        )
    new = new.to(olds.dtype)
    return (write(params, new if skip is None else torch.where(skip, olds, new)),)


def apply_wide(
    write: Write, params: list[Tensor], rests: list[Tensor], update: Tensor, factor: Tensor, decay: Tensor,
    skip: Tensor | None, cautious: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The same of parameters with float32 masters: see rounding.py."""
    olds, lacked = stack(params), stack(rests)
    new = _moved(joined_with(olds, lacked), update, factor, decay, cautious)
    news, lacks = parted(new, olds.dtype, lacked.dtype)
    if skip is not None:
        news, lacks = torch.where(skip, olds, news), torch.where(skip, lacked, lacks)
    return write(params, news), write(rests, lacks)


def _moved(old: Tensor, update: Tensor, factor: Tensor, decay: Tensor, cautious: bool) -> Tensor:
    delta = update.to(old.dtype) * factor
    share = torch.where(delta * old >= 0, decay, 0.0) if cautious else decay
    return old - (old * share + delta)  # 1 - share would lose a small decay to rounding


# --- AdamW, over tensors of any shapes ---


def _adamw_update(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """``(updates, exp_avgs, exp_avg_sqs)``, all new."""
    dtype = exp_avgs[0].dtype
    beta1, beta2, eps, correction1, correction2 = (
        x.to(dtype) for x in (beta1, beta2, eps, correction1, correction2)
    )
    news = [grad.to(dtype) for grad in grads]
    first, second = torch._foreach_mul(exp_avgs, beta1), torch._foreach_mul(exp_avg_sqs, beta2)
    torch._foreach_add_(first, torch._foreach_mul(news, 1 - beta1))
    squares = torch._foreach_mul(news, news)
    torch._foreach_mul_(squares, 1 - beta2)
    torch._foreach_add_(second, squares)
    root = torch._foreach_div(second, correction2)
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, [eps] * len(root))  # as one scalar it would be read on the host
    updates = torch._foreach_div(first, correction1)
    torch._foreach_div_(updates, root)
    return list(updates), list(first), list(second)


def adamw_flags(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor,
) -> Tensor:  # fmt: skip
    updates, _, seconds = _adamw_update(
        exp_avgs, exp_avg_sqs, grads, beta1, beta2, eps, correction1, correction2
    )
    bad = [
        ~(update.isfinite() & second.isfinite()).all()
        for update, second in zip(updates, seconds, strict=True)
    ]
    return torch.stack([torch.stack(bad), torch.stack([~grad.isfinite().all() for grad in grads])])


def adamw(
    params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    lr: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor,
    skip: Tensor | None, step: Tensor | None = None, salts: Sequence[int] = (),
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """``step`` and ``salts`` (one a tensor): round by chance."""
    rates = (beta1, beta2, eps, correction1, correction2)
    updates, first, second = _adamw_update(exp_avgs, exp_avg_sqs, grads, *rates)
    news = _adamw_moved(
        [param.to(x.dtype) for param, x in zip(params, first, strict=True)], updates, lr, decay
    )
    if step is not None:
        of = torch.tensor(salts, dtype=torch.int64, device=step.device).unbind(0)
        drawn = [
            noise(salt, places(x.shape, x.device), step) for salt, x in zip(of, news, strict=True)
        ]
        news = [
            rounded_by_chance(x, old.dtype, bits)
            for x, old, bits in zip(news, params, drawn, strict=True)
        ]
    news = [x.to(param.dtype) for x, param in zip(news, params, strict=True)]
    return _kept(skip, params, news), _kept(skip, exp_avgs, first), _kept(skip, exp_avg_sqs, second)


def adamw_wide(
    params: list[Tensor], rests: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    lr: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor,
    skip: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The same of parameters with float32 masters: see rounding.py."""
    rates = (beta1, beta2, eps, correction1, correction2)
    updates, first, second = _adamw_update(exp_avgs, exp_avg_sqs, grads, *rates)
    masters = _adamw_moved(
        [joined_with(param, rest) for param, rest in zip(params, rests, strict=True)],
        updates,
        lr,
        decay,
    )
    new = [
        parted(x, param.dtype, rest.dtype)
        for x, param, rest in zip(masters, params, rests, strict=True)
    ]
    return (
        _kept(skip, params, [param for param, _ in new]), _kept(skip, rests, [rest for _, rest in new]),
        _kept(skip, exp_avgs, first), _kept(skip, exp_avg_sqs, second),
    )  # fmt: skip


def _adamw_moved(
    olds: list[Tensor], updates: list[Tensor], lr: Tensor, decay: Tensor
) -> list[Tensor]:
    """New ones; ``updates`` are overwritten."""
    torch._foreach_mul_(updates, lr)
    torch._foreach_add_(updates, torch._foreach_mul(olds, decay))
    return list(torch._foreach_sub(olds, updates))


def _kept(skip: Tensor | None, olds: list[Tensor], news: list[Tensor]) -> list[Tensor]:
    return (
        news
        if skip is None
        else [torch.where(skip, old, new) for old, new in zip(olds, news, strict=True)]
    )
