"""What is refused names the line to write: mistakes of people who port their first script."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
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


PARAM = {"a": torch.ones(4, 6)}


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: nm.Hyper.of(PARAM, lr=torch.tensor(0.1)), "write lr=float(...)"),  # type: ignore[arg-type]
        (lambda: nm.Hyper.of(PARAM, lr=nm.Schedule(total=9)), "peak.scaled(schedule(step)"),  # type: ignore[arg-type]
        (lambda: nm.NorMuon(nn.Linear(4, 4), lr=lambda step: 0.1), "LambdaLR(optimizer, schedule)"),  # type: ignore[arg-type]
        (lambda: nm.Config(ns_steps=5), "'ns_steps'; write Config(steps=...)"),  # type: ignore[call-arg]
        (lambda: nm.Config(coefficients=(3.4, -4.7, 2.0)), "((3.4, -4.7, 2.0),) * steps"),  # type: ignore[arg-type]
        (lambda: nm.Config(momentum_dtype="bfloat16"), "write torch.bfloat16, without"),  # type: ignore[arg-type]
        (lambda: nm.Config(guard=True), "write guard='full'"),  # type: ignore[arg-type]
        (lambda: nm.Config(master=True), "write master='mantissa'"),  # type: ignore[arg-type]
        (lambda: nm.NorMuon(model=nn.Linear(4, 4)), "give the model as the first argument"),  # type: ignore[call-overload]
        (lambda: nm.NorMuon(nn.Linear(4, 4), decay=0.1), "is called 'weight_decay' here"),  # type: ignore[call-overload]
        (lambda: step_with(grads=(PARAM, 1.0)), "grads, loss ="),
        (lambda: step_with(grads={k: torch.ones(4, 6).half() for k in "ab"}), "to(torch.float32)"),
        (
            lambda: step_with(grads={k: torch.ones(4, 6).to_sparse() for k in "ab"}),
            "write nn.Embedding(..., sparse=False)",
        ),
    ],
)
def test_more_that_is_refused_with_the_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(line)):
        call()


def test_names_of_others_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match=re.escape("Config(normalize=False)")):
        _ = nm.Muon  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'Lamb'$"):
        _ = nm.Lamb  # type: ignore[attr-defined]


def test_numbers_after_lr_need_their_names() -> None:
    with pytest.raises(TypeError, match="arguments after 'lr' need their names, got"):
        nm.NorMuon(nn.Linear(4, 4), 0.02, 0.1)  # type: ignore[call-overload]


def test_parameters_that_the_optimizer_has_already_are_refused_with_the_reason() -> None:
    optimizer = nm.NorMuon(model := nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Those that are frozen are in it too"):
        optimizer.add_param_group({"params": [*model.named_parameters()]})


def test_a_file_of_torch_save_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(nm.CheckpointError, match=re.escape("got one of torch.save; write")):
        nm.load(tmp_path / "x.pt", nm.make_plan(PARAM, SHORT))


def test_torch_loads_what_it_saved_of_a_hyper_and_a_result(tmp_path: Path) -> None:
    plan = nm.make_plan(PARAM, SHORT)
    hyper = nm.Hyper.of(PARAM, lr=0.1)
    for given in (hyper, nm.update(PARAM, PARAM, nm.init(PARAM, plan), hyper, plan)):
        torch.save(given, tmp_path / "x.pt")
        assert type(torch.load(tmp_path / "x.pt", weights_only=True)) is type(given)


def heard(call: Callable[[], object], what: str) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return sum(what in str(w.message) for w in caught)


@pytest.mark.usefixtures("eager")
def test_gradients_of_what_was_frozen_when_the_plan_was_made_are_said_once() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4))
    model[0].requires_grad_(False)
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan, hyper = nm.make_plan(model, SHORT), nm.Hyper.of(params, lr=0.1)
    state, grads = nm.init(params, plan), {k: torch.ones_like(p) for k, p in params.items()}
    compiled._graphs.pop(plan, None)
    call = lambda: nm.step(params, grads, state, hyper, plan)  # noqa: E731
    assert heard(call, "grads: has gradients for '0.weight', which the plan does not move") == 1
    without = grads | {"0.weight": None}
    plan = nm.make_plan(model, SHORT)
    quiet = lambda: nm.step(params, without, state, hyper, plan)  # noqa: E731
    assert heard(quiet, "does not move") == 0


@pytest.mark.usefixtures("eager")
def test_a_parameter_that_was_put_in_the_place_of_another_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 200))
    optimizer = nm.NorMuon(model, lr=0.1, routes={"2.weight": nm.Route("adamw")})

    def step() -> None:
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    old = model[2]
    model[2] = nn.Linear(4, 200)
    old.weight.grad, old.bias.grad = torch.zeros(200, 4), torch.zeros(200)  # as a loop may leave it
    assert heard(lambda: [step() for _ in range(3)], "put in the place of another") == 1


def test_a_group_with_its_own_rate_beside_the_constructors_adamw_lr_is_said() -> None:
    def groups(**own: float) -> list[dict[str, Any]]:
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        named = [(f"{k}.{n}", p) for k, m in enumerate((a, b)) for n, p in m.named_parameters()]
        return [{"params": named[:2]}, {"params": named[2:], "lr": 1e-4, **own}]

    routes = {"*.weight": nm.Route()}
    text = "param_groups[1]: has lr=0.0001, another group 0.01"
    mixed = lambda: nm.NorMuon(groups(), lr=1e-2, adamw_lr=5e-3, routes=routes)  # noqa: E731
    assert heard(mixed, text) == 1
    for make in (
        lambda: nm.NorMuon(groups(adamw_lr=1e-4), lr=1e-2, adamw_lr=5e-3, routes=routes),
        lambda: nm.NorMuon(groups(), lr=1e-2, routes=routes),
        lambda: nm.NorMuon(groups(), lr=1e-4, adamw_lr=5e-3, routes=routes),
        lambda: nm.NorMuon(groups()[1:], lr=1e-2, adamw_lr=5e-3, routes=routes),
    ):
        assert heard(make, "has lr=") == 0
    for wrong in ([1e-3], "high"):
        with pytest.raises(TypeError, match="lr: expected a Python number"):
            nm.NorMuon([{"params": nn.Linear(4, 4).parameters(), "lr": wrong}], adamw_lr=1e-3)


@pytest.mark.usefixtures("eager")
def test_a_peak_beyond_what_adamw_lr_belongs_to_is_said_once() -> None:
    def run(**rates: float) -> None:
        model = nn.LayerNorm(4)
        optimizer = nm.NorMuon(model, **rates)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=9)
        for _ in range(8):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            schedule.step()

    text = "Make the optimizer with the peak's lr (of OneCycleLR and CyclicLR: max_lr)"
    assert heard(lambda: run(adamw_lr=1e-3), text) == 1
    for right in ({"lr": 0.01, "adamw_lr": 1e-3}, {"lr": 1e-3}):
        assert heard(lambda right=right: run(**right), "peak's lr") == 0


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (nn.LayerNorm, "the class LayerNorm; write the names"),
        ("0", "(did you mean '0.*'?)"),
        ("0.wieght", "(did you mean '0.weight'?)"),
        ("nothing", "['nothing'] match no parameter; the"),
    ],
)
def test_a_key_of_routes_that_matches_nothing_says_what_may_be_meant(key: Any, line: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises((TypeError, ValueError), match=re.escape(line)):
        nm.NorMuon(model, routes={key: nm.Route("adamw")})


def test_a_rate_of_yaml_that_is_text_is_refused_with_the_line() -> None:
    with pytest.raises(TypeError, match=re.escape("write lr=float('3e-4')")):
        nm.NorMuon(nn.Linear(4, 4), lr="3e-4")  # type: ignore[arg-type]


def test_a_first_step_where_warnings_are_errors(tmp_path: Path) -> None:
    code = (
        "import torch, normuon_fn as nm\n"
        "model = torch.nn.LayerNorm(4)\n"
        "optimizer = nm.NorMuon(model, lr=0.1)\n"
        "model(torch.ones(2, 4)).sum().backward()\n"
        "optimizer.step()\n"
    )
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
