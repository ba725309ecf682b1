"""What somebody tries in the first hour: other gradients, odd values, other libraries' habits."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm

pytestmark = pytest.mark.usefixtures("without_inductor")
EXPERTS = [f"expert{k}" for k in range(4)]
SHORT = nm.Config(method="standard", steps=1)  # where graphs are counted, small ones
PATTERNS = list(itertools.product((False, True), repeat=len(EXPERTS)))[-10:]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def experts(config: nm.Config) -> tuple[dict[str, Tensor], nm.Plan, dict[str, Tensor], nm.Hyper]:
    params = {name: torch.randn(4, 4) for name in EXPERTS}
    plan = nm.make_plan(params, config)
    return params, plan, nm.init(plan, params), nm.Hyper.of(params, lr=0.1)


@pytest.mark.filterwarnings("ignore:step_. this is the 4th set of parameters:UserWarning")
@pytest.mark.parametrize("missing", ["skip", "zeros"])
def test_any_set_of_gradients_may_be_missing(missing: str) -> None:
    """10 sets, more than dynamo compiles of one function; with "zeros" they are one graph."""
    params, plan, state, hyper = experts(replace(SHORT, missing_grads=missing))  # type: ignore[arg-type]
    expected, expected_state = (
        {k: x.clone() for k, x in given.items()} for given in (params, state)
    )
    with torch._dynamo.config.patch(error_on_recompile=missing == "zeros"):
        for has in PATTERNS:
            grads = {
                name: torch.randn(4, 4) if here else None
                for name, here in zip(EXPERTS, has, strict=True)
            }
            nm.step_(params, grads, state, hyper, plan)
            new = nm.update(expected, grads, expected_state, hyper, plan)
            expected, expected_state = new.params, new.state
            torch.testing.assert_close(params, expected, rtol=0, atol=1e-5)  # 2.4e-7 seen


def test_an_optimizer_that_counts_missing_gradients_as_zeros_compiles_once() -> None:
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in EXPERTS)
    optimizer = nm.NorMuon(
        model.named_parameters(), lr=0.01, config=replace(SHORT, missing_grads="zeros")
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for has in PATTERNS[1:]:
            optimizer.zero_grad()
            sum(
                one(torch.randn(2, 4)).square().mean()
                for one, here in zip(model, has, strict=True)
                if here
            ).backward()
            optimizer.step()


def test_too_many_forms_say_what_has_to_be_alike() -> None:
    params = {"w": torch.randn(4, 4), **{name: torch.randn(4) for name in "abcd"}}

    def steps(config: nm.Config) -> None:
        plan = nm.make_plan(params, config)
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)
        with torch._dynamo.config.patch(recompile_limit=2):  # 8 by default
            for k in range(1, 5):
                grads = {**params, "w": torch.randn(4, 4 * k)[:, ::k]}
                nm.step(params, grads, state, hyper, plan)

    steps(SHORT)  # its lists are outside of the graph, which knows no strides
    with pytest.raises(RuntimeError, match="the strides of the parameters and gradients"):
        steps(nm.Config(orthogonalizer=lambda x: x))
    plan = nm.make_plan(params, SHORT)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)
    shuffled = dict(reversed(params.items()))  # the order of the keys is none of them
    assert list(nm.step(shuffled, params, state, hyper, plan).params) == list(shuffled)


def test_orthogonalize_says_that_it_has_no_derivative() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(
        ValueError,
        match=r"x: torch.func is to differentiate by it, and orthogonalize has no derivative",
    ):
        torch.func.grad(lambda y: nm.orthogonalize(y).sum())(x)
    for run in (
        nm.orthogonalize,
        torch.compile(nm.orthogonalize, fullgraph=True, backend="aot_eager"),
    ):
        of_parameter = run(nn.Parameter(x))
        assert not of_parameter.requires_grad and torch.equal(of_parameter, nm.orthogonalize(x))
    with pytest.raises(TypeError, match="x: expected a dense real"):
        nm.orthogonalize(x.to(torch.float8_e4m3fn))


def test_orthogonalize_in_a_graph_of_ones_own_takes_any_shape() -> None:
    compiled = torch.compile(nm.orthogonalize, fullgraph=True, backend="aot_eager")
    for shape in ((8, 12), (16, 12), (2, 9, 9), (70, 80), (12, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), nm.orthogonalize(x), rtol=0, atol=1e-5)  # 0 seen


@pytest.mark.parametrize(
    ("config", "spike"),
    [
        (nm.Config(guard="full", momentum_dtype=torch.bfloat16), 3.4e38),
        (nm.Config.preset("dion", guard="full"), 3e38),
    ],
    ids=["bfloat16", "sum"],
)
@pytest.mark.parametrize("scope", ["step", "bucket"])
def test_a_finite_gradient_that_its_momentum_cannot_hold_does_not_end_the_run(
    config: nm.Config, spike: float, scope: str
) -> None:
    config = replace(config, guard_scope=scope)
    params, skipped = {"w": torch.randn(4, 6)}, []
    plan = nm.make_plan(params, config)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.1)
    for k in range(8):
        grad = torch.randn(4, 6).sign() * (spike if k in (2, 3) else 1.0)
        result = nm.update(params, {"w": grad}, state, hyper, plan)
        params, state = result.params, result.state
        skipped.append(bool(result.skipped))
    assert skipped == [k in (2, 3) for k in range(8)] and bool(state["w.momentum"].isfinite().all())


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", float("nan")), ("momentum", 1.5), ("lr", "0.1"), ("weight_decay", -1.0)],
)
def test_a_value_that_a_scheduler_leaves_behind_is_looked_at_before_the_step(
    key: str, value: object
) -> None:
    model = nn.Linear(4, 4)
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\]: {key}: expected a"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.param_groups[0][key] = good
    optimizer.step()


def test_reports_are_of_the_plan_that_stepped() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.1, guard="full")
    with pytest.raises(
        TypeError,
        match=r"plan: expected a Plan, got NoneType; an optimizer has it as \.plan after its first",
    ):
        nm.SkipMonitor(optimizer.plan)  # type: ignore[arg-type]
    model["a"](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.plan is not None
    monitor = nm.SkipMonitor(optimizer.plan)
    optimizer.zero_grad()
    (model["b"](torch.randn(2, 4)) * float("nan")).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"b\.weight"):
        optimizer.step()
    with pytest.raises(ValueError, match="expected a result of this plan, got one whose"):
        monitor(optimizer.result)  # type: ignore[arg-type]
    assert monitor(optimizer.result, optimizer.plan) == 1  # and says nothing again
    with pytest.raises(TypeError, match="result: expected a StepResult, got NoneType"):
        nm.check(None, optimizer.plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["guard.step", "w.momentum", "w.variance"])
def test_a_parameter_with_the_name_of_a_state_tensor_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"params\['{name}'\]: is the name of a tensor of the state too"
    ):
        nm.make_plan({"w": torch.randn(4, 6), name: torch.randn(4, 6)})


def test_tied_weights_are_found_by_where_they_lie() -> None:
    tied = nn.Parameter(torch.randn(4, 6))

    def step(params: list[Tensor]) -> None:
        lists = (
            [torch.ones(4, 6)] * 2,
            [torch.zeros(4, 6) for _ in params],
            [torch.zeros(4, 1) for _ in params],
        )
        nm.foreach_step_(
            params, *lists, lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, compiled=False
        )

    step([torch.randn(4, 6), torch.randn(4, 6)])
    with pytest.raises(ValueError, match=r"params\[1\]: is the tensor of params\[0\]"):
        step([tied.data, tied.data])
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about duplicates in a group
        with pytest.raises(ValueError, match=r"the tensor '1\.weight' is there twice; pass tied"):
            nm.NorMuon(model.named_parameters(remove_duplicate=False), lr=0.1)


def test_a_state_is_loaded_by_name_where_names_are_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    named = list(model.named_parameters())
    one, other = nm.NorMuon(named, lr=0.1), nm.NorMuon(named[::-1], lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    one.step()
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(one.state[p]["momentum"], other.state[p]["momentum"]) for _, p in named)
    assert not torch.equal(one.state[named[0][1]]["momentum"], one.state[named[1][1]]["momentum"])


def test_a_learning_rate_that_requires_a_gradient_can_be_loaded_into() -> None:
    model = nn.Linear(4, 4)
    optimizer = nm.NorMuon(model.named_parameters(), lr=torch.tensor(0.1, requires_grad=True))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("shape", [(32, 3, 16, 16), (8, 3, 7, 1), (32, 32, 3)])
def test_what_looks_like_a_convolution_is_warned_about(shape: tuple[int, ...]) -> None:
    with pytest.warns(UserWarning, match=r"nm.routes_for\(model\)(.|\n)*stem.weight: got"):
        nm.make_plan({"stem.weight": torch.randn(shape)})


def test_embeddings_of_positions_are_embeddings() -> None:
    plan = nm.make_plan({"pos_embed": torch.randn(1, 17, 32), "experts": torch.randn(2, 8, 16)})
    assert [p.route.algorithm for p in plan.parameters] == ["adamw", "normuon"]


def test_arguments_of_the_wrong_kind_are_named() -> None:
    params = {"w": torch.randn(4, 6)}
    for call, error, message in (
        (lambda: nm.make_plan(params, hyper_of=[0]), TypeError, "hyper_of: expected a dict"),  # type: ignore[arg-type]
        (
            lambda: nm.Config(coefficients=(3.4, -4.7, 2.0)),
            TypeError,
            r"^Config\.coefficients: expected a name or",
        ),  # type: ignore[arg-type]
        (lambda: nm.Hyper.stack([]), ValueError, "hypers: expected at least one"),
        (lambda: nm.load("none", params), TypeError, "plan: expected a Plan"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            call()
