"""Models as people write them by hand: low-rank factors of their own, routers beside stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normuon_fn as nm

D, F, R = 32, 64, 4


class Adapted(nn.Module):
    """A frozen layer with two factors that are attributes of their own."""

    def __init__(
        self, base: nn.Module, names: tuple[str, str], rank: int = R, by_inputs: bool = False
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        outputs, inputs = base.weight.shape  # type: ignore[misc, union-attr]
        shapes = [(rank, inputs), (outputs, rank)]
        for name, shape in zip(names, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.randn(shape[::-1] if by_inputs else shape)))


class OwnLinear(nn.Linear):
    """The factors beside the frozen weight itself, as loralib has them."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__(D, F)
        self.weight.requires_grad_(False)
        setattr(self, names[0], nn.Parameter(torch.randn(R, D)))
        setattr(self, names[1], nn.Parameter(torch.zeros(F, R)))


def in_a_model(layer: nn.Module, name: str = "q_proj") -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(50, D).requires_grad_(False)
    model.block = nn.Module()
    model.block.add_module("k_proj", nn.Linear(D, D).requires_grad_(False))
    (model if name == "lm_head" else model.block).add_module(name, layer)
    return model


def trained(model: nn.Module) -> dict[str, nm.Route]:
    table = nm.routes_for(model)
    assert not table.unsure(), table.unsure()
    found = {name.rpartition(".")[2]: table[name] for name in table}
    return {name: route for name, route in found.items() if route.algorithm != "frozen"}


NAMES = [
    ("A", "B"), ("a", "b"), ("lora_A", "lora_B"), ("loraA", "loraB"), ("q_lora_A", "q_lora_B"),
    ("lora_A_q", "lora_B_q"), ("lora_A_weight", "lora_B_weight"), ("lora_down", "lora_up"),
    ("w_a", "w_b"), ("down", "up"), ("U", "V"),
]  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("rank", [2, R, 8])
@pytest.mark.parametrize("by_inputs", [False, True])
def test_two_factors_beside_a_frozen_layer_are_matrices_whatever_their_names_and_rank(
    names: tuple[str, str], rank: int, by_inputs: bool
) -> None:
    for base in (nn.Linear(D, F), nn.Linear(D, D)):
        found = trained(in_a_model(Adapted(base, names, rank, by_inputs)))
        assert found == dict.fromkeys(names, nm.Route())


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_two_factors_beside_a_frozen_weight_of_the_same_layer_are_matrices(
    names: tuple[str, str],
) -> None:
    found = trained(in_a_model(OwnLinear(names)))
    assert {name: found[name] for name in names} == dict.fromkeys(names, nm.Route())


