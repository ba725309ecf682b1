"""The three products of Newton-Schulz as operators: `symmetric_matmul`, `symmetric_addmm` and `addmm`, over [n, rows, cols].

On CUDA in float16 and bfloat16 each is one launch of a kernel of product_kernels.py, which accumulates in float32; to Inductor
it is an opaque operator. As traceable Triton code (`torch.library.triton_op`) every call cost 70 ms of tracing and a kernel
source of its own (2026-11-22, torch 2.11), and Inductor has nothing to fuse into it. Everything else is one `torch.bmm` or
`torch.baddbmm`, which Inductor sees as such: the CPU, and float32 and float64 on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .launch import INTERPRETED, launch, triton
from .product_kernels import descriptor_kernel, pointer_kernel
from .registration import define

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

KERNEL_DTYPES = (torch.float16, torch.bfloat16)

# -------------------------------------------------------------------------------------------------------------------- configs


class Config(NamedTuple):
    """How a kernel cuts a product. Symmetric results need BLOCK_N equal to BLOCK_M or twice that."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    variant: Literal["pointers", "tma", "persistent"] = (
        "pointers"  # tma: descriptors; persistent: and one program an SM
    )


_SMALL, _LARGE = False, True
_LARGE_FROM = 1025  # rows
KINDS = ("symmetric_matmul", "symmetric_addmm", "addmm")


def _for_all(small: Config, large: Config) -> dict[tuple[str, bool], Config]:
    return {
        (kind, size): config
        for kind in KINDS
        for size, config in ((_SMALL, small), (_LARGE, large))
    }


# By the device's generation: shared memory is 227 KiB on 9 and 10, 163 KiB on 8, and 99 KiB on "lean" ones (8.6, 8.9, 12).
# Of 9 the fastest that `python examples/benchmarks/tune.py` found: TFLOP/s as of a full product, H100, torch 2.11,
# triton 3.6, 2026-11-22. The others are not measured.
CONFIGS: dict[int | str, dict[tuple[str, bool], Config]] = {
    "lean": _for_all(Config(128, 128, 32, 8, 8, 3), Config(128, 128, 32, 8, 8, 3)),
    8: _for_all(Config(128, 128, 32, 8, 8, 4), Config(128, 128, 64, 8, 8, 4)),
    9: {
        # 683 of 48 x 768 x 768 in bfloat16 (cuBLAS 649); 999 of 12 x 768 x 3072 in float16 (642)
        ("symmetric_matmul", _SMALL): Config(128, 128, 64, 8, 8, 3, "tma"),
        # 1164 of 96 x 2048 x 2048 in bfloat16 (794); 1203 of 24 x 2048 x 8192 in float16 (755)
        ("symmetric_matmul", _LARGE): Config(128, 256, 64, 8, 8, 3, "tma"),
        # 606 of 48 x 768 x 768 in bfloat16 (341); 645 of 12 in float16 (363). With 8 warps 493 and 690.
        ("symmetric_addmm", _SMALL): Config(128, 128, 64, 8, 4, 3, "tma"),
        # 1004 of 96 x 2048 x 2048 in bfloat16 (597); 990 of 24 in float16 (517)
        ("symmetric_addmm", _LARGE): Config(128, 128, 64, 8, 8, 4, "persistent"),
        # 484 of 48 x 768 x 768 in bfloat16 (316); 503 of 12 x 768 x 3072 in float16 (334)
        ("addmm", _SMALL): Config(128, 256, 64, 8, 8, 4, "persistent"),
        # 667 of 96 x 2048 x 2048 in bfloat16 (588); 641 of 24 x 2048 x 8192 in float16 (548). "tma": 673 and 618.
        ("addmm", _LARGE): Config(128, 256, 64, 8, 8, 3, "persistent"),
    },
    10: _for_all(Config(128, 128, 64, 8, 8, 3, "tma"), Config(128, 128, 64, 8, 8, 3, "tma")),
}
# On 9 and 10, for inputs that no descriptor takes.
WITHOUT_DESCRIPTORS = {_SMALL: Config(128, 128, 64, 8, 4, 3), _LARGE: Config(128, 256, 64, 8, 8, 3)}


@functools.cache
def _generation(device: int) -> int | str:
    """The key of `CONFIGS`."""
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or major == 12 or (major == 8 and minor > 0) or major < 8:
        return "lean"
    return min(major, 10)


