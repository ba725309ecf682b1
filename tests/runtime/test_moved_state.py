"""GraphedStep: state that gets other memory is noticed, by whomever it was moved.

The stand-in for a graph goes on in the memory of its capture, as a graph does: a step that replays
once too often has other bits.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normuon_fn as nm
from normuon_fn.distributed.placements import local
from normuon_fn.runtime import inputs, offloading
from tests.optim.test_optimizer import Net, rehearse, three, train
from tests.runtime.test_graphed import Case, Rehearsed, Take, clones, settle

pytestmark = pytest.mark.usefixtures("eager")
OLD_MEMORY = rf"up to {inputs.TURNS - 1} of the steps before may have read and written the old"


class InOldMemory(Rehearsed):
    def _capture(self, call: Callable[[], nm.StepResult]) -> Take:
        self.log.append("capture")
        assert isinstance(call, functools.partial)
        *dicts, hyper, plan = call.args
        old = [{k: x if x is None else x.detach() for k, x in one.items()} for one in dicts]
        return Take(functools.partial(call.func, *old, hyper, plan, **call.keywords), self.log)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would move to another device moves to other memory of the same."""
    monkeypatch.setattr(offloading, "is_elsewhere", lambda x, device: x.ndim > 0)


@pytest.fixture
def pair() -> tuple[Case, InOldMemory]:
    case = Case("full")
    assert len(case.state) == inputs.TURNS  # each turn asks for one of them
    return case, InOldMemory(case.plan)


def set_data(x: Tensor) -> None:
    x.data = x.clone()


def set_(x: Tensor) -> None:
    x.set_(x.clone())  # type: ignore[no-untyped-call]


def calls_until_noticed(case: Case, graphed: Rehearsed) -> int:
    graphed.did()
    for calls in range(1, 2 * inputs.TURNS):
        settle(case, graphed, 1)
        if graphed.did() == "free plain":
            return calls
    raise AssertionError("nobody noticed")


# --- moved by the library


