"""Routing, the table that explains it, and every error that bad input raises on the host."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.algorithm import orthogonalize
from normuon_fn.step import local_update_


def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def algorithms(plan: nm.Plan) -> dict[str, str]:
    return {p.name: p.route.algorithm for p in plan.parameters}


def test_matrices_get_normuon_and_everything_else_adamw() -> None:
    params = weights(w=(8, 8), experts=(2, 8, 4), conv=(8, 4, 3, 5), bias=(8,), scalar=())
    expected = {
        "w": "normuon",
        "experts": "normuon",
        "conv": "normuon",
        "bias": "adamw",
        "scalar": "adamw",
    }
    assert algorithms(nm.make_plan(params)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "embed.weight",
        "wte.weight",
        "transformer.wpe.weight",
        "lm_head.weight",
        "head.weight",
        "model.embed_tokens.weight",
        "tok_embeddings.weight",
        "unembed",
        "pos_emb.weight",
        "cls_head.weight",
    ],
)
def test_embeddings_and_heads_get_adamw_by_name(name: str) -> None:
    plan = nm.make_plan({name: torch.randn(8, 4)})
    assert algorithms(plan) == {name: "adamw"} and "by name" in str(plan)


@pytest.mark.parametrize(
    "name",
    ["attn.heads_proj.weight", "overhead.weight", "blocks.0.attn.key.weight", "remember.weight"],
)
def test_names_that_only_contain_such_a_word_are_matrices(name: str) -> None:
    assert algorithms(nm.make_plan({name: torch.randn(8, 4)})) == {name: "normuon"}


def test_routes_match_names_globs_and_predicates_and_the_first_entry_decides() -> None:
    params = weights(a__up=(8, 4), a__down=(4, 8), b__up=(8, 4), c=(4, 4), d=(4,))
    routes = {
        "a.up": nm.Route("frozen"),
        "*.up": nm.Route("adamw"),
        lambda name, t: t.ndim == 1: nm.Route("frozen"),
    }
    plan = nm.make_plan(params, routes=routes)
    assert algorithms(plan) == {
        "a.up": "frozen",
        "a.down": "normuon",
        "b.up": "adamw",
        "c": "normuon",
        "d": "frozen",
    }


def test_the_table_shows_every_decision_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonalize, "has_bfloat16_matrix_unit", lambda device: False)
    params = weights(embed__weight=(10, 8), qkv=(24, 8), conv=(4, 2, 3, 3), bias=(8,))
    routes = {"qkv": nm.Route(splits=(8, 8, 8), lr_mul=2.0), "conv": nm.Route(flatten=True)}
    table = str(nm.make_plan(params, nm.Config(guard="full"), routes=routes))
    assert re.search(
        r"embed.weight +10x8 +float32 +adamw +- +embedding or output head, by name", table
    )
    assert re.search(
        r"qkv +24x8 +float32 +normuon lr\*=2 +1 x 8x8 standard float32; .*routes\['qkv'\]", table
    )
    assert re.search(r"conv +4x2x3x3 .*1 x 4x18 gram float32", table) and re.search(
        r"bias .* 1-D", table
    )
    assert table.endswith("4 parameters, 4 matrices in 2 buckets; guard='full' per step")


def test_tall_and_wide_matrices_of_one_size_share_a_bucket() -> None:
    plan = nm.make_plan(weights(up=(32, 8), down=(8, 32), more=(8, 32), square=(8, 8)))
    assert [(b.rows, b.cols, sum(g.count for g in b.groups)) for b in plan.buckets] == [
        (8, 32, 3),
        (8, 8, 1),
    ]


def test_an_empty_parameter_is_left_alone() -> None:
    params = {"none": torch.zeros(0, 8), "w": torch.randn(8, 8)}
    plan = nm.make_plan(params)
    hyper = nm.Hyper.of(params, lr=0.1)
    assert nm.update(params, params, nm.init(plan, params), hyper, plan).params["none"].shape == (
        0,
        8,
    )


W = torch.randn(8, 8)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "params: expected at least one parameter, got an empty dict"),
        ([W], TypeError, "params: expected a dict of name -> tensor, got list"),
        ({"w": 1.0}, TypeError, r"params\['w'\]: expected str -> Tensor, got float"),
        (
            {"ids": torch.zeros(4, 4, dtype=torch.int64)},
            TypeError,
            r"params\['ids'\]: expected a dense .* got torch.int64",
        ),
        (
            {"z": torch.zeros(4, 4, dtype=torch.complex64)},
            TypeError,
            r"params\['z'\]: .* got torch.complex64",
        ),
        ({"s": torch.eye(4).to_sparse()}, TypeError, r"params\['s'\]: .* torch.sparse_coo"),
        ({"a": W, "b": W}, ValueError, r"params\['b'\]: shares memory with 'a'"),
        ({"a": W, "b": W[:4]}, ValueError, r"params\['b'\]: shares memory with 'a'"),
        (
            {"a": W[4:], "b": W[:4], "c": W[3:5]},
            ValueError,
            r"params\['c'\]: shares memory with 'b'",
        ),
        (
            {"a": W[:, :4], "b": W[:, 4:]},
            ValueError,
            r"params\['b'\]: shares memory with 'a'",
        ),  # row by row: told by ranges
        (
            {"a": W, "b": torch.empty(4, 4, device="meta")},
            ValueError,
            r"params\['b'\]: on meta, but 'a' is on cpu",
        ),
    ],
)
def test_parameters_that_cannot_be_optimized_are_refused_by_name(
    params: object, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        nm.make_plan(params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_parameters_that_are_parts_of_one_storage_step_as_tensors_of_their_own(
    dtype: torch.dtype, compiled: bool, without_inductor: None
) -> None:
    """As cuDNN and FSDP keep them. Nothing is aligned, and what lies between is not touched."""
    shapes = {"a": (5, 4), "b": (5, 4), "bias": (5,), "gain": (3,)}
    shapes["c"] = (3, 7)
    flat = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    views, at = {}, 1
    for name, shape in shapes.items():
        views[name] = flat[at : at + torch.Size(shape).numel()].view(shape)
        at += views[name].numel() + (name == "b")
    own, before, between = (
        {name: view.clone() for name, view in views.items()},
        flat.clone(),
        [0, 41, *range(at, 100)],
    )
    version = flat._version
    step_ = nm.step_ if compiled else local_update_
    for params in (views, own):
        config = nm.Config(guard="full", method="standard", steps=1)
        plan = nm.make_plan(params, config, routes={"[abc]": nm.Route()})
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1, weight_decay=0.1)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            step_(
                params,
                {
                    name: torch.randn(p.shape, generator=generator).to(dtype)
                    for name, p in own.items()
                },
                state,
                hyper,
                plan,
            )
    assert all(torch.equal(views[name], own[name]) for name in shapes)
    assert torch.equal(flat[between], before[between]) and (flat != before).sum() > 40
    assert flat._version > version  # a backward that still needs the old values has to know


@pytest.mark.parametrize(
    ("shape", "route", "message"),
    [
        (
            (8,),
            nm.Route("normuon"),
            r"params\['w'\]: NorMuon needs at least 2 dimensions, got shape \(8,\); route it to",
        ),
        (
            (8, 8),
            nm.Route(splits=(4, 3)),
            r"params\['w'\]: splits \(4, 3\) add up to 7, dimension 0 is 8",
        ),
        (
            (4, 16, 32),
            nm.Route(splits=(4, 3)),
            r"splits \(4, 3\) add up to 7, dimension 1 is 16 \(of \(4, 16, 32\).*the rows of",
        ),
        (
            (4, 16, 32),
            nm.Route(splits=(4, 3), dim=1),
            r"splits \(4, 3\) add up to 7, dimension 2 is 32 \(of \(4, 16, 32\).*the columns of",
        ),
        (
            (8, 8),
            nm.Route(heads=3),
            r"params\['w'\]: 8 along dimension 0 cannot be cut into 3 equal heads",
        ),
        ((8, 8), nm.Route(splits=(4, 4), heads=(1, 1, 1)), r"params\['w'\]: 3 heads for 2 splits"),
        ((2, 8, 8), nm.Route(heads=2), r"params\['w'\]: heads and splits need a 2-D parameter"),
    ],
)
def test_routes_that_do_not_fit_name_the_parameter(
    shape: tuple[int, ...], route: nm.Route, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nm.make_plan({"w": torch.randn(shape)}, routes={"w": route})


def test_an_unmatched_route_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"routes: \['attn\.\*'\] match no parameter"):
        nm.make_plan({"w": W}, routes={"attn.*": nm.Route("adamw")})


def test_routes_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"routes\['w'\]: expected a Route, got 'adamw'; write nm.Route"
    ):
        nm.make_plan({"w": W}, routes={"w": "adamw"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="expected names, globs or predicates as keys, got 3"):
        nm.make_plan({"w": W}, routes={3: nm.Route("adamw")})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="config: expected a Config, got dict"):
        nm.make_plan({"w": W}, {})  # type: ignore[arg-type]


def test_a_convolution_read_as_kernels_warns() -> None:
    with pytest.warns(
        UserWarning,
        match=r'read as 8 matrices of 3x3\); otherwise "conv": nm.Route\(flatten=True\)',
    ):
        nm.make_plan({"conv": torch.randn(4, 2, 3, 3)}, routes={"conv": nm.Route()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"algorithm": "sgd"}, ValueError, "Route.algorithm: expected one of"),
        ({"lr_mul": -1.0}, ValueError, "Route.lr_mul: expected a finite number >= 0, got -1.0"),
        ({"lr_mul": "2"}, TypeError, "Route.lr_mul: expected a number"),
        ({"splits": 3}, TypeError, "Route.splits: expected a tuple of sizes"),
        ({"splits": (4, 0)}, ValueError, "Route.splits: expected ints >= 1"),
        ({"heads": 0}, ValueError, "Route.heads: expected ints >= 1"),
        ({"dim": 2}, ValueError, "Route.dim: expected 0 or 1"),
        (
            {"unfrozen": nm.Route()},
            ValueError,
            "Route.unfrozen: expected a Route, for 'frozen' alone",
        ),
        (
            {"algorithm": "adamw", "heads": 2},
            ValueError,
            "flatten, heads and splits are for 'normuon'",
        ),
    ],
)
def test_route_options_are_checked(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        nm.Route(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum_form": "nag"}, ValueError, "Config.momentum_form: expected one of"),
        ({"reduction": "cols"}, ValueError, "Config.reduction"),
        ({"scale": "0.2"}, ValueError, "Config.scale"),
        ({"method": "svd"}, ValueError, "Config.method"),
        ({"guard": True}, ValueError, "Config.guard: expected one of"),
        ({"guard_scope": "rank"}, ValueError, "Config.guard_scope"),
        ({"nesterov": 1}, TypeError, "Config.nesterov: expected a bool"),
        ({"rms": 0.0}, ValueError, "Config.rms"),
        ({"eps": float("nan")}, ValueError, "Config.eps: expected a finite number"),
        ({"coefficients": "fast"}, ValueError, "coefficients: expected one of"),
        ({"coefficients": ((1.0, 2.0),)}, ValueError, "rows of three finite numbers"),
        ({"steps": 0}, ValueError, "steps: expected an int >= 1"),
        ({"safety_factor": 0.9}, ValueError, "safety_factor: expected a number in"),
        ({"orthogonalize_dtype": torch.int8}, ValueError, "Config.orthogonalize_dtype"),
        ({"momentum_dtype": torch.int32}, ValueError, "Config.momentum_dtype"),
        ({"momentum_dtype": torch.float16}, ValueError, "vanish in float16.*torch.bfloat16"),
        ({"orthogonalizer": "svd"}, TypeError, "Config.orthogonalizer: expected a callable"),
    ],
)
def test_config_options_are_checked(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        nm.Config(**options)


def test_presets_are_checked() -> None:
    with pytest.raises(ValueError, match="preset: expected one of"):
        nm.Config.preset("mouon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Config: 'lr' may change from step to step"):
        nm.Config.preset("dion", lr=0.1)
    assert nm.Config.preset("dion", guard="full").guard == "full"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr: expected a finite number >= 0, got -0.1"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr: expected a Python number, got Tensor"),
        (
            {"lr": 0.1, "momentum": 1.0},
            ValueError,
            r"momentum: expected a number in \[0, 1\), got 1.0",
        ),
        (
            {"lr": 0.1, "adamw_betas": (0.9, 1.5)},
            ValueError,
            r"adamw_beta2: expected a number in \[0, 1\)",
        ),
        ({"lr": 0.1, "adamw_betas": 0.9}, TypeError, "adamw_betas: expected two numbers"),
        (
            {"lr": 0.1, "weight_decay": float("inf")},
            ValueError,
            "weight_decay: expected a finite number",
        ),
    ],
)
def test_hyperparameters_are_checked(values: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        nm.Hyper.of({"w": W}, **values)
    with pytest.raises(ValueError, match="params: expected a non-empty dict"):
        nm.Hyper.of({}, lr=0.1)


def make(shapes: dict[str, tuple[int, ...]]):
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    plan = nm.make_plan(params)
    return params, nm.init(plan, params), nm.Hyper.of(params, lr=0.1), plan


@pytest.mark.parametrize("run", [nm.update, nm.step, nm.step_])
@pytest.mark.parametrize(
    ("what", "value", "error", "message"),
    [
        (
            "grads",
            {"w": W},
            ValueError,
            r"grads: missing \['b'\].*give None for a parameter without a gradient",
        ),
        (
            "grads",
            {"w": W, "b": W[0], "c": W},
            ValueError,
            r"grads: missing \[\], not in the plan \['c'\]",
        ),
        (
            "grads",
            {"w": W[:4], "b": W[0]},
            ValueError,
            r"grads\['w'\]: expected shape \(8, 8\), got \(4, 8\)",
        ),
        (
            "grads",
            {"w": W.double(), "b": W[0]},
            ValueError,
            r"grads\['w'\]: expected dense torch.float32, got torch.float64",
        ),
        (
            "grads",
            {"w": W.to("meta"), "b": W[0]},
            ValueError,
            r"grads\['w'\]: expected device cpu, got meta",
        ),
        ("params", {"w": W}, ValueError, r"params: missing \['b'\]"),
        ("state", {}, ValueError, r"state: missing .*was it made for another plan\?"),
        (
            "lr",
            0.1,
            TypeError,
            "hyper.lr: expected a 0-d tensor, got float; Hyper.of makes them from numbers",
        ),
        ("lr", torch.ones(3), TypeError, r"hyper.lr: expected a 0-d tensor, got shape \(3,\)"),
        ("found_inf", 1.0, TypeError, "found_inf: expected None or a tensor with one element"),
        ("plan", None, TypeError, "plan: expected a Plan from make_plan, got NoneType"),
    ],
)
def test_a_step_refuses_what_is_not_the_plans_and_loses_nothing(
    run, what: str, value, error: type, message: str
) -> None:
    params, state, hyper, plan = make({"w": (8, 8), "b": (8,)})
    given = {
        "params": params,
        "grads": {"w": W, "b": W[0]},
        "state": state,
        "hyper": hyper,
        "plan": plan,
        "found_inf": None,
    }
    before = {name: tensor.clone() for name, tensor in (params | state).items()}
    if what == "lr":
        given["hyper"] = hyper._replace(lr=value)
    else:
        given[what] = value
    found_inf = given.pop("found_inf")
    with pytest.raises(error, match=message):
        run(*given.values(), found_inf=found_inf)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (params | state).items())


def test_state_and_params_of_another_plan_are_refused() -> None:
    params, state, hyper, plan = make({"w": (8, 8), "b": (8,)})
    others, other_state, _, other = make({"w": (8, 4), "b": (8,)})
    with pytest.raises(ValueError, match=r"params\['w'\]: expected shape \(8, 4\), got \(8, 8\)"):
        nm.init(other, params)
    with pytest.raises(
        ValueError, match=r"state\['w.momentum'\]: expected shape \(8, 8\), got \(8, 4\)"
    ):
        nm.update(params, params, other_state, hyper, plan)
    with pytest.raises(ValueError, match=r"got one whose parameters differ in \['.*'\]"):
        nm.check(nm.update(params, params, state, hyper, plan), nm.make_plan({"w": W}))
    with pytest.raises(TypeError, match="plan: expected a Plan"):
        nm.init(None, others)  # type: ignore[arg-type]


def test_an_orthogonalizer_of_the_wrong_shape_is_refused() -> None:
    params = {"w": torch.randn(4, 8)}
    plan = nm.make_plan(params, nm.Config(orthogonalizer=lambda x: x[:, :2]))
    with pytest.raises(
        ValueError, match=r"Config.orthogonalizer: expected \[n, 4, 8\], got \(1, 2, 8\)"
    ):
        nm.update(params, params, nm.init(plan, params), nm.Hyper.of(params, lr=0.1), plan)


def test_a_model_goes_in_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    plan = nm.make_plan(dict(model.named_parameters()), routes={"0.weight": nm.Route("adamw")})
    assert algorithms(plan) == {
        "0.weight": "adamw",
        "1.weight": "normuon",
        "1.bias": "adamw",
        "2.weight": "adamw",
        "2.bias": "adamw",
    }
