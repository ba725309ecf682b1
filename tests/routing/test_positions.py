"""Output heads: what a layer's place and shape say against its name, or where there is none."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import normuon_fn as nm
from tests import guides

D, H = 32, 64


class Of(nn.Module):
    """A model of these children, in this order."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def mlp(*sizes: int) -> nn.Sequential:
    pairs = itertools.pairwise(sizes)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def blocks() -> nn.ModuleList:
    return nn.ModuleList(nn.TransformerEncoderLayer(D, 4, H) for _ in range(2))


def attention(**more: Any) -> Of:
    return Of(q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), **more)


# Models, and for each of their doubtful weights the rule that it gets.
DOUBTFUL: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "the first layer, named fc": (
        lambda: Of(fc=nn.Linear(16, 256), up=nn.ConvTranspose2d(64, 64, 4)),
        {"fc.weight": "normuon"},
    ),
    "the first layers, named fc": (
        lambda: Of(fc=mlp(16, 64, 256), up=nn.ConvTranspose2d(64, 64, 4)),
        {"fc.2.weight": "normuon"},
    ),
    "fc in the middle": (
        lambda: Of(
            down=nn.Conv2d(3, 16, 3), mu=nn.Linear(64, 8), fc=nn.Linear(8, 64),
            up=nn.ConvTranspose2d(16, 3, 2),
        ),
        {"fc.weight": "normuon"},
    ),
    "out before the blocks": (
        lambda: Of(out=nn.Linear(48, 7), blocks=blocks()), {"out.weight": "adamw"}
    ),
    "a classifier that is the first layer": (
        lambda: Of(classifier=nn.Linear(8, D), blocks=blocks()), {"classifier.weight": "adamw"}
    ),
    "out of an attention": (lambda: attention(out=nn.Linear(D, D)), {"out.weight": "normuon"}),
    "heads of an attention": (
        lambda: attention(heads=nn.Linear(D, D)), {"heads.weight": "normuon"}
    ),
    "proj_out of an attention": (
        lambda: Of(to_qkv=nn.Conv2d(D, 3 * D, 1), proj_out=nn.Conv2d(D, D, 1)),
        {"proj_out.weight": "normuon"},
    ),
    "out of an attention that is wider inside": (
        lambda: Of(to_q=nn.Linear(D, H), to_kv=nn.Linear(D, 2 * H), out=nn.Linear(H, D)),
        {"out.weight": "normuon"},
    ),
    "a square final": (
        lambda: Of(blocks=blocks(), final=nn.Linear(D, D)), {"final.weight": "adamw"}
    ),
    "a dueling network": (
        lambda: Of(fc=nn.Linear(8, D), value=nn.Linear(D, 1), advantage=nn.Linear(D, 6)),
        {"advantage.weight": "normuon"},
    ),
    "advantage before value": (
        lambda: Of(fc1=nn.Linear(8, D), advantage=nn.Linear(D, 6), value=nn.Linear(D, 1)),
        {"advantage.weight": "normuon"},
    ),
    "two last layers side by side": (
        lambda: Of(body=mlp(8, D, D), mu=nn.Linear(D, 6), log_std=nn.Linear(D, 6)),
        {"mu.weight": "normuon", "log_std.weight": "normuon"},
    ),
    "streams of two layers": (
        lambda: Of(conv=nn.Conv2d(3, 8, 3), value=mlp(72, H, 5), advantage=mlp(72, H, 6)),
        {"value.2.weight": "normuon", "advantage.2.weight": "normuon"},
    ),
    "last layers in a dict": (
        lambda: Of(body=mlp(8, D, D), tasks=nn.ModuleDict({"a": nn.Linear(D, 3)})),
        {"tasks.a.weight": "normuon"},
    ),
    "last layers in a list": (
        lambda: Of(body=mlp(8, D), tasks=nn.ModuleList(nn.Linear(D, 3) for _ in range(2))),
        {"tasks.0.weight": "normuon", "tasks.1.weight": "normuon"},
    ),
    "the last of a Sequential": (lambda: mlp(8, 16, 4), {"2.weight": "normuon"}),
    "a square last of a Sequential": (
        lambda: nn.Sequential(nn.Embedding(D, 16), nn.Linear(16, D), nn.ReLU(), nn.Linear(D, D)),
        {"3.weight": "normuon"},
    ),
    "LeNet": (
        lambda: Of(conv=nn.Conv2d(1, 6, 5), fc1=nn.Linear(96, 84), fc2=nn.Linear(84, 10)),
        {"fc2.weight": "normuon"},
    ),
    "a convolution net": (
        lambda: nn.Sequential(nn.Conv2d(3, D, 3), nn.BatchNorm2d(D), nn.Conv2d(D, 10, 1)),
        {"2.weight": "normuon"},
    ),
    "an actor and a critic": (
        lambda: Of(actor=mlp(8, D, 6), critic=mlp(8, D, 5)),
        {"actor.2.weight": "normuon", "critic.2.weight": "normuon"},
    ),
    "a named Sequential": (
        lambda: nn.Sequential(OrderedDict(a=nn.Linear(8, 16), b=nn.Linear(16, 4))),
        {"b.weight": "normuon"},
    ),
    "a wrapped model": (lambda: Of(module=mlp(8, 16, 4)), {"module.2.weight": "normuon"}),
}  # fmt: skip


