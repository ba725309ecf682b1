"""`NorMuon` with `Config.master`: bfloat16 parameters that are float32 inside, in every use."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.ops.rounding import joined_with
from tests.optim.test_optimizer import (
    Net,
    backward,
    rehearse,
    same,
    states,
    three,
    train,
    weights,
    with_nan,
)

pytestmark = pytest.mark.usefixtures("eager")
MASTERS = ["mantissa", "fp32", "stochastic"]
KINDS = {"mantissa": "mantissa", "fp32": "master"}
BF16 = torch.bfloat16


def config_of(master: Any, **options: Any) -> nm.Config:
    return nm.Config(master=master, orthogonalize_dtype=torch.float32, **options)


def made(master: str, seed: int = 0, lr: float = 1e-3, **options: Any) -> tuple[Net, nm.NorMuon]:
    model = Net(seed, BF16)
    return model, nm.NorMuon(three(model, lr), config=config_of(master), **options)


def whole(model: Net, optimizer: nm.NorMuon, master: str) -> dict[str, Tensor]:
    """The float32 that every parameter is."""
    return {
        name: joined_with(p.detach(), optimizer.state[p][KINDS[master]])
        for name, p in model.named_parameters()
    }


def rounded(model: Net, optimizer: nm.NorMuon, other: Net, wide: nm.NorMuon, steps: range) -> None:
    """Both take the gradients of the first, as float32 sees them."""
    for k in steps:
        optimizer.zero_grad()
        backward(model, k)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        wide.step()


@pytest.mark.parametrize("master", list(KINDS))
def test_the_steps_are_those_of_float32_bit_for_bit(master: str) -> None:
    model, optimizer = made(master)
    other = Net()
    other.load_state_dict(
        model.state_dict()
    )  # after the construction of the first one's optimizer, and before that of its own
    wide = nm.NorMuon(three(other, 1e-3), config=config_of("none"))
    rounded(model, optimizer, other, wide, range(20))
    assert same(whole(model, optimizer, master), weights(other)) and not same(
        weights(model), weights(Net(0, BF16))
    )
    assert all(optimizer.state[p][KINDS[master]].any() for p in model.parameters())


@pytest.mark.parametrize("master", list(KINDS))
@pytest.mark.parametrize("prepared", [False, True])
def test_parameters_that_are_loaded_after_the_construction_are_those_that_are_stepped(
    master: str, prepared: bool
) -> None:
    model, optimizer = made(master)
    if prepared:  # as Accelerate does, before the first step
        optimizer.load_state_dict(optimizer.state_dict())
    other = Net(1, BF16)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, range(2))
    train(other, nm.NorMuon(three(other, 1e-3), config=config_of(master)), range(2))
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("master", list(KINDS))
def test_a_group_that_is_added_later_begins_at_its_parameters(master: str) -> None:
    model, other = Net(0, BF16), Net(0, BF16)
    groups = three(model, 1e-3)
    optimizer = nm.NorMuon(groups[:1], config=config_of(master))
    train(model, optimizer, range(2))
    for group in groups[1:]:
        optimizer.add_param_group(group)
    before = weights(model)
    train(model, optimizer, range(2, 3))
    moved = [
        float((p.detach().float() - before[name].float()).abs().max())
        for name, p in model.named_parameters()
    ]
    assert max(moved) < 0.02 and not same(weights(model), weights(other))


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_state_saved_and_loaded_goes_on_exactly(master: str, first: str) -> None:
    model, optimizer = made(master, guard="full")
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = made(master, seed=1, lr=0.5, guard="full")
    if first == "model":
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
    else:
        resumed.load_state_dict(saved["optimizer"])
        again.load_state_dict(saved["model"])
    assert same(states(resumed), states(optimizer))
    train(model, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    assert same(weights(again), weights(model)) and same(states(resumed), states(optimizer))
    kinds = {key.partition(".")[2]: x.dtype for key, x in states(optimizer).items()}
    assert kinds.get("mantissa") == (torch.int16 if master == "mantissa" else None)
    assert kinds.get("master") == (torch.float32 if master == "fp32" else None)


def test_a_state_of_another_master_is_refused_and_nothing_is_written() -> None:
    model, optimizer = made("mantissa")
    train(model, optimizer, range(2))
    other, wide = made("fp32")
    before = states(wide)
    with (
        pytest.warns(UserWarning, match="Config.master was 'mantissa', is 'fp32'"),
        pytest.raises(ValueError, match=r"expected \[.*'master'.* for .*, got \[.*'mantissa'"),
    ):
        wide.load_state_dict(optimizer.state_dict())
    assert same(states(wide), before) and same(weights(other), weights(Net(0, BF16)))


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("victim", ["down.weight", "up.bias"])
def test_a_bad_gradient_keeps_parameters_and_masters_and_the_next_step_goes_on(
    master: str, victim: str
) -> None:
    model, optimizer = made(master, guard="full")
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    before = states(optimizer)
    with_nan(model, optimizer, victim)
    after = states(optimizer)
    counted = {key for key in after if not torch.equal(after[key], before[key])}
    assert {key.partition(".")[2] for key in counted} == {"step", "skipped", "consecutive"}
    assert same(weights(model), weights(twin)) and int(after["0.skipped"]) == 1
    train(model, optimizer, range(2, 4))
    if master == "stochastic":  # its chances depend on how many steps there were
        assert all(x.isfinite().all() for x in weights(model).values()) and not same(
            weights(model), weights(twin)
        )
        return
    train(twin, other, range(2, 4))
    assert same(weights(model), weights(twin))
    assert same(whole(model, optimizer, master), whole(twin, other, master))


@pytest.mark.parametrize("master", MASTERS)
def test_a_graphed_step_is_the_same_and_captured_once(
    master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = rehearse(monkeypatch)
    results = []
    for graphed in (False, True):
        model, optimizer = made(master, guard="full", graphed=graphed)
        train(model, optimizer, range(4))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, range(4, 6))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])  # into the tensors that the graph reads
        train(model, optimizer, range(4, 6))
        results.append(weights(model) | states(optimizer))
    assert same(*results) and len(recorded) == 1
    assert recorded[0].did() == "plain capture" + 7 * " replay"


@pytest.mark.filterwarnings("ignore:.*Config.master='none'")
@pytest.mark.parametrize("master", ["none", "mantissa"])
def test_state_that_was_moved_away_and_back_is_the_one_that_is_stepped_and_saved(
    master: str,
) -> None:
    """As frameworks do it that free the device's memory between two phases of training."""
    model, optimizer = made(master)
    other, still = made(master)
    for k in range(4):
        train(model, optimizer, range(k, k + 1))
        train(other, still, range(k, k + 1))
        plans = [id(stage.plan) for stage in optimizer._planner.steps.values()]
        for p in list(optimizer.state):
            optimizer.state[p] = {kind: x.clone() for kind, x in optimizer.state[p].items()}
    train(model, optimizer, range(4, 5))
    train(other, still, range(4, 5))
    assert same(weights(model), weights(other)) and same(states(optimizer), states(still))
    assert [
        id(stage.plan) for stage in optimizer._planner.steps.values()
    ] == plans  # nothing is compiled again
