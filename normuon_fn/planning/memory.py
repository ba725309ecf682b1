"""Whether tensors can be written in place: each entry once, and nothing by half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..compat import address, storage_key
from ..distributed.placements import local


class Reach(NamedTuple):
    """The bytes of one memory from a tensor's first entry to its last."""

    memory: int
    start: int
    end: int
    what: str
    name: str


def check_apart(given: Mapping[str, Mapping[str, Tensor]], advice: str) -> None:
    """That no tensor begins before another one ends, as parts of one storage may not either.

    By addresses: tensors of several storages can share memory too, as two of one numpy array do.

    Args:
        given: dicts of tensors by what messages call them: ``params``, ``state``.

    Raises:
        ValueError: naming both, and what to do: ``advice``.
    """
    found = [
        reach
        for what, tensors in given.items()
        for name, tensor in tensors.items()
        if (reach := _reach(what, name, tensor)) is not None
    ]
    found.sort(key=lambda reach: reach[:2])
    for old, new in pairwise(found):
        if new.memory == old.memory and new.start < old.end:
            other = repr(old.name) if old.what == new.what else f"{old.what}[{old.name!r}]"
            raise ValueError(f"{new.what}[{new.name!r}]: shares memory with {other}; {advice}")


def check_writable(given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """That every tensor of these dicts can be written in place, all of them after one another.

    Raises:
        ValueError: naming one that cannot, and what to pass instead.
    """
    check_each_writable(given)
    check_apart(given, "each must have memory of its own: clone() one of them")


def check_each_writable(given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """That every tensor of these dicts can be written in place, whatever the others share.

    Raises:
        ValueError: naming one that cannot, and what to pass instead.
    """
    for what, tensors in given.items():
        for name, tensor in tensors.items():
            x = local(tensor)
            if x.is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError(
                    f"{what}[{name!r}]: cannot be written in place: it was made under "
                    "torch.inference_mode(); pass its clone(), made outside of it"
                )
            if overlaps_itself(x):
                raise ValueError(
                    f"{what}[{name!r}]: cannot be written in place: several of its entries are one "
                    f"place in memory (shape {tuple(x.shape)}, strides {x.stride()}, as expand() "
                    "makes them); pass its clone()"
                )


def in_one_storage(tensors: Iterable[Tensor]) -> bool:
    """Whether some are parts of one storage."""
    keys = [storage_key(local(tensor)) for tensor in tensors if local(tensor).numel()]
    return len(set(keys)) < len(keys)


def overlaps_itself(x: Tensor) -> bool:
    """Whether two entries of a tensor have the same address."""
    if x.is_contiguous() or not x.numel():
        return False
    dims = sorted((step, n) for step, n in zip(x.stride(), x.shape, strict=True) if n > 1)
    reach = 0
    for step, n in dims:
        if step <= reach:
            break
        reach += step * (n - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    places = sum(  # strides that interleave may still miss each other
        torch.arange(n, device="cpu").mul(step).reshape(-1, *[1] * k)
        for k, (step, n) in enumerate(dims)
    )
    return isinstance(places, Tensor) and places.unique().numel() < places.numel()


def _reach(what: str, name: str, tensor: Tensor) -> Reach | None:
    tensor = local(tensor)
    if not tensor.numel():
        return None
    extent = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start, memory = address(tensor), hash(tensor.device)
    if start is None:
        start, memory = int(tensor.storage_offset()) * tensor.itemsize, hash(storage_key(tensor))
    return Reach(memory, start, start + int(extent) * tensor.itemsize, what, name)
