"""State in host memory between phases is the same state, and its memory on the device is free.

A CPU stands in for the device: what would move to another device moves to other memory of the same.
What only a GPU has (pinned memory, bandwidth) is in examples/benchmarks/offload.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normuon_fn as nm
from normuon_fn.runtime import offloading
from normuon_fn.step import local_update_ as step_
from tests.optim.test_optimizer import Net, rehearse, same, states, three, train, weights
from tests.runtime.test_graphed import Rehearsed, random

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "is_elsewhere", lambda x, device: x.ndim > 0)


def problem(device: str = "cpu") -> Any:
    params = {name: x.to(device) for name, x in random().items()}
    plan = nm.make_plan(params, nm.Config(guard="full"))
    state = nm.init(plan, params)
    return params, {k: x + 1 for k, x in params.items()}, state, nm.Hyper.of(params, lr=0.02), plan


def addresses(state: dict[str, Tensor]) -> dict[str, int]:
    return {key: x.data_ptr() for key, x in state.items()}


# --- the functions


def test_state_that_went_and_came_back_steps_on_with_the_same_bits(moving: None) -> None:
    params, grads, state, hyper, plan = problem()
    expected, kept = ({k: x.clone() for k, x in one.items()} for one in (params, state))
    tensors = dict(state)
    for k in range(3):
        step_(expected, grads, kept, hyper, plan)
        step_(params, grads, state, hyper, plan)
        if k == 1:
            before = addresses(state)
            assert nm.offload_(state) is state
            assert all((before[key] != x.data_ptr()) == (x.ndim > 0) for key, x in state.items())
            assert nm.reload_(state, plan) is state
    assert all(state[key] is x for key, x in tensors.items())
    assert same(params, expected) and same(state, kept)


def test_memory_is_free_although_others_still_have_the_tensors(moving: None) -> None:
    state = problem()[2]
    memory = np.zeros((16, 16), dtype=np.float32)
    state["square.momentum"] = torch.from_numpy(memory)
    result, is_held = dict(state), weakref.ref(memory)
    del memory
    assert is_held() is not None
    nm.offload_(state)
    assert is_held() is None and result["square.momentum"].shape == (16, 16)


def test_nothing_moves_on_a_cpu_or_twice() -> None:
    params, grads, state, hyper, plan = problem()
    before = addresses(state)
    nm.reload_(nm.offload_(nm.offload_(state)), plan)
    assert addresses(state) == before
    nm.offload_(state)
    step_(params, grads, state, hyper, plan)


def test_a_step_with_offloaded_state_is_refused_with_the_line_to_write() -> None:
    params, grads, _, hyper, plan = problem("meta")
    state = problem()[2]
    with pytest.raises(ValueError, match=r"state\['square.momentum'\].*nm.reload_\(state, plan\)"):
        nm.update(params, grads, state, hyper, plan)


def test_what_is_no_state_is_refused_and_nothing_has_moved(moving: None) -> None:
    _, _, state, _, plan = problem()
    before = addresses(state)
    with pytest.raises(TypeError, match=r"state: expected a dict of tensors, got list"):
        nm.offload_(list(state.values()))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"state\['x'\]: expected a Tensor, got int"):
        nm.offload_({**state, "x": 3})  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"state: missing \['square.momentum'\]"):
        nm.reload_({k: x for k, x in state.items() if k != "square.momentum"}, plan)
    with pytest.raises(TypeError, match=r"plan: expected a Plan"):
        nm.reload_(state, None)  # type: ignore[arg-type]
    assert addresses(state) == before


def test_nothing_has_moved_where_there_is_no_room(
    moving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, state, _, plan = problem()
    before, made = addresses(state), []

    def full(x: Tensor, device: torch.device) -> Tensor:
        made.append(x)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no room")
        return torch.empty_like(x)

    monkeypatch.setattr(offloading, "_empty_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        nm.reload_(state, plan)
    assert addresses(state) == before


def test_a_captured_step_is_captured_once_more(moving: None) -> None:
    params, grads, state, hyper, plan = problem()
    expected, kept = ({k: x.clone() for k, x in one.items()} for one in (params, state))
    graphed = Rehearsed(plan)

    def both() -> str:
        step_(expected, grads, kept, hyper, plan)
        graphed(params, grads, state, hyper)
        return graphed.did()

    assert [both() for _ in range(3)] == ["plain", "capture replay", "replay"]
    nm.reload_(nm.offload_(state), plan)
    with pytest.warns(RuntimeWarning, match=r"moved to another address"):
        assert both() == "free plain"
    assert [both() for _ in range(2)] == ["capture replay", "replay"]
    graphed.release()
    nm.reload_(nm.offload_(state), plan)
    assert [both() for _ in range(3)][1:] == ["capture replay", "replay"]
    assert same(params, expected) and same(state, kept)


def test_a_checkpoint_of_offloaded_state_is_that_of_the_state(moving: None, tmp_path: Path) -> None:
    params, grads, state, hyper, plan = problem()
    step_(params, grads, state, hyper, plan)
    expected = {k: x.clone() for k, x in state.items()}
    nm.offload_(state)
    nm.save(tmp_path / "run", params, state, plan)
    assert same(nm.load(tmp_path / "run", plan).state, expected)
    nm.load(tmp_path / "run", plan, params=params, state=state)
    assert same(nm.reload_(state, plan), expected)


# --- the optimizer


def pair() -> tuple[Net, nm.NorMuon, Net, nm.NorMuon]:
    """An optimizer, and another one of the same bits that is never offloaded."""
    model, shadow = Net(), Net()
    return model, nm.NorMuon(three(model)), shadow, nm.NorMuon(three(shadow))


def test_an_optimizer_steps_on_with_the_same_bits(moving: None) -> None:
    model, optimizer, shadow, expected = pair()
    train(model, optimizer, range(2))
    train(shadow, expected, range(4))
    for _ in range(2):
        optimizer.offload_()
    with pytest.raises(RuntimeError, match=r"write optimizer.reload_\(\) before the step"):
        train(model, optimizer, range(2, 3))
    for _ in range(2):
        optimizer.reload_()
    train(model, optimizer, range(2, 4))
    assert same(weights(model), weights(shadow)) and same(states(optimizer), states(expected))


def test_on_a_cpu_an_optimizer_is_never_offloaded() -> None:
    model, optimizer, shadow, expected = pair()
    optimizer.offload_()
    train(model, optimizer, range(2))
    optimizer.reload_()
    train(shadow, expected, range(2))
    assert same(states(optimizer), states(expected))


def test_a_state_dict_is_taken_and_loaded_while_offloaded(moving: None) -> None:
    model, optimizer, _, _ = pair()
    train(model, optimizer, range(2))
    expected = states(optimizer)
    optimizer.offload_()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.reload_()
    train(model, optimizer, range(2, 3))
    optimizer.offload_()
    before = {id(x): x.data_ptr() for kept in optimizer.state.values() for x in kept.values()}
    optimizer.load_state_dict(saved)
    after = {id(x): x.data_ptr() for kept in optimizer.state.values() for x in kept.values()}
    assert after == before  # it stays in the memory of the host
    optimizer.reload_()
    assert same(states(optimizer), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_offloaded_optimizer_go_on(moving: None, how: str) -> None:
    model, optimizer, shadow, expected = pair()
    train(model, optimizer, range(2))
    train(shadow, expected, range(4))
    optimizer.offload_()
    if how == "deepcopy":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match=r"reload_"):
        train(model, optimizer, range(2, 3))
    optimizer.reload_()
    train(model, optimizer, range(2, 4))
    assert same(weights(model), weights(shadow)) and same(states(optimizer), states(expected))


def test_a_captured_optimizer_frees_its_graph_and_captures_once_more(
    moving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rehearse(monkeypatch)
    model = Net()
    optimizer = nm.NorMuon(three(model), graphed=True)
    train(model, optimizer, range(3))
    (graphed,) = made
    assert graphed.did() == "plain capture replay replay"
    optimizer.offload_()
    assert graphed.did() == "free"
    optimizer.reload_()
    train(model, optimizer, range(3, 6))
    assert made == [graphed] and graphed.did() == "plain capture replay replay"


def test_a_new_group_while_offloaded_has_state_after_the_reload(moving: None) -> None:
    model, optimizer, _, _ = pair()
    train(model, optimizer, range(1))
    optimizer.offload_()
    late = nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [("late", late)]})
    optimizer.reload_()
    late.grad = torch.eye(4)
    optimizer.step()
    assert float(late.detach().diagonal().max()) < 1.0


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_shards_move_inside_their_dtensors(moving: None, alone: None) -> None:
    model, shadow = Net(), Net()
    for each in (model, shadow):
        fully_shard(each, mesh=init_device_mesh("cpu", (1,)))
    optimizer, expected = nm.NorMuon(three(model)), nm.NorMuon(three(shadow))
    train(model, optimizer, range(2))
    train(shadow, expected, range(4))
    momentum = optimizer.state[model.up.weight]["momentum"]
    assert isinstance(momentum, DTensor)
    before = momentum.to_local().data_ptr()
    optimizer.offload_()
    assert momentum.to_local().data_ptr() != before
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    dcp.set_optimizer_state_dict(model, optimizer, saved)
    optimizer.reload_()
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model.up.weight]["momentum"] is momentum
    for a, b in zip(model.parameters(), shadow.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())  # type: ignore[attr-defined]
