"""Every pair of dtypes that a step can be asked for, against the oracle; and what operators refuse.

Parameters, gradients, products, momentum and masters each have a dtype of their own.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.ops.rounding import joined_with
from normuon_fn.step import local_update_
from tests import oracle
from tests.inputs import gaussian

WIDE, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8), "bias": (5,)}
LR, DECAY = 0.02, 0.1
MASTERS = {
    torch.bfloat16: ("none", "mantissa", "fp32", "stochastic"),
    torch.float16: ("none", "fp32"),
}
CASES = [
    (p, o, m, master, normalize)
    for p, o, m, normalize in itertools.product(
        (*WIDE, *HALF), (None, *WIDE, *HALF), (None, torch.float64, torch.bfloat16), (True, False)
    )
    for master in MASTERS.get(p, ("none",))
]


def problem(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The same values in every dtype."""
    return {
        name: gaussian(*shape, seed=seed + k).bfloat16().to(dtype)
        for k, (name, shape) in enumerate(SHAPES.items())
    }


def expected(seeds: tuple[int, ...], normalize: bool) -> dict[str, np.ndarray]:
    """What the oracle makes of the matrices."""
    rule = oracle.Rule(normalize=normalize, rows=oracle.schedule("polar_express", 5, 1.05))
    found = {}
    for name in ("wide", "tall", "square"):
        w = problem(torch.float64, 0)[name].numpy()
        m, v = np.zeros_like(w), np.zeros((w.shape[0], 1))
        for seed in seeds:
            g = problem(torch.float64, seed)[name].numpy()
            w, m, v = oracle.normuon_matrix(
                rule, w, g, m, v, lr=LR, beta=0.95, beta2=0.95, weight_decay=DECAY
            )
        found[name] = w
    return found


def masters(params: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    rests = {name: state.get(f"{name}.mantissa", state.get(f"{name}.master")) for name in params}
    return {k: x if (rest := rests[k]) is None else joined_with(x, rest) for k, x in params.items()}


@pytest.mark.parametrize(("dtype", "products", "momentum", "master", "normalize"), CASES)
def test_every_pair_of_dtypes_is_the_oracles_step_and_changes_no_dtype_shape_or_stride(
    dtype: torch.dtype,
    products: torch.dtype | None,
    momentum: torch.dtype | None,
    master: str,
    normalize: bool,
) -> None:
    config = nm.Config(
        orthogonalize_dtype=products, momentum_dtype=momentum, master=master, normalize=normalize,
        guard="full",
    )  # fmt: skip
    params = problem(dtype, 0)
    plan = nm.make_plan(params, config)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR, weight_decay=DECAY)
    pure_params, pure_state = params, dict(state)
    params, state = ({k: x.clone() for k, x in d.items()} for d in (params, state))
    forms = {k: (x.shape, x.stride(), x.dtype) for d in (params, state) for k, x in d.items()}
    for seed in (10, 20):
        grads = problem(dtype, seed)
        pure = nm.update(pure_params, grads, pure_state, hyper, plan)
        pure_params, pure_state = pure.params, pure.state
        local_update_(params, grads, state, hyper, plan)
    for mine, theirs in ((params, pure_params), (state, pure_state)):
        for name, x in mine.items():
            assert (x.shape, x.stride(), x.dtype) == forms[name]
            assert theirs[name].dtype == x.dtype and torch.equal(x, theirs[name]), name
    wide = masters(params, state)
    assert not pure.flags.any()
    # An update of RMS 0.2 lr is 4e-3 long; in units of it the seen errors were 6e-3 (bfloat16
    # products), and half an ulp of a parameter that has no master.
    update = 0.2 * LR * math.sqrt(2)
    precise = all(d not in HALF for d in (products, momentum)) and products is not None
    room = 1e-9 if {dtype, products or dtype, momentum or dtype} == {torch.float64} else 2e-6
    for name, want in expected((10, 20), normalize).items():
        error = (wide[name].double() - torch.from_numpy(want)).abs()
        ulp = 0.0
        if master in ("none", "stochastic") and dtype in HALF:
            ulp = 2.0 * torch.finfo(dtype).eps * (1 + float(np.abs(want).max()))
        size = 1.0 if normalize else 3.0  # without a variance rows differ in length
        limit = (room if precise else 0.15 * update * size) + ulp
        assert float(error.max()) <= limit, (name, float(error.max()))


