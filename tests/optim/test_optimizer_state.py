"""State that is put in, loaded or taken out is what goes on; a load that fails changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.optim.test_optimizer import Net, backward, rehearse, same, states, three, train, weights

pytestmark = pytest.mark.usefixtures("eager")
BF16 = torch.bfloat16


def snapshot(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    return {p: {kind: x.clone() for kind, x in kept.items()} for p, kept in optimizer.state.items()}


def count(optimizer: nm.NorMuon) -> set[int]:
    """The steps that every parameter has counted."""
    return {int(kept["step"]) for kept in optimizer.state.values()}


def masters(dtype: torch.dtype, seed: int = 0, master: Any = "fp32") -> tuple[Net, nm.NorMuon]:
    model = Net(seed, dtype)
    config = nm.Config(master=master, orthogonalize_dtype=torch.float32)
    return model, nm.NorMuon(three(model, 1e-3), config=config)


# --- what somebody puts there


@pytest.mark.parametrize("whole", [False, True], ids=["tensors", "dicts"])
def test_a_snapshot_that_is_put_back_goes_on_from_its_own_step(whole: bool) -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(2))
    kept, before = snapshot(optimizer), weights(model)
    train(model, optimizer, range(2, 5))
    after = weights(model), states(optimizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    for p, own in kept.items():
        if whole:
            optimizer.state[p] = own
        else:
            optimizer.state[p].update(own)
    train(model, optimizer, range(2, 5))
    assert (
        count(optimizer) == {5}
        and same(weights(model), after[0])
        and same(states(optimizer), after[1])
    )


@pytest.mark.parametrize("first", [0, 3])
def test_a_state_that_was_replaced_before_a_load_is_the_one_that_is_loaded_into(first: int) -> None:
    model, optimizer = masters(BF16)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 7))
    again, resumed = masters(BF16, seed=1)
    train(again, resumed, range(first))
    for p, own in snapshot(resumed).items():
        resumed.state[p] = own
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    train(again, resumed, range(4, 7))
    assert (
        count(resumed) == {7}
        and same(weights(again), weights(model))
        and same(states(resumed), states(optimizer))
    )


def test_a_state_that_was_cleared_starts_anew_from_step_zero() -> None:
    model, other = Net(), Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(3))
    optimizer.state.clear()
    other.load_state_dict(model.state_dict())
    fresh = nm.NorMuon(three(other))
    train(model, optimizer, range(3, 5))
    train(other, fresh, range(3, 5))
    assert (
        count(optimizer) == {2}
        and same(weights(model), weights(other))
        and same(states(optimizer), states(fresh))
    )


@pytest.mark.parametrize(
    "value",
    [torch.tensor(40), torch.tensor([40.0]), 40],
    ids=["int64", "float, one entry", "number"],
)
def test_a_counter_of_one_parameter_that_is_replaced_is_that_of_all(value: Any) -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(2))
    optimizer.state[model.up.bias]["step"] = value
    train(model, optimizer, range(2, 3))
    assert (
        count(optimizer) == {41}
        and len({id(kept["step"]) for kept in optimizer.state.values()}) == 1
    )


def test_replaced_counters_do_not_come_back_from_a_parameter_that_had_no_gradient_meanwhile() -> (
    None
):
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(2))
    for p, own in snapshot(optimizer).items():
        optimizer.state[p] = own
    model.up.requires_grad_(False)
    train(model, optimizer, range(2, 4))
    model.up.requires_grad_(True)
    train(model, optimizer, range(4, 5))
    assert count(optimizer) == {5}


def test_a_state_that_was_put_there_before_the_first_step_is_the_one_that_is_stepped() -> None:
    model, other = Net(), Net()
    optimizer, put = nm.NorMuon(three(model)), nm.NorMuon(three(other))
    train(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    for p, own in zip(model.parameters(), other.parameters(), strict=True):
        put.state[own] = {kind: x.clone() for kind, x in optimizer.state[p].items()}
    train(model, optimizer, range(2, 4))
    train(other, put, range(2, 4))
    assert same(weights(other), weights(model)) and same(states(put), states(optimizer))


def test_a_graph_that_was_captured_goes_on_with_counters_that_were_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = rehearse(monkeypatch)
    model = Net()
    optimizer = nm.NorMuon(three(model), graphed=True)
    train(model, optimizer, range(3))
    for kept in optimizer.state.values():
        kept["step"] = torch.tensor(0, dtype=torch.int32)
    train(model, optimizer, range(3, 5))
    assert count(optimizer) == {2} and made[0].did() == "plain capture replay replay replay replay"


# --- loading


def test_a_parameter_that_was_frozen_when_it_was_saved_starts_anew() -> None:
    model, adam_model = Net(), Net()
    model.down.requires_grad_(False)
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    again = Net(seed=1)
    resumed = nm.NorMuon(three(again))
    train(again, resumed, range(2))
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert (
        not resumed.state[again.down.weight]["momentum"].any()
        and not resumed.state[again.down.bias]["exp_avg"].any()
    )
    assert count(resumed) == {3} and torch.equal(
        resumed.state[again.up.weight]["momentum"], optimizer.state[model.up.weight]["momentum"]
    )
    model.down.requires_grad_(True)
    train(model, optimizer, range(3, 5))
    train(again, resumed, range(3, 5))
    assert same(weights(again), weights(model)) and same(states(resumed), states(optimizer))
    adam = torch.optim.AdamW(adam_model.parameters())  # which does the same
    train(adam_model, adam, range(2))
    adam.load_state_dict({**adam.state_dict(), "state": {}})
    assert not adam.state
    resumed.load_state_dict({**saved, "state": {}})
    assert count(resumed) == {0} and not any(x.any() for x in states(resumed).values())


def test_a_state_with_the_master_of_a_parameter_that_was_frozen_goes_on_from_its_weights() -> None:
    model, optimizer = masters(BF16)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"].pop(1)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        model.down.weight.fill_(0.5)
    train(model, optimizer, range(3, 4))
    assert float((model.down.weight.detach().float() - 0.5).abs().max()) < 0.02


def test_a_load_that_is_refused_leaves_everything_as_it_was() -> None:
    model = Net()
    groups = three(model)
    groups[1]["lr"] = torch.tensor(0.02)
    optimizer = nm.NorMuon(groups)
    train(model, optimizer, range(2))
    good = copy.deepcopy(optimizer.state_dict())
    for kept in good["state"].values():
        for x in kept.values():
            x.add_(1)
    model.up.requires_grad_(False)
    for p in (model.up.weight, model.up.bias):
        del optimizer.state[p]
    before = states(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    cases: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
        (
            lambda d: d["param_groups"][1].update(lr=None),
            TypeError,
            "state_dict: group 1: lr: expected a Python number",
        ),
        (
            lambda d: d["param_groups"][0].update(momentum=7),
            ValueError,
            r"group 0: momentum: expected a number in \[0, 1\)",
        ),
        (
            lambda d: d["param_groups"][2].update(adamw_betas=0.9),
            TypeError,
            "group 2: adamw_betas: expected two numbers",
        ),
        (
            lambda d: d["param_groups"][1].update(lr=torch.ones(2)),
            ValueError,
            "group 1: lr: expected a number or a tensor of",
        ),
        (
            lambda d: d.pop("param_groups"),
            ValueError,
            r"expected the keys 'state' and 'param_groups', got \['state'\]",
        ),
        (
            lambda d: d.pop("state"),
            ValueError,
            r"expected the keys 'state' and 'param_groups', got \['param_groups'\]",
        ),
        (lambda d: d["state"][2].pop("variance"), ValueError, "for 'square.weight', got"),
    ]
    for change, kind, message in cases:
        given = copy.deepcopy(good)
        change(given)
        with pytest.raises(kind, match=message):
            optimizer.load_state_dict(given)
        assert (
            same(states(optimizer), before[0])
            and optimizer.state_dict()["param_groups"] == before[1]
        ), message
        assert model.up.weight not in optimizer.state
    optimizer.load_state_dict(good)
    assert count(optimizer) == {3} and model.up.weight in optimizer.state


# --- saving


class Pair(NamedTuple):
    a: int
    b: Any


def test_values_of_a_group_that_are_no_hyperparameters_are_saved_and_loaded_as_they_are() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    custom = {
        "mask": torch.ones(3),
        "table": np.ones((2, 2)),
        "pair": Pair(1, (2.0, 3.0)),
        "rate": np.float32(0.5),
        "own": None,
    }
    optimizer.param_groups[0].update(custom)
    (saved,) = optimizer.state_dict()["param_groups"]
    assert (
        torch.equal(saved["mask"], torch.ones(3))
        and (saved["table"] == 1).all()
        and saved["pair"] == Pair(1, (2.0, 3.0))
    )
    assert saved["rate"] == 0.5 and type(saved["rate"]) is float and type(saved["pair"]) is Pair
    again = nm.NorMuon(Net().named_parameters())
    again.param_groups[0].update(mask=torch.zeros(3), own=torch.tensor(1.0))
    again.load_state_dict(optimizer.state_dict())
    assert (
        torch.equal(again.param_groups[0]["mask"], torch.ones(3))
        and again.param_groups[0]["own"] is None
    )


def test_a_hook_may_wrap_what_is_saved() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    optimizer.register_state_dict_post_hook(lambda _, d: {"inner": d})
    optimizer.register_load_state_dict_pre_hook(lambda _, d: d["inner"])
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    assert list(saved) == ["inner"]
    optimizer.load_state_dict(saved)
    assert count(optimizer) == {2}


# --- masters


@pytest.mark.parametrize("late", ["its group", "its gradient"])
def test_weights_that_are_loaded_before_the_first_step_of_a_parameter_are_those_that_are_stepped(
    late: str,
) -> None:
    model, config = Net(0, BF16), nm.Config(master="fp32", orthogonalize_dtype=torch.float32)
    groups = three(model, 1e-3)
    optimizer = nm.NorMuon(groups[:1] if late == "its group" else groups, config=config)
    for k in range(2):
        backward(model, k)
        model.square.weight.grad = None
        optimizer.step()
    if late == "its group":
        optimizer.add_param_group(groups[1])
    with torch.no_grad():
        model.square.weight.fill_(0.5)
    train(model, optimizer, range(2, 3))
    assert float((model.square.weight.detach().float() - 0.5).abs().max()) < 0.02


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_a_model_that_becomes_float32_has_no_masters_any_more(master: str) -> None:
    model, optimizer = masters(BF16, master=master)
    train(model, optimizer, range(2))
    model.float()
    train(model, optimizer, range(2, 4))
    again, resumed = masters(torch.float32, seed=1, master=master)
    assert states(optimizer).keys() == states(resumed).keys()
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    train(model, optimizer, range(4, 6))
    train(again, resumed, range(4, 6))
    assert same(weights(again), weights(model))


def test_the_bias_correction_of_a_late_parameter_is_as_it_is_documented() -> None:
    p, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = nm.NorMuon([("p", p)], lr=1.0, algorithm="adamw", adamw_eps=0.0)
    optimizer.state[p]["step"].fill_(2000)
    optimizer.add_param_group({"params": [("late", late)]})
    moved = []
    for _ in range(60):
        before = float(late[0].detach())
        late.grad = torch.full((2,), 3.0)
        optimizer.step()
        moved.append(before - float(late[0].detach()))
    assert moved[0] == pytest.approx(0.447, abs=1e-3) and max(moved) == pytest.approx(
        1.097, abs=1e-3
    )
