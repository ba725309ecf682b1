"""A step is compiled once, whatever changes between its calls."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import ROUTES, SHORT, SMALL, TINY, problem, tensors
from normuon_fn.compat import graphs as making

STEPS = pytest.mark.parametrize("step", [nm.step, nm.step_], ids=["step", "step_"])


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> graphs.CompileCounter:
    """Counts what `step` and `step_` compile, with dynamo's guards, and runs the graph as it is."""
    return graphs.counting(monkeypatch)


@STEPS
@pytest.mark.parametrize("guard", ["off", "full"])
def test_twenty_steps_are_one_graph_whatever_changes(
    step: Callable, guard: str, counter: graphs.CompileCounter
) -> None:
    params, _, state, hyper, plan = problem(SMALL, nm.Config(guard=guard, **SHORT), routes=ROUTES)
    skipped = []
    for k in range(20):
        hyper = nm.Hyper(*(value * 0.99 for value in hyper))
        grads = tensors(SMALL, k)
        if k == 7 and guard == "full":
            grads["up"][0, 0] = float("nan")
        if k == 12:
            loaded = load(save(state))
            assert list(loaded) != list(
                state
            )  # safetensors sorts; the template's order is the one to restore
            state = {name: loaded[name] for name in state}
        with graphs.no_recompile():
            result = step(params, grads, state, hyper, plan, found_inf=torch.tensor(float(k == 9)))
        params, state = result.params, result.state
        skipped += [k] if result.skipped else []
    assert counter.frame_count == 1
    assert skipped == ([7, 9] if guard == "full" else [9])
    assert all(tensor.isfinite().all() for tensor in params.values())


def test_a_models_own_parameters_and_new_gradients_every_step_are_one_graph(
    counter: graphs.CompileCounter,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    params = dict(model.named_parameters())
    plan = nm.make_plan(params, nm.Config(guard="full", **SHORT))
    state = nm.init(plan, params)
    for k in range(5):
        model.zero_grad(set_to_none=True)
        model(torch.randn(3 + k, 4)).square().sum().backward()
        with graphs.no_recompile():
            grads = {name: p.grad for name, p in params.items()}
            nm.step_(params, grads, state, nm.Hyper.of(params, lr=0.1 / (k + 1)), plan)
    assert counter.frame_count == 1


def test_any_number_of_plans_compile_in_one_process(counter: graphs.CompileCounter) -> None:
    for k in range(9):  # dynamo's limit is 8
        given = problem({"w": (4, 4 + k)}, nm.Config(**SHORT))
        with graphs.no_recompile():
            for _ in range(2):
                assert nm.step(*given).params["w"].isfinite().all()
    assert counter.frame_count == 9


def test_with_and_without_found_inf_or_a_gradient_are_graphs_of_their_own(
    counter: graphs.CompileCounter,
) -> None:
    given = problem(TINY, nm.Config(guard="full", **SHORT))
    without = given._replace(grads={**given.grads, "bias": None})
    for _ in range(2):
        nm.step(*given)
        nm.step(*given, found_inf=torch.zeros(()))
        nm.step(*without)
    assert counter.frame_count == 3


def test_guards_on_the_plan_are_dropped_and_all_others_are_kept(
    counter: graphs.CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, kept, dropped = making.not_of_the_plan, [], []

    def recorded(guards: Sequence[Any]) -> list[bool]:
        chosen = choose(guards)
        for guard, keep in zip(guards, chosen, strict=True):
            (kept if keep else dropped).append(guard.name)
        return chosen

    monkeypatch.setattr(making, "not_of_the_plan", recorded)
    # A function of the user's own is what Dynamo traces, with the plan as an argument.
    nm.step(*problem(TINY, nm.Config(orthogonalizer=lambda x: 2 * x)))
    assert dropped and all(re.search(r"\bplan\b", name) for name in dropped)
    assert not [name for name in kept if re.search(r"\bplan\b", name)]
    assert any(name.startswith("params") for name in kept)


def test_a_plan_that_nobody_uses_any_more_is_freed_with_its_graph(
    counter: graphs.CompileCounter,
) -> None:
    given = problem(TINY, nm.Config(**SHORT))
    nm.step(*given)
    plan = weakref.ref(given.plan)
    del given
    gc.collect()
    assert plan() is None