# ------------------------------------------------------------------------- an own orthogonalizer


@pytest.mark.parametrize("returned", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [*WIDE, *HALF])
def test_an_own_orthogonalizer_may_return_any_floating_dtype(
    dtype: torch.dtype, returned: torch.dtype
) -> None:
    """What it returns is taken as float32, or as float64 where the parameters are float64."""
    seen = []

    def own(stack: Tensor, to: torch.dtype = returned) -> Tensor:
        seen.append(stack.dtype)
        return (stack / 4).to(to)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for master in ("none", "fp32", *(["mantissa"] if dtype == torch.bfloat16 else [])):
        for momentum in (None, torch.float64, torch.bfloat16):
            results = []
            for rounded_by in (own, lambda stack: own(stack).to(wide)):
                config = nm.Config(
                    orthogonalizer=rounded_by, master=master, momentum_dtype=momentum
                )
                params = problem(dtype, 0)
                plan = nm.make_plan(params, config)
                state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
                local_update_(params, problem(dtype, 10), state, hyper, plan)
                results.append(params | state)
            assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
    assert set(seen) == {wide}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda x: x.to(torch.int32), r"Config\.orthogonalizer: .*floating-point.*torch\.int32"),
        (lambda x: x.to(torch.complex64), r"Config\.orthogonalizer: .*floating-point.*complex64"),
        (lambda x: (x, x), r"Config\.orthogonalizer: .*floating-point.*tuple"),
        (lambda x: x.mT, r"Config\.orthogonalizer: expected \[n, 6, 10\]"),
        (lambda x: x[:1], r"Config\.orthogonalizer: expected \[n, 6, 10\]"),
        (lambda x: x[0], r"Config\.orthogonalizer: expected \[n, 6, 10\]"),
    ],
)
def test_an_own_orthogonalizer_that_returns_something_else_is_refused(own, message: str) -> None:
    params = {"a": gaussian(6, 10), "b": gaussian(6, 10)}
    plan = nm.make_plan(params, nm.Config(orthogonalizer=own))
    before = {name: x.clone() for name, x in params.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        local_update_(params, params, nm.init(plan, params), nm.Hyper.of(params, lr=LR), plan)
    assert all(torch.equal(params[name], x) for name, x in before.items())


# ---------------------------------------------------------------------------------- compiled ones


def test_float64_products_of_float32_and_bfloat16_parameters_compile(
    without_inductor: None,
) -> None:
    config = nm.Config(
        orthogonalize_dtype=torch.float64, momentum_dtype=torch.bfloat16, master="mantissa"
    )
    params = {
        f"{name}.{k}": x
        for k, dtype in enumerate((torch.float32, torch.bfloat16))
        for name, x in problem(dtype, 0).items()
    }
    grads = {name: torch.flip(x, [0]) for name, x in params.items()}
    plan = nm.make_plan(params, config)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    expected = nm.update(params, grads, state, hyper, plan)
    pure = nm.step(params, grads, state, hyper, plan)
    nm.step_(params, grads, state, hyper, plan)
    for name, x in (params | state).items():
        want = (expected.params | expected.state)[name]
        assert torch.equal(x, want) and torch.equal((pure.params | pure.state)[name], want), name
        assert x.dtype == want.dtype and x.shape == want.shape


# ------------------------------------------------------------------------- what operators refuse


def ones(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


ONE, TWO = torch.tensor(1.0), ones((8, 8), (8, 8))
BF16, REST = ones((8, 8), dtype=torch.bfloat16), ones((8, 8), dtype=torch.int16)
UPDATE, FACTOR = torch.ones(1, 8, 8), torch.ones(1, 8, 1)
RATES = (ONE,) * 7
MISFITS = {
    "a stack of wider matrices": ("unstack", TWO, torch.ones(2, 8, 16)),
    "a stack of fewer matrices": ("unstack", TWO, torch.ones(1, 8, 8)),
    "a stack of taller matrices": ("unstack", TWO, torch.ones(2, 16, 8)),
    "a stack of another dtype": ("unstack", TWO, torch.ones(2, 8, 8).double()),
    "one matrix of a list is wider": ("unstack", ones((8, 8), (8, 4)), torch.ones(2, 8, 8)),
    "a stack in a list": ("unstack", ones((2, 8, 8), (8, 8)), torch.ones(2, 8, 8)),
    "gradients of another shape": ("advance", TWO, ones((8, 8), (8, 4)), ONE, None, [2], "ema", 0),
    "gradients that would broadcast": (
        "advance",
        TWO,
        ones((8, 8), (1, 8)),
        ONE,
        None,
        [2],
        "ema",
        0,
    ),
    "too few gradients": ("advance", TWO, ones((8, 8)), ONE, None, [2], "ema", 0),
    "sizes of more tensors": ("advance", TWO, TWO, ONE, None, [3], "ema", 0),
    "lookahead of another shape": ("lookahead", TWO, ones((8, 8), (8, 4)), ONE, [2], "ema", 0),
    "a wider update": ("apply", ones((8, 8)), torch.ones(1, 8, 16), FACTOR, ONE, None, False),
    "an update that would broadcast": (
        "apply",
        ones((8, 8)),
        torch.ones(1, 1, 8),
        FACTOR,
        ONE,
        None,
        False,
    ),
    "two updates of one parameter": (
        "apply",
        ones((8, 8)),
        torch.ones(2, 8, 8),
        FACTOR,
        ONE,
        None,
        False,
    ),
    "a factor of another length": (
        "apply",
        ones((8, 8)),
        UPDATE,
        torch.ones(1, 4, 1),
        ONE,
        None,
        False,
    ),
    "a factor in float64": ("apply", ones((8, 8)), UPDATE, FACTOR.double(), ONE, None, False),
    "a float64 factor of masters": (
        "apply_wide",
        BF16,
        REST,
        UPDATE,
        FACTOR.double(),
        ONE,
        None,
        False,
    ),
    "rests of another shape": (
        "apply_wide",
        BF16,
        ones((8, 4), dtype=torch.int16),
        UPDATE,
        FACTOR,
        ONE,
        None,
        False,
    ),
    "rests of another dtype": ("apply_wide", BF16, BF16, UPDATE, FACTOR, ONE, None, False),
    "moments of another shape": ("adamw", TWO, ones((8, 8), (8, 4)), TWO, TWO, *RATES, None),
    "a gradient that would broadcast": ("adamw", TWO, TWO, TWO, ones((8, 8), (1, 8)), *RATES, None),
    "mantissas of another shape": (
        "adamw_wide",
        BF16,
        ones((4, 8), dtype=torch.int16),
        *[ones((8, 8))] * 3,
        *RATES,
        None,
    ),
    "flags of another shape": ("adamw_flags", TWO, TWO, ones((8, 8), (8, 4)), *RATES[:5]),
    "powers of other matrices": (
        "gather",
        TWO,
        TWO,
        ONE,
        torch.ones(2),
        torch.ones(1),
        [2],
        "ema",
        False,
        False,
        torch.float32,
        [False],
    ),
    "gathered with other gradients": (
        "gather",
        TWO,
        ones((8, 4), (8, 8)),
        ONE,
        torch.ones(2),
        torch.ones(2),
        [2],
        "ema",
        True,
        False,
        torch.float32,
        [False],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_no_operator_changes_what_it_is_given_to_fit(misfit: str) -> None:
    name, *arguments = MISFITS[misfit]
    given = [x for a in arguments for x in (a if isinstance(a, list) else [a])]
    before = [(x.clone(), x.shape, x.stride()) for x in given if isinstance(x, Tensor)]
    for form in (name, f"{name}_"):
        if hasattr(torch.ops.normuon_fn, form):
            with pytest.raises((ValueError, TypeError), match="expected"):
                getattr(torch.ops.normuon_fn, form)(*arguments)
    tensors = [x for x in given if isinstance(x, Tensor)]
    for x, (values, shape, stride) in zip(tensors, before, strict=True):
        assert x.shape == shape and x.stride() == stride and torch.equal(x, values)


# ------------------------------------------------------------- float32 gradients, 16-bit parameters


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("guard", ["off", "full"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        *((torch.bfloat16, m) for m in ("none", "mantissa", "fp32", "stochastic")),
        *((torch.float16, m) for m in ("none", "fp32")),
    ],
)
def test_float32_gradients_of_16_bit_parameters_are_taken_as_they_are(
    dtype: torch.dtype, master: str, guard: str, which: str
) -> None:
    """Megatron and DeepSpeed hand them over. With the values of 16 bits they have the same bits."""
    config = nm.Config(master=master, guard=guard, nesterov=True)
    params = problem(dtype, 0) | {"second": problem(dtype, 5)["wide"]}
    narrow = problem(dtype, 10) | {"second": problem(dtype, 15)["wide"]}
    wide = {
        k: x.float() if which == "all" or k in ("wide", "bias") else x for k, x in narrow.items()
    }
    plan = nm.make_plan(params, config)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    expected = nm.update(params, narrow, state, hyper, plan)
    pure = nm.update(params, wide, state, hyper, plan)
    local_update_(params, wide, state, hyper, plan)
    for found in (pure.params | pure.state, params | state):
        for name, x in (expected.params | expected.state).items():
            assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name
    # And what 16 bits do not have is not lost.
    exact = {k: x.float() * (1 + 2.0**-14) for k, x in narrow.items()}
    again = nm.init(plan, params)
    result = nm.update(params, exact, again, hyper, plan)
    beta = torch.tensor(0.95)
    assert torch.equal(result.state["wide.momentum"], exact["wide"] * (1 - beta))


def test_other_gradient_dtypes_are_refused_by_name() -> None:
    params = problem(torch.bfloat16, 0)
    plan = nm.make_plan(params)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=LR)
    for wrong in (torch.float16, torch.float64, torch.int32):
        grads = {k: x.to(wrong) for k, x in params.items()}
        with pytest.raises(ValueError, match=r"grads\['wide'\]: expected dense torch\.bfloat16"):
            nm.update(params, grads, state, hyper, plan)
    params = problem(torch.float32, 0)
    plan = nm.make_plan(params)
    with pytest.raises(ValueError, match=r"grads\['wide'\]: expected dense torch\.float32"):
        nm.update(params, problem(torch.bfloat16, 1), nm.init(plan, params), hyper, plan)


@pytest.mark.parametrize("master", ["none", "fp32"])
@pytest.mark.parametrize("guard", ["off", "output", "full"])
@pytest.mark.parametrize("rule", ["normuon", "adamw"])
def test_an_update_that_float16_parameters_cannot_hold_is_flagged(
    rule: str, guard: str, master: str
) -> None:
    params = {"w": torch.full((8, 8), 65504.0).half(), "small": gaussian(8, 8).half()}
    grads = {name: -gaussian(8, 8).abs().half() for name in params}
    routes = dict.fromkeys(params, nm.Route(rule))
    plan = nm.make_plan(params, nm.Config(guard=guard, master=master), routes=routes)
    state = nm.init(plan, params)
    result = nm.update(params, grads, state, nm.Hyper.of(params, lr=1000.0), plan)
    refused = guard != "off"
    assert result.flags[0].tolist() == [int(refused), 0] and bool(result.skipped) == refused
    assert bool(result.params["w"].isfinite().all()) == refused
    assert torch.equal(result.params["w"], params["w"]) == refused
    few = nm.update(params, grads, state, nm.Hyper.of(params, lr=1e-3), plan)  # rounds back
    assert not few.flags.any() and bool(few.params["w"].isfinite().all())
