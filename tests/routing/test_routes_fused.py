"""Projections fused in one matrix: where the parts are, or why the matrix is left whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normuon_fn as nm
from tests.routing.test_routes_for import assert_parts_step_alone, rows, whole

D = 24


def owner(name: str = "Mixer", /, **attributes: object) -> nn.Module:
    """A module of a class of that name with those attributes; (outputs, inputs) are a layer."""
    module = type(name, (nn.Module,), {})()
    for key, value in attributes.items():
        layer = isinstance(value, tuple) and len(value) == 2 and not key.endswith("sizes")
        setattr(module, key, nn.Linear(value[1], value[0], bias=False) if layer else value)  # type: ignore[index]
    return module


def route(module: nn.Module, name: str, **options: bool) -> tuple[nm.Route, str]:
    entry = nm.routes_for(module, **options).entries[name]
    return entry.route, entry.reason


@pytest.mark.parametrize(
    ("first", "second"),
    [("input_linear", "output_linear"), ("fc1", "fc2"), ("w_in", "w_out"), ("Wi", "Wo"), ("w12",
     "w3"),
     ("linear1", "linear2"), ("gate_up_proj", "down_proj"), ("ff_proj", "ff_out"), ("linear_fc1",
     "linear_fc2"),
     ("up_proj", "down_proj")],
)  # fmt: skip
def test_gate_and_up_in_one_are_told_by_the_layer_that_takes_in_half(
    first: str, second: str
) -> None:
    model = owner("MLP", **{first: (80, D), second: (D, 40)})
    assert_parts_step_alone(
        model, {f"{first}.weight": rows(40, 40), f"{second}.weight": [whole]}, nm.routes_for(model)
    )
    plain = owner("MLP", **{first: (80, D), second: (D, 80)})
    assert route(plain, f"{first}.weight")[0] == nm.Route()


def test_gate_and_up_of_stacked_experts_and_of_lists_are_told_too() -> None:
    class Parallel(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(*shape))

    moe = owner("MoE", input_linear=Parallel(4, 80, D), output_linear=Parallel(4, D, 40))
    assert route(moe, "input_linear.weight")[0] == nm.Route(splits=(40, 40))
    queries = owner("MoA", input_linear=Parallel(4, 40, D), output_linear=Parallel(4, D, 40))
    assert route(queries, "input_linear.weight")[0] == nm.Route()
    glu = nn.Sequential(nn.Linear(D, 80), nn.GLU(), nn.Linear(40, D))
    assert route(glu, "0.weight")[0] == nm.Route(splits=(40, 40))
    geglu = nn.ModuleList([owner("GEGLU", proj=(80, D)), nn.Dropout(), nn.Linear(40, D)])
    assert route(geglu, "0.proj.weight")[0] == nm.Route(splits=(40, 40))


@pytest.mark.parametrize(
    "heads",
    [{"num_heads": 6, "num_key_value_heads": 2}, {"h": 6, "kv": 2}, {"heads": 6, "kv_heads": 2},
     {"nh": 6, "nkv": 2},
     {"n_head": 6, "n_kv": 2}, {"n_heads": 6, "n_kv_heads": 2}, {"nheads": 6, "num_kv": 2},
     {"config": SimpleNamespace(n_head=6, n_kv=2)}, {"args": SimpleNamespace(heads=6, kv_heads=2)}],
)  # fmt: skip
@pytest.mark.parametrize("own", ["qkv", "in_proj", "Wqkv", "qkv_proj", "to_qkv"])
def test_q_k_and_v_in_one_are_split_by_the_head_counts_of_research_code(
    own: str, heads: dict
) -> None:
    model = owner("Attention", **{own: (40, D)}, **heads)
    assert route(model, f"{own}.weight")[0] == nm.Route(splits=(24, 8, 8))
    assert route(model, f"{own}.weight", per_head=True)[0] == nm.Route(
        splits=(24, 8, 8), heads=(6, 2, 2)
    )


def test_separate_projections_have_the_heads_of_research_code() -> None:
    for heads in ({"h": 6, "kv": 2}, {"nh": 6, "nkv": 2}, {"heads": 6, "n_kv": 2}):
        table = nm.routes_for(
            owner("Attention", wq=(24, D), wk=(8, D), wv=(8, D), **heads), per_head=True
        )
        assert [table[f"{name}.weight"].heads for name in ("wq", "wk", "wv")] == [6, 2, 2]


def test_without_a_count_the_output_projection_tells_how_wide_the_queries_are() -> None:
    assert route(owner("Attention", qkv=(40, D), o_proj=(D, 24)), "qkv.weight")[0] == nm.Route(
        splits=(24, 8, 8)
    )
    assert route(owner("Attention", qkv=(40, D), o_proj=(D, 25)), "qkv.weight")[0] == nm.Route()


def test_a_module_that_declares_its_sizes_is_believed_where_they_add_up() -> None:
    fused = owner("ParallelBlock", fused_sizes=(24, 4, 4, 80), wide=(112, D))
    assert route(fused, "wide.weight")[0] == nm.Route(splits=(24, 4, 4, 80))
    assert (
        route(owner("ParallelBlock", fused_sizes=(24, 4), wide=(112, D)), "wide.weight")[0]
        == nm.Route()
    )


def test_the_projections_of_mamba_are_split_into_what_they_project_to() -> None:
    one = owner("MambaMixer", intermediate_size=48, ssm_state_size=8, time_step_rank=3,
                in_proj=(96, D), x_proj=(19, 48), dt_proj=(48, 3), out_proj=(D, 48))  # fmt: skip
    assert route(one, "in_proj.weight")[0] == nm.Route(splits=(48, 48))
    assert route(one, "x_proj.weight")[0] == nm.Route(splits=(3, 8, 8))
    assert route(one, "dt_proj.weight")[0] == nm.Route()
    two = owner(
        "Mamba2", d_inner=48, d_state=8, ngroups=2, nheads=6, in_proj=(134, D), out_proj=(D, 48)
    )
    assert route(two, "in_proj.weight")[0] == nm.Route(splits=(48, 48, 16, 16, 6))
    unknown = owner("Mamba2", in_proj=(134, D), out_proj=(D, 48))
    assert "left whole" in route(unknown, "in_proj.weight")[1]


def test_q_k_v_and_z_that_take_turns_are_left_whole_and_split_by_head_where_asked() -> None:
    model = owner("GatedDeltaNet", num_k_heads=2, num_v_heads=4, head_k_dim=4, head_v_dim=3,
                  in_proj_qkvz=(40, D), in_proj_ba=(8, D))  # fmt: skip
    for name in ("in_proj_qkvz", "in_proj_ba"):
        whole_route, reason = route(model, f"{name}.weight")
        assert whole_route == nm.Route() and "take turns key head by key head" in reason
    assert route(model, "in_proj_qkvz.weight", per_head=True)[0] == nm.Route(
        splits=(4, 4, 6, 6) * 2
    )
    assert route(model, "in_proj_ba.weight", per_head=True)[0] == nm.Route(splits=(2, 2) * 2)


def test_a_gated_query_says_what_it_is_and_is_split_by_head_where_asked() -> None:
    model = owner(
        "Attention",
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        q_proj=(48, D),
        k_proj=(8, D),
        o_proj=(D, 24),
    )
    plain, reason = route(model, "q_proj.weight")
    assert plain == nm.Route() and "q and its gate, left whole" in reason
    assert route(model, "q_proj.weight", per_head=True)[0] == nm.Route(heads=12)
    assert route(model, "k_proj.weight", per_head=True)[0] == nm.Route(heads=2)


LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "num_heads": 6,
}


@pytest.mark.parametrize(
    "names", [("kv_a_proj_with_mqa", "kv_b_proj", "q_b_proj"), ("wkv_a", "wkv_b", "wq_b")]
)
def test_latent_attention_is_split_by_part_and_by_head(names: tuple[str, str, str]) -> None:
    down, up, query = names
    model = owner("MLA", **LATENT, **{down: (14, D), up: (42, 12), query: (36, 10)})
    assert route(model, f"{down}.weight")[0] == nm.Route(splits=(12, 2))
    plain, reason = route(model, f"{up}.weight")
    assert plain == nm.Route() and "take turns head by head" in reason
    assert route(model, f"{up}.weight", per_head=True)[0] == nm.Route(splits=(4, 3) * 6)
    assert route(model, f"{query}.weight", per_head=True)[0] == nm.Route(heads=6)
    single = owner("MLA", **LATENT, q_proj=(36, D))
    assert route(single, "q_proj.weight", per_head=True)[0] == nm.Route(heads=6)


def test_a_latent_projection_steps_as_its_parts() -> None:
    model = owner("MLA", **LATENT, kv_a_proj_with_mqa=(14, D), kv_b_proj=(42, 12))
    assert_parts_step_alone(
        model,
        {"kv_a_proj_with_mqa.weight": rows(12, 2), "kv_b_proj.weight": rows(*(4, 3) * 6)},
        nm.routes_for(model, per_head=True),
    )


def test_modulations_are_split_into_one_matrix_each() -> None:
    block = owner("DiTBlock", adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D)))
    assert route(block, "adaLN_modulation.1.weight")[0] == nm.Route(splits=(D,) * 6)
    assert route(owner("Model", up=(4 * D, D)), "up.weight")[0] == nm.Route()  # no modulation


def test_an_in_proj_of_no_known_mixer_says_so() -> None:
    assert route(owner("ShortConv", in_proj=(3 * D, D), out_proj=(D, D)), "in_proj.weight")[
        0
    ] == nm.Route(splits=(D,) * 3)
    left = route(owner("Odd", in_proj=(2 * D, D)), "in_proj.weight")
    assert left[0] == nm.Route() and "left whole" in left[1]
    assert route(owner("MLP", in_proj=(2 * D, D), out_proj=(D, 2 * D)), "in_proj.weight") == (
        nm.Route(),
        "matrix",
    )


# -------------------------------------------------------------- parameters of no layer, and routers


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rel_pos_h", (27, 8)), ("rel_pos_w", (27, 8)), ("level_embed", (4, D)), ("latents", (8, D)),
     ("latent_query", (8, D)),
     ("latents_1d", (8, 4)), ("query", (8, D)), ("query_tokens", (1, 8, D)), ("axial_pos", (1, D,
     3, 4)), ("bias_u", (6, 4)),
     ("memory_temporal_positional_encoding", (7, 1, 1, D)), ("relative_position_bias_table", (49,
     6)), ("D", (2, D)),
     ("codebooks_head", (3, D, 50)), ("seg_embed", (2, 6, 4)), ("register_tokens", (4, D)),
     ("bias", (3, D))],
)  # fmt: skip
def test_tables_of_vectors_are_told_beside_matrices_of_the_same_module(
    name: str, shape: tuple
) -> None:
    module = owner("Encoder", num_heads=6, dense=(D, D))
    module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    assert route(module, name)[0] == nm.Route("adamw")


def test_axial_positions_in_a_list_get_adamw() -> None:
    module = owner("AxialPositionEmbeddings")
    module.weights = nn.ParameterList(
        [nn.Parameter(torch.randn(1, 8, 12)), nn.Parameter(torch.randn(8, 1, 12))]
    )
    assert set(nm.routes_for(module).values()) == {nm.Route("adamw")}


def test_an_attention_kept_as_inputs_heads_and_size_is_one_matrix() -> None:
    module = owner("RelativeAttention", n_head=4, d_head=6)
    for name in ("q", "o"):
        module.register_parameter(name, nn.Parameter(torch.randn(D, 4, 6)))
    assert route(module, "q")[0] == nm.Route(flatten=True, transposed=True)
    assert route(module, "o")[0] == nm.Route(flatten=True)


@pytest.mark.parametrize(
    ("rows_", "name"), [(4, "gate"), (5, "gate"), (4, "router"), (6, "router")]
)
def test_a_router_is_told_also_where_its_rows_are_not_the_number_of_experts(
    rows_: int, name: str
) -> None:
    experts = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])
    moe = owner("SparseMoe", experts=experts, **{name: (rows_, D)})
    assert route(moe, f"{name}.weight")[0] == nm.Route("adamw")
    by_class = owner("Block", mlp=owner("TopkRouter", weight=nn.Parameter(torch.randn(rows_, D))))
    assert route(by_class, "mlp.weight")[0] == nm.Route("adamw")


def test_a_gate_as_wide_as_the_model_is_no_router() -> None:
    moe = owner("SparseMoe", experts=nn.ModuleList([nn.Linear(D, D)]), gate=(D, D))
    assert route(moe, "gate.weight")[0] == nm.Route()


def test_experts_kept_below_each_other_are_one_matrix_each() -> None:
    experts = owner("ExpertGLU", moe_num_experts=4, w1=nn.Parameter(torch.randn(4 * 10, D)))
    assert route(owner("Model", experts=experts), "experts.w1")[0] == nm.Route(heads=4)


def test_a_convolution_of_one_output_is_a_vector() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3), nn.ConvTranspose1d(1, 8, 3))
    model.append(nn.Bilinear(3, 4, 1))
    algorithms = [nm.routes_for(model)[f"{k}.weight"].algorithm for k in range(4)]
    assert algorithms == ["normuon", "adamw", "adamw", "adamw"]
