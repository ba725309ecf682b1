"""Tables of addresses on the device, through which one launch serves any number of tensors.

A kernel over a list finds its matrix by its program number in such a table. Tables are cached:
where parameters, state and gradients stay in place, a step copies nothing to the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import handles
from .lists import count


class Table(NamedTuple):
    """A table on the device, and what is true of all of its entries."""

    entries: Tensor  # [rows, numbers of a row] int64 on the device
    unit: bool  # all column strides are 1
    aligned: bool  # besides, addresses and row strides are multiples of 16 bytes
    host: Tensor  # what was copied to the device: a captured copy reads it at every replay


class _Contents(NamedTuple):
    rows: list[list[int]]
    unit: bool
    aligned: bool


_SIZE = 1024
_tables: OrderedDict[Hashable, Table] = OrderedDict()
# What captured graphs read at every replay: a few KiB per graph, and never dropped.
_captured: dict[Hashable, Table] = {}


def _cached(
    key: Hashable,
    device: torch.device,
    make: Callable[[], _Contents],
    *,
    shared: bool = False,
) -> Table:
    """The table for ``key``, which must say all that ``make`` depends on, addresses included.

    ``shared``: no address is part of the key, so that work on another stream may find the same
    table. The copy to the device is then complete before this function returns.
    """
    key = (key, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = (capturing and _captured.get(key)) or _tables.get(key)
    if not found:
        rows, unit, aligned = make()
        pinned = device.type == "cuda"
        host = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=pinned)
        found = Table(host.to(device, non_blocking=capturing or not shared), unit, aligned, host)
    if capturing:  # a captured copy has not happened yet: only the graph itself may use it
        _captured[key] = found
    else:
        _tables[key] = found
        _tables.move_to_end(key)
        if len(_tables) > _SIZE:
            _tables.popitem(last=False)
    return found


def matrix_table(*lists: Sequence[Tensor]) -> Table:
    """A row per matrix: its address, row stride and column stride in every list.

    All matrices have one shape. Every list has one dtype.
    """
    # In place, the same list is passed twice.
    keys = {id(tensors): handles.remembered(tensors, _memory_key) for tensors in lists}

    def make() -> _Contents:
        matrices = zip(*map(_addresses_and_strides, lists), strict=True)
        rows = [[number for entry in row for number in entry] for row in matrices]
        unit = all(row[k] == 1 for row in rows for k in range(2, len(row), 3))
        sizes = [tensors[0].element_size() for tensors in lists]
        aligned = all(
            row[3 * k] % 16 == 0 and row[3 * k + 1] * size % 16 == 0
            for row in rows
            for k, size in enumerate(sizes)
        )
        return _Contents(rows, unit, unit and aligned)

    return _cached(tuple(keys[id(tensors)] for tensors in lists), lists[0][0].device, make)


def address_table(*lists: Sequence[Tensor]) -> Table:
    """A row per tensor, of any shape: its address in every list. All tensors are contiguous."""
    key = tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists)

    def make() -> _Contents:
        rows = [[x.data_ptr() for x in row] for row in zip(*lists, strict=True)]
        return _Contents(rows, True, all(address % 16 == 0 for row in rows for address in row))

    return _cached(key, lists[0][0].device, make)


def chunk_table(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Table:
    """A row per chunk of tensors with these sizes: the tensor, its first entry, the whole size."""

    def make() -> _Contents:
        rows = [[k, at, size] for k, size in enumerate(sizes) for at in range(0, size, chunk)]
        return _Contents(rows, True, True)

    return _cached((chunk, sizes), device, make, shared=True)


def shared_table(
    key: Hashable, device: torch.device, make: Callable[[], list[list[int]]]
) -> Tensor:
    """Rows of numbers on the device, int64. ``key`` says all that they depend on: no address."""
    return _cached(key, device, lambda: _Contents(make(), True, True), shared=True).entries


def salt_table(salts: Sequence[int], device: torch.device) -> Tensor:
    """The salts on the device, int64: see `rounding.noise`."""

    def make() -> _Contents:
        return _Contents([list(salts)], True, True)

    return _cached(("salts", *salts), device, make, shared=True).entries


def _memory_key(tensors: Sequence[Tensor]) -> Hashable:
    """Where the matrices of a list are in memory.

    Every call asks this of a hundred tensors, so no Python code runs per tensor.
    """
    first = tensors[0]
    addresses, sizes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    contiguous = all(map(Tensor.is_contiguous, tensors))
    strides = None if contiguous else tuple(map(Tensor.stride, tensors))
    return first.dtype, first.shape[-2:], addresses, sizes, strides


def _addresses_and_strides(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    found = []
    for x in tensors:
        step = x.stride(0) * x.element_size() if x.ndim == 3 else 0
        found += [(x.data_ptr() + k * step, x.stride(-2), x.stride(-1)) for k in range(count(x))]
    return found
