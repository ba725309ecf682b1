"""`put_state_`: a flat state, as `convert_state` makes it, in an optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.step import local_update_
from tests import guides
from tests.planning.test_front_door import Small

STEPS = 3


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randint(40, (8,), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().mean().backward()


def split(model: nn.Module, *, named: bool = False) -> list[dict[str, Any]]:
    """One group for each layer, in another order than the model's, and its vectors apart."""
    pairs = [*model.named_parameters()][::-1]
    of = [[(n, p) for n, p in pairs if (p.ndim > 1) == on] for on in (True, False)]
    return [{"params": group if named else [p for _, p in group]} for group in of]


def trained() -> tuple[Small, dict[str, Tensor]]:
    """A model, and the flat state of a loop that trained it."""
    model = small()
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = nm.make_plan(model)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    for k in range(STEPS):
        backward(model, k)
        grads = {name: p.grad for name, p in model.named_parameters()}
        local_update_(params, grads, state, hyper, plan)
    return model, state


MADE: dict[str, Any] = {
    "model": lambda model: nm.NorMuon(model, lr=0.02),
    "named groups": lambda m: nm.NorMuon(split(m, named=True), lr=0.02, routes=nm.routes_for(m)),
    "groups": lambda model: nm.NorMuon(split(model), lr=0.02, routes=nm.routes_for(model)),
    "other names": lambda model: nm.NorMuon(
        [(f"module.{n}", p) for n, p in model.named_parameters()],
        lr=0.02,
        routes=nm.routes_for(model),
    ),
}


@pytest.mark.parametrize("how", MADE)
def test_an_optimizer_goes_on_from_a_flat_state_whatever_its_groups_are(
    eager: None, how: str
) -> None:
    model, state = trained()
    other = copy.deepcopy(model)
    expected = nm.NorMuon(other, lr=0.02)
    for name, p in other.named_parameters():
        for kind in expected.state[p]:
            own = f"{name}.{kind}"
            expected.state[p][kind] = state[own if own in state else f"guard.{kind}"].clone()
    optimizer = MADE[how](model)
    kept = {key: x.clone() for key, x in state.items()}
    assert nm.put_state_(optimizer, state, model) is None  # type: ignore[func-returns-value]
    for k in range(STEPS):
        for net, each in ((model, optimizer), (other, expected)):
            backward(net, STEPS + k)
            each.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert int(optimizer.state[model.first.weight]["step"]) == 2 * STEPS
    assert all(torch.equal(x, state[key]) for key, x in kept.items())  # it was copied


@pytest.mark.parametrize("given", ["nothing", "named", "dict", "wrapped", "sides swapped"])
def test_params_may_be_what_names_in_takes_or_left_out(given: str) -> None:
    model, state = trained()
    optimizer = nm.NorMuon(model)
    if given == "sides swapped":
        state = {k if k.startswith("guard.") else f"module.{k}": x for k, x in state.items()}
    params: Any = {
        "nothing": None,
        "named": model.named_parameters(),
        "dict": dict(model.named_parameters()),
        "wrapped": nn.ModuleDict({"module": model}),
        "sides swapped": model,
    }[given]
    nm.put_state_(optimizer, state, params)
    prefix = "module." if given == "sides swapped" else ""
    momentum = optimizer.state[model.second.weight]["momentum"]
    assert torch.equal(momentum, state[f"{prefix}second.weight.momentum"]) and momentum.any()


def test_each_of_two_optimizers_takes_its_part_and_frozen_parameters_none() -> None:
    model, state = trained()
    model.third.requires_grad_(False)
    table = nm.routes_for(model)
    one = nm.NorMuon(list(model.second.parameters()), routes=table)
    rest = nm.NorMuon(
        [*model.first.parameters(), *model.third.parameters(), *model.fourth.parameters()],
        routes=table,
    )
    state = {key: x for key, x in state.items() if "third" not in key}
    for optimizer in (one, rest):
        nm.put_state_(optimizer, state, model)
    assert torch.equal(one.state[model.second.weight]["momentum"], state["second.weight.momentum"])
    assert int(rest.state[model.first.weight]["step"]) == STEPS
    assert model.third.weight not in rest.state


