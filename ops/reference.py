"""The twin of every operation over lists of matrices: what it computes, in plain PyTorch.

Every device without a kernel takes this path. All arithmetic is on stacks, so that Inductor fuses
it and the graph grows with buckets, not with parameters. `stack` leads from lists to stacks;
``write`` (`unstack` or `unstack_`) leads back. See lists.py for what a list is, and
adamw_reference.py for AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lists import chained, part_of_list, stack, total
from .reinterpret import reinterpret
from .rounding import joined_with, noise, parted, places, rounded_by_chance

Write = Callable[[list[Tensor], Tensor], list[Tensor]]


class Measures(NamedTuple):
    """What is measured of each of n matrices, in the compute dtype: see advance.py."""

    largest: Tensor  # [n] the gradient's largest absolute entry; not finite if any entry is not
    power: Tensor  # [n] the power of two that brings the update's largest entry into [2, 4)
    squares: Tensor  # [n] sum((update * power)**2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs(sizes: list[int], tensors: list[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Neighbours of one shape and dtype: each run as a part of the list and a part of the stack.

    ``sizes``: how many tensors each run has.
    """
    start = first = 0
    for size in sizes:
        end = first + total(part_of_list(tensors, slice(start, start + size)))
        yield slice(start, start + size), slice(first, end)
        start, first = start + size, end


def part_of(x: Tensor, matrices: slice) -> Tensor:
    """What some of the matrices have of a number that all share, 0-d, or each has its own, [n]."""
    return x if x.ndim == 0 else x[matrices]


def per_matrix(x: Tensor) -> Tensor:
    """The same in the form [n, 1, 1], for arithmetic with a stack."""
    return x if x.ndim == 0 else x[:, None, None]


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without a node in the graph for a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# --- measuring ---


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two that brings ``largest`` into [2, 4): 2**-126 to 2**127; 0 for inf and NaN.

    The power comes from the bits of the exponent. A subnormal ``largest`` is brought to at least
    2**-22.
    """
    bits, mantissa, twice_bias = (
        (torch.int64, 52, 2047) if largest.dtype == torch.float64 else (torch.int32, 23, 255)
    )
    exponent = (reinterpret(largest, bits) >> mantissa).clamp(min=1)  # biased; the sign bit is 0
    return reinterpret((twice_bias - exponent) << mantissa, largest.dtype)


def measured(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(power, squares)`` of every matrix of [n, rows, cols] in the compute dtype: see `Measures`.

    The squares cannot overflow. Multiplying by a normal power of two is exact, so ``squares`` is
    the same for ``x`` and ``2**k * x``. Sums over another layout would have other bits, so tall
    matrices are transposed and every product is made contiguous.
    """
    if x.numel() == 0:
        return x.new_ones(x.shape[0]), x.new_zeros(x.shape[0])
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    power = power_of_two(x.abs().amax((-2, -1)))
    return power, (x * power[:, None, None]).contiguous().square().sum((-2, -1))


def measures(grad: Tensor, update: Tensor) -> Measures:
    """The gradient's largest entry, and what brings the update to norm 1."""
    return Measures(largest_of(grad).to(update.dtype), *measured(update))


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
    return Measures(*(joined(list(parts), 0) for parts in zip(*found, strict=True)))


def norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] in ``dtype``: the Frobenius norm of every matrix of a stack."""
    return x.double().square().sum((-2, -1)).sqrt().to(dtype)


# --- the front pass ---


def advanced(momentum: Tensor, grad: Tensor, beta: Tensor, form: str) -> Tensor:
    """The next momentum, in the dtype of the momentum. ``beta``: 0-d or [n].

    There are two products because ``lerp`` would overflow where ``grad - momentum`` does.
    """
    dtype = compute_dtype(momentum.dtype)
    beta, new = per_matrix(beta.to(dtype)), grad.to(dtype)
    old = momentum.to(dtype) * beta
    return (old + (new * (1 - beta) if form == "ema" else new)).to(momentum.dtype)


def update_of(momentum: Tensor, grad: Tensor, beta: Tensor, form: str, nesterov: bool) -> Tensor:
    """What is orthogonalized, in the compute dtype, from the momentum after `advanced`."""
    update = momentum.to(compute_dtype(momentum.dtype))
    if not nesterov:
        return update
    new, beta = grad.to(update.dtype), per_matrix(beta.to(update.dtype))
    return update * beta + (new * (1 - beta) if form == "ema" else new)


def advance(
    write: Write,
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    keep: Tensor | None,
    sizes: list[int],
    form: str,
    nesterov: bool,
    *,
    norms: bool = False,
) -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor]]:
    """The new momentums, the measures, and the new momentums as one stack per run.

    Where ``keep`` is true, new momentums are the old ones, for the measures too. With ``norms``,
    those of gradients and new momentums follow the measures.
    `gather` takes the stacks, so that it need not make them again.
    """
    written, found, stacks = [], [], []
    rest: list[tuple[Tensor, Tensor]] = []
    for part, matrices in runs(sizes, momentums):
        old, grad, own = stack(momentums[part]), stack(grads[part]), part_of(beta, matrices)
        new = advanced(old, grad, own, form)
        if keep is not None:  # before it is measured: a norm belongs to what is orthogonalized
            new = torch.where(keep, old, new)
        found.append(measures(grad, update_of(new, grad, own, form, nesterov)))
        if norms:
            rest.append((norm(grad, found[-1].squares.dtype), norm(new, found[-1].squares.dtype)))
        stacks.append(new)
        written.append(write(momentums[part], new))
    more = [joined(list(parts), 0) for parts in zip(*rest, strict=True)]
    return chained(written), (*together(found), *more) if norms else together(found), stacks


def lookahead(
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Measures:
    found = []
    for part, matrices in runs(sizes, momentums):
        grad, own = stack(grads[part]), part_of(beta, matrices)
        new = advanced(stack(momentums[part]), grad, own, form)
        found.append(measures(grad, update_of(new, grad, own, form, nesterov)))
    return together(found)


def gather(
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    power: Tensor,
    inverse: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
    ahead: bool,
    dtype: torch.dtype,
    transpose: list[bool],
    stacks: list[Tensor] | None = None,
) -> Tensor:
    parts = []
    for k, (part, matrices) in enumerate(runs(sizes, momentums)):
        momentum = stacks[k] if stacks else stack(momentums[part])
        grad = stack(grads[part]) if ahead or nesterov else momentum  # otherwise it is not read
        own = part_of(beta, matrices)
        if ahead:
            momentum = advanced(momentum, grad, own, form)
        x = update_of(momentum, grad, own, form, nesterov)
        x = x * power[matrices, None, None] * inverse[matrices, None, None]
        parts.append((x.mT if transpose[k] else x).to(dtype))
    return joined(parts, 0).contiguous()


# --- the back pass ---


def apply(
    write: Write,
    params: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
    *,
    norms: bool = False,
) -> tuple[Any, ...]:
    """The new parameters; with ``norms``, also those of the old ones and of their updates.

    With ``step`` and ``salts`` (one per matrix), parameters are rounded by chance.
    """
    olds = stack(params)
    wide = olds.to(compute_dtype(olds.dtype))
    new = _moved(wide, update, factor, decay, cautious)
    if step is not None:
        salt = torch.tensor(salts, dtype=torch.int64, device=olds.device)[:, None, None]
        bits = noise(salt, places(olds.shape[1:], olds.device), step)
        new = rounded_by_chance(new, olds.dtype, bits)
    new = new.to(olds.dtype)
    written = write(params, new if skip is None else torch.where(skip, olds, new))
    return (written, _norms(wide, update, factor)) if norms else (written,)


def apply_wide(
    write: Write,
    params: list[Tensor],
    rests: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
    *,
    norms: bool = False,
) -> tuple[Any, ...]:
    """`apply` to parameters with float32 masters: see rounding.py."""
    olds, old_rests = stack(params), stack(rests)
    wide = joined_with(olds, old_rests)
    new = _moved(wide, update, factor, decay, cautious)
    news, new_rests = parted(new, olds.dtype, old_rests.dtype)
    if skip is not None:
        news, new_rests = torch.where(skip, olds, news), torch.where(skip, old_rests, new_rests)
    written = write(params, news), write(rests, new_rests)
    return (*written, _norms(wide, update, factor)) if norms else written


def _norms(old: Tensor, update: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    dtype = factor.dtype
    return norm(old, dtype), norm(update.to(dtype) * factor, dtype)


def _moved(old: Tensor, update: Tensor, factor: Tensor, decay: Tensor, cautious: bool) -> Tensor:
    delta, decay = update.to(old.dtype) * factor, per_matrix(decay)
    share = torch.where(delta * old >= 0, decay, 0.0) if cautious else decay
    return old - (old * share + delta)  # 1 - share would lose a small decay to rounding
