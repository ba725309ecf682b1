"""The back pass: scale the update, decay, subtract, or keep every bit where ``skip`` says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import at, dtype_of, jit, launch, matrix_table, tile, tl, with_kernel
from .registration import Lists, empty_like


@jit
def apply_kernel(
    table, update_ptr, factor_ptr, decay_ptr, skip_ptr, rows, cols, across, tiles,
    stride_n, stride_r, stride_c,
    P: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, PURE: tl.constexpr,
    PER_ROW: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile. Table: old and new parameter."""
    pid = tl.program_id(0)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    entry = table + matrix * 6
    down, along = where // across, where % across
    r, c = down * BR + tl.arange(0, BR), along * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    moves = True
    if SKIP:
        moves = tl.load(skip_ptr) == 0
        if not PURE:  # what keeps its bits is not touched at all
            mask = mask & moves
    old = tl.load(at(entry, r, c, P, UNIT, ALIGNED), mask, other=0.0)
    update = update_ptr + matrix * stride_n + (r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c)
    delta = tl.load(update, mask, other=0.0).to(tl.float32)
    if PER_ROW:
        delta = delta * tl.load(factor_ptr + matrix * rows + r, r < rows, other=0.0)[:, None]
    else:
        delta = delta * tl.load(factor_ptr + matrix * cols + c, c < cols, other=0.0)[None, :]
    decay = tl.load(decay_ptr)
    wide = old.to(tl.float32)
    share = wide * tl.where(delta * wide >= 0, decay, 0.0) if CAUTIOUS else wide * decay
    new = (wide - (share + delta)).to(P)
    if SKIP and PURE:
        new = tl.where(moves, new, old)
    tl.store(at(entry + 3, r, c, P, UNIT, ALIGNED), new, mask)


def _apply(
    into: Lists, params: list[Tensor], update: Tensor, factor: Tensor, decay: Tensor, skip: Tensor | None, cautious: bool
) -> None:
    n, rows, cols = update.shape
    if update.numel() == 0:
        return
    places = matrix_table(params, into[0])
    high, wide = tile(cols, 4096) if update.stride(2) == 1 else (64, 64)
    across = -(-cols // wide)
    tiles = across * -(-rows // high)
    launch(
        apply_kernel, n * tiles, (places.entries, update, factor.contiguous(), decay, skip),
        (
            rows, cols, across, tiles, *update.stride(), dtype_of(params[0]), places.unit, places.aligned,
            into[0][0] is not params[0], factor.shape[1:] == (rows, 1), skip is not None, cautious, high, wide,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _apply_fake(params: list[Tensor], *rest: Any) -> list[Tensor]:
    return empty_like(params)


apply, apply_ = with_kernel(
    "apply",
    "(Tensor[] params, Tensor update, Tensor factor, Tensor decay, Tensor? skip, bool cautious) -> Tensor[]",
    _apply,
    _apply_fake,
    writes=("params",),
)
