"""The three products of Newton-Schulz as operators, over [n, rows, cols].

On CUDA in float16 and bfloat16, `symmetric_matmul`, `symmetric_addmm` and `addmm` each launch a
kernel of product_kernels.py once; it accumulates in float32, and to Inductor it is an opaque
operator. As traceable Triton code (`torch.library.triton_op`) every call cost 70 ms of tracing and
a kernel source of its own (2026-11-22, torch 2.11), and Inductor has nothing to fuse into it. On
the CPU, and on CUDA in float32 and float64, each is one `torch.bmm` or `torch.baddbmm`, which
Inductor sees as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .product_launch import product, takes_kernel
from .registration import define


def _library_matmul(x: Tensor, alpha: float) -> Tensor:
    result = torch.bmm(x, x.mT)
    return result if alpha == 1.0 else result * alpha


def _library_symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def _library_addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    return torch.baddbmm(c, a, x, beta=beta)


# --- registration ---


def _run_symmetric_matmul(x: Tensor, alpha: float) -> Tensor:
    if takes_kernel(x):
        return product(x, x.mT, None, alpha, 0.0, symmetric=True)
    return _library_matmul(x, alpha)


def _run_symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    if takes_kernel(a):
        return product(a, b, c, alpha, beta, symmetric=True)
    return _library_symmetric_addmm(c, a, b, beta, alpha)


def _run_addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    if takes_kernel(a):
        return product(a, x, c, 1.0, beta, symmetric=False)
    return _library_addmm(c, a, x, beta)


def _define(name: str, schema: str, function: Callable[..., Tensor], matrices: int) -> Any:
    """The operator ``name``, whose first ``matrices`` arguments are stacks.

    The first of them tells the shape of the result.
    """

    def fake(*arguments: Any) -> Tensor:
        n, rows, cols = arguments[0].shape
        return arguments[0].new_empty(n, rows, rows if matrices == 1 else cols)

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        """The matrices of all members are one stack with more matrices."""
        stacks = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments[:matrices], in_dims, strict=False)
        ]
        out = operator(*(x.flatten(0, 1) for x in stacks), *arguments[matrices:])
        return out.unflatten(0, stacks[0].shape[:2]), 0

    operator = define(name, schema, function, fake, vmap)
    return operator


_symmetric_matmul = _define(
    "symmetric_matmul", "(Tensor x, float alpha) -> Tensor", _run_symmetric_matmul, 1
)
_symmetric_addmm = _define(
    "symmetric_addmm",
    "(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor",
    _run_symmetric_addmm,
    3,
)
_addmm = _define("addmm", "(Tensor c, Tensor a, Tensor x, float beta) -> Tensor", _run_addmm, 3)


# --- public ---


def symmetric_matmul(
    x: Tensor,  # [n, rows, cols]
    alpha: float = 1.0,
) -> Tensor:
    """``alpha x x^T`` for every matrix of a stack: [n, rows, rows], contiguous.

    The dtype is that of ``x``; its strides are free. On CUDA in float16 and bfloat16 the result
    equals its transpose bit for bit, and half of it is computed.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not [n, rows, cols].
    """
    _check(x=x)
    run = _symmetric_matmul if takes_kernel(x) else _library_matmul
    return run(x, alpha)


def symmetric_addmm(
    c: Tensor,  # [n, rows, rows]
    a: Tensor,  # [n, rows, rows]
    b: Tensor,  # [n, rows, rows]
    beta: float,
    alpha: float,
) -> Tensor:
    """``beta c + alpha a b`` for symmetric matrices, contiguous; ``a`` and ``b`` must commute.

    They commute where ``a b = b a``, as polynomials in the same matrix do; their product is then
    symmetric too. That is not checked. On CUDA in float16 and bfloat16 only the lower triangle of
    the result is computed, from whole rows of ``a``, whole rows or columns of ``b`` and the lower
    triangle of ``c``; the upper triangle is its copy, bit for bit. There ``c`` counts with
    ``beta = 0`` too (0 x NaN is NaN), while `torch.baddbmm` leaves it out.

    Shapes: [n, rows, rows], as the arguments.

    Raises:
        TypeError: an argument is not a floating-point tensor, or has another dtype than the others.
        ValueError: an argument is not [n, rows, rows] like the others, or is on another device.
    """
    _check(c=c, a=a, b=b)
    _check_shape("a", a, (a.shape[0], a.shape[1], a.shape[1]))
    _check_shape("b", b, tuple(a.shape))
    _check_shape("c", c, tuple(a.shape))
    run = _symmetric_addmm if takes_kernel(a) else _library_symmetric_addmm
    return run(c, a, b, beta, alpha)


def addmm(
    c: Tensor,  # [n, rows, cols]
    a: Tensor,  # [n, rows, rows]
    x: Tensor,  # [n, rows, cols]
    beta: float,
) -> Tensor:
    """``beta c + a x`` for every matrix of a stack: [n, rows, cols], contiguous.

    The strides of the arguments are free. On CUDA in float16 and bfloat16 ``c`` counts with
    ``beta = 0`` too (0 x NaN is NaN), while `torch.baddbmm` leaves it out.

    Raises:
        TypeError: an argument is not a floating-point tensor, or has another dtype than the others.
        ValueError: ``a`` is not [n, rows, rows], ``c`` or ``x`` does not fit it, or an argument is
            on another device.
    """
    _check(c=c, a=a, x=x)
    _check_shape("a", a, (x.shape[0], x.shape[1], x.shape[1]))
    _check_shape("c", c, tuple(x.shape))
    run = _addmm if takes_kernel(a) else _library_addmm
    return run(c, a, x, beta)


def _check(**arguments: Tensor) -> None:
    first_name, first = next(iter(arguments.items()))
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            found = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name}: expected a floating-point tensor, got {found}")
        if x.ndim != 3:
            raise ValueError(
                f"{name}: expected a stack of matrices [n, rows, cols], got shape {tuple(x.shape)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"{name}: expected to be on {first.device} like {first_name}, is on {x.device}"
            )


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")


class Products(NamedTuple):
    """The three products of Newton-Schulz: `SYMMETRIC` or `LIBRARY`.

    Our kernels compute half of what is symmetric; the library's compute all of it.
    """

    symmetric_matmul: Callable[[Tensor, float], Tensor]
    symmetric_addmm: Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
    addmm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


SYMMETRIC = Products(symmetric_matmul, symmetric_addmm, addmm)
LIBRARY = Products(_library_matmul, _library_symmetric_addmm, _library_addmm)
