"""From the tensors of a product to the launch of its kernel."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import HAS_TRITON, INTERPRETED, launch
from .product_configs import TileConfig, config_for, first_entries, tile_count
from .product_kernels import descriptor_kernel, pointer_kernel
from .tables import shared_table

PRODUCT_DTYPES = (torch.float16, torch.bfloat16)


def takes_kernel(x: Tensor) -> bool:
    """Whether products of stacks like ``x`` go to the kernels: 16-bit floats on CUDA."""
    on_device = x.device.type == "cuda" or (INTERPRETED and x.device.type == "cpu")
    return HAS_TRITON and on_device and x.dtype in PRODUCT_DTYPES


@functools.cache
def _warp_specialized() -> Any:
    """The module of that kernel, which imports Triton."""
    return importlib.import_module(f"{__package__}.warp_specialized")


@functools.cache
def _make_descriptor(specialized: bool) -> Callable[..., Any]:
    """What makes a descriptor of a tensor and of a `_Descriptor`, for one of the kernels."""
    make: Callable[..., Any]
    if specialized:
        make = _warp_specialized().descriptor
    else:
        make = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    return make


class _Descriptor(NamedTuple):
    """What `_make_descriptor` takes besides a tensor."""

    shape: list[int]
    strides: list[int]
    block: list[int]


class _Static(NamedTuple):
    """What a launch takes besides its tensors and scalars: the same for all equal `_Layout`s."""

    kernel: Any
    programs: int
    constants: tuple[Any, ...]
    options: dict[str, Any]
    # of a, b, c and out, as far as they are loaded by one
    descriptors: tuple[_Descriptor | None, ...] = ()
    # of the warp-specialized kernel, which has its own kind of descriptors too
    first_entries: Callable[[], Tensor] | None = None


class _Layout(NamedTuple):
    """All that the static half of a launch depends on."""

    device: torch.device
    dtype: torch.dtype
    symmetric: bool
    has_c: bool
    aligned: bool  # the addresses of a and b are multiples of 16 bytes
    ends_aligned: bool  # those of c and the result are
    same: bool  # the product is x x^T
    shape: tuple[int, ...]  # of a: [n, rows, depth]
    cols: int
    a_strides: tuple[int, ...]
    b_strides: tuple[int, ...]
    c_strides: tuple[int, ...]


class Launch(NamedTuple):
    """One launch of a product's kernel: see `launch`."""

    kernel: Any
    programs: int
    pointers: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]


def product(
    a: Tensor,  # [n, rows, depth]
    b: Tensor,  # [n, depth, cols]
    c: Tensor | None,  # [n, rows, cols]
    alpha: float,
    beta: float,
    symmetric: bool,  # the result is, and half of it is computed
    config: TileConfig | None = None,  # for tests and tuning
) -> Tensor:
    """``beta c + alpha a b`` by a kernel: [n, rows, cols], contiguous.

    Raises:
        ValueError: ``config`` wants tensor descriptors, and the strides or addresses do not fit.
    """
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if out.numel() == 0:
        return out
    kernel, programs, pointers, constants, options = prepare(
        a, b, c, out, alpha, beta, symmetric, config
    )
    launch(kernel, programs, pointers, constants, **options)
    return out


def prepare(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    alpha: float,
    beta: float,
    symmetric: bool,
    config: TileConfig | None,
) -> Launch:
    """The launch that writes the `product` to ``out``."""
    c_or_a = a if c is None else c  # without c, the kernel gets a pointer that it does not read
    aligned = (a.data_ptr() | b.data_ptr()) % 16 == 0
    ends_aligned = (c_or_a.data_ptr() | out.data_ptr()) % 16 == 0
    same = a.data_ptr() == b.data_ptr() and a.stride() == b.mT.stride()
    layout = _Layout(
        a.device, a.dtype, symmetric, c is not None, aligned, ends_aligned, same,
        a.shape, b.shape[2], a.stride(), b.stride(), c_or_a.stride(),
    )  # fmt: skip
    static = _static(layout, config)
    specialized = static.first_entries is not None
    given: list[Any] = [a, b, c_or_a, out]
    for k, descriptor in enumerate(static.descriptors):
        if descriptor is not None:
            given[k] = _make_descriptor(specialized)(given[k], *descriptor)
    if static.first_entries is not None:
        given.append(static.first_entries())
    pointers = (*given, alpha, beta)
    return Launch(static.kernel, static.programs, pointers, static.constants, static.options)


