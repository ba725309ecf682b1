"""Routers beside matrices that happen to have as many rows as there are experts.

The rank of an adapter and the width of a shared projection may equal the number of experts. A layer
of a router that another layer follows has hidden units, whatever the router is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.routing.names import by_names

D, F, E = 64, 128, 8


@pytest.fixture(autouse=True)
def on_meta() -> Any:
    with torch.device("meta"):
        yield


def made(_kind: str, **members: Any) -> nn.Module:
    module = type(_kind, (nn.Module,), {})()
    for name, member in members.items():
        setattr(module, name, member)
    return module


def layer(inputs: int = D, outputs: int = E) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def peft(inputs: int, outputs: int) -> nn.Module:
    factors = {"lora_A": layer(inputs, E), "lora_B": layer(E, outputs)}
    dicts = {name: nn.ModuleDict({"default": factor}) for name, factor in factors.items()}
    return made("LoraLinear", base_layer=layer(inputs, outputs), **dicts)


def torchtune(inputs: int, outputs: int) -> nn.Module:
    return made("LoRALinear", weight=stack(outputs, inputs), lora_a=layer(inputs, E),
                lora_b=layer(E, outputs))  # fmt: skip


def loralib(inputs: int, outputs: int) -> nn.Module:
    linear = layer(inputs, outputs)
    linear.lora_A, linear.lora_B = stack(E, inputs), stack(outputs, E)
    return linear


def diffusers(inputs: int, outputs: int) -> nn.Module:
    lora = made("LoRALinearLayer", lora_down=layer(inputs, E), lora_up=layer(E, outputs))
    return made("Compatible", base_layer=layer(inputs, outputs), lora=lora)


def lokr(inputs: int, outputs: int) -> nn.Module:
    return made("LoKr", base_layer=layer(inputs, outputs), lokr_w1_a=stack(16, E),
                lokr_w1_b=stack(E, 16))  # fmt: skip


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def decisions(block: nn.Module) -> list[Any]:
    """By the modules, and by names alone, of the feed-forward of a layer."""
    model = made("LM", layers=nn.ModuleList([made("Block", ffn=block)]))
    found = [nm.routes_for(model).decisions(), by_names(dict(model.named_parameters()))]
    return [{k.removeprefix("layers.0.ffn."): d for k, d in each.items()} for each in found]


ADAPTED = pytest.mark.parametrize("adapted", [peft, torchtune, loralib, diffusers, lokr])
NAMES = pytest.mark.parametrize("name", ["gate", "wg", "gating", "gate_proj", "selector", "router"])


@ADAPTED
@NAMES
def test_factors_of_rank_of_the_number_of_experts_hide_no_router(
    name: str, adapted: Callable[[int, int], nn.Module]
) -> None:
    def expert() -> nn.Module:
        return made("MLP", w1=adapted(D, F), w2=adapted(F, D))

    shared = {"shared_expert": expert()}
    for experts in (
        {"experts": nn.ModuleList(expert() for _ in range(E))},
        {"experts": made("Experts", w1=stack(E, F, D), w2=stack(E, D, F)), **shared},
        {"w1": layer(D, E * F), "w2": layer(E * F, D), **shared},
    ):
        for found in decisions(made("MoEBlock", **{name: layer()}, **experts)):
            assert found[f"{name}.weight"].route == nm.Route("adamw")
            factors = [key for key in found if "lora_" in key or "lokr_" in key]
            assert factors and {found[key].route.algorithm for key in factors} == {"normuon"}


@NAMES
@pytest.mark.parametrize("kind", ["a list", "numbered", "stacks"])
def test_a_projection_with_as_many_outputs_as_there_are_experts_hides_no_router(
    kind: str, name: str
) -> None:
    def expert() -> nn.Module:
        return made("MLP", w1=layer(D, F), w2=layer(F, D))

    experts = {
        "a list": lambda: {"experts": nn.ModuleList(expert() for _ in range(E))},
        "numbered": lambda: {f"expert_{k}": expert() for k in range(E)},
        "stacks": lambda: {"experts": made("Experts", w1=stack(E, F, D), w2=stack(E, D, F))},
    }[kind]()
    pair = {"shared_down": layer(), "shared_up": layer(E, D)}
    for found in decisions(made("MoEBlock", **{name: layer()}, **pair, **experts)):
        assert found[f"{name}.weight"].route == nm.Route("adamw")
        assert found["shared_down.weight"].route == found["shared_up.weight"].route == nm.Route()


def test_a_router_of_many_experts_is_told_beside_a_projection_of_their_number() -> None:
    experts = nn.ModuleList(layer(D, 16) for _ in range(D + 8))
    block = made("MoEBlock", gate=layer(D, D + 8), experts=experts, latent=layer(D, D + 8))
    for found in decisions(block):
        assert found["gate.weight"].route == nm.Route("adamw")
        assert found["latent.weight"].route == nm.Route()


def test_a_gate_of_as_many_hidden_units_as_there_are_experts_elsewhere_is_a_matrix() -> None:
    config = type("Config", (), {"num_experts": 16})()
    narrow = made("MLP", gate_proj=layer(D, 16), up_proj=layer(D, 16), down_proj=layer(16, D))
    narrow.config = config
    experts = [made("MLP", gate=layer(D, E), up=layer(D, E), down=layer(E, D)) for _ in range(E)]
    heads = made("Attention", q_proj=layer(D, D), gate=layer(), b_proj=layer())
    block = made("MoEBlock", experts=nn.ModuleList(experts), dense=narrow, attn=heads)
    for found in decisions(block):
        assert {d.route for d in found.values()} == {nm.Route()}


TWO: dict[str, Callable[[], nn.Module]] = {
    "Sequential": lambda: nn.Sequential(layer(D, 32), nn.ReLU(), layer(32, E)),
    "three layers": lambda: nn.Sequential(
        layer(D, 32), nn.ReLU(), layer(32, 16), nn.ReLU(), layer(16, E)
    ),
    "a Sequential in it": lambda: nn.Sequential(
        nn.Sequential(layer(D, 32), nn.ReLU()), layer(32, E)
    ),
    "hidden units as many as experts": lambda: nn.Sequential(layer(), nn.ReLU(), layer(E, E)),
    "a module": lambda: made("Net", fc1=layer(D, 32), fc2=layer(32, E)),
    "a class of routers": lambda: made("TopKRouter", fc1=layer(D, 32), fc2=layer(32, E)),
    "an adapter on each": lambda: nn.Sequential(peft(D, 32), nn.ReLU(), peft(32, E)),
}


@pytest.mark.parametrize("name", ["gate", "router", "gating", "wg", "switch"])
@pytest.mark.parametrize("kind", TWO)
def test_of_a_router_with_several_layers_the_last_one_alone_chooses(kind: str, name: str) -> None:
    gate = TWO[kind]()
    bases = [key for key, p in gate.named_parameters() if "lora_" not in key]
    experts = nn.ModuleList(made("MLP", w1=layer(D, F), w2=layer(F, D)) for _ in range(E))
    for found in decisions(made("MoEBlock", **{name: gate}, experts=experts)):
        rules = [found[f"{name}.{key}"].route.algorithm for key in bases]
        assert rules == ["normuon"] * (len(bases) - 1) + ["adamw"]


def test_a_router_beside_its_noise_or_before_other_modules_is_the_last_of_its_kind() -> None:
    experts = nn.ModuleList(made("MLP", w1=layer(D, F), w2=layer(F, D)) for _ in range(E))
    gate = made("NoisyGate", gate=layer(D, E + 2), noise=layer(D, E + 2))
    for found in decisions(made("MoEBlock", gate=gate, experts=experts)):
        assert found["gate.gate.weight"].route == nm.Route("adamw")


@pytest.mark.parametrize("of", ["switch", "moe_gate", "gating"])
def test_a_router_in_a_module_that_is_named_as_one_and_has_the_experts_is_told(of: str) -> None:
    def expert() -> nn.Module:
        return made("MLP", w1=peft(D, F), w2=layer(F, E), w3=layer(E, D))

    moe = made("Switch", gate=layer(), experts=nn.ModuleList(expert() for _ in range(E)))
    for found in decisions(made("Layer", **{of: moe})):
        assert found[f"{of}.gate.weight"].route == nm.Route("adamw")
        assert found[f"{of}.experts.1.w3.weight"].route == nm.Route()


def test_a_router_of_equal_sizes_is_taken_without_a_word() -> None:
    experts = nn.ModuleList(made("MLP", w1=peft(D, F), w2=peft(F, D)) for _ in range(E))
    block = made("MoEBlock", gate=layer(), experts=experts, shared_down=layer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.routes_for(block)
        nm.make_plan(dict(block.named_parameters()))
