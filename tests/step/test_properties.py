"""What holds for every shape, dtype, route and finite gradient.

Examples are drawn by hypothesis, the same ones every time.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import normuon_fn as nm
from normuon_fn.step import local_update_

pytestmark = pytest.mark.filterwarnings(
    "ignore:The rule of"
)  # any shape may look like a convolution's

Tensors = dict[str, Tensor]

examples = settings(max_examples=60, deadline=None, derandomize=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Powers of ten that a gradient of the dtype may have; float64 gradients have a test of their own
# below.
REACH = {
    torch.float32: (-38, 39),
    torch.bfloat16: (-38, 39),
    torch.float16: (-7, 4),
    torch.float64: (-38, 39),
}
EMPTY = ((0, 8), (8, 0), (3, 0, 4), (0,))
MATRICES = (
    (1, 1),
    (1, 9),
    (9, 1),
    (2, 2),
    (8, 8),
    (6, 17),
    (17, 6),
    (3, 6, 8),
    (2, 9, 4),
    (2, 1, 3, 6, 4),
    (1, 2, 1, 1, 7),
)
KINDS = (
    "zeros",
    "subnormal",
    "gaussian",
    "rank one",
    "repeated rows",
    "huge row",
    "huge column",
    "one entry",
    "constant",
    "wild",
)
CONFIGS = {
    "default": {},
    "nesterov": {"nesterov": True},
    "short": {"reduction": "short"},
    "standard": {"method": "standard"},
    "gram": {"method": "gram"},
    "float16": {"orthogonalize_dtype": torch.float16},
    "bfloat16": {"orthogonalize_dtype": torch.bfloat16},
    "muon": {"normalize": False, "scale": "muon"},
    **{
        preset: preset
        for preset in ("paper", "author", "dion", "modded_nanogpt", "emerging_optimizers")
    },
}


def config_of(name: str, guard: str = "off") -> nm.Config:
    options = CONFIGS[name]
    return (
        nm.Config.preset(options, guard=guard)
        if isinstance(options, str)
        else nm.Config(guard=guard, **options)
    )


class Drawn(NamedTuple):
    """One parameter and what its gradients look like: a kind and a power of ten a step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    route: nm.Route | None  # None: by shape
    grads: tuple[tuple[str, int], ...]

    def largest(self, config: nm.Config) -> float:
        """Of a gradient's entries.

        AdamW flags a square that overflows float32, and a sum of gradients may overflow.
        """
        adamw = len(self.shape) < 2 if self.route is None else self.route.algorithm == "adamw"
        limit = (
            1e18
            if adamw
            else 1e38
            if config.momentum_form == "sum"
            else torch.finfo(torch.float32).max
        )
        return min(limit, torch.finfo(self.dtype).max)


