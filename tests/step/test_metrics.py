"""Metrics: the numbers of the whole step beside an oracle in float64, and the step's own bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.algorithm.metrics import METRICS
from normuon_fn.step import local_update_

NAN = float("nan")
SHAPES = {
    "layers.0": (8, 12), "layers.1": (8, 12), "layers.tall": (20, 6), "experts": (2, 6, 10),
    "qkv": (12, 8), "half": (6, 8), "embed.weight": (11, 6), "bias": (10,), "frozen": (4, 4),
    "idle": (8, 12),
}  # fmt: skip
ROUTES = {
    "qkv": nm.Route(splits=(6, 4, 2)),
    "embed.weight": nm.Route("adamw", lr_mul=0.5),
    "frozen": nm.Route("frozen"),
    **{name: nm.Route() for name in ("layers.*", "experts", "half", "idle")},
}
LR, DECAY = 0.02, 0.1
Tensors = dict[str, Tensor]


def tensors(seed: int) -> Tensors:
    torch.manual_seed(seed)
    made = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return {name: x.bfloat16() if name == "half" else x for name, x in made.items()}


def gradients(seed: int) -> dict[str, Tensor | None]:
    return {**tensors(seed), "idle": None}


def run(config: nm.Config, steps: int = 2, function: Any = nm.update) -> tuple[Any, nm.Plan, Any]:
    """The last result, the plan, and parameters and state before the last step."""
    params = tensors(0)
    plan = nm.make_plan(params, config, routes=ROUTES)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR, weight_decay=DECAY)
    before: Any = None
    result: Any = None
    for k in range(steps):
        before = {n: x.clone() for n, x in params.items()}, {n: x.clone() for n, x in state.items()}
        result = function(params, gradients(1 + k), state, hyper, plan)
        params, state = result.params, result.state
    return result, plan, before


def expected_of(name: str, result: Any, plan: nm.Plan, before: Any, grad: Tensor) -> list[float]:
    """The six numbers, from what was there before the step and what is there after it."""
    params, states = before
    matrix = f"{name}.momentum" in states
    master = f"{name}.mantissa"
    old, new = params[name].double(), result.params[name].double()
    if master in states:
        from normuon_fn.ops.reference import joined_with

        old = joined_with(params[name], states[master]).double()
        new = joined_with(result.params[name], result.state[master]).double()
    lr = LR * next(p.route.lr_mul for p in plan.parameters if p.name == name)
    update = old * (1 - lr * DECAY) - new  # the step without its decay
    momentum = result.state[f"{name}.momentum" if matrix else f"{name}.exp_avg"].double()
    spread = NAN
    if f"{name}.variance" in states:
        variance = result.state[f"{name}.variance"].double()
        spread = (variance.std(correction=0) / variance.mean()).item()
    return [
        update.square().mean().sqrt().item(),
        grad.double().square().mean().sqrt().item(),
        momentum.square().mean().sqrt().item(),
        old.norm().item(),
        (update.norm() / old.norm()).item(),
        spread,
    ]


CONFIGS = {
    "default": {},
    "nesterov, short": {"nesterov": True, "reduction": "short", "guard": "full"},
    "dion": {"momentum_form": "sum", "scale": "spectral", "guard": "output"},
    "muon": {"normalize": False, "scale": "muon"},
    "masters": {"master": "mantissa", "momentum_dtype": torch.bfloat16, "guard": "full"},
    "lion": {"other": "lion", "guard": "output"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_is_that_of_the_step_that_was_made(name: str) -> None:
    master = CONFIGS[name].get("master", "none")
    config = nm.Config(metrics=True, **CONFIGS[name])  # type: ignore[arg-type]
    result, plan, before = run(config)
    assert result.metrics.shape == (len(METRICS), len(SHAPES))
    assert result.metrics.dtype == torch.float32
    for k, parameter in enumerate(plan.names):
        found = result.metrics[:, k].tolist()
        grad = gradients(2)[parameter]
        if parameter in ("frozen", "idle"):
            assert all(map(math.isnan, found)), parameter
            continue
        expected = expected_of(parameter, result, plan, before, grad)
        # The update is a difference of float32: 1e-7 of parameters of 1, of an update of 4e-3. Of
        # bfloat16 parameters without masters it cannot be seen in them at all.
        seen = parameter != "half" or master != "none"
        for metric, a, b in zip(METRICS, found, expected, strict=True):
            if metric in ("update_rms", "update_ratio") and not seen:
                continue
            assert a == pytest.approx(b, rel=1e-4, nan_ok=True), (parameter, metric)


def test_the_root_mean_square_of_a_healthy_update_is_a_fifth_of_the_learning_rate() -> None:
    result, plan, _ = run(nm.Config(metrics=True))
    numbers = nm.report_metrics(result, plan)
    for name in ("layers.0", "layers.tall", "experts", "qkv", "half"):
        assert numbers[f"update_rms/{name}"] == pytest.approx(0.2 * LR, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("function", [nm.update, local_update_], ids=["pure", "in place"])
def test_metrics_change_no_bit_of_the_step(name: str, function: Any) -> None:
    options: Any = CONFIGS[name]
    plain, _, _ = run(nm.Config(**options), 3, function)
    measured, _, _ = run(nm.Config(metrics=True, **options), 3, function)
    assert type(plain) is nm.StepResult and plain.metrics is None and len(plain) == 4
    assert type(measured) is nm.MeasuredResult
    for a, b in ((plain.params, measured.params), (plain.state, measured.state)):
        assert [*a] == [*b] and all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(plain.flags, measured.flags)


def test_metrics_change_no_bit_of_the_compiled_step() -> None:
    """Inductor fuses sums of other passes with those of the step: their order must stay."""
    found = []
    for metrics in (False, True):
        torch.manual_seed(0)
        params = {"layers.0": torch.randn(70, 133), "bias": torch.randn(9)}
        plan = nm.make_plan(params, nm.Config(metrics=metrics, guard="full", nesterov=True))
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR, weight_decay=DECAY)
        for _ in range(2):
            grads = {name: torch.randn_like(x) for name, x in params.items()}
            result = nm.step_(params, grads, state, hyper, plan)
        found.append((params, state, result))
    (a, sa, _), (b, sb, measured) = found
    assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(sa[k], sb[k]) for k in sa)
    eager = nm.update(a, grads, sa, hyper, plan).metrics
    again = nm.step(b, grads, sb, hyper, plan).metrics
    torch.testing.assert_close(eager, again, rtol=1e-5, atol=0, equal_nan=True)
    assert measured.metrics.isfinite().sum() == 11


@pytest.mark.parametrize("guard", ["off", "output", "full"])
def test_a_skipped_step_subtracts_nothing_and_its_flags_tell_why(guard: str) -> None:
    params = {"layers.0": torch.randn(8, 12), "layers.1": torch.randn(8, 12), "b": torch.randn(3)}
    plan = nm.make_plan(params, nm.Config(metrics=True, guard=guard))  # type: ignore[arg-type]
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    grads = {name: torch.randn_like(x) for name, x in params.items()}
    grads["layers.1"][2, 3] = NAN
    result: Any = nm.update(params, grads, state, hyper, plan)
    numbers = nm.report_metrics(result, plan)
    assert numbers["nonfinite_gradient/layers.1"] == 1.0
    assert numbers["nonfinite_gradient/layers.0"] == 0.0
    assert math.isnan(numbers["grad_rms/layers.1"])
    assert numbers["weight_norm/layers.1"] == pytest.approx(params["layers.1"].norm().item())
    assert bool(result.skipped) == (guard != "off")
    kept = numbers["momentum_rms/layers.0"]
    assert kept == 0.0 if guard == "full" else kept > 0.0  # with "full" it keeps its bits
    assert numbers["update_rms/b"] == pytest.approx(0.0 if guard != "off" else LR)
    assert numbers["update_ratio/b"] == 0.0 or guard == "off"


def test_found_inf_leaves_finite_numbers() -> None:
    params = {"layers.0": torch.randn(8, 12)}
    plan = nm.make_plan(params, nm.Config(metrics=True))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    result: Any = nm.update(
        params, {"layers.0": torch.randn(8, 12)}, state, hyper, plan, found_inf=torch.ones(())
    )
    assert bool(result.skipped) and result.metrics[:5].isfinite().all()
    assert result.metrics[2] == 0  # the momentum keeps its bits
    assert result.metrics[0] == 0 and result.metrics[4] == 0  # and nothing was subtracted


def test_zeros_have_the_numbers_of_zeros() -> None:
    params = {"layers.0": torch.zeros(8, 12)}
    plan = nm.make_plan(params, nm.Config(metrics=True))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    result: Any = nm.update(params, {"layers.0": torch.zeros(8, 12)}, state, hyper, plan)
    update, grad, momentum, weight, ratio, spread = result.metrics[:, 0].tolist()
    assert (update, grad, momentum, weight) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(ratio) and math.isnan(spread)


def test_a_report_has_no_entry_for_what_the_step_left_alone() -> None:
    result, plan, _ = run(nm.Config(metrics=True))
    numbers = nm.report_metrics(result, plan)
    names = {key.partition("/")[2] for key in numbers}
    assert names == set(SHAPES) - {"frozen", "idle"}
    assert "variance_spread/bias" not in numbers and "variance_spread/layers.tall" in numbers
    assert all(type(x) is float for x in numbers.values())


def test_a_report_without_metrics_says_what_to_write() -> None:
    result, plan, _ = run(nm.Config())
    with pytest.raises(ValueError, match=r"Config\(metrics=True\)"):
        nm.report_metrics(result, plan)
    with pytest.raises(TypeError, match="metrics"):
        nm.Config(metrics="all")  # type: ignore[arg-type]


def test_rates_that_differ_by_parameter_show_in_the_updates() -> None:
    params = {"layers.0": torch.randn(8, 12), "layers.1": torch.randn(8, 12)}
    hyper = nm.Hyper.stack([nm.Hyper.of(params, lr=x) for x in (0.01, 0.03)])
    plan = nm.make_plan(params, nm.Config(metrics=True), hyper_of={"layers.1": 1, "*": 0})
    grads = {name: torch.randn_like(x) for name, x in params.items()}
    result: Any = nm.update(params, grads, nm.init(plan, params), hyper, plan)
    torch.testing.assert_close(result.metrics[0], torch.tensor([0.002, 0.006]), rtol=1e-5, atol=0)


def test_a_vmapped_step_has_the_metrics_of_each_member() -> None:
    params = {"layers.0": torch.randn(8, 12), "b": torch.randn(3)}
    plan = nm.make_plan(params, nm.Config(metrics=True, orthogonalize_dtype=torch.float32))
    hyper = nm.Hyper.of(params, lr=LR)
    many = {k: torch.stack([x, 2 * x]) for k, x in params.items()}
    grads = {k: torch.randn_like(x) for k, x in many.items()}
    states = {k: torch.stack([x, x]) for k, x in nm.init(plan, params).items()}

    def measured(p: Tensors, g: Tensors, s: Tensors) -> Tensor:
        return nm.update(p, g, s, hyper, plan).metrics  # type: ignore[return-value]

    together = torch.func.vmap(measured)(many, grads, states)
    for k in range(2):
        one = measured(*({n: x[k] for n, x in d.items()} for d in (many, grads, states)))
        torch.testing.assert_close(together[k], one, rtol=1e-3, atol=0, equal_nan=True)
