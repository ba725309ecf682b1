"""What a graph costs to make does not grow with the model: its lists stay outside of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.step import local_update_

Problem = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], nm.Hyper, nm.Plan]


def problem(count: int, config: nm.Config | None = None, groups: int = 1) -> Problem:
    """So many matrices, tall ones, stacks and biases; with ``groups``, in turn in each of them."""
    torch.manual_seed(0)
    params = {f"wide{k}": torch.randn(4, 6) for k in range(count)}
    params |= {f"tall{k}": torch.randn(6, 4) for k in range(count)}
    params |= {f"stack{k}": torch.randn(2, 4, 6) for k in range(count)}
    params |= {f"bias{k}": torch.randn(4) for k in range(count)}
    routes = {"bias*": nm.Route("adamw"), "*": nm.Route("normuon")}
    of = {name: k % groups for k, name in enumerate(params)} if groups > 1 else None
    plan = nm.make_plan(params, config, routes=routes, hyper_of=of)
    rates = [
        nm.Hyper.of(
            params, lr=0.1 / (k + 1), momentum=0.9 - 0.01 * k, beta2=0.8 + 0.01 * k,
            weight_decay=0.1 * k, adamw_betas=(0.8 + 0.01 * k, 0.9), adamw_eps=1e-8 * (k + 1),
        )
        for k in range(groups)
    ]  # fmt: skip
    hyper = rates[0] if groups == 1 else nm.Hyper.stack(rates)
    grads = {name: torch.randn_like(x) for name, x in params.items()}
    return params, grads, nm.init(params, plan), hyper, plan


def nodes(step: Any, given: Problem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with graphs.recording(monkeypatch) as found:
        step(*given)
    (graph,) = found
    return [f"{node.op} {node.target}" for node in graph.graph.nodes]


@pytest.mark.parametrize("guard", ["off", "full"])
@pytest.mark.parametrize("step", [nm.step, nm.step_])
def test_a_graph_of_twenty_four_parameters_is_that_of_eight(
    step: Any, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = nm.Config(guard=guard, method="standard", steps=1)
    few, many = (nodes(step, problem(count, config), monkeypatch) for count in (2, 6))
    assert few == many


def test_a_graph_of_many_groups_is_that_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    config = nm.Config(guard="full", method="standard", steps=1)
    two, many = (nodes(nm.step_, problem(3, config, k), monkeypatch) for k in (2, 6))
    one = nodes(nm.step_, problem(3, config), monkeypatch)
    assert two == many and len(many) < 1.5 * len(one)


@pytest.mark.parametrize("master", ["none", "mantissa"])
def test_groups_step_as_each_would_alone(master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, operation by operation and as a graph, also where gradients are missing."""
    config = nm.Config(guard="full", method="standard", steps=2, master=master)
    found = []
    for step in (local_update_, nm.step_):
        params, grads, state, hyper, plan = problem(4, config, 3)
        if master != "none":
            params = {name: x.bfloat16() for name, x in params.items()}
            grads = {name: x.bfloat16() for name, x in grads.items()}
            of = {p.name: p.hyper for p in plan.parameters}
            routes = {"bias*": nm.Route("adamw"), "*": nm.Route("normuon")}
            plan = nm.make_plan(params, config, routes=routes, hyper_of=of)
            state = nm.init(params, plan)
        start = {name: x.clone() for name, x in {**params, **state}.items()}
        with graphs.recording(monkeypatch):
            for lacking in ((), ("wide1", "bias0", "stack3")):
                step(params, grads | dict.fromkeys(lacking), state, hyper, plan)
        found.append({**params, **state})
        for k in range(3):
            own = [p.name for p in plan.parameters if p.hyper == k]
            few = {name: start[name] for name in own}
            routes = {p.name: p.route for p in plan.parameters if p.hyper == k}
            alone = nm.make_plan(few, config, routes=routes)
            kept = nm.init(few, alone)
            rates = nm.Hyper(*(x[k] for x in hyper))
            for lacking in ((), ("wide1", "bias0", "stack3")):
                missing = dict.fromkeys(set(lacking) & set(own))
                local_update_(few, {n: grads[n] for n in own} | missing, kept, rates, alone)
            for name, x in {**few, **kept}.items():
                if not name.startswith("guard."):
                    torch.testing.assert_close(found[-1][name], x, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lacking", ["all", "matrices", "biases"])
def test_groups_without_any_gradient_stay_as_they_are(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(2, nm.Config(guard="full", method="standard", steps=1), 3)
    params, grads, state, hyper, plan = given
    without = [n for n in params if lacking == "all" or (lacking == "biases") == ("bias" in n)]
    before = {name: params[name].clone() for name in without}
    for step in (local_update_, nm.step_):
        with graphs.recording(monkeypatch):
            step(params, grads | dict.fromkeys(without), state, hyper, plan)
    assert all(torch.equal(params[name], x) for name, x in before.items())
    assert int(state["guard.step"]) == 2 and not int(state["guard.skipped"])


def test_other_strides_are_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads, state, hyper, plan = problem(1)
    expected = nm.update(params, grads, state, hyper, plan)
    with graphs.recording(monkeypatch) as found:
        for lie in (lambda x: x, lambda x: x.mT.contiguous().mT if x.ndim > 1 else x):
            given = [{name: lie(x.clone()) for name, x in d.items()} for d in (params, grads)]
            own = {name: x.clone() for name, x in state.items()}
            nm.step_(*given, own, hyper, plan)
            for name, x in expected.params.items():
                torch.testing.assert_close(given[0][name], x, rtol=0, atol=1e-6)
    assert len(found) == 1


@pytest.mark.parametrize("guard", ["off", "full"])
def test_found_inf_may_come_and_go(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = nm.Config(guard=guard, method="standard", steps=1)
    found = []
    for step in (local_update_, nm.step_):
        params, grads, state, hyper, plan = problem(1, config)
        with graphs.recording(monkeypatch) as made:
            for inf in (None, 0.0, None, 1.0, 0.0, None):
                given = None if inf is None else torch.tensor(inf)
                step(params, grads, state, hyper, plan, found_inf=given)
        found.append({**params, **state})
    assert len(made) == 2 and int(found[0]["guard.skipped"]) == 1
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
