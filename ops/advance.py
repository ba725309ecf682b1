"""The front pass: gradients into momentums, and what it takes to bring the update to norm 1.

``advance`` gives the new momentums; ``lookahead`` measures the same without writing, for a step that may write them only once
every rank agrees; ``measure`` takes tensors as they are. The three measure each of the n matrices:

    largest   the gradient's largest entry: not finite if any entry is not
    power     the power of two that brings the update's largest entry into [2, 4)
    squares   sum((update * power)**2)

``largest`` gives only the first of these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch import at, dtype_of, jit, launch, matrix_table, tile, tl, with_kernel
from .lists import count
from .reference import Measures, compute_dtype
from .registration import Lists, empty_like


@jit
def front_kernel(
    table, beta_ptr, keep_ptr, largest_ptr, squares_ptr, rows, cols, across, strips,
    M: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    GRAD: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr, EMA: tl.constexpr, NESTEROV: tl.constexpr,
    LOOP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One strip of LOOP tiles, one below the other. Table: momentum, where the new one goes, gradient (WRITE, GRAD)."""
    pid = tl.program_id(0)
    matrix, strip = pid // strips, pid % strips
    entry = table + matrix.to(tl.int64) * (3 + 3 * WRITE + 3 * GRAD)
    c = (strip % across) * BC + tl.arange(0, BC)
    top = (strip // across) * (LOOP * BR)
    most_grad = tl.zeros([BR, BC], tl.int32)
    most = tl.zeros([BR, BC], tl.int32)
    total = tl.zeros([BR, BC], tl.float64)
    if GRAD:
        beta = tl.load(beta_ptr)
    for k in tl.static_range(LOOP):
        r = top + k * BR + tl.arange(0, BR)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        old = tl.load(at(entry, r, c, M, UNIT, ALIGNED), mask, other=0.0)
        if GRAD:
            grad = tl.load(at(entry + 3 + 3 * WRITE, r, c, G, UNIT, ALIGNED), mask, other=0.0).to(
                tl.float32
            )
            share = grad * (1 - beta) if EMA else grad
            new = (old.to(tl.float32) * beta + share).to(M)
            if WRITE:
                kept = tl.where(tl.load(keep_ptr), old, new) if KEEP else new
                tl.store(at(entry + 3, r, c, M, UNIT, ALIGNED), kept, mask)
            x = new.to(tl.float32)
            if NESTEROV:
                x = x * beta + share
            most_grad = tl.maximum(most_grad, grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        else:
            x = old.to(tl.float32)
        # As integers, absolute floats keep their order, inf above them and NaN above inf: none is lost.
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        wide = x.to(tl.float64)  # the square of no float32 overflows here
        total += wide * wide
    if not GRAD:
        most_grad = most
    tl.store(largest_ptr + 2 * pid, tl.max(tl.max(most_grad, 1), 0))
    tl.store(largest_ptr + 2 * pid + 1, tl.max(tl.max(most, 1), 0))
    tl.store(squares_ptr + pid, tl.sum(tl.sum(total, 1), 0))


@jit
def combine_kernel(largest_ptr, squares_ptr, out_ptr, n, strips, BLOCK: tl.constexpr):
    """The strips of one matrix -> out [3, n] float32: largest, power, squares."""
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


def _front(
    into: list[Tensor] | None, momentums: list[Tensor], grads: list[Tensor] | None, beta: Tensor | None, keep: Tensor | None,
    sizes: list[int], form: str, nesterov: bool,
) -> Tensor:  # fmt: skip
    pieces = []
    for part, _ in reference.runs(sizes, momentums):
        own = momentums[part]
        lists = [
            own if x is momentums else x[part] for x in (momentums, into, grads) if x is not None
        ]
        pieces.append(
            _front_run(lists, grads is not None, into is not None, beta, keep, form, nesterov)
        )
    return reference.joined(pieces, 1)


def _front_run(
    lists: Sequence[list[Tensor]],
    grad: bool,
    write: bool,
    beta: Tensor | None,
    keep: Tensor | None,
    form: str,
    nesterov: bool,
) -> Tensor:
    first = lists[0][0]
    n, rows, cols = sum(map(count, lists[0])), *first.shape[-2:]
    if n * rows * cols == 0:
        nothing = reference.stack(lists[0]).float()
        return torch.stack(reference.measures(nothing, nothing))
    places = matrix_table(*lists)
    (high, wide), loop = tile(cols, _TILE), _LOOP
    across = -(-cols // wide)
    strips = across * -(-rows // (high * loop))
    largest = first.new_empty((n * strips, 2), dtype=torch.int32)
    squares = first.new_empty(n * strips, dtype=torch.float64)
    out = first.new_empty((3, n), dtype=torch.float32)
    launch(
        front_kernel, n * strips, (places.entries, beta, keep, largest, squares),
        (
            rows, cols, across, strips, dtype_of(first), dtype_of(lists[-1][0]), places.unit, places.aligned,
            grad, write, keep is not None, form == "ema", nesterov, loop, high, wide,
        ),
        num_warps=4, enable_fp_fusion=False,  # the same bits, whatever else a variant of the kernel does
    )  # fmt: skip
    launch(combine_kernel, n, (largest, squares, out), (n, strips, 256), num_warps=4)
    return out


_TILE, _LOOP = 2048, 4


def _advance(
    into: Lists, momentums: list[Tensor], grads: list[Tensor], beta: Tensor, keep: Tensor | None, sizes: list[int],
    form: str, nesterov: bool,
) -> Tensor:  # fmt: skip
    return _front(into[0], momentums, grads, beta, keep, sizes, form, nesterov)


def _lookahead(
    momentums: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Tensor:
    return _front(None, momentums, grads, beta, None, sizes, form, nesterov)


def _measure(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return _front(None, tensors, None, None, None, sizes, "", False)


def _largest(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return _measure(tensors, sizes)[0].clone()


def _measure_fake(tensors: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty(
        (3, sum(map(count, tensors))), dtype=compute_dtype(tensors[0].dtype)
    )


def _largest_fake(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    return tensors[0].new_empty(sum(map(count, tensors)), dtype=compute_dtype(tensors[0].dtype))


def _advance_fake(momentums: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    return empty_like(momentums), _measure_fake(momentums)


# ``sizes``: the list is that many tensors of one shape, then that many of another, ...
_advanced, _advanced_ = with_kernel(
    "advance",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor? keep, int[] sizes, str form, bool nesterov) "
    "-> (Tensor[], Tensor)",
    _advance,
    _advance_fake,
    writes=("momentums",),
)
_looked_ahead, _ = with_kernel(
    "lookahead",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, int[] sizes, str form, bool nesterov) -> Tensor",
    _lookahead,
    _measure_fake,
)
_measured, _ = with_kernel(
    "measure", "(Tensor[] tensors, int[] sizes) -> Tensor", _measure, _measure_fake
)
largest, _ = with_kernel(
    "largest", "(Tensor[] tensors, int[] sizes) -> Tensor", _largest, _largest_fake
)


Advanced = tuple[
    list[Tensor], Measures, list[Tensor] | None
]  # the new momentums; the last: as stacks, from the twin


def advance(*arguments: Any) -> Advanced:
    new, measures, *stacks = _advanced(*arguments)
    return new, _measures(measures), stacks[0] if stacks else None


def advance_(*arguments: Any) -> Advanced:
    new, measures, *stacks = _advanced_(*arguments)
    return new, _measures(measures), stacks[0] if stacks else None


def lookahead(*arguments: Any) -> Measures:
    return _measures(_looked_ahead(*arguments))


def measure(*arguments: Any) -> Measures:
    return _measures(_measured(*arguments))


def _measures(found: Tensor | Measures) -> Measures:
    """The operator's [3, n] as what the twin gives."""
    if isinstance(found, tuple):
        return found
    largest, power, squares = found.unbind(0)
    return largest, power, squares
