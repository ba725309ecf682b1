"""The orthogonal polar factor of a matrix, ``U V^T`` for ``x = U S V^T``, by Newton-Schulz.

    x  -prescale->  largest entry in [2, 4)  -to_unit_norm->  Frobenius norm 1  -iterate->  factor

Prescaling divides by a power of two taken from the largest entry's exponent, which is exact.
Everything after it sees the same bits for ``x`` and ``2**k * x``, as long as all non-zero entries
of both are normal numbers: no eps and no floor is needed anywhere, and zero maps to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..compat import has_bfloat16_matrix_unit
from ..compat.graphs import certainly
from ..types import COMPUTE_DTYPES, Method
from .coefficients import CoefficientSet, gram_restarts

# float16 has 5 bits of exponent: a matrix of Frobenius norm 1 is carried as 2^6 X, so that small
# rows stay normal numbers. The library stores 2^12 X X^T before it is scaled, whose entries at a
# restart reach 2^12 times 3.97 (singular values of 1.99 after the first steps of `cans`): a quarter
# of what fits. With 2^7 the room was 1 % (`cans`) and 3 % (Polar Express).
_CARRY = {torch.float16: 2.0**6}


def orthogonalize_whole(x: Tensor, chosen: CoefficientSet, form: Form) -> Tensor:
    """`orthogonalize` of a plain tensor, with all that is static decided."""
    if x.numel() == 0:
        return x.clone()
    stack = x.reshape(-1, *x.shape[-2:])
    which = ops.orientation(stack) if x.shape[-2] == x.shape[-1] else None
    out = newton_schulz(stack, chosen, form, x.dtype, which)
    return (out.mT if x.shape[-2] > x.shape[-1] else out).reshape(x.shape)


class Form(NamedTuple):
    """How a stack is iterated on: everything that the shape decides."""

    method: Method  # "standard" or "gram"
    dtype: torch.dtype  # of the products
    restarts: tuple[int, ...] = ()  # of the Gram form
    products: Literal["library", "symmetric"] = (
        "library"  # torch.bmm, or our kernels that compute half of what is symmetric
    )


def choose(
    chosen: CoefficientSet,
    method: Method,
    dtype: torch.dtype | None,
    rows: int,
    cols: int,
    device: torch.device,
    of: torch.dtype,
) -> Form:
    """The form for matrices ``rows <= cols`` of dtype ``of``, where the caller left it open.

    Gram pays from cols/rows = 1.5 (fewer FLOP even without symmetric kernels), if its restarts do
    not eat the gain. bfloat16 makes it unsafe (singular values up to 2.0 where the polynomial has
    1.14), so bfloat16 takes the standard form. So does a caller who asks for float32 or float64,
    for exactness. Worst entry in float32, standard against Gram: 256x512 5.0e-7 against 6.8e-7
    (quintic) and 9.2e-7 against 1.9e-6 (Polar Express), 512x1024 2.8e-7 against 4.9e-7 and 5.0e-7
    against 1.5e-6; the standard form took 0.9 to 1.4 times as long (one CPU core, 2026-11-28).
    """
    if method not in ("auto", "standard", "gram"):
        raise ValueError(f"method: expected 'auto', 'standard' or 'gram', got {method!r}")
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected None or one of {COMPUTE_DTYPES}, got {dtype!r}")
    half = has_bfloat16_matrix_unit(device) and of != torch.float64
    wide = cols >= WIDE * rows
    if method == "auto":
        open_ = dtype is None and not (half and device.type != "cuda")
        safe = dtype == torch.float16 or open_
        pays = safe and wide and len(gram_restarts(chosen.rows)) <= 1 + len(chosen.rows) // 5
        method = "gram" if pays else "standard"
    if dtype is None:
        if half:
            dtype = torch.float16 if method == "gram" else torch.bfloat16
        else:
            dtype = torch.float64 if of == torch.float64 else torch.float32
    restarts = (
        () if method == "standard" else gram_restarts(chosen.rows, careful=rows < FEW or not wide)
    )
    kernels = (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and rows >= SYMMETRIC_FROM
    )
    return Form(method, dtype, restarts, "symmetric" if kernels else "library")


# Rows. Five steps on 48 square matrices in bfloat16, by cuBLAS and by our kernels: 192 133 and
# 141 us, 256 208 and 174, 384 381 and 338, 512 638 and 457 (H200, torch 2.11, triton 3.6,
# 2026-11-28). A launch of ours costs the host 60 us, of cuBLAS 20, which 256 rows would wait for.
SYMMETRIC_FROM = 320
FEW = 64  # rows: of so few the Gram form restarts more often
WIDE = 1.5  # columns a row, from where the Gram form pays


def newton_schulz(
    x: Tensor, chosen: CoefficientSet, form: Form, dtype: torch.dtype, which: Tensor | None = None
) -> Tensor:
    """`iterate` on `to_unit_norm`, in ``dtype`` and without the carried factor.

    Tall ones come transposed; square ones are iterated on as ``which`` has them, and come as they
    were.
    """
    out = iterate(to_unit_norm(x, chosen, form.dtype, which), chosen, form)
    carried = carry(form.dtype)
    one = torch.ones(out.shape[0], dtype=torch.float32, device=out.device)
    if which is not None:
        return ops.orient(out, which, dtype, *((one, one / carried) if carried != 1.0 else ()))
    if carried == 1.0:
        return without_lines(out.to(dtype))
    return ops.scale_and_cast(out, one, one / carried, dtype)


def without_lines(x: Tensor) -> Tensor:
    """``x``, or a copy where it is a part of a larger stack, whose memory it would keep."""
    apart = certainly(x.stride(0) > x.shape[1] * x.shape[2])
    return x.clone(memory_format=torch.contiguous_format) if apart else x


def carry(dtype: torch.dtype) -> float:
    """The power of two that `to_unit_norm` multiplies a matrix by, and `iterate` leaves in it."""
    return _CARRY.get(dtype, 1.0)


def to_unit_norm(
    x: Tensor, chosen: CoefficientSet, dtype: torch.dtype, which: Tensor | None = None
) -> Tensor:
    """Frobenius norm ``1 / norm_factor``, times `carry`, in ``dtype``. Zero stays zero, NaN stays
    NaN.

    Tall ones come transposed, square ones as ``which`` (of `ops.orientation`) has them.
    """
    # Without kernels the order of the sums shows in the last bit.
    if which is not None and not ops.kernels_for(x.device, [x.dtype]):
        x, which = ops.orient(x, which, x.dtype), None
    _, power, squares = ops.measure(x)
    inverse = to_norm(squares, chosen, dtype)
    if which is not None:
        return ops.orient(x, which, dtype, power, inverse)
    return ops.scale_and_cast(x, power, inverse, dtype, transpose=x.shape[-2] > x.shape[-1])


def to_norm(squares: Tensor, chosen: CoefficientSet, dtype: torch.dtype) -> Tensor:
    """The factor to the norm that `iterate` starts from, by sums of squares; 0 for zero."""
    return torch.where(squares == 0, 0.0, carry(dtype) / (squares.sqrt() * chosen.norm_factor))


def times_transpose(x: Tensor, products: ops.Products) -> Tensor:
    """``x x^T`` without the carried factor: [n, rows, rows]."""
    return products.symmetric_matmul(x, carry(x.dtype) ** -2)


Gram = Callable[
    [Tensor, ops.Products], Tensor
]  # `times_transpose`, or what takes its place where x is not all here


def iterate(x: Tensor, chosen: CoefficientSet, form: Form, gram: Gram = times_transpose) -> Tensor:
    """The Newton-Schulz steps on [n, rows, cols], rows <= cols, from `to_unit_norm`.

    The result keeps `carry` and the dtype; its rows may lie further apart than they are long.
    """
    if form.products == "library":
        return _iterate(x, chosen, form, ops.LIBRARY, gram)
    rows, cols = x.shape[-2:]
    out = _iterate(in_whole_lines(x), chosen, form, ops.SYMMETRIC, gram)
    return out[:, :rows, :cols]


LINE = 64  # entries of 16 bits in a cache line of 128 bytes


def in_whole_lines(x: Tensor) -> Tensor:
    """``x`` with rows and columns of zeros up to a multiple of `LINE`, which zeros remain.

    Where every row begins with a cache line, our kernels and cuBLAS load faster: x x^T of 7
    matrices 1728 x 5784 took 327 us and takes 227, that of 50 matrices 648 x 888 80 and 52 (H200,
    torch 2.11, triton 3.6, 2026-11-29). Tiles cover those zeros anyway. Symbolic sizes stay as they
    are: a graph for many shapes would be one for some.
    """
    down, across = _up_to_lines(x.shape[-2]), _up_to_lines(x.shape[-1])
    return pad(x, (0, across, 0, down)) if down or across else x


def _up_to_lines(size: int) -> int:
    """How many zeros a side of that size gets; a symbolic one none."""
    lacking = -size % LINE
    return lacking if certainly(lacking > 0) else 0


def lines_of(rows: int, cols: int, form: Form) -> tuple[int, int]:
    """The rows and columns of a matrix as `iterate` has it."""
    if form.products == "library":
        return rows, cols
    return rows + -rows % LINE, cols + -cols % LINE


def _iterate(
    x: Tensor, chosen: CoefficientSet, form: Form, products: ops.Products, gram: Gram
) -> Tensor:
    if chosen.rescale == "aol":
        x = _almost_orthogonal(x, products, gram)
    if form.method == "gram":
        return _gram(x, chosen, form.restarts, products, gram)
    return _standard(x, chosen, products, gram)


def _standard(x: Tensor, chosen: CoefficientSet, products: ops.Products, gram: Gram) -> Tensor:
    for a, b, c in chosen.rows:
        xxt = gram(x, products)
        inner = products.symmetric_addmm(xxt, xxt, xxt, b, c) if c else xxt * b
        x = products.addmm(x, inner, x, a)
    return x


def _gram(
    x: Tensor, chosen: CoefficientSet, restarts: tuple[int, ...], products: ops.Products, gram: Gram
) -> Tensor:
    """The same polynomials on r = x x^T: with h(r) = a I + b r + c r^2, q <- q h(r) and r <- h(r) r
    h(r).

    x itself is touched at the restarts only; all else is symmetric and commutes. The first factor
    after a start stays split as a I + z: rounding that sum to 16 bits, before the next factor
    brings it back to order 1, would triple the error of the whole (Gaussian 192x768, float16,
    median per row: 4.8e-3 against 1.6e-3; 2026-11-22, CPU).
    """
    times = products.symmetric_addmm
    q: Tensor | tuple[Tensor, float] = (x, 0.0)
    r = x
    for k, (a, b, c) in enumerate(chosen.rows):
        starts = k == 0 or k in restarts
        if starts:
            x = x if k == 0 else _times(q, x, products)
            r = gram(x, products)
        z = times(r, r, r, b, c) if c else r * b
        if starts:
            q = (z, a)
        elif isinstance(q, tuple):
            q = times(_cross_terms(*q, z, a), q[0], z, 1.0, 1.0)
        else:
            q = times(q, q, z, a, 1.0)
        if k + 1 < len(chosen.rows) and k + 1 not in restarts:
            rz = times(r, r, z, a, 1.0)
            r = times(rz, z, rz, a, 1.0)
    return _times(q, x, products)


def _times(q: Tensor | tuple[Tensor, float], x: Tensor, products: ops.Products) -> Tensor:
    """``q x``, where q may be split as (z, a) for z + a I."""
    return products.addmm(x, q[0], x, q[1]) if isinstance(q, tuple) else torch.bmm(q, x)


def _cross_terms(z0: Tensor, a0: float, z1: Tensor, a1: float) -> Tensor:
    """``(z0 + a0 I) (z1 + a1 I) - z0 z1``, rounded once."""
    wide = torch.promote_types(z0.dtype, torch.float32)
    eye = torch.eye(z0.shape[-1], dtype=wide, device=z0.device)
    return (a1 * z0.to(wide) + a0 * z1.to(wide) + (a0 * a1) * eye).to(z0.dtype)


def _almost_orthogonal(x: Tensor, products: ops.Products, gram: Gram) -> Tensor:
    """Rows divided by the root of their absolute sum in x x^T, so the spectral norm is at most 1.

    Source: arXiv 2208.03160.
    """
    reach = (
        gram(x, products)
        .abs()
        .sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    )
    if x.dtype == torch.float16:
        # Entries below 2^-24 were rounded to 0 or to 2^-24: a row that is taken for shorter than it
        # is would start beyond 1, and grow.
        reach = torch.where(reach == 0, 0.0, reach + x.shape[-2] * 2.0**-25)
    return (x * torch.where(reach == 0, 0.0, reach.rsqrt())).to(x.dtype)