def weights(table: nm.RouteTable) -> dict[str, str]:
    return {name: found.route.algorithm for name, found in table.unsure().items()}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_layer_whose_place_speaks_against_its_name_is_doubted(case: str) -> None:
    make, expected = DOUBTFUL[case]
    assert weights(nm.routes_for(make())) == expected


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a list of two": (
        lambda: nn.ModuleList([mlp(8, 16, 4), mlp(4, 16, 3)]),
        ["0.2.weight", "1.2.weight"],
    ),
    "the second ends in a vector": (
        lambda: nn.ModuleList([mlp(8, 16, 4), mlp(4, 16, 1)]),
        ["0.2.weight"],
    ),
    "three that are alike": (
        lambda: nn.ModuleList(mlp(8, 16, 4) for _ in range(3)),
        ["0.2.weight", "1.2.weight", "2.2.weight"],
    ),
    "a dict": (
        lambda: nn.ModuleDict({"maker": mlp(8, 16, 4), "judge": mlp(4, 16, 3)}),
        ["maker.2.weight", "judge.2.weight"],
    ),
    "G and D": (lambda: Of(G=mlp(8, 16, 4), D=mlp(4, 16, 3)), ["G.2.weight", "D.2.weight"]),
    "netG and netD": (
        lambda: Of(netG=mlp(8, 16, 4), netD=mlp(4, 16, 3)),
        ["netG.2.weight", "netD.2.weight"],
    ),
    "blocks": (
        lambda: nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3)),
        [],
    ),
    "netG_A and D_B": (
        lambda: Of(netG_A=mlp(8, 16, 4), D_B=mlp(4, 16, 3)),
        ["netG_A.2.weight", "D_B.2.weight"],
    ),
    "blocks whose layers have names of heads": (
        lambda: nn.ModuleList(Of(fc=nn.Linear(64, 256), out=nn.Linear(256, 64)) for _ in range(3)),
        [],
    ),
    "stages and a layer": (
        lambda: nn.ModuleList([mlp(8, 16, 32), mlp(32, 64, 16), nn.Linear(16, 5)]),
        ["2.weight"],
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_of_several_networks_side_by_side_the_last_layer_of_each_is_doubted(case: str) -> None:
    make, expected = NETWORKS[case]
    assert [*nm.routes_for(make()).unsure()] == expected


@pytest.mark.parametrize("actions", [3, 4, 5, 6])
def test_the_places_of_a_sequential_are_no_experts(actions: int) -> None:
    trunk = nn.Sequential(*mlp(8, 64, 64), nn.ReLU())
    made = nm.routes_for(Of(trunk=trunk, choice=nn.Linear(64, actions), vf=nn.Linear(64, 1)))
    assert weights(made) == {"choice.weight": "normuon"}
    gated = nm.routes_for(Of(enc=trunk, gate=nn.Linear(64, actions), up=nn.Linear(64, 32)))
    assert gated.unsure()["gate.weight"].reason.startswith("router or matrix")
    named = nm.routes_for(Of(trunk=trunk, pi=nn.Linear(64, actions), vf=nn.Linear(64, 1)))
    assert not named.unsure() and named["pi.weight"] == nm.Route("adamw")


@pytest.mark.parametrize("name", ["experts", "mlps"])
def test_experts_in_a_sequential_are_counted(name: str) -> None:
    experts = nn.Sequential(*(mlp(8, 32, 8) for _ in range(4)))
    found = nm.routes_for(Of(gate=nn.Linear(8, 4), **{name: experts})).entries["gate.weight"]
    assert found.route == nm.Route("adamw") and found.certainty == "certain"


def listed_blocks() -> nn.ModuleList:
    return nn.ModuleList(Of(fc=nn.Linear(64, 256), out=nn.Linear(256, 64)) for _ in range(3))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "the only child": lambda: Of(layers=listed_blocks()),
    "called backbone": lambda: Of(
        embed=nn.Embedding(256, 64), backbone=listed_blocks(), head=nn.Linear(64, 256)
    ),
    "of torch": lambda: Of(
        embed=nn.Embedding(256, 64),
        backbone=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 4, 256), 2, enable_nested_tensor=False
        ),
        head=nn.Linear(64, 256),
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_no_layer_of_a_block_in_a_list_is_a_head(case: str) -> None:
    table = nm.routes_for(BLOCKS[case]())
    inside = [n for n, e in table.entries.items() if len(e.shape) == 2 and n.count(".") > 1]
    assert inside and {table[name].algorithm for name in inside} == {"normuon"}
    assert not set(inside) & {*table.unsure()}


