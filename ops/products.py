"""The three products of Newton-Schulz as operators: `symmetric_matmul`, `symmetric_addmm` and `addmm`, over [n, rows, cols].

One Triton kernel computes ``beta c + alpha a b`` behind all three. Where the result is symmetric, only the tiles that meet its
lower triangle are computed, and each is stored twice: as it is, and mirrored. Both triangles therefore agree bit for bit.

The kernel runs on CUDA in float16 and bfloat16, accumulating in float32. Everything else is one `torch.bmm` or
`torch.baddbmm`, which Inductor sees as such: the CPU, and float32 and float64 on CUDA.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

try:  # a CPU install has no triton
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


# --------------------------------------------------------------------------------------------------------------------- kernel


@_jit
def _triangle(index):
    """Row and column of entry ``index`` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # float32 may be off by one
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@_jit
def _first_entry(
    tile,
    rows,
    cols,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Where tile number ``tile`` of a matrix starts: GROUP tile rows at a time, column by column, so that they share L2.

    Symmetric: the lower triangle is one of squares of BLOCK_N, each of BLOCK_N / BLOCK_M tiles; one tile row may be left over.
    """
    tile_rows = tl.cdiv(rows, BLOCK_M)
    if SYMMETRIC:
        PER_SQUARE: tl.constexpr = BLOCK_N // BLOCK_M
        squares = tile_rows // PER_SQUARE
        whole = PER_SQUARE * (squares * (squares + 1) // 2)
        square_row, square_col = _triangle(tile // PER_SQUARE)
        start = square_row // GROUP * GROUP
        offset = tile // PER_SQUARE - start * (start + 1) // 2
        height = tl.maximum(tl.minimum(squares - start, GROUP), 1)
        # A group is a rectangle and then its own triangle. No branches: Triton cannot fuse loops around them.
        in_rectangle = offset < start * height
        row_below, col_beyond = _triangle(tl.maximum(offset - start * height, 0))
        square_row = start + tl.where(in_rectangle, offset % height, row_below)
        square_col = tl.where(in_rectangle, offset // height, start + col_beyond)
        row = tl.where(tile < whole, square_row * PER_SQUARE + tile % PER_SQUARE, tile_rows - 1)
        col = tl.where(tile < whole, square_col, tile - whole)
    else:
        tile_cols = tl.cdiv(cols, BLOCK_N)
        start = tile // (GROUP * tile_cols) * GROUP
        height = tl.minimum(tile_rows - start, GROUP)
        offset = tile - start * tile_cols
        row = start + offset % height
        col = offset // height
    return row * BLOCK_M, col * BLOCK_N


@_jit
def _combine(acc, c, inside, alpha, beta, dtype: tl.constexpr, HAS_C: tl.constexpr):
    acc = acc * tl.cast(alpha, tl.float32)  # Inductor passes float64
    if HAS_C:
        acc += tl.cast(beta, tl.float32) * tl.load(c, mask=inside, other=0.0).to(tl.float32)
    return acc.to(dtype)


@_jit
def _store_mirrored(
    acc, c, out, alpha, beta, i0, j0, rows, c_row, c_col,
    HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A square block of a symmetric result and its mirror image; on the diagonal, the block's lower half and that mirrored.

    No store is masked by ``i >= j``: such a mask would split it into stores of single entries. And no branches, as in
    `_first_entry`; they cost registers too (182 instead of 126 a thread in tiles of 128 x 128: one block per SM, not two).
    """
    i = i0 + tl.arange(0, BLOCK)
    j = j0 + tl.arange(0, BLOCK)
    wide_i = i.to(tl.int64)
    wide_j = j.to(tl.int64)
    inside = (i < rows)[:, None] & (j < rows)[None, :] & (i0 >= j0)
    block = _combine(
        acc, c + wide_i[:, None] * c_row + wide_j[None, :] * c_col, inside, alpha, beta, out.dtype.element_ty, HAS_C
    )
    mirrored = tl.trans(block)
    tl.store(out + wide_i[:, None] * rows + j[None, :], tl.where(i[:, None] >= j[None, :], block, mirrored), mask=inside)
    beside = (j < rows)[:, None] & (i < rows)[None, :] & (i0 > j0)
    tl.store(out + wide_j[:, None] * rows + i[None, :], mirrored, mask=beside)


@_jit
def _store(
    acc, c, out, alpha, beta, i0, j0, rows, cols, c_row, c_col,
    SYMMETRIC: tl.constexpr, HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the result; ``c`` and ``out`` are those of its matrix."""
    if SYMMETRIC:
        if BLOCK_M == BLOCK_N:
            _store_mirrored(acc, c, out, alpha, beta, i0, j0, rows, c_row, c_col, HAS_C, BLOCK_M)
        else:  # BLOCK_N == 2 * BLOCK_M: two squares, whose entries lie in the same threads
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_M)), (0, 2, 1)))
            _store_mirrored(left, c, out, alpha, beta, i0, j0, rows, c_row, c_col, HAS_C, BLOCK_M)
            _store_mirrored(right, c, out, alpha, beta, i0, j0 + BLOCK_M, rows, c_row, c_col, HAS_C, BLOCK_M)
    else:
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        wide_i = i.to(tl.int64)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        c_tile = c + wide_i[:, None] * c_row + j.to(tl.int64)[None, :] * c_col
        block = _combine(acc, c_tile, inside, alpha, beta, out.dtype.element_ty, HAS_C)
        tl.store(out + wide_i[:, None] * cols + j[None, :], block, mask=inside)


@_jit
def _product_kernel(
    a,  # [n, rows, depth]
    b,  # [n, depth, cols]
    c,  # [n, rows, cols], not read without HAS_C
    out,  # [n, rows, cols], contiguous
    alpha,
    beta,
    rows,
    cols,
    depth,
    tiles,  # of one matrix
    a_matrix,  # strides
    a_row,
    a_depth,
    b_matrix,
    b_depth,
    b_col,
    c_matrix,
    c_row,
    c_col,
    SYMMETRIC: tl.constexpr,
    HAS_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,  # interpreted, tl.dot multiplies the bit patterns of bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)  # a stack may hold more than 2^31 entries
    i0, j0 = _first_entry(program % tiles, rows, cols, SYMMETRIC, BLOCK_M, BLOCK_N, GROUP)

    # Rows and columns beyond the end wrap round: what they give is not stored, and their loads need no mask.
    i = ((i0 + tl.arange(0, BLOCK_M)) % rows).to(tl.int64)
    j = ((j0 + tl.arange(0, BLOCK_N)) % cols).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + matrix * a_matrix + i[:, None] * a_row + k.to(tl.int64)[None, :] * a_depth
    b_tile = b + matrix * b_matrix + k.to(tl.int64)[:, None] * b_depth + j[None, :] * b_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        if EVEN_K:
            left = tl.load(a_tile)
            right = tl.load(b_tile)
        else:  # 0 on both sides, so that no NaN comes from beyond the end
            left = tl.load(a_tile, mask=(k < depth - k0)[None, :], other=0.0)
            right = tl.load(b_tile, mask=(k < depth - k0)[:, None], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc)
        a_tile += BLOCK_K * a_depth
        b_tile += BLOCK_K * b_depth

    c += matrix * c_matrix
    out += matrix * rows * cols
    _store(acc, c, out, alpha, beta, i0, j0, rows, cols, c_row, c_col, SYMMETRIC, HAS_C, BLOCK_M, BLOCK_N)


# --------------------------------------------------------------------------------------------------------------------- launch


class Config(NamedTuple):
    """How the kernel cuts a product. Symmetric results need BLOCK_N equal to BLOCK_M or twice that."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


_SMALL, _LARGE = False, True
_GENERAL, _SYMMETRIC = False, True
# By the device's generation: shared memory is 227 KiB on 9 and 10, 163 KiB on 8, and 99 KiB on "lean" ones (8.6, 8.9, 12).
CONFIGS: dict[int | str, dict[tuple[bool, bool], Config]] = {
    "lean": dict.fromkeys(
        [(_SYMMETRIC, _SMALL), (_SYMMETRIC, _LARGE), (_GENERAL, _SMALL), (_GENERAL, _LARGE)], Config(128, 128, 32, 8, 8, 3)
    ),
    8: {
        (_SYMMETRIC, _SMALL): Config(128, 128, 32, 8, 8, 4),
        (_SYMMETRIC, _LARGE): Config(128, 128, 64, 8, 8, 4),
        (_GENERAL, _SMALL): Config(128, 128, 32, 8, 8, 4),
        (_GENERAL, _LARGE): Config(128, 128, 64, 8, 8, 4),
    },
    9: {
        (_SYMMETRIC, _SMALL): Config(128, 128, 64, 8, 8, 3),  # 96 KiB: two blocks per SM
        (_SYMMETRIC, _LARGE): Config(128, 256, 64, 8, 8, 4),
        (_GENERAL, _SMALL): Config(128, 128, 64, 8, 8, 3),
        (_GENERAL, _LARGE): Config(128, 256, 64, 8, 8, 4),
    },
    10: {
        (_SYMMETRIC, _SMALL): Config(128, 128, 64, 8, 4, 4),
        (_SYMMETRIC, _LARGE): Config(128, 128, 64, 8, 4, 4),
        (_GENERAL, _SMALL): Config(128, 128, 64, 8, 4, 4),
        (_GENERAL, _LARGE): Config(128, 128, 64, 8, 4, 4),
    },
}
_LARGE_FROM = 1025  # rows


@functools.cache
def _generation(device: int | None) -> int | str:
    """The key of `CONFIGS`. Without a GPU, where fake CUDA tensors are traced, it is Hopper's."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):  # no driver; a CPU build
        return 9
    if torch.version.hip or major == 12 or (major == 8 and minor > 0) or major < 8:
        return "lean"
    return min(major, 10)


def _config(device: torch.device, symmetric: bool, rows: int) -> Config:
    generation = _generation(device.index) if device.type == "cuda" else 9
    return CONFIGS[generation][symmetric, rows >= _LARGE_FROM]


def tile_count(symmetric: bool, rows: int, cols: int, config: Config) -> int:
    """The tiles of one matrix; of a symmetric one, those that meet the lower triangle."""
    tile_rows = -(-rows // config.block_m)
    if not symmetric:
        return tile_rows * -(-cols // config.block_n)
    per_square = config.block_n // config.block_m
    squares, left_over = divmod(tile_rows, per_square)
    return per_square * (squares * (squares + 1) // 2) + left_over * (squares + 1)


def _launch(
    kernel: Any,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    symmetric: bool,
    config: Config | None = None,
) -> Tensor:
    n, rows, depth = a.shape
    cols = b.shape[2]
    out = a.new_empty(n, rows, cols)
    if out.numel() == 0:
        return out
    config = config or _config(a.device, symmetric, rows)
    tiles = tile_count(symmetric, rows, cols, config)
    given = a if c is None else c  # never `out`: Inductor would take it for read, and copy it
    kernel[(n * tiles,)](
        a,
        b,
        given,
        out,
        float(alpha),
        float(beta),
        rows,
        cols,
        depth,
        tiles,
        a.stride(0),
        a.stride(1),
        a.stride(2),
        b.stride(0),
        b.stride(1),
        b.stride(2),
        given.stride(0),
        given.stride(1),
        given.stride(2),
        SYMMETRIC=symmetric,
        HAS_C=c is not None,
        EVEN_K=depth % config.block_k == 0,
        UPCAST=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


# --------------------------------------------------------------------------------------------------------------- registration

INTERPRETED = triton is not None and not isinstance(_product_kernel, triton.JITFunction)  # TRITON_INTERPRET=1

if INTERPRETED:

    @custom_op("normuon_fn::interpreted_product", mutates_args=(), device_types="cpu")
    def _interpreted(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, symmetric: bool) -> Tensor:
        return _launch(_product_kernel, a, b, c, alpha, beta, symmetric)

    @_interpreted.register_fake
    def _(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, symmetric: bool) -> Tensor:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _takes_kernel(x: Tensor) -> bool:
    return triton is not None and x.device.type == "cuda" and x.dtype in KERNEL_DTYPES


def _takes_interpreter(x: Tensor) -> bool:
    return INTERPRETED and x.device.type == "cpu" and x.dtype in KERNEL_DTYPES


@triton_op("normuon_fn::symmetric_matmul", mutates_args=())
def _symmetric_matmul(x: Tensor, alpha: float) -> Tensor:
    if _takes_kernel(x):
        return _launch(wrap_triton(_product_kernel), x, x.mT, None, alpha, 0.0, True)
    if _takes_interpreter(x):
        return _interpreted(x, x.mT, None, alpha, 0.0, True)
    product = torch.bmm(x, x.mT)
    return product if alpha == 1.0 else product * alpha


@triton_op("normuon_fn::symmetric_addmm", mutates_args=())
def _symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    if _takes_kernel(a):
        return _launch(wrap_triton(_product_kernel), a, b, c, alpha, beta, True)
    if _takes_interpreter(a):
        return _interpreted(a, b, c, alpha, beta, True)
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


@triton_op("normuon_fn::addmm", mutates_args=())
def _addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    if _takes_kernel(a):
        return _launch(wrap_triton(_product_kernel), a, x, c, 1.0, beta, False)
    if _takes_interpreter(a):
        return _interpreted(a, x, c, 1.0, beta, False)
    return torch.baddbmm(c, a, x, beta=beta)


def _register_vmap(operator: Any, matrices: int) -> None:
    """The rule of an operator whose first ``matrices`` arguments are stacks: members become more matrices."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        members = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments[:matrices], in_dims, strict=False)
        ]
        out = operator(*(x.flatten(0, 1) for x in members), *arguments[matrices:])
        return out.unflatten(0, members[0].shape[:2]), 0

    operator.register_vmap(rule)


_register_vmap(_symmetric_matmul, 1)
_register_vmap(_symmetric_addmm, 3)
_register_vmap(_addmm, 3)


# --------------------------------------------------------------------------------------------------------------------- public


def symmetric_matmul(
    x: Tensor,  # [n, rows, cols]
    alpha: float = 1.0,
) -> Tensor:
    """``alpha x x^T`` for every matrix of a stack: [n, rows, rows], contiguous, in the dtype of ``x``.

    On CUDA in float16 and bfloat16 the result equals its transpose bit for bit, and half of it is computed. Any strides.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not [n, rows, cols].
    """
    _check(x=x)
    return _symmetric_matmul(x, alpha)


def symmetric_addmm(
    c: Tensor,  # [n, rows, rows]
    a: Tensor,  # [n, rows, rows]
    b: Tensor,  # [n, rows, rows]
    beta: float,
    alpha: float,
) -> Tensor:
    """``beta c + alpha a b`` for symmetric matrices of which a and b commute: [n, rows, rows], contiguous.

    a and b commute where ``a b = b a``, as polynomials in the same matrix do; their product is then symmetric too. That is
    not checked. On CUDA in float16 and bfloat16 only the lower triangle of the result is computed, from whole rows of ``a``,
    whole columns of ``b`` and the lower triangle of ``c``, and the upper one is its copy, bit for bit. There ``c`` counts with
    ``beta = 0`` too (0 x NaN is NaN), which `torch.baddbmm` leaves out.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not of the dtype of the others.
        ValueError: an argument is not [n, rows, rows] like the others, or on another device.
    """
    _check(c=c, a=a, b=b)
    _check_shape("a", a, (a.shape[0], a.shape[1], a.shape[1]))
    _check_shape("b", b, tuple(a.shape))
    _check_shape("c", c, tuple(a.shape))
    return _symmetric_addmm(c, a, b, beta, alpha)


def addmm(
    c: Tensor,  # [n, rows, cols]
    a: Tensor,  # [n, rows, rows]
    x: Tensor,  # [n, rows, cols]
    beta: float,
) -> Tensor:
    """``beta c + a x`` for every matrix of a stack: [n, rows, cols], contiguous. Any strides.

    On CUDA in float16 and bfloat16 ``c`` counts with ``beta = 0`` too (0 x NaN is NaN), which `torch.baddbmm` leaves out.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not of the dtype of the others.
        ValueError: ``a`` is not [n, rows, rows], ``c`` or ``x`` does not fit it, or an argument is on another device.
    """
    _check(c=c, a=a, x=x)
    _check_shape("a", a, (x.shape[0], x.shape[1], x.shape[1]))
    _check_shape("c", c, tuple(x.shape))
    return _addmm(c, a, x, beta)


def _check(**arguments: Tensor) -> None:
    first_name, first = next(iter(arguments.items()))
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 3:
            raise ValueError(f"{name}: expected a stack of matrices [n, rows, cols], got shape {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name}: expected to be on {first.device} like {first_name}, is on {x.device}")


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")


class Products(NamedTuple):
    """The three products of Newton-Schulz: our kernels, or the library's, which compute all of what is symmetric."""

    symmetric_matmul: Callable[[Tensor, float], Tensor]
    symmetric_addmm: Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
    addmm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _library_matmul(x: Tensor, alpha: float) -> Tensor:
    product = torch.bmm(x, x.mT)
    return product if alpha == 1.0 else product * alpha


def _library_symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def _library_addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    return torch.baddbmm(c, a, x, beta=beta)


SYMMETRIC = Products(symmetric_matmul, symmetric_addmm, addmm)
LIBRARY = Products(_library_matmul, _library_symmetric_addmm, _library_addmm)
