"""What a user's own orthogonalizer reads is read at every step, although the step is a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm

SCALE = 1.0  # a global that a test changes
Change = Callable[[Any], None]
pytestmark = pytest.mark.usefixtures("without_inductor")


class Scales:
    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, stack: Tensor) -> Tensor:
        return stack * self.scale


class ScalesAsModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, stack: Tensor) -> Tensor:
        return stack * self.scale


def a_closure() -> tuple[Any, Callable[[], None]]:
    scale = 1.0

    def own(stack: Tensor) -> Tensor:
        return stack * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return own, change


def a_tensor_in_a_closure() -> tuple[Any, Callable[[], None]]:
    scale = torch.ones(())
    return lambda stack: stack * scale, lambda: scale.fill_(3.0)  # type: ignore[return-value]


def a_list_in_a_closure() -> tuple[Any, Callable[[], None]]:
    scales = [1.0]
    return lambda stack: stack * scales[0], lambda: scales.__setitem__(0, 3.0)


def an_attribute() -> tuple[Any, Callable[[], None]]:
    own = Scales()
    return own, lambda: setattr(own, "scale", 3.0)


def an_attribute_of_a_module() -> tuple[Any, Callable[[], None]]:
    own = ScalesAsModule()
    return own, lambda: setattr(own, "scale", 3.0)


def an_attribute_of_a_method() -> tuple[Any, Callable[[], None]]:
    own = ScalesAsModule()
    return own.forward, lambda: setattr(own, "scale", 3.0)


def a_default() -> tuple[Any, Callable[[], None]]:
    def own(stack: Tensor, scale: float = 1.0) -> Tensor:
        return stack * scale

    return own, lambda: setattr(own, "__defaults__", (3.0,))


def a_partial() -> tuple[Any, Callable[[], None]]:
    scales = {"scale": 1.0}

    def own(stack: Tensor, scales: dict[str, float]) -> Tensor:
        return stack * scales["scale"]

    return functools.partial(own, scales=scales), lambda: scales.update(scale=3.0)


def a_global() -> tuple[Any, Callable[[], None]]:
    globals()["SCALE"] = 1.0
    return lambda stack: stack * SCALE, lambda: globals().update(SCALE=3.0)


@pytest.mark.parametrize(
    "made",
    [
        a_closure, a_tensor_in_a_closure, a_list_in_a_closure, an_attribute,
        an_attribute_of_a_module, an_attribute_of_a_method, a_default, a_partial, a_global,
    ],
)  # fmt: skip
def test_a_change_is_seen_by_the_next_step(made: Any) -> None:
    if made is a_default and torch.__version__ < (2, 13):  # type: ignore[operator]
        pytest.skip("this dynamo has no guard on defaults")
    own, change = made()
    params, grads = {"w": torch.ones(4, 6)}, {"w": torch.arange(24.0).reshape(4, 6)}
    config = nm.Config(orthogonalizer=own, normalize=False, scale="none")
    plan = nm.make_plan(params, config, routes={"w": nm.Route("normuon")})
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)

    def moved() -> Tensor:
        return params["w"] - nm.step(params, grads, state, hyper, plan).params["w"]

    first = moved()
    change()
    torch.testing.assert_close(moved(), 3.0 * first)
    torch.testing.assert_close(
        moved(), params["w"] - nm.update(params, grads, state, hyper, plan).params["w"]
    )
