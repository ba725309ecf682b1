"""Tensors that share memory, or are no plain tensors: they work, or are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import normuon_fn as nm

Tensors = dict[str, Tensor]


class Trivial(torch.Tensor):
    pass


class OwnParameter(nn.Parameter):
    pass


class Quantized(torch.Tensor):
    """As torchao's: a wrapper without memory of its own, which decides what operations do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(lambda x: x.inner if isinstance(x, Quantized) else x, args))


def problem(**params: Tensor) -> tuple[nm.Plan, Tensors, Tensors, Tensors, nm.Hyper]:
    plan = nm.make_plan(params, routes={"*": nm.Route()})
    grads = {name: torch.ones(p.shape) for name, p in params.items()}
    return plan, params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.1)


def test_two_numpy_views_of_one_array_are_refused_by_name() -> None:
    array = np.zeros((9, 8), dtype=np.float32)
    a, b = torch.from_numpy(array), torch.from_numpy(array[4:])
    with pytest.raises(ValueError, match=r"params\['b'\]: shares memory with 'a'; pass tied"):
        nm.make_plan({"a": a, "b": b})
    with pytest.raises(ValueError, match="shares memory with"):
        nm.NorMuon([("a", nn.Parameter(a)), ("b", nn.Parameter(b))], lr=0.1)
    nm.make_plan({"a": torch.from_numpy(array[:4]), "b": b})  # they do not overlap


@pytest.mark.usefixtures("without_inductor")
def test_a_step_in_place_refuses_tensors_that_it_would_write_twice_or_not_at_all() -> None:
    plan, params, grads, state, hyper = problem(a=torch.randn(8, 8), b=torch.randn(8, 8))
    array = np.zeros((8, 8), dtype=np.float32)
    with torch.inference_mode():
        inference = torch.zeros(8, 8)
    cases: list[tuple[Tensors, Tensors, str]] = [
        (params | {"a": params["b"]}, state, r"params\['b'\]: shares memory with 'a'"),
        (params, state | {"a.momentum": params["b"]}, "shares memory with"),
        (
            params,
            state | {f"{k}.momentum": torch.from_numpy(array) for k in "ab"},
            r"state\['b.momentum'\]: shares memory with 'a.momentum'",
        ),
        (params, state | {"a.momentum": torch.zeros(1, 1).expand(8, 8)}, r"as expand\(\) makes"),
        (params, state | {"a.momentum": inference}, "made under torch.inference_mode"),
    ]
    for one, other, message in cases:
        before = {k: x.clone() for k, x in {**one, **other}.items()}
        for _ in range(2):  # a refused call leaves no graph behind that would not ask
            with pytest.raises(ValueError, match=message):
                nm.step_(one, grads, other, hyper, plan)
        assert all(torch.equal(x, before[k]) for k, x in {**one, **other}.items())
    nm.step_(params, grads, state, hyper, plan)
    assert int(state["guard.step"]) == 1


def test_lists_that_share_memory_are_refused_by_their_place() -> None:
    array = np.zeros((8, 8), dtype=np.float32)
    w, given = torch.randn(8, 8), torch.from_numpy(array)
    with pytest.raises(ValueError, match=r"momentums\[0\]: is the tensor of params\[0\]"):
        nm.foreach_step_(
            [given], [w], [torch.from_numpy(array)], [torch.zeros(8, 1)],
            lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, compiled=False,
        )  # fmt: skip


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("kind", [Trivial, OwnParameter, nn.Parameter])
def test_a_parameter_of_a_subclass_without_behavior_steps_as_a_plain_one(kind: type) -> None:
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    moved = []
    for make in (lambda x: x, lambda x: x.as_subclass(kind) if kind is Trivial else kind(x)):
        plan, params, grads, state, hyper = problem(w=make(w.clone()))
        for _ in range(2):
            result = nm.step(params, grads, state, hyper, plan)
            nm.step_(params, grads, state, hyper, plan)
            assert torch.equal(result.params["w"], params["w"])
        moved.append(params["w"].detach().clone())
    assert torch.equal(moved[0], moved[1]) and type(params["w"]) is kind

    model = nn.Linear(12, 8, bias=False)
    if kind is Trivial:
        model.weight = nn.Parameter(w.clone().as_subclass(Trivial))
        assert isinstance(model.weight, Trivial)
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.1, routes={"*": nm.Route()})
    model(torch.ones(2, 12)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight.detach())


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("where", ["grads", "state"])
def test_a_subclass_that_the_plan_does_not_have_is_named(where: str) -> None:
    plan, params, grads, state, hyper = problem(w=torch.randn(8, 12))
    given = {"grads": (grads, "w"), "state": (state, "w.momentum")}
    tensors, name = given[where]
    tensors[name] = tensors[name].as_subclass(Trivial)
    with pytest.raises(
        TypeError, match=rf"{where}\['{name}'\]: expected a plain tensor, got a Trivial; pass its"
    ):
        nm.step_(params, grads, state, hyper, plan)
    assert int(state["guard.step"]) == 0


def test_what_has_no_memory_of_its_own_or_no_shape_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"params\['q'\]: expected a plain .* got a Quantized, "):
        nm.make_plan({"w": torch.zeros(4, 4), "q": Quantized(torch.zeros(4, 4))})
    with pytest.raises(ValueError, match=r"params\['w'\]: is an UninitializedParameter, which"):
        nm.make_plan({"w": nn.UninitializedParameter()})