def without(state: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if not any(word in key for word in words)}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a state_dict": (lambda s, o: o.state_dict(), ValueError, "load_state_dict"),
    "a list": (lambda s, o: [*s.values()], TypeError, "expected the flat state of a plan"),
    "no counters": (lambda s, o: without(s, "guard"), ValueError, r"'guard.step'"),
    "a parameter less": (lambda s, o: without(s, "second.weight"), ValueError, "second.weight"),
    "a kind less": (lambda s, o: without(s, "third.weight.variance"), ValueError, "third.weight"),
    "a stranger": (lambda s, o: s | {"fifth.momentum": torch.ones(2)}, ValueError, "fifth"),
    "another shape": (
        lambda s, o: s | {"first.weight.exp_avg": torch.ones(2)}, ValueError, "first.weight",
    ),
    "another rule": (
        lambda s, o: without(s, "second.weight")
        | {f"second.weight.{kind}": torch.ones(16, 16) for kind in ("exp_avg", "exp_avg_sq")},
        ValueError, r"second.weight",
    ),
    "no tensor": (lambda s, o: s | {"first.weight.exp_avg": 3}, ValueError, "first.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case: str) -> None:
    make, error, text = BAD[case]
    model, state = trained()
    optimizer = nm.NorMuon(split(model), routes=nm.routes_for(model))
    given = make(state, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(error, match=text):
        nm.put_state_(optimizer, given, model)
    after = optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for k, kinds in before.items():
        assert kinds.keys() == after[k].keys()
        assert all(torch.equal(x, after[k][kind]) for kind, x in kinds.items())


def test_a_parameter_that_is_not_in_params_and_another_optimizer_are_refused() -> None:
    model, state = trained()
    with pytest.raises(ValueError, match=r"params.*of shapes \[\(40, 16\)"):
        nm.put_state_(nm.NorMuon(model), state, model.second)
    with pytest.raises(TypeError, match="expected a NorMuon, got a AdamW"):
        nm.put_state_(torch.optim.AdamW(model.parameters()), state, model)


def test_a_momentum_of_floats_becomes_one_of_codes() -> None:
    model, state = trained()
    optimizer = nm.NorMuon(model, config=nm.Config(momentum_dtype=torch.int8))
    nm.put_state_(optimizer, state, model)
    assert optimizer.state[model.second.weight]["momentum"].dtype == torch.int8
    assert optimizer.state[model.second.weight]["momentum"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lines_of_the_guide_make_an_adamw_go_on_as_normuons_adamw_does(
    eager: None, dtype: torch.dtype
) -> None:
    model = small().to(dtype)
    model.first.to(torch.float32)  # where a step is larger than a rounding
    optimizer = nm.NorMuon(model, lr=3e-3, weight_decay=0.1, adamw_betas=(0.9, 0.95))

    def gradients(net: nn.Module, k: int) -> None:
        for p in net.parameters():
            seeded = torch.Generator().manual_seed(k + p.numel())
            p.grad = torch.randn(p.shape, generator=seeded).to(p.dtype)

    for k in range(STEPS):
        gradients(model, k)
        optimizer.step()
    lines = guides.block_with("moving-a-run.md", "adamw.state[p]").partition("assert")[0]
    other, expected = copy.deepcopy((model, optimizer))
    scope: dict[str, Any] = {"torch": torch, "model": model, "optimizer": optimizer}
    exec(lines, scope)
    for k in range(STEPS, 2 * STEPS):
        gradients(model, k)
        gradients(other, k)
        scope["adamw"].step()
        expected.step()
    close = {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float32 else 0.02}
    torch.testing.assert_close(model.first.weight, other.first.weight, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(model.fourth.weight, other.fourth.weight, **close)
    assert not torch.equal(model.second.weight, small().to(dtype).second.weight)
    assert int(scope["adamw"].state[model.first.weight]["step"]) == 2 * STEPS
    assert int(scope["adamw"].state[model.second.weight]["step"]) == STEPS
