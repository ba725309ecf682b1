"""DESIGN: which tensors keep their bits, by mode, scope and what was not finite.

Every row is held against guard="off".
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normuon_fn as nm

NAMES = ("square", "tall", "experts", "embed.weight", "bias")


def problem(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "square": (8, 8),
        "tall": (24, 8),
        "experts": (3, 8, 12),
        "embed.weight": (10, 8),
        "bias": (8,),
    }
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return params, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def nan_for(rows: int, cols: int):
    """An orthogonalizer whose result is NaN for one shape: a Newton-Schulz that diverged on clean
    gradients.
    """

    def orthogonalizer(x: Tensor) -> Tensor:
        y = x / x.norm(dim=(-2, -1), keepdim=True)
        return y * float("nan") if x.shape[1:] == (rows, cols) else y

    return orthogonalizer


def warm(
    config: nm.Config,
) -> tuple[nm.Plan, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], nm.Hyper]:
    """One finite step, so that no state is zero."""
    params, grads = problem()
    clean = nm.make_plan(params, nm.Config(guard=config.guard, guard_scope=config.guard_scope))
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    result = nm.update(params, grads, nm.init(clean, params), hyper, clean)
    return nm.make_plan(params, config), result.params, problem(1)[1], result.state, hyper


def kept(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if torch.equal(before[name], after[name])}


def state_names(kind: str) -> set[str]:
    return {f"{name}.{kind}" for name in NAMES[:3]}


ADAMW_STATE = {f"{name}.{kind}" for name in NAMES[3:] for kind in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_off_lets_a_non_finite_gradient_into_weights_and_momentum(value: float) -> None:
    plan, params, grads, state, hyper = warm(nm.Config())
    grads["tall"][3, 2] = value
    result = nm.update(params, grads, state, hyper, plan)
    assert not result.params["tall"].isfinite().any()
    assert not result.state["tall.momentum"].isfinite().all()
    assert result.params["square"].isfinite().all() and not result.skipped


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bad", NAMES)
def test_full_keeps_every_bit_when_a_gradient_is_not_finite(bad: str, value: float) -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard="full"))
    grads[bad].view(-1)[5] = value
    result = nm.update(params, grads, state, hyper, plan)
    assert kept(params, result.params) == set(params)
    assert kept(state, result.state) == set(state) - {
        "guard.step",
        "guard.skipped",
        "guard.consecutive",
    }
    assert result.flags[1].tolist() == [int(name == bad) for name in plan.names]
    assert result.skipped


def test_output_keeps_params_and_variance_and_the_poison_stays_in_the_momentum() -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard="output"))
    grads["tall"][3, 2] = float("nan")
    result = nm.update(params, grads, state, hyper, plan)
    assert kept(params, result.params) == set(params)
    moved = {"guard.step", "guard.skipped", "guard.consecutive"} | state_names("momentum")
    assert kept(state, result.state) == set(state) - moved
    assert result.state["tall.momentum"].isnan().any()


@pytest.mark.parametrize("guard", ["output", "full"])
def test_a_non_finite_update_of_finite_gradients_keeps_params_and_variance_and_moves_the_momentum(
    guard: str,
) -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard=guard, orthogonalizer=nan_for(8, 24)))
    result = nm.update(params, grads, state, hyper, plan)
    assert kept(params, result.params) == set(params)
    moved = {"guard.step", "guard.skipped", "guard.consecutive"} | state_names("momentum")
    assert kept(state, result.state) == set(state) - moved
    assert result.flags.tolist() == [[int(name == "tall") for name in plan.names], [0] * 5]
    off = nm.make_plan(params, nm.Config(orthogonalizer=nan_for(8, 24)))
    assert not nm.update(params, grads, state, hyper, off).params["tall"].isfinite().any()


@pytest.mark.parametrize("guard", ["output", "full"])
def test_bucket_scope_skips_the_bad_bucket_alone(guard: str) -> None:
    plan, params, grads, state, hyper = warm(
        nm.Config(guard=guard, guard_scope="bucket", orthogonalizer=nan_for(8, 24))
    )
    result = nm.update(params, grads, state, hyper, plan)
    assert kept(params, result.params) == {"tall"}
    assert kept(state, result.state) == {"tall.variance"} and result.skipped
    grads["bias"][0] = float("inf")
    result = nm.update(params, grads, state, hyper, plan)
    assert kept(params, result.params) == {"tall", "bias", "embed.weight"}


def test_a_poisoned_momentum_or_variance_is_a_non_finite_update_and_never_reaches_the_weights() -> (
    None
):
    for kind in ("momentum", "variance"):
        plan, params, grads, state, hyper = warm(nm.Config(guard="full"))
        state[f"square.{kind}"].view(-1)[0] = float("nan")
        result = nm.update(params, grads, state, hyper, plan)
        assert kept(params, result.params) == set(params) and result.flags[0].tolist() == [
            1,
            0,
            0,
            0,
            0,
        ]
        off = nm.make_plan(params, nm.Config())
        assert not nm.update(params, grads, state, hyper, off).params["square"].isfinite().all()


@pytest.mark.parametrize("scope", ["step", "bucket"])
@pytest.mark.parametrize("guard", ["output", "full"])
def test_finite_steps_have_the_same_bits_with_the_guard_on_as_off(guard: str, scope: str) -> None:
    params, _ = problem()
    runs = []
    for config in (nm.Config(), nm.Config(guard=guard, guard_scope=scope)):
        plan, here = nm.make_plan(params, config), params
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
        for k in range(4):
            result = nm.update(here, problem(k)[1], state, hyper, plan)
            here, state = result.params, result.state
        runs.append((here, state))
    for off, on in zip(*runs, strict=True):
        assert kept(off, on) == set(off)


@pytest.mark.parametrize("guard", ["off", "output", "full"])
def test_found_inf_skips_everything_and_zero_changes_nothing(guard: str) -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard=guard))
    skipped = nm.update(params, grads, state, hyper, plan, found_inf=torch.ones(1))
    assert kept(params, skipped.params) == set(params) and skipped.skipped
    assert kept(state, skipped.state) == set(state) - {
        "guard.step",
        "guard.skipped",
        "guard.consecutive",
    }
    plain = nm.update(params, grads, state, hyper, plan)
    told = nm.update(params, grads, state, hyper, plan, found_inf=torch.zeros(()))
    assert kept(plain.params, told.params) == set(params) and kept(plain.state, told.state) == set(
        state
    )


def test_counters_count_steps_skips_and_skips_in_a_row_and_recover() -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard="full"))
    counts = []
    for bad in (False, True, True, False, True):
        here = {name: grad.clone() for name, grad in grads.items()}
        if bad:
            here["bias"][0] = float("nan")
        result = nm.update(params, here, state, hyper, plan)
        params, state = result.params, result.state
        counts.append(
            tuple(int(state[f"guard.{name}"]) for name in ("step", "skipped", "consecutive"))
        )
    assert counts == [(2, 0, 0), (3, 1, 1), (4, 2, 2), (5, 2, 0), (6, 3, 1)]


def test_skipped_batches_leave_the_weights_of_a_run_that_never_saw_them() -> None:
    params, _ = problem()
    plan = nm.make_plan(params, nm.Config(guard="full"))
    hyper, ends = nm.Hyper.of(params, lr=0.02, weight_decay=0.1), []
    for faulty in (False, True):
        here, state = params, nm.init(plan, params)
        for k in range(12):
            if k % 3 == 1:
                if not faulty:
                    continue
                grads = problem(100 + k)[1]
                grads[NAMES[k % 5]].view(-1)[k % 7] = float("nan")
            else:
                grads = problem(k)[1]
            result = nm.update(here, grads, state, hyper, plan)
            here, state = result.params, result.state
        ends.append(here)
    assert kept(*ends) == set(params)


def test_check_warns_by_name_every_time_and_raises_after_max_consecutive() -> None:
    plan, params, grads, state, hyper = warm(nm.Config(guard="full"))
    assert nm.check(nm.update(params, grads, state, hyper, plan), plan) is False
    grads["experts"][1, 2, 3] = float("inf")
    for k in range(2):
        result = nm.update(params, grads, state, hyper, plan)
        state = result.state
        with pytest.warns(
            RuntimeWarning, match=rf"step {k + 2} skipped, {k + 1} in a row: experts .*gradient"
        ):
            assert nm.check(result, plan, max_consecutive=3) is True
    result = nm.update(params, grads, state, hyper, plan)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(nm.NonFiniteStepError, match=r"3 steps in a row[^|]*experts"),
    ):
        nm.check(result, plan, max_consecutive=3)


def test_a_gradient_whose_square_overflows_or_underflows_is_no_error() -> None:
    params, grads = problem()
    params, grads = {"square": params["square"]}, {"square": grads["square"]}
    plan = nm.make_plan(params, nm.Config(guard="full"))
    hyper = nm.Hyper.of(params, lr=0.02)
    plain = nm.update(params, grads, nm.init(plan, params), hyper, plan)
    for factor in (2.0**100, 2.0**-100):
        scaled = nm.update(
            params, {"square": grads["square"] * factor}, nm.init(plan, params), hyper, plan
        )
        assert not scaled.skipped and torch.equal(scaled.params["square"], plain.params["square"])


@pytest.mark.parametrize("held_by", ["another parameter's NaN", "found_inf"])
@pytest.mark.parametrize("preset", ["paper", "dion", "modded_nanogpt", "emerging_optimizers"])
def test_a_held_momentum_accuses_nobody_whose_tensors_are_finite(preset: str, held_by: str) -> None:
    """The update is then that of the old momentum, so the old momentum is what must be measured.

    Gradients of zeros leave a smaller momentum behind, and ``cancelling`` ones almost none.
    """
    config = nm.Config.preset(preset, guard="full")
    shapes = {"row": (1, 64), "zero": (1, 64), "cancelling": (16, 24), "guilty": (8, 8)}
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    plan = nm.make_plan(params, config, routes={"*": nm.Route()})
    hyper, state = nm.Hyper.of(params, lr=0.02), nm.init(params, plan)
    grads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    first = nm.update(params, grads, state, hyper, plan)
    beta, momentum = float(hyper.momentum), first.state["cancelling.momentum"]
    share = 1.0 if config.momentum_form == "sum" else 1.0 - beta
    grads |= {"zero": torch.zeros(1, 64), "cancelling": momentum * (-beta / share)}
    found = None
    if held_by == "found_inf":
        found = torch.ones(())
    else:
        grads["guilty"][0, 0] = torch.nan
    result = nm.update(first.params, grads, first.state, hyper, plan, found_inf=found)
    names = [n for n, bad in zip(plan.names, result.flags.amax(0).tolist(), strict=True) if bad]
    assert bool(result.skipped) and names == ["guilty"] * (found is None)
    assert kept(first.params, result.params) == set(params)
