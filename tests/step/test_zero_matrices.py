"""A zero matrix that is to keep its norm is refused wherever a run begins, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.planning import hyperball
from normuon_fn.runtime.compiled import eager_step_

ROUTES = {"w": nm.Route("normuon", heads=2)}
CONFIG = nm.Config(weight_decay_form="hyperball", orthogonalize_dtype=torch.float32)
REFUSED = r"params\['w'\]: has a matrix of zeros"


def params_of(*, zero: bool) -> dict[str, Tensor]:
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    w[4:] *= not zero  # the second head
    return {"w": w, "bias": torch.zeros(6)}


def run(step: Callable[..., Any], params: dict[str, Tensor], plan: nm.Plan, state: Any) -> Any:
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    return step(params, grads, state, nm.Hyper.of(params, lr=0.1), plan)


def state_from_elsewhere(plan: nm.Plan) -> dict[str, Tensor]:
    """As it comes from a checkpoint of torch, without `init` of this plan."""
    params = params_of(zero=False)
    return nm.init(nm.make_plan(params, CONFIG, routes=ROUTES), params)


@pytest.mark.parametrize("step", [nm.update, nm.step, nm.step_, eager_step_])
def test_the_first_step_of_a_plan_without_init_refuses_it_and_writes_nothing(
    step: Any, without_inductor: None
) -> None:
    params = params_of(zero=True)
    plan = nm.make_plan(params, CONFIG, routes=ROUTES)
    state = state_from_elsewhere(plan)
    before = {k: x.clone() for k, x in (params | state).items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            run(step, params, plan, state)
    assert all(torch.equal(x, before[k]) for k, x in (params | state).items())
    run(step, params_of(zero=False), plan, state)


@pytest.mark.parametrize("step", [nm.update, nm.step_])
def test_steps_after_the_first_use_of_a_plan_read_no_values(
    step: Any, without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    has_zero = hyperball._has_zero
    monkeypatch.setattr(hyperball, "_has_zero", lambda *a: calls.append(1) or has_zero(*a))
    params = params_of(zero=False)
    for begins_with_init in (False, True):
        plan = nm.make_plan(params, CONFIG, routes=ROUTES)
        state = nm.init(plan, params) if begins_with_init else state_from_elsewhere(plan)
        calls.clear()
        for _ in range(3):
            run(step, params, plan, state)
        assert len(calls) == (0 if begins_with_init else 1)
    run(step, params_of(zero=True), plan, state)  # which nobody could tell without waiting


@pytest.mark.parametrize("compiled", [True, False])
def test_lists_refuse_it_at_the_first_call_with_such_tensors(
    compiled: bool, without_inductor: None
) -> None:
    w = params_of(zero=True)["w"]
    momentum, variance = torch.zeros_like(w), torch.zeros(8, 1)
    given: dict[str, Any] = {
        "lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0, "config": CONFIG,
        "routes": [nm.Route(heads=2)], "compiled": compiled,
    }  # fmt: skip
    for _ in range(2):
        with pytest.raises(ValueError, match=r"params\['0'\]: has a matrix of zeros"):
            nm.foreach_step_([w], [torch.ones_like(w)], [momentum], [variance], **given)
    assert not momentum.any()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_with_it_is_not_loaded_and_nothing_is_written(
    in_place: bool, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    params = params_of(zero=True)
    usual = nm.make_plan(params, routes=ROUTES)
    nm.save(tmp_path / "run", params, nm.init(usual, params), usual)
    own = params_of(zero=False)
    plan = nm.make_plan(own, CONFIG, routes=ROUTES)
    state = nm.init(plan, own)
    before = own["w"].clone()
    with (
        pytest.warns(UserWarning, match="weight_decay_form was 'decoupled', is 'hyperball'"),
        pytest.raises(nm.CheckpointError, match=f"run: {REFUSED}"),
    ):
        nm.load(tmp_path / "run", plan, **({"params": own, "state": state} if in_place else {}))
    assert torch.equal(own["w"], before)


def test_weights_loaded_after_construction_are_looked_at_before_the_first_step(
    eager: None,
) -> None:
    w = nn.Parameter(params_of(zero=False)["w"])
    optimizer = nm.NorMuon([("w", w)], config=CONFIG, routes=ROUTES)
    with torch.no_grad():
        w.copy_(params_of(zero=True)["w"])
    w.grad = torch.ones_like(w)
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            optimizer.step()
    with torch.no_grad():
        w.copy_(params_of(zero=False)["w"])
    optimizer.step()


def test_members_under_vmap_and_observers_step_without_the_look(without_inductor: None) -> None:
    params = params_of(zero=True)
    plan = nm.make_plan(params, CONFIG, routes=ROUTES)
    two: Any = {name: torch.stack([p, p]) for name, p in params.items()}
    states = {k: torch.stack([x, x]) for k, x in state_from_elsewhere(plan).items()}
    hyper = nm.Hyper.of(params, lr=0.1)
    new = torch.func.vmap(lambda p, s: nm.update(p, p, s, hyper, plan).params)(two, states)
    assert torch.equal(new["w"][:, 4:], two["w"][:, 4:])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as mode:
        run(nm.update, params, plan, state_from_elsewhere(plan))
    assert mode.get_total_flops() > 0