def test_one_tensor_that_was_offloaded_is_noticed_at_the_next_call(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    settle(case, graphed, 12)
    for key in [key for key, x in case.state.items() if x.ndim]:
        moved = rf"state\['{key}'\] moved to another address; .*copy_\. This call is a plain step_"
        before = case.state[key].data_ptr()
        nm.offload_({key: case.state[key]})
        assert case.state[key].data_ptr() != before
        with pytest.warns(RuntimeWarning, match=moved) as caught:
            assert calls_until_noticed(case, graphed) == 1
        assert len(caught) == 1 and case.agrees()
        settle(case, graphed, 12)
    assert case.agrees() and graphed.captured


def test_a_whole_state_that_was_offloaded_is_noticed_and_its_memory_was_free(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    settle(case, graphed, 3)
    nm.reload_(nm.offload_(case.state), case.plan)
    with pytest.warns(RuntimeWarning, match="moved to another address"):
        assert calls_until_noticed(case, graphed) == 1
    settle(case, graphed, 3)
    assert case.agrees() and graphed.captured


def test_a_move_between_the_plain_call_and_the_capture_is_noticed(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    settle(case, graphed, 1)
    nm.offload_({"tall.momentum": case.state["tall.momentum"]})
    with pytest.warns(RuntimeWarning, match=r"'tall.momentum'\] moved"):
        settle(case, graphed, 1)
    settle(case, graphed, 2)
    assert case.agrees() and graphed.did() == "plain plain capture replay replay"


def test_what_another_optimizer_moves_ends_no_replays(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    settle(case, graphed, 3)
    graphed.did()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            nm.offload_(Case().state)
            settle(case, graphed, 2)
    assert case.agrees() and graphed.did() == " ".join(["replay"] * 6)


# --- moved by the caller


@pytest.mark.parametrize("move", [set_data, set_])
def test_other_memory_for_one_tensor_is_noticed_within_13_calls(
    pair: tuple[Case, InOldMemory], move: Callable[[Tensor], None]
) -> None:
    case, graphed = pair
    settle(case, graphed, 12)
    counts = []
    for key in case.state:
        move(case.state[key])
        moved = rf"state\['{key}'\] moved to another address \(`x.data = y` or set_\).*{OLD_MEMORY}"
        with pytest.warns(RuntimeWarning, match=moved + ".*copy_") as caught:
            counts.append(calls_until_noticed(case, graphed))
        assert len(caught) == 1 and caught[0].filename.endswith("test_graphed.py")
        settle(case, graphed, 11)
        assert graphed.captured
    assert max(counts) <= inputs.TURNS <= 16


def test_other_memory_for_all_state_is_noticed_at_the_next_call_and_said_once(
    pair: tuple[Case, InOldMemory],
) -> None:
    case, graphed = pair
    settle(case, graphed, 12)
    for x in case.state.values():
        x.data = x.clone()
    with pytest.warns(RuntimeWarning, match=rf"\] and 12 more of the state moved.*{OLD_MEMORY}"):
        assert calls_until_noticed(case, graphed) == 1
    assert case.agrees()


@pytest.mark.parametrize("whose", ["the same", "another", "another, and it is moved back"])
def test_other_memory_is_said_although_the_library_moves_state_afterwards(
    moving: None, pair: tuple[Case, InOldMemory], whose: str
) -> None:
    case, graphed = pair
    settle(case, graphed, 2)
    late = [key for key, x in case.state.items() if x.ndim][-1]
    before = case.state[late].detach()
    set_data(case.state[late])
    settle(case, graphed, 2)
    nm.offload_(case.state if whose == "the same" else Case().state)
    if "back" in whose:
        case.state[late].data = before
    with pytest.warns(RuntimeWarning, match=rf"state\['{late}'\] moved .*{OLD_MEMORY}"):
        assert calls_until_noticed(case, graphed) == 1


@pytest.mark.parametrize("then", ["no gradient", "another order", "release", "the context ends"])
def test_other_memory_is_said_when_the_graph_ends_before_it_was_looked_for(
    pair: tuple[Case, InOldMemory], then: str
) -> None:
    case, graphed = pair
    settle(case, graphed, 2)
    late = [*case.state][-1]
    case.state[late].data = case.state[late].clone()
    settle(case, graphed, 3)
    with pytest.warns(RuntimeWarning, match=rf"state\['{late}'\] moved .*{OLD_MEMORY}") as caught:
        if then == "no gradient":
            case.grads["tall"] = None  # type: ignore[assignment]
            settle(case, graphed, 1)
        elif then == "another order":
            case.params = dict(reversed(case.params.items()))
            settle(case, graphed, 1)
        elif then == "release":
            graphed.release()
        else:
            with graphed:
                pass
    assert len(caught) == 1 and not graphed.captured
    assert caught[0].filename.endswith("test_graphed.py" if graphed._inputs else __file__)


def test_a_release_has_nothing_to_say_where_nothing_moved(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed.release()
        for calls in (1, 2, 5):
            settle(case, graphed, calls)
            graphed.release()
        settle(case, graphed, 3)
        nm.offload_(case.state)
        graphed.release()
    assert case.agrees()


# --- other tensors


def test_another_tensor_in_its_place_is_noticed_at_the_next_call(
    pair: tuple[Case, InOldMemory],
) -> None:
    case, graphed = pair
    settle(case, graphed, 12)
    before = [*case.state.values()]  # no address is used again
    for key in case.state:
        case.state[key] = case.state[key].clone()
        with pytest.warns(RuntimeWarning, match=rf"'{key}'\] moved to another address; ") as caught:
            assert calls_until_noticed(case, graphed) == 1
        assert len(caught) == 1 and case.agrees()
        settle(case, graphed, 12)
    assert case.agrees() and len(before) == len(case.state)


def test_another_tensor_at_the_same_address_is_the_same_and_watched_from_then_on(
    moving: None, pair: tuple[Case, InOldMemory]
) -> None:
    case, graphed = pair
    settle(case, graphed, 3)
    graphed.did()
    known = case.state
    case.state = {key: x.detach() for key, x in known.items()}
    settle(case, graphed, 2)
    assert case.agrees() and graphed.did() == "replay replay"
    set_data(known["wide.variance"])  # which nobody passes any more
    nm.offload_({"tall.variance": known["tall.variance"]})
    settle(case, graphed, 2)
    assert case.agrees() and graphed.did() == "replay replay"
    before, (case.grads,) = case.grads, clones(case.grads)
    with pytest.warns(RuntimeWarning, match=r"grads\['square'\] moved to another address; "):
        assert calls_until_noticed(case, graphed) == 1 and before
    case.state = {key: x.detach() for key, x in case.state.items()}
    settle(case, graphed, 3)
    set_data(case.state["wide.variance"])
    with pytest.warns(RuntimeWarning, match=rf"'wide.variance'\] moved .*{OLD_MEMORY}"):
        assert calls_until_noticed(case, graphed) <= inputs.TURNS


def test_another_layout_at_the_same_address_is_noticed(pair: tuple[Case, InOldMemory]) -> None:
    case, graphed = pair
    settle(case, graphed, 3)
    case.state["square.momentum"] = case.state["square.momentum"].mT
    with pytest.warns(RuntimeWarning, match=r"'square.momentum'\] has other strides"):
        assert calls_until_noticed(case, graphed) == 1
    case.expected[1]["square.momentum"] = case.expected[1]["square.momentum"].mT


@pytest.mark.parametrize("kind", ["params", "grads"])
def test_other_memory_for_parameters_and_gradients_is_noticed_at_the_next_call(
    pair: tuple[Case, InOldMemory], kind: str
) -> None:
    case, graphed = pair
    settle(case, graphed, 12)
    for name, x in getattr(case, kind).items():
        set_data(x)
        with pytest.warns(RuntimeWarning, match=rf"{kind}\['{name}'\] moved to another address; "):
            assert calls_until_noticed(case, graphed) == 1
        settle(case, graphed, 12)
    assert case.agrees()


# --- what a replay costs, and what is kept alive


def test_a_replay_asks_one_in_13_tensors_of_the_state_for_its_address(
    pair: tuple[Case, InOldMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, graphed = pair
    settle(case, graphed, 3)
    asked: list[Tensor] = []
    address = Tensor.data_ptr

    def counting(x: Tensor) -> int:
        asked.append(x)
        return address(x)

    known = graphed._inputs
    assert known is not None
    monkeypatch.setattr(Tensor, "data_ptr", counting)
    always = [*case.params.values(), *case.grads.values(), *case.hyper]
    of_state = []
    for _ in range(inputs.TURNS):
        asked.clear()
        assert known.same(case.params, case.grads, case.state, case.hyper, None)
        (one,) = {*map(id, asked)} - {*map(id, always)}
        assert len(asked) == len(always) + 1
        of_state.append(one)
    assert sorted(of_state) == sorted(map(id, case.state.values()))


def test_gradients_of_a_captured_step_are_not_kept_alive(pair: tuple[Case, InOldMemory]) -> None:
    case, graphed = pair
    graphed = Rehearsed(case.plan)
    settle(case, graphed, 4)
    graphed._graph.call = None  # type: ignore[union-attr] - the stand-in has them, a graph has not
    seen = [weakref.ref(case.grads.pop(name)) for name in [*case.grads]]
    gc.collect()
    assert graphed.captured and all(grad() is None for grad in seen)


def test_nothing_is_kept_alive_before_a_capture_or_after_the_release(
    pair: tuple[Case, InOldMemory],
) -> None:
    case, graphed = pair
    for calls in (1, 3):
        settle(case, graphed, calls)
        if calls == 3:
            graphed.release()
        seen = [weakref.ref(x) for x in case.state.values()]
        (case.state,) = clones(case.state)
        gc.collect()
        assert all(x() is None for x in seen)
        graphed.release()


# --- DTensors


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def swap(x: Any) -> None:
    x._local_tensor = x._local_tensor.clone()


MOVES: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "the library": (lambda x: nm.offload_({"x": x}), 1, r"momentum'\] moved to another address; "),
    "data": (lambda x: set_data(local(x)), inputs.TURNS, OLD_MEMORY),
    "another local part": (swap, inputs.TURNS, OLD_MEMORY),
}


@pytest.mark.parametrize("who", MOVES)
def test_a_shard_that_gets_other_memory_is_noticed_inside_its_dtensor(
    moving: None, alone: None, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    made, model = rehearse(monkeypatch), Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = nm.NorMuon(three(model), graphed=True)
    train(model, optimizer, range(4))
    (graphed,) = made
    assert graphed.plan.sharded and graphed.did() == "plain capture replay replay replay"
    move, within, words = MOVES[who]
    p = model.up.weight
    for what, calls, text in (
        (optimizer.state[p]["momentum"], within, words),
        (p, 1, r"weight'\] moved to another address; "),
    ):
        move(what)
        with pytest.warns(RuntimeWarning, match=text) as caught:
            done = ""
            for _ in range(calls):
                if "free" not in done:
                    train(model, optimizer, range(1))
                    done = graphed.did()
        assert len(caught) == 1 and caught[0].filename.endswith("test_optimizer.py")
        assert done == "free plain"
        train(model, optimizer, range(12))
        assert graphed.captured
        graphed.did()
