"""Routers beside experts in any container, and gates that are no routers.

What the number of experts tells is certain, what a name tells is likely, and what could be either
is said. A gate with hidden units, and one that scales the heads of an attention, is a matrix.
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


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def made(_kind: str, **members: Any) -> nn.Module:
    """A module whose class is called so, with these members."""
    module = type(_kind, (nn.Module,), {})()
    for name, member in members.items():
        setattr(module, name, member)
    return module


def feed_forward(hidden: int = F) -> nn.Module:
    """SwiGLU, whose gate has hidden units."""
    names = {"w1": (D, hidden), "w2": (hidden, D), "w3": (D, hidden)}
    return made("FeedForward", **{n: nn.Linear(*s, bias=False) for n, s in names.items()})


def listed() -> nn.ModuleList:
    return nn.ModuleList(feed_forward() for _ in range(E))


COUNTED: dict[str, Callable[[], dict[str, Any]]] = {
    "stacks": lambda: {"w1": stack(E, F, D), "w2": stack(E, D, F)},
    "a list": lambda: {"experts": listed()},
    "a list of another name": lambda: {"ffns": listed()},
    "numbered attributes": lambda: {f"expert_{k}": feed_forward() for k in range(E)},
    "a bank": lambda: {"bank": made("Bank", up=stack(E, F, D), down=stack(E, D, F))},
    "a bank in a bank": lambda: {
        "bank": made("Bank", inner=made("Inner", up=stack(E, F, D), down=stack(E, D, F)))
    },
    "a list in a bank": lambda: {"bank": made("Bank", inner=made("Inner", members=listed()))},
    "scattermoe": lambda: {
        "experts": made("ParallelExperts", weight=stack(E, F, D)),
        "output_experts": made("ParallelExperts", weight=stack(E, D, F)),
    },
    "tutel": lambda: {
        "experts": made(
            "FusedExpertsNetwork", batched_fc1_w=stack(E, F, D), batched_fc2_w=stack(E, F, D),
            batched_fc1_bias=stack(E, F),
        )
    },
    "a module inside": lambda: {"moe": made("Inside", experts=listed())},
}  # fmt: skip
UNCOUNTED: dict[str, Callable[[], dict[str, Any]]] = {
    "fused layers": lambda: {"w1": nn.Linear(D, E * F), "w2": nn.Linear(E * F, D)},
    "fused layers in a module": lambda: {
        "experts": made("MLP", w1=nn.Linear(D, E * F), w2=nn.Linear(E * F, D))
    },
    "fused parameters": lambda: {"mlp": made("MLP", w1=stack(E * F, D), w2=stack(E * F, D))},
    "one for each": lambda: {"mlp": feed_forward()},
}


def layer() -> nn.Linear:
    return nn.Linear(D, E, bias=False)


# Each gate, and the end of the name of the weight that chooses.
GATES: dict[str, tuple[Callable[[], nn.Module | nn.Parameter], str]] = {
    **dict.fromkeys(
        (
            "gate", "router", "wg", "gating", "gate_proj", "gating_network", "selector", "routing",
            "expert_selector", "route", "dispatcher", "router_proj", "gate_fn", "expert_gate",
            "moe_gate", "scorer", "router_logits",
        ),
        (layer, ".weight"),
    ),
    "w_gate": (lambda: stack(D, E), ""),
    "gate ": (lambda: stack(E, D), ""),
    "router ": (lambda: made("Sparse", layer=layer()), ".layer.weight"),
    "router  ": (lambda: made("Sparse", weight=stack(E, D)), ".weight"),
    "gate  ": (lambda: made("TopKGate", wg=layer()), ".wg.weight"),
    "gate   ": (lambda: nn.Sequential(layer(), nn.Softmax(-1)), ".0.weight"),
    "gate    ": (lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), layer()), ".2.weight"),
    "router   ": (lambda: made("Net", fc1=nn.Linear(D, D), fc2=layer()), ".fc2.weight"),
    "gate     ": (
        lambda: made(
            "CosineTopKGate", cosine_projector=nn.Linear(D, 32), sim_matrix=stack(32, E)
        ),
        ".sim_matrix",
    ),
}  # fmt: skip


def model_of(**members: Any) -> nn.Module:
    """A layer, of which these are the members of the feed-forward, after an attention."""

    def block() -> nn.Module:
        sizes = {name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        made_now = {name: make() for name, make in members.items()}
        return made("Block", attn=made("SelfAttention", **sizes), ff=made("Layer", **made_now))

    blocks = nn.ModuleList([block()])
    return made("LM", tok=nn.Embedding(1000, D), layers=blocks, head=nn.Linear(D, 1000))


def decisions(model: nn.Module) -> list[Any]:
    """By the modules, and by names alone."""
    return [nm.routes_for(model).decisions(), by_names(dict(model.named_parameters()))]


def with_experts(gate: str, make: Callable[[], Any], experts: dict[str, Any]) -> nn.Module:
    model = model_of(**{gate.strip(): make})
    for block in model.layers:  # type: ignore[union-attr]
        for name, member in experts.items():
            setattr(block.ff, name, member)
    return model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("experts", COUNTED)
def test_a_router_is_told_beside_experts_in_any_container(experts: str, gate: str) -> None:
    make, end = GATES[gate]
    model = with_experts(gate, make, COUNTED[experts]())
    chooses = f"layers.0.ff.{gate.strip()}{end}"
    of_modules, of_names = decisions(model)
    assert of_modules[chooses].route == of_names[chooses].route == nm.Route("adamw")
    assert of_modules[chooses].certainty == "certain"
    hidden = [
        name
        for name, p in model.named_parameters()
        if name.startswith("layers.0") and p.ndim > 1 and "bias" not in name and name != chooses
    ]
    for found in (of_modules, of_names):
        assert {found[name].route.algorithm for name in hidden} == {"normuon"}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("experts", UNCOUNTED)
def test_what_may_be_a_router_of_experts_that_cannot_be_counted_is_never_silent(
    experts: str, gate: str
) -> None:
    make, end = GATES[gate]
    model = with_experts(gate, make, UNCOUNTED[experts]())
    chooses = f"layers.0.ff.{gate.strip()}{end}"
    for found in decisions(model):
        assert found[chooses].route == nm.Route("adamw")
    table = nm.routes_for(model)
    if "router" not in gate and gate != "gate  ":  # a class or a name that says it
        assert chooses in table.unsure()
        with pytest.warns(UserWarning, match=rf"ff\.{gate.strip()}.*nm\.Route\(\)"):
            nm.NorMuon(model)


@pytest.mark.parametrize("experts", COUNTED)
def test_as_many_outputs_as_there_are_members_beside_it_are_said_under_any_name(
    experts: str,
) -> None:
    for name, rule in (("assign", nm.Route("adamw")), ("proj", nm.Route())):
        model = with_experts(name, layer, COUNTED[experts]())
        entry = nm.routes_for(model).entries[f"layers.0.ff.{name}.weight"]
        assert entry.route == rule and entry.certainty != "certain"


HIDDEN: dict[str, dict[str, Callable[[], Any]]] = {
    "a GLU": {"gate": lambda: nn.Linear(D, F), "up": lambda: nn.Linear(D, F)},
    "a narrow GLU": {
        "gate_proj": lambda: nn.Linear(D, 16), "up_proj": lambda: nn.Linear(D, 16),
        "down_proj": lambda: nn.Linear(16, D),
    },
    "a bottleneck": {"gate": lambda: nn.Linear(D, 16), "back": lambda: nn.Linear(16, D)},
    "an output gate of heads": {
        "q_proj": lambda: nn.Linear(D, D), "gate": lambda: nn.Linear(D, 4),
    },
    "a gate of heads beside a fused projection": {
        "qkv": lambda: nn.Linear(D, 3 * D), "gate_proj": lambda: nn.Linear(D, 4),
    },
    "a gate of heads in a layer of attention": {
        "mix": lambda: made("GatedAttention", gate=nn.Linear(D, 4), out=nn.Linear(D, D)),
    },
    "an output gate": {"gate": lambda: nn.Linear(D, D)},
    "an input gate": {"input_gate": lambda: nn.Linear(D, 16)},
    "a gate of attention": {"attn_gate": lambda: nn.Linear(D, 4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_gate_of_hidden_units_or_of_heads_is_a_matrix_without_a_word(kind: str) -> None:
    model = model_of(**HIDDEN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.NorMuon(model)
    rules = {
        name: entry.route.algorithm
        for name, entry in nm.routes_for(model).entries.items()
        if "ff" in name and name.endswith("weight")
    }
    assert set(rules.values()) == {"normuon"} and len(rules) >= 1


def test_the_gates_inside_experts_are_matrices() -> None:
    """Fine-grained experts, whose hidden units are as few as a router's outputs."""
    experts = nn.ModuleList(
        made("Expert", gate=nn.Linear(D, E), up=nn.Linear(D, E), down=nn.Linear(E, D))
        for _ in range(E)
    )
    model = with_experts("router", layer, {"experts": experts})
    table = nm.routes_for(model)
    assert table["layers.0.ff.router.weight"] == nm.Route("adamw")
    for name in ("gate", "up", "down"):
        assert table[f"layers.0.ff.experts.3.{name}.weight"] == nm.Route()


