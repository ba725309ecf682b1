"""Momentums in host memory on a CUDA device: bits, capture, no wait of the host, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.planning import buckets, streaming

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Tensors = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"wide{k}": (128, 512) for k in range(6)},
    **{f"square{k}": (256, 256) for k in range(6)},
    "experts": (4, 128, 256), "tall": (512, 128), "bias": (64,),
}  # fmt: skip


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three slots of the largest parameter each, so that every slot serves many pieces."""
    monkeypatch.setattr(streaming, "PIECE", 2**17)
    monkeypatch.setattr(streaming, "RING", 2**19)
    monkeypatch.setattr(streaming, "_FEW", 1)
    monkeypatch.setattr(streaming, "_SHARE", 1)


def random(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to("cuda", dtype)
        for name, shape in SHAPES.items()
    }


class Run:
    """Parameters, gradients and state at fixed addresses."""

    def __init__(self, state_device: Any, **options: Any) -> None:
        self.params, self.grads = random(0), random(1)
        routes: Any = {"bias": nm.Route("adamw")} if "bias" in self.params else {}
        config = nm.Config(state_device=state_device, **options)
        self.plan = nm.make_plan(self.params, config, routes={**routes, "*": nm.Route()})
        self.state: Tensors = nm.init(self.params, self.plan)
        self.hyper = nm.Hyper.of(self.params, lr=0.02, weight_decay=0.1)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.state, self.hyper

    def new_gradients(self, step: int) -> None:
        for name, x in random(1 + step).items():
            self.grads[name].copy_(x)
        if step == 2:
            self.grads["tall"][0, 0] = float("nan")

    def has_the_bits_of_sync(self, other: Run) -> bool:
        torch.cuda.synchronize()
        pairs = [(self.params, other.params), (self.state, other.state)]
        return all(torch.equal(a[key].cpu(), b[key].cpu()) for a, b in pairs for key in a)


@pytest.mark.parametrize(
    ("guard", "dtype"), [("off", None), ("output", torch.bfloat16), ("full", "int8")]
)
def test_five_steps_have_the_bits_of_steps_with_momentums_on_the_device(
    guard: str, dtype: Any
) -> None:
    streamed, other = (Run(to, guard=guard, momentum_dtype=dtype) for to in ("cpu", None))
    ring = streamed.plan.streaming
    assert ring is not None and ring.slots in (2, 3) and ring.total > 2 * ring.slots * ring.size
    for step in range(5):
        for run in (streamed, other):
            if guard == "full" or step != 2:  # others would keep the fault in their momentum
                run.new_gradients(step)
            nm.step_(*run.arguments, run.plan)
    assert streamed.has_the_bits_of_sync(other)
    assert int(streamed.state["guard.skipped"]) == (guard == "full")


def test_a_pure_step_has_the_same_bits_and_new_pinned_momentums() -> None:
    streamed, other = (Run(to, guard="full") for to in ("cpu", None))
    for step in range(4):
        for run in (streamed, other):
            run.new_gradients(step)
            result = nm.step(*run.arguments, run.plan)
            run.params, run.state = dict(result.params), dict(result.state)
    assert streamed.has_the_bits_of_sync(other)
    assert streamed.state["tall.momentum"].is_pinned()


def test_a_captured_step_has_the_same_bits() -> None:
    streamed, other = (Run(to, guard="full") for to in ("cpu", None))
    with nm.GraphedStep(streamed.plan) as graphed:
        for step in range(6):
            for run in (streamed, other):
                run.new_gradients(step)
            graphed(*streamed.arguments)
            nm.step_(*other.arguments, other.plan)
        assert graphed.captured
        assert streamed.has_the_bits_of_sync(other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_host_never_waits() -> None:
    run = Run("cpu", guard="full")
    nm.step_(*run.arguments, run.plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            nm.step_(*run.arguments, run.plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_the_callers_and_eager_steps_have_the_same_bits() -> None:
    streamed, other = (Run(to, guard="full") for to in ("cpu", None))
    compiled = [
        torch.compile(lambda p, g, s, h, run=run: nm.step_(p, g, s, h, run.plan), fullgraph=True)
        for run in (streamed, other)
    ]
    for step in range(2):
        for run, call in zip((streamed, other), compiled, strict=True):
            run.new_gradients(step)
            call(*run.arguments)
    assert streamed.has_the_bits_of_sync(other)


def test_an_optimizer_saves_what_its_last_step_has_written(tmp_path: Path) -> None:
    params = [torch.nn.Parameter(x) for x in random(0, torch.float32).values() if x.ndim == 2]
    named = [(f"p{k}", p) for k, p in enumerate(params)]
    routes = {"*": nm.Route()}
    optimizer = nm.NorMuon(named, config=nm.Config(state_device="cpu"), routes=routes)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    torch.cuda.synchronize()
    expected = [optimizer.state[p]["momentum"].clone() for p in params]
    saved = torch.load(tmp_path / "state")["state"]
    assert all(torch.equal(saved[k]["momentum"], x) for k, x in enumerate(expected))
    optimizer.step()
    optimizer.load_state_dict(torch.load(tmp_path / "state"))
    for p, x in zip(params, expected, strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], x)
        assert optimizer.state[p]["momentum"].is_pinned()
    optimizer.step()


def test_pageable_memory_is_refused_by_name() -> None:
    run = Run("cpu")
    pageable = {key: x.clone() if not x.is_cuda else x for key, x in run.state.items()}
    with pytest.raises(ValueError, match=r"state\['wide0.momentum'\]: expected pinned memory"):
        nm.step_(run.params, run.grads, pageable, run.hyper, run.plan)


def test_the_device_has_a_ring_in_the_place_of_the_momentums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = {f"w{k}": (1024, 1024) for k in range(48)}  # 192 MiB of momentums in float32
    monkeypatch.setitem(globals(), "SHAPES", large)
    monkeypatch.setattr(streaming, "PIECE", 2**23)
    monkeypatch.setattr(streaming, "RING", 2**24)
    monkeypatch.setattr(buckets, "CHUNK", 2**24)  # the pieces of one are joined to a stack
    peaks = {}
    for to in (None, "cpu"):
        run = Run(to)
        nm.step_(*run.arguments, run.plan)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        nm.step_(*run.arguments, run.plan)
        torch.cuda.synchronize()
        peaks[to] = torch.cuda.max_memory_allocated()
        del run
        torch.cuda.empty_cache()
    momentums, ring, slack = 192 * 2**20, 2**24, 2**24
    assert peaks[None] - peaks["cpu"] >= momentums - ring - slack
