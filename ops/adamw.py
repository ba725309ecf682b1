"""AdamW over a list of tensors of any shapes, and what of it would not be finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch import address_table, chunk_table, dtype_of, has_kernel, jit, launch, salt_table, tl
from .registration import Lists, empty_like, register
from .rounding_kernels import joined_with, parted, rounded_by_chance

_CHUNK, _BLOCK = 16384, 2048


@jit
def adamw_kernel(
    addresses, chunks, flags_ptr, lr_ptr, decay_ptr, beta1_ptr, beta2_ptr, eps_ptr, correction1_ptr, correction2_ptr, skip_ptr,
    salts, step_ptr,
    P: tl.constexpr, R: tl.constexpr, S: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    FLAGS: tl.constexpr, SKIP: tl.constexpr, PURE: tl.constexpr, CHANCE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk. Addresses: exp_avg, exp_avg_sq, gradient; then parameter and the new three, unless it only FLAGS.

    With R, rest and new rest follow.
    """
    entry = chunks + tl.program_id(0).to(tl.int64) * 3
    which, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if EVEN:
        start, size = tl.multiple_of(start, 16), tl.multiple_of(size, 16)
    WIDE: tl.constexpr = R is not None
    MANTISSA: tl.constexpr = tl.int16 == R
    row = addresses + which * (3 if FLAGS else 9 if WIDE else 7)
    beta1, beta2, eps = tl.load(beta1_ptr), tl.load(beta2_ptr), tl.load(eps_ptr)
    correction1 = tl.load(correction1_ptr) + tl.zeros([BLOCK], tl.float32)
    correction2 = tl.load(correction2_ptr) + tl.zeros([BLOCK], tl.float32)
    moves = True
    if SKIP:
        moves = tl.load(skip_ptr) == 0
    bad_update = tl.zeros([BLOCK], tl.int32)
    bad_grad = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, CHUNK, BLOCK):
        k = start + offset + tl.arange(0, BLOCK)
        mask = k < size
        if SKIP and not PURE:
            mask = mask & moves
        first = tl.load(_pointers(row, k, S, ALIGNED), mask, other=0.0)
        second = tl.load(_pointers(row + 1, k, S, ALIGNED), mask, other=0.0)
        grad = tl.load(_pointers(row + 2, k, G, ALIGNED), mask, other=0.0).to(tl.float32)
        new_first = first * beta1 + grad * (1 - beta1)
        new_second = second * beta2 + grad * grad * (1 - beta2)
        update = tl.div_rn(
            tl.div_rn(new_first, correction1), tl.sqrt_rn(tl.div_rn(new_second, correction2)) + eps
        )
        if FLAGS:
            finite = (tl.abs(update) < float("inf")) & (tl.abs(new_second) < float("inf"))
            bad_update = bad_update | (mask & (finite == 0)).to(tl.int32)
            bad_grad = bad_grad | (mask & ((tl.abs(grad) < float("inf")) == 0)).to(tl.int32)
        else:
            old = tl.load(_pointers(row + 3, k, P, ALIGNED), mask, other=0.0)
            if WIDE:
                old_rest = tl.load(_pointers(row + 7, k, R, ALIGNED), mask, other=0)
                wide = joined_with(old, old_rest, MANTISSA)
            else:
                wide = old.to(tl.float32)
            moved = wide - (wide * tl.load(decay_ptr) + tl.load(lr_ptr) * update)
            if WIDE:
                new, rest = parted(moved, P, MANTISSA)
                if SKIP and PURE:
                    rest = tl.where(moves, rest, old_rest)
                tl.store(_pointers(row + 8, k, R, ALIGNED), rest, mask)
            elif CHANCE:
                salt, step = tl.load(salts + which).to(tl.uint32), tl.load(step_ptr).to(tl.uint32)
                new = rounded_by_chance(moved, P, salt, k.to(tl.uint32), step)
            else:
                new = moved.to(P)
            if SKIP and PURE:
                new = tl.where(moves, new, old)
                new_first = tl.where(moves, new_first, first)
                new_second = tl.where(moves, new_second, second)
            tl.store(_pointers(row + 4, k, P, ALIGNED), new, mask)
            tl.store(_pointers(row + 5, k, S, ALIGNED), new_first, mask)
            tl.store(_pointers(row + 6, k, S, ALIGNED), new_second, mask)
    if FLAGS:
        tl.atomic_max(flags_ptr + 2 * which, tl.max(bad_update, 0))
        tl.atomic_max(flags_ptr + 2 * which + 1, tl.max(bad_grad, 0))


