"""The step has a derivative by its rates; by everything else it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import normuon_fn as nm

SHAPES = {"w": (6, 10), "tall": (8, 4), "bias": (6,)}
CONFIGS = {
    "default": nm.Config(steps=2),
    "cautious": nm.Config(steps=2, weight_decay_form="cautious", weight_decay_lr_power=2),
    "masters": nm.Config(steps=2, master="fp32"),
    "guard": nm.Config(steps=2, guard="full"),
}
RATES = ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay")


class Problem:
    """A step in the middle of a run, in float64, so that finite differences are exact enough."""

    def __init__(self, config: nm.Config, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def random() -> dict[str, Tensor]:
            shapes = SHAPES.items()
            return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes}

        self.params, self.grads, self.weights = random(), random(), random()
        routes = {name: nm.Route("normuon", lr_mul=2.0, wd_mul=3.0) for name in ("w", "tall")}
        self.plan = nm.make_plan(self.params, config, routes={**routes, "bias": nm.Route("adamw")})
        self.state = nm.init(self.plan, self.params)
        rates = {"lr": 0.1, "weight_decay": 0.3, "adamw_lr": 0.05, "adamw_weight_decay": 0.2}
        self.hyper = nm.Hyper(*(x.to(dtype) for x in nm.Hyper.of(self.params, **rates)))

    def loss(self, run: Any, **given: Tensor) -> Tensor:
        hyper = self.hyper._replace(**{k: x for k, x in given.items() if k in nm.Hyper._fields})
        params = {**self.params, **{k: x for k, x in given.items() if k in self.params}}
        result = run(params, self.grads, self.state, hyper, self.plan)
        return sum((result.params[k].double() * self.weights[k].double()).sum() for k in SHAPES)  # type: ignore[return-value]

    def difference(self, name: str) -> Tensor:
        at, h = getattr(self.hyper, name), 1e-4
        up, down = (self.loss(nm.update, **{name: at + sign * h}) for sign in (1, -1))
        return (up - down) / (2 * h)


def by_func_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(f)(x)


def by_jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def by_dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


WAYS: dict[str, Callable[..., Any]] = {
    "grad": by_func_grad,
    "jvp": by_jvp,
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(x.expand(2))[0],
    "autograd": by_autograd,
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "dual numbers": by_dual_numbers,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", RATES)
def test_the_derivative_by_a_rate_is_that_of_finite_differences(name: str, config: str) -> None:
    given = Problem(CONFIGS[config])
    want = given.difference(name)
    got = by_func_grad(lambda x: given.loss(nm.update, **{name: x}), getattr(given.hyper, name))
    assert float(want.abs()) > 0.01
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_differentiating_gives_it(way: str) -> None:
    given = Problem(CONFIGS["default"])
    got = WAYS[way](lambda lr: given.loss(nm.update, lr=lr), given.hyper.lr)
    torch.testing.assert_close(got, given.difference("lr"), rtol=1e-6, atol=1e-6)


def test_the_second_derivative_is_exact_too() -> None:
    given = Problem(CONFIGS["default"])

    def by_decay(lr: Tensor) -> Tensor:
        decay = given.hyper.weight_decay
        return torch.func.grad(lambda x: given.loss(nm.update, lr=lr, weight_decay=x))(decay)

    muls = 2.0 * 3.0
    want = -muls * sum((given.params[k] * given.weights[k]).sum() for k in ("w", "tall"))
    torch.testing.assert_close(torch.func.grad(by_decay)(given.hyper.lr), want)


@pytest.mark.usefixtures("without_inductor")
def test_the_compiled_step_and_a_graph_of_the_callers_have_it_too() -> None:
    given = Problem(CONFIGS["default"])
    want = given.difference("lr")
    assert torch.equal(
        by_autograd(lambda lr: given.loss(nm.step, lr=lr), given.hyper.lr),
        by_func_grad(lambda lr: given.loss(nm.step, lr=lr), given.hyper.lr),
    )
    own = torch.compile(given.loss, backend="aot_eager", fullgraph=True)
    got = by_autograd(lambda lr: own(nm.update, lr=lr), given.hyper.lr)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_values_are_those_of_the_step_without_a_derivative() -> None:
    given = Problem(CONFIGS["masters"], torch.bfloat16)
    given.hyper = nm.Hyper(*(x.float() for x in given.hyper))
    want = nm.update(given.params, given.grads, given.state, given.hyper, given.plan)
    lr = given.hyper.lr.clone().requires_grad_()
    hyper = given.hyper._replace(lr=lr)
    got = nm.update(given.params, given.grads, given.state, hyper, given.plan)
    assert all(torch.equal(got.params[k], x) for k, x in want.params.items())
    assert all(torch.equal(got.state[k], x) for k, x in want.state.items())
    assert got.state["w.master"].requires_grad and not got.state["w.momentum"].requires_grad


def test_a_step_that_the_guard_skips_has_the_derivative_zero() -> None:
    given = Problem(CONFIGS["guard"])
    given.grads["w"][0, 0] = float("nan")
    for name in RATES:
        f = lambda x, name=name: given.loss(nm.update, **{name: x})  # noqa: E731
        assert float(by_func_grad(f, getattr(given.hyper, name))) == 0.0


@pytest.mark.parametrize("name", ["w", "momentum", "beta2", "adamw_beta1", "adamw_eps"])
@pytest.mark.parametrize("way", WAYS)
def test_a_derivative_by_anything_else_is_refused_by_name(name: str, way: str) -> None:
    """All but leaves of autograd among the parameters, as every model's are."""
    given = Problem(CONFIGS["default"])
    if name == "w" and way in ("autograd", "functional.jacobian", "vmap of grad"):
        return
    x = given.params[name] if name == "w" else getattr(given.hyper, name)
    with pytest.raises(ValueError, match=rf"{name}.*: torch is to differentiate by it.*detach\(\)"):
        WAYS[way](lambda x: given.loss(nm.update, **{name: x}), x)


