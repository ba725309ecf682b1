"""From tensors to the stack that is orthogonalized, in one pass.

The momentum's update is scaled, cast, and transposed where it is tall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, codes_kernels, reference
from .codes import BLOCK
from .implementations import with_kernel
from .launch import at, dtype_of, jit, launch, stride_of, tile, tl
from .lists import part_of_list, total
from .tables import matrix_table


@jit(do_not_specialize_on_alignment=["beta_ptr", "power_ptr", "inverse_ptr"])
def gather_kernel(
    table, beta_ptr, power_ptr, inverse_ptr, out_ptr, scales,
    rows, cols, across, tiles, beta_stride,
    M: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    AHEAD: tl.constexpr, EMA: tl.constexpr, NESTEROV: tl.constexpr, TRANSPOSE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One tile. Table: the momentum, the gradient (AHEAD or NESTEROV). CODED, scales: advance.py"""
    pid = tl.program_id(0)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    entry = table + matrix * (3 + 3 * (AHEAD or NESTEROV))
    r = (where // across) * BR + tl.arange(0, BR)
    c = (where % across) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    x = tl.load(at(entry, r, c, M, UNIT, ALIGNED), mask, other=0)
    if CODED:
        b = (where % across) * (BC // CODED) + tl.arange(0, BC // CODED)
        of_block = (r < rows)[:, None] & (b < (cols + CODED - 1) // CODED)[None, :]
        scale = tl.load(at(scales + matrix * 3, r, b, tl.uint8, False, False), of_block, other=0)
        x = codes_kernels.restored(x, scale, BR, BC, CODED)
    else:
        x = x.to(tl.float32)
    if AHEAD or NESTEROV:
        beta = tl.load(beta_ptr + matrix * beta_stride)
        grad = tl.load(at(entry + 3, r, c, G, UNIT, ALIGNED), mask, other=0.0).to(tl.float32)
        share = grad * (1 - beta) if EMA else grad
        if AHEAD:
            x = x * beta + share
            if CODED:
                new, scale = codes_kernels.quantized(x, BR, BC, CODED)
                x = codes_kernels.restored(new, scale, BR, BC, CODED)
            else:
                x = x.to(M).to(tl.float32)
        if NESTEROV:
            x = x * beta + share
    x = (x * tl.load(power_ptr + matrix)) * tl.load(inverse_ptr + matrix)
    x = x.to(out_ptr.dtype.element_ty)
    base = out_ptr + matrix * rows * cols
    if TRANSPOSE:
        out = base + (c.to(tl.int64)[:, None] * rows + r[None, :])
        tl.store(out, tl.trans(x), (c < cols)[:, None] & (r < rows)[None, :])
    else:
        tl.store(base + (r.to(tl.int64)[:, None] * cols + c[None, :]), x, mask)


def launch_gather(
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
    scales: list[Tensor] | None = None,  # of momentums that are codes
) -> Tensor:
    out, reads_beta = _new_stack(momentums, dtype, transpose), ahead or nesterov
    power, inverse = power.contiguous(), inverse.contiguous()
    for (part, slots), transposed in zip(reference.runs(sizes, momentums), transpose, strict=True):
        run = part_of_list(momentums, part)
        rows, cols = run[0].shape[-2:]
        n = total(run)
        if n * rows * cols == 0:
            continue
        table = matrix_table(*([run, part_of_list(grads, part)] if reads_beta else [run]))
        of_scales = matrix_table(part_of_list(scales, part)).entries if scales else None
        high, wide = (64, 64) if transposed else tile(cols, 4096)
        across = -(-cols // wide)
        tiles = across * -(-rows // high)
        own = reference.part_of(beta, slots) if reads_beta else beta
        launch(
            gather_kernel, n * tiles,
            (table.entries, own, power[slots], inverse[slots], out[slots], of_scales),
            (
                rows, cols, across, tiles, stride_of(own) if reads_beta else 0,
                dtype_of(run[0]), dtype_of(grads[part][0]),
                table.unit, table.aligned, ahead, form == "ema", nesterov, transposed, high, wide,
                min(BLOCK, wide) if scales else 0,
            ),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def gather_fake(
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
) -> Tensor:
    return _new_stack(momentums, dtype, transpose)


def _new_stack(momentums: list[Tensor], dtype: torch.dtype, transpose: list[bool]) -> Tensor:
    rows, cols = momentums[0].shape[-2:]
    shape = (cols, rows) if transpose[0] else (rows, cols)
    return momentums[0].new_empty((total(momentums), *shape), dtype=dtype)


gather = with_kernel(
    "gather",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor power, Tensor inverse, int[] sizes, "
    "str form, bool nesterov, bool ahead, ScalarType dtype, bool[] transpose) -> Tensor",
    launch_gather,
    gather_fake,
    check=checks.gather,
)