@functools.lru_cache(4096)
def _static(layout: _Layout, config: TileConfig | None) -> _Static:
    # A symmetric b may be read by rows, and then it is read as x is in x x^T.
    by_rows = layout.b_strides[2] == 1
    transposed = not by_rows or (layout.symmetric and layout.has_c)
    along, across = (2, 1) if by_rows else (1, 2)
    b_strides = [layout.b_strides[k] for k in (0, across, along)]
    fits = (
        layout.aligned
        and layout.shape[2] > 0
        and _fits_descriptor(list(layout.a_strides), layout.dtype)
        and _fits_descriptor(b_strides, layout.dtype)
    )
    out_strides = [layout.shape[1] * layout.cols, layout.cols, 1]
    ends_fit = (
        layout.ends_aligned
        and _fits_descriptor(out_strides, layout.dtype)
        and (not layout.has_c or _fits_descriptor(list(layout.c_strides), layout.dtype))
    )
    if config is None:
        rows = layout.shape[1]
        config = config_for(layout.device, layout.symmetric, layout.has_c, rows, fits, ends_fit)
    if config.variant == "pointers":
        return _with_pointers(layout, config)
    if not fits or (config.ends and not ends_fit):
        raise ValueError(
            f"config: {config.variant!r} needs tensor descriptors, which take addresses and "
            f"strides that are multiples of 16 bytes and a last stride of 1 (with ends, of c and "
            f"the result too); got strides "
            f"{layout.a_strides} and {layout.b_strides}. Use variant 'pointers'"
        )
    return _with_descriptors(layout, config, transposed, b_strides)


def tile_table(
    symmetric: bool, rows: int, cols: int, config: TileConfig, device: torch.device
) -> Tensor:
    """`first_entries` on the device: [tiles, 2], int64."""
    key = ("first entries", symmetric, rows, cols, config)
    make = functools.partial(first_entries, symmetric, rows, cols, config)
    return shared_table(key, device, make)


def _with_pointers(layout: _Layout, config: TileConfig) -> _Static:
    n, rows, depth = layout.shape
    tiles = tile_count(layout.symmetric, rows, layout.cols, config)
    even = depth % config.block_k == 0
    constants = (
        rows, layout.cols, depth, tiles,
        *layout.a_strides, *layout.b_strides, *layout.c_strides,
        layout.symmetric, layout.has_c, even, INTERPRETED, *_blocks(config),
    )  # fmt: skip
    return _Static(pointer_kernel, n * tiles, constants, options_of(config))


def _with_descriptors(
    layout: _Layout, config: TileConfig, transposed: bool, b_strides: list[int]
) -> _Static:
    n, rows, depth = layout.shape
    tiles = tile_count(layout.symmetric, rows, layout.cols, config)
    total = n * tiles
    specialized = config.variant == "specialized"
    persistent = specialized or config.variant == "persistent"
    block_m, block_n, block_k, _ = _blocks(config)
    if transposed:
        b_shape, b_block = [n, layout.cols, depth], [1, block_n, block_k]
    else:
        b_shape, b_block = [n, depth, layout.cols], [1, block_k, block_n]
    descriptors: list[_Descriptor | None] = [
        _Descriptor(list(layout.shape), list(layout.a_strides), [1, block_m, block_k]),
        _Descriptor(b_shape, b_strides, b_block),
    ]
    if config.ends:  # see `end_of_tile`
        shape, out_strides = [n, rows, layout.cols], [rows * layout.cols, layout.cols, 1]
        block = [1, block_m, block_m if block_n == 2 * block_m else block_n]
        stored = _Descriptor(shape, out_strides, block)
        unread = stored if specialized else None
        c = _Descriptor(shape, list(layout.c_strides), block) if layout.has_c else unread
        descriptors += [c, stored]
    programs = min(total, _programs(layout.device)) if persistent else total
    if specialized:
        consumers = 8 // config.num_warps
        given = (
            depth, tiles, total, layout.symmetric, layout.has_c, transposed, not layout.same,
            block_m, block_n, block_k, config.num_stages, consumers, config.num_warps,
        )  # fmt: skip
        kernel = _warp_specialized().warp_specialized_kernel
        options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
        table = functools.partial(
            tile_table, layout.symmetric, rows, layout.cols, config, layout.device
        )
        return _Static(kernel, programs, given, options, tuple(descriptors), table)
    constants = (
        rows, layout.cols, depth, tiles, total, *layout.c_strides,
        layout.symmetric, layout.has_c, transposed, persistent, config.ends,
        config.ends and (INTERPRETED or not layout.same), INTERPRETED, *_blocks(config),
    )  # fmt: skip
    return _Static(descriptor_kernel, programs, constants, options_of(config), tuple(descriptors))


def _blocks(config: TileConfig) -> tuple[int, ...]:
    return config.block_m, config.block_n, config.block_k, config.group


def options_of(config: TileConfig) -> dict[str, Any]:
    """What `launch` is told besides the arguments; ``beta c + alpha a b`` is rounded once."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _fits_descriptor(strides: list[int], dtype: torch.dtype) -> bool:
    return strides[2] == 1 and all(
        stride > 0 and stride * dtype.itemsize % 16 == 0 for stride in strides[:2]
    )


def _programs(device: torch.device) -> int:
    """How many persistent programs run at a time: one per SM; in the interpreter, a few."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
