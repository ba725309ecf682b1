"""Schedules: functions of the number of steps alone, without a sync, in a graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs


def test_it_rises_in_the_warmup_and_falls_as_a_cosine_to_the_end() -> None:
    schedule = nm.Schedule(total=20, warmup=4, final=0.1)
    found = [schedule(k) for k in range(24)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for k in range(4, 20):
        share = (k - 4) / 16
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
        assert found[k] == pytest.approx(expected, rel=1e-7)
    assert found[20:] == [pytest.approx(0.1)] * 4


def test_a_short_decay_leaves_the_peak_between() -> None:
    schedule = nm.Schedule(total=10, warmup=2, decay=4, shape="linear")
    found = [schedule(k) for k in range(12)]
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [nm.Schedule(total=3, decay=0)(k) for k in range(4)] == [1.0, 1.0, 1.0, 0.0]
    assert [nm.Schedule(total=3, warmup=3)(k) for k in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_tensors_and_ints_have_the_same_values_and_any_shape_is_taken() -> None:
    schedule = nm.Schedule(total=50, warmup=5)
    steps = torch.arange(60, dtype=torch.int32).view(6, 10)
    found = schedule(steps)
    assert found.shape == steps.shape and found.dtype == torch.float32
    torch.testing.assert_close(
        found.flatten(), torch.tensor([schedule(k) for k in range(60)]), rtol=1e-6, atol=1e-8
    )


def test_the_step_of_the_state_moves_both_rates_without_a_sync_and_in_a_graph() -> None:
    params = {"layers.0": torch.randn(4, 6), "bias": torch.randn(3)}
    plan = nm.make_plan(params, nm.Config(steps=1, method="standard"))
    peak = nm.Hyper.of(params, lr=0.02, adamw_lr=0.002)
    schedule = nm.Schedule(total=6, warmup=2)
    grads = {name: torch.randn_like(x) for name, x in params.items()}

    def step(params: Any, state: Any) -> tuple[Any, Any, Tensor]:
        hyper = peak.scaled(schedule(state["guard.step"]))
        result = nm.update(params, grads, state, hyper, plan)
        return result.params, result.state, hyper.adamw_lr

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state, rates = nm.init(plan, params), []
    with graphs.no_host_sync():
        step(params, state)
    for _ in range(6):
        params, state, rate = compiled(params, state)
        rates.append(rate.item())
    assert rates == pytest.approx([0.002 * schedule(k) for k in range(6)], rel=1e-6)


def test_a_run_that_is_loaded_goes_on_where_the_schedule_was() -> None:
    schedule, step = nm.Schedule(total=10), torch.tensor(7, dtype=torch.int32)
    assert schedule(step.clone()) == nm.Schedule(total=10)(7)


def test_it_is_a_lambda_for_the_scheduler_of_torch() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = nm.NorMuon([("weight", model.weight)], lr=0.02, routes={"*": nm.Route()})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, nm.Schedule(total=4, warmup=2))
    assert scheduler.get_last_lr() == [0.01]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"total": 0}, ValueError), ({"total": 1.5}, TypeError), ({"total": True}, TypeError),
        ({"total": 5, "warmup": 6}, ValueError), ({"total": 5, "warmup": -1}, ValueError),
        ({"total": 5, "warmup": 3, "decay": 3}, ValueError),
        ({"total": 5, "final": 2.0}, ValueError),
        ({"total": 5, "final": float("nan")}, ValueError), ({"total": 5, "shape": "x"}, ValueError),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_by_name(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Schedule"):
        nm.Schedule(**given)


@pytest.mark.parametrize("step", [0.5, True, torch.tensor(0.5), torch.tensor(True), None])
def test_what_is_no_number_of_steps_is_refused(step: Any) -> None:
    with pytest.raises(TypeError, match=r"guard\.step"):
        nm.Schedule(total=5)(step)


def test_steps_before_the_first_are_refused_on_the_host_and_the_first_in_a_tensor() -> None:
    for schedule in (nm.Schedule(total=10, warmup=4), nm.Schedule(total=10)):
        with pytest.raises(ValueError, match=r"step: expected an int >= 0, got -3"):
            schedule(-3)
        found = schedule(torch.tensor([-(2**31), -3, -1, 0]))
        assert found.tolist() == [schedule(0)] * 4


def test_an_integer_of_numpy_is_a_number_of_steps() -> None:
    schedule = nm.Schedule(total=10, warmup=4)
    assert [schedule(k) for k in np.arange(12)] == [schedule(k) for k in range(12)]