def routes_for(shape: tuple[int, ...]) -> list[nm.Route | None]:
    routes: list[nm.Route | None] = [
        None,
        nm.Route("adamw"),
        nm.Route("adamw", lr_mul=0.3, wd_mul=2.0),
        nm.Route("frozen"),
    ]
    if len(shape) >= 2:
        routes += [nm.Route(lr_mul=0.5, wd_mul=0.0)]
        routes += [nm.Route(flatten=True)] if len(shape) > 2 else []
    if len(shape) == 2 and shape[0] > 1:
        routes += [nm.Route(splits=(1, shape[0] - 1))]
    if len(shape) == 2 and shape[1] % 2 == 0:
        routes += [nm.Route(heads=shape[1] // 2, dim=1)] if shape[1] else []
    if len(shape) == 2 and shape[0] % 2 == 0 and shape[0]:
        routes += [nm.Route(heads=2)]
    return routes


@st.composite
def parameters(draw: st.DrawFn, steps: int = 2, most: int = 4) -> tuple[Drawn, ...]:
    drawn = []
    for _ in range(draw(st.integers(1, most))):
        shape = draw(st.sampled_from((*MATRICES, *EMPTY, (), (7,))))
        dtype = draw(st.sampled_from(DTYPES))
        route = draw(st.sampled_from(routes_for(shape)))
        low, high = REACH[dtype]
        kind = st.tuples(
            st.sampled_from(KINDS), st.sampled_from((low, 0, high)) | st.integers(low, high)
        )
        kinds = draw(st.lists(kind, min_size=steps, max_size=steps))
        drawn.append(Drawn(shape, dtype, route, tuple(kinds)))
    return tuple(drawn)


def values(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    power: int,
    seed: int,
    largest: float = 1e38,
) -> Tensor:
    """A finite tensor of that kind times 10**power."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole, one = 10.0**power, x.flatten()[:1].clone()
    if len(shape) < 2 and kind in ("rank one", "repeated rows", "huge row", "huge column"):
        kind = "gaussian"
    match kind:
        case "zeros":
            x = torch.zeros_like(x)
        case "subnormal":
            x, whole = (
                x.sign() * torch.randint(0, 4, shape, generator=generator),
                torch.finfo(dtype).smallest_normal / 64,
            )
        case "rank one":
            x = x[..., :1] * x[..., :1, :]
        case "repeated rows":
            x = x[..., :1, :].expand(shape).clone()
        case "huge row":
            x[..., -1:, :] *= 1e6
        case "huge column":
            x[..., :1] *= 1e6
        case "one entry":
            x = torch.zeros_like(x)
            x.view(-1)[: len(one)] = one
        case "constant":
            x = torch.ones_like(x)
        case "wild":
            x = x * 10.0 ** (-12 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return (x * whole).clamp(-largest, largest).to(dtype)


def problem(drawn: tuple[Drawn, ...], config: nm.Config) -> tuple[nm.Plan, Tensors, list[Tensors]]:
    """``(plan, params, the gradients of every step)``."""
    params = {f"p{k}": values(d.shape, d.dtype, "gaussian", 0, 7 * k) for k, d in enumerate(drawn)}
    # Matrices of one row, of one column or of one entry too: by their shapes they are vectors.
    routes = {
        f"p{k}": d.route or nm.Route("normuon")
        for k, d in enumerate(drawn)
        if d.route is not None or len(d.shape) > 1
    }
    steps = [
        {
            f"p{k}": values(d.shape, d.dtype, *d.grads[step], 100 * step + k, d.largest(config))
            for k, d in enumerate(drawn)
        }
        for step in range(len(drawn[0].grads))
    ]
    return nm.make_plan(params, config, routes=routes), params, steps


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@examples
@given(drawn=parameters(), config=st.sampled_from(sorted(CONFIGS)))
def test_finite_gradients_are_never_skipped_and_leave_everything_finite_and_in_its_form(
    drawn: tuple[Drawn, ...], config: str
) -> None:
    plan, params, steps = problem(drawn, config_of(config, "full"))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for grads in steps:
        assert all(grad.isfinite().all() for grad in grads.values())
        result = nm.update(params, grads, state, hyper, plan)
        assert not result.flags.any() and not result.skipped
        for old, new in ((params, result.params), (state, result.state)):
            assert list(old) == list(new)
            assert all(
                new[name].dtype == old[name].dtype and new[name].shape == old[name].shape
                for name in old
            )
            assert all(x.isfinite().all() for x in new.values())
        for k, one in enumerate(drawn):
            if one.route is not None and one.route.algorithm == "frozen":
                assert torch.equal(result.params[f"p{k}"], params[f"p{k}"])
        params, state = result.params, result.state


@examples
@given(
    drawn=parameters(steps=1),
    config=st.sampled_from(sorted(CONFIGS)),
    weight_decay=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_a_zero_gradient_is_weight_decay_and_nothing_else(
    drawn: tuple[Drawn, ...], config: str, weight_decay: float
) -> None:
    options = config_of(config)
    plan, params, _ = problem(drawn, options)
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=weight_decay)
    grads = {name: torch.zeros_like(p) for name, p in params.items()}
    result = nm.update(params, grads, nm.init(plan, params), hyper, plan)
    for parameter in plan.parameters:
        old, new, route = params[parameter.name], result.params[parameter.name], parameter.route
        if weight_decay == 0.0 or route.algorithm == "frozen":
            assert torch.equal(new, old)
            continue
        squared = route.algorithm == "normuon" and options.weight_decay_lr_power == 2
        lr = hyper.lr.double() * route.lr_mul
        decay = (lr * lr if squared else lr) * hyper.weight_decay.double() * route.wd_mul
        # One rounding to the parameter's dtype, and one of lr wd to float32. Seen: 1 ulp, and 6e-10
        # for float64.
        rtol = 1e-8 if old.dtype == torch.float64 else torch.finfo(old.dtype).eps
        torch.testing.assert_close(
            new.double(),
            old.double() * (1 - decay),
            rtol=rtol,
            atol=1e-7 if old.dtype == torch.float16 else 0,
        )


@examples
@given(
    shape=st.sampled_from(MATRICES),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    kind=st.sampled_from(
        (
            "gaussian",
            "rank one",
            "repeated rows",
            "huge row",
            "huge column",
            "one entry",
            "constant",
        )
    ),
    power=st.integers(-30, 37),
    lr=st.sampled_from((1e-4, 0.02, 1.0)),
)
@example(shape=(64, 256), dtype=torch.float32, kind="gaussian", power=0, lr=0.02)
@example(shape=(256, 64), dtype=torch.float32, kind="gaussian", power=0, lr=0.02)
def test_the_update_of_every_matrix_has_rms_a_fifth_of_lr_whatever_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, power: int, lr: float
) -> None:
    grads = {"w": values(shape, dtype, kind, power, 1).float()}
    params = {"w": torch.zeros(shape)}
    plan = nm.make_plan(params, routes={"w": nm.Route("normuon")})
    hyper = nm.Hyper.of(params, lr=lr)
    moved = nm.update(params, grads, nm.init(plan, params), hyper, plan).params["w"]
    rms = moved.double().square().mean((-2, -1)).sqrt()
    has_gradient = grads["w"].abs().amax((-2, -1)) > 0
    expected = torch.where(has_gradient, 0.2 * lr, 0.0).double()
    torch.testing.assert_close(rms, expected, rtol=1e-6, atol=0)


@examples
@given(drawn=parameters(most=6), config=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 1000))
def test_the_order_of_the_parameters_changes_no_bit(
    drawn: tuple[Drawn, ...], config: str, seed: int
) -> None:
    plan, params, steps = problem(drawn, config_of(config, "full"))
    names = list(params)
    random.Random(seed).shuffle(names)
    shuffled = {name: params[name] for name in names}
    # Matrices of one row, of one column or of one entry too: by their shapes they are vectors.
    routes = {
        f"p{k}": d.route or nm.Route("normuon")
        for k, d in enumerate(drawn)
        if d.route is not None or len(d.shape) > 1
    }
    other = nm.make_plan(shuffled, config_of(config, "full"), routes=routes)
    state, other_state = nm.init(plan, params), nm.init(other, shuffled)
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for grads in steps:
        straight = nm.update(params, grads, state, hyper, plan)
        mixed = nm.update(
            shuffled, {name: grads[name] for name in names}, other_state, hyper, other
        )
        assert list(mixed.params) == names
        assert same(straight.params, {name: mixed.params[name] for name in params})
        assert same(straight.state, {name: mixed.state[name] for name in state})
        params, state, shuffled, other_state = (
            straight.params,
            straight.state,
            mixed.params,
            mixed.state,
        )


@examples
@given(
    drawn=parameters(),
    config=st.sampled_from(sorted(CONFIGS)),
    guard=st.sampled_from(("off", "output", "full")),
    poisoned=st.booleans(),
)
def test_in_place_equals_out_of_place_bit_for_bit(
    drawn: tuple[Drawn, ...], config: str, guard: str, poisoned: bool
) -> None:
    plan, params, steps = problem(drawn, config_of(config, guard))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    here, there = ({name: x.clone() for name, x in given.items()} for given in (params, state))
    for grads in steps:
        if poisoned and guard != "off":
            grads["p0"].view(-1)[:1] = float("nan")
        kept = {name: grad.clone() for name, grad in grads.items()}
        pure = nm.update(params, grads, state, hyper, plan)
        result = local_update_(here, grads, there, hyper, plan)
        assert all(result.params[name] is here[name] for name in here)
        for name in pure.params:
            assert torch.equal(here[name], pure.params[name])
        for name in pure.state:
            assert torch.equal(
                there[name].nan_to_num(nan=1.5), pure.state[name].nan_to_num(nan=1.5)
            )
        assert torch.equal(result.flags, pure.flags) and torch.equal(result.skipped, pure.skipped)
        assert all(torch.equal(kept[name].nan_to_num(), grads[name].nan_to_num()) for name in grads)
        params, state = pure.params, pure.state


POWERS = {
    torch.float32: (-118, 120),
    torch.bfloat16: (-118, 120),
    torch.float16: (-13, 12),
    torch.float64: (-118, 120),
}


@examples
@given(
    shape=st.sampled_from(MATRICES),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from(sorted(CONFIGS)),
    guard=st.sampled_from(("off", "full")),
    where=st.floats(0, 1),
)
@example(shape=(6, 17), dtype=torch.float32, config="default", guard="full", where=0.0)
@example(shape=(6, 17), dtype=torch.float32, config="default", guard="full", where=1.0)
@example(shape=(8, 8), dtype=torch.float32, config="dion", guard="full", where=0.0)
@example(shape=(8, 8), dtype=torch.float32, config="dion", guard="full", where=1.0)
def test_gradients_times_a_power_of_two_give_the_same_weights_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, config: str, guard: str, where: float
) -> None:
    low, high = POWERS[dtype]
    k = round(low + where * (high - low))
    params = {"w": values(shape, dtype, "gaussian", 0, 0)}
    plan = nm.make_plan(params, config_of(config, guard), routes={"w": nm.Route("normuon")})
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    ends = []
    for power in (0, k):
        here, state = params, nm.init(plan, params)
        for step in range(2):
            grad = torch.randint(
                -8, 9, shape, generator=torch.Generator().manual_seed(step)
            ).double()
            result = nm.update(here, {"w": (grad * 2.0**power).to(dtype)}, state, hyper, plan)
            here, state = result.params, result.state
        ends.append((here["w"], state.get("w.variance")))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] is None or torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("power", [-1000, -160, 130, 600, 1015])
@pytest.mark.parametrize("guard", ["output", "full"])
def test_a_float64_gradient_outside_the_range_of_float32_is_no_error(
    guard: str, power: int
) -> None:
    params = {
        "w": values((6, 8), torch.float64, "gaussian", 0, 0),
        "deep": values((2, 8, 6), torch.float64, "gaussian", 0, 1),
    }
    plan, hyper = nm.make_plan(params, nm.Config(guard=guard)), nm.Hyper.of(params, lr=0.02)
    grads = {name: p.sign() * (1 + p.abs().floor()) for name, p in params.items()}  # small integers
    plain = nm.update(params, grads, nm.init(plan, params), hyper, plan)
    scaled = {name: grad * 2.0**power for name, grad in grads.items()}
    result = nm.update(params, scaled, nm.init(plan, params), hyper, plan)
    assert not result.flags.any() and not result.skipped
    assert same(result.params, plain.params)
