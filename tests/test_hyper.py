"""`Hyper`: one call moves all rates, in place under a captured graph, and values stay float32."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.types.hyper import peaks_of

PARAMS = {"up": torch.ones(4, 6), "bias": torch.ones(4)}
OTHERS = [name for name in nm.Hyper._fields if name not in ("lr", "adamw_lr")]


def peak(**options: Any) -> nm.Hyper:
    return nm.Hyper.of(PARAMS, **{"lr": 0.5, "adamw_lr": 0.125, "weight_decay": 0.25, **options})


def rates(hyper: nm.Hyper) -> tuple[Any, Any]:
    return hyper.lr.tolist(), hyper.adamw_lr.tolist()


def test_one_call_moves_both_rates_and_keeps_their_ratio_also_after_zero() -> None:
    whole = peak()
    hyper = whole.scaled(0.0)
    for factor in (0.0, 0.5, 1.0, 0.25, 0.0, 1.0):
        assert whole.scaled(factor, out=hyper) is hyper
        assert rates(hyper) == rates(whole.scaled(factor)) == (0.5 * factor, 0.125 * factor)
        assert rates(whole) == (0.5, 0.125)
    assert all(getattr(hyper, name) is getattr(whole, name) for name in OTHERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_factor_may_be_a_tensor_of_any_dtype_and_the_rates_stay_float32(
    dtype: torch.dtype,
) -> None:
    whole, factor = peak(), torch.tensor(1, dtype=dtype)
    hyper = whole.scaled(factor)
    assert hyper.lr.dtype == hyper.adamw_lr.dtype == torch.float32
    assert rates(whole.scaled(factor, out=hyper)) == (0.5, 0.125)


def test_a_stack_moves_all_its_entries_by_one_factor_or_each_by_its_own() -> None:
    whole = nm.Hyper.stack([peak(), peak(lr=0.25)])
    hyper = whole.scaled(0.5)
    assert rates(hyper) == ([0.25, 0.125], [0.0625, 0.0625])
    whole.scaled(torch.tensor([1.0, 0.0]), out=hyper)
    assert rates(hyper) == ([0.5, 0.0], [0.125, 0.0])


def test_the_tensors_of_out_stay_the_same_objects_so_that_a_captured_graph_sees_them() -> None:
    whole = peak()
    hyper = whole.scaled(0.0)
    before = [*map(id, hyper)], [x.data_ptr() for x in hyper]
    whole.scaled(0.5, out=hyper)
    assert before == ([*map(id, hyper)], [x.data_ptr() for x in hyper])


def test_a_step_with_a_scaled_hyper_moves_both_kinds_of_parameters_by_that_factor() -> None:
    plan = nm.make_plan(PARAMS, nm.Config(), routes={"up": nm.Route(), "bias": nm.Route("adamw")})
    grads = {name: torch.randn_like(x) for name, x in PARAMS.items()}
    state, whole = nm.init(PARAMS, plan), peak(weight_decay=0.0)
    went = []
    for factor in (1.0, 0.5, 0.0):
        result = nm.update(PARAMS, grads, state, whole.scaled(factor), plan)
        went.append({name: result.params[name] - PARAMS[name] for name in PARAMS})
    for name in PARAMS:
        assert went[0][name].any() and not went[2][name].any()
        assert torch.allclose(went[1][name], went[0][name] / 2, atol=1e-7)  # seen: 3e-8


def test_a_rate_may_be_differentiated_by_the_factor() -> None:
    factor = torch.tensor(0.5, requires_grad=True)
    hyper = peak().scaled(factor)
    (hyper.lr + hyper.adamw_lr).backward()
    assert float(factor.grad) == 0.625  # type: ignore[arg-type]


def test_scaled_is_traced_into_a_graph_and_mapped_over_an_ensemble() -> None:
    whole = peak()

    def moved(factor: Tensor) -> tuple[Tensor, Tensor]:
        hyper = whole.scaled(factor)
        return hyper.lr, hyper.adamw_lr

    traced = torch.compile(moved, backend="eager", fullgraph=True)(torch.tensor(0.5))
    assert tuple(x.item() for x in traced) == (0.25, 0.0625)
    mapped = torch.vmap(moved)(torch.tensor([0.0, 1.0]))
    assert [x.tolist() for x in mapped] == [[0.0, 0.5], [0.0, 0.125]]


def test_what_would_compound_or_fit_nothing_is_refused_and_nothing_is_written() -> None:
    whole = peak()
    swapped = whole.scaled(1.0)._replace(adamw_lr=whole.lr)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (-1.0, None, ValueError, "factor: expected a finite number >= 0"),
        (float("nan"), None, ValueError, "factor: expected a finite number"),
        (True, None, TypeError, "factor: expected a Python number"),
        ("half", None, TypeError, "factor: expected a Python number"),
        (torch.ones(3), None, ValueError, "factor: expected a number, a 0-d tensor"),
        (0.5, whole, ValueError, r"start from the one before.*peak.scaled\(0.0\)"),
        (0.5, swapped, ValueError, "start from the one before"),
        (0.5, tuple(whole), TypeError, "out: expected a Hyper, got tuple"),
        (0.5, nm.Hyper.stack([whole]), ValueError, r"out: expected lr of shape \(\)"),
    ]
    for factor, out, kind, message in cases:
        with pytest.raises(kind, match=message):
            whole.scaled(factor, out=out)
    assert rates(whole) == (0.5, 0.125)


def test_peaks_are_what_the_rates_were_made_from_whatever_a_schedule_does() -> None:
    whole = peak()
    assert peaks_of(whole) == peaks_of(whole.scaled(0.0).scaled(0.5)) == ((0.5,), (0.125,))
    assert peaks_of(nm.Hyper.stack([whole, peak(lr=0.25)])) == ((0.5, 0.25), (0.125, 0.125))
    assert peaks_of(whole._replace(lr=torch.tensor(1.0))) == ((), (0.125,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_change_no_value(dtype: torch.dtype) -> None:
    expected = peak(lr=0.1).scaled(0.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = peak(lr=0.1).scaled(0.3)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and a.device.type == "cpu" and torch.equal(a, b)


def test_names_of_other_optimizers_are_answered_with_ours_and_the_signature_stays() -> None:
    with pytest.raises(TypeError, match=r"Hyper.of: 'betas' is called 'adamw_betas' here"):
        nm.Hyper.of(PARAMS, lr=0.1, betas=(0.9, 0.95))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument 'weigth_decay'; did you mean 'weight_decay'"):
        nm.Hyper.of(PARAMS, lr=0.1, weigth_decay=0.1)  # type: ignore[call-arg]
    assert "adamw_betas" in inspect.signature(nm.Hyper.of).parameters


# --- 16-bit parameters that their rates cannot move


def seen_at(lr: float, factors: list[float], **config: Any) -> list[str]:
    """The warnings of steps with a peak rate and a schedule."""
    torch.manual_seed(0)
    params = {"up": (torch.randn(64, 96) * 0.02).bfloat16(), "bias": torch.zeros(64).bfloat16()}
    plan = nm.make_plan(params, nm.Config(**config))
    state, whole = nm.init(params, plan), nm.Hyper.of(params, lr=lr)
    grads = {name: torch.randn_like(x) for name, x in params.items()}
    hyper = whole.scaled(0.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for factor in factors:
            nm.step_(params, grads, state, whole.scaled(factor, out=hyper), plan)
    assert all(each.filename == __file__ for each in seen)
    return [str(each.message) for each in seen]


@pytest.mark.usefixtures("without_inductor")
def test_a_peak_rate_that_moves_few_entries_is_said_once_at_the_first_step() -> None:
    (text,) = seen_at(2e-5, [0.0, 0.5, 1.0])
    assert "lr=2e-05 with bfloat16 parameters" in text and "Config(master='mantissa')" in text


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("lr", "master"), [(0.002, "none"), (2e-5, "stochastic")])
def test_a_warm_up_of_a_large_rate_or_a_master_says_nothing(lr: float, master: str) -> None:
    assert seen_at(lr, [0.0, 1e-3, 1.0, 0.0], master=master) == []
