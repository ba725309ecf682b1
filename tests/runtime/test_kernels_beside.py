"""The thread that compiles kernels while the first step is traced asks for the right ones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import pytest
import torch

import normuon_fn as nm
from normuon_fn.ops.lazy import HAS_TRITON
from normuon_fn.runtime import kernels_beside
from normuon_fn.step import local_update_

from ..scripts import run


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("form", ["decoupled", "hyperball"])
def test_kernels_for_rates_of_their_own_are_compiled_beside_where_matrices_have_them(
    form: Literal["decoupled", "hyperball"], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {f"{k}.weight": torch.randn(8, 16) for k in range(6)}
    hyper_of = {name: k for k, name in enumerate(params)} if own else None
    plan = nm.make_plan(params, nm.Config(weight_decay_form=form), hyper_of=hyper_of)
    seen: list[tuple[int, bool, torch.Size]] = []

    def function(p: object, g: object, s: object, hyper: nm.Hyper, few: nm.Plan) -> None:
        seen.append((len(few.parameters), few.own_rates is not None, hyper.lr.shape))
        local_update_(p, g, s, hyper, few)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    monkeypatch.setattr(kernels_beside.streams, "beside", lambda _: None)
    kernels_beside._compile_kernels(plan, function)  # type: ignore[arg-type]
    assert seen == [(2, True, torch.Size([2])) if own else (1, False, torch.Size([]))]


def plan_of_one() -> nm.Plan:
    return nm.make_plan({"0.weight": torch.randn(8, 16)}, nm.Config())


def test_no_thread_is_left_at_work_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, done = threading.Event(), threading.Event()

    def compile_kernels(*_: object) -> None:
        assert traced.wait(20)
        done.set()

    monkeypatch.setattr(kernels_beside, "_compile_kernels", compile_kernels)
    with kernels_beside.compiling_kernels_beside(plan_of_one(), local_update_):
        traced.set()
    assert done.is_set()


def test_without_a_thread_the_first_step_compiles_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with kernels_beside.compiling_kernels_beside(plan_of_one(), local_update_):
        pass


FIRST_STEP = """
import threading
import torch, triton
import normuon_fn as nm
from normuon_fn.runtime import kernels_beside
from normuon_fn.step import local_update_

beforehand, first_step = [], []
seen = beforehand

def listener(src, **_):  # what it raises would be lost
    seen.append((src.fn.__name__, threading.current_thread().name))

shapes = {"embed.weight": (512, 384), "norm": (384,)}
shapes |= {f"{k}.weight": (384, 384) for k in range(6)}
shapes |= {f"odd.{k}": (330, 1030) for k in range(2)}  # iterated on with zeros around it
shapes |= {f"up.{k}": (1536, 384) for k in range(3)} | {f"down.{k}": (384, 1536) for k in range(3)}
params = {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}
grads = {name: torch.randn_like(p) for name, p in params.items()}
routes = {"embed.weight": nm.Route("adamw"), "norm": nm.Route("adamw"), "*": nm.Route("normuon")}
plan = nm.make_plan(params, nm.Config(guard=GUARD), routes=routes)
state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.01)
triton.knobs.compilation.listener = listener
kernels_beside._compile_kernels(plan, local_update_)
seen = first_step
nm.step_(params, grads, state, hyper, plan)
assert beforehand and all(thread.startswith("normuon_fn compiler") for _, thread in beforehand)
ours = [name for name, _ in first_step if not name.startswith("triton_")]
assert not ours, ours
left = [t.name for t in threading.enumerate() if t.name.startswith("normuon_fn")]
assert not left, left  # a capture may begin at once
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guard", ["off", "full"])
def test_the_first_step_finds_every_kernel_compiled(guard: str, tmp_path: Path) -> None:
    script = tmp_path / "first_step.py"
    script.write_text(FIRST_STEP.replace("GUARD", repr(guard)))
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    run(script, env={name: str(tmp_path / name) for name in caches})
