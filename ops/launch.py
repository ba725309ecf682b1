"""What all kernels over lists share: tables of addresses on the device, and tiles.

A kernel over a list finds its matrix by its program number in a table of addresses and strides, so that one launch serves any
number of tensors. Tables are cached: where parameters, state and gradients stay in place, a step copies nothing to the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lists, reference
from .lists import count
from .registration import Op, register

try:
    import triton
    import triton.language as tl

    INTERPRETED = bool(
        triton.knobs.runtime.interpret
    )  # TRITON_INTERPRET=1 when triton was imported: kernels run on the CPU
except ImportError:
    triton = tl = None
    INTERPRETED = False

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
)  # int16: what bfloat16 lacks of a float32


def jit(function: Callable[..., Any], **options: Any) -> Any:
    return function if triton is None else triton.jit(function, **options)


def has_kernel(*lists: Sequence[Tensor]) -> bool:
    """Whether lists go to the kernels: 16- and 32-bit floats on CUDA. float64 takes PyTorch's own operations there too.

    Raises:
        ImportError: it would, but there is no triton.
    """
    device = lists[0][0].device.type
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return False
    if any(x.dtype not in DTYPES for tensors in lists for x in tensors):
        return False
    if triton is None:
        raise ImportError("a step on CUDA needs triton: pip install 'normuon_fn[cuda]'")
    return True


_kernels: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    pointers: tuple[Any, ...],
    constants: tuple[Any, ...],
    **options: Any,
) -> None:
    """``kernel[(programs,)](*pointers, *constants, **options)``.

    Triton works out at every call which of its compiled variants the arguments ask for, which costs the host several times the
    launch. Here ``constants`` (integers, and what is constant in the kernel) and what is known of each pointer tell it.
    """
    if INTERPRETED:
        kernel[(programs,)](*pointers, *constants, **options)
        return
    device = next(x.device for x in pointers if isinstance(x, Tensor))
    key = (kernel, device, constants, *map(_variant, pointers))
    found = _kernels.get(key)
    if device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            launch(kernel, programs, pointers, constants, **options)
    elif found is None:
        _kernels[key] = kernel[(programs,)](*pointers, *constants, **options)
    else:
        found[(programs, 1, 1)](*pointers, *constants)


def _variant(x: Any) -> Hashable:
    """What Triton compiles differently: the type, and whether an address is a multiple of 16."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if hasattr(x, "block_shape"):
        return x.base.dtype, *x.block_shape
    return type(x).__name__


class Table(NamedTuple):
    entries: Tensor  # int64 on the device
    unit: bool  # all column strides are 1
    aligned: bool  # addresses and row strides are multiples of 16 bytes besides
    host: Tensor  # what was copied to the device: a captured copy reads it at every replay


_SIZE = 1024
_tables: OrderedDict[Hashable, Table] = OrderedDict()
_captured: dict[
    Hashable, Table
] = {}  # what captured graphs read at every replay: a few KiB each, and never dropped


def cached(
    key: Hashable,
    device: torch.device,
    make: Callable[[], tuple[list[list[int]], bool, bool]],
    *,
    shared: bool = False,
) -> Table:
    """The table of that key, which must say everything that ``make`` depends on, every address included.

    ``shared``: the key holds no address, so that work on another stream may find the table: it is complete before that.
    """
    key = (key, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = (capturing and _captured.get(key)) or _tables.get(key)
    if not found:
        rows, unit, aligned = make()
        host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        found = Table(host.to(device, non_blocking=capturing or not shared), unit, aligned, host)
    if capturing:  # a copy that was captured has not happened yet: only the graph itself may use it
        _captured[key] = found
    else:
        _tables[key] = found
        _tables.move_to_end(key)
        if len(_tables) > _SIZE:
            _tables.popitem(last=False)
    return found


def matrix_table(*lists: Sequence[Tensor]) -> Table:
    """A row for every matrix: address, row stride and column stride in every list. All matrices have one shape."""
    places = {id(x): _place(x) for x in lists}  # in place, a list is there twice
    key = tuple(places[id(x)] for x in lists)

    def make() -> tuple[list[list[int]], bool, bool]:
        rows = [
            [n for place in row for n in place] for row in zip(*map(_matrices, lists), strict=True)
        ]
        unit = all(row[at] == 1 for row in rows for at in range(2, len(row), 3))
        sizes = [tensors[0].element_size() for tensors in lists]
        aligned = all(
            row[3 * k] % 16 == 0 and row[3 * k + 1] * size % 16 == 0
            for row in rows
            for k, size in enumerate(sizes)
        )
        return rows, unit, unit and aligned

    return cached(key, lists[0][0].device, make)


def address_table(*lists: Sequence[Tensor]) -> Table:
    """A row for every tensor, of any shape: its address in every list. All are contiguous."""
    key = tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists)

    def make() -> tuple[list[list[int]], bool, bool]:
        rows = [[x.data_ptr() for x in row] for row in zip(*lists, strict=True)]
        return rows, True, all(address % 16 == 0 for row in rows for address in row)

    return cached(key, lists[0][0].device, make)


