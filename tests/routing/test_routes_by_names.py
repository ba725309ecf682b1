"""Names and shapes alone: which parameters get which rule, and how sure that is."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.routing.doubts import warn_at_caller, warning_text
from normuon_fn.routing.names import by_names
from normuon_fn.routing.resolve import decide_routes

D, F, V = 64, 256, 1000
BLOCK = {"attn.q": (D, D), "attn.k": (D, D), "attn.o": (D, D), "mlp.up": (F, D), "mlp.down": (D, F)}


def decided(
    before: dict[str, tuple], after: dict[str, tuple], inside: dict[str, tuple] | None = None
):
    """The decisions for two blocks with what stands before, after and inside them."""
    shapes = dict(before)
    for k in range(2):
        shapes |= {f"layers.{k}.{name}.weight": shape for name, shape in BLOCK.items()}
        shapes |= {f"layers.{k}.{name}": shape for name, shape in (inside or {}).items()}
        shapes |= {f"layers.{k}.norm.weight": (D,)}
    shapes |= after
    return by_names({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


HEAD = {"lm_head.weight": (V, D)}
EMBED = {"embed_tokens.weight": (V, D)}


@pytest.mark.parametrize(
    "name",
    ["tok.weight", "token.weight", "shared.weight", "W_E", "embed.W_E", "wte.weight",
     "word_embeddings.weight",
     "emb.weight", "model.embed_tokens.weight", "vocab_embed.weight", "token_table.weight",
     "embedder.weight",
     "module.tok.weight", "_orig_mod.tok.weight", "char_emb.weight", "transformer.wpe.weight",
     "lut.weight", "a.weight", "pos.weight"],
)  # fmt: skip
def test_what_is_looked_up_by_number_gets_adamw(name: str) -> None:
    assert decided({name: (V, D)}, HEAD)[name].route == nm.Route("adamw")


@pytest.mark.parametrize(
    "name",
    ["output.weight", "score.weight", "classifier.weight", "decoder.weight", "to_logits.weight",
     "qa_outputs.weight",
     "proj_out.weight", "lm_head.weight", "head_dist.weight", "unembed.W_U", "fc.weight",
     "logits.weight",
     "to_logits.1.weight", "mlp_head.1.weight", "heads.0.weight", "policy_head.weight",
     "vocab_proj.weight",
     "output_projection.weight", "codebooks_head.weight", "generator.proj.weight",
     "readout.weight", "last.weight"],
)  # fmt: skip
@pytest.mark.parametrize("outputs", [V, 2])
def test_an_output_head_behind_the_blocks_gets_adamw(name: str, outputs: int) -> None:
    if name == "generator.proj.weight" and outputs == 2:
        pytest.skip("named as a projection, and without a vocabulary: nothing tells")
    assert decided({"tok_embeddings.weight": (V, D)}, {name: (outputs, D)})[
        name
    ].route.algorithm == ("adamw")


@pytest.mark.parametrize("own", ["head_proj", "head_mixer", "emb_gate", "token_mixer",
"embed_proj", "heads_mix",
                                 "pos_proj", "out_proj", "output", "score", "decoder", "fc",
                                 "tok_mlp"])  # fmt: skip
def test_a_projection_inside_a_block_is_a_matrix_whatever_its_first_word(own: str) -> None:
    for shape in ((D, D), (F, D)):
        found = decided(EMBED, HEAD, {f"mixer.{own}.weight": shape})
        assert found[f"layers.0.mixer.{own}.weight"] == (nm.Route(), "matrix", "certain")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cls_token", (1, 1, D)), ("mask_token", (1, D)), ("mask_token", (D, 1)), ("register_tokens",
     (4, D)),
     ("register_tokens", (1, 4, D)), ("pos_embed", (1, 17, D)), ("pos_table", (17, D)),
     ("dist_token", (1, 1, D)),
     ("layers.0.gamma", (D, 1, 1)), ("layers.0.ls1.scale", (1, D, 1, 1)),
     ("layers.0.conv.weight_g", (D, 1, 1)),
     ("layers.0.fc.parametrizations.weight.original0", (D, 1)), ("latents", (8, D)),
     ("level_embed", (4, D)),
     ("layers.0.attn.rel_pos_h", (27, 16)), ("layers.0.attn.relative_position_bias_table", (49, 4)),
     ("query_tokens", (1, 8, D)), ("layers.0.experts.up_bias", (4, F)), ("layers.0.attn.A_log",
     (D, 16)),
     ("scale_shift_table", (6, D)), ("temperature", (1, 1)), ("prompt", (5, D))],
)  # fmt: skip
def test_vectors_in_disguise_and_tables_of_vectors_get_adamw(name: str, shape: tuple) -> None:
    found = decided({**EMBED, name: shape}, HEAD)[name]
    assert found.route == nm.Route("adamw") and found.certainty == "certain"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("input_embeds_layer.weight", (V, D)), ("position_embeds_layers.0.weight", (128, D)),
     ("embed_global.weight", (32, D)), ("embed_tokens_per_layer.weight", (V, 4 * D)),
     ("codebooks_head.weight", (5, D, V)),
     ("bbox_head.layers.2.weight", (4, D)), ("bbox_embed.0.layers.1.weight", (4, D)),
     ("class_labels_classifier.layers.0.weight", (3, D)), ("box_head.layer3.weight", (4, D)),
     ("flow_head.final_layer.proj.weight", (5, D)),
     ("layers.0.mamba.D", (2, D))],
)  # fmt: skip
def test_embeddings_and_heads_of_several_layers_are_told_by_the_modules_around_them(
    name: str, shape: tuple
) -> None:
    log = {"layers.0.mamba.A_log": (D, 16)} if name.endswith(".D") else {}
    found = decided(EMBED, {name: shape} | log)[name]
    assert found.route == nm.Route("adamw") and found.certainty == "certain"


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [("vision_embed_tokens.weight", (999, 700), "adamw"),  # a Linear for patches, mostly
     ("decoder_embed.weight", (F, D), "normuon"),
     ("box_linear_embeddings.weight", (3 * D, D), "adamw"),
     ("xpath_embeddings.weight", (D, 48), "adamw"),
     ("query.weight", (100, D), "adamw"), ("query_feat.weight", (100, D), "adamw"),
     ("reference_points.weight", (100, 4), "adamw"), ("projector.query", (100, D), "adamw"),
     ("embed_positions.pe_k.weight", (320, 16), "adamw"), ("bias_values.weight", (999, 4), "adamw"),
     ("order_head.0.weight", (D, D), "adamw"), ("head.weight", (D, D), "adamw"),
     ("sub.dit_model.proj_out.weight", (80, D), "adamw"),
     ("layers.0.attn.relative_pos_embeddings.weight", (D // 2, D), "adamw"),
     ("layers.0.sconv.static_weight", (4, D), "adamw"), ("hc.mixing", (3, 4 * D), "adamw"),
     ("layers.0.mlp.gate.router_mlp.out_proj.weight", (5, D), "adamw"),
     ("layers.0.altup.modality_router.weight", (4, D), "adamw"),
     ("layers.0.experts.lora_A.default.weight", (4 * 4, D), "normuon")],
)  # fmt: skip
def test_what_a_name_and_a_shape_leave_open_is_doubted_and_not_certain(
    name: str, shape: tuple, rule: str
) -> None:
    found = decided({**EMBED, name: shape}, HEAD)[name]
    assert found.route.algorithm == rule and found.certainty != "certain"


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [("q.lora_A.default.weight", (4, D), "normuon"), ("q.lora_B.default.weight", (D, 4), "normuon"),
     ("q.lora_A", (4, D), "normuon"), ("q.hada_w1_a.default", (D, 4), "normuon"),
     ("q.oft_R.default.weight", (6, 66), "adamw"), ("q.c3a_kernel.default", (6, 6, 8), "adamw"),
     ("q.boft_R.default", (2, 6, 4, 4), "adamw"), ("q.hra_u.default", (D, 8), "adamw"),
     ("q.vblora_logits_A.default", (4, 6, 8), "adamw"),
     ("q.lora_embedding_A.default", (8, V), "adamw")],
)  # fmt: skip
def test_adapters_are_told_by_what_their_methods_call_them(
    name: str, shape: tuple, rule: str
) -> None:
    found = decided(EMBED, HEAD, {name: shape})[f"layers.0.{name}"]
    assert found.route == nm.Route(rule) and found.certainty == "certain"


def test_lora_of_an_output_head_gets_the_rules_of_its_sides() -> None:
    sides = {"lm_head.lora_A.default.weight": (8, D), "lm_head.lora_B.default.weight": (V, 8)}
    found = decided(EMBED, HEAD | sides)
    assert [found[name].route.algorithm for name in sides] == ["normuon", "adamw"]


@pytest.mark.parametrize(
    ("name", "shape"), [("inner2emb.weight", (D, F)), ("layers.0.attn.query", (D, D)),
     ("rnn.weight_ih_l0", (F, 3))],
)  # fmt: skip
def test_what_only_resembles_a_table_is_a_matrix(name: str, shape: tuple) -> None:
    found = decided({**EMBED, name: shape}, HEAD)[name]
    assert found.route == nm.Route() and found.certainty == "certain"


@pytest.mark.parametrize("name", ["patch_embedding", "patch_embed", "patch_embeddings"])
def test_a_patch_embedding_is_a_projection_of_pixels_and_no_table(name: str) -> None:
    """Its inputs are continuous and its rows neurons, as those of any first layer: NorMuon. Nothing
    is looked up in it by number, which is why tables get AdamW. By name that is likely, by the
    module it is certain."""
    for leaf in (f"{name}.weight", f"{name}.projection.weight", f"{name}.proj.weight", name):
        pixels = decided({leaf: (D, 3 * 16 * 16)}, {"head.weight": (10, D)})[leaf]
        assert pixels.route == nm.Route(), leaf
    windows = decided({f"{name}.proj.weight": (D, 3, 16, 16)}, {"head.weight": (10, D)})
    assert windows[f"{name}.proj.weight"].route == nm.Route(flatten=True)
    for layer in (nn.Linear(3 * 16 * 16, D), nn.Conv2d(3, D, 16, 16)):
        model = nn.ModuleDict({name: layer, "blocks": nn.Linear(D, D), "head": nn.Linear(D, 10)})
        entry = nm.routes_for(model).entries[f"{name}.weight"]
        assert entry.route.algorithm == "normuon" and entry.certainty == "certain"


def test_a_layer_norm_of_two_dimensions_is_told_by_its_bias() -> None:
    found = decided({**EMBED, "a.weight": (5, D), "a.bias": (5, D)}, HEAD)
    assert found["a.weight"].route == found["a.bias"].route == nm.Route("adamw")


def test_routers_are_told_by_the_experts_beside_them() -> None:
    stack = {"mlp.router.weight": (6, D), "mlp.experts.up": (6, F, D)}
    listed = {"moe.gate.weight": (3, D)} | {f"moe.experts.{k}.up.weight": (F, D) for k in range(3)}
    found = decided(EMBED, HEAD, stack | listed)
    assert found["layers.0.mlp.router.weight"] == (
        nm.Route("adamw"),
        "router: logits of 6 experts",
        "certain",
    )
    assert found["layers.1.moe.gate.weight"].route == nm.Route("adamw")
    assert (
        found["layers.0.mlp.experts.up"].route
        == found["layers.0.moe.experts.0.up.weight"].route
        == nm.Route()
    )
    gate = decided(EMBED, HEAD, {"attn.gate.weight": (D, D)})["layers.0.attn.gate.weight"]
    assert gate.route == nm.Route()


def test_the_members_of_an_ensemble_keep_their_vectors() -> None:
    models = [nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    found = decide_routes(params, {})
    assert {name for name, d in found.items() if d.route.algorithm == "normuon"} == {
        "0.weight",
        "2.weight",
    }
    assert nm.make_plan(params, routes={"2.weight": nm.Route()}).parameters  # a plan takes them
    table = nm.routes_for(models[0])
    assert {name: d.route for name, d in decide_routes(params, table).items()} == dict(table)


class Gated(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.up = nn.Linear(D, F, bias=bias)
        self.gate = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_scalar_of_every_member_and_norms_without_biases_are_those_of_an_ensemble(
    bias: bool,
) -> None:
    params, _ = torch.func.stack_module_state([Gated(bias) for _ in range(4)])
    found = decide_routes(params, {})
    assert {name for name, d in found.items() if d.route.algorithm == "normuon"} == {"up.weight"}
    assert all("one per member of an ensemble" in d.reason for d in found.values())


@pytest.mark.parametrize("name", ["layers.norm1.weight", "ln_f.weight", "layers.q_norm.weight"])
def test_norms_that_are_stacked_over_layers_are_no_matrix(name: str) -> None:
    found = decided({**EMBED, name: (12, D), "layers.up.weight": (12, F, D)}, HEAD)
    assert found[name].route == nm.Route("adamw") and found[name].certainty == "untold"
    assert found["layers.up.weight"].route == nm.Route()


@pytest.mark.parametrize(
    "name", ["norm_proj", "norm_gate", "ln_cond", "norm_modulation", "norm_to_q", "bn", "bn_down"]
)
def test_layers_with_a_norm_in_their_name_are_matrices(name: str) -> None:
    found = decided({**EMBED, f"layers.0.{name}.weight": (F, D)}, HEAD)
    assert found[f"layers.0.{name}.weight"].route == nm.Route()
    biased = {"layers.0.norm1.weight": (F, D), "layers.0.norm1.bias": (F,)}
    assert decided({**EMBED, **biased}, HEAD)["layers.0.norm1.weight"].route == nm.Route()


@pytest.mark.parametrize(
    "shapes",
    [
        {"c1.weight": (32, 16, 3), "c1.bias": (32,), "n1.gamma": (32, 1), "c2.weight": (32, 32, 3)},
        {"q.weight": (D, D), "q.bias": (D,), "rel_pos_bias": (D, 15), "conv.weight": (D, 1, 3)},
    ],
)
def test_a_bias_of_one_dimension_tells_that_there_is_no_ensemble(shapes: dict) -> None:
    assert not any("ensemble" in found.reason for found in decided(shapes, {}).values())


def test_a_convolution_of_an_ensemble_is_not_flattened_over_its_members() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)) for _ in range(2)]
    params, _ = torch.func.stack_module_state(models)
    with pytest.raises(
        ValueError, match=r"params\['0.weight'\]: expected the shape \(8, 3, 3, 3\), got \(2, 8"
    ):
        decide_routes(params, nm.routes_for(models[0]))
    assert decide_routes(params, {})["0.weight"].route == nm.Route("adamw")


@pytest.mark.parametrize(
    ("shape", "route"),
    [((D, 3, 7, 7), nm.Route(flatten=True)), ((D, D, 1, 1), nm.Route(flatten=True)), ((D, D, 3),
     nm.Route(flatten=True)),
     ((D, 3, 16, 16), nm.Route(flatten=True)), ((4, F, D), nm.Route()), ((2, 4, F, D), nm.Route())],
)  # fmt: skip
def test_a_window_is_flattened_and_a_stack_is_not(shape: tuple, route: nm.Route) -> None:
    found = decided({**EMBED, "a.weight": shape}, HEAD)["a.weight"]
    assert found.route == route and found.certainty == ("likely" if route.flatten else "certain")


def test_depthwise_filters_get_adamw_and_the_first_convolution_of_one_channel_does_not() -> None:
    shapes = {
        "conv1.weight": (32, 1, 3, 3),
        "blocks.0.dw.weight": (32, 1, 3, 3),
        "blocks.0.pw.weight": (64, 32, 1, 1),
    }
    found = by_names({name: torch.empty(shape) for name, shape in shapes.items()})
    assert [d.route for d in found.values()] == [
        nm.Route(flatten=True), nm.Route("adamw"), nm.Route(flatten=True),
    ]  # fmt: skip


def test_what_names_and_shapes_settle_is_said_by_no_warning() -> None:
    found = decided(
        {"tok_embeddings.weight": (V, D), "pos_emb.weight": (128, D)}, {"output.weight": (V, D)}
    )
    assert warning_text(found) is None


def test_the_two_ends_of_a_model_with_the_same_shape_are_doubted_whatever_their_names() -> None:
    shapes = {"a.weight": (V, D), "b.weight": (D, D), "c.weight": (D, D), "d.weight": (V, D)}
    found = by_names({name: torch.empty(shape) for name, shape in shapes.items()})
    assert [d.certainty for d in found.values()] == ["untold", "certain", "certain", "untold"]


def test_one_text_names_every_doubt_the_rule_it_got_and_the_line_to_write() -> None:
    found = decided(
        {"words.weight": (V * 10, D)}, {"last_one.weight": (7, D)}, {"x.head.weight": (D, D)}
    )
    text = warning_text(found)
    assert text is not None
    assert (
        "words.weight: got adamw (vocabulary of 10000, by shape); "
        'otherwise "words.weight": nm.Route()' in text
    )
    assert (
        "last_one.weight: got normuon (matrix: the last layer, which may be an output head); "
        'otherwise "last_one.weight": nm.Route("adamw")' in text
    )
    assert "layers.1.x.head.weight" in text and "attn.q" not in text
    assert "routes=nm.routes_for(model)" in text


def test_the_layers_of_a_head_before_its_last_are_matrices() -> None:
    shapes = {"head.0.weight": (F, D), "head.2.weight": (D, F), "head.4.weight": (5, D)}
    found = decided(EMBED, shapes)
    assert [found[name].route.algorithm for name in shapes] == ["normuon", "normuon", "adamw"]
    parallel = decided(EMBED, {f"heads.{k}.weight": (V, D) for k in range(3)})
    assert {parallel[f"heads.{k}.weight"].route.algorithm for k in range(3)} == {"adamw"}


def test_the_time_is_linear_in_the_number_of_parameters() -> None:
    """By counting what is called and not by a clock."""
    import cProfile
    import pstats

    def calls(n: int) -> int:
        shapes = {
            f"layers.{k}.{name}.weight": shape for k in range(n) for name, shape in BLOCK.items()
        }
        params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        profile = cProfile.Profile()
        profile.runcall(
            decide_routes, params, {f"layers.{k}.attn.q.weight": nm.Route() for k in range(n)}
        )
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    assert calls(80) < 9 * calls(10)


def test_a_warning_stands_at_the_line_of_the_first_caller_outside_the_package() -> None:
    code = compile(
        "def inside(say):\n    say('words')\n", nm.__file__.replace("__init__", "inside"), "exec"
    )
    names: dict = {}
    exec(code, names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["inside"](warn_at_caller)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert [(w.filename, w.lineno, str(w.message)) for w in caught] == [(__file__, line, "words")]


def test_a_small_network_without_blocks_has_no_vocabulary_and_its_parts_are_told_alike() -> None:
    shapes = {"up.weight": (12, 6), "down.weight": (6, 12), "square.weight": (6, 6)}
    params = {name: torch.empty(shape) for name, shape in shapes.items()}
    together = by_names(params)
    assert {d.route for d in together.values()} == {nm.Route()} and warning_text(together) is None
    for name, tensor in params.items():
        assert by_names({name: tensor})[name].route == together[name].route
