"""What every fault does, in every mode, scope and way to run a step: which tensors keep their bits,
flags, counters.

The table is `tests.faults.keeps_its_bits`. Whatever it does not keep must come out as it does with
the guard off, so that a guard that keeps too much, or writes something of its own, is as red as one
that lets a NaN through.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.step import local_update_
from tests.faults import (
    ADAMW,
    COUNTERS,
    INF,
    NAN,
    ROUTES,
    SHAPES,
    STAGES,
    VALUES,
    VICTIMS,
    brittle,
    expected_flags,
    hyper_of,
    keeps_its_bits,
    plant,
    same_bits,
    tensors,
)

Tensors = dict[str, Tensor]
Cell = tuple[str, str, str]  # stage, value, victim

ON = [("output", "step"), ("output", "bucket"), ("full", "step"), ("full", "bucket")]
RUNS = [(way, *on) for way in ("eager", "in place", "vmap") for on in ON]
RUNS += [
    ("compiled", "output", "bucket"),
    ("compiled", "full", "step"),
    ("compiled in place", "full", "bucket"),
]  # 3 s each


@functools.cache
def plan_of(guard: str, scope: str) -> nm.Plan:
    return nm.make_plan(
        tensors(), nm.Config(guard=guard, guard_scope=scope, orthogonalizer=brittle), routes=ROUTES
    )


@functools.cache
def warm() -> tuple[Tensors, Tensors]:
    """Parameters and state after one finite step: no state is zero."""
    plan, params = plan_of("off", "step"), tensors()
    result = nm.update(params, tensors(1), nm.init(plan, params), hyper_of(params), plan)
    assert not result.flags.any()
    return result.params, result.state


def copied(given: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in given.items()}


@functools.cache
def function(way: str, guard: str, scope: str) -> Callable[..., nm.StepResult]:
    uncompiled = local_update_ if way.endswith("in place") else nm.update
    return compile_whole(uncompiled, "aot_eager") if way.startswith("compiled") else uncompiled


def run(way: str, guard: str, scope: str, cell: Cell) -> tuple[Tensors, nm.StepResult]:
    """``(before, result)`` of one step with one fault; ``before`` holds parameters and state.

    Under vmap of member 0 of 2.
    """
    plan = plan_of(guard, scope)
    (params, state), grads = warm(), tensors(2)
    params, state = copied(params), copied(state)
    if way == "vmap":
        clean_grads, clean_state = copied(grads), copied(state)
        plant(*cell, grads, state)
        return {**params, **state}, _ensemble(
            plan, params, (grads, clean_grads), (state, clean_state)
        )
    plant(*cell, grads, state)
    before = copied({**params, **state})
    result = function(way, guard, scope)(params, grads, state, hyper_of(params), plan)
    given, new = {**params, **state}, {**result.params, **result.state}
    if way.endswith("in place"):
        assert all(new[name] is given[name] for name in given)
    else:
        assert all(same_bits(given[name], before[name]) for name in given)
    return before, result


def _ensemble(
    plan: nm.Plan, params: Tensors, grads: tuple[Tensors, Tensors], state: tuple[Tensors, Tensors]
) -> nm.StepResult:
    def both(first: Tensors, second: Tensors) -> Tensors:
        return {name: torch.stack([first[name], second[name]]) for name in first}

    hyper = nm.Hyper(*(torch.stack([value, value]) for value in hyper_of(params)))
    members = torch.vmap(lambda p, g, s, h: nm.update(p, g, s, h, plan))
    result = members(both(params, params), both(*grads), both(*state), hyper)
    first, clean = ({n: x[k] for n, x in {**result.params, **result.state}.items()} for k in (0, 1))
    assert not result.flags[1].any() and not result.skipped[1]
    for name, old in {**params, **state[1]}.items():  # the other member takes its step
        assert clean[name].isfinite().all() and (
            name in COUNTERS or not same_bits(clean[name], old)
        )
    return nm.StepResult(
        {n: first[n] for n in params},
        {n: first[n] for n in state[0]},
        result.flags[0],
        result.skipped[0],
    )


@functools.cache
def unguarded(way: str, cell: Cell) -> Tensors:
    _, result = run(way.removesuffix(" in place"), "off", "step", cell)
    return {**result.params, **result.state}


def counters(state: Tensors) -> list[int]:
    return [int(state[name]) for name in COUNTERS]


def cells(stage: str) -> list[Cell]:
    return [(stage, what, name) for what in VALUES for name in VICTIMS]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("way", "guard", "scope"), RUNS)
def test_a_fault_keeps_the_bits_that_the_table_says_and_no_others(
    way: str, guard: str, scope: str, stage: str
) -> None:
    wrong = []
    for cell in cells(stage):
        before, result = run(way, guard, scope, cell)
        after, off = {**result.params, **result.state}, unguarded(way, cell)
        keeps = keeps_its_bits(guard, scope, *cell)
        for name in before.keys() - set(COUNTERS):
            if not same_bits(after[name], before[name] if name in keeps else off[name]):
                wrong.append(
                    (
                        *cell,
                        name,
                        "should have kept its bits"
                        if name in keeps
                        else "differs from guard='off'",
                    )
                )
        if result.flags.tolist() != expected_flags(*cell):
            wrong.append((*cell, "flags", result.flags.tolist()))
        if (counters(result.state), bool(result.skipped)) != ([2, 1, 1], True):
            wrong.append((*cell, "counters", counters(result.state)))
    assert not wrong


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("way", "scope"),
    [
        ("eager", "step"),
        ("eager", "bucket"),
        ("in place", "step"),
        ("compiled", "step"),
        ("vmap", "step"),
    ],
)
def test_without_the_guard_the_same_faults_do_damage_keep_nothing_and_are_still_flagged(
    way: str, scope: str, stage: str
) -> None:
    wrong = []
    for cell in cells(stage):
        before, result = run(way, "off", scope, cell)
        after, victim = {**result.params, **result.state}, cell[2]
        wrong += [
            (*cell, name, "kept")
            for name in before.keys() - set(COUNTERS)
            if same_bits(before[name], after[name])
        ]
        harmed = {name for name, x in after.items() if not x.isfinite().all()}
        if not harmed or not all(
            name == victim or name.startswith(f"{victim}.") for name in harmed
        ):
            wrong.append((*cell, "not finite", harmed))
        if stage == "update" and harmed - {f"{victim}.variance"} != {victim}:
            wrong.append((*cell, "not finite", harmed))
        if (
            result.flags.tolist() != expected_flags(*cell)
            or counters(result.state) != [2, 0, 0]
            or result.skipped
        ):
            wrong.append((*cell, "flags, counters", result.flags.tolist(), counters(result.state)))
    assert not wrong


@pytest.mark.parametrize(("guard", "scope"), ON)
def test_a_newton_schulz_that_overflows_skips_every_matrix_and_no_adamw_bucket(
    guard: str, scope: str
) -> None:
    params, state = warm()
    grads, hyper = tensors(2), hyper_of(params)
    overflows = {"coefficients": ((1e15, 1.0, 0.0),) * 5}
    plan = nm.make_plan(
        params, nm.Config(guard=guard, guard_scope=scope, **overflows), routes=ROUTES
    )
    result = nm.update(params, grads, state, hyper, plan)
    assert result.flags.tolist() == [[int(name not in ADAMW) for name in SHAPES], [0] * len(SHAPES)]
    kept = {name for name in params if same_bits(params[name], result.params[name])}
    assert kept == (set(SHAPES) if scope == "step" else set(SHAPES) - ADAMW)
    off = nm.make_plan(params, nm.Config(**overflows), routes=ROUTES)
    damaged = nm.update(params, grads, state, hyper, off).params
    assert {name for name, x in damaged.items() if not x.isfinite().all()} == set(SHAPES) - ADAMW


# --- the test plan of microsoft/dion#79, under its names ---


def _nan_newton_schulz(x: Tensor) -> Tensor:
    return torch.full_like(x, NAN)


def _one_matrix(config: nm.Config) -> tuple[Tensors, nm.StepResult, nm.Plan]:
    generator = torch.Generator().manual_seed(0)
    params = {"weight": torch.randn(16, 24, generator=generator)}
    plan = nm.make_plan(params, config)
    grads = {"weight": torch.randn(16, 24, generator=generator)}
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    return params, nm.update(params, grads, nm.init(plan, params), hyper, plan), plan


def test_fallback_off_lets_nan_propagate_to_params() -> None:
    _, result, _ = _one_matrix(nm.Config(guard="off", orthogonalizer=_nan_newton_schulz))
    assert result.params["weight"].isnan().all() and not result.skipped


def test_fallback_on_skips_step_when_ns_returns_nan() -> None:
    params, result, plan = _one_matrix(nm.Config(guard="output", orthogonalizer=_nan_newton_schulz))
    assert same_bits(result.params["weight"], params["weight"])
    assert torch.count_nonzero(result.state["weight.variance"]) == 0
    assert (
        torch.count_nonzero(result.state["weight.momentum"])
        == result.state["weight.momentum"].numel()
    )
    with pytest.warns(RuntimeWarning, match="weight"):
        assert nm.check(result, plan) is True


def test_fallback_on_does_not_block_normal_step() -> None:
    params, off, _ = _one_matrix(nm.Config(guard="off"))
    _, on, plan = _one_matrix(nm.Config(guard="output"))
    assert nm.check(on, plan) is False  # and no warning: those are errors here
    assert not same_bits(on.params["weight"], params["weight"])
    assert same_bits(on.params["weight"], off.params["weight"])
    assert all(same_bits(on.state[name], off.state[name]) for name in off.state)


# --- two hundred steps ---


@pytest.mark.parametrize("update", [nm.update, local_update_], ids=["update", "update_"])
def test_two_hundred_steps_with_random_faults_end_as_the_run_that_never_saw_the_faulty_batches(
    update,
) -> None:
    dice = random.Random(0)
    faulty = {
        step: (dice.choice(list(SHAPES)), dice.choice([NAN, INF, -INF]), dice.random())
        for step in sorted(dice.sample(range(200), 60))
    }
    assert {name for name, _, _ in faulty.values()} == set(SHAPES)
    plan = nm.make_plan(tensors(), nm.Config(guard="full"), routes=ROUTES)
    ends = []
    for sees_faults in (True, False):
        params = tensors()
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
        for step in range(200):
            grads = tensors(1000 + step)
            if step in faulty:
                if not sees_faults:
                    continue
                name, value, where = faulty[step]
                grads[name].view(-1)[int(where * grads[name].numel())] = value
            result = (update if sees_faults else nm.update)(params, grads, state, hyper, plan)
            assert bool(result.skipped) == (step in faulty)
            params, state = result.params, result.state
        ends.append({**params, **state})
    seen, never = ends
    in_a_row = next(k for k in range(200) if 199 - k not in faulty)
    assert counters(seen) == [200, 60, in_a_row] and counters(never) == [140, 0, 0]
    assert all(same_bits(seen[name], never[name]) for name in seen.keys() - set(COUNTERS))
    assert not same_bits(seen["square"], tensors()["square"])
