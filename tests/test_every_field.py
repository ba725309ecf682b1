"""No field of `Config` and `Route` is taken and then ignored without a word.

Every field is set to its other values, also beside fields that could leave it unread. That must
change bits of a run, or be refused or warned of, or stand in a list here with the reason why it may
change nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.compat import has_bfloat16_matrix_unit

Fields = dict[str, Any]


def own_orthogonalizer(x: Tensor) -> Tensor:
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    return x / torch.where(norm == 0, 1.0, norm)


# A CPU with units for bfloat16 multiplies in it by default.
OTHER_DTYPE = torch.float32 if has_bfloat16_matrix_unit(torch.device("cpu")) else torch.bfloat16
# By field: values that are not its default.
VALUES: dict[str, list[Any]] = {
    "momentum_form": ["sum"],
    "nesterov": [True],
    "precondition": ["rows", "sign"],
    "snap": [True],
    "reduction": ["short", "entries"],
    "normalize": [False],
    "renormalize": [False],
    "scale": ["spectral", "rms", "muon", "none"],
    "rms": [0.4],
    "eps": [1e-2],
    "eps_form": ["floor"],
    "weight_decay_form": ["cautious", "hyperball"],
    "weight_decay_lr_power": [2],
    "cautious_update": [True],
    "update_floor": [0.5],
    "update_floor_per": ["matrix"],
    "coefficients": ["simple"],
    "safety_factor": [1.2],
    "steps": [4],
    "method": ["standard", "gram"],
    "orthogonalize_dtype": [OTHER_DTYPE],
    "orthogonalizer": [own_orthogonalizer],
    "momentum_dtype": [torch.bfloat16, "int8"],
    "state_device": ["cpu"],
    "guard": ["output", "full"],
    "guard_scope": ["bucket"],
    "missing_grads": ["zeros"],
    "other": ["lion"],
    "replicas": ["share"],
    "master": ["mantissa", "fp32", "stochastic"],
    "seed": [1],
    "metrics": [True],
}
# Fields that leave others unread, or might; each beside all values of all other fields.
CONTEXTS: list[Fields] = [
    {},
    {"normalize": False},
    {"reduction": "entries"},
    {"scale": "spectral"},
    {"scale": "muon", "renormalize": False},
    {"update_floor": 0.5},
    {"weight_decay_form": "hyperball", "master": "fp32"},
    {"cautious_update": True},
    {"orthogonalizer": own_orthogonalizer},
    {"guard": "full"},
    {"other": "lion"},
    {"master": "stochastic"},
]
# By field: where it may change nothing, and why it is taken all the same.
ALLOWED: dict[str, tuple[Callable[[Fields], bool], str]] = {
    "rms": (
        lambda beside: beside.get("weight_decay_form") == "hyperball",
        "an update is as long as its matrix there; routes may take matrices off the ball",
    ),
    "renormalize": (
        lambda beside: not beside.get("normalize", True),
        "what is not divided keeps its norm, whether or not it is asked to",
    ),
    "eps_form": (
        lambda beside: not beside.get("eps"),
        "both forms with eps=0 are the division that they say; presets have the form beside an eps",
    ),
    "method": (
        lambda beside: True,
        "both are the same products in another order, and 'auto' is one of them",
    ),
    "orthogonalize_dtype": (
        lambda beside: "orthogonalizer" in beside and torch.float32 == OTHER_DTYPE,
        "float32 is what an orthogonalizer of one's own is given; where that is narrow, it is said",
    ),
    "guard_scope": (
        lambda beside: "guard" not in beside,
        "NorMuon(guard=) and dataclasses.replace add the guard later",
    ),
    "replicas": (
        lambda beside: True,
        "without mesh= one rank has everything; with it, tests/distributed and planning/replicas",
    ),
    "state_device": (
        lambda beside: True,
        "where a momentum is changes no bit; that it is there: step/test_streamed_momentum.py",
    ),
    "seed": (
        lambda beside: beside.get("master") != "stochastic",
        "it says which random numbers, and none are drawn",
    ),
}
SHAPES = {"tall": (10, 6), "half": (6, 6), "late": (4, 6), "bias": (6,)}
ROUTES = {"half": nm.Route(transposed=True), "bias": nm.Route("adamw"), "*": nm.Route()}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"half": found["half"].bfloat16()}


def run(config: Fields) -> str:
    """A digest of every bit of a run that has what fields are about: decay, NaN, missing ones."""
    params = tensors(0)
    plan = nm.make_plan(
        params, nm.Config(**config), routes=dict(sorted(ROUTES.items(), reverse=True))
    )
    state, digest = nm.init(plan, params), hashlib.sha256()
    hyper = nm.Hyper.of(params, lr=0.05, weight_decay=0.5)
    for k in range(3):
        grads: dict[str, Tensor | None] = dict(tensors(k + 1))
        if k == 1:
            grads["late"] = None
        if k == 2:
            grads["tall"] = torch.full((10, 6), float("nan"))
        params, state, *rest = nm.update(params, grads, state, hyper, plan)
        for x in (*params.values(), *state.values(), *rest):
            if x is not None:
                digest.update(
                    repr((x.shape, x.dtype)).encode()
                    + x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                )
    return digest.hexdigest()


def outcome(config: Fields) -> str | None:
    """The digest of a run; None where something is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return run(config)
        except (TypeError, ValueError, UserWarning):
            return None


