"""Which way round a square matrix is iterated on, so that x and its transpose have the same result, transposed, in every bit.

A square matrix has no longer side to lay along the columns: its entries decide. In the first pair of mirror images that differ,
row by row, the larger one belongs above the diagonal. A symmetric matrix has a symmetric result, which rounding does not give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import dtype_of, has_kernel, jit, launch, tl
from .registration import register

AS_IS, FLIPPED, SYMMETRIC = 0, 1, 2


@jit
def orientation_kernel(x_ptr, out_ptr, size, stride_n, stride_r, stride_c, BLOCK: tl.constexpr):
    """One matrix. Nearly always the first row tells."""
    matrix = tl.program_id(0).to(tl.int64)
    x_ptr += matrix * stride_n
    found = 2  # SYMMETRIC
    row = 0
    while (row < size) & (found == 2):
        start = row + 1  # below the diagonal every pair was met before
        while (start < size) & (found == 2):
            c = (start + tl.arange(0, BLOCK)).to(tl.int64)
            here = tl.load(x_ptr + row * stride_r + c * stride_c, c < size, other=0.0).to(tl.float32)
            mirrored = tl.load(x_ptr + c * stride_r + row * stride_c, c < size, other=0.0).to(tl.float32)
            first = tl.min(tl.where(here != mirrored, c, size), 0)
            larger = tl.max(((c == first) & (mirrored > here)).to(tl.int32), 0)
            found = tl.where(first < size, larger, found)
            start += BLOCK
        row += 1
    tl.store(out_ptr + matrix, found)


@jit
def orient_kernel(
    x_ptr, which_ptr, out_ptr, size, tiles, stride_n, stride_r, stride_c, OUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    across = tl.cdiv(size, BLOCK)
    matrix, where = (pid // tiles).to(tl.int64), pid % tiles
    r = ((where // across) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = ((where % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
    which = tl.load(which_ptr + matrix)
    turned = (which == 1) | ((which == 2) & (r < c))
    from_r = tl.where(turned, c, r).to(tl.int64)
    from_c = tl.where(turned, r, c).to(tl.int64)
    mask = (r < size) & (c < size)
    x = tl.load(x_ptr + matrix * stride_n + from_r * stride_r + from_c * stride_c, mask, other=0.0)
    tl.store(out_ptr + (matrix * size + r) * size + c, x.to(OUT), mask)


def _orientation(x: Tensor) -> Tensor:
    n, size, _ = x.shape
    if not has_kernel([x]):
        return orientation_reference(x)
    which = x.new_empty(n, dtype=torch.int32)
    if n:
        launch(orientation_kernel, n, (x, which), (size, *x.stride(), 256), num_warps=4)
    return which


def _orient(x: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
    n, size, _ = x.shape
    if not has_kernel([x]):
        return orient_reference(x, which, dtype)
    out = x.new_empty((n, size, size), dtype=dtype)
    tiles = (-(-size // 64)) ** 2
    if out.numel():
        launch(orient_kernel, n * tiles, (x, which, out), (size, tiles, *x.stride(), dtype_of(out), 64), num_warps=4)
    return out


def orientation_reference(x: Tensor) -> Tensor:
    here, mirrored = x.reshape(x.shape[0], -1), x.mT.reshape(x.shape[0], -1)
    differs = here != mirrored
    first = differs.to(torch.uint8).argmax(-1, keepdim=True)
    flipped = (mirrored.gather(-1, first) > here.gather(-1, first)).squeeze(-1)
    return torch.where(differs.any(-1), flipped.to(torch.int32), SYMMETRIC)


def orient_reference(x: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
    which = which[:, None, None]
    turned = torch.where(which == FLIPPED, x.mT, x)
    return torch.where(which == SYMMETRIC, x.tril() + x.tril(-1).mT, turned).to(dtype).contiguous()


_orientation_op, _ = register(
    "orientation", "(Tensor x) -> Tensor", _orientation, lambda x: x.new_empty(x.shape[0], dtype=torch.int32)
)
_orient_op, _ = register(
    "orient",
    "(Tensor x, Tensor which, ScalarType dtype) -> Tensor",
    _orient,
    lambda x, which, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
)


def orientation(x: Tensor) -> Tensor:
    """[n] int32 for [n, size, size]: `AS_IS`, `FLIPPED` or `SYMMETRIC`."""
    return _orientation_op(x) if has_kernel([x]) else orientation_reference(x)


def orient(x: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
    """Transposed where `FLIPPED`; where `SYMMETRIC`, the lower triangle and its mirror image."""
    return _orient_op(x, which, dtype) if has_kernel([x]) else orient_reference(x, which, dtype)
