"""``torch.set_default_device`` changes nothing: every tensor says where it is made."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn import __main__ as command_line
from normuon_fn.diagnostics.replay import replay

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def test_every_tensor_that_is_made_says_on_which_device() -> None:
    files = [*(ROOT / "normuon_fn").rglob("*.py"), *(ROOT / "ops").rglob("*.py")]
    calls = [
        (path.name, call)
        for path in files
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in {f"torch.{f}" for f in FACTORIES}
    ]
    silent = [
        f"{name}:{call.lineno} {ast.unparse(call)}"
        for name, call in calls
        # ``**on_host`` has a device too
        if not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]
    assert len(calls) > 10 and silent == []


@pytest.fixture
def elsewhere() -> Any:
    torch.set_default_device("meta")  # stands for a CUDA device: what is made there has no values
    yield
    torch.set_default_device(None)


def made() -> tuple[nn.Module, nm.NorMuon]:
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    return model, nm.NorMuon(
        model,
        lr=0.02,
        guard="full",
        config=nm.Config(guard="full"),
        routes={"1.weight": nm.Route()},
    )


def test_an_optimizer_on_the_host_has_the_same_bits_whatever_the_default_device(
    eager: None, elsewhere: None, tmp_path: Path
) -> None:
    model, optimizer = made()
    monitor = nm.SkipMonitor(optimizer)
    for _ in range(2):
        optimizer.step()
        assert monitor() == 0
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state[model[0].weight]["step"] = 2  # a number that somebody put there
    model[0].weight.grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match="step 3 skipped"):
        optimizer.step()
    assert monitor() + nm.check(optimizer.result, optimizer.plan) == 2  # type: ignore[arg-type]
    torch.set_default_device(None)
    twin, other = made()
    other.step()
    other.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) and p.device.type == "cpu" for p, q in pairs)


def test_the_functional_step_its_captures_and_its_files_work_whatever_the_default_device(
    elsewhere: None, tmp_path: Path
) -> None:
    with torch.device("cpu"):
        params = {"w": torch.randn(8, 6), "bias": torch.randn(6)}
        bad = {name: torch.full_like(p, float("nan")) for name, p in params.items()}
    plan = nm.make_plan(params, nm.Config(guard="full"), routes={"w": nm.Route()})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    result = nm.update(params, bad, state, hyper, plan)
    with pytest.warns(RuntimeWarning, match="step 1 skipped"):
        assert nm.check(result, plan) and nm.SkipMonitor(plan)(result) == 1
    path = nm.capture(result, bad, plan, tmp_path, hyper=hyper)
    assert "w.input" in replay(path)
    nm.save(tmp_path / "run", params, dict(result.state), plan)
    assert torch.equal(nm.load(tmp_path / "run", plan).params["w"], params["w"])
    assert torch.isfinite(nm.orthogonalize(params["w"])).all()
    momentum, variance = (torch.zeros(shape, device="cpu") for shape in ((8, 6), (8, 1)))
    nm.foreach_step_(
        [params["w"]], [params["w"].clone()], [momentum], [variance], lr=0.02, momentum=0.9,
        beta2=0.9, weight_decay=0.0, compiled=False,
    )  # fmt: skip
    assert params["w"].isfinite().all()
    command_line.problem(torch.device("cpu"))
