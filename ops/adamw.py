"""AdamW over a list of tensors of any shapes, and which of its updates would not be finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import adamw_reference as reference
from . import checks
from .launch import dtype_of, has_kernel, jit, launch, stride_of, tl
from .registration import Lists, register
from .rounding_kernels import joined_with, parted, rounded_by_chance
from .tables import address_table, chunk_table, salt_table

CHUNK, BLOCK = 16384, 2048  # entries of a program, and entries that it loads at a time


@jit(
    do_not_specialize_on_alignment=[  # loaded one at a time, wherever they begin
        "flags_ptr", "lr_ptr", "decay_ptr", "beta1_ptr", "beta2_ptr", "eps_ptr",
        "correction1_ptr", "correction2_ptr", "skip_ptr", "step_ptr",
    ]
)  # fmt: skip
def adamw_kernel(
    addresses, chunks, flags_ptr, lr_ptr, decay_ptr, beta1_ptr, beta2_ptr, eps_ptr,
    correction1_ptr, correction2_ptr, skip_ptr, salts, step_ptr, norms_ptr, stride,
    P: tl.constexpr, R: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    FLAGS: tl.constexpr, SKIP: tl.constexpr, PURE: tl.constexpr, CHANCE: tl.constexpr,
    NORMS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk.

    Addresses: exp_avg, exp_avg_sq, the gradient. Without FLAGS: the parameter, and where the new
    parameter, exp_avg and exp_avg_sq go. With R: the rest, and where the new rest goes.
    """
    entry = chunks + tl.program_id(0).to(tl.int64) * 3
    which, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    moves = True
    below = size
    if SKIP:
        moves = tl.load(skip_ptr) == 0
        if not PURE:  # in place, what keeps its bits is not written at all
            below = tl.where(moves, size, 0)
    if EVEN:
        start, size = tl.multiple_of(start, 16), tl.multiple_of(size, 16)
        below = tl.multiple_of(below, 16)
    if not NORMS:  # of what keeps its bits too
        size = below
    WIDE: tl.constexpr = R is not None
    MANTISSA: tl.constexpr = tl.int16 == R
    row = addresses + which * (3 if FLAGS else 9 if WIDE else 7)
    own = which * stride  # rates: one for all tensors, or each its own
    beta1, beta2 = tl.load(beta1_ptr + own), tl.load(beta2_ptr + own)
    eps = tl.load(eps_ptr + own)
    correction1 = tl.load(correction1_ptr + own) + tl.zeros([BLOCK], tl.float32)
    correction2 = tl.load(correction2_ptr + own) + tl.zeros([BLOCK], tl.float32)
    bad_update = tl.zeros([BLOCK], tl.int32)
    bad_grad = tl.zeros([BLOCK], tl.int32)
    if NORMS:
        g2 = tl.zeros([BLOCK], tl.float64)
        m2, w2, u2 = g2, g2, g2
    for offset in range(0, CHUNK, BLOCK):
        k = start + offset + tl.arange(0, BLOCK)
        mask = k < size
        written = k < below
        first = tl.load(_pointers_at(row, k, S, ALIGNED), mask, other=0.0)
        second = tl.load(_pointers_at(row + 1, k, S, ALIGNED), mask, other=0.0)
        grad = tl.load(_pointers_at(row + 2, k, G, ALIGNED), mask, other=0.0).to(tl.float32)
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
            old = tl.load(_pointers_at(row + 3, k, P, ALIGNED), mask, other=0.0)
            if WIDE:
                old_rest = tl.load(_pointers_at(row + 7, k, R, ALIGNED), mask, other=0)
                wide = joined_with(old, old_rest, MANTISSA)
            else:
                wide = old.to(tl.float32)
            decay, lr = tl.load(decay_ptr + own), tl.load(lr_ptr + own)
            if NORMS:
                delta = tl.where(mask, lr * update, 0.0)
                g2, m2 = g2 + _square(grad), m2 + _square(new_first)
                w2, u2 = w2 + _square(wide), u2 + _square(delta)
            moved = wide - (wide * decay + lr * update)
            if WIDE:
                new, rest = parted(moved, P, MANTISSA)
                if SKIP and PURE:
                    rest = tl.where(moves, rest, old_rest)
                tl.store(_pointers_at(row + 8, k, R, ALIGNED), rest, written)
            elif CHANCE:
                salt, step = tl.load(salts + which).to(tl.uint32), tl.load(step_ptr).to(tl.uint32)
                new = rounded_by_chance(moved, P, salt, k.to(tl.uint32), step)
            else:
                new = moved.to(P)
            if SKIP and PURE:
                new = tl.where(moves, new, old)
                new_first = tl.where(moves, new_first, first)
                new_second = tl.where(moves, new_second, second)
            tl.store(_pointers_at(row + 4, k, P, ALIGNED), new, written)
            tl.store(_pointers_at(row + 5, k, S, ALIGNED), new_first, written)
            tl.store(_pointers_at(row + 6, k, S, ALIGNED), new_second, written)
    if NORMS:
        found = norms_ptr + tl.program_id(0) * 4
        tl.store(found, tl.sum(g2, 0))
        tl.store(found + 1, tl.sum(m2, 0))
        tl.store(found + 2, tl.sum(w2, 0))
        tl.store(found + 3, tl.sum(u2, 0))
    if FLAGS:
        tl.atomic_max(flags_ptr + 2 * which, tl.max(bad_update, 0))
        tl.atomic_max(flags_ptr + 2 * which + 1, tl.max(bad_grad, 0))


