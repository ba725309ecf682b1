"""Which way round a square matrix is iterated on.

x and its transpose must have the same result, transposed, in every bit. A matrix that is not square
has its longer side along the columns. For a square matrix the entries decide: in the first pair of
mirror images that differ, row by row, the larger one belongs above the diagonal. A symmetric matrix
must have a symmetric result, which rounding alone does not ensure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import dtype_of, has_kernel, jit, launch, tl
from .registration import register

AS_IS, FLIPPED, SYMMETRIC = 0, 1, 2


@jit
def orientation_kernel(x_ptr, out_ptr, size, stride_n, stride_r, stride_c, BLOCK: tl.constexpr):
    """One matrix. Nearly always its first row decides."""
    matrix = tl.program_id(0).to(tl.int64)
    x_ptr += matrix * stride_n
    found = 2  # SYMMETRIC
    row = 0
    while (row < size) & (found == 2):
        start = row + 1  # below the diagonal every pair was met before
        while (start < size) & (found == 2):
            c = (start + tl.arange(0, BLOCK)).to(tl.int64)
            entries = tl.load(x_ptr + row * stride_r + c * stride_c, c < size, other=0.0)
            mirrored = tl.load(x_ptr + c * stride_r + row * stride_c, c < size, other=0.0)
            entries, mirrored = entries.to(tl.float32), mirrored.to(tl.float32)
            first = tl.min(tl.where(entries != mirrored, c, size), 0)
            larger = tl.max(((c == first) & (mirrored > entries)).to(tl.int32), 0)
            found = tl.where(first < size, larger, found)
            start += BLOCK
        row += 1
    tl.store(out_ptr + matrix, found)


@jit
def orient_kernel(
    x_ptr, which_ptr, power_ptr, inverse_ptr, out_ptr, size, tiles,
    stride_n, stride_r, stride_c,
    OUT: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile, from its own place or from its mirror image.

    Each is loaded along its own rows, and only the entries that are used.
    """
    pid = tl.program_id(0)
    across = tl.cdiv(size, BLOCK)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    x_ptr += matrix * stride_n
    r = (where // across) * BLOCK + tl.arange(0, BLOCK)
    c = (where % across) * BLOCK + tl.arange(0, BLOCK)
    wide_r, wide_c = r.to(tl.int64), c.to(tl.int64)
    mask = (r < size)[:, None] & (c < size)[None, :]
    mirrored_mask = (c < size)[:, None] & (r < size)[None, :]
    which = tl.load(which_ptr + matrix)
    # FLIPPED: every entry is turned. SYMMETRIC: those above the diagonal. AS_IS: none.
    first = tl.where(which == 1, -size, tl.where(which == 2, 0, size))
    turned = (r + first)[:, None] < c[None, :]
    mirrored_turned = (r + first)[None, :] < c[:, None]
    direct = tl.load(
        x_ptr + wide_r[:, None] * stride_r + wide_c[None, :] * stride_c,
        mask & (turned == 0),
        other=0.0,
    )
    mirrored = tl.load(
        x_ptr + wide_c[:, None] * stride_r + wide_r[None, :] * stride_c,
        mirrored_mask & mirrored_turned,
        other=0.0,
    )
    x = tl.where(turned, tl.trans(mirrored), direct)
    if SCALED:
        x = (x.to(tl.float32) * tl.load(power_ptr + matrix)) * tl.load(inverse_ptr + matrix)
    tl.store(out_ptr + (matrix * size + wide_r[:, None]) * size + c[None, :], x.to(OUT), mask)


def _run_orientation(x: Tensor) -> Tensor:
    n, size, _ = x.shape
    if not has_kernel([x]):
        return orientation_reference(x)
    which = x.new_empty(n, dtype=torch.int32)
    if n:
        launch(
            orientation_kernel, n, (x, which), (size, *x.stride(), 256),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return which


def _run_orient(
    x: Tensor, which: Tensor, dtype: torch.dtype, power: Tensor | None, inverse: Tensor | None
) -> Tensor:
    n, size, _ = x.shape
    if not has_kernel([x]):
        return orient_reference(x, which, dtype, power, inverse)
    out = x.new_empty((n, size, size), dtype=dtype)
    tiles = (-(-size // _BLOCK)) ** 2
    if out.numel():
        scales = tuple(x if x is None else x.contiguous() for x in (power, inverse))
        launch(
            orient_kernel, n * tiles, (x, which, *scales, out),
            (size, tiles, *x.stride(), dtype_of(out), power is not None, _BLOCK),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


_BLOCK = 64


def orientation_reference(x: Tensor) -> Tensor:
    entries, mirrored = x.reshape(x.shape[0], -1), x.mT.reshape(x.shape[0], -1)
    differs = entries != mirrored
    first = differs.to(torch.uint8).argmax(-1, keepdim=True)
    flipped = (mirrored.gather(-1, first) > entries.gather(-1, first)).squeeze(-1)
    return torch.where(differs.any(-1), flipped.to(torch.int32), SYMMETRIC)


def orient_reference(
    x: Tensor,
    which: Tensor,
    dtype: torch.dtype,
    power: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    which = which[:, None, None]
    turned = torch.where(which == FLIPPED, x.mT, x)
    turned = torch.where(which == SYMMETRIC, x.tril() + x.tril(-1).mT, turned)
    if power is not None and inverse is not None:
        turned = turned.to(power.dtype) * power[:, None, None] * inverse[:, None, None]
    return turned.to(dtype).contiguous()


_orientation_op, _ = register(
    "orientation",
    "(Tensor x) -> Tensor",
    _run_orientation,
    lambda x: x.new_empty(x.shape[0], dtype=torch.int32),
)
_orient_op, _ = register(
    "orient",
    "(Tensor x, Tensor which, ScalarType dtype, Tensor? power, Tensor? inverse) -> Tensor",
    _run_orient,
    lambda x, which, dtype, *scales: x.new_empty(x.shape, dtype=dtype),
)


def orientation(
    x: Tensor,  # [n, size, size], of any floating dtype
) -> Tensor:
    """[n] int32: `AS_IS`, `FLIPPED` or `SYMMETRIC` for each matrix."""
    return _orientation_op(x) if has_kernel([x]) else orientation_reference(x)


def orient(
    x: Tensor,  # [n, size, size], of any floating dtype
    which: Tensor,  # [n] int32, from `orientation`
    dtype: torch.dtype,
    power: Tensor | None = None,  # [n] fp32
    inverse: Tensor | None = None,  # [n] fp32
) -> Tensor:
    """``(x * power) * inverse`` in ``dtype``: [n, size, size], contiguous.

    Matrices are transposed where they are `FLIPPED`. Where they are `SYMMETRIC`, the result is the
    lower triangle and its mirror image.
    """
    return (_orient_op if has_kernel([x]) else orient_reference)(x, which, dtype, power, inverse)
