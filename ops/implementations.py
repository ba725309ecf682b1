"""Two implementations of one operation over lists: an operator around a kernel, and a twin.

The twin in reference.py is traced into the graph, so that Inductor compiles it. The operator is
opaque; called directly, it takes lists that no kernel takes too, and runs the twin inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lists, reference
from .launch import has_kernel
from .registration import Operation, register


class Implementations(NamedTuple):
    """One operation, each way to do it. All take the arguments of the operator's schema."""

    operator: Operation
    operator_: Operation  # in place
    twin: Operation
    twin_: Operation  # in place

    def choose(self, kernels: bool, in_place: bool = False) -> Operation:
        if kernels:
            return self.operator_ if in_place else self.operator
        return self.twin_ if in_place else self.twin


def with_kernel(
    name: str,
    schema: str,
    kernel: Operation,
    fake: Operation | None = None,
    *,
    check: Operation,
    writes: Sequence[str] = (),
    twin: Operation | None = None,
) -> Implementations:
    """The implementations of ``name``; without a ``twin``, that of this name in reference.py.

    Args:
        schema, fake, check, writes: see `register`.
        kernel: the operator's body for tensors that `has_kernel` accepts.
        twin: if it is not the function of that name in reference.py.

    A twin with ``writes`` takes as its first argument how a stack is written back into its list.
    """
    twin = twin or getattr(reference, name)
    if not writes:
        body = _body(twin, kernel)
        pure, in_place = register(name, schema, body, fake, check=check)
        return Implementations(pure, in_place, twin, twin)
    body = _writing_body(twin, kernel, len(writes))
    pure, in_place = register(name, schema, body, fake, check=check, writes=writes)
    return Implementations(
        pure, in_place, _writing_twin(twin, lists.unstack), _writing_twin(twin, lists.unstack_)
    )


def _body(twin: Operation, kernel: Operation) -> Operation:
    def body(*arguments: Any) -> Any:
        if has_kernel(*_lists_of_tensors(arguments)):
            return kernel(*arguments)
        results = twin(*arguments)
        return torch.stack(results) if isinstance(results, tuple) else results

    return body


def _writing_body(twin: Operation, kernel: Operation, count: int) -> Operation:
    """``count`` results are new values for the lists ``into``; the body returns the next one."""

    def body(into: Sequence[list[Tensor]], *arguments: Any) -> Any:
        if has_kernel(*_lists_of_tensors(arguments)):
            return kernel(into, *arguments)
        results = twin(lists.unstack, *arguments)
        for targets, values in zip(into, results, strict=False):
            if targets:
                torch._foreach_copy_(targets, list(values))
        return torch.stack(results[count]) if len(results) > count else None

    return body


def _writing_twin(twin: Operation, write: reference.Write) -> Operation:
    def function(*arguments: Any) -> Any:
        results = twin(write, *arguments)
        return results if len(results) > 1 else results[0]

    return function


def _lists_of_tensors(arguments: Sequence[Any]) -> list[Sequence[Tensor]]:
    return [x for x in arguments if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