def test_every_field_of_config_has_values_here() -> None:
    assert [*VALUES] == [field.name for field in dataclasses.fields(nm.Config)]
    defaults = {field.name: field.default for field in dataclasses.fields(nm.Config)}
    assert all(defaults[name] not in values for name, values in VALUES.items())


@pytest.mark.parametrize("beside", CONTEXTS, ids=lambda fields: " ".join(fields) or "nothing")
def test_a_field_of_config_has_an_effect_or_is_refused_or_said(beside: Fields) -> None:
    before = outcome(beside)
    assert before is not None
    silent = [
        f"{field}={value!r}"
        for field, values in VALUES.items()
        if field not in beside
        for value in values
        if outcome({**beside, field: value}) == before
        and not (field in ALLOWED and ALLOWED[field][0](beside))
    ]
    assert silent == []


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: nm.Config(update_floor_per="matrix"), "Config.update_floor_per: 'matrix' has no eff"),
    (lambda: nm.Config(rms=0.4, scale="muon"), "Config.rms: 0.4 has no effect: only the scales"),
    (lambda: nm.Config.preset("muon", rms=0.4), "Config.rms: 0.4 has no effect"),
    (lambda: nm.Config(renormalize=False), "Config.renormalize: False has no effect"),
    (lambda: nm.Config(normalize=False, eps=1e-8), "Config.eps: 1e-08 has no effect: normalize=F"),
    (lambda: nm.Config.preset("muon", eps=1e-8), "Config.eps: 1e-08 has no effect"),
    (lambda: nm.Config(normalize=False, reduction="short"), "Config.reduction: 'short' has no eff"),
    (
        lambda: nm.Config(normalize=False, snap=True),
        "Config.snap: True has no effect: scale='paper'",
    ),
    (lambda: nm.Config(orthogonalizer=own_orthogonalizer, steps=3), "Config.steps: 3 has no effe"),
    (
        lambda: nm.Config(orthogonalizer=own_orthogonalizer, orthogonalize_dtype=torch.bfloat16),
        "Config.orthogonalize_dtype: torch.bfloat16 has no effect.*float32",
    ),
    (lambda: nm.Route(dim=1), "Route.dim: 1 has no effect without heads and splits"),
    (lambda: nm.Route("frozen", lr_mul=0.5), "Route.lr_mul: 0.5 has no effect on what is 'frozen'"),
    (lambda: nm.Route("frozen", wd_mul=0.0), "Route.wd_mul: 0.0 has no effect on what is 'frozen'"),
    (
        lambda: nm.Route(wd_mul=0.5, weight_decay_form="hyperball"),
        "Route.wd_mul: 0.5 has no effect",
    ),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_has_no_effect_is_refused_with_the_reason(case: int) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_an_override_leaves_out_what_the_preset_had_for_the_other_value() -> None:
    assert nm.Config.preset("author", normalize=False).eps == 0.0
    assert nm.Config.preset("emerging_optimizers", scale="muon").rms == 0.2
    own = nm.Config.preset("muon", orthogonalizer=own_orthogonalizer)
    assert own.coefficients == "polar_express" and own.scale == "muon"
    for name in nm.types.presets.PRESETS:
        assert nm.Config.preset(name) == nm.Config(**nm.types.presets.PRESETS[name])