@jit
def _square(x):
    return x.to(tl.float64) * x.to(tl.float64)


@jit
def _pointers_at(entry, k, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointers = tl.load(entry).to(tl.pointer_type(DTYPE), bitcast=True) + k
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers  # the hint: see `launch.at`


def launch_lists(
    lists: list[list[Tensor]],  # in the order of the kernel's addresses
    flags: Tensor | None,
    scalars: tuple[Any, ...],  # all 0-d or all [n]
    skip: Tensor | None,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
    norms: Tensor | None = None,  # [n, 4] float64 zeros, to be written: see measured.py
) -> None:
    n, table = len(lists[0]), address_table(*lists)
    mixed = any(x.dtype != tensors[0].dtype for tensors in lists for x in tensors)
    if n > 1 and (mixed or not table.aligned):  # one by one: the aligned ones keep wide loads
        for k in range(n):
            own_flags = None if flags is None else flags[k]
            own_lists = [[tensors[k]] for tensors in lists]
            own = tuple(x[k : k + 1] if x is not None and x.ndim else x for x in scalars)
            own_norms = None if norms is None else norms[k : k + 1]
            launch_lists(own_lists, own_flags, own, skip, step, salts[k : k + 1], own_norms)
        return
    salt = None if step is None else salt_table(salts, step.device)
    chunks = chunk_table(tuple(x.numel() for x in lists[0]), CHUNK, lists[0][0].device).entries
    even = all(x.numel() % 16 == 0 for x in lists[0])
    only_flags = flags is not None
    param_dtype = None if only_flags else dtype_of(lists[3][0])
    rest_dtype = dtype_of(lists[7][0]) if len(lists) > 7 else None
    pure = not only_flags and lists[3][0] is not lists[4][0]
    sums = None if norms is None else norms.new_empty((chunks.shape[0], 4))
    launch(
        adamw_kernel, chunks.shape[0],
        (table.entries, chunks, flags, *scalars, skip, salt, step, sums),
        (
            stride_of(scalars[-1]),
            param_dtype, rest_dtype, dtype_of(lists[0][0]), dtype_of(lists[2][0]),
            table.aligned, even, only_flags, skip is not None, pure, step is not None,
            norms is not None, CHUNK, BLOCK,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if norms is not None and sums is not None:
        norms.index_add_(0, chunks[:, 0], sums)


def _run_flags(
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], grads: list[Tensor], *rates: Tensor
) -> Tensor:
    if not has_kernel(exp_avgs, grads):
        return reference.adamw_flags(exp_avgs, exp_avg_sqs, grads, *rates)
    flags = exp_avgs[0].new_zeros((len(grads), 2), dtype=torch.int32)
    lists = [[x.contiguous() for x in tensors] for tensors in (exp_avgs, exp_avg_sqs, grads)]
    launch_lists(lists, flags, (None, None, *rates), None)
    return flags.T.ne(0).contiguous()


def _run_adamw(
    into: Lists,
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
) -> None:
    scalars = (lr, decay, beta1, beta2, eps, correction1, correction2)
    olds = (params, exp_avgs, exp_avg_sqs)
    if has_kernel(params, exp_avgs, grads):
        launch_adamw(into, olds, grads, scalars, skip, step, salts)
    else:
        copy_lists(into, reference.adamw(*olds, grads, *scalars, skip, step, salts))


def _run_adamw_wide(
    into: Lists,
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
) -> None:
    scalars = (lr, decay, beta1, beta2, eps, correction1, correction2)
    if has_kernel(params, rests, exp_avgs, grads):
        new_params, new_rests, *moments = into
        order = (new_params, *moments, new_rests)
        launch_adamw(order, (params, exp_avgs, exp_avg_sqs, rests), grads, scalars, skip)
    else:
        olds = (params, rests, exp_avgs, exp_avg_sqs)
        copy_lists(into, reference.adamw_wide(*olds, grads, *scalars, skip))


def copy_lists(into: Lists, results: Lists) -> None:
    for targets, values in zip(into, results, strict=True):
        torch._foreach_copy_(targets, values)


def launch_adamw(
    into: Lists,  # in the order of ``olds``
    olds: Lists,  # params, exp_avgs, exp_avg_sqs; with masters, rests
    grads: list[Tensor],
    scalars: tuple[Tensor, ...],
    skip: Tensor | None,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
    norms: Tensor | None = None,
) -> None:
    """The kernel reads and writes contiguous tensors: others are copied there and back."""
    sources = [[x.contiguous() for x in tensors] for tensors in olds]
    results = [
        source if targets[0] is old[0] else [x.contiguous() for x in targets]
        for targets, old, source in zip(into, olds, sources, strict=True)
    ]
    params, exp_avgs, exp_avg_sqs, *rests = sources
    order = [exp_avgs, exp_avg_sqs, [x.contiguous() for x in grads], params, *results[:3]]
    if rests:
        order += [rests[0], results[3]]
    launch_lists(order, None, scalars, skip, step, salts, norms)
    for targets, values in zip(into, results, strict=True):
        for target, x in zip(targets, values, strict=True):
            if target is not x and not target.is_contiguous():
                target.copy_(x)


def _flags_fake(exp_avgs: list[Tensor], *rest: Any) -> Tensor:
    return exp_avgs[0].new_empty((2, len(exp_avgs)), dtype=torch.bool)


_MOMENTS = "Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads"
_RATES = "Tensor beta1, Tensor beta2, Tensor eps, Tensor correction1, Tensor correction2"

# Always operators, on every device: the twin's lists would be nodes per parameter in the graph.
adamw_flags, _ = register(
    "adamw_flags",
    f"({_MOMENTS}, {_RATES}) -> Tensor",
    _run_flags,
    _flags_fake,
    check=checks.adamw_flags,
)
adamw, adamw_ = register(
    "adamw",
    f"(Tensor[] params, {_MOMENTS}, Tensor lr, Tensor decay, {_RATES}, Tensor? skip, "
    "Tensor? step=None, int[] salts=[]) -> (Tensor[], Tensor[], Tensor[])",
    _run_adamw,
    check=checks.adamw,
    writes=("params", "exp_avgs", "exp_avg_sqs"),
)
adamw_wide, adamw_wide_ = register(
    "adamw_wide",
    f"(Tensor[] params, Tensor[] rests, {_MOMENTS}, Tensor lr, Tensor decay, {_RATES}, "
    "Tensor? skip) -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _run_adamw_wide,
    check=checks.adamw_wide,
    writes=("params", "rests", "exp_avgs", "exp_avg_sqs"),
)