def chunk_table(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Table:
    """A row for every chunk of the tensors of those sizes: which tensor, from where, how many elements it has in all."""

    def make() -> tuple[list[list[int]], bool, bool]:
        return (
            [[k, at, size] for k, size in enumerate(sizes) for at in range(0, size, chunk)],
            True,
            True,
        )

    return cached((chunk, sizes), device, make, shared=True)


def salt_table(salts: Sequence[int], device: torch.device) -> Tensor:
    """The numbers on the device: see `rounding.noise`."""
    return cached(
        ("salts", *salts), device, lambda: ([list(salts)], True, True), shared=True
    ).entries


def _place(tensors: Sequence[Tensor]) -> Hashable:
    """Where the matrices of a list lie. It is asked for a hundred tensors a call: no Python for any of them."""
    first = tensors[0]
    addresses, sizes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    strides = (
        None if all(map(Tensor.is_contiguous, tensors)) else tuple(map(Tensor.stride, tensors))
    )
    return first.dtype, first.shape[-2:], addresses, sizes, strides


def _matrices(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    found = []
    for x in tensors:
        step = x.stride(0) * x.element_size() if x.ndim == 3 else 0
        found += [(x.data_ptr() + k * step, x.stride(-2), x.stride(-1)) for k in range(count(x))]
    return found


def tile(cols: int, elements: int) -> tuple[int, int]:
    """A tile [BR, BC] of so many elements, powers of two: as wide as the columns allow without a ragged edge."""
    wide = cols & -cols  # the largest power of two that divides the columns
    if wide < 64:
        wide = 1 << max(4, (cols - 1).bit_length())  # one that covers them, with a mask
    wide = min(wide, 1024, elements)
    return elements // wide, wide


def dtype_of(x: Tensor) -> Any:
    return _TRITON[x.dtype]


_TRITON = (
    {}
    if tl is None
    else {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.int16: tl.int16,
    }
)


@jit
def at(entry, r, c, DTYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the rows ``r`` and columns ``c`` of the matrix whose address and strides lie at ``entry``."""
    address = tl.load(entry)
    row_stride = tl.load(entry + 1)
    base = address.to(tl.pointer_type(DTYPE), bitcast=True)
    rows = r.to(tl.int64)[:, None] * row_stride
    if ALIGNED:  # hinted here: a hint on the address would be lost where it becomes a pointer, and every load a narrow one
        return tl.multiple_of(base + (rows + c[None, :]), (1, 16))
    if UNIT:
        return base + (rows + c[None, :])
    return base + (rows + c.to(tl.int64)[None, :] * tl.load(entry + 2))


def with_kernel(
    name: str, schema: str, kernel: Op, fake: Op, *, writes: Sequence[str] = ()
) -> tuple[Op, Op]:
    """``(pure, in_place)`` of an op over lists: an operator around its kernel, or its twin in reference.py.

    The twin is traced into the graph, so that Inductor compiles it. The operator takes lists without a kernel too.
    """
    twin = getattr(reference, name)
    count = len(writes)

    def body(*arguments: Any) -> Any:
        given = arguments[1:] if writes else arguments
        if has_kernel(*_lists(given)):
            return kernel(*arguments)
        if not writes:
            results = twin(*given)
            return torch.stack(results) if isinstance(results, tuple) else results
        results = twin(lists.unstack, *given)
        for targets, new in zip(arguments[0], results, strict=False):
            if targets:
                torch._foreach_copy_(targets, list(new))
        return torch.stack(results[count]) if len(results) > count else None

    pure, in_place = register(name, schema, body, fake, writes=writes)

    def choose(operator: Op, write: Op) -> Op:
        def op(*arguments: Any) -> Any:
            if has_kernel(*_lists(arguments)):
                return operator(*arguments)
            if not writes:
                return twin(*arguments)
            results = twin(write, *arguments)
            return results if len(results) > 1 else results[0]

        return op

    return choose(pure, lists.unstack), choose(in_place, lists.unstack_)


def _lists(arguments: Sequence[Any]) -> list[list[Tensor]]:
    return [
        list(x)
        for x in arguments
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)
    ]
