"""`routes_for`: frozen, parametrized, scripted and exported modules, and misleading names."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.routing.test_routes_for import named


@pytest.mark.parametrize("merged", [False, True])
def test_the_optimizer_trains_what_is_unfrozen_after_routes_for(
    merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = importlib.import_module("normuon_fn.step").local_update_
    monkeypatch.setattr(importlib.import_module("normuon_fn.optim.normuon"), "step_", eager)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    table = nm.routes_for(model, {"1.bias": nm.Route("frozen")}, decay_vectors=False)
    assert {name for name, route in table.items() if route == nm.Route("frozen")} == set(table) - {
        "1.weight"
    }
    assert table.entries["0.weight"].reason == "requires_grad=False"
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.1, routes={**table} if merged else table)
    for frozen in (True, False):
        model.requires_grad_(not frozen)
        model[1].weight.requires_grad_()
        before = named(model)
        (model[1](model[0](model[2](torch.arange(5))))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == ({"1.weight"} if frozen else set(table) - {"1.bias"})
    assert optimizer.plan is not None
    assert {p.name: p.route for p in optimizer.plan.parameters} == {
        "0.weight": nm.Route(), "0.bias": nm.Route("adamw", wd_mul=0.0), "1.weight": nm.Route(),
        "1.bias": nm.Route("frozen"), "2.weight": nm.Route("adamw"),
    }  # fmt: skip


def test_a_plan_freezes_what_needed_no_gradient_unless_the_tensor_requires_one_by_now() -> None:
    model = nn.Sequential(nn.LSTM(4, 4)).requires_grad_(False)
    table = nm.routes_for(model)
    assert {
        p.route.algorithm
        for p in nm.make_plan(dict(model.named_parameters()), routes=table).parameters
    } == {"frozen"}
    model.requires_grad_()
    assert {p.route.algorithm for p in nm.make_plan(named(model), routes=table).parameters} == {
        "frozen"
    }  # detached: unknown
    plan = nm.make_plan(dict(model.named_parameters()), routes=table)
    assert {p.name: p.route for p in plan.parameters} == dict(nm.routes_for(model))
    assert all(
        p.route.unfrozen is None for p in plan.parameters
    ) and "requires a gradient by now" in str(plan)


def test_a_parametrized_recurrent_weight_is_split_into_its_gates() -> None:
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(6, 4), "weight_hh_l0")
    route = nm.routes_for(nn.ModuleDict({"rnn": lstm}))[
        "rnn.parametrizations.weight_hh_l0.original1"
    ]
    assert route == nm.Route(splits=(4, 4, 4, 4))


class Block(nn.Module):
    """A block as people write it, with layers whose names a head of the model could have too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.fc(x)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_of_blocks_that_are_plain_attributes_are_no_heads(wrapped: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2, self.fc = Block(), Block(), nn.Linear(8, 4)

    model = (
        nn.ModuleDict({"module": nn.ModuleDict({"model": Model()})})["module"]
        if wrapped
        else Model()
    )
    table = nm.routes_for(model)
    prefix = "model." if wrapped else ""
    assert {e.name for e in table.entries.values() if "head" in e.reason} == {f"{prefix}fc.weight"}
    assert table[f"{prefix}layer1.fc.weight"] == table[f"{prefix}layer2.out.weight"] == nm.Route()


def test_a_norm_is_told_by_what_it_is_and_not_by_a_part_of_a_name() -> None:
    class NormalizedLinear(nn.Linear): ...

    class LinearNorm(nn.Linear): ...

    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))

    class LayerNormMLP(nn.Module):  # named as in TransformerEngine
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm_weight = nn.Parameter(torch.ones(6))
            self.fc1_weight = nn.Parameter(torch.randn(8, 6))

    class Gain(nn.LayerNorm): ...

    table = nm.routes_for(
        nn.Sequential(
            NormalizedLinear(6, 6),
            LinearNorm(6, 6),
            ScaleNorm(),
            LayerNormMLP(),
            Gain((4, 6)),
            nn.GroupNorm(2, 6),
        )
    )
    assert table["0.weight"] == table["1.weight"] == table["3.fc1_weight"] == nm.Route()
    assert (
        table["2.weight"] == table["4.weight"] == table["3.layer_norm_weight"] == nm.Route("adamw")
    )
    reasons = {name: entry.reason for name, entry in table.entries.items()}
    assert reasons["2.weight"] == reasons["4.weight"] == reasons["5.weight"] == "norm"


class Everyday(nn.Module):
    """What TorchScript and torch.export can take."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.each = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.lstm = nn.LSTM(8, 8)
        self.norm = nn.LayerNorm((5, 8))
        self.lm_head = nn.Linear(8, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.each(self.conv(x.mT)).mT
        return self.lm_head(self.norm(self.lstm(x)[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_modules_of_torchscript_are_what_they_were_made_of(how: str) -> None:
    model = Everyday()
    made = (
        torch.jit.script(model)
        if how == "script"
        else torch.jit.trace(model, torch.zeros(2, 5, dtype=torch.int64))
    )
    expected, found = nm.routes_for(model), nm.routes_for(made)
    assert dict(found) == dict(expected)
    assert [(e.name, e.module, e.reason) for e in found.entries.values()] == [
        (e.name, e.module, e.reason) for e in expected.entries.values()
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.export
@pytest.mark.parametrize("nested", [False, True])
def test_of_exported_modules_names_tell_embeddings_and_heads(nested: bool) -> None:
    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings = nn.Embedding(30, 8)
            self.block = Block()
            self.lm_head = nn.Linear(8, 30, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.block(self.tok_embeddings(tokens)))

    program = torch.export.export(Exported(), (torch.zeros(2, 5, dtype=torch.int64),))
    table = nm.routes_for(torch.export.unflatten(program) if nested else program.module())
    assert table["tok_embeddings.weight"] == table["lm_head.weight"] == nm.Route("adamw")
    assert "by name" in table.entries["lm_head.weight"].reason
    assert table["block.fc.weight"] == table["block.out.weight"] == nm.Route()