# --- Route

MATRIX, VECTOR = ("w", (8, 8)), ("v", (8,))
ROUTE_VALUES: dict[str, list[Any]] = {  # with what else the route says
    "algorithm": [{"algorithm": "adamw"}, {"algorithm": "frozen"}],
    "lr_mul": [{"lr_mul": 0.5}],
    "wd_mul": [{"wd_mul": 0.5}],
    "flatten": [{"flatten": True}],
    "heads": [{"heads": 2}],
    "splits": [{"splits": (2, 6)}],
    "dim": [{"dim": 1}],
    "transposed": [{"transposed": True}],
    "weight_decay_form": [{"weight_decay_form": "cautious"}, {"weight_decay_form": "hyperball"}],
    "cautious_update": [{"cautious_update": True}],
    "unfrozen": [{"unfrozen": nm.Route("adamw")}],
}


def run_route(algorithm: Any, fields: Fields, form: Any = "decoupled", shape: Any = (8, 8)) -> str:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(shape, generator=generator)}
    config = nm.Config(weight_decay_form=form, reduction="rows")
    plan = nm.make_plan(
        params, config, routes={"w": nm.Route(**{"algorithm": algorithm, **fields})}
    )
    state, digest = nm.init(plan, params), hashlib.sha256()
    hyper = nm.Hyper.of(params, lr=0.05, weight_decay=0.5)
    for _ in range(2):
        grads = {"w": torch.randn(shape, generator=generator)}
        params, state, *_ = nm.update(params, grads, state, hyper, plan)
    for x in (*params.values(), *state.values()):
        digest.update(repr(x.shape).encode() + x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def outcome_of_route(*args: Any) -> str | None:
    try:
        return run_route(*args)
    except (TypeError, ValueError):
        return None


ALLOWED_OF_ROUTES = {
    ("flatten", (8, 8)): "a matrix is flat already, and a route may be for more than one shape",
}


def test_every_field_of_route_has_values_here() -> None:
    assert [*ROUTE_VALUES] == [field.name for field in dataclasses.fields(nm.Route)]


@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 8)])
@pytest.mark.parametrize(
    ("algorithm", "form"),
    [("normuon", "decoupled"), ("normuon", "hyperball"), ("adamw", "decoupled"),
     ("adamw", "hyperball"), ("frozen", "decoupled")],
)  # fmt: skip
def test_a_field_of_route_has_an_effect_or_is_refused(
    algorithm: str, form: str, shape: Any
) -> None:
    before = outcome_of_route(algorithm, {}, form, shape)
    assert before is not None
    silent = [
        str(fields)
        for field, values in ROUTE_VALUES.items()
        for fields in values
        if algorithm != fields.get("algorithm")
        and fields.get("weight_decay_form") != form
        and (field, shape) not in ALLOWED_OF_ROUTES
        and (algorithm, field) != ("frozen", "unfrozen")  # is for tensors that require a gradient
        and outcome_of_route(algorithm, fields, form, shape) == before
    ]
    assert silent == []


def named(*pairs: Any) -> dict[str, Tensor]:
    return {name: torch.randn(shape, requires_grad=True) for name, shape in pairs}


