"""The most memory that a step holds beside parameters, gradients and state, on fake tensors.

What an operator of ours or a product makes or takes is memory from there to its last use, in the
order in which a graph has the operations; what only elementwise operations hand to each other is
none, because Inductor fuses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.algorithm import orthogonalize
from normuon_fn.step import local_update_

GIB = 2**30
LARGE = [(96, 2048, 2048), (24, 8192, 2048), (24, 2048, 8192)]  # of a GPT with 1.3B parameters
PRODUCTS = ("aten.bmm", "aten.baddbmm")


class Call(NamedTuple):
    name: str
    takes: list[int]  # storages
    makes: list[int]


class Calls(TorchDispatchMode):
    """Every operation in order. Fake tensors cost nothing, so that all of them are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def _storages(self, values: Any) -> list[int]:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        self.kept += tensors
        for x in tensors:
            self.sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return [x.untyped_storage()._cdata for x in tensors]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket)
        self.calls.append(Call(name, self._storages((args, kwargs)), self._storages(result)))
        return result

    def peak(self) -> int:
        """Bytes of what the operations made, at the worst moment."""
        made: dict[int, int] = {}
        last: dict[int, int] = {}
        real: set[int] = set()
        given: set[int] = set()
        for k, call in enumerate(self.calls):
            given |= set(call.takes) - set(made)
            for storage in set(call.makes) - given:
                made.setdefault(storage, k)
            if call.name.startswith(("normuon_fn", *PRODUCTS)):
                real |= set(call.takes) | set(call.makes)
            last |= dict.fromkeys([*call.takes, *call.makes], k)
        changes = [0] * (len(self.calls) + 1)
        for storage in real & set(made):
            changes[made[storage]] += self.sizes[storage]
            changes[last[storage] + 1] -= self.sizes[storage]
        now = peak = 0
        for change in changes:
            now += change
            peak = max(peak, now)
        return peak


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can ask a fake GPU."""
    monkeypatch.setattr(orthogonalize, "has_bfloat16_matrix_unit", lambda device: True)


def peak_of_a_step(shapes: list[tuple[int, int, int]], guard: str) -> float:
    """GiB, of float32 parameters on a GPU; the step in place."""
    with graphs.fake_cuda():
        sizes = [(rows, cols) for count, rows, cols in shapes for _ in range(count)]
        params = {f"{k}.weight": torch.empty(size, device="cuda") for k, size in enumerate(sizes)}
        grads = {name: torch.empty_like(p) for name, p in params.items()}
        plan = nm.make_plan(params, nm.Config(guard=guard), routes={"*": nm.Route("normuon")})  # type: ignore[arg-type]
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=1e-3)
        with Calls() as calls:
            local_update_(params, grads, state, hyper, plan)
    return calls.peak() / GIB


@pytest.mark.parametrize(("guard", "most"), [("off", 1.3), ("output", 3.0), ("full", 3.0)])
def test_the_temporaries_of_a_chunk_are_gone_before_the_next(guard: str, most: float) -> None:
    """All updates are 2.25 GiB: with a guard, they live until all are known to be finite."""
    assert peak_of_a_step(LARGE, guard) <= most