class Factors(nn.Module):
    """The factors in a module of their own, which stands beside the frozen layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(inputs, R))
        self.B = nn.Parameter(torch.zeros(R, outputs))


@pytest.mark.parametrize("kind", ["module", "list", "dict"])
def test_two_factors_in_a_module_or_a_list_beside_a_frozen_layer_are_matrices(kind: str) -> None:
    layer = nn.Module()
    layer.linear = nn.Linear(D, F).requires_grad_(False)
    layer.lora = Factors(D, F)
    if kind == "list":
        layer.lora = nn.ParameterList([layer.lora.A, layer.lora.B])
    elif kind == "dict":
        layer.lora = nn.ParameterDict({"A": layer.lora.A, "B": layer.lora.B})
    assert [*trained(in_a_model(layer)).values()] == [nm.Route()] * 2
    layer.lora = Factors(D, 50)
    layer.linear = nn.Linear(D, 50).requires_grad_(False)
    of_head = trained(in_a_model(layer, "lm_head"))
    assert of_head == {"A": nm.Route(), "B": nm.Route("adamw")}


def test_two_tables_of_prompts_beside_a_frozen_layer_are_no_factors() -> None:
    layer = nn.Module()
    layer.linear = nn.Linear(D, D).requires_grad_(False)
    layer.keys, layer.values = (nn.Parameter(torch.randn(R, D)) for _ in range(2))
    table = nm.routes_for(in_a_model(layer))
    assert table["block.q_proj.keys"] == nm.Route("adamw") and len(table.unsure()) == 2


def test_factors_of_an_output_head_and_of_an_embedding_have_the_rules_of_what_they_adapt() -> None:
    for names in (("lora_A", "lora_B"), ("A", "B")):
        head = trained(in_a_model(Adapted(nn.Linear(D, 50), names), "lm_head"))
        assert head == {names[0]: nm.Route(), names[1]: nm.Route("adamw")}
        embedding = in_a_model(Adapted(nn.Embedding(50, D), names), "tokens")
        assert trained(embedding) == dict.fromkeys(names, nm.Route("adamw"))


def test_what_has_no_partner_or_no_frozen_layer_beside_it_is_doubted_as_before() -> None:
    alone = Adapted(nn.Linear(D, F), ("A", "B"))
    del alone.B
    beside_what_is_trained = Adapted(nn.Linear(D, F), ("A", "B"))
    beside_what_is_trained.base.requires_grad_(True)
    other_sizes = Adapted(nn.Linear(D, F), ("A", "B"))
    other_sizes.B = nn.Parameter(torch.zeros(F + 1, R))
    for layer in (alone, beside_what_is_trained, other_sizes):
        assert "block.q_proj.A" in nm.routes_for(in_a_model(layer)).unsure()


class Stacked(nn.Module):
    """Experts in stacks that are attributes of the module that has the router."""

    def __init__(self, name: str, experts: int = 4, outputs: int | None = None) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(D, outputs or experts, bias=False))
        self.w_up = nn.Parameter(torch.randn(experts, F, D))
        self.w_down = nn.Parameter(torch.randn(experts, D, F))


class Listed(nn.Module):
    """Experts in a list that is not called so."""

    def __init__(self, name: str, experts: int = 4, outputs: int | None = None) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(D, outputs or experts))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)) for _ in range(experts)
        )


@pytest.mark.parametrize("moe", [Stacked, Listed])
@pytest.mark.parametrize(
    "name", ["gate", "router", "switch", "wg", "gating", "gate_proj", "moe_gate", "expert_router"]
)
def test_a_gate_with_as_many_rows_as_there_are_experts_beside_it_is_a_router(
    moe: type[nn.Module], name: str
) -> None:
    table = nm.routes_for(in_a_model(moe(name), "moe"))  # type: ignore[call-arg]
    assert table[f"block.moe.{name}.weight"] == nm.Route("adamw")
    assert not table.unsure()


@pytest.mark.parametrize("moe", [Stacked, Listed])
def test_a_gate_with_other_rows_and_a_projection_of_another_name_stay_matrices(
    moe: type[nn.Module],
) -> None:
    for name, outputs in (("gate", F), ("gate_proj", F), ("proj", None), ("gate", D)):
        layer = moe(name, outputs=outputs)  # type: ignore[call-arg]
        table = nm.routes_for(in_a_model(layer, "moe"))
        assert table[f"block.moe.{name}.weight"] == nm.Route()


class Grouped(nn.Module):
    """Experts in a dict, or a list for each of their weights."""

    def __init__(self, name: str, experts: int = 4, outputs: int | None = None) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(D, outputs or experts))
        if name == "gate":
            self.experts = nn.ModuleDict({f"e{k}": nn.Linear(D, D) for k in range(experts)})
        else:
            self.ups = nn.ParameterList(torch.randn(F, D) for _ in range(experts))


@pytest.mark.parametrize("name", ["gate", "router", "noise"])
def test_a_router_is_told_beside_a_dict_and_beside_lists_of_weights(name: str) -> None:
    table = nm.routes_for(in_a_model(Grouped(name), "moe"))
    assert table[f"block.moe.{name}.weight"] == nm.Route("adamw")


def test_of_a_router_with_layers_the_last_one_chooses() -> None:
    moe = Stacked("router")
    moe.router = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4))
    table = nm.routes_for(in_a_model(moe, "moe"))
    assert table["block.moe.router.0.weight"] == nm.Route()
    assert table["block.moe.router.2.weight"] == nm.Route("adamw")