@pytest.mark.parametrize("case", ["the last of a Sequential", "a square final", "LeNet"])
def test_the_one_warning_has_the_line_to_write_and_that_line_ends_it(case: str) -> None:
    make, expected = DOUBTFUL[case]
    with pytest.warns(UserWarning, match="do not tell the rule of 1 parameter") as seen:
        nm.make_plan(make())
    (name,) = expected
    other = "nm.Route()" if expected[name] == "adamw" else 'nm.Route("adamw")'
    assert len(seen) == 1 and f'otherwise "{name}": {other}' in str(seen[0].message)
    for route in (nm.Route("adamw"), nm.Route()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = nm.make_plan(make(), routes={name: route})
        assert next(p.route for p in plan.parameters if p.name == name) == route


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks, self.gen = nn.Embedding(50, D), blocks(), nn.Linear(D, 50)
        self.gen.weight = self.emb.weight


CERTAIN: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "named": lambda: Of(emb=nn.Embedding(50, D), blocks=blocks(), lm_head=nn.Linear(D, 50)),
    "named head first": lambda: Of(
        lm_head=nn.Linear(D, 50), emb=nn.Embedding(50, D), blocks=blocks()
    ),
    "by vocabulary": lambda: Of(emb=nn.Embedding(50, D), blocks=blocks(), l3=nn.Linear(D, 50)),
    "fc last": lambda: Of(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 10)),
    "decoder last": lambda: Of(encoder=mlp(64, D, 8), decoder=mlp(8, D, 64)),
    "two heads by name": lambda: Of(
        body=mlp(8, D), classifier=nn.Linear(D, 5), aux_head=nn.Linear(D, 3)
    ),
    "inside, with a head around": lambda: Of(
        model=Of(blocks=blocks(), down=nn.Linear(D, 7)), head=nn.Linear(7, 10)
    ),
    "an encoder alone": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 4, H, batch_first=True), 2
    ),
    "a block alone": lambda: nn.TransformerEncoderLayer(D, 4, H),
    "an attention alone": lambda: attention(proj=nn.Linear(D, D)),
    "a feed-forward alone": lambda: Of(fc1=nn.Linear(D, H), fc2=nn.Linear(H, D)),
    "a feed-forward alone, in a Sequential": lambda: mlp(D, H, D),
    "torch's attention alone": lambda: nn.MultiheadAttention(D, 4),
    "torch's attention and a head": lambda: Of(
        attn=nn.MultiheadAttention(D, 4), head=nn.Linear(D, 5)
    ),
    "a layer alone": lambda: nn.Linear(16, 4),
    "a denoiser": lambda: Of(
        conv_in=nn.Conv2d(3, D, 3), mid=nn.Conv2d(D, D, 3), conv_out=nn.Conv2d(D, 3, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CERTAIN)
def test_a_head_that_is_told_and_a_model_that_has_none_are_taken_without_a_word(case: str) -> None:
    assert weights(nm.routes_for(CERTAIN[case]())) == {}


def named_by_the_page(begins: str, ends: str) -> list[str]:
    """The words in backticks between two places of the first guide."""
    text = guides.text("index.md").replace("\n", " ")
    return re.findall(r"`([A-Za-z_0-9]+)`", text[text.index(begins) : text.index(ends)])


def test_the_first_guide_names_the_heads_that_are_known_by_their_names() -> None:
    strong = named_by_the_page("by their names:", "; and, where")
    weak = named_by_the_page("; and, where", "A last layer of any")
    other = [*named_by_the_page("A last layer of any", "The warning prints"), "3"]
    assert len(strong) == 6 and len(weak) == 7 and {"fc3", "l3", "advantage"} <= {*other}
    for name in (*strong, *weak):
        last = Of(body=mlp(8, D), **{name: nn.Linear(D, 10)})
        table = nm.routes_for(last)
        assert table[f"{name}.weight"] == nm.Route("adamw") and table.unsure() == {}, name
        inside = Of(body=Of(**{name: nn.Linear(8, 24)}, b=nn.Linear(24, D)), end=nn.Linear(D, 10))
        is_head = nm.routes_for(inside)[f"body.{name}.weight"] == nm.Route("adamw")
        assert is_head == (name in strong), name
    for name in other:
        if name == "Sequential":
            continue
        table = nm.routes_for(Of(body=mlp(8, D), **{name: nn.Linear(D, 10)}))
        assert table[f"{name}.weight"] == nm.Route(), name
        assert list(table.unsure()) == [f"{name}.weight"], name


def test_the_first_guide_prints_the_table_that_its_model_has() -> None:
    model = nn.Sequential(
        nn.Embedding(64, 32), nn.Flatten(), nn.Linear(8 * 32, 64), nn.ReLU(), nn.Linear(64, 64)
    )
    assert f"```\n{nm.routes_for(model)}\n```" in guides.text("index.md")