def test_the_noise_of_a_router_and_a_second_router_have_its_rule() -> None:
    model = with_experts("gate", layer, {"w_noise": stack(D, E), **COUNTED["stacks"]()})
    for block in model.layers:  # type: ignore[union-attr]
        block.ff.noise_linear, block.ff.vision_gate = layer(), layer()
    table = nm.routes_for(model)
    names = ("gate.weight", "w_noise", "noise_linear.weight")
    assert {table[f"layers.0.ff.{name}"] for name in names} == {nm.Route("adamw")}
    assert table["layers.0.ff.vision_gate.weight"] == nm.Route("adamw")


def test_what_is_called_a_router_is_one_also_where_another_layer_reads_its_outputs() -> None:
    model = model_of(modality_router=lambda: nn.Linear(D, 4), coefficients=lambda: nn.Linear(4, 16))
    for found in decisions(model):
        assert found["layers.0.ff.modality_router.weight"].route == nm.Route("adamw")
        assert found["layers.0.ff.coefficients.weight"].route == nm.Route()


@pytest.mark.parametrize(
    ("rows", "columns"), [(4, 32), (16, 32), (64, 256), (64, 128), (256, 2048)]
)
def test_a_gate_of_few_rows_is_said_whatever_the_sizes(rows: int, columns: int) -> None:
    block = made("Layer", gate=nn.Linear(columns, rows), up=nn.Linear(columns, 999))
    vocabulary = {"tok": nn.Embedding(50_000, columns), "head": nn.Linear(columns, 50_000)}
    model = made("LM", layers=nn.ModuleList([block]), **vocabulary)
    for found in decisions(model):
        decision = found["layers.0.gate.weight"]
        assert decision.route == nm.Route("adamw") and decision.certainty == "untold"


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = module


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "saved by an adapter", "parametrized"])
@pytest.mark.parametrize("experts", ["stacks", "a list of another name"])
def test_a_wrapped_router_is_told_as_well(experts: str, how: str) -> None:
    model = with_experts("gate", layer, COUNTED[experts]())
    ff: Any = model.layers[0].ff  # type: ignore[index]
    if how == "compiled":
        ff.gate = torch.compile(ff.gate)
    elif how == "checkpointed":
        ff.gate = Wrapper(ff.gate)
    elif how == "saved by an adapter":
        ff.gate = made("ModulesToSaveWrapper", modules_to_save=nn.ModuleDict({"default": ff.gate}))
    else:
        torch.nn.utils.parametrize.register_parametrization(ff.gate, "weight", nn.Identity())
    (found,) = [d for n, d in nm.routes_for(model).decisions().items() if "ff.gate" in n]
    assert found.route == nm.Route("adamw") and found.certainty == "certain"


