"""What a step in place cannot write is refused by name before anything is written.

Tensors that were made under ``torch.inference_mode()``, and entries that share one place in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.runtime.test_graphed import Rehearsed

pytestmark = pytest.mark.usefixtures("without_inductor")
DICTS = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], nm.Hyper, nm.Plan]


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(6, 6)


def expanded() -> Tensor:
    return torch.randn(1, 6).expand(6, 6)


def sliding() -> Tensor:
    return torch.randn(16).as_strided((6, 6), (2, 1))


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "inference": (
        inference,
        "cannot be written in place: it was made under torch.inference_mode.*clone",
    ),
    "expanded": (
        expanded,
        "cannot be written in place: several of its entries are one place in memory.*clone",
    ),
    "sliding": (
        sliding,
        "cannot be written in place: several of its entries are one place in memory.*clone",
    ),
}
bad = pytest.mark.parametrize("kind", BAD)


@functools.cache
def plan_of_two() -> nm.Plan:
    """One plan for all tests, so that its graph is traced once."""
    params = {"w": torch.zeros(6, 6), "b": torch.zeros(6)}
    return nm.make_plan(params, nm.Config(orthogonalize_dtype=torch.float32))


def problem(w: Tensor) -> DICTS:
    params, plan = {"w": w, "b": torch.randn(6)}, plan_of_two()
    grads = {name: torch.randn(p.shape) for name, p in params.items()}
    return params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.5), plan


def call(how: str, *given: Any) -> Any:
    if how == "GraphedStep":
        return Rehearsed(given[-1])(*given[:-1])
    return nm.step_(*given)


@bad
@pytest.mark.parametrize("how", ["step_", "GraphedStep"])
@pytest.mark.parametrize("of", ["params", "state"])
def test_what_cannot_be_written_is_refused_by_name_and_nothing_is_written(
    kind: str, how: str, of: str
) -> None:
    make, message = BAD[kind]
    params, grads, state, hyper, plan = problem(torch.randn(6, 6))
    good = dict(params), dict(state)
    (params if of == "params" else state)["w" if of == "params" else "w.momentum"] = make()
    before = [x.clone() for x in (*params.values(), *state.values())]
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{of}\['w[^']*'\]: {message}"):
            call(how, params, grads, state, hyper, plan)
        after = [*params.values(), *state.values()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        fine = [{name: x.clone() for name, x in d.items()} for d in (good[0], grads, good[1])]
        nm.step_(*fine, hyper, plan)  # after which the graph is there


@bad
def test_the_pure_step_takes_them(kind: str) -> None:
    params, grads, state, hyper, plan = problem(BAD[kind][0]())
    result = nm.step(params, grads, state, hyper, plan)
    plain = {name: p.clone() for name, p in params.items()}
    expected = nm.step(plain, grads, state, hyper, plan)
    assert torch.equal(result.params["w"], expected.params["w"])


def test_strides_that_interleave_without_meeting_are_written() -> None:
    w = torch.zeros(64).as_strided((2, 3), (3, 2))  # places 0 2 4 and 3 5 7
    params = {"w": w}
    plan = nm.make_plan(params, routes={"w": nm.Route("adamw")})
    grads = {"w": torch.ones(2, 3)}
    nm.step_(params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.5), plan)
    assert torch.allclose(w, torch.full((2, 3), -0.5))


def test_a_step_under_inference_mode_takes_what_was_made_there() -> None:
    params, grads, state, hyper, plan = problem(torch.randn(6, 6))
    other = [{name: x.clone() for name, x in d.items()} for d in (params, state)]
    nm.step_(params, grads, state, hyper, plan)
    with torch.inference_mode():
        here = {name: p.clone() for name, p in other[0].items()}
        nm.step_(here, grads, other[1], hyper, plan)
        assert all(torch.equal(here[name], p) for name, p in params.items())


def test_a_plan_a_state_and_a_hyper_that_are_made_under_inference_mode_work_outside() -> None:
    w = torch.randn(6, 6)
    results = []
    for inside in (False, True):
        params = {"w": w.clone(), "b": torch.zeros(6)}
        grads = {name: torch.ones(p.shape) * 0.5 for name, p in params.items()}
        with torch.inference_mode(inside):
            plan = nm.make_plan(params, nm.Config(orthogonalize_dtype=torch.float32))
            state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)
        hyper.lr.fill_(0.25)
        for _ in range(2):
            nm.step_(params, grads, state, hyper, plan)
        results.append(params["w"])
    assert torch.equal(*results)


# --- the optimizer


def run(optimizer: Any, model: nn.Module, steps: range) -> None:
    for k in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(k))
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("where", ["constructor", "add_param_group", "load", "a later step"])
def test_an_optimizer_that_is_made_or_loaded_under_inference_mode_steps_outside(where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    twin = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    twin.load_state_dict(model.state_dict())
    first, last = (list(model[k].named_parameters(prefix=str(k))) for k in (0, 2))
    theirs = [list(twin[k].named_parameters(prefix=str(k))) for k in (0, 2)]
    plain = nm.NorMuon([{"params": named} for named in theirs])
    run(plain, twin, range(2))
    groups: Any = [{"params": first}, {"params": last}]
    with torch.inference_mode(where == "constructor"):
        optimizer = nm.NorMuon(groups[:1] if where == "add_param_group" else groups)
    if where == "add_param_group":
        with torch.inference_mode():
            optimizer.add_param_group(groups[1])
    run(optimizer, model, range(2))
    if where == "load":
        fresh = nm.NorMuon([{"params": first}, {"params": last}])
        with torch.inference_mode():
            fresh.state.clear()
            fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    if where == "a later step":
        for p in model[0].parameters():
            p.requires_grad_(False)  # another set of gradients, planned for there
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        with torch.inference_mode():
            optimizer.step()
        kept = [x for kinds in optimizer.state.values() for x in kinds.values()]
        assert not any(x.is_inference() for x in kept)
        model[0].requires_grad_(True)
    else:
        run(plain, twin, range(2, 4))
    run(optimizer, model, range(2, 4))
    if where != "a later step":
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@bad
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
def test_an_optimizer_refuses_such_a_parameter_at_construction(kind: str, algorithm: Any) -> None:
    make, message = BAD[kind]
    with torch.inference_mode(kind == "inference"):
        parameter = nn.Parameter(make())
    named = [("good", nn.Parameter(torch.randn(6, 6))), ("w", parameter)]
    with pytest.raises(ValueError, match=rf"params\['w'\]: {message}"):
        nm.NorMuon([{"params": named, "algorithm": algorithm}])
    optimizer = nm.NorMuon([{"params": named[:1], "algorithm": algorithm}])
    with pytest.raises(ValueError, match=rf"params\['w'\]: {message}"):
        optimizer.add_param_group({"params": named[1:], "algorithm": algorithm})
    assert len(optimizer.param_groups) == 1
    adam = torch.optim.AdamW(named)  # which finds it at its step, where others have moved
    parameter.grad = torch.ones(6, 6)
    if kind != "sliding":  # and this one it steps wrongly
        with pytest.raises(RuntimeError):
            adam.step()
