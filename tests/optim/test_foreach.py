"""`foreach_step_`: `step_` over lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.optim import list_plans
from normuon_fn.step import local_update_
from tests.inputs import gaussian

SHAPES = [(4, 6), (6, 4), (4, 6), (2, 4, 4)]
HYPER = {"lr": 0.02, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.1}
SHORT = {"steps": 1, "method": "standard"}  # one Newton-Schulz step: the graphs are traced faster


def lists(
    config: nm.Config, dtype: torch.dtype = torch.float32, seed: int = 0, count: int = 4
) -> tuple[list[Any], ...]:
    """params, grads, momentums, variances, masters: the state is not the zeros it begins with."""
    shapes = SHAPES[:count]
    params = [gaussian(*shape, seed=seed + k).to(dtype) for k, shape in enumerate(shapes)]
    grads = [gaussian(*shape, seed=seed + 10 + k).to(dtype) for k, shape in enumerate(shapes)]
    momentums = [gaussian(*shape, seed=seed + 20 + k) for k, shape in enumerate(shapes)]
    variances = [
        gaussian(*shape[:-1], 1, seed=seed + 30 + k).square() for k, shape in enumerate(shapes)
    ]
    masters: list[Any] = []
    if dtype == torch.bfloat16 and config.master == "mantissa":
        masters = [torch.randint(-100, 100, shape, dtype=torch.int16) for shape in shapes]
    if dtype == torch.bfloat16 and config.master == "fp32":
        masters = [param.float() for param in params]
    return params, grads, momentums, variances if config.normalize else [], masters


def copies(given: tuple[list[Any], ...]) -> tuple[list[Any], ...]:
    return tuple([x.clone() for x in part] for part in given)


def same(a: tuple[list[Any], ...], b: tuple[list[Any], ...]) -> bool:
    return all(len(x) == len(y) and all(map(torch.equal, x, y)) for x, y in zip(a, b, strict=True))


def by_name(given: tuple[list[Any], ...], config: nm.Config) -> tuple[Any, ...]:
    """The same step as `step_` has it."""
    params, grads, *state = given
    names = [f"layer.{k}" for k in range(len(params))]
    named = dict(zip(names, params, strict=True))
    plan = nm.make_plan(named, config)
    whole = nm.init(plan, named)
    suffixes = (
        "momentum",
        "variance",
        {"mantissa": "mantissa", "fp32": "master"}.get(config.master, ""),
    )
    for suffix, part in zip(suffixes, state, strict=True):
        whole |= {f"{name}.{suffix}": x for name, x in zip(names, part, strict=False)}
    return named, dict(zip(names, grads, strict=True)), whole, nm.Hyper.of(named, **HYPER), plan


CASES = {
    "plain": (nm.Config(**SHORT), torch.float32),
    "guarded": (nm.Config(**SHORT, guard="full", nesterov=True), torch.float32),
    "muon": (nm.Config(**SHORT, normalize=False), torch.float32),
    "mantissa": (
        nm.Config(**SHORT, master="mantissa", weight_decay_form="cautious"),
        torch.bfloat16,
    ),
    "fp32": (nm.Config(**SHORT, master="fp32", guard="output"), torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", ["nothing", "a gradient", "found_inf"])
def test_it_is_step_bit_for_bit_operation_by_operation(case: str, bad: str) -> None:
    config, dtype = CASES[case]
    given = lists(config, dtype)
    if bad == "a gradient":
        given[1][2][1, 1] = float("nan")
    found_inf = torch.tensor(float(bad == "found_inf"))
    expected = copies(given)
    result = local_update_(*by_name(expected, config), found_inf=found_inf)
    before = copies(given)
    flags, skipped = nm.foreach_step_(
        *given, **HYPER, config=config, found_inf=found_inf, compiled=False
    )
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(flags, result.flags) and torch.equal(skipped, result.skipped)
    if bad == "nothing":
        assert not any(
            torch.equal(x, y) for k in (0, 2, 3) for x, y in zip(given[k], before[k], strict=True)
        )
    assert bool(skipped) == (bad == "found_inf" or (bad == "a gradient" and config.guard != "off"))


def test_compiled_it_is_step_bit_for_bit_and_other_lists_of_these_shapes_do_not_recompile(
    without_inductor: None,
) -> None:
    config, dtype = CASES["mantissa"]
    given = lists(config, dtype, count=1)
    expected = copies(given)
    nm.step_(*by_name(expected, config))
    nm.foreach_step_(*given, **HYPER, config=config)
    assert same(given, expected)
    plans = len(list_plans._plans)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            again = lists(config, dtype, seed, count=1)
            hyper = (
                {name: torch.tensor(value) for name, value in HYPER.items()}
                if seed == 2
                else {**HYPER, "lr": 0.5}
            )
            nm.foreach_step_(
                *again,
                **hyper,
                config=nm.Config(**SHORT, master="mantissa", weight_decay_form="cautious"),
            )
    assert len(list_plans._plans) == plans


@pytest.mark.parametrize("case", ["plain", "mantissa"])
def test_a_call_for_every_group_is_the_step_whose_hyper_has_an_entry_for_each(case: str) -> None:
    config, dtype = CASES[case]
    given = lists(config, dtype)
    expected = copies(given)
    named, grads, state, _, _ = by_name(expected, config)
    group_of = dict(zip(named, (0, 1, 1, 0), strict=True))
    hypers = [HYPER, {"lr": 0.5, "momentum": 0.8, "beta2": 0.5, "weight_decay": 0.0}]
    plan = nm.make_plan(named, config, hyper_of=group_of)
    for _ in range(2):
        local_update_(
            named,
            grads,
            state,
            nm.Hyper.stack([nm.Hyper.of(named, **hyper) for hyper in hypers]),
            plan,
        )
        for k, hyper in enumerate(hypers):
            own = [
                [x for x, group in zip(part, group_of.values(), strict=False) if group == k]
                for part in given
            ]
            nm.foreach_step_(*own, **hyper, config=config, compiled=False)
    assert same(given, expected) and not same(given, lists(config, dtype))


@pytest.mark.parametrize("known", [False, True])
def test_inside_a_graph_of_your_own(known: bool) -> None:
    config = nm.Config(
        **SHORT, guard="full", rms=0.25 if known else 0.125
    )  # of no other test: the plan is not there yet
    given = lists(config, count=2)
    expected = copies(given)
    if known:
        nm.foreach_step_(*lists(config, count=2), **HYPER, config=config, compiled=False)

    def own(params: list[Tensor], grads: list[Tensor], *state: list[Tensor], lr: Tensor) -> Tensor:
        doubled = [2 * grad for grad in grads]
        return nm.foreach_step_(
            params, doubled, *state, **{**HYPER, "lr": lr}, config=config
        ).skipped

    compiled = torch.compile(own, backend="aot_eager", fullgraph=True, dynamic=False)
    assert not compiled(*given, lr=torch.tensor(HYPER["lr"]))
    named = by_name(expected, config)
    doubled = {name: 2 * grad for name, grad in named[1].items()}
    compile_whole(local_update_, "aot_eager")(named[0], doubled, *named[2:])
    assert same((given[0], *given[2:]), (expected[0], *expected[2:]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*lists(config, seed=3, count=2), lr=torch.tensor(0.5))


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 12),
    reason="Dynamo of torch 2.11 cannot read the defaults of a Route",
)
def test_a_graph_of_your_own_sees_another_config_and_other_routes() -> None:
    def own(params, grads, momentums, variances, config, routes):
        return nm.foreach_step_(
            params, grads, momentums, variances, **HYPER, config=config, routes=routes
        ).flags

    compiled = torch.compile(own, backend="eager", fullgraph=True, dynamic=False)
    moved = []
    for rms, lr_mul in ((0.2, 1.0), (0.4, 1.0), (0.4, 2.0)):
        given = lists(nm.Config(), count=1)[:4]
        before = given[0][0].clone()
        compiled(*given, nm.Config(**SHORT, rms=rms), [nm.Route(lr_mul=lr_mul)])
        moved.append(float((given[0][0] - before * (1 - 0.1 * 0.02 * lr_mul)).norm()))
    assert moved == pytest.approx([moved[0], 2 * moved[0], 4 * moved[0]], rel=1e-4)


def test_it_waits_for_nothing() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listing(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    config = nm.Config(**SHORT, guard="full")
    given = lists(config)
    nm.foreach_step_(*given, **HYPER, config=config, compiled=False)  # making the plan may look
    with Listing() as listing:
        nm.foreach_step_(*given, **HYPER, config=config, found_inf=torch.zeros(()), compiled=False)
    waits = (
        "_local_scalar_dense",
        "item",
        "equal",
        "nonzero",
        "lift_fresh",
        "_to_copy.default(cuda",
    )
    assert "aten.full.default" in listing.seen
    assert not [
        name for name in listing.seen if any(name.startswith(f"aten.{wait}") for wait in waits)
    ]


def test_routes_and_a_counter_for_what_is_rounded_by_chance() -> None:
    config = nm.Config(**SHORT, master="stochastic", seed=3)
    params = {"0": gaussian(12, 4).bfloat16()}
    grads = {"0": gaussian(12, 4, seed=1).bfloat16()}
    routes = {"0": nm.Route(splits=(4, 4, 4), lr_mul=0.5)}
    plan = nm.make_plan(params, config, routes=routes)
    state = nm.init(plan, params)
    own = [
        [params["0"].clone()],
        [grads["0"]],
        [state["0.momentum"].clone()],
        [state["0.variance"].clone()],
    ]
    counter = torch.zeros((), dtype=torch.int32)
    for _ in range(3):
        local_update_(params, grads, state, nm.Hyper.of(params, **HYPER), plan)
        nm.foreach_step_(
            *own, **HYPER, config=config, routes=list(routes.values()), step=counter, compiled=False
        )
    assert torch.equal(own[0][0], params["0"]) and torch.equal(counter, state["guard.step"])


def test_the_cache_of_plans_is_bounded_and_says_once_that_it_overflows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh = {"_SIZE": 3, "_plans": {}, "_numbers": list_plans.OrderedDict(), "_told": False}
    for name, value in fresh.items():
        monkeypatch.setattr(list_plans, name, value)
    config = nm.Config(**SHORT, normalize=False)

    def call(rows: int) -> int:
        made = len(list_plans._plans), max(list_plans._plans, default=-1)
        nm.foreach_step_(
            *([torch.ones(rows, 2)] for _ in range(3)), [], **HYPER, config=config, compiled=False
        )
        return int(made != (len(list_plans._plans), max(list_plans._plans, default=-1)))

    assert [call(rows) for rows in (2, 3, 4, 2)] == [1, 1, 1, 0]
    with pytest.warns(UserWarning, match="another plan after 3.*pass zeros for those gradients"):
        assert call(5) == 1
    assert len(list_plans._plans) == 3
    assert [call(2), call(3)] == [0, 1]  # the one used longest ago went


ERRORS = {
    "params: expected at least one": {"params": [], "grads": [], "momentums": [], "variances": []},
    "grads: expected as many as params": {"grads": lambda x: x[:-1]},
    "grads.1.: expected a Tensor, got NoneType; leave out": {
        "grads": lambda x: [x[0], None, *x[2:]]
    },
    "grads.0.: expected shape .4, 6., torch.float32 on cpu, got .4, 6., torch.float64": {
        "grads": lambda x: [x[0].double(), *x[1:]]
    },
    "momentums.3.: expected shape": {"momentums": lambda x: [*x[:3], x[0]]},
    "params: expected a list of tensors, got generator": {"params": lambda x: (p for p in x)},
    "momentums: expected a list of tensors, got dict": {"momentums": lambda x: dict(enumerate(x))},
    "variances: expected as many": {"variances": lambda x: []},
    "variances.1.: expected shape .6, 1.": {"variances": lambda x: [x[0], x[0], *x[2:]]},
    "masters.0.: expected nothing": {"masters": lambda x: [torch.zeros(4, 6), None, None, None]},
    "lr: expected a float or a 0-d tensor, got str": {"lr": "0.1"},
    "lr: expected a float or a 0-d tensor, got shape": {"lr": torch.zeros(1)},
    "momentum: expected a number in .0, 1., got 1.0": {"momentum": 1.0},
    "beta2: expected a number in .0, 1., got 0.99999999 as float32": {"beta2": 0.99999999},
    "weight_decay: expected a number in .0, 3.40282e.38., got nan": {"weight_decay": float("nan")},
    "lr: expected a number in .0, 3.40282e.38., got 1e.39 as float32": {"lr": 1e39},
    "config: expected a Config": {"config": "paper"},
    "routes: expected as many": {"routes": [nm.Route()]},
    "routes.1.: expected a Route.'normuon'": {
        "routes": [nm.Route(), nm.Route("adamw"), nm.Route(), nm.Route()]
    },
    "step: expected None or a 0-d int32": {"step": 1},
    "step: expected a 0-d int32 tensor: without it": {
        "config": nm.Config(master="stochastic"),
        "dtype": torch.bfloat16,
    },
    "masters.0.: expected a tensor of shape": {
        "config": nm.Config(master="fp32"),
        "dtype": torch.bfloat16,
        "masters": [],
    },
    "found_inf: expected None or": {"found_inf": 1.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_wrong_is_said_by_its_name_and_nothing_is_written(message: str) -> None:
    changes = dict(ERRORS[message])
    config = changes.pop("config", nm.Config(**SHORT))
    made = lists(
        config if isinstance(config, nm.Config) else nm.Config(),
        changes.pop("dtype", torch.float32),
    )
    given: dict[str, Any] = dict(
        zip(("params", "grads", "momentums", "variances", "masters"), made, strict=True)
    )
    before = copies(made)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    with pytest.raises((TypeError, ValueError), match=message):
        nm.foreach_step_(**{**HYPER, "config": config, **given}, compiled=False)
    assert same(made, before)


LISTS = ("params", "grads", "momentums", "variances", "masters")


@pytest.mark.parametrize(
    ("into", "of"), [(0, 0), (2, 2), (3, 3), (4, 4), (2, 0), (2, 4)], ids=lambda k: LISTS[k]
)
def test_a_tensor_that_would_be_written_twice_is_refused_at_every_call(into: int, of: int) -> None:
    config = nm.Config(
        **SHORT, master="fp32", momentum_dtype=torch.bfloat16 if (into, of) == (2, 0) else None
    )
    given = lists(config, torch.bfloat16)
    given = (*given[:2], [x.to(config.momentum_dtype or x.dtype) for x in given[2]], *given[3:])
    nm.foreach_step_(*given, **HYPER, config=config, compiled=False)  # the plan is known now
    nm.foreach_step_(
        given[0],
        [given[1][0], given[1][1], given[1][0], given[1][3]],
        *given[2:],
        **HYPER,
        config=config,
        compiled=False,
    )
    given[into][2] = given[of][0]
    before = copies(given)
    with pytest.raises(
        ValueError,
        match=rf"{LISTS[max(into, of)]}\[.\]: is the tensor of {LISTS[min(into, of)]}\[.\], and",
    ):
        nm.foreach_step_(*given, **HYPER, config=config, compiled=False)
    assert same(given, before)


def test_a_filter_that_is_channels_last_after_the_first_call_steps_as_a_contiguous_one() -> None:
    params, grads, momentums, variances = (
        [gaussian(*shape, seed=k)] for k, shape in enumerate([(6, 4, 3, 3)] * 3 + [(6, 1)])
    )
    given: dict[str, Any] = {
        "routes": [nm.Route(flatten=True)],
        "config": nm.Config(**SHORT),
        **HYPER,
    }
    nm.foreach_step_(params, grads, momentums, variances, **given, compiled=False)
    own = copies((params, momentums, variances))
    own[0][0] = own[0][0].to(memory_format=torch.channels_last)
    nm.foreach_step_(own[0], grads, own[1], own[2], **given, compiled=False)
    nm.foreach_step_(params, grads, momentums, variances, **given, compiled=False)
    assert same(own, (params, momentums, variances))


def test_vectors_and_tensors_without_entries_are_refused() -> None:
    for shape, message in (
        ((4,), r"params\['0'\]: NorMuon needs"),
        ((0, 4), r"params\[0\]: expected a matrix with entries"),
    ):
        one = [torch.zeros(shape)]
        with pytest.raises(ValueError, match=message):
            nm.foreach_step_(
                one, one, one, [], **HYPER, config=nm.Config(normalize=False), compiled=False
            )


def test_an_orthogonalizer_by_which_no_plan_is_found_again_is_refused_by_name() -> None:
    class Own:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Tensor) -> Tensor:
            return x

    w = torch.randn(8, 12)
    with pytest.raises(
        TypeError, match=r"orthogonalizer that can be hashed.* got a Own; pass a fu"
    ):
        nm.foreach_step_(
            [w], [w.clone()], [torch.zeros(8, 12)], [torch.zeros(8, 1)],
            lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0,
            config=nm.Config(orthogonalizer=Own()), compiled=False,
        )  # fmt: skip
