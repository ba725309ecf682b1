"""Parameters of groups without names are called what a table of routes calls them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.optim import routed
from tests.planning.test_front_door import Small


def split(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]


def optimizer_of(model: nn.Module, **options: Any) -> nm.NorMuon:
    options = {"routes": nm.routes_for(model), "guard": "full", **options}
    return nm.NorMuon(split(model), lr=0.01, **options)


def backward(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model.zero_grad()
    model(torch.randint(40, (8,))).square().sum().backward()


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


@pytest.fixture
def with_old_names(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As it was when groups without names had numbers in their place."""

    def made(model: nn.Module) -> nm.NorMuon:
        with monkeypatch.context() as before:
            before.setattr(routed, "with_names_of_table", lambda added, routes: [*added])
            return optimizer_of(model)

    return made


def test_a_skip_and_the_plan_have_the_names_of_the_table(eager: None) -> None:
    model = small()
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    assert optimizer.plan is not None
    assert sorted(optimizer.plan.names) == sorted(n for n, _ in model.named_parameters())
    backward(model)
    model.third.weight.grad[0, 0] = torch.nan  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match=r"step 2 skipped, 1 in a row: third\.weight"):
        optimizer.step()
    assert all("param_names" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("given", ["one list", "group's own", "later", "wrapped"])
def test_wherever_a_table_knows_the_tensor_its_name_is_taken(eager: None, given: str) -> None:
    model = small()
    table, (first, second) = nm.routes_for(model), split(model)
    wrapped = nn.Sequential(model)
    if given == "one list":
        optimizer = nm.NorMuon(list(model.parameters()), routes=table)
    elif given == "group's own":
        optimizer = nm.NorMuon([{**first, "routes": table}, {**second, "routes": table}])
    elif given == "later":
        optimizer = nm.NorMuon([first], routes=table)
        optimizer.add_param_group(second)
    else:
        optimizer = nm.NorMuon([first, second], routes=nm.routes_for(wrapped))
    backward(model)
    optimizer.step()
    assert optimizer.plan is not None
    prefix = "0." if given == "wrapped" else ""
    expected = {f"{prefix}{name}" for name, _ in model.named_parameters()}
    assert {*optimizer.plan.names} == expected


def test_names_that_the_caller_gave_stay_and_what_no_table_knows_has_its_number() -> None:
    model = small()
    table = nm.routes_for(model)
    named = [(f"mine.{name}", p) for name, p in model.named_parameters()]
    assert {*nm.NorMuon(named, routes=table)._settled().named} == {name for name, _ in named}
    plain = nm.NorMuon(split(model), routes={"groups.0.*": nm.Route("adamw")})
    assert "groups.1.0" in plain._settled().named
    first, second = split(model)
    by_number = {**first, "routes": {"groups.0.1": nm.Route("adamw")}}
    mixed = nm.NorMuon([by_number, second], routes=table)
    assert {"groups.0.1", "second.bias"} <= {*mixed._settled().named}
    assert "exp_avg" in mixed.state[model.second.weight]


def test_two_models_with_the_same_names_keep_numbers_where_these_would_coincide() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    groups = [{"params": list(m.parameters()), "routes": nm.routes_for(m)} for m in (one, other)]
    assert [*nm.NorMuon(groups)._settled().named] == [
        "weight", "bias", "groups.1.0", "groups.1.1"
    ]  # fmt: skip


def test_states_that_were_saved_with_numbers_in_the_place_of_names_go_on(
    eager: None, with_old_names: Any
) -> None:
    model = small()
    old = with_old_names(model)
    backward(model)
    old.step()
    assert old.plan is not None and old.plan.names[0] == "groups.0.0"
    kept = copy.deepcopy((model, old.state_dict()))
    pickled = pickle.dumps(old)
    backward(model, 1)
    old.step()

    again = kept[0]
    resumed = optimizer_of(again)
    resumed.load_state_dict(kept[1])
    backward(again, 1)
    resumed.step()
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    unpickled = pickle.loads(pickled)
    for group in unpickled.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    unpickled.step()
    assert unpickled.plan.names[0] == "groups.0.0"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_with_numbers_in_the_place_of_names_is_taken_in_order_and_that_is_said(
    eager: None, with_old_names: Any, tmp_path: Path, in_place: bool
) -> None:
    pytest.importorskip("safetensors")
    model, other = small(), small(1)
    old, new = with_old_names(model), optimizer_of(other)
    for net, optimizer in ((model, old), (other, new)):
        backward(net)
        optimizer.step()
    assert old.result is not None and new.result is not None
    nm.save(tmp_path / "a", old.result.params, old.result.state, old.plan)
    given: Any = {}
    if in_place:
        params = {name: p.detach() for name, p in new.result.params.items()}
        given = {"params": params, "state": new.result.state}
    with pytest.warns(UserWarning, match=r"groups\.0\.0 is first\.weight"):
        found = nm.load(tmp_path / "a", new.plan, **given)
    named = dict(model.named_parameters())
    assert found.params.keys() == named.keys()
    assert all(torch.equal(x, named[name]) for name, x in found.params.items())
    momentum = old.state[named["second.weight"]]["momentum"]
    assert torch.equal(found.state["second.weight.momentum"], momentum)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "groups.0.0" in nm.load(tmp_path / "a").params