def tile_count(symmetric: bool, rows: int, cols: int, config: Config) -> int:
    """The tiles of one matrix; of a symmetric one, those that meet the lower triangle."""
    tile_rows = -(-rows // config.block_m)
    if not symmetric:
        return tile_rows * -(-cols // config.block_n)
    per_square = config.block_n // config.block_m
    squares, left_over = divmod(tile_rows, per_square)
    return per_square * (squares * (squares + 1) // 2) + left_over * (squares + 1)


# --------------------------------------------------------------------------------------------------------------------- launch


class Plan(NamedTuple):
    """What a launch takes besides its tensors and scalars: the same for every product of those sizes and strides."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # those after beta
    options: dict[str, int]
    descriptors: tuple[
        tuple[list[int], list[int], list[int]], ...
    ]  # of a and b: shape, strides, block


@functools.lru_cache(4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    symmetric: bool,
    has_c: bool,
    aligned: bool,  # the addresses of a and b are multiples of 16 bytes
    shape: tuple[int, ...],  # of a
    cols: int,
    strides_of_a: tuple[int, ...],
    strides_of_b: tuple[int, ...],
    strides_of_c: tuple[int, ...],
    config: Config | None,
) -> Plan:
    n, rows, depth = shape
    # A symmetric b may be read by rows, and then as x is in x x^T.
    transposed = strides_of_b[2] != 1 or (symmetric and has_c)
    along, across = (1, 2) if strides_of_b[2] != 1 else (2, 1)
    by_rows = [strides_of_b[0], strides_of_b[across], strides_of_b[along]]
    fits = (
        aligned
        and depth > 0
        and _fits_descriptor(list(strides_of_a), dtype)
        and _fits_descriptor(by_rows, dtype)
    )
    if config is None:
        kind = "addmm" if not symmetric else "symmetric_addmm" if has_c else "symmetric_matmul"
        generation = 9 if device.type == "cpu" else _generation(device.index)
        config = CONFIGS[generation][kind, rows >= _LARGE_FROM]
        if config.variant != "pointers" and not fits:
            config = WITHOUT_DESCRIPTORS[rows >= _LARGE_FROM]
    elif config.variant != "pointers" and not fits:
        raise ValueError(
            f"no tensor descriptor takes strides {strides_of_a} and {strides_of_b}, or the addresses are odd"
        )
    tiles = tile_count(symmetric, rows, cols, config)
    blocks = (config.block_m, config.block_n, config.block_k, config.group)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    sizes = (rows, cols, depth, tiles)
    if config.variant == "pointers":
        even = depth % config.block_k == 0
        strides = (*strides_of_a, *strides_of_b, *strides_of_c)
        arguments = (*sizes, *strides, symmetric, has_c, even, INTERPRETED, *blocks)
        return Plan(pointer_kernel, (n * tiles,), arguments, options, ())
    persistent = config.variant == "persistent"
    block_m, block_n, block_k, _ = blocks
    of_b, block = (
        ([n, cols, depth], [1, block_n, block_k])
        if transposed
        else ([n, depth, cols], [1, block_k, block_n])
    )
    descriptors = (list(shape), list(strides_of_a), [1, block_m, block_k]), (of_b, by_rows, block)
    total = n * tiles
    arguments = (
        *sizes,
        total,
        *strides_of_c,
        symmetric,
        has_c,
        transposed,
        persistent,
        INTERPRETED,
        *blocks,
    )
    programs = min(total, _programs(device)) if persistent else total
    return Plan(descriptor_kernel, (programs,), arguments, options, descriptors)


def _fits_descriptor(strides: list[int], dtype: torch.dtype) -> bool:
    return strides[2] == 1 and all(
        stride > 0 and stride * dtype.itemsize % 16 == 0 for stride in strides[:2]
    )


def _programs(device: torch.device) -> int:
    return (
        3
        if device.type == "cpu"
        else torch.cuda.get_device_properties(device).multi_processor_count
    )


Call = tuple[
    Any, int, tuple[Any, ...], tuple[Any, ...], dict[str, int]
]  # kernel, programs, pointers, constants, options


def _prepare(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    alpha: float,
    beta: float,
    symmetric: bool,
    config: Config | None,
) -> Call:
    given = a if c is None else c
    kernel, grid, arguments, options, descriptors = _plan(
        a.device,
        a.dtype,
        symmetric,
        c is not None,
        (a.data_ptr() | b.data_ptr()) % 16 == 0,
        a.shape,
        b.shape[2],
        a.stride(),
        b.stride(),
        given.stride(),
        config,
    )
    if descriptors:
        of_a, of_b = descriptors
        left, right = TensorDescriptor(a, *of_a), TensorDescriptor(b, *of_b)
        return kernel, grid[0], (left, right, given, out, alpha, beta), arguments, options
    return kernel, grid[0], (a, b, given, out, alpha, beta), arguments, options


def _launch(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    symmetric: bool,
    config: Config | None = None,
) -> Tensor:
    """``beta c + alpha a b``. ``config``: for tests and tuning; without descriptors that it wants, it raises ValueError."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if out.numel() == 0:
        return out
    kernel, programs, pointers, constants, options = _prepare(
        a, b, c, out, alpha, beta, symmetric, config
    )
    launch(kernel, programs, pointers, constants, **options)
    return out


# --------------------------------------------------------------------------------------------------------------- registration


def _takes_kernel(x: Tensor) -> bool:
    device = x.device.type
    return (
        triton is not None
        and x.dtype in KERNEL_DTYPES
        and (device == "cuda" or (INTERPRETED and device == "cpu"))
    )


def _library_matmul(x: Tensor, alpha: float) -> Tensor:
    product = torch.bmm(x, x.mT)
    return product if alpha == 1.0 else product * alpha


def _library_symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def _library_addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    return torch.baddbmm(c, a, x, beta=beta)


def _run_symmetric_matmul(x: Tensor, alpha: float) -> Tensor:
    return (
        _launch(x, x.mT, None, alpha, 0.0, True) if _takes_kernel(x) else _library_matmul(x, alpha)
    )


def _run_symmetric_addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return (
        _launch(a, b, c, alpha, beta, True)
        if _takes_kernel(a)
        else _library_symmetric_addmm(c, a, b, beta, alpha)
    )


def _run_addmm(c: Tensor, a: Tensor, x: Tensor, beta: float) -> Tensor:
    return _launch(a, x, c, 1.0, beta, False) if _takes_kernel(a) else _library_addmm(c, a, x, beta)


def _define(schema: str, function: Callable[..., Tensor], matrices: int) -> Any:
    """The operator, whose first ``matrices`` arguments are stacks; the first tells the result's shape."""
    name = schema.split("(")[0]

    def fake(*arguments: Any) -> Tensor:
        first = arguments[0]
        return first.new_empty(
            first.shape[0], first.shape[1], first.shape[1] if matrices == 1 else first.shape[2]
        )

    def vmap(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[Tensor, int]:  # members become more matrices
        members = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments[:matrices], in_dims, strict=False)
        ]
        out = operator(*(x.flatten(0, 1) for x in members), *arguments[matrices:])
        return out.unflatten(0, members[0].shape[:2]), 0

    operator = define(name, schema.removeprefix(name), function, fake, vmap)
    return operator


_symmetric_matmul = _define(
    "symmetric_matmul(Tensor x, float alpha) -> Tensor", _run_symmetric_matmul, 1
)
_symmetric_addmm = _define(
    "symmetric_addmm(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor",
    _run_symmetric_addmm,
    3,
)
_addmm = _define("addmm(Tensor c, Tensor a, Tensor x, float beta) -> Tensor", _run_addmm, 3)


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
    return _symmetric_matmul(x, alpha) if _takes_kernel(x) else _library_matmul(x, alpha)


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
    whole rows or columns of ``b`` and the lower triangle of ``c``, and the upper one is its copy, bit for bit. There ``c``
    counts with ``beta = 0`` too (0 x NaN is NaN), which `torch.baddbmm` leaves out.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not of the dtype of the others.
        ValueError: an argument is not [n, rows, rows] like the others, or on another device.
    """
    _check(c=c, a=a, b=b)
    _check_shape("a", a, (a.shape[0], a.shape[1], a.shape[1]))
    _check_shape("b", b, tuple(a.shape))
    _check_shape("c", c, tuple(a.shape))
    return (_symmetric_addmm if _takes_kernel(a) else _library_symmetric_addmm)(
        c, a, b, beta, alpha
    )


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
    return (_addmm if _takes_kernel(a) else _library_addmm)(c, a, x, beta)


def _check(**arguments: Tensor) -> None:
    first_name, first = next(iter(arguments.items()))
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(
                f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}"
            )
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
    """The three products of Newton-Schulz: our kernels, or the library's, which compute all of what is symmetric."""

    symmetric_matmul: Callable[[Tensor, float], Tensor]
    symmetric_addmm: Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
    addmm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


SYMMETRIC = Products(symmetric_matmul, symmetric_addmm, addmm)
LIBRARY = Products(_library_matmul, _library_symmetric_addmm, _library_addmm)
