"""`step` and `step_` are one graph, and stay that one graph."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import normuon_fn as nm
from normuon_fn.compat import compile_whole
from normuon_fn.step import _update_


def problem(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte": (12, 8), "qkv": (24, 8), "up": (32, 8), "down": (8, 32), "experts": (2, 8, 8), "bias": (8,)}
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return params, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


ROUTES = {"qkv": nm.Route(splits=(8, 8, 8))}


@pytest.mark.parametrize("function", [nm.update, _update_], ids=["step", "step_"])
@pytest.mark.parametrize("guard", ["off", "full"])
def test_twenty_steps_are_one_graph_whatever_changes(function, guard: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=False)
    params, grads = problem()
    plan = nm.make_plan(params, nm.Config(guard=guard), routes=ROUTES)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    for k in range(20):
        hyper = nm.Hyper(*(value * 0.99 for value in hyper))
        grads = problem(k)[1]
        if k == 7:
            grads["up"][0, 0] = float("nan") if guard == "full" else 1.0
        result = compiled(params, grads, state, hyper, plan, found_inf=torch.tensor(float(k == 9)))
        params, state = result.params, result.state
        assert bool(result.skipped) == (k == 9 or (k == 7 and guard == "full"))
    assert counter.frame_count == 1


def test_update_works_in_the_users_own_graph_with_loss_and_backward() -> None:
    params, _ = problem()
    params = {"up": params["up"], "down": params["down"]}
    plan = nm.make_plan(params, nm.Config(guard="full"))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    x = torch.randn(16, 8)

    def loss_fn(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.relu(x @ p["up"].mT) @ p["down"].mT - x).square().mean()

    def train_step(p, s, h):
        grads, loss = torch.func.grad_and_value(loss_fn)(p)
        return nm.update(p, grads, s, h, plan), loss

    whole = torch.compile(train_step, fullgraph=True, dynamic=False)
    losses = []
    for _ in range(8):
        result, loss = whole(params, state, hyper)
        eager, _ = train_step(params, state, hyper)
        torch.testing.assert_close(result.params, eager.params, rtol=0, atol=2e-6)  # seen 1.2e-7
        params, state = result.params, result.state
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_step_equals_step_in_place_bit_for_bit_and_eager_closely_under_inductor() -> None:
    params, grads = problem()
    plan = nm.make_plan(params, nm.Config(guard="full"), routes=ROUTES)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    eager = nm.update(params, grads, state, hyper, plan)
    pure = nm.step(params, grads, state, hyper, plan)
    here, there = ({name: t.clone() for name, t in given.items()} for given in (params, state))
    nm.step_(here, grads, there, hyper, plan)
    for old, new, in_place in ((eager.params, pure.params, here), (eager.state, pure.state, there)):
        assert all(torch.equal(new[name], in_place[name]) for name in new)
        torch.testing.assert_close(new, old, rtol=0, atol=2e-6)  # seen 2.4e-7


def test_any_number_of_plans_compile_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("normuon_fn.step")  # the package names the function the same
    monkeypatch.setattr(module, "compile_whole", lambda function: compile_whole(function, "aot_eager"))
    for k in range(10):
        params = {"w": torch.randn(4, 4 + k)}
        plan = nm.make_plan(params)
        result = nm.step(params, params, nm.init(plan, params), nm.Hyper.of(params, lr=0.1), plan)
        assert result.params["w"].isfinite().all()
