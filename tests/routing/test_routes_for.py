"""`routes_for`: what is read from the modules of a model, and that every part gets the update of a
parameter of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.routing.torchtitan_model import Transformer

Tensors = dict[str, Tensor]
TOLERANCE = 5e-7  # seen 2.4e-7: products over another number of matrices


def named(model: nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stepped(
    params: Tensors, routes: dict[str, nm.Route] | None, config: nm.Config, grads: list[Tensors]
) -> Tensors:
    plan = nm.make_plan(params, replace(config, orthogonalize_dtype=torch.float32), routes=routes)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for grad in grads:
        params, state, _, _ = nm.update(params, grad, state, hyper, plan)
    return params


def gradients(params: Tensors) -> list[Tensors]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.randn(p.shape, generator=generator)
            * torch.rand((len(p), *[1] * (p.ndim - 1)), generator=generator)
            for name, p in params.items()
        }
        for _ in range(2)
    ]


def assert_parts_step_alone(
    model: nn.Module, parts: dict[str, list], table: nm.RouteTable, config: nm.Config | None = None
) -> None:
    """``parts``: for every matrix the functions that cut it into what a model with separate
    parameters would have.
    """
    config = config or nm.Config.preset(
        "dion"
    )  # whose scale depends on the shape: a wrong cut shows
    params = named(model)
    assert {name for name, route in table.items() if route.algorithm == "normuon"} == set(parts)
    grads = gradients(params)
    together = stepped(params, table, config, grads)
    for name, cuts in parts.items():
        for cut in cuts:
            alone = {"w": cut(params[name]).clone()}
            own = stepped(
                alone, None, config, [{"w": cut(grad[name]).contiguous()} for grad in grads]
            )["w"]
            torch.testing.assert_close(cut(together[name]), own, rtol=0, atol=TOLERANCE)


def whole(w: Tensor) -> Tensor:
    return w


def rows(*sizes: int) -> list:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [lambda w, a=a, n=n: w[..., a : a + n, :] for a, n in zip(starts, sizes, strict=True)]


def turned(cuts: list) -> list:
    return [lambda w, cut=cut: cut(w.mT).contiguous() for cut in cuts]


def flat(w: Tensor) -> Tensor:
    return w.flatten(1)


# -------------------------------------------------------------------------- modules of torch itself


class Everything(nn.Module):
    """One of each kind; named so that no name helps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(20, 12)
        self.b = nn.Conv1d(3, 8, 3)
        self.c = nn.Conv2d(4, 8, 3)
        self.d = nn.Conv3d(2, 6, (1, 2, 3))
        self.e = nn.Conv2d(8, 8, 3, groups=8)
        self.f = nn.ConvTranspose2d(4, 6, 2)
        self.g = nn.MultiheadAttention(12, 3)
        self.h = nn.LSTM(12, 8)
        self.i = nn.GRUCell(12, 8)
        self.j = nn.Linear(12, 10)
        self.k = nn.Bilinear(3, 4, 5)
        self.l = nn.BatchNorm2d(4)
        self.m = nn.RMSNorm(12)
        self.n = nn.Parameter(torch.randn(3, 8, 12))
        self.o = nn.EmbeddingBag(9, 4)
        self.p = nn.Linear(12, 10)
        self.p.requires_grad_(False)
        self.q = nn.Linear(12, 20, bias=False)  # as many outputs as the embedding has rows
        self.pos_embed = nn.Parameter(torch.randn(5, 12))
        self.r = nn.Linear(1, 9, bias=False)
        self.register_buffer("s", torch.randn(4, 4))


EVERYTHING = {
    "b.weight": [flat],
    "c.weight": [flat],
    "d.weight": [flat],
    "k.weight": [flat],
    "j.weight": [whole],
    "f.weight": [lambda w: w.flatten(1).mT.contiguous()],
    "g.in_proj_weight": rows(12, 12, 12),
    "g.out_proj.weight": [whole],
    "h.weight_ih_l0": rows(8, 8, 8, 8),
    "h.weight_hh_l0": rows(8, 8, 8, 8),
    "i.weight_ih": rows(8, 8, 8),
    "i.weight_hh": rows(8, 8, 8),
    "n": [lambda w, k=k: w[k] for k in range(3)],
}


def test_every_kind_of_module_is_told_by_type_and_each_part_steps_as_a_parameter_of_its_own() -> (
    None
):
    torch.manual_seed(0)
    model = Everything()
    table = nm.routes_for(model)
    assert_parts_step_alone(model, EVERYTHING, table)
    adamw = {
        "a.weight",
        "e.weight",
        "l.weight",
        "m.weight",
        "o.weight",
        "q.weight",
        "pos_embed",
        "r.weight",
    }
    biases = {name for name in table if "bias" in name}
    assert {name for name, route in table.items() if route.algorithm == "adamw"} - biases == adamw
    assert {name for name, route in table.items() if route.algorithm == "frozen"} == {
        "p.weight", "p.bias", "s", "l.running_mean", "l.running_var", "l.num_batches_tracked",
    }  # fmt: skip


