"""The front pass: gradients into momentums, and what it takes to bring the update to norm 1.

``advance`` returns the new momentums. ``lookahead`` measures the same without writing, for a step
that may write momentums only once every rank agrees. ``measure`` takes tensors as they are. All
three measure each of the n matrices, and return `Measures`: largest, power and squares.
``largest`` returns only the first of these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, codes_kernels, reference
from .codes import BLOCK
from .implementations import with_kernel
from .launch import at, dtype_of, jit, launch, stride_of, tile, tl
from .lists import part_of_list, total
from .reference import compute_dtype
from .registration import Lists
from .tables import matrix_table

TILE, LOOP = 2048, 4  # entries of a tile, and tiles of a strip


@jit(do_not_specialize_on_alignment=["beta_ptr", "keep_ptr"])
def front_kernel(
    table, beta_ptr, keep_ptr, largest_ptr, squares_ptr, norms_ptr, scales,
    rows, cols, across, strips, beta_stride,
    M: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, EMA: tl.constexpr,
    NESTEROV: tl.constexpr, NORMS: tl.constexpr,
    LOOP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One strip of LOOP tiles, one below the other.

    Table: the momentum, the new momentum's place (WRITE), the gradient (GRAD). Where momentums are
    codes, CODED is how many columns of a tile have one scale (otherwise 0), and ``scales`` is a
    table of the scales and the new scales' place (WRITE).
    """
    pid = tl.program_id(0)
    matrix, strip = pid // strips, pid % strips
    entry = table + matrix.to(tl.int64) * (3 + 3 * WRITE + 3 * GRAD)
    c = (strip % across) * BC + tl.arange(0, BC)
    top = (strip // across) * (LOOP * BR)
    most_grad = tl.zeros([BR, BC], tl.int32)
    most = tl.zeros([BR, BC], tl.int32)
    total = tl.zeros([BR, BC], tl.float64)
    if NORMS:
        total_grad = tl.zeros([BR, BC], tl.float64)
        total_new = tl.zeros([BR, BC], tl.float64)
    if GRAD:
        beta = tl.load(beta_ptr + matrix * beta_stride)
    if CODED:
        scale_entry = scales + matrix.to(tl.int64) * (3 + 3 * WRITE)
        b = (strip % across) * (BC // CODED) + tl.arange(0, BC // CODED)
        blocks = (cols + CODED - 1) // CODED
    for k in tl.static_range(LOOP):
        r = top + k * BR + tl.arange(0, BR)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        old = tl.load(at(entry, r, c, M, UNIT, ALIGNED), mask, other=0)
        if CODED:
            of_block = (r < rows)[:, None] & (b < blocks)[None, :]
            scale = tl.load(at(scale_entry, r, b, tl.uint8, False, False), of_block, other=0)
            before = codes_kernels.restored(old, scale, BR, BC, CODED)
        else:
            before = old.to(tl.float32)
        if GRAD:
            grad = tl.load(at(entry + 3 + 3 * WRITE, r, c, G, UNIT, ALIGNED), mask, other=0.0)
            grad = grad.to(tl.float32)
            share = grad * (1 - beta) if EMA else grad
            after = before * beta + share
            if CODED:
                new, new_scale = codes_kernels.quantized(after, BR, BC, CODED)
            else:
                new = after.to(M)
            if KEEP:  # before it is measured: a norm belongs to what is orthogonalized
                new = tl.where(tl.load(keep_ptr), old, new)
                if CODED:
                    new_scale = tl.where(tl.load(keep_ptr), scale, new_scale)
            if WRITE:
                tl.store(at(entry + 3, r, c, M, UNIT, ALIGNED), new, mask)
                if CODED:
                    into = at(scale_entry + 3, r, b, tl.uint8, False, False)
                    tl.store(into, new_scale, of_block)
            if CODED:
                x = codes_kernels.restored(new, new_scale, BR, BC, CODED)
            else:
                x = new.to(tl.float32)
            if NORMS:
                total_grad += grad.to(tl.float64) * grad.to(tl.float64)
                total_new += x.to(tl.float64) * x.to(tl.float64)
            if NESTEROV:
                x = x * beta + share
            most_grad = tl.maximum(most_grad, grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        else:
            x = before
        # As integers, absolute floats keep their order, with inf above them and NaN above inf: no
        # inf and no NaN is lost.
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        wide = x.to(tl.float64)  # the square of no float32 overflows here
        total += wide * wide
    if not GRAD:
        most_grad = most
    tl.store(largest_ptr + 2 * pid, tl.max(tl.max(most_grad, 1), 0))
    tl.store(largest_ptr + 2 * pid + 1, tl.max(tl.max(most, 1), 0))
    tl.store(squares_ptr + pid, tl.sum(tl.sum(total, 1), 0))
    if NORMS:
        tl.store(norms_ptr + 2 * pid, tl.sum(tl.sum(total_grad, 1), 0))
        tl.store(norms_ptr + 2 * pid + 1, tl.sum(tl.sum(total_new, 1), 0))


@jit(do_not_specialize=["n"])
def combine_kernel(largest_ptr, squares_ptr, out_ptr, n, strips, BLOCK: tl.constexpr):
    """From the strips of one matrix to out [3, n] float32: largest, power, squares."""
    matrix = tl.program_id(0).to(tl.int64)
    most_grad = tl.zeros([BLOCK], tl.int32)
    most = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, strips, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < strips
        found = largest_ptr + 2 * (matrix * strips + k)
        most_grad = tl.maximum(most_grad, tl.load(found, mask, other=0))
        most = tl.maximum(most, tl.load(found + 1, mask, other=0))
        total += tl.load(squares_ptr + matrix * strips + k, mask, other=0.0)
    exponent = tl.maximum(tl.max(most, 0) >> 23, 1)
    power = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    wide = power.to(tl.float64)
    tl.store(out_ptr + matrix, tl.max(most_grad, 0).to(tl.float32, bitcast=True))
    tl.store(out_ptr + n + matrix, power)
    tl.store(out_ptr + 2 * n + matrix, (tl.sum(total, 0) * wide * wide).to(tl.float32))


def launch_front(
    lists: Sequence[list[Tensor]],  # momentums; with write, the new ones; with grad, gradients
    sizes: list[int],
    *,
    grad: bool = True,
    write: bool = False,
    beta: Tensor | None = None,
    keep: Tensor | None = None,
    form: str = "",
    nesterov: bool = False,
    norms: bool = False,
    scales: Sequence[list[Tensor]] = (),  # of momentums that are codes; with write, the new ones
) -> Tensor:
    """[3, n]: the measures; with ``norms`` [5, n]: see measured.py.

    With ``write``, the new momentums are written.
    """
    found = []
    for part, matrices in reference.runs(sizes, lists[0]):
        # In place, the same list is passed twice. It stays one list, so that its key is made once.
        parts = {id(tensors): part_of_list(tensors, part) for tensors in (*lists, *scales)}
        run, of_run = ([parts[id(tensors)] for tensors in each] for each in (lists, scales))
        own = None if beta is None else reference.part_of(beta, matrices)
        found.append(_launch_run(run, of_run, grad, write, own, keep, form, nesterov, norms))
    return reference.joined(found, 1)


def _launch_run(
    lists: Sequence[list[Tensor]],
    scales: Sequence[list[Tensor]],
    grad: bool,
    write: bool,
    beta: Tensor | None,
    keep: Tensor | None,
    form: str,
    nesterov: bool,
    norms: bool,
) -> Tensor:
    first = lists[0][0]
    n, rows, cols = total(lists[0]), *first.shape[-2:]
    if n * rows * cols == 0:
        nothing = reference.stack(lists[0]).float()
        found = torch.stack(reference.measures(nothing, nothing))
        return torch.cat([found, found.new_zeros(2, n)]) if norms else found
    table = matrix_table(*lists)
    of_scales = matrix_table(*scales).entries if scales else None
    high, wide = tile(cols, TILE)
    across = -(-cols // wide)
    strips = across * -(-rows // (high * LOOP))
    largest = first.new_empty((n * strips, 2), dtype=torch.int32)
    squares = first.new_empty(n * strips, dtype=torch.float64)
    out = first.new_empty((3, n), dtype=torch.float32)
    sums = first.new_empty((n, strips, 2), dtype=torch.float64) if norms else None
    # No fusion of products and sums: every variant of the kernel has the same bits.
    launch(
        front_kernel, n * strips, (table.entries, beta, keep, largest, squares, sums, of_scales),
        (
            rows, cols, across, strips, stride_of(beta),
            dtype_of(first), dtype_of(lists[-1][0]),
            table.unit, table.aligned,
            grad, write, keep is not None, form == "ema", nesterov, norms, LOOP, high, wide,
            min(BLOCK, wide) if scales else 0,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    launch(
        combine_kernel, n, (largest, squares, out), (n, strips, 256),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out if sums is None else torch.cat([out, sums.sum(1).sqrt().T.to(out.dtype)])


def _launch_advance(
    into: Lists,
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    keep: Tensor | None,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Tensor:
    lists = (momentums, into[0], grads)
    return launch_front(
        lists, sizes, write=True, beta=beta, keep=keep, form=form, nesterov=nesterov
    )


def launch_measured(
    into: Lists,
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    keep: Tensor | None,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Tensor:
    """[5, n]: see measured.py."""
    how: dict[str, Any] = {"beta": beta, "keep": keep, "form": form, "nesterov": nesterov}
    return launch_front((momentums, into[0], grads), sizes, write=True, norms=True, **how)


def _launch_lookahead(
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Tensor:
    return launch_front((momentums, grads), sizes, beta=beta, form=form, nesterov=nesterov)


def _launch_measure(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return launch_front((tensors,), sizes, grad=False)


def _launch_largest(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return _launch_measure(tensors, sizes)[0].clone()


def measure_fake(tensors: list[Tensor], *rest: Any) -> Tensor:
    shape = (3, total(tensors))
    return tensors[0].new_empty(shape, dtype=compute_dtype(tensors[0].dtype))


def _largest_fake(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return tensors[0].new_empty((total(tensors),), dtype=compute_dtype(tensors[0].dtype))


# ``sizes``: the list is that many tensors of one shape, then that many of another, and so on.
advance = with_kernel(
    "advance",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor? keep, int[] sizes, str form, "
    "bool nesterov) -> (Tensor[], Tensor)",
    _launch_advance,
    measure_fake,
    check=checks.advance,
    writes=("momentums",),
)
lookahead = with_kernel(
    "lookahead",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, int[] sizes, str form, bool nesterov) "
    "-> Tensor",
    _launch_lookahead,
    measure_fake,
    check=checks.lookahead,
)
measure = with_kernel(
    "measure",
    "(Tensor[] tensors, int[] sizes) -> Tensor",
    _launch_measure,
    measure_fake,
    check=checks.measured,
)
largest = with_kernel(
    "largest",
    "(Tensor[] tensors, int[] sizes) -> Tensor",
    _launch_largest,
    _largest_fake,
    check=checks.measured,
)
