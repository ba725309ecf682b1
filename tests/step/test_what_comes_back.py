"""What a pure step returns: new tensors laid out as the old, or the old ones themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.step import local_update_

Tensors = dict[str, Tensor]
STEPS: list[Callable[..., nm.StepResult]] = [nm.update, nm.step]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("step", STEPS)
def test_what_a_step_does_not_update_comes_back_as_the_tensor_that_was_given(step: Any) -> None:
    """As documented: no step copies a frozen model."""
    params = {name: torch.randn(8, 12) for name in ("w", "none", "frozen", "adam")}
    routes = {"frozen": nm.Route("frozen"), "adam": nm.Route("adamw"), "*": nm.Route()}
    plan = nm.make_plan(params, routes=routes)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)
    grads: dict[str, Tensor | None] = {name: torch.ones(8, 12) for name in params}
    grads |= {"none": None, "adam": None, "frozen": None}
    result = step(params, grads, state, hyper, plan)
    same = {name for name, x in {**result.params, **result.state}.items()
            if x is {**params, **state}[name]}  # fmt: skip
    assert same == {
        "none", "none.momentum", "none.variance", "frozen", "adam", "adam.exp_avg",
        "adam.exp_avg_sq",
    }  # fmt: skip
    for name, x in {**result.params, **result.state}.items():  # nothing else shares memory
        assert name in same or x.data_ptr() != {**params, **state}[name].data_ptr()


def laid_out(kind: str, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "transposed":
        return x.mT.contiguous().mT
    return x.to(memory_format=torch.channels_last)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("kind", "shape", "route"),
    [
        ("transposed", (8, 12), nm.Route()),
        ("transposed", (12, 8), nm.Route()),
        ("transposed", (3, 8, 12), nm.Route()),
        ("transposed", (8, 12), nm.Route("adamw")),
        ("channels_last", (6, 4, 3, 3), nm.Route("adamw")),
    ],
)
def test_results_have_the_strides_of_what_was_given_and_meet_the_same_graph(
    kind: str, shape: tuple[int, ...], route: nm.Route, step: Any
) -> None:
    params: Tensors = {"w": laid_out(kind, shape)}
    plain = {"w": params["w"].contiguous()}
    found = []
    for given in (params, plain):
        plan = nm.make_plan(given, nm.Config(method="standard"), routes={"w": route})
        state: Any = nm.init(plan, given)
        now, hyper = given, nm.Hyper.of(given, lr=0.1)
        strides = now["w"].stride(), [x.stride() for x in state.values()]
        torch._dynamo.utils.counters.clear()
        for k in range(3):
            grads = {"w": torch.full_like(now["w"], k + 1.0) + now["w"]}
            now, state, *_ = step(now, grads, state, hyper, plan)
            assert (now["w"].stride(), [x.stride() for x in state.values()]) == strides
        if step is nm.step:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        found.append(now["w"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", ["stochastic", "none"])
@pytest.mark.parametrize("fault", ["gradient", "found_inf"])
def test_a_run_whose_bad_batch_was_skipped_has_the_bits_of_one_that_never_saw_it(
    kind: Any, fault: str
) -> None:
    shapes = {"w": (8, 12), "b": (12,)}
    ends = []
    for bad in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = {k: torch.randn(s, generator=generator).bfloat16() for k, s in shapes.items()}
        plan = nm.make_plan(params, nm.Config(guard="full", master=kind))
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=1e-3)
        for k in range(4):
            draw = torch.Generator().manual_seed(k)
            grads = {n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}
            if k == 1 and not bad:
                continue
            found_inf = torch.tensor(float(k == 1)) if fault == "found_inf" else None
            if k == 1 and fault == "gradient":
                grads["w"][0, 0] = torch.nan
            local_update_(params, grads, state, hyper, plan, found_inf=found_inf)
        assert int(state["guard.skipped"]) == bad
        ends.append({**params, **{n: x for n, x in state.items() if "guard" not in n}})
    assert all(torch.equal(x, ends[1][n]) for n, x in ends[0].items())