@pytest.mark.parametrize("option", [{"cautious_update": True}, {"weight_decay_form": "cautious"}])
def test_options_of_matrices_that_reach_none_are_refused_wherever_routes_are_written(
    option: Fields, eager: None
) -> None:
    route, message = nm.Route(**option), "are for matrices that NorMuon updates"
    params = named(MATRIX, VECTOR, ("embed.weight", (6, 8)))
    for key in ("v", "embed*", lambda name, p: p.ndim == 1):
        with pytest.raises(ValueError, match=message):
            nm.make_plan(params, routes={key: route, "w": nm.Route()})
        with pytest.raises(ValueError, match=message):
            nm.NorMuon([*params.items()], routes={key: route, "w": nm.Route()})
    with pytest.raises(ValueError, match=message):
        nm.NorMuon([{"params": [*params.items()], "routes": {"v": route, "w": nm.Route()}}])
    model = torch.nn.Sequential(torch.nn.Embedding(6, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"overrides\['0.weight'\].*{message}"):
        nm.routes_for(model, {"0.weight": route})
    with pytest.raises(ValueError, match="are for matrices that NorMuon updates"):
        nm.routes_for(model) | {"1.bias": route}
    # Where a matrix is among them, the others keep their rule.
    plan = nm.make_plan(params, routes={"*": route, "w": nm.Route(), "embed*": nm.Route("adamw")})
    assert [p.route.has_options for p in plan.parameters] == [True, False, False]
    nm.routes_for(model, {"*": route})


def test_lion_and_hyperballs_and_lists_say_what_they_do_not_read(without_inductor: None) -> None:
    lion, w = nm.Config(other="lion"), torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(TypeError, match="adamw_eps: 1e-06 has no effect"):
        nm.NorMuon([("w", w)], config=lion, adamw_eps=1e-6, routes={"*": nm.Route()})
    with pytest.raises(TypeError, match="adamw_eps: 1e-06 has no effect"):
        nm.NorMuon(
            [{"params": [("w", w)], "adamw_eps": 1e-6}], config=lion, routes={"*": nm.Route()}
        )
    muon = nm.Config.preset("muon")
    with pytest.raises(TypeError, match=r"beta2: 0\.9 has no effect: Config\(normalize=False\)"):
        nm.NorMuon([("w", w)], config=muon, beta2=0.9, routes={"*": nm.Route()})
    nm.NorMuon([("w", w)], config=muon, beta2=0.95, routes={"*": nm.Route()})
    params = {"w": w.detach(), "v": torch.randn(4)}
    plan = nm.make_plan(params, lion, routes={"w": nm.Route()})
    hyper = nm.Hyper.of(params, lr=0.1, adamw_eps=1e-6)
    with pytest.warns(UserWarning, match="adamw_eps=1e-06 has no effect") as seen:
        for _ in range(2):
            nm.step(params, params, nm.init(plan, params), hyper, plan)
    assert len(seen) == 1 and seen[0].filename == __file__
    ball = nm.Config(weight_decay_form="hyperball")
    with pytest.raises(ValueError, match=r"params\['w'\]: Route\(wd_mul=0.5\) has no effect"):
        nm.make_plan(params, ball, routes={"w": nm.Route("normuon", wd_mul=0.5)})
    nm.make_plan(params, ball, routes={"w": nm.Route("normuon", wd_mul=0.0)})  # as it is asked for
    named, own = [("w", w)], {"*": nm.Route()}
    with pytest.warns(
        UserWarning, match=r"weight_decay: 0\.1 has no effect: all parameters"
    ) as seen:
        nm.NorMuon(named, config=ball, weight_decay=0.1, routes=own)
    assert len(seen) == 1 and seen[0].filename == __file__
    nm.NorMuon(named, config=ball, routes=own)
    vector = torch.nn.Parameter(torch.randn(4))  # which decays
    both = [*named, ("v", vector)]
    nm.NorMuon(both, config=ball, weight_decay=0.1, routes={"v": nm.Route("adamw"), **own})
    lists: Any = [[w.detach()], [torch.ones(4, 4)], [torch.zeros(4, 4)], [torch.zeros(4, 1)]]
    rates: Any = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    for config in (lion, nm.Config(replicas="share")):
        with pytest.raises(ValueError, match=r"config: Config\((other|replicas)=.* has no effect"):
            nm.foreach_step_(*lists, **rates, config=config)
