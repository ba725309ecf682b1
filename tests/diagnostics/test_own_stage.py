"""`check_stage` takes what the step can use, and names what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm


def norm_of(x: Tensor) -> Tensor:
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    return x / torch.where(norm == 0, 1.0, norm)


def good(x: Tensor) -> Tensor:
    x = norm_of(x)
    for _ in range(8):
        x = 1.5 * x - 0.5 * torch.bmm(torch.bmm(x, x.mT), x)
    return x


def writes(x: Tensor) -> Tensor:
    x *= 2.0
    return norm_of(x)


def waits(x: Tensor) -> Tensor:
    return norm_of(x) * (1.0 if x.sum().item() > 0 else -1.0)


calls = [0]


def with_state(x: Tensor) -> Tensor:
    calls[0] += 1
    return norm_of(x) * calls[0]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no function": (3, TypeError, "expected a callable, got 3"),
    "no tensor": (lambda x: None, TypeError, "floating-point tensor, got NoneType"),
    "integers": (lambda x: x.long(), TypeError, "floating-point tensor, got torch.int64"),
    "another shape": (lambda x: x.mT, ValueError, r"got \(3, 12, 8\)"),
    "in place": (writes, ValueError, "writes into the stack"),
    "a host sync": (waits, TypeError, "cannot be traced.*leave out .item"),
    "a state": (with_state, ValueError, "something else the next time"),
    "an eps": (
        lambda x: x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7),
        ValueError,
        "depends on the size of the gradient: with 9e-19.*without an eps",
    ),
    "one norm for all": (
        lambda x: norm_of(x) * norm_of(x).abs().amax(),
        ValueError,
        "depends on the others",
    ),
    "zeros": (
        lambda x: norm_of(x) / norm_of(x).abs().amax((-2, -1), keepdim=True),
        ValueError,
        "NaN of a matrix of zeros",
    ),
    "a hidden NaN": (lambda x: norm_of(x).nan_to_num(), ValueError, "hides a NaN"),
}


def test_a_function_that_can_be_a_stage_passes_and_is_traced_into_the_step() -> None:
    nm.check_stage(good)
    nm.check_stage(good, rows=1, cols=1)
    params = {"w": torch.randn(6, 9)}
    plan = nm.make_plan(params, nm.Config(orthogonalizer=good), routes={"w": nm.Route()})
    hyper, grads = nm.Hyper.of(params, lr=0.02), {"w": torch.randn(6, 9)}
    assert nm.update(params, grads, nm.init(plan, params), hyper, plan).params["w"].isfinite().all()


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_stage_is_named(case: str) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        nm.check_stage(function)


def test_every_fault_is_named_at_once() -> None:
    bad: Callable[[Tensor], Tensor] = lambda x: x.nan_to_num() * x.nan_to_num().amax()  # noqa: E731
    with pytest.raises(ValueError, match=r"size of the gradient.*others of the stack.*hides a NaN"):
        nm.check_stage(bad)


def test_rows_and_cols_are_those_of_a_stack() -> None:
    with pytest.raises(ValueError, match="1 <= rows <= cols, got 5 and 4"):
        nm.check_stage(good, rows=5, cols=4)
