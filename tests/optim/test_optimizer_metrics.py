"""Metrics of `NorMuon`, of the callbacks, and of `foreach_step_`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.optim.callbacks import numbers_of


def model_of() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
    return model


def optimizer_of(model: nn.Module, **options: Any) -> nm.NorMuon:
    return nm.NorMuon(model, lr=0.02, routes={"*weight": nm.Route()}, **options)


def backward(model: Any, layers: int = 2) -> None:
    for layer in model.layers[:layers]:
        layer(torch.ones(3, 6)).square().mean().backward()


@pytest.mark.usefixtures("eager")
def test_an_optimizer_reports_its_last_step_and_nothing_before_it() -> None:
    model = model_of()
    optimizer = optimizer_of(model, config=nm.Config(metrics=True))
    assert optimizer.metrics() == {}
    backward(model)
    optimizer.step()
    numbers = optimizer.metrics()
    assert optimizer.result is not None and optimizer.plan is not None
    assert numbers == nm.report_metrics(optimizer.result, optimizer.plan)
    assert numbers["update_rms/layers.1.weight"] == pytest.approx(0.2 * 0.02, rel=1e-5)
    grad = model.layers[1].bias.grad  # type: ignore[index, union-attr]
    expected = grad.square().mean().sqrt().item()  # type: ignore[operator, union-attr]
    assert numbers["grad_rms/layers.1.bias"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("eager")
def test_a_step_in_which_no_gradient_existed_has_no_metrics() -> None:
    model = model_of()
    optimizer = optimizer_of(model, config=nm.Config(metrics=True))
    backward(model)
    optimizer.step()
    plan, result = optimizer.plan, optimizer.result
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="gradient"):
        optimizer.step()
    assert optimizer.metrics() == {}
    assert not any("/" in key and "rms" in key for key in numbers_of(optimizer, "normuon/"))
    assert optimizer.plan is plan and optimizer.result is result  # of the last one that was made
    backward(model)
    optimizer.step()
    assert optimizer.metrics()


@pytest.mark.usefixtures("eager")
def test_a_step_of_some_parameters_reports_these_alone() -> None:
    model = model_of()
    optimizer = optimizer_of(model, config=nm.Config(metrics=True))
    backward(model, layers=1)
    optimizer.step()
    found = {key.partition("/")[2] for key in optimizer.metrics()}
    assert found == {"layers.0.weight", "layers.0.bias"}


@pytest.mark.usefixtures("eager")
def test_metrics_that_are_off_say_what_to_write_and_are_not_logged() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    with pytest.raises(ValueError, match=r"Config\(metrics=True\)"):
        optimizer.metrics()
    assert set(numbers_of(optimizer)) == {"skipped", "consecutive", "lr", "adamw_lr"}


@pytest.mark.usefixtures("eager")
def test_what_the_callbacks_log_has_the_metrics_with_their_prefix() -> None:
    model = model_of()
    optimizer = optimizer_of(model, config=nm.Config(metrics=True))
    assert numbers_of(optimizer, "x/")["x/lr"] == 0.02
    backward(model)
    optimizer.step()
    logged = numbers_of(optimizer, "x/")
    assert logged["x/skipped"] == 0
    for key, number in optimizer.metrics().items():
        assert logged[f"x/{key}"] == number


@pytest.mark.usefixtures("eager")
def test_metrics_survive_groups_of_their_own_rates_and_a_state_dict() -> None:
    model: Any = model_of()
    groups = [
        {"params": [(f"layers.{k}.weight", model.layers[k].weight)], "lr": lr}
        for k, lr in ((0, 0.01), (1, 0.03))
    ]
    made = [nm.NorMuon(groups, routes={"*": nm.Route()}, config=nm.Config(metrics=m))
            for m in (True, False)]  # fmt: skip
    made[1].load_state_dict(made[0].state_dict())  # metrics are no part of the state
    backward(model)
    made[0].step()
    numbers = made[0].metrics()
    for k, lr in ((0, 0.01), (1, 0.03)):
        assert numbers[f"update_rms/layers.{k}.weight"] == pytest.approx(0.2 * lr, rel=1e-5)


def test_lists_have_metrics_in_their_order() -> None:
    params = [torch.randn(8, 12), torch.randn(6, 5)]
    grads = [torch.randn_like(p) for p in params]
    momentums = [torch.zeros_like(p) for p in params]
    variances = [torch.zeros(len(p), 1) for p in params]
    options: Any = {"lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    expected = torch.stack([g.square().mean().sqrt() for g in grads])
    result = nm.foreach_step_(params, grads, momentums, variances, **options,
                              config=nm.Config(metrics=True), compiled=False)  # fmt: skip
    assert result.metrics is not None
    torch.testing.assert_close(result.metrics[1], expected)
    torch.testing.assert_close(result.metrics[0], torch.full((2,), 0.004))
    plain = nm.foreach_step_(params, grads, momentums, variances, **options, compiled=False)
    flags, skipped = plain  # as before metrics were there
    assert plain.metrics is None and not skipped and not flags.any()


@pytest.mark.usefixtures("without_inductor")
def test_a_checkpoint_goes_on_with_metrics_without_a_warning(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    params = {"layers.0": torch.randn(4, 6)}
    plain, measured = (nm.make_plan(params, nm.Config(metrics=m)) for m in (False, True))
    nm.save(tmp_path / "run", params, nm.init(plain, params), plain)
    saved = nm.load(tmp_path / "run", measured)
    hyper = nm.Hyper.of(params, lr=0.02)
    result = nm.step(saved.params, {"layers.0": torch.randn(4, 6)}, saved.state, hyper, measured)
    assert result.metrics is not None and math.isfinite(result.metrics[0, 0].item())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_rates_that_are_logged_are_those_that_the_last_step_used(
    eager: None, as_tensor: bool
) -> None:
    model = torch.nn.Linear(4, 4)
    lr: Any = torch.tensor(0.5) if as_tensor else 0.5
    optimizer = nm.NorMuon(model, lr=lr, adamw_lr=0.25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 / (k + 1))
    assert numbers_of(optimizer)["lr"] == 0.5  # before the first step: what it would use
    for k in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        schedule.step()
        found = numbers_of(optimizer)
        assert found["lr"] == pytest.approx(0.5 / (k + 1))
        assert found["adamw_lr"] == pytest.approx(0.25 / (k + 1))
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert numbers_of(optimizer)["lr"] == pytest.approx(0.5 / 3)
