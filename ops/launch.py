"""What every kernel needs: whether it may run, how it is launched, how its tiles are addressed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compiling
from .handles import remembered
from .lazy import HAS_TRITON, INTERPRETED, jit, loaded, tl

# int16 is the part of a float32 master that its bfloat16 parameter lacks: see rounding.py.
# int8 and uint8 are momentum: see codes.py.
KERNEL_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip


def kernels_for(device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether tensors of these dtypes go to the kernels: 16- and 32-bit floats on CUDA.

    float64 takes PyTorch's own operations on CUDA too. Whoever plans asks once, and calls the
    `Operators` that the answer names.

    Raises:
        ImportError: the tensors would go to the kernels, but triton is not installed.
    """
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return False
    if any(dtype not in KERNEL_DTYPES for dtype in dtypes):
        return False
    if not HAS_TRITON:
        raise ImportError("a step on CUDA needs triton: pip install 'normuon_fn[cuda]'")
    return True


def has_kernel(*lists: Sequence[Tensor]) -> bool:
    """`kernels_for` all tensors of these lists; the first list is not empty.

    Raises:
        ImportError: the tensors would go to the kernels, but triton is not installed.
    """
    dtypes = set().union(*(remembered(tensors, _dtypes) for tensors in lists))
    return kernels_for(lists[0][0].device, dtypes)


def _dtypes(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    return {x.dtype for x in tensors}


_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    pointers: tuple[Any, ...],
    constants: tuple[Any, ...],
    *,
    enable_fp_fusion: bool,
    **options: Any,
) -> None:
    """``kernel[(programs,)](*pointers, *constants, **options)``.

    In `compiling.beforehand` the kernel is compiled and does not run.

    ``enable_fp_fusion``: whether a product and a sum may be rounded once, as one instruction. Every
    launch says so, because Triton's default depends on its version and on the environment.

    Triton finds out at every call which of its compiled variants the arguments ask for, which costs
    the host several times the launch. Here ``constants`` (integers, and what is constant in the
    kernel), the options and `_variant` of each pointer tell which variant it is.
    """
    kernel = loaded(kernel)
    options["enable_fp_fusion"] = enable_fp_fusion
    if INTERPRETED:
        kernel[(programs,)](*pointers, *constants, **options)
        return
    bases = (getattr(x, "base", x) for x in pointers)  # of descriptors
    device = next(x.device for x in bases if isinstance(x, Tensor))
    key = (kernel, device, constants, *options.values(), *map(_variant, pointers))
    found = _compiled.get(key)
    if device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            launch(kernel, programs, pointers, constants, **options)
    elif compiling.is_beforehand():
        if found is None:
            compiling.begin(key, kernel, programs, (*pointers, *constants), options)
    elif found is None:
        given = (*pointers, *constants)
        _compiled[key] = compiling.first_launch(kernel, programs, given, options)
    else:
        found[(programs, 1, 1)](*pointers, *constants)


def _variant(x: Any) -> Hashable:
    """What Triton compiles differently: the type, and whether an address is a multiple of 16."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if hasattr(x, "block_shape"):
        return x.base.dtype, *x.block_shape
    return type(x).__name__


def stride_of(x: Tensor | None) -> int:
    """The stride of a number of which all matrices share one, 0-d, or each has its own, [n]."""
    return 0 if x is None or x.ndim == 0 else x.stride(0)


def tile(cols: int, elements: int) -> tuple[int, int]:
    """The shape [BR, BC] of a tile with so many elements; both are powers of two.

    The tile is as wide as the columns allow without a ragged edge.
    """
    wide = cols & -cols  # the largest power of two that divides the columns
    if wide < 64:
        wide = 1 << max(4, (cols - 1).bit_length())  # one that covers them, with a mask
    wide = min(wide, 1024, elements)
    return elements // wide, wide


def dtype_of(x: Tensor) -> Any:
    """The dtype of a tensor as Triton names it."""
    return getattr(tl, _TRITON_DTYPES[x.dtype])


_TRITON_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.float64: "float64",  # of results alone: see `KERNEL_DTYPES`
}


@jit
def at(entry, r, c, DTYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the rows ``r`` and columns ``c`` of one matrix.

    ``entry`` points to the matrix's address, row stride and column stride: see `matrix_table`.
    """
    address = tl.load(entry)
    row_stride = tl.load(entry + 1)
    base = address.to(tl.pointer_type(DTYPE), bitcast=True)
    rows = r.to(tl.int64)[:, None] * row_stride
    # The hint stands here: a hint on the address would be lost where the address becomes a pointer,
    # and every load would be a narrow one.
    if ALIGNED:
        return tl.multiple_of(base + (rows + c[None, :]), (1, 16))
    if UNIT:
        return base + (rows + c[None, :])
    return base + (rows + c.to(tl.int64)[None, :] * tl.load(entry + 2))
