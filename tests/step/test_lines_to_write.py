"""What is refused names the line to write: mistakes of people who port their first script."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.runtime import compiled
from normuon_fn.runtime.recent import MANY

SHORT = nm.Config(method="standard", steps=1)


def step_with(**changed: Any) -> None:
    params = {"a": torch.ones(4, 6), "b": torch.ones(4, 6)}
    plan = nm.make_plan(params, SHORT, hyper_of={"a": 0, "b": 1} if "hyper" in changed else None)
    given = {"grads": params, "hyper": nm.Hyper.of(params, lr=0.1)} | changed
    nm.update(params, given["grads"], nm.init(params, plan), given["hyper"], plan)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"grads": (torch.ones(4, 6), torch.ones(4, 6))}, "write dict(zip(params, grads))"),
        ({"grads": dict.fromkeys("abc", torch.ones(4, 6))}, "leave these out"),
        ({"grads": {"a": torch.ones(4, 6)}}, "give None for a parameter without a gradient"),
        ({"hyper": [nm.Hyper.of({"a": torch.ones(1)}, lr=0.1)] * 2}, "write nm.Hyper.stack(...)"),
        ({"hyper": nm.Hyper.of({"a": torch.ones(1)}, lr=0.1)}, "Hyper.stack([Hyper.of(...), ...])"),
        ({"hyper": 0.1}, "write nm.Hyper.of(params, lr=...)"),
    ],
)
def test_an_argument_of_a_step_is_refused_with_the_line(changed: Any, line: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(line)):
        step_with(**changed)


@pytest.mark.parametrize("run", [nm.update, nm.step, nm.step_, torch.no_grad()(nm.step)])
def test_gradients_in_the_place_of_parameters_are_refused(run: Callable[..., Any]) -> None:
    params = {"a": nn.Parameter(torch.ones(4, 6)), "b": nn.Parameter(torch.ones(4, 6))}
    grads = {name: torch.ones_like(p).detach() for name, p in params.items()}
    plan = nm.make_plan(params, SHORT)
    with pytest.raises(ValueError, match=re.escape("the order is step(params, grads, state")):
        run(grads, params, nm.init(params, plan), nm.Hyper.of(params, lr=0.1), plan)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: nm.NorMuon(nn.Linear(4, 4), decay_vectors=False),  # type: ignore[call-overload]
            "write routes=nm.routes_for(model, decay_vectors=...)",
        ),
        (
            lambda: nm.make_plan(nn.Linear(4, 4), per_head=True),  # type: ignore[call-overload]
            "write routes=nm.routes_for(model, per_head=...)",
        ),
        (
            lambda: nm.routes_for(nn.Linear(4, 4), no_decay=True),  # type: ignore[call-arg]
            "'no_decay' is called 'decay_vectors' here",
        ),
        (
            lambda: nm.Schedule(total=9, warmup_steps=1),  # type: ignore[call-arg]
            "'warmup_steps' is called 'warmup' here",
        ),
        (
            lambda: nm.Route(num_heads=4),  # type: ignore[call-arg]
            "'num_heads' is called 'heads' here",
        ),
        (lambda: nm.SkipMonitor(), "write nm.SkipMonitor(optimizer), or nm.SkipMonitor(plan)"),
        (
            lambda: nm.Hyper.of({"a": torch.ones(1)}, lr={"a": 0.1}),  # type: ignore[arg-type]
            "write routes={...: Route(lr_mul=...)}",
        ),
    ],
)
def test_a_call_is_refused_with_the_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises(TypeError, match=re.escape(line)):
        call()


@pytest.mark.usefixtures("without_inductor")
def test_a_refused_set_of_gradients_is_not_counted() -> None:
    params = {str(k): torch.ones(4, 6) for k in range(8)}
    plan = nm.make_plan(params, SHORT)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)

    def run(missing: int, bad: bool = False) -> None:
        grads = {name: None if name == str(missing) else p for name, p in params.items()}
        if bad:
            grads["7"] = torch.ones(2, 2)
        nm.step_(params, grads, state, hyper, plan)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(0)
        for k in range(1, MANY + 1):
            with pytest.raises(ValueError, match=r"grads\['7'\]: expected shape"):
                run(k, bad=True)
        assert len(compiled._graphs[plan]) == 1
        run(1)
        run(2)
    with pytest.warns(UserWarning, match=f"this is the {MANY}th set"):
        run(3)


# --- another rule in the middle of a run


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("before", "after"), [("normuon", "adamw"), ("adamw", "normuon")])
def test_a_route_that_changes_in_the_middle_of_a_run_is_one_entry_to_delete(
    before: nm.Algorithm, after: nm.Algorithm
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.ones(1, 2, 8, 8))

    def made(algorithm: nm.Algorithm) -> nm.NorMuon:
        return nm.NorMuon(model, lr=0.1, routes={"0.weight": route_of[algorithm], "2.weight": own})

    own, route_of = nm.Route(), {"normuon": nm.Route(flatten=True), "adamw": nm.Route("adamw")}
    optimizer = made(before)
    model(torch.ones(1, 2, 8, 8)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    changed = made(after)
    with pytest.raises(ValueError, match=rf"give it the Route\('{before}'\).*delete its entry"):
        changed.load_state_dict(saved)
    with pytest.raises(ValueError, match="whose own load_state_dict reads it"):
        nm.convert_state(dict(saved, param_groups=unnamed(saved)), changed_plan(model))
    del saved["state"][0]
    changed.load_state_dict(saved)
    kept, *_ = model[2].parameters()
    assert torch.equal(changed.state[kept]["momentum"], optimizer.state[kept]["momentum"])
    changed.step()
    kinds = changed.state[model[0].weight].keys()
    assert ("momentum" in kinds) == (after == "normuon") and ("exp_avg" in kinds) == (
        after == "adamw"
    )


def unnamed(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: x for k, x in g.items() if k != "param_names"} for g in saved["param_groups"]]


def changed_plan(model: nn.Module) -> nm.Plan:
    return nm.make_plan(model, routes={"2.weight": nm.Route()})
