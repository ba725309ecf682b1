"""What holds of every variant besides its formula (test_oracle_step.py) and its layouts
(tests/distributed): scales, graphs, the guard, files, lists, groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.step import local_update_
from tests.inputs import same_bits, times_power_of_two

VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon"},
    "muoneq": {"name": "muoneq"},
    "nanochat": {"name": "nanochat"},
    "adamuon": {"name": "adamuon"},
    "hyperball": {"name": "hyperball"},
    "cautious": {"cautious_update": True},
    "floor": {"update_floor": 0.5},
    "floor per matrix": {"update_floor": 0.5, "update_floor_per": "matrix"},
    "all": {"name": "adamuon", "cautious_update": True, "weight_decay_form": "hyperball"},
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
SHAPES = {"tall": (10, 6), "wide": (6, 10), "heads": (12, 4), "experts": (4, 12, 16), "bias": (6,)}
ROUTES = {"heads": nm.Route(heads=3), **dict.fromkeys(("tall", "wide", "experts"), nm.Route())}
Run = tuple[dict[str, Tensor], dict[str, Tensor]]


def config_of(variant: str, **overrides: Any) -> nm.Config:
    fields = {"name": "paper", "orthogonalize_dtype": torch.float32, **VARIANTS[variant]}
    return nm.Config.preset(**{**fields, **overrides})


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def hyper_of(params: dict[str, Tensor]) -> nm.Hyper:
    return nm.Hyper.of(params, lr=0.02, weight_decay=0.1)


def run(config: nm.Config, steps: int = 3, step: Any = nm.update, scale: int = 0) -> Run:
    params = tensors(0)
    plan = nm.make_plan(params, config, routes=ROUTES)
    state = nm.init(plan, params)
    for k in range(steps):
        grads = {name: times_power_of_two(x, scale) for name, x in tensors(1 + k).items()}
        params, state, *_ = step(params, grads, state, hyper_of(params), plan)
    return params, state


def differing(a: Run, b: Run) -> list[str]:
    return [
        name for x, y in zip(a, b, strict=True) for name in x if not same_bits(x[name], y[name])
    ]


@EVERY
@pytest.mark.parametrize("scale", [-90, 40])
def test_gradients_times_a_power_of_two_change_no_bit_of_a_matrix(variant: str, scale: int) -> None:
    (plain, state), (scaled, other) = run(config_of(variant)), run(config_of(variant), scale=scale)
    for name in ("tall", "wide", "heads", "experts"):
        assert same_bits(plain[name], scaled[name]), name
        if f"{name}.variance" in state:
            assert same_bits(state[f"{name}.variance"], other[f"{name}.variance"]), name
    assert not same_bits(state["tall.momentum"], other["tall.momentum"])


def test_rows_of_any_size_count_alike_before_newton_schulz() -> None:
    params = {"w": torch.randn(6, 10)}
    sizes = torch.tensor([-50, -20, 0, 0, 3, 50])
    grad = torch.randint(-8, 9, (6, 10)).float()
    plan = nm.make_plan(params, config_of("muoneq"), routes={"w": nm.Route()})
    results = [
        nm.update(params, {"w": x}, nm.init(plan, params), hyper_of(params), plan).params["w"]
        for x in (grad, torch.ldexp(grad, sizes[:, None]))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["nanochat", "floor", "all"])
def test_in_place_and_traced_it_has_the_bits_of_the_eager_step(
    variant: str, without_inductor: None
) -> None:
    config = config_of(variant, guard="full")
    eager = run(config)
    assert differing(eager, run(config, step=local_update_)) == []
    assert differing(eager, run(config, step=nm.step)) == []
    assert differing(eager, run(config, step=nm.step_)) == []


def test_compiled_by_inductor_it_is_close_to_eager() -> None:
    config = config_of("all", guard="full")
    (params, state), (eager, of_eager) = run(config, step=nm.step_), run(config)
    for name, x in {**eager, **of_eager}.items():
        got = {**params, **state}[name]
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)  # 2e-6 was seen


@EVERY
@pytest.mark.parametrize("guard", ["output", "full"])
@pytest.mark.parametrize("fault", ["gradient", "variance", "parameter"])
def test_a_skipped_step_keeps_every_bit(variant: str, guard: str, fault: str) -> None:
    params, state = run(config_of(variant, guard=guard))
    config = config_of(variant, guard=guard)
    plan, grads = nm.make_plan(params, config, routes=ROUTES), tensors(9)
    needs = config.update_floor > 0 or config.weight_decay_form == "hyperball"
    if fault == "gradient":
        grads["wide"][2, 3] = float("nan")
    elif fault == "variance":
        if "wide.variance" not in state:
            return
        state["wide.variance"].view(-1)[-1] = float("inf")
    elif needs:
        params["wide"][2, 3] = float("nan")
    else:
        return  # a parameter is not read before it is written
    result = nm.update(params, grads, state, hyper_of(params), plan)
    assert bool(result.skipped)
    held = {k: x for k, x in state.items() if not k.startswith("guard.")}
    kept = {**params, **held}
    after = {**result.params, **result.state}
    moved = [
        name
        for name, x in kept.items()
        if not torch.equal(x.view(torch.int32), after[name].view(torch.int32))
    ]
    may = [] if guard == "full" and fault == "gradient" else [k for k in kept if "momentum" in k]
    assert set(moved) <= set(may)


def test_a_hyperball_keeps_the_norm_of_every_matrix_for_good() -> None:
    params = tensors(0)
    plan = nm.make_plan(params, config_of("hyperball"), routes=ROUTES)
    state, first = nm.init(plan, params), params
    for k in range(200):
        params, state, *_ = nm.update(params, tensors(k), state, hyper_of(params), plan)
    for name in ("tall", "wide", "experts"):
        now, before = (x[name].norm(dim=(-2, -1)) for x in (params, first))
        torch.testing.assert_close(now, before, rtol=1e-5, atol=0)  # 2e-6 was seen
        assert (params[name] - first[name]).norm() > 0.5 * first[name].norm()


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_no_row_moves_by_less_than_the_floor(per: str) -> None:
    params = {"w": torch.randn(6, 10) * torch.logspace(-2, 2, 6)[:, None]}
    config = nm.Config(update_floor=0.5, update_floor_per=per)  # type: ignore[arg-type]
    plan = nm.make_plan(params, config, routes={"w": nm.Route()})
    hyper = nm.Hyper.of(params, lr=1.0)
    new = nm.update(params, {"w": torch.randn(6, 10)}, nm.init(plan, params), hyper, plan).params
    dim = 1 if per == "row" else (0, 1)
    ratio = (new["w"] - params["w"]).norm(dim=dim) / params["w"].norm(dim=dim)
    assert ratio.min() >= 0.5 * (1 - 1e-6)
    assert per == "matrix" or ratio.max() > 1.0  # what moves further is left as it is


def test_a_cautious_update_moves_no_entry_against_its_gradient() -> None:
    params, grads = tensors(0), tensors(2)
    plan = nm.make_plan(params, config_of("cautious"), routes=ROUTES)
    state = nm.init(plan, params)
    _, state, *_ = nm.update(params, tensors(1), state, hyper_of(params), plan)
    hyper = nm.Hyper.of(params, lr=0.02)
    new = nm.update(params, grads, state, hyper, plan).params
    moves = (params["wide"] - new["wide"]) * grads["wide"]
    assert (moves >= 0).all() and (moves == 0).any() and (moves > 0).any()


def test_a_cautious_update_moves_what_it_keeps_by_the_published_factor() -> None:
    """d / (kept + 1), of which entries with a gradient of zero are part (arXiv 2411.16085)."""
    params = {"w": torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(6, 8, generator=generator) for _ in range(2))
    second[:, 3] = 0.0  # as of an input that is dead in this batch
    hyper = nm.Hyper.of(params, lr=0.02)
    moved = []
    for cautious in (False, True):
        config = nm.Config(cautious_update=cautious, orthogonalize_dtype=torch.float32)
        plan = nm.make_plan(params, config, routes={"w": nm.Route()})
        _, state, *_ = nm.update(params, {"w": first}, nm.init(plan, params), hyper, plan)
        moved.append(params["w"] - nm.update(params, {"w": second}, state, hyper, plan).params["w"])
    plain, careful = moved
    kept = plain * second >= 0
    assert bool(kept[:, 3].all()) and 0 < int(kept.sum()) < kept.numel()
    factor = kept.numel() / (int(kept.sum()) + 1)
    # observed: 2.3e-7, rounding of the weights
    assert torch.allclose(careful, torch.where(kept, plain * factor, 0.0), atol=1e-6, rtol=0)
    assert not careful[~kept].any() and bool(careful[:, 3].all())


def test_a_route_has_a_decay_form_and_a_caution_of_its_own() -> None:
    own = {
        "tall": nm.Route(weight_decay_form="cautious"),
        "experts": nm.Route("normuon", cautious_update=True),
        "heads": nm.Route(heads=3, weight_decay_form="hyperball"),
    }
    options: list[dict[str, Any]] = [
        {"weight_decay_form": "cautious"}, {"cautious_update": True},
        {"weight_decay_form": "hyperball"}, {},
    ]  # fmt: skip
    params, grads = tensors(0), tensors(1)

    def stepped(config: nm.Config, routes: Any) -> dict[str, Tensor]:
        plan = nm.make_plan(params, config, routes=routes)
        return nm.update(params, grads, nm.init(plan, params), hyper_of(params), plan).params

    mixed = stepped(nm.Config(), {**own, "wide": nm.Route()})
    for name, fields in zip(("tall", "experts", "heads", "wide"), options, strict=True):
        assert same_bits(mixed[name], stepped(nm.Config(**fields), ROUTES)[name]), name
    plain = stepped(nm.Config(), ROUTES)
    assert not any(same_bits(mixed[name], plain[name]) for name in own)
    assert str(own["tall"]) == "decay cautious"
    assert "hyperball" in str(nm.make_plan(params, routes={**own, "wide": nm.Route()}).summary())


def test_a_parameter_group_has_them_by_its_routes(eager: None) -> None:
    a, b = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizer = nm.NorMuon(
        [
            {
                "params": [("a", a)],
                "routes": {"*": nm.Route("normuon", weight_decay_form="cautious")},
            },
            {"params": [("b", b)], "routes": {"*": nm.Route("normuon")}},
        ],
        lr=0.1,
        weight_decay=0.5,
    )
    for p in (a, b):
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert not torch.equal(a, b)
    with pytest.raises(TypeError, match=r"Route\(weight_decay_form="):
        nm.NorMuon([{"params": [("a", a)], "weight_decay_form": "cautious"}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nm.Config(reduction="entries", normalize=False), "normalize=False leaves them"),
        (lambda: nm.Config(weight_decay_form="hyperball", update_floor=0.1), "update_floor=0"),
        (
            lambda: nm.Config(weight_decay_form="hyperball", weight_decay_lr_power=2),
            "nothing decays",
        ),
        (lambda: nm.Config(replicas="share", reduction="entries"), "Config.replicas: 'share'"),
        (lambda: nm.Config(replicas="share", cautious_update=True), "replicas='each'"),
        (
            lambda: nm.make_plan(
                {"w": torch.ones(4, 4)},
                nm.Config(replicas="share"),
                routes={"w": nm.Route("normuon", cautious_update=True)},
            ),
            r"params\['w'\]: Route\(cautious_update=True\)",
        ),
        (lambda: nm.Config(precondition="columns"), "Config.precondition: expected one of"),
        (lambda: nm.Config(update_floor=-1.0), "Config.update_floor: expected a finite number"),
        (lambda: nm.Route("adamw", cautious_update=True), "are for matrices"),
        (lambda: nm.Route(weight_decay_form="l2"), "Route.weight_decay_form: expected None or"),
        (
            lambda: nm.make_plan(
                {"w": torch.ones(4, 4).bfloat16()}, config_of("hyperball"), routes={"w": nm.Route()}
            ),
            r"params\['w'\].*master='mantissa'",
        ),
        (
            lambda: nm.make_plan(
                {"w": torch.ones(4, 4)},
                nm.Config(update_floor=0.1),
                routes={"w": nm.Route("normuon", weight_decay_form="hyperball")},
            ),
            r"params\['w'\]: Config.update_floor",
        ),
    ],
)
def test_what_excludes_each_other_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_of_zeros_on_a_hyperball_is_refused_before_the_first_step(eager: None) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    plan = nm.make_plan({"w": weight}, config_of("hyperball"), routes={"w": nm.Route()})
    with pytest.raises(ValueError, match=r"params\['w'\]: has a matrix of zeros"):
        nm.init(plan, {"w": weight})
    with pytest.raises(ValueError, match=r"params\['w'\]: has a matrix of zeros"):
        nm.NorMuon([("w", weight)], config=config_of("hyperball"), routes={"w": nm.Route()})


def test_a_derivative_through_a_size_of_the_parameter_is_refused() -> None:
    params = tensors(0)
    for variant in ("hyperball", "floor"):
        plan = nm.make_plan(params, config_of(variant), routes=ROUTES)
        hyper = hyper_of(params)
        hyper = hyper._replace(lr=hyper.lr.requires_grad_())
        with pytest.raises(ValueError, match="depends on its own size"):
            nm.update(params, tensors(1), nm.init(plan, params), hyper, plan)


@EVERY
def test_a_saved_run_goes_on_as_if_nothing_had_been(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config, path = config_of(variant), tmp_path / "run.safetensors"
    params, state = run(config, steps=2)
    plan = nm.make_plan(params, config, routes=ROUTES)
    nm.save(path, params, state, plan)
    params, state, _ = nm.load(path, plan)
    after = nm.update(params, tensors(3), state, hyper_of(params), plan)
    assert differing(run(config), after[:2]) == []
    another: Any = "short" if config.reduction == "rows" else "rows"
    other = nm.make_plan(params, nm.Config(reduction=another), routes=ROUTES)
    with pytest.raises(nm.CheckpointError):
        nm.load(path, other)


@EVERY
def test_lists_have_the_bits_of_the_step(variant: str) -> None:
    config, names = config_of(variant), ("tall", "wide", "experts")
    params = {name: tensors(0)[name] for name in names}
    plan = nm.make_plan(params, config, routes=dict.fromkeys(names, nm.Route()))
    state = nm.init(plan, params)
    rates: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.1}
    lists = [x.clone() for x in params.values()]
    momentums = [state[f"{name}.momentum"].clone() for name in names]
    variances = [state[f"{name}.variance"].clone() for name in names if config.normalize]
    for k in range(2):
        grads = {name: tensors(1 + k)[name] for name in names}
        params, state, *_ = nm.update(params, grads, state, hyper_of(params), plan)
        own = [*grads.values()]
        nm.foreach_step_(lists, own, momentums, variances, config=config, compiled=False, **rates)
    for k, name in enumerate(names):
        assert same_bits(lists[k], params[name]) and same_bits(
            momentums[k], state[f"{name}.momentum"]
        )
        assert not variances or same_bits(variances[k], state[f"{name}.variance"])


@pytest.mark.parametrize("variant", ["nanochat", "floor", "all"])
def test_members_under_vmap_have_the_bits_of_their_own_steps(variant: str) -> None:
    config = config_of(variant)
    members = [tensors(seed) for seed in (0, 5)]
    plan = nm.make_plan(members[0], config, routes=ROUTES)
    states = [nm.init(plan, params) for params in members]
    grads = [tensors(seed) for seed in (1, 6)]
    hyper = hyper_of(members[0])

    def stacked(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([x[k] for x in each]) for k in each[0]}

    found = torch.func.vmap(lambda p, g, s: nm.update(p, g, s, hyper, plan)[:2])(
        stacked(members), stacked(grads), stacked(states)
    )
    for k, (params, grad, state) in enumerate(zip(members, grads, states, strict=True)):
        alone = nm.update(params, grad, state, hyper, plan)
        for got, want in zip(found, alone[:2], strict=True):
            for name, x in want.items():
                torch.testing.assert_close(got[name][k], x, rtol=1e-5, atol=1e-6)


def test_the_optimizer_saves_and_loads_variances_of_entries(eager: None) -> None:
    def made() -> tuple[torch.nn.Parameter, nm.NorMuon]:
        w = torch.nn.Parameter(torch.ones(4, 6))
        routes = {"w": nm.Route()}
        return w, nm.NorMuon([("w", w)], lr=0.02, config=config_of("adamuon"), routes=routes)

    (w, optimizer), (other, loaded) = made(), made()
    for k in range(4):
        w.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(k))
        optimizer.step()
        if k == 1:
            other.data.copy_(w.data)
            loaded.load_state_dict(optimizer.state_dict())
        if k > 1:
            other.grad = w.grad.clone()
            loaded.step()
    assert optimizer.state[w]["variance"].shape == (4, 6) and torch.equal(w, other)


@EVERY
def test_a_transposed_matrix_gets_the_transposed_update(variant: str) -> None:
    config, new = config_of(variant), []
    for transposed in (False, True):
        w, g = (tensors(seed)["wide"] for seed in (0, 1))
        params, grads = ({"w": x.mT.contiguous() if transposed else x} for x in (w, g))
        routes = {"w": nm.Route("normuon", transposed=transposed)}
        plan = nm.make_plan(params, config, routes=routes)
        result = nm.update(params, grads, nm.init(plan, params), hyper_of(params), plan)
        new.append(result.params["w"].mT if transposed else result.params["w"])
    torch.testing.assert_close(*new, rtol=1e-5, atol=1e-6)


@EVERY
def test_groups_with_rates_of_their_own_have_the_bits_of_their_own_plans(variant: str) -> None:
    config = config_of(variant)
    params = {"a": tensors(0)["wide"], "b": tensors(5)["wide"]}
    grads = {"a": tensors(1)["wide"], "b": tensors(6)["wide"]}
    routes = {"a": nm.Route("normuon", lr_mul=0.5), "b": nm.Route()}
    hypers = [nm.Hyper.of(params, lr=lr, beta2=b) for lr, b in ((0.02, 0.9), (0.03, 0.8))]
    plan = nm.make_plan(params, config, routes=routes, hyper_of={"a": 0, "b": 1})
    both = nm.update(params, grads, nm.init(plan, params), nm.Hyper.stack(hypers), plan)
    for name, hyper in zip(("a", "b"), hypers, strict=True):
        own, grad = {name: params[name]}, {name: grads[name]}
        plan = nm.make_plan(own, config, routes={name: routes[name]})
        alone = nm.update(own, grad, nm.init(plan, own), hyper, plan)
        assert same_bits(both.params[name], alone.params[name])


@pytest.mark.parametrize(("lr", "skipped"), [(1.0, False), (1e25, True)])
def test_a_step_to_the_middle_of_the_sphere_writes_nothing_that_is_not_finite(
    lr: float, skipped: bool
) -> None:
    params, config = {"a": torch.ones(1, 1)}, nm.Config.preset("hyperball", guard="full")
    plan = nm.make_plan(params, config, routes={"*": nm.Route()})
    hyper = nm.Hyper.of(params, lr=lr)
    result = nm.update(params, {"a": torch.ones(1, 1)}, nm.init(params, plan), hyper, plan)
    assert torch.equal(result.params["a"], params["a"]) and bool(result.skipped) == skipped


def test_the_plan_shows_what_a_route_has_of_its_own() -> None:
    route = nm.Route("normuon", cautious_update=True, weight_decay_form="hyperball")
    plan = nm.make_plan({"a": torch.randn(8, 12)}, routes={"*": route})
    assert "normuon decay hyperball cautious" in str(plan)


@pytest.mark.parametrize(
    ("per", "size"),
    [  # a floor is no floor for small parameters: any update is longer than this share of them
        *((per, size) for per in ("hyperball", "entries") for size in (1e-38, 1e-25, 1e20, 1e37)),
        *((per, size) for per in ("row", "matrix") for size in (1e20, 1e37)),
    ],
)
def test_parameters_whose_squares_are_no_float32_move_as_others_do(per: str, size: float) -> None:
    """By the same share of themselves, on a hyperball and above a floor."""
    options: Any = {"update_floor": 0.5, "update_floor_per": per}
    if per in ("hyperball", "entries"):
        reduction = "entries" if per == "entries" else "rows"
        options = {"weight_decay_form": "hyperball", "reduction": reduction}
    config = nm.Config(orthogonalize_dtype=torch.float32, **options)
    base, grad, moved = tensors(0)["wide"], {"w": tensors(1)["wide"]}, []
    for each in (1e10 if size > 1.0 else 1.0, size):
        params = {"w": base * each}
        plan = nm.make_plan(params, config, routes={"w": nm.Route()})
        state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
        new = nm.update(params, grad, state, hyper, plan).params["w"]
        moved.append((new.double() - params["w"].double()) / each)
    assert moved[0].norm() > 0.03 * base.norm()
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-6)  # 3e-7 was seen


def test_a_row_whose_update_has_tiny_entries_moves_by_the_floor_too() -> None:
    params, grad = {"w": torch.eye(3, 5)}, torch.eye(3, 5)
    grad[2] *= 1e-30  # its square is no float32
    options: Any = {"orthogonalize_dtype": torch.float32, "update_floor": 0.5}
    plan = nm.make_plan(params, nm.Config.preset("muon", **options), routes={"w": nm.Route()})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=1.0)
    new = nm.update(params, {"w": grad}, state, hyper, plan).params["w"]
    ratio = (new - params["w"]).norm(dim=1)
    torch.testing.assert_close(ratio[2], torch.tensor(0.5))
