"""From tensors to the stack that is orthogonalized: scaled, cast, transposed where they are to be turned, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch import at, dtype_of, jit, launch, matrix_table, tile, tl, with_kernel
from .lists import count


@jit
def gather_kernel(
    table, beta_ptr, power_ptr, inverse_ptr, out_ptr, rows, cols, across, tiles,
    M: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    AHEAD: tl.constexpr, EMA: tl.constexpr, NESTEROV: tl.constexpr, TALL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile. Table: momentum, gradient (AHEAD or NESTEROV)."""
    pid = tl.program_id(0)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    entry = table + matrix * (3 + 3 * (AHEAD or NESTEROV))
    r = (where // across) * BR + tl.arange(0, BR)
    c = (where % across) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    x = tl.load(at(entry, r, c, M, UNIT, ALIGNED), mask, other=0.0).to(tl.float32)
    if AHEAD or NESTEROV:
        beta = tl.load(beta_ptr)
        grad = tl.load(at(entry + 3, r, c, G, UNIT, ALIGNED), mask, other=0.0).to(tl.float32)
        share = grad * (1 - beta) if EMA else grad
        if AHEAD:
            x = (x * beta + share).to(M).to(tl.float32)
        if NESTEROV:
            x = x * beta + share
    x = ((x * tl.load(power_ptr + matrix)) * tl.load(inverse_ptr + matrix)).to(
        out_ptr.dtype.element_ty
    )
    base = out_ptr + matrix * rows * cols
    if TALL:
        out = base + (c.to(tl.int64)[:, None] * rows + r[None, :])
        tl.store(out, tl.trans(x), (c < cols)[:, None] & (r < rows)[None, :])
    else:
        tl.store(base + (r.to(tl.int64)[:, None] * cols + c[None, :]), x, mask)


def _gather(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, power: Tensor, inverse: Tensor,
    sizes: list[int], form: str, nesterov: bool, ahead: bool, dtype: torch.dtype, turn: list[bool],
) -> Tensor:  # fmt: skip
    out = _gather_fake(
        momentums, grads, beta, power, inverse, sizes, form, nesterov, ahead, dtype, turn
    )
    power, inverse = power.contiguous(), inverse.contiguous()
    for (part, slots), tall in zip(reference.runs(sizes, momentums), turn, strict=True):
        own = momentums[part]
        rows, cols = own[0].shape[-2:]
        n = sum(map(count, own))
        if n * rows * cols == 0:
            continue
        places = matrix_table(*([own, grads[part]] if ahead or nesterov else [own]))
        high, wide = (64, 64) if tall else tile(cols, 4096)
        across = -(-cols // wide)
        tiles = across * -(-rows // high)
        launch(
            gather_kernel, n * tiles, (places.entries, beta, power[slots], inverse[slots], out[slots]),
            (
                rows, cols, across, tiles, dtype_of(own[0]), dtype_of(grads[part][0]), places.unit, places.aligned,
                ahead, form == "ema", nesterov, tall, high, wide,
            ),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _gather_fake(
    momentums: list[Tensor], grads: list[Tensor], beta: Tensor, power: Tensor, inverse: Tensor,
    sizes: list[int], form: str, nesterov: bool, ahead: bool, dtype: torch.dtype, turn: list[bool],
) -> Tensor:  # fmt: skip
    rows, cols = momentums[0].shape[-2:]
    shape = (cols, rows) if turn[0] else (rows, cols)
    return momentums[0].new_empty((sum(map(count, momentums)), *shape), dtype=dtype)


_gathered, _ = with_kernel(
    "gather",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor power, Tensor inverse, int[] sizes, str form, bool nesterov, "
    "bool ahead, ScalarType dtype, bool[] turn) -> Tensor",
    _gather,
    _gather_fake,
)


def gather(*arguments: Any, stacks: list[Tensor] | None = None) -> Tensor:
    """``turn``: which of the ``sizes`` are transposed. ``stacks``: the momentums as stacks, where `advance`'s twin has them."""
    return _gathered(*arguments) if stacks is None else reference.gather(*arguments, stacks=stacks)  # type: ignore[misc]
