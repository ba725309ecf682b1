"""AdamW's moments that begin late are said, where the bias correction makes their updates large."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.optim.late_moments import largest_update

pytestmark = pytest.mark.usefixtures("eager")
OF_TORCH = (0.9, 0.999)


def trained(betas: tuple[float, float], steps: int = 400) -> tuple[nn.Module, nm.NorMuon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    optimizer = nm.NorMuon(model, lr=1e-3, adamw_betas=betas, routes={"0.weight": nm.Route()})
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()  # the bias: the same gradient at every step
    optimizer.step()


def said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "bias correction" in str(w.message)]


def test_an_unfrozen_parameter_is_said_once_and_moves_by_as_much_as_is_said() -> None:
    model, optimizer = trained(OF_TORCH)
    bias = model[1].bias.requires_grad_(True)
    moved, texts = [], []
    for _ in range(40):
        before = bias.detach().clone()
        texts += said(lambda: step(model, optimizer))
        moved.append(float((bias.detach() - before).abs().max()) / 1e-3)
    (text,) = texts
    expected = largest_update(OF_TORCH, 401)
    assert text.startswith("adamw_betas: the moments of 1.bias begin at step 401")
    assert f"up to {expected:.1f} times" in text and "write adamw_betas=(0.9, 0.95)" in text.lower()
    assert max(moved) == pytest.approx(expected, rel=1e-2)  # of 3.8, in float32


def test_a_group_that_is_added_and_a_state_that_is_left_out_are_said() -> None:
    one, new = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    adamw = {"*": nm.Route("adamw")}
    grown = nm.NorMuon([("one", one)], lr=1e-3, adamw_betas=OF_TORCH, routes=adamw)
    one.grad = new.grad = torch.ones(4)
    for _ in range(100):
        grown.step()
    grown.add_param_group({"params": [("new", new)], "routes": adamw})
    (text,) = said(grown.step)
    assert "the moments of new begin at step 101" in text
    model, optimizer = trained(OF_TORCH)
    saved = optimizer.state_dict()
    del saved["state"][saved["param_groups"][0]["param_names"].index("0.bias")]
    other = nm.NorMuon(model, lr=1e-3, adamw_betas=OF_TORCH, routes={"0.weight": nm.Route()})
    other.load_state_dict(saved)
    (text,) = said(lambda: step(model, other))
    assert "0.bias" in text and "1.weight" not in text


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.95, 0.95)])
def test_betas_that_do_no_harm_say_nothing(betas: tuple[float, float]) -> None:
    model, optimizer = trained(betas)
    model[1].bias.requires_grad_(True)
    assert said(lambda: step(model, optimizer)) == [] and largest_update(betas, 401) < 1.25


def test_a_new_run_says_nothing() -> None:
    assert said(lambda: trained(OF_TORCH, steps=3)) == []
    assert largest_update(OF_TORCH, 1) == pytest.approx(1)