@jit
def _pointers(entry, k, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointers = tl.load(entry).to(tl.pointer_type(DTYPE), bitcast=True) + k
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers  # not the address: see `launch.at`


def _launch(
    lists: list[list[Tensor]], n: int, flags: Tensor | None, scalars: tuple[Any, ...], skip: Tensor | None,
    step: Tensor | None = None, salts: Sequence[int] = (),
) -> None:  # fmt: skip
    """``lists``: exp_avgs, exp_avg_sqs, grads; params, and where the new values go; rests, and where theirs go."""
    places = address_table(*lists)
    if not places.aligned or any(x.dtype != y[0].dtype for y in lists for x in y):
        for k in range(n):  # one by one: the others keep their wide loads
            if n > 1:
                _launch(
                    [[x[k]] for x in lists],
                    1,
                    None if flags is None else flags[k],
                    scalars,
                    skip,
                    step,
                    salts[k : k + 1],
                )
        if n > 1:
            return
    table = None if step is None else salt_table(salts, step.device)
    chunks = chunk_table(tuple(x.numel() for x in lists[0]), _CHUNK, lists[0][0].device).entries
    launch(
        adamw_kernel, chunks.shape[0], (places.entries, chunks, flags, *scalars, skip, table, step),
        (
            dtype_of(lists[3][0]) if flags is None else None, dtype_of(lists[7][0]) if len(lists) > 7 else None,
            dtype_of(lists[0][0]), dtype_of(lists[2][0]), places.aligned,
            all(x.numel() % 16 == 0 for x in lists[0]), flags is not None, skip is not None,
            flags is None and lists[3][0] is not lists[4][0], step is not None, _CHUNK, _BLOCK,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _adamw_flags(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor], *scalars: Tensor
) -> Tensor:
    if not has_kernel(exp_avgs, grads):
        return reference.adamw_flags(exp_avgs, exp_avg_sqs, grads, *scalars)
    flags = exp_avgs[0].new_zeros((len(grads), 2), dtype=torch.int32)
    lists = [[x.contiguous() for x in given] for given in (exp_avgs, exp_avg_sqs, grads)]
    _launch(lists, len(grads), flags, (None, None, *scalars), None)
    return flags.T.ne(0).contiguous()


def _adamw(
    into: Lists, params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor],
    lr: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor,
    skip: Tensor | None, step: Tensor | None = None, salts: Sequence[int] = (),
) -> None:  # fmt: skip
    scalars = (lr, decay, beta1, beta2, eps, correction1, correction2)
    if has_kernel(params, exp_avgs, grads):
        _write(into, (params, exp_avgs, exp_avg_sqs), grads, scalars, skip, step, salts)
        return
    for targets, values in zip(
        into,
        reference.adamw(params, exp_avgs, exp_avg_sqs, grads, *scalars, skip, step, salts),
        strict=True,
    ):
        torch._foreach_copy_(targets, values)


def _adamw_wide(
    into: Lists, params: list[Tensor], rests: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    grads: list[Tensor], lr: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, correction1: Tensor,
    correction2: Tensor, skip: Tensor | None,
) -> None:  # fmt: skip
    scalars = (lr, decay, beta1, beta2, eps, correction1, correction2)
    if has_kernel(params, rests, exp_avgs, grads):
        news, lacks, first, second = into
        _write(
            (news, first, second, lacks),
            (params, exp_avgs, exp_avg_sqs, rests),
            grads,
            scalars,
            skip,
            None,
            (),
        )
        return
    for targets, values in zip(
        into,
        reference.adamw_wide(params, rests, exp_avgs, exp_avg_sqs, grads, *scalars, skip),
        strict=True,
    ):
        torch._foreach_copy_(targets, values)


def _write(
    into: Lists, lists: Lists, grads: list[Tensor], scalars: tuple[Tensor, ...], skip: Tensor | None,
    step: Tensor | None, salts: Sequence[int],
) -> None:  # fmt: skip
    """By the kernel. ``lists``: params, exp_avgs, exp_avg_sqs, and rests if there are any."""
    olds = [[x.contiguous() for x in given] for given in lists]
    news = [
        old
        if targets[0] is given[0]
        else [x if x.is_contiguous() else torch.empty_like(x).contiguous() for x in targets]
        for targets, given, old in zip(into, lists, olds, strict=True)
    ]
    more = [olds[3], news[3]] if len(olds) > 3 else []
    order = [olds[1], olds[2], [x.contiguous() for x in grads], olds[0], *news[:3], *more]
    _launch(order, len(grads), None, scalars, skip, step, salts)
    for targets, written in zip(into, news, strict=True):
        for target, x in zip(targets, written, strict=True):
            if target is not x and not target.is_contiguous():
                target.copy_(x)


def _flags_fake(exp_avgs: list[Tensor], *rest: Any) -> Tensor:
    return exp_avgs[0].new_empty((2, len(exp_avgs)), dtype=torch.bool)


def _adamw_fake(
    params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return empty_like(params), empty_like(exp_avgs), empty_like(exp_avg_sqs)


def _adamw_wide_fake(
    params: list[Tensor],
    rests: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *more: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return empty_like(params), empty_like(rests), empty_like(exp_avgs), empty_like(exp_avg_sqs)


_SCALARS = "Tensor beta1, Tensor beta2, Tensor eps, Tensor correction1, Tensor correction2"

adamw_flags, _ = register(
    "adamw_flags",
    f"(Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads, {_SCALARS}) -> Tensor",
    _adamw_flags,
    _flags_fake,
)
adamw, adamw_ = register(
    "adamw",
    "(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads, Tensor lr, Tensor decay, "
    f"{_SCALARS}, Tensor? skip, Tensor? step=None, int[] salts=[]) -> (Tensor[], Tensor[], Tensor[])",
    _adamw,
    _adamw_fake,
    writes=("params", "exp_avgs", "exp_avg_sqs"),
)
adamw_wide, adamw_wide_ = register(
    "adamw_wide",
    "(Tensor[] params, Tensor[] rests, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads, Tensor lr, Tensor decay, "
    f"{_SCALARS}, Tensor? skip) -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _adamw_wide,
    _adamw_wide_fake,
    writes=("params", "rests", "exp_avgs", "exp_avg_sqs"),
)
