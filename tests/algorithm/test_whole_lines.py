"""Matrices whose rows are no whole cache lines are iterated on with zeros around them.

On CUDA the plan chooses that; here the form is said.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.algorithm.coefficients import gram_restarts, resolve
from normuon_fn.algorithm.orthogonalize import LINE, Form, in_whole_lines, iterate
from normuon_fn.planning import make_plan
from tests.inputs import METHODS, gaussian

SHAPES = [(64, 128), (72, 128), (64, 130), (70, 133), (1, 65), (127, 128)]


def iterated(x: Tensor, name: str, method: Any, products: Any, steps: int = 5) -> Tensor:
    chosen = resolve(name, steps, None)
    restarts = gram_restarts(chosen.rows) if method == "gram" else ()
    return iterate(x, chosen, Form(method, x.dtype, restarts, products))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_are_added_up_to_whole_lines_and_only_there(shape: tuple[int, int]) -> None:
    x = gaussian(2, *shape)
    got = in_whole_lines(x)
    assert all(size % LINE == 0 for size in got.shape[1:])
    assert all(0 <= a - b < LINE for a, b in zip(got.shape[1:], shape, strict=True))
    assert torch.equal(got[:, : shape[0], : shape[1]], x)
    assert got.square().sum() == pytest.approx(x.square().sum())
    assert (got is x) == all(size % LINE == 0 for size in shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["polar_express", "quintic", "aol", "cans"])
def test_they_change_no_result(name: str, method: str, shape: tuple[int, int]) -> None:
    x = gaussian(3, *shape).double()
    x = x / x.norm(dim=(-2, -1), keepdim=True) / 1.02
    steps = 4 if name == "aol" else 5
    want = iterated(x, name, method, "library", steps)
    got = iterated(x, name, method, "symmetric", steps)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # observed: 3e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_stays_in_its_matrix_and_is_seen_in_all_of_it(bad: float, method: str) -> None:
    x = gaussian(3, 70, 133) / 100
    x[1, 69, 132] = bad
    got = iterated(x, "polar_express", method, "symmetric")
    assert not got[1].isfinite().any()
    assert got[::2].isfinite().all()


@pytest.mark.parametrize("where", ["here", "in a graph"])
@pytest.mark.parametrize("master", ["none", "fp32"])
def test_a_step_is_the_same(
    where: str, master: Literal["none", "fp32"], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make_plan.choose

    def symmetric(*given: Any) -> Form:
        return real(*given)._replace(products="symmetric")

    shapes = {"wide": (72, 133), "tall": (133, 72), "square": (70, 70), "stack": (3, 66, 80)}
    params = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    if master != "none":
        params = {name: p.bfloat16() for name, p in params.items()}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    config = nm.Config(guard="full", metrics=True, master=master)
    run = nm.update if where == "here" else nm.step

    def after_two_steps() -> nm.StepResult:
        plan = nm.make_plan(params, config, routes={"*": nm.Route("normuon")})
        hyper = nm.Hyper.of(params, lr=0.1)
        first = run(params, grads, nm.init(params, plan), hyper, plan)
        return run(first.params, grads, first.state, hyper, plan)

    want = after_two_steps()
    monkeypatch.setattr(make_plan, "choose", symmetric)
    got = after_two_steps()
    assert not got.skipped
    for name, x in {**want.params, **want.state}.items():
        found = {**got.params, **got.state}[name]
        close = 2e-2 if x.dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found, x, rtol=close, atol=close, msg=name)