def test_the_table_explains_itself_and_the_plan_says_why() -> None:
    table = nm.routes_for(Everything())
    text = str(table)
    for line in (
        r"a.weight +20x12 +Embedding +adamw +embedding$",
        r"c.weight +8x4x3x3 +Conv2d +normuon flatten +Conv2d, flattened to 8x36$",
        r"e.weight +8x1x3x3 +Conv2d +adamw +depthwise Conv2d",
        r"f.weight +4x6x2x2 +ConvTranspose2d +normuon flatten transposed +"
        r".*flattened to 4x24: the rows are inputs$",
        r"g.in_proj_weight +36x12 +MultiheadAttention +normuon splits 12\+12\+12 of rows +"
        r"fused qkv of MultiheadAttention$",
        r"h.weight_hh_l0 +32x8 +LSTM +normuon splits 8\+8\+8\+8 of rows +LSTM; 4 gates of 8$",
        r"q.weight +20x12 +Linear +adamw +output head: as many outputs as a has rows$",
        r"p.weight +10x12 +Linear +frozen \(then normuon\) +requires_grad=False$",
        r"s +4x4 +Everything +frozen +buffer$",
        r"pos_embed +5x12 +Everything +adamw +table of vectors, by name$",
        r"r.weight +9x1 +Linear +adamw +vector$",
    ):
        assert re.search(line, text, re.MULTILINE), line
    model = Everything()
    assert re.search(
        r"q.weight .*adamw.*as many outputs as a has rows",
        str(nm.make_plan(named(model), routes=table)),
    )


def test_tied_weights_have_one_route_under_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 30, bias=False)
            self.table = nn.Embedding(30, 8)
            self.inner.weight = self.table.weight
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight
            self.hidden = nn.Linear(8, 6, bias=False)
            self.lm_head = nn.Linear(8, 6, bias=False)
            self.lm_head.weight = self.hidden.weight

    model = Tied()
    table = nm.routes_for(model)
    assert [name for name, _ in model.named_parameters()] == [
        "inner.weight",
        "first.weight",
        "hidden.weight",
    ]
    assert table["hidden.weight"] == table["lm_head.weight"] == nm.Route("adamw")
    assert table["inner.weight"] == table["table.weight"] == nm.Route("adamw")
    assert table["first.weight"] == table["second.weight"] == nm.Route()
    assert "one tensor: inner.weight, table.weight" in str(table)
    for names in (("inner.weight", "first.weight"), ("table.weight", "second.weight")):
        plan = nm.make_plan(
            {name: model.get_parameter(name).detach() for name in names}, routes=table
        )
        assert [p.route.algorithm for p in plan.parameters] == ["adamw", "normuon"]


def test_adapters_step_each_factor_and_leave_the_frozen_rest() -> None:
    class Adapted(nn.Module):  # named as PEFT does
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(12, 16).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(12, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})
            self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(4, 30))})
            self.lora_magnitude_vector = nn.ParameterDict(
                {"default": nn.Parameter(torch.randn(16))}
            )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = Adapted()  # whose factors are no fused projections

    model = Model()
    table = nm.routes_for(model)
    assert_parts_step_alone(
        model, {f"qkv_proj.lora_{x}.default.weight": [whole] for x in "AB"}, table
    )
    assert (
        table["qkv_proj.base_layer.weight"]
        == nm.Route("frozen")
        == table["qkv_proj.base_layer.bias"]
    )
    assert (
        table["qkv_proj.lora_embedding_A.default"]
        == table["qkv_proj.lora_magnitude_vector.default"]
        == nm.Route("adamw")
    )


def test_overrides_come_first_and_must_match() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    slow = nm.Route("normuon", lr_mul=0.1)
    table = nm.routes_for(model, {"1.*": slow, lambda name, t: t.ndim == 1: nm.Route("frozen")})
    assert table == {
        "0.weight": nm.Route(),
        "0.bias": nm.Route("frozen"),
        "1.weight": slow,
        "1.bias": slow,
    }
    assert "overrides['1.*']" in str(table)
    with pytest.raises(ValueError, match=r"overrides: \['2.weight'\] match no parameter"):
        nm.routes_for(model, {"2.weight": slow})
    with pytest.raises(TypeError, match="expected a Route, got 'adamw'"):
        nm.routes_for(model, {"1.weight": "adamw"})  # type: ignore[dict-item]


