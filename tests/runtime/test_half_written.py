"""An exception leaves parameters and state whole, or says that they are not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.algorithm.adamw import AdamWWork
from normuon_fn.algorithm.bucket import MatrixWork
from normuon_fn.algorithm.guard import Agreement
from normuon_fn.planning.tensors import CallersDicts
from normuon_fn.runtime import compiled, eager

Problem = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], nm.Hyper, nm.Plan]
STAGES = [
    (Agreement, "before"), (MatrixWork, "advance"), (MatrixWork, "orthogonalize"),
    (AdamWWork, "relay"), (MatrixWork, "receive"), (Agreement, "after"), (AdamWWork, "apply"),
    (MatrixWork, "apply"), (CallersDicts, "count"), (CallersDicts, "after"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def problem(**options: Any) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 16), "b": (6, 4), "bias": (8,)}
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    grads = {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}
    plan = nm.make_plan(params, nm.Config(**options))
    return params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.1), plan


def says_half_written(error: BaseException) -> bool:
    return eager.HALF_WRITTEN in [
        *getattr(error, "__notes__", ()),
        *"".join(error.args).split("\n"),
    ]


def fail_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    method = getattr(owner, name)

    def failing(self: Any, *arguments: Any) -> Any:
        method(self, *arguments)
        raise MemoryError(f"after {name}")

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("guard", ["off", "output", "full"])
@pytest.mark.parametrize(("owner", "name"), STAGES, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_after_any_stage_is_whole_or_said(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, guard: str
) -> None:
    params, grads, state, hyper, plan = problem(guard=guard)
    before = {key: x.clone() for key, x in {**params, **state}.items()}
    fail_after(monkeypatch, owner, name)
    with pytest.raises(MemoryError) as raised:
        nm.step_(params, grads, state, hyper, plan)
    whole = all(torch.equal(x, before[key]) for key, x in {**params, **state}.items())
    assert says_half_written(raised.value) != whole
    with pytest.raises(MemoryError) as raised:  # the pure one never writes
        nm.step(*(pure := problem(guard=guard)))
    assert not says_half_written(raised.value)
    assert all(torch.equal(x, before[key]) for key, x in {**pure[0], **pure[2]}.items())


def test_an_operator_that_fails_while_it_writes_is_said() -> None:
    """Operators are below the version counters of what they write, so they count beforehand."""
    params, grads, state, hyper, plan = problem()
    state["b.momentum"] = torch.zeros(6, 1).expand(6, 4)  # cannot be written
    with (
        pytest.MonkeyPatch.context() as unchecked,
        pytest.raises(RuntimeError, match="single memory location") as raised,
    ):
        for module in (compiled, importlib.import_module("normuon_fn.step")):
            unchecked.setattr(module, "check_writable", lambda *_: None)  # as if unnoticed
        nm.step_(params, grads, state, hyper, plan)
    whole = not any(bool(x.any()) for x in state.values())
    assert whole or says_half_written(raised.value)


def test_arguments_that_are_refused_were_not_written() -> None:
    params, grads, state, hyper, plan = problem()
    before = {key: x.clone() for key, x in {**params, **state}.items()}
    with pytest.raises(ValueError, match=r"grads\['b'\]") as raised:
        nm.step_(params, {**grads, "b": torch.ones(3, 3)}, state, hyper, plan)
    assert not says_half_written(raised.value)
    assert all(torch.equal(x, before[key]) for key, x in {**params, **state}.items())


def test_foreach_step_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = [torch.ones(4, 6)], [torch.ones(4, 6)]
    kept = [torch.zeros(4, 6)], [torch.zeros(4, 1)]
    fail_after(monkeypatch, MatrixWork, "apply")
    for graph in (True, False):
        with pytest.raises(MemoryError) as raised:
            nm.foreach_step_(
                params, grads, *kept, lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0,
                compiled=graph,
            )  # fmt: skip
        assert says_half_written(raised.value)


def test_an_error_has_the_sentence_on_python_3_10_too() -> None:
    class OldError(Exception):
        add_note = property()  # hasattr says no

    for error in (OldError("text", 3), OldError()):
        eager._add_note(error, eager.HALF_WRITTEN)
        assert eager.HALF_WRITTEN in str(error.args[0])


@pytest.mark.parametrize("fault", ["hyper", "stage", "operator"])
def test_a_step_of_the_optimizer_that_raises_leaves_gradients_scaled_for_a_second_try(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    twin = torch.nn.Parameter(p.detach().clone())
    optimizer, other = (
        nm.NorMuon([{"params": [each], "algorithm": "normuon"}], lr=0.1) for each in (p, twin)
    )
    scaler, its = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    for one, amp in ((p, scaler), (twin, its)):
        amp.scale((one * torch.arange(24.0).reshape(4, 6)).sum()).backward()
    assert p.grad is not None
    scaled, before = p.grad.clone(), p.detach().clone()
    with monkeypatch.context() as patch:
        if fault == "hyper":
            optimizer.param_groups[0]["lr"] = -1.0
        elif fault == "stage":
            fail_after(patch, Agreement, "before")
        else:
            patch.setattr(MatrixWork, "advance", lambda self: 1 / 0)
        with pytest.raises((ValueError, MemoryError, ZeroDivisionError)):
            scaler.step(optimizer)
    assert torch.equal(p.grad, scaled) and torch.equal(p, before)
    optimizer.param_groups[0]["lr"] = 0.1
    scaler.step(optimizer)
    its.step(other)
    assert torch.equal(p, twin) and torch.equal(p.grad, twin.grad)  # type: ignore[arg-type]
