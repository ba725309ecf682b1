"""A large bucket is orthogonalized in chunks, and nobody can tell from the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.planning import buckets
from normuon_fn.step import local_update_

# Wide, tall and square ones, experts that are one parameter, and what AdamW has.
SHAPES = {
    **{f"wide{k}": (16, 32) for k in range(5)},
    **{f"tall{k}": (32, 16) for k in range(3)},
    **{f"square{k}": (16, 16) for k in range(4)},
    "experts": (3, 16, 16),
    "bias": (16,),
}
ROUTES = {"wide1": nm.Route(lr_mul=0.5), "square*": nm.Route(wd_mul=0.3)}
STACK = 16 * 32 * 4  # bytes of one of the larger ones


def stepped(
    step: Any, guard: str, monkeypatch: pytest.MonkeyPatch, at_a_time: int, missing: str = ""
) -> list[Tensor]:
    """Everything after two steps, the second of which has a NaN where there is a guard."""
    monkeypatch.setattr(buckets, "CHUNK", at_a_time * STACK)
    torch.manual_seed(0)
    params = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    plan = nm.make_plan(params, nm.Config(guard=guard), routes=ROUTES)  # type: ignore[arg-type]
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    seen: list[Tensor] = []
    for k in range(2):
        grads: dict[str, Any] = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        if k and guard != "off":
            grads["tall2"][3, 5] = torch.nan
        if missing:
            grads[missing] = None
        result = step(params, grads, state, hyper, plan)
        params, state = result.params, result.state
        seen += [x.nan_to_num(nan=77.0) for x in (*params.values(), *state.values())]
        seen.append(result.flags.clone())
    return seen


@pytest.mark.parametrize("guard", ["off", "output", "full"])
def test_a_bucket_in_chunks_gives_the_bits_of_one_stack(
    guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, missing in ((nm.update, ""), (local_update_, ""), (local_update_, "wide2")):
        whole = stepped(step, guard, monkeypatch, 1000, missing)
        for at_a_time in (1, 2, 3):
            parts = stepped(step, guard, monkeypatch, at_a_time, missing)
            assert all(map(torch.equal, parts, whole)), at_a_time


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("step", [nm.step, nm.step_])
def test_so_does_its_graph(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a guard every chunk is applied before the next one is read."""
    parts = stepped(step, "off", monkeypatch, 2)
    whole = stepped(local_update_, "off", monkeypatch, 1000)
    assert all(map(torch.equal, parts, whole))


def test_found_inf_holds_every_chunk_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "CHUNK", STACK)
    params = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    plan = nm.make_plan(params, nm.Config(guard="off"))
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    before = {name: p.clone() for name, p in params.items()}
    local_update_(params, before, state, hyper, plan, found_inf=torch.ones(()))
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert not state["wide0.momentum"].any()
    local_update_(params, before, state, hyper, plan, found_inf=torch.zeros(()))
    assert not any(torch.equal(params[name], before[name]) for name in params)


def test_a_caller_s_own_orthogonalizer_gets_the_whole_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buckets, "CHUNK", 1)
    seen: list[int] = []

    def own(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    params = {f"w{k}": torch.randn(4, 8) for k in range(5)}
    plan = nm.make_plan(params, nm.Config(orthogonalizer=own))
    local_update_(params, params, nm.init(params, plan), nm.Hyper.of(params, lr=0.1), plan)
    assert seen == [5]
