"""Lion beside the matrices: its formula, in every way that AdamW's parameters are stepped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.step import local_update_
from tests import oracle
from tests.inputs import same_bits

SHAPES = {"matrix": (6, 8), "embed": (5, 4), "bias": (7,), "gain": ()}
ROUTES = {
    "matrix": nm.Route(),
    "embed": nm.Route("adamw"),
    "bias": nm.Route("adamw", lr_mul=0.5, wd_mul=2.0),
    "gain": nm.Route("adamw"),
}
OTHERS = ("embed", "bias", "gain")


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}


def hyper_of(params: dict[str, Tensor]) -> nm.Hyper:
    rates = {"adamw_lr": 2**-7, "adamw_weight_decay": 2**-3, "adamw_betas": (0.875, 0.96875)}
    return nm.Hyper.of(params, lr=0.02, **rates)


def run(config: nm.Config, step: Any = nm.update, dtype: torch.dtype = torch.float32) -> Any:
    params = tensors(0, dtype)
    plan = nm.make_plan(params, config, routes=ROUTES)
    state = nm.init(plan, params)
    for k in range(4):
        grads = tensors(1 + k, dtype)
        params, state, *_ = step(params, grads, state, hyper_of(params), plan)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_steps_are_the_published_formula(dtype: torch.dtype) -> None:
    params, state = run(nm.Config(other="lion"), dtype=dtype)
    assert not any(key.endswith("exp_avg_sq") for key in state)
    for name in OTHERS:
        w, m = tensors(0, dtype)[name].double().numpy(), np.zeros(SHAPES[name])
        half = name == "bias"
        for k in range(4):
            w, m = oracle.lion(
                w, tensors(1 + k, dtype)[name].double().numpy(), m,
                lr=2**-7 * (0.5 if half else 1.0), weight_decay=2**-3 * (2.0 if half else 1.0),
                beta1=0.875, beta2=0.96875,
            )  # fmt: skip
        tolerance = 1e-15 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(params[name].double().numpy(), w, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(
            state[f"{name}.exp_avg"].double().numpy(), m, rtol=tolerance, atol=tolerance
        )


def test_matrices_are_stepped_as_beside_adamw() -> None:
    assert same_bits(run(nm.Config(other="lion"))[0]["matrix"], run(nm.Config())[0]["matrix"])


def test_in_place_and_traced_it_has_the_bits_of_the_eager_step(without_inductor: None) -> None:
    eager = run(nm.Config(other="lion", guard="full"))
    for step in (local_update_, nm.step, nm.step_):
        found = run(nm.Config(other="lion", guard="full"), step)
        for a, b in zip(eager, found, strict=True):
            assert all(same_bits(a[name], b[name]) for name in a), step


@pytest.mark.parametrize("guard", ["output", "full"])
@pytest.mark.parametrize("fault", ["gradient", "exp_avg"])
def test_a_skipped_step_keeps_every_bit(guard: str, fault: str) -> None:
    config = nm.Config(other="lion", guard=guard)  # type: ignore[arg-type]
    params, state = run(config)
    plan, grads = nm.make_plan(params, config, routes=ROUTES), tensors(9)
    (grads["bias"] if fault == "gradient" else state["bias.exp_avg"])[3] = float("nan")
    result = nm.update(params, grads, state, hyper_of(params), plan)
    assert bool(result.skipped)
    assert result.flags[:, plan.names.index("bias")].tolist() == [1, int(fault == "gradient")]
    for name in OTHERS:
        assert same_bits(result.params[name], params[name])
        bits = (x.reshape(-1).view(torch.int32) for x in (state[f"{name}.exp_avg"],))
        assert all(
            torch.equal(x, result.state[f"{name}.exp_avg"].reshape(-1).view(torch.int32))
            for x in bits
        )


def test_without_a_guard_a_nan_is_not_taken_for_a_zero() -> None:
    params = tensors(0)
    plan = nm.make_plan(params, nm.Config(other="lion"), routes=ROUTES)
    grads = tensors(1)
    grads["bias"][3] = float("nan")
    result = nm.update(params, grads, nm.init(plan, params), hyper_of(params), plan)
    assert result.params["bias"][3].isnan() and result.params["bias"][:3].isfinite().all()


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_a_master_of_bfloat16_moves_as_float32_does(master: str) -> None:
    params = {"bias": torch.full((64,), 1.0).bfloat16()}
    config = nm.Config(other="lion", master=master)  # type: ignore[arg-type]
    plan = nm.make_plan(params, config, routes={"bias": nm.Route("adamw")})
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=2.0**-12)
    for _ in range(64):
        params, state, *_ = nm.update(
            params, {"bias": torch.ones(64).bfloat16()}, state, hyper, plan
        )
    torch.testing.assert_close(params["bias"].float(), torch.full((64,), 1 - 64 * 2.0**-12))


def test_rounding_by_chance_moves_bfloat16_on_average() -> None:
    params = {"bias": torch.full((20_000,), 1.0).bfloat16()}
    config = nm.Config(other="lion", master="stochastic")
    plan = nm.make_plan(params, config, routes={"bias": nm.Route("adamw")})
    hyper = nm.Hyper.of(params, lr=2.0**-12)
    grads = {"bias": torch.ones(20_000).bfloat16()}
    new, *_ = nm.update(params, grads, nm.init(plan, params), hyper, plan)
    assert abs(float((1 - new["bias"].float()).mean()) - 2.0**-12) < 0.1 * 2.0**-12


def test_a_saved_run_goes_on_and_adamw_cannot_continue_it(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    params, state = run(nm.Config(other="lion"))
    plan = nm.make_plan(params, nm.Config(other="lion"), routes=ROUTES)
    nm.save(tmp_path / "run", params, state, plan)
    loaded = nm.load(tmp_path / "run", plan)
    assert all(same_bits(loaded.state[name], x) for name, x in state.items())
    with pytest.raises(nm.CheckpointError, match=r"Config\.other was 'lion', is 'adamw'"):
        nm.load(tmp_path / "run", nm.make_plan(params, routes=ROUTES))


def test_the_plan_and_the_optimizer_name_it(eager: None) -> None:
    params = tensors(0)
    plan = nm.make_plan(params, nm.Config(other="lion"), routes=ROUTES)
    assert "lion lr_mul" in str(plan) or "lion lr*" in str(plan)
    assert "adamw" not in str(plan).split("parameters,")[0].replace("routes", "")
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = nm.NorMuon([("w", w)], lr=0.1, config=nm.Config(other="lion"))
    w.grad = torch.tensor([1.0, -2.0, 0.0, 3e-30, 5.0])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.9, 1.1, 1.0, 0.9, 0.9]))
    assert set(optimizer.state[w]) == {"exp_avg", "step", "skipped", "consecutive"}


@pytest.mark.parametrize("master", ["none", "mantissa", "stochastic", "fp32"])
def test_metrics_are_those_of_its_step_and_change_no_bit(master: Any) -> None:
    dtype = torch.float32 if master == "none" else torch.bfloat16
    options: dict[str, Any] = {"other": "lion", "master": master, "guard": "full"}
    for step in (nm.update, local_update_):
        plain, measured = (run(nm.Config(metrics=m, **options), step, dtype) for m in (False, True))
        for a, b in zip(plain, measured, strict=True):
            assert all(same_bits(a[name], b[name]) for name in a), step
    params, state = measured
    plan = nm.make_plan(params, nm.Config(metrics=True, **options), routes=ROUTES)
    result = nm.update(params, tensors(9, dtype), state, hyper_of(params), plan)
    numbers = nm.report_metrics(result, plan)
    for name in OTHERS:
        lr = 2**-7 * (0.5 if name == "bias" else 1.0)
        assert numbers[f"update_rms/{name}"] == pytest.approx(lr)  # signs, times the rate
        moment = result.state[f"{name}.exp_avg"].double().square().mean().sqrt().item()
        assert numbers[f"momentum_rms/{name}"] == pytest.approx(moment)
        size = params[name].double().norm().item()
        assert numbers[f"weight_norm/{name}"] == pytest.approx(size, rel=1e-2)
