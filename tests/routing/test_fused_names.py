"""Fused projections from names alone: left whole, and said once with the route that splits them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm

D = 32
# A name, a shape, and the line of the one warning.
FUSED: dict[str, tuple[tuple[int, ...], str]] = {
    "blocks.0.attn.qkv.weight": ((3 * D, D), "splits=(32, 32, 32)"),
    "blocks.0.attn.in_proj_weight": ((3 * D, D), "splits=(32, 32, 32)"),
    "blocks.0.attn.Wqkv.weight": ((D + 16, D), "splits=(32, 8, 8)"),
    "h.0.attn.c_attn.weight": ((D, 3 * D), "splits=(32, 32, 32), dim=1, transposed=True"),
    "blocks.0.attn.query_key_value.weight": ((3 * D, D), "splits=(32, 32, 32)"),
    "blocks.0.attn.in_proj.weight": ((3 * D, D), "splits=(32, 32, 32)"),
    "blocks.0.attn.to_kv.weight": ((2 * D, D), "splits=(32, 32)"),
    "blocks.0.mlp.gate_up_proj.weight": ((8 * D, D), "splits=(128, 128)"),
    "mid.attn.qkv.weight": ((3 * D, D, 1, 1), "flatten=True, splits=(32, 32, 32)"),
    "mid.attn.to_qkv.weight": ((3 * D, D, 1), "flatten=True, splits=(32, 32, 32)"),
}
BESIDE = {"blocks.0.attn.proj.weight": (D, D), "blocks.0.fc.weight": (4 * D, D)}


def said(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    assert all(each.filename == __file__ for each in seen)
    return [str(each.message) for each in seen]


def params(name: str) -> dict[str, nn.Parameter]:
    shapes = {name: FUSED[name][0], **BESIDE}
    return {key: nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", FUSED)
def test_one_warning_has_the_route_that_splits_it_and_that_route_is_taken(name: str) -> None:
    given, line = params(name), FUSED[name][1]
    (text,) = said(lambda: nm.make_plan(given))
    assert "left whole" in text and f'otherwise "{name}": nm.Route({line})' in text
    assert text.count("nm.Route(") == 1
    route = eval(f"nm.Route({line})", {"nm": nm})
    plans: list[nm.Plan] = []
    assert said(lambda: plans.append(nm.make_plan(given, routes={name: route}))) == []
    found = next(p for p in plans[0].parameters if p.name == name)
    assert len(found.blocks) == len(route.splits)
    assert said(lambda: nm.make_plan(given, routes={name: nm.Route()})) == [] or "mid" in name


@pytest.mark.parametrize(
    "groups",
    [
        lambda given: list(given.items()),
        lambda given: [{"params": list(given.items())}],
        lambda given: [{"params": list(given.items()), "algorithm": "normuon"}],
    ],
)
def test_an_optimizer_says_it_of_named_parameters_and_of_named_groups(groups: Any) -> None:
    given = params("blocks.0.attn.qkv.weight")
    (text,) = said(lambda: nm.NorMuon(groups(given), lr=0.01))
    assert "nm.Route(splits=(32, 32, 32))" in text


def test_layers_that_are_alike_are_said_in_one_line() -> None:
    given = {f"blocks.{k}.attn.qkv.weight": torch.randn(3 * D, D) for k in range(4)}
    (text,) = said(lambda: nm.make_plan(given))
    assert "(4 parameters)" in text and text.count("nm.Route(") == 1


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_the_gates_of_a_recurrent_cell_are_said_too(cell: Any, gates: int) -> None:
    module = nn.ModuleDict({"rnn": cell(8, 16), "head": nn.Linear(16, 5)})
    texts = said(lambda: nm.make_plan(dict(module.named_parameters())))
    assert len(texts) == (gates > 1)
    assert all(text.count(f"nm.Route(splits={(16,) * gates})") == 2 for text in texts)


def test_what_is_no_fused_projection_is_taken_without_a_word() -> None:
    given = {
        "blocks.0.attn.q_proj.weight": torch.randn(D, D),
        "blocks.0.attn.kv_norm.weight": torch.randn(D),
        "blocks.0.mamba.in_proj.weight": torch.randn(5 * D, D),
        "blocks.0.mlp.up_proj.weight": torch.randn(4 * D, D),
    }
    assert said(lambda: nm.make_plan(given)) == []


def test_a_model_that_is_read_needs_no_word() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.proj = 2, nn.Linear(D, 3 * D), nn.Linear(D, D)

    model = nn.ModuleDict({"attn": Attention(), "head": nn.Linear(D, 5)})
    assert said(lambda: nm.make_plan(model)) == []