@pytest.mark.parametrize(
    ("function", "what"),
    [(nm.update, "params"), (nm.update, "grads"), (nm.update, "state"), (nm.step, "grads"),
     (nm.step_, "params")],
)  # fmt: skip
@pytest.mark.usefixtures("without_inductor")
def test_what_autograd_has_recorded_is_refused_by_name(function: Any, what: str) -> None:
    given = Problem(CONFIGS["default"])
    tensors = {"params": given.params, "grads": given.grads, "state": given.state}
    key = "w.momentum" if what == "state" else "w"
    tensors[what] = {**tensors[what], key: tensors[what][key].clone().requires_grad_() * 1.0}
    before = {k: x.detach().clone() for k, x in {**given.state, **given.params}.items()}
    with pytest.raises(ValueError, match=rf"{what}\['{key}'\]: torch is to differentiate"):
        function(*tensors.values(), given.hyper, given.plan)
    now = {**given.state, **given.params}
    assert all(torch.equal(x, before[k]) for k, x in now.items())
    with torch.no_grad():  # nobody is to differentiate
        nm.update(*tensors.values(), given.hyper, given.plan)


@pytest.mark.usefixtures("without_inductor")
def test_steps_in_place_have_no_derivative_and_say_so() -> None:
    given = Problem(CONFIGS["default"], torch.float32)
    lr = given.hyper.lr.clone().requires_grad_()
    before = given.params["w"].clone()
    with pytest.raises(ValueError, match=r"hyper.lr: .* in place and have none; write step or"):
        given.loss(nm.step_, lr=lr)
    for compiled in (True, False):
        with pytest.raises(ValueError, match=r"hyper.lr: .* in place and have none"):
            nm.foreach_step_(
                [given.params["w"]], [given.grads["w"]], [torch.zeros(6, 10)], [torch.zeros(6, 1)],
                lr=lr, momentum=0.9, beta2=0.9, weight_decay=0.0, compiled=compiled,
            )  # fmt: skip
    assert torch.equal(given.params["w"], before)


def test_a_models_own_parameters_are_no_question() -> None:
    given = Problem(CONFIGS["default"])
    params = {name: torch.nn.Parameter(x) for name, x in given.params.items()}
    result = nm.update(params, given.grads, given.state, given.hyper, given.plan)
    assert not result.params["w"].requires_grad