@pytest.mark.parametrize("experts", [D // 2 + 1, D, 2 * D])
@pytest.mark.parametrize("name", ["gate", "router", "gate_proj"])
def test_a_router_of_more_experts_than_half_its_inputs_is_told_by_their_number(
    name: str, experts: int
) -> None:
    members = nn.ModuleList(feed_forward(24) for _ in range(experts))
    model = with_experts(name, lambda: nn.Linear(D, experts), {"ffns": members})
    for found in decisions(model):
        decision = found[f"layers.0.ff.{name}.weight"]
        assert decision.route == nm.Route("adamw")
        assert decision.certainty == ("likely" if experts == D else "certain")
        assert found["layers.0.ff.ffns.0.w1.weight"].route == nm.Route()


def test_a_router_that_is_a_convolution_of_one_place_is_told() -> None:
    convolutions = nn.ModuleList(nn.Conv2d(D, D, 3) for _ in range(E))
    model = with_experts("gate", lambda: nn.Conv2d(D, E, 1), {"experts": convolutions})
    table = nm.routes_for(model)
    assert table["layers.0.ff.gate.weight"] == nm.Route("adamw")
    assert table["layers.0.ff.experts.0.weight"] == nm.Route(flatten=True)


def test_the_keys_of_experts_that_are_a_parameter_of_no_layer_are_said() -> None:
    model = with_experts("expert_keys", lambda: stack(E, D), UNCOUNTED["fused layers"]())
    for found in decisions(model):
        assert found["layers.0.ff.expert_keys"].route == nm.Route("adamw")
    assert "layers.0.ff.expert_keys" in nm.routes_for(model).unsure()


def test_a_mixture_that_is_the_whole_model_has_a_router() -> None:
    model = made("Mixture", gate=layer(), experts=listed())
    for found in decisions(model):
        assert found["gate.weight"].route == nm.Route("adamw")
        assert found["experts.0.w1.weight"].route == nm.Route()
