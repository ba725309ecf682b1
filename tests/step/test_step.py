"""The contract of the step: pure, in place, ordered, static where it says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.step import local_update_

ROUTES = {
    "qkv": nm.Route(splits=(16, 8, 8)),
    "heads": nm.Route(heads=4),
    "out": nm.Route(heads=2, dim=1),
    "conv": nm.Route(flatten=True),
    "slow": nm.Route(lr_mul=0.5, wd_mul=0.0),
    "fixed": nm.Route("frozen"),
}
SHAPES = {
    "embed.weight": (20, 16),
    "square": (16, 16),
    "qkv": (32, 16),
    "up": (40, 16),
    "down": (16, 40),
    "heads": (16, 16),
    "out": (16, 16),
    "experts": (3, 16, 24),
    "deep": (2, 2, 8, 12),
    "conv": (6, 4, 3, 3),
    "slow": (16, 16),
    "fixed": (4, 4),
    "bias": (16,),
    "gain": (),
}


def problem(
    dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    return params, {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def setup(config: nm.Config | None = None, dtype: torch.dtype = torch.float32):
    params, grads = problem(dtype)
    plan = nm.make_plan(params, config, routes=ROUTES)
    return (
        params,
        grads,
        nm.init(plan, params),
        nm.Hyper.of(params, lr=0.02, weight_decay=0.1),
        plan,
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_update_writes_nothing_and_returns_the_keys_in_the_order_given(dtype: torch.dtype) -> None:
    params, grads, state, hyper, plan = setup(dtype=dtype)
    before = copies(params), copies(grads), copies(state)
    result = nm.update(params, grads, state, hyper, plan)
    assert same(params, before[0]) and same(grads, before[1]) and same(state, before[2])
    assert list(result.params) == list(params) and list(result.state) == list(state)
    shuffled = {name: params[name] for name in reversed(params)}
    assert list(nm.update(shuffled, grads, state, hyper, plan).params) == list(shuffled)
    for name in params:
        assert (
            result.params[name].dtype == dtype and result.params[name].shape == params[name].shape
        )
        assert torch.equal(result.params[name], params[name]) == (name == "fixed")


@pytest.mark.parametrize(
    ("guard", "compiled"), [("off", False), ("output", False), ("full", False), ("full", True)]
)
@pytest.mark.usefixtures("without_inductor")
def test_in_place_equals_out_of_place_and_leaves_the_gradients(guard: str, compiled: bool) -> None:
    """The graphs of the other guards are in compile_tests/test_listing.py, Inductor's code in
    test_inductor.py.
    """
    config = nm.Config(guard=guard, nesterov=True, method="standard", steps=1)
    params, grads, state, hyper, plan = setup(config if compiled else replace(config, steps=5))
    pure, in_place = (nm.step, nm.step_) if compiled else (nm.update, local_update_)
    expected = pure(params, grads, state, hyper, plan)
    here, there, kept = copies(params), copies(state), copies(grads)
    result = in_place(here, grads, there, hyper, plan)
    assert same(here, expected.params) and same(there, expected.state) and same(grads, kept)
    assert all(result.params[name] is here[name] for name in here)
    assert all(result.state[name] is there[name] for name in there)
    assert torch.equal(result.flags, expected.flags)


def test_no_result_shares_memory_with_what_was_given() -> None:
    params, grads, state, hyper, plan = setup()
    given = {t.untyped_storage().data_ptr() for d in (params, grads, state) for t in d.values()}
    result = nm.update(params, grads, state, hyper, plan)
    changed = [t for d in (result.params, result.state) for name, t in d.items() if name != "fixed"]
    assert not given & {t.untyped_storage().data_ptr() for t in changed}


def test_step_scaled_gradients_give_normuon_parameters_the_same_bits() -> None:
    params, grads, state, hyper, plan = setup()
    plain = nm.update(params, grads, state, hyper, plan)
    adamw = {p.name for p in plan.parameters if p.route.algorithm == "adamw"}
    for k in (-100, 100):
        scaled = {name: grad * 2.0**k for name, grad in grads.items()}
        result = nm.update(params, scaled, state, hyper, plan)
        assert all(
            torch.equal(result.params[name], plain.params[name])
            for name in params
            if name not in adamw
        )


@pytest.mark.parametrize(
    "absent",
    [("qkv",), ("square", "experts", "slow", "heads", "out"), ("bias", "gain", "embed.weight")],
)
def test_a_gradient_of_none_leaves_that_parameter_and_its_state(absent: tuple[str, ...]) -> None:
    params, grads, state, hyper, plan = setup(nm.Config(guard="full"))
    whole = nm.update(params, grads, state, hyper, plan)
    some = {name: None if name in absent else grad for name, grad in grads.items()}
    some["up"] = some["up"] * float("nan") if "bias" in absent else some["up"]
    result = nm.update(params, some, state, hyper, plan)
    if "bias" in absent:
        assert result.flags[1].tolist() == [int(name == "up") for name in plan.names]
        return
    for name in params:
        expected = params[name] if name in absent else whole.params[name]
        torch.testing.assert_close(
            result.params[name], expected, rtol=0, atol=1e-7
        )  # seen 0: bmm over fewer matrices
        if name in absent:
            assert torch.equal(result.params[name], params[name])
            assert all(
                torch.equal(result.state[k], state[k]) for k in state if k.startswith(f"{name}.")
            )


def test_lr_mul_and_wd_mul_are_those_of_a_parameter_group() -> None:
    params, grads, state, hyper, plan = setup()
    alone = {"w": params["slow"]}
    other = nm.make_plan(alone)
    group = nm.Hyper.of(alone, lr=0.01, weight_decay=0.0)
    expected = nm.update(alone, {"w": grads["slow"]}, nm.init(other, alone), group, other).params[
        "w"
    ]
    torch.testing.assert_close(
        nm.update(params, grads, state, hyper, plan).params["slow"], expected, rtol=0, atol=2e-7
    )


def test_every_split_and_head_gets_the_update_of_a_parameter_of_its_own() -> None:
    params, grads, state, hyper, plan = setup()
    result = nm.update(params, grads, state, hyper, plan).params
    cuts = {
        "qkv": [slice(0, 16), slice(16, 24), slice(24, 32)],
        "heads": [slice(4 * k, 4 * k + 4) for k in range(4)],
    }
    for name, pieces in cuts.items():
        for piece in pieces:
            alone = {"w": params[name][piece].clone()}
            other = nm.make_plan(alone)
            expected = nm.update(
                alone, {"w": grads[name][piece].clone()}, nm.init(other, alone), hyper, other
            ).params["w"]
            torch.testing.assert_close(
                result[name][piece], expected, rtol=0, atol=5e-7
            )  # seen 2.4e-7
    for k in range(2):
        alone = {"w": params["out"][:, 8 * k : 8 * k + 8].clone()}
        other = nm.make_plan(alone)
        own = {"w": grads["out"][:, 8 * k : 8 * k + 8].clone()}
        expected = nm.update(alone, own, nm.init(other, alone), hyper, other).params["w"]
        torch.testing.assert_close(result["out"][:, 8 * k : 8 * k + 8], expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("reduction", ["rows", "short"])
def test_state_has_the_documented_shapes_and_dtypes(reduction: str) -> None:
    _, _, state, _, _ = setup(nm.Config(reduction=reduction), torch.bfloat16)
    assert {t.dtype for name, t in state.items() if not name.startswith("guard.")} == {
        torch.float32
    }
    assert state["up.variance"].shape == (40, 1) and state["square.variance"].shape == (16, 1)
    assert state["down.variance"].shape == ((16, 1) if reduction == "rows" else (1, 40))
    assert state["experts.variance"].shape == ((3, 16, 1) if reduction == "rows" else (3, 1, 24))
    assert state["deep.variance"].shape == ((2, 2, 8, 1) if reduction == "rows" else (2, 2, 1, 12))
    assert all(not tensor.any() for tensor in state.values()) and not any(
        name.startswith("fixed") for name in state
    )


def test_muon_without_normalization_has_no_variance() -> None:
    params, grads, state, hyper, plan = setup(nm.Config(normalize=False, scale="none"))
    assert not any(name.endswith(".variance") for name in state)
    moved = nm.update(
        params, grads, state, hyper._replace(weight_decay=torch.tensor(0.0)), plan
    ).params["square"]
    expected = params["square"] - 0.02 * nm.orthogonalize(0.05 * grads["square"])
    torch.testing.assert_close(
        moved, expected, rtol=0, atol=1e-6
    )  # seen 2e-7: scale and order of the products


@pytest.mark.usefixtures("without_inductor")
def test_parameters_that_require_grad_are_written_in_place_without_a_graph() -> None:
    model = torch.nn.Linear(8, 8)
    params = dict(model.named_parameters())
    plan = nm.make_plan(params, nm.Config(method="standard", steps=1))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    before = model.weight.detach().clone()
    model(torch.randn(4, 8)).sum().backward()
    nm.step_(params, {name: p.grad for name, p in params.items()}, state, hyper, plan)
    assert (
        not torch.equal(model.weight, before)
        and model.weight.requires_grad
        and model.weight.grad_fn is None
    )


@pytest.mark.parametrize("which", ["params", "grads", "state", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guard": "full", "nesterov": True},
        {"master": "mantissa"},
        {"master": "fp32", "guard": "full"},
        {"master": "stochastic"},
    ],
    ids=str,
)
def test_channels_last_filters_have_the_bits_of_contiguous_ones(
    which: str, options: dict[str, str]
) -> None:
    """Parameters, gradients and state, by flatten, as kernels and by AdamW; they keep strides."""
    shapes = {
        "conv": (6, 4, 3, 3),
        "deep": (4, 2, 3, 3, 2),
        "kernels": (4, 3, 6, 5),
        "adamw": (6, 4, 3, 3),
    }
    routes = {name: nm.Route(flatten=True) for name in ("conv", "deep")}
    routes |= {"kernels": nm.Route("normuon"), "adamw": nm.Route("adamw")}
    dtype = torch.bfloat16 if "master" in options else torch.float32
    generator = torch.Generator().manual_seed(0)

    def made() -> dict[str, Tensor]:
        return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}

    def turned(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if which not in (kind, "all"):
            return copies(tensors)
        return {k: x.clone(memory_format=formats[x.ndim]) for k, x in tensors.items()}

    start, seeds = made(), [made(), made()]
    plan = nm.make_plan(start, nm.Config(**options), routes=routes)
    hyper = nm.Hyper.of(start, lr=0.02, weight_decay=0.1)
    expected = start, nm.init(plan, start)
    for grads in seeds:
        result = nm.update(expected[0], grads, expected[1], hyper, plan)
        expected = result.params, result.state
    params = turned(start, "params")
    plan = nm.make_plan(params, nm.Config(**options), routes=routes)
    state = nm.init(plan, params)
    if which in ("state", "all"):
        state = {
            k: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
            for k, x in state.items()
        }
    pure = copies(params), copies(state)
    strides = {k: x.stride() for k, x in (params | state).items()}
    assert which == "grads" or any(not x.is_contiguous() for x in (params | state).values())
    for grads in seeds:
        local_update_(params, turned(grads, "grads"), state, hyper, plan)
        result = nm.update(pure[0], turned(grads, "grads"), pure[1], hyper, plan)
        pure = result.params, result.state
    for found in ((params, state), pure):
        for mine, theirs in zip(found, expected, strict=True):
            assert same(mine, theirs)
            assert all(x.stride() == strides[name] for name, x in mine.items())


def test_a_model_that_becomes_channels_last_after_construction_steps_as_before(
    eager: None,
) -> None:
    models = []
    for turn in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
        optimizer = nm.NorMuon(
            model.named_parameters(), lr=0.02, routes={"0.weight": nm.Route(flatten=True)}
        )
        for step in range(3):
            if turn and step == 1:
                model.to(memory_format=torch.channels_last)
            for p in model.parameters():
                p.grad = torch.sin(torch.arange(p.numel()) + step).view(p.shape).to(p.dtype)
            optimizer.step()
        models.append(model)
    assert not models[1][0].weight.is_contiguous()
    assert same(dict(models[0].state_dict()), dict(models[1].state_dict()))


def test_compiled_steps_take_channels_last_filters(without_inductor: None) -> None:
    params, grads, state, hyper, plan = setup(nm.Config(method="standard", steps=1))
    expected = nm.update(params, grads, state, hyper, plan)
    for tensors in (params, grads):
        tensors["conv"] = tensors["conv"].to(memory_format=torch.channels_last)
    pure = nm.step(params, grads, state, hyper, plan)
    assert pure.params["conv"].stride() == params["conv"].stride()
    nm.step_(params, grads, state, hyper, plan)
    for found in (pure.params, params):
        assert same(found, expected.params)


@pytest.mark.parametrize("share", ["momentum", "beta2", "adamw_beta1", "adamw_beta2"])
def test_a_share_that_float32_rounds_to_one_is_refused_and_the_largest_below_stays_finite(
    share: str,
) -> None:
    params, grads = problem()
    plan = nm.make_plan(params, routes=ROUTES)
    below = 1 - 2.0**-25 - 2.0**-50

    def of(value: float) -> nm.Hyper:
        betas = {"adamw_beta1": (value, 0.95), "adamw_beta2": (0.9, value)}.get(share)
        return nm.Hyper.of(
            params, lr=0.02, **({share: value} if betas is None else {"adamw_betas": betas})
        )

    for value in (1 - 2.0**-25, 0.99999999, 1.0):
        with pytest.raises(
            ValueError, match=rf"{share}: expected a number in \[0, 1\), got {value!r} as float32"
        ):
            of(value)
    result = nm.update(params, grads, nm.init(plan, params), of(below), plan)
    assert getattr(of(below), share) == 1 - 2.0**-24
    assert all(x.isfinite().all() for x in (*result.params.values(), *result.state.values()))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "adamw_lr", "adamw_eps"])
def test_a_number_that_is_infinite_in_float32_is_refused(name: str) -> None:
    params, _ = problem()
    for value in (1e39, float("inf"), float("nan")):
        with pytest.raises(
            ValueError,
            match=rf"{name}: expected a finite number >= 0, got {value!r} as float32".replace(
                "+", "."
            ),
        ):
            nm.Hyper.of(params, **{"lr": 0.1, name: value})


def test_inside_autocast_the_step_and_orthogonalize_have_the_bits_that_they_have_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = graphs.counting(monkeypatch)
    params, grads = ({name: given[name] for name in ("up", "bias")} for given in problem())
    plan = nm.make_plan(params, nm.Config(orthogonalize_dtype=torch.float32, steps=1))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    own = torch.compile(nm.update, backend="aot_eager", fullgraph=True)
    alone = grads["up"]
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=inside):
            assert ((alone @ alone.mT).dtype == torch.float16) == inside
            results = [run(params, grads, state, hyper, plan) for run in (nm.update, nm.step, own)]
            found.append([result.params | result.state for result in results])
            found[-1].append({"x": nm.orthogonalize(alone, dtype=torch.float32)})
    assert all(same(a, b) for a, b in zip(*found, strict=True)) and counter.frame_count == 1