def test_vectors_keep_their_size_if_asked() -> None:
    table = nm.routes_for(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(5, 8)), decay_vectors=False
    )
    assert {name for name, route in table.items() if route.wd_mul == 0} == {
        "0.bias",
        "1.weight",
        "1.bias",
    }


def test_a_plan_takes_a_part_of_the_model_but_no_names_of_another() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    table = nm.routes_for(model)
    assert len(nm.make_plan({"1.weight": torch.randn(8, 8)}, routes=table).parameters) == 1
    with pytest.raises(
        ValueError,
        match=r"params\['module.0.weight'\]: routes_for\(\) was given a model without it",
    ):
        nm.make_plan({"module.0.weight": torch.randn(8, 8)}, routes=table)
    merged = {**table, "extra": nm.Route("adamw")}
    assert (
        nm.make_plan({**named(model), "extra": torch.randn(4, 4)}, routes=merged).names[-1]
        == "extra"
    )
    table["1.weight"] = nm.Route("frozen")
    plan = nm.make_plan(named(model), routes=table)
    assert [p.route.algorithm for p in plan.parameters] == ["normuon", "adamw", "frozen", "adamw"]


def test_what_is_no_module_or_has_no_shape_yet_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        nm.routes_for({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.weight: has no shape yet"):
        nm.routes_for(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(ValueError, match=r"0\.running_mean: has no shape yet"):
        nm.routes_for(nn.Sequential(nn.LazyBatchNorm1d(affine=False)))


# --------------------------------------------------------------------------------------- torchtitan


def test_a_torchtitan_model_is_read_by_its_names_and_sizes() -> None:
    torch.manual_seed(0)
    model = Transformer()
    table = nm.routes_for(model)
    block = {f"layers.0.attention.{name}.weight": [whole] for name in ("wq", "wk", "wv", "wo")}
    block |= {f"layers.0.feed_forward.{name}.weight": [whole] for name in ("w1", "w2", "w3")}
    experts = {
        f"layers.1.moe.experts.{name}": [lambda w, k=k: w[k] for k in range(4)]
        for name in ("w1", "w2", "w3")
    }
    fused = {
        "layers.1.attention.wqkv.weight": rows(24, 8, 8),
        "layers.1.attention.wo.weight": [whole],
    }
    assert_parts_step_alone(model, block | experts | fused, table)
    reasons = {name: entry.reason for name, entry in table.entries.items()}
    assert (
        reasons["tok_embeddings.weight"] == "embedding"
        and reasons["output.weight"] == "output head, by name"
    )
    assert reasons["layers.1.moe.router.gate.weight"] == "router: logits of 4 experts"
    assert reasons["layers.1.attention.wqkv.weight"] == "fused qkv: 6 heads of 4, 2 of k and v"
    assert reasons["layers.1.moe.experts.w1"] == "4 experts"


def test_experts_stored_by_inputs_are_told_by_the_models_width() -> None:
    model = Transformer(by_inputs=True)
    table = nm.routes_for(model)
    assert all(
        table[f"layers.1.moe.experts.{name}"] == nm.Route(transposed=True)
        for name in ("w1", "w2", "w3")
    )
    assert "4 experts, stored [inputs, outputs]" in str(table)


@pytest.mark.parametrize(
    ("heads", "outputs", "expected"),
    [
        ({"num_heads": 4}, 36, nm.Route(splits=(12, 12, 12))),
        ({"num_heads": 6, "num_kv_heads": 3}, 24, nm.Route(splits=(12, 6, 6))),
        ({"n_head": 6, "head_dim": 4, "n_kv_head": 1}, 32, nm.Route(splits=(24, 4, 4))),
        ({"num_heads": 5}, 36, nm.Route()),  # does not add up
        ({"num_heads": 4, "head_dim": 8}, 40, nm.Route()),
        ({}, 36, nm.Route(splits=(12, 12, 12))),
        ({}, 24, nm.Route()),  # nothing is known
    ],
)
def test_fused_projections_are_split_where_the_sizes_add_up_and_else_left_whole(
    heads: dict[str, int], outputs: int, expected: nm.Route
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, outputs)
            for name, value in heads.items():
                setattr(self, name, value)

    table = nm.routes_for(Attention())
    assert table["qkv.weight"] == expected
    assert ("left whole" in str(table)) == (expected == nm.Route())


def test_wrapped_and_parametrized_modules_are_what_they_wrap() -> None:
    class Attention(nn.Module):
        num_heads = 3

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.utils.parametrizations.weight_norm(nn.Linear(12, 36, bias=False))

    table = nm.routes_for(nn.ModuleDict({"module": Attention()}))
    assert table["module.qkv.parametrizations.weight.original1"] == nm.Route(splits=(12, 12, 12))
    assert table["module.qkv.parametrizations.weight.original0"] == nm.Route("adamw")
