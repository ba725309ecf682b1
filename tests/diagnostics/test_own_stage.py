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


def by_svd(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    zero = (x == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(zero, 0.0, u @ v)


def raises_if(condition: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    def stage(x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and condition(x):
            raise torch.linalg.LinAlgError("no convergence")
        return norm_of(x)

    return stage


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
    "an SVD of NaN": (
        by_svd,
        ValueError,
        r"function: it raises LinAlgError for a matrix with a NaN in it: .*; the guard needs",
    ),
    "an SVD of zeros": (
        raises_if(lambda x: not bool(x.any())),
        ValueError,
        "it raises LinAlgError for matrices of zeros: no convergence",
    ),
    "an SVD of tiny numbers": (
        raises_if(lambda x: bool(x.any()) and bool(x.abs().max() < 1e-10)),
        ValueError,
        "it raises LinAlgError for 9e-19 times the same matrices: no convergence",
    ),
    "an SVD that always fails": (
        raises_if(lambda x: True),
        ValueError,
        r"function: it raises LinAlgError for \[3, 8, 12\] normal numbers: no convergence",
    ),
    "another error": (
        lambda x: x @ x,
        ValueError,
        r"function: it raises RuntimeError for \[3, 8, 12\] normal numbers: ",
    ),
    "one matrix alone": (
        raises_if(lambda x: len(x) == 1),
        ValueError,
        "it raises LinAlgError for one matrix of the stack alone",
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
