"""Parameters of no layer, and parameters behind a parametrization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normuon_fn as nm

D = 32


class Raw(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, D), nn.Linear(D, 5)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize(
    "name",
    ["log_A", "A_log", "log_decay", "decay_log", "memory", "memories", "slots", "slot_memory"],
)
def test_logarithms_and_tables_of_vectors_get_adamw(name: str) -> None:
    table = nm.routes_for(Raw(**{name: (7, D)}))
    assert table[name] == nm.Route("adamw") and table.unsure() == {}
    plan = nm.make_plan(dict(Raw(**{name: (7, D)}).named_parameters()))
    assert next(p.route for p in plan.parameters if p.name == name) == nm.Route("adamw")


@pytest.mark.parametrize("name", ["theta", "amplitudes", "state", "centers", "couplings"])
def test_a_matrix_whose_name_says_nothing_is_taken_for_one_and_said_once(name: str) -> None:
    with pytest.warns(UserWarning, match=f'otherwise "{name}": nm.Route\\("adamw"\\)') as seen:
        plan = nm.make_plan(Raw(**{name: (D, D)}))
    assert len(seen) == 1
    assert next(p.route for p in plan.parameters if p.name == name) == nm.Route()


@pytest.mark.parametrize("name", ["w", "U", "W1", "w_in", "in_proj_weight", "kernel", "out_proj"])
def test_a_matrix_that_is_named_as_one_is_taken_without_a_word(name: str) -> None:
    table = nm.routes_for(Raw(**{name: (D, D)}))
    assert table[name].algorithm == "normuon" and table.unsure() == {}


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def net(layer: nn.Module) -> nn.Module:
    model = Raw()
    model.layer = layer
    model.head = nn.Linear(D, 5)
    return model


ORIGINAL = "layer.parametrizations.weight.original"


@pytest.mark.parametrize("how", ["matrix_exp", "cayley", "householder"])
def test_of_an_orthogonal_parametrization_the_triangle_gets_adamw(how: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map=how)
    table = nm.routes_for(net(layer))
    entry = table.entries[ORIGINAL]
    assert entry.route == nm.Route("adamw") and "lower triangle alone" in entry.reason
    assert table.unsure() == {}


def test_an_orthogonal_convolution_gets_adamw_too() -> None:
    layer = parametrizations.orthogonal(nn.Conv1d(D, D, 1))
    assert nm.routes_for(net(layer))[ORIGINAL] == nm.Route("adamw")


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_the_original_of_a_norm_is_a_matrix_without_a_word(norm: object) -> None:
    model = net(norm(nn.Linear(D, D)))  # type: ignore[operator]
    table = nm.routes_for(model)
    matrices = [name for name, route in table.items() if "layer" in name and route == nm.Route()]
    assert len(matrices) == 1 and table.unsure() == {}


def test_a_parametrization_of_ones_own_is_said_once() -> None:
    layer = nn.Linear(D, D)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    found = nm.routes_for(net(layer)).unsure()
    assert list(found) == [ORIGINAL]
    assert found[ORIGINAL].reason.endswith("behind a parametrization (Symmetric)")
    with pytest.warns(UserWarning, match="behind a parametrization"):
        nm.make_plan(net(layer))


def test_names_alone_say_that_a_parametrization_stands_before_a_matrix() -> None:
    layer = parametrizations.orthogonal(nn.Linear(D, D))
    with pytest.warns(UserWarning, match="behind a parametrization") as seen:
        nm.make_plan(dict(net(layer).named_parameters()))
    assert len(seen) == 1 and f'"{ORIGINAL}": nm.Route("adamw")' in str(seen[0].message)
    norm = parametrizations.weight_norm(nn.Linear(D, D))
    nm.make_plan(dict(net(norm).named_parameters()))
