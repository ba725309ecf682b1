"""What a captured graph was captured with: keys, addresses and layouts, by weak reference.

A replay starts only when the call passes tensors at the captured addresses, so nothing needs to
keep them alive. Keeping the gradients alive would cost their memory a second time and give new
gradients other addresses.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..types import Grads, Hyper, Tensors

_call: Any = getattr(operator, "call", lambda function: function())  # Python 3.10 has none


class Inputs:
    """The inputs of one call, without keeping them alive.

    Apart from the launch, `same` is all that a replay costs the host: 88 us for 144 matrices (586
    tensors; one core of a 2-core CPU machine, torch 2.13.0, 2026-11-22). Half of it is `data_ptr`,
    which also notices ``p.data = x``.
    """

    def __init__(self, keys: list[str], values: list[Tensor | None], names: list[str]) -> None:
        self.keys = keys
        self.addresses = _addresses(values)
        self.layouts = [_layout(x) for x in values]
        self.objects: list[Callable[[], Tensor | None]] = [
            _nothing if x is None else weakref.ref(x) for x in values
        ]
        self.names = [*names, *(f"hyper.{name}" for name in Hyper._fields), "found_inf"]

    def same(self, keys: list[str], values: list[Tensor | None]) -> bool:
        """Whether a graph of these inputs can be replayed for a call with ``keys, values``."""
        if keys != self.keys or _addresses(values) != self.addresses:
            return False
        # The same object at the same address has the same layout. For another object there (a new
        # detach(), for instance) the layout is compared.
        if all(map(operator.is_, map(_call, self.objects), values)):  # no Python code per tensor
            return True
        compared = zip(self.objects, values, self.layouts, strict=True)
        return all(known() is x or _layout(x) == layout for known, x, layout in compared)

    def difference(self, new: Inputs) -> str:
        """Names the first tensor that differs, and says what to do about it."""
        if new.keys != self.keys:
            return (
                "GraphedStep: the keys of params, grads or state came in another order; build the "
                "dicts in the same order at every step"
            )
        for k, name in enumerate(self.names):
            old_address, new_address = self.addresses[k], new.addresses[k]
            if old_address == new_address and self.layouts[k] == new.layouts[k]:
                continue
            if old_address is None:
                what = "was None and is a tensor now"
            elif new_address is None:
                what = "was a tensor and is None now"
            elif old_address != new_address:
                what = "moved to another address"
            else:
                what = "has other strides"
            return f"GraphedStep: {name} {what}; {_advice(name)}"
        return "GraphedStep: a tensor was replaced"


def names_of(params: Tensors, grads: Grads, state: Tensors) -> list[str]:
    """How messages call the tensors of these dicts."""
    dicts = {"params": params, "grads": grads, "state": state}
    return [f"{kind}[{name!r}]" for kind, tensors in dicts.items() for name in tensors]


def _addresses(values: list[Tensor | None]) -> list[int | None]:
    address, last = Tensor.data_ptr, values[-1]  # `found_inf` is None in most calls
    try:  # no Python code per tensor
        return [*map(address, values[:-1]), None if last is None else address(last)]  # type: ignore[arg-type]
    except TypeError:  # another one is None
        pass
    return [None if x is None else address(x) for x in values]


def _layout(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _nothing() -> None:
    return None


def _advice(name: str) -> str:
    if name.startswith("grads"):
        return "keep the gradients allocated: zero_grad(set_to_none=False)"
    if name.startswith(("hyper", "found_inf")):
        return f"keep the tensor and write the new value into it: {name}.fill_(x)"
    return "keep the tensor and write the new values into it: copy_"
