"""The back pass: scale the update, decay, subtract, or keep every bit where ``skip`` says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .implementations import with_kernel
from .launch import at, dtype_of, jit, launch, stride_of, tile, tl
from .registration import Lists
from .rounding_kernels import joined_with, parted, rounded_by_chance
from .tables import matrix_table, salt_table


@jit(do_not_specialize_on_alignment=["decay_ptr", "skip_ptr", "step_ptr"])
def apply_kernel(
    table, update_ptr, factor_ptr, decay_ptr, skip_ptr, salts, step_ptr, norms_ptr,
    rows, cols, across, tiles, stride_n, stride_r, stride_c, decay_stride,
    P: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, PURE: tl.constexpr,
    PER_ROW: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr, CHANCE: tl.constexpr,
    NORMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile. Table: the old and the new parameter; with R, the old and the new rest."""
    pid = tl.program_id(0)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    WIDE: tl.constexpr = R is not None
    MANTISSA: tl.constexpr = tl.int16 == R
    entry = table + matrix * (12 if WIDE else 6)
    down, along = where // across, where % across
    r, c = down * BR + tl.arange(0, BR), along * BC + tl.arange(0, BC)
    moves = True
    below = rows
    if SKIP:
        moves = tl.load(skip_ptr) == 0
        if not PURE:  # in place, what keeps its bits is not written at all
            below = tl.where(moves, rows, 0)
    written = (r < below)[:, None] & (c < cols)[None, :]
    mask = written
    if NORMS:  # of what keeps its bits too
        mask = (r < rows)[:, None] & (c < cols)[None, :]
    old = tl.load(at(entry, r, c, P, UNIT, ALIGNED), mask, other=0.0)
    update = (
        update_ptr
        + matrix * stride_n
        + (r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c)
    )
    delta = tl.load(update, mask, other=0.0).to(tl.float32)
    if PER_ROW:
        delta = delta * tl.load(factor_ptr + matrix * rows + r, r < rows, other=0.0)[:, None]
    else:
        delta = delta * tl.load(factor_ptr + matrix * cols + c, c < cols, other=0.0)[None, :]
    decay = tl.load(decay_ptr + matrix * decay_stride)
    if WIDE:
        old_rest = tl.load(at(entry + 6, r, c, R, UNIT, ALIGNED), mask, other=0)
        wide = joined_with(old, old_rest, MANTISSA)
    else:
        wide = old.to(tl.float32)
    if NORMS:
        w, u = wide.to(tl.float64), tl.where(mask, delta, 0.0).to(tl.float64)
        tl.store(norms_ptr + 2 * pid, tl.sum(tl.sum(w * w, 1), 0))
        tl.store(norms_ptr + 2 * pid + 1, tl.sum(tl.sum(u * u, 1), 0))
    share = wide * tl.where(delta * wide >= 0, decay, 0.0) if CAUTIOUS else wide * decay
    moved = wide - (share + delta)
    if WIDE:
        new, rest = parted(moved, P, MANTISSA)
        if SKIP and PURE:
            rest = tl.where(moves, rest, old_rest)
        tl.store(at(entry + 9, r, c, R, UNIT, ALIGNED), rest, written)
    elif CHANCE:
        index = (r[:, None] * cols + c[None, :]).to(tl.uint32)
        salt, step = tl.load(salts + matrix).to(tl.uint32), tl.load(step_ptr).to(tl.uint32)
        new = rounded_by_chance(moved, P, salt, index, step)
    else:
        new = moved.to(P)
    if SKIP and PURE:
        new = tl.where(moves, new, old)
    tl.store(at(entry + 3, r, c, P, UNIT, ALIGNED), new, written)


def _launch_apply(
    into: Lists,
    params: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
) -> None:
    table = None if step is None else salt_table(salts, update.device)
    _launch((params, into[0]), update, factor, decay, skip, cautious, table, step)


def _launch_apply_wide(
    into: Lists,
    params: list[Tensor],
    rests: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
) -> None:
    _launch((params, into[0], rests, into[1]), update, factor, decay, skip, cautious)


def launch_measured(
    into: Lists,
    params: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
    step: Tensor | None = None,
    salts: Sequence[int] = (),
) -> Tensor:
    """[2, n]: see measured.py."""
    table = None if step is None else salt_table(salts, update.device)
    found = _launch((params, into[0]), update, factor, decay, skip, cautious, table, step, True)
    assert found is not None
    return found


def launch_measured_wide(
    into: Lists,
    params: list[Tensor],
    rests: list[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
) -> Tensor:
    """The same with float32 masters."""
    lists = (params, into[0], rests, into[1])
    found = _launch(lists, update, factor, decay, skip, cautious, norms=True)
    assert found is not None
    return found


def _launch(
    lists: Lists,  # old and new parameters; with masters, old and new rests
    update: Tensor,
    factor: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    cautious: bool,
    salts: Tensor | None = None,
    step: Tensor | None = None,
    norms: bool = False,
) -> Tensor | None:
    """With ``norms`` [2, n]: see measured.py."""
    n, rows, cols = update.shape
    if update.numel() == 0:
        return factor.new_zeros(2, n) if norms else None
    table = matrix_table(*lists)
    high, wide = tile(cols, 4096) if update.stride(2) == 1 else (64, 64)
    across = -(-cols // wide)
    tiles = across * -(-rows // high)
    pure = lists[1][0] is not lists[0][0]
    per_row = factor.shape[1:] == (rows, 1)
    rest_dtype = dtype_of(lists[2][0]) if len(lists) > 2 else None
    sums = update.new_empty((n, tiles, 2), dtype=torch.float64) if norms else None
    launch(
        apply_kernel, n * tiles,
        (table.entries, update, factor.contiguous(), decay, skip, salts, step, sums),
        (
            rows, cols, across, tiles, *update.stride(), stride_of(decay),
            dtype_of(lists[0][0]), rest_dtype,
            table.unit, table.aligned, pure, per_row, skip is not None, cautious, step is not None,
            norms, high, wide,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return None if sums is None else sums.sum(1).sqrt().T.to(factor.dtype)


_UPDATE = "Tensor update, Tensor factor, Tensor decay, Tensor? skip, bool cautious"

apply = with_kernel(
    "apply",
    f"(Tensor[] params, {_UPDATE}, Tensor? step=None, int[] salts=[]) -> Tensor[]",
    _launch_apply,
    check=checks.apply,
    writes=("params",),
)
apply_wide = with_kernel(
    "apply_wide",
    f"(Tensor[] params, Tensor[] rests, {_UPDATE}) -> (Tensor[], Tensor[])",
    _launch_apply_wide,
    check=checks.apply_wide,
    writes=("params", "rests"),
)
