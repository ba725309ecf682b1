"""`NorMuon` as a torch.optim.Optimizer: what surrounds one works, and a step is `step_`."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.optim import normuon
from normuon_fn.step import local_update_
from tests.runtime.test_graphed import Rehearsed

planned_module = importlib.import_module("normuon_fn.optim.planned")
Named = list[tuple[str, nn.Parameter]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COUNTERS = ("step", "skipped", "consecutive")


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> graphs.CompileCounter:
    """Counts what is compiled, with dynamo's guards. Without this fixture nothing is compiled."""
    return graphs.counting(monkeypatch)


@pytest.fixture(autouse=True)
def eager_unless_compiled(request: pytest.FixtureRequest) -> None:
    if "counter" not in request.fixturenames and not request.node.name.startswith(
        ("test_on_cuda", "test_inductor")
    ):
        request.getfixturevalue("eager")


def rehearse(monkeypatch: pytest.MonkeyPatch) -> list[Rehearsed]:
    """Every GraphedStep that an optimizer makes from here on, with a stand-in for CUDA."""
    made: list[Rehearsed] = []

    class Recorded(Rehearsed):
        def __init__(self, plan: nm.Plan) -> None:
            super().__init__(plan)
            made.append(self)

    monkeypatch.setattr(planned_module, "GraphedStep", Recorded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Rehearsed]:
    return rehearse(monkeypatch)


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 6, dtype=dtype)
        self.up = nn.Linear(6, 12, dtype=dtype)
        self.down = nn.Linear(12, 6, dtype=dtype)
        self.square = nn.Linear(6, 6, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.square(self.down(torch.tanh(self.up(x))))


def batch(k: int) -> Tensor:
    return torch.randint(10, (4,), generator=torch.Generator().manual_seed(k))


def backward(model: Net, k: int, scale: float = 1.0) -> None:
    (model(batch(k)).square().mean() * scale).backward()


def train(
    model: Net,
    optimizer: torch.optim.Optimizer,
    steps: range,
    then: Callable[[int], Any] = lambda k: None,
) -> None:
    for k in steps:
        optimizer.zero_grad()
        backward(model, k)
        optimizer.step()
        then(k)


def split(model: nn.Module) -> tuple[Named, Named]:
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if p.ndim == 2 and "embed" not in n]
    return matrices, [(n, p) for n, p in named if all(p is not q for _, q in matrices)]


def everything(model: nn.Module) -> Named:
    matrices, rest = split(model)
    return matrices + rest


def three(model: nn.Module, lr: Any = 0.02) -> list[dict[str, Any]]:
    """Groups of which each differs in something else."""
    matrices, rest = split(model)
    return [
        {"params": matrices[:1], "lr": lr, "momentum": 0.8, "weight_decay": 0.1},
        {"params": matrices[1:], "lr": copy.copy(lr), "beta2": 0.5},
        {
            "params": rest,
            "lr": copy.copy(lr),
            "algorithm": "adamw",
            "adamw_betas": (0.8, 0.99),
            "adamw_eps": 1e-6,
        },
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{k}.{kind}": x.clone()
        for k, kept in optimizer.state_dict()["state"].items()
        for kind, x in kept.items()
    }


def by_hand(
    model: Net, plan: nm.Plan, hyper_at: Callable[[int], nm.Hyper], steps: range
) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    params = {name: params[name] for name in plan.names}
    state = nm.init(plan, params)
    for k in steps:
        model.zero_grad()
        backward(model, k)
        local_update_(
            params, {name: p.grad for name, p in params.items()}, state, hyper_at(k), plan
        )
    return weights(model)


def three_by_hand(model: nn.Module) -> tuple[nm.Plan, Callable[[list[float], float], nm.Hyper]]:
    """The plan of `three`, and its Hyper: of the learning rates and the first group's momentum."""
    matrices, rest = split(model)
    params = dict(matrices + rest)
    index = {name: min(k, 1) for k, (name, _) in enumerate(matrices)} | {
        name: 2 for name, _ in rest
    }
    routes = {name: nm.Route("adamw") for name, _ in rest}

    def hyper(lr: list[float], momentum: float) -> nm.Hyper:
        return nm.Hyper.stack(
            [
                nm.Hyper.of(params, lr=lr[0], momentum=momentum, weight_decay=0.1),
                nm.Hyper.of(
                    params, lr=lr[1], beta2=0.5, momentum=0.95 if momentum == 0.8 else momentum
                ),
                nm.Hyper.of(params, lr=lr[2], adamw_betas=(0.8, 0.99), adamw_eps=1e-6),
            ]
        )

    return nm.make_plan(params, nm.Config(nesterov=True), routes=routes, hyper_of=index), hyper


# --- it is step_


@pytest.mark.parametrize("guard", ["off", "full"])
def test_a_step_has_the_bits_of_step_(guard: Any) -> None:
    model, other = Net(), Net()
    train(
        model,
        nm.NorMuon(model.named_parameters(), lr=0.02, weight_decay=0.1, guard=guard),
        range(5),
    )
    params = dict(other.named_parameters())
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    expected = by_hand(
        other, nm.make_plan(params, nm.Config(guard=guard)), lambda k: hyper, range(5)
    )
    assert same(weights(model), expected) and not same(expected, weights(Net()))


def test_groups_have_the_bits_of_step_with_an_entry_of_hyper_for_each() -> None:
    model, other = Net(), Net()
    optimizer = nm.NorMuon(three(model), config=nm.Config(nesterov=True))
    train(model, optimizer, range(5))
    plan, hyper = three_by_hand(other)
    assert same(weights(model), by_hand(other, plan, lambda k: hyper([0.02] * 3, 0.8), range(5)))


@pytest.mark.parametrize("guard", ["off", "full"])
def test_a_group_steps_as_an_optimizer_of_its_own_does(guard: Any) -> None:
    model, other, config = Net(), Net(), nm.Config(nesterov=True)
    train(model, nm.NorMuon(three(model), guard=guard, config=config), range(5))
    alone = [nm.NorMuon([group], guard=guard, config=config) for group in three(other)]
    for k in range(5):
        other.zero_grad()
        backward(other, k)
        for optimizer in alone:
            optimizer.step()
    assert same(weights(model), weights(other))


def test_plain_tensors_named_ones_and_generators_are_taken() -> None:
    results = []
    for params in (
        lambda m: [p for _, p in everything(m)],
        lambda m: (p for _, p in everything(m)),
    ):
        model = Net()
        with pytest.warns(UserWarning, match="The parameters have no names"):
            optimizer = nm.NorMuon(params(model), lr=0.02, routes={"groups.0.3": nm.Route("adamw")})
        train(model, optimizer, range(2))
        results.append(weights(model))
        assert optimizer.plan is not None and list(optimizer.plan.names)[:2] == [
            "groups.0.0",
            "groups.0.1",
        ]
    model = Net()
    train(
        model, nm.NorMuon(everything(model), lr=0.02), range(2)
    )  # the embedding is known by its name here
    assert same(results[0], results[1]) and same(results[0], weights(model))


def test_routes_of_a_group_go_before_its_algorithm_and_that_before_those_of_all() -> None:
    model = Net()
    matrices, rest = split(model)
    groups = [
        {"params": matrices, "routes": {"up.*": nm.Route(heads=2)}},
        {"params": rest, "algorithm": "adamw", "routes": {"embed.weight": nm.Route("normuon")}},
    ]
    optimizer = nm.NorMuon(
        groups, routes={"*.weight": nm.Route(lr_mul=0.5), "*.bias": nm.Route("frozen")}
    )
    train(model, optimizer, range(1))
    assert optimizer.plan is not None
    routes = {p.name: p.route for p in optimizer.plan.parameters}
    assert routes["up.weight"] == nm.Route(heads=2) and routes["down.weight"] == nm.Route(
        lr_mul=0.5
    )
    assert routes["embed.weight"] == nm.Route("normuon") and routes["up.bias"] == nm.Route("adamw")
    with pytest.raises(ValueError, match="match no parameter"):
        nm.NorMuon(
            [{"params": matrices, "routes": {"embed*": nm.Route("adamw")}}, {"params": rest}]
        )


def test_a_table_of_routes_for_is_followed_and_a_group_goes_before_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.Flatten(),
        nn.Linear(6, 6),
        nn.MultiheadAttention(6, 2),
        nn.Linear(6, 4),
    )
    table = nm.routes_for(model, {"4.weight": nm.Route("adamw")})
    optimizer = nm.NorMuon(model.named_parameters(), routes=table)
    (stage,) = optimizer._planner.steps.values()
    assert {p.name: p.route for p in stage.plan.parameters} == dict(table)
    assert table["0.weight"] == nm.Route(flatten=True) and table["3.in_proj_weight"] == nm.Route(
        splits=(6, 6, 6)
    )
    named = list(model.named_parameters())
    groups = [
        {"params": named[:2], "algorithm": "adamw"},
        {"params": named[2:], "routes": {"2.weight": nm.Route(lr_mul=2.0)}},
    ]
    (stage,) = nm.NorMuon(groups, routes=table)._planner.steps.values()
    own = {"0.weight": nm.Route("adamw"), "2.weight": nm.Route(lr_mul=2.0)}
    assert {p.name: p.route for p in stage.plan.parameters} == dict(table) | own


def test_the_closure_is_differentiated_and_its_loss_returned() -> None:
    model, other = Net(), Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    train(other, nm.NorMuon(other.named_parameters(), lr=0.02), range(1))
    assert torch.equal(loss, Net()(batch(0)).square().mean()) and same(
        weights(model), weights(other)
    )
    assert optimizer.step() is None


def test_hooks_run_around_a_step() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weights(model)))
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    train(model, optimizer, range(1))
    assert (
        len(seen) == 2
        and same(seen[0], weights(Net()))
        and same(seen[1], weights(model))
        and not same(*seen)
    )


def test_zero_grad_frees_the_gradients_unless_the_step_is_graphed() -> None:
    model = Net()
    for graphed, set_to_none, kept in (
        (False, None, False),
        (True, None, True),
        (True, True, False),
        (False, False, True),
    ):
        optimizer = nm.NorMuon(model.named_parameters(), graphed=graphed)
        backward(model, 0)
        optimizer.zero_grad(set_to_none)
        assert [p.grad is not None for p in model.parameters()] == [kept] * 7
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# --- the guard


def with_nan(model: Net, optimizer: nm.NorMuon, name: str) -> None:
    optimizer.zero_grad()
    backward(model, 1)
    grad = dict(model.named_parameters())[name].grad
    assert grad is not None
    grad.view(-1)[0] = float("nan")
    with pytest.warns(RuntimeWarning, match=rf"skipped, 1 in a row: {name} \(non-finite gradient"):
        optimizer.step()


def test_a_bad_matrix_in_one_group_skips_all_groups() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model), guard="full")
    train(model, optimizer, range(2))
    before = (
        weights(model),
        {k: x for k, x in states(optimizer).items() if not k.endswith(COUNTERS)},
    )
    with_nan(model, optimizer, "down.weight")
    after = states(optimizer)
    assert same(weights(model), before[0]) and same({k: after[k] for k in before[1]}, before[1])
    assert (int(after["0.step"]), int(after["0.skipped"]), int(after["0.consecutive"])) == (3, 1, 1)
    assert optimizer.result is not None and optimizer.plan is not None
    assert nm.check(optimizer.result, optimizer.plan)  # and says nothing again


def test_nan_guard_fallback_skips_one_shape_in_one_group_and_moves_its_momentum_on() -> None:
    model = Net()
    matrices, rest = split(model)
    optimizer = nm.NorMuon(
        [{"params": matrices}, {"params": rest, "algorithm": "adamw"}],
        lr=0.02,
        nan_guard_fallback=True,
    )
    train(model, optimizer, range(2))
    before, momentum = weights(model), states(optimizer)["2.momentum"]
    with_nan(model, optimizer, "square.weight")
    now = weights(model)
    assert {name for name in now if torch.equal(now[name], before[name])} == {"square.weight"}
    assert not torch.equal(states(optimizer)["2.momentum"], momentum)
    assert all(x.isfinite().all() for x in now.values())
    with pytest.raises(ValueError, match="nan_guard_fallback"):
        nm.NorMuon(model.named_parameters(), nan_guard_fallback=True, guard="full")


# --- schedulers


def plateau(o: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(
        o, [lambda k: 1.0, lambda k: 0.9**k, lambda k: 1 / (1 + k)]
    ),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2, 0.3], total_steps=20),
    "warm_up": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)],
        milestones=[2],
    ),
    "plateau": plateau,
}


@pytest.mark.parametrize("of", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_scheduler_drives_every_group_and_nothing_is_recompiled(
    scheduler: str, of: Any, counter: graphs.CompileCounter
) -> None:
    model, other = Net(), Net()
    optimizer = nm.NorMuon(three(model, of(0.02)), config=nm.Config(nesterov=True))
    schedule = SCHEDULERS[scheduler](optimizer)
    rates: list[list[dict[str, Any]]] = []
    for k in range(6):
        rates.append(
            [{key: float(g[key]) for key in ("lr", "momentum")} for g in optimizer.param_groups]
        )
        optimizer.zero_grad()
        backward(model, k)
        with graphs.no_recompile():
            optimizer.step()
        schedule.step(*([1.0] if scheduler == "plateau" else []))
    assert counter.frame_count == 1
    assert len({rate["lr"] for row in rates for rate in row}) > 2
    if scheduler == "one_cycle":
        assert len({row[0]["momentum"] for row in rates}) == 6
    plan, hyper = three_by_hand(other)
    hypers = [hyper([rate["lr"] for rate in row], row[0]["momentum"]) for row in rates]
    assert same(weights(model), by_hand(other, plan, lambda k: hypers[k], range(6)))


def test_a_graphed_step_follows_the_scheduler_and_is_captured_once(
    rehearsed: list[Rehearsed],
) -> None:
    model, other = Net(), Net()
    plain, graphed = nm.NorMuon(three(other)), nm.NorMuon(three(model), graphed=True)
    for optimizer, net in ((plain, other), (graphed, model)):
        schedule = SCHEDULERS["one_cycle"](optimizer)
        train(net, optimizer, range(6), lambda k, schedule=schedule: schedule.step())
    assert (
        len(rehearsed) == 1
        and rehearsed[0].did() == "plain capture replay replay replay replay replay"
    )
    assert same(weights(model), weights(other))
    graphed.release()
    assert rehearsed[0].did() == "free"


def test_graphed_says_where_it_runs() -> None:
    model = Net()
    with pytest.raises(
        ValueError,
        match="graphed=True: expected parameters on a CUDA device, got cpu; leave out graphed=True",
    ):
        train(model, nm.NorMuon(model.named_parameters(), graphed=True), range(1))


def test_a_value_that_did_not_change_is_not_written_again() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(1))
    versions = [x._version for x in optimizer._planner.hyper.hyper]
    train(model, optimizer, range(2))
    assert [x._version for x in optimizer._planner.hyper.hyper] == versions
    optimizer.param_groups[1]["beta2"] = 0.75
    train(model, optimizer, range(1))
    changed = [
        x._version - v for x, v in zip(optimizer._planner.hyper.hyper, versions, strict=True)
    ]
    assert nm.Hyper(*changed)._asdict() == dict.fromkeys(nm.Hyper._fields, 0) | {"beta2": 1}
    assert (
        optimizer._planner.hyper.hyper.beta2.tolist() == torch.tensor([0.95, 0.75, 0.95]).tolist()
    )


def test_a_compiled_step_has_the_same_bits_and_is_compiled_once(
    counter: graphs.CompileCounter,
) -> None:
    model, other = Net(), Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    compiled = torch.compile(optimizer.step, backend="eager")
    for k in range(4):
        optimizer.zero_grad()
        backward(model, k)
        compiled()
    assert counter.frame_count == 1
    train(other, nm.NorMuon(other.named_parameters(), lr=0.02), range(4))
    assert same(weights(model), weights(other))


def test_a_step_inside_a_whole_graph_says_what_to_do() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters())
    backward(model, 0)
    with pytest.raises(
        Exception, match=r"call it outside of torch\.compile, or without fullgraph=True"
    ):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert same(weights(model), weights(Net()))


# --- gradients that come late


class Gated(Net):
    """Whose last layer takes part when told."""

    used = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(self.embed(tokens))))
        return self.square(x) if self.used else x


def test_a_first_gradient_that_comes_late_costs_one_compilation(
    counter: graphs.CompileCounter,
) -> None:
    model = Gated()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, weight_decay=0.1)
    model.used = False
    train(model, optimizer, range(2))
    assert counter.frame_count == 1 and torch.equal(model.square.weight, Net().square.weight)
    assert optimizer.plan is not None and "square.weight" not in optimizer.plan.names
    model.used = True
    train(model, optimizer, range(2, 4))
    assert counter.frame_count == 2 and not torch.equal(model.square.weight, Net().square.weight)
    for k in range(4, 8):  # sets of parameters that were there before
        model.used = k % 2 == 0
        with graphs.no_recompile():
            train(model, optimizer, range(k, k + 1))
    assert counter.frame_count == 2
    assert int(states(optimizer)["0.step"]) == 8


def test_a_first_gradient_that_comes_late_is_refused_on_demand() -> None:
    model = Gated()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, late_gradients="error")
    model.used = False
    train(model, optimizer, range(2))
    before = weights(model), states(optimizer)
    model.used = True
    with pytest.raises(
        ValueError, match=r"\['square.weight', 'square.bias'\]: first gradient after the first step"
    ):
        train(model, optimizer, range(2, 3))
    assert same(weights(model), before[0]) and same(states(optimizer), before[1])
    always = Gated()
    optimizer = nm.NorMuon(always.named_parameters(), lr=0.02, late_gradients="error")
    for used in (True, False, True):  # a gradient that stays away is not late
        always.used = used
        train(always, optimizer, range(1))


def test_a_parameter_without_gradient_keeps_its_state_and_missing_ones_may_count_as_zeros() -> None:
    kept, counted = Gated(), Gated()
    results = []
    for model, config in ((kept, nm.Config()), (counted, nm.Config(missing_grads="zeros"))):
        optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, weight_decay=0.1, config=config)
        train(model, optimizer, range(2))
        model.used = False
        before = weights(model)["square.weight"], states(optimizer)["5.momentum"]
        train(model, optimizer, range(2, 3))
        now = weights(model)["square.weight"], states(optimizer)["5.momentum"]
        results.append([torch.equal(a, b) for a, b in zip(before, now, strict=True)])
    assert results == [[True, True], [False, False]]


def test_a_step_without_any_gradient_is_none() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    with pytest.warns(UserWarning, match="no parameter has a gradient"):
        optimizer.step()
    assert (
        same(weights(model), weights(Net()))
        and int(states(optimizer)["0.step"]) == 0
        and optimizer.plan is None
    )


# --- groups that come later


def test_a_group_that_is_added_later_is_stepped_and_the_others_go_on() -> None:
    model, other = Net(), Net()
    first, rest = split(model)
    optimizer = nm.NorMuon(first, lr=0.02, late_gradients="error")
    train(model, optimizer, range(3))
    before = states(optimizer)
    optimizer.add_param_group({"params": rest, "algorithm": "adamw", "lr": 0.001})
    assert same({k: states(optimizer)[k] for k in before}, before) and len(states(optimizer)) > len(
        before
    )
    train(model, optimizer, range(3, 5))
    alone = nm.NorMuon(split(other)[0], lr=0.02)
    train(other, alone, range(3))
    late = nm.NorMuon(split(other)[1], lr=0.001, algorithm="adamw")
    for k in range(3, 5):
        other.zero_grad()
        backward(other, k)
        alone.step()
        late.step()
    assert same(weights(model), weights(other))


def test_a_group_that_does_not_fit_leaves_the_optimizer_as_it_was() -> None:
    model = Net()
    optimizer = nm.NorMuon(split(model)[0], lr=0.02)
    train(model, optimizer, range(2))
    for bad in ({"lr": -1.0}, {"routes": {"nothing": nm.Route()}}, {"betas": (0.9, 0.99)}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": split(model)[1], **bad})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2, 4))
    other = Net()
    train(other, nm.NorMuon(split(other)[0], lr=0.02), range(4))
    assert same(weights(model), weights(other))


# --- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_saved_and_loaded_goes_on_exactly(dtype: torch.dtype) -> None:
    through, straight = Net(dtype=dtype), Net(dtype=dtype)
    optimizer = nm.NorMuon(three(through), guard="full")
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, 20)
    train(through, optimizer, range(4), lambda k: schedule.step())
    file = io.BytesIO()
    torch.save(
        {
            "model": through.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        },
        file,
    )
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = Net(seed=1, dtype=dtype)
    again = nm.NorMuon(three(resumed, lr=0.5), guard="full")
    later = lr_scheduler.OneCycleLR(again, 0.1, 20)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    later.load_state_dict(loaded["schedule"])
    train(resumed, again, range(4, 8), lambda k: later.step())
    whole = nm.NorMuon(three(straight), guard="full")
    schedule = lr_scheduler.OneCycleLR(whole, 0.1, 20)
    train(straight, whole, range(8), lambda k: schedule.step())
    assert same(weights(resumed), weights(straight)) and same(states(again), states(whole))
    assert {x.dtype for x in states(again).values()} == {torch.float32, torch.int32}


def test_the_keys_of_the_state_are_there_from_construction_and_stay() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    keys, shapes = (
        list(states(optimizer)),
        {k: (x.shape, x.dtype) for k, x in states(optimizer).items()},
    )
    assert {k for k in keys if k.startswith("1.")} == {
        "1.momentum",
        "1.variance",
        "1.step",
        "1.skipped",
        "1.consecutive",
    }
    assert {k for k in keys if k.startswith("2.")} == {
        "2.exp_avg",
        "2.exp_avg_sq",
        "2.step",
        "2.skipped",
        "2.consecutive",
    }
    train(model, optimizer, range(2))
    assert (
        list(states(optimizer)) == keys
        and {k: (x.shape, x.dtype) for k, x in states(optimizer).items()} == shapes
    )


def test_hyperparameters_are_saved_as_numbers_and_a_tensor_stays_one_when_they_are_loaded() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=torch.tensor(0.25))
    lr_scheduler.StepLR(optimizer, 1)
    (saved,) = optimizer.state_dict()["param_groups"]
    assert (
        saved["lr"] == saved["initial_lr"] == 0.25
        and type(saved["lr"]) is type(saved["initial_lr"]) is float
    )
    own = torch.tensor(0.5)
    again = nm.NorMuon(Net().named_parameters(), lr=own)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] is own and float(own) == 0.25


def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_is_written() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model), guard="full")
    train(model, optimizer, range(2))
    good, before = copy.deepcopy(optimizer.state_dict()), states(optimizer)

    def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        given = copy.deepcopy(good)
        for kept in given["state"].values():
            for x in kept.values():
                x.add_(1)
        change(given)
        return given

    muon = torch.optim.Muon([p for _, p in split(model)[0]])
    cases: list[tuple[dict[str, Any], str]] = [
        (
            broken(lambda d: d["state"][2].update(momentum=torch.zeros(3, 3))),
            r"'square.weight' momentum: expected shape \(6, 6\), got",
        ),
        (broken(lambda d: d["state"][2].pop("variance")), "for 'square.weight', got"),
        (broken(lambda d: d["state"][2].pop("step")), "for 'square.weight', got"),
        (
            broken(lambda d: d["param_groups"].pop()),
            r"Only in this optimizer: \['down.bias', 'embed.weight', 'square.bias', 'up.bias'\]",
        ),
        (
            broken(lambda d: d["param_groups"][0].update(algorithm="adamw")),
            "group 0 has algorithm 'adamw'",
        ),
        (muon.state_dict(), "was saved by another optimizer"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(given)
        assert same(states(optimizer), before)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        nm.NorMuon(split(model)[0]).load_state_dict(muon.state_dict())


def test_hooks_of_saving_and_loading_run() -> None:
    model = Net()
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, d: d | {"extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, d: {k: v for k, v in d.items() if seen.append(k) is None}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", "state", "param_groups", "extra", "after loading"]


def test_a_loaded_state_is_that_of_a_graph_that_was_captured_before(
    rehearsed: list[Rehearsed],
) -> None:
    model, other = Net(), Net()
    optimizer, plain = (
        nm.NorMuon(model.named_parameters(), graphed=True),
        nm.NorMuon(other.named_parameters()),
    )
    for net, of in ((model, optimizer), (other, plain)):
        train(net, of, range(3))
        saved = copy.deepcopy((net.state_dict(), of.state_dict()))
        train(net, of, range(3, 5))
        net.load_state_dict(saved[0])
        of.load_state_dict(saved[1])
        train(net, of, range(5, 7))
    assert rehearsed[0].did() == "plain capture replay replay replay replay replay replay"
    assert same(weights(model), weights(other)) and same(states(optimizer), states(plain))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_exactly(how: Callable[[Any], Any]) -> None:
    model = Net()
    optimizer = nm.NorMuon(
        three(model), guard="full", late_gradients="error", config=nm.Config(nesterov=True)
    )
    train(model, optimizer, range(3))
    net, twin = how((model, optimizer))
    assert twin.config == optimizer.config and twin.late_gradients == "error"
    assert twin.state[net.up.weight]["step"] is twin.state[net.down.weight]["step"]
    train(model, optimizer, range(3, 5))
    assert not same(weights(net), weights(model))
    train(net, twin, range(3, 5))
    assert same(weights(net), weights(model)) and same(states(twin), states(optimizer))


def test_parameters_may_be_replaced_and_moved_before_the_first_step() -> None:
    model, other = Net(), Net(dtype=torch.float64)
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02)
    model.to(torch.float64)  # in place: the same parameters
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())  # another one
    optimizer.param_groups[0]["params"][1] = model.up.weight
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(2))
    train(other, nm.NorMuon(other.named_parameters(), lr=0.02), range(2))
    assert same(weights(model), weights(other)) and len(optimizer.state) == 7
    assert {x.dtype for x in states(optimizer).values()} == {torch.float64, torch.int32}
    model.to(torch.float32)
    with pytest.raises(
        ValueError,
        match=r"has another shape, dtype or placement than its \w+; make a new optimizer",
    ):
        train(model, optimizer, range(1))


# --- gradients


def matrices_only(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return split(model)[0]


def clipped_run(coefficient: float, steps: int, alternate: bool = False) -> dict[str, Tensor]:
    model = Net()
    named = matrices_only(model)
    optimizer = nm.NorMuon(
        named, lr=0.02, weight_decay=0.1, config=nm.Config(orthogonalize_dtype=torch.float32)
    )
    params = [p for _, p in named]
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        for p in params:
            assert p.grad is not None
            p.grad.div_(norm)
        if coefficient < 1.0 and (not alternate or k % 2):
            total = torch.nn.utils.clip_grad_norm_(params, coefficient)
            assert float(total) == pytest.approx(1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in named}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("coefficient", [2e-8, 1e-3])
def test_clipping_every_step_by_the_same_coefficient_changes_nothing_but_rounding(
    coefficient: float,
) -> None:
    """Gradients have norm 1, so the norm they are clipped to is the coefficient of the momentum."""
    whole, clipped = clipped_run(1.0, 10), clipped_run(coefficient, 10)
    assert difference(whole, clipped_run(1.0, 0)) > 0.03
    assert difference(whole, clipped) < 3e-7  # 6e-8 seen


def test_clipping_the_first_step_changes_nothing_and_clipping_every_other_one_does() -> None:
    assert difference(clipped_run(1.0, 1), clipped_run(2e-8, 1)) < 1e-7
    assert (
        difference(clipped_run(1.0, 10), clipped_run(2e-8, 10, alternate=True)) > 1e-3
    )  # the momentum forgets the clipped


def test_gradients_times_a_power_of_two_give_the_same_bits() -> None:
    runs = []
    for scale in (1.0, 2.0**-26):  # 1.5e-8
        model = Net()
        optimizer = nm.NorMuon(matrices_only(model), lr=0.02)
        for k in range(5):
            optimizer.zero_grad()
            backward(model, k, scale)
            optimizer.step()
        runs.append(weights(model))
    assert same(*runs) and not same(runs[0], weights(Net()))


def test_accumulated_gradients_are_those_of_the_sum() -> None:
    model, other = Net(), Net()
    pairs = (
        (model, nm.NorMuon(model.named_parameters(), lr=0.02)),
        (other, nm.NorMuon(other.named_parameters(), lr=0.02)),
    )
    for k in range(3):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            if net is model:
                backward(net, 2 * k)
                backward(net, 2 * k + 1)
            else:
                losses = [net(batch(i)).square().mean() for i in (2 * k, 2 * k + 1)]
                grads = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
                for p, a, b in zip(net.parameters(), *grads, strict=True):
                    p.grad = a + b
            optimizer.step()
    assert same(weights(model), weights(other))


def test_an_optimizer_a_parameter_may_step_in_the_backward_pass() -> None:
    model, other = Net(), Net()
    optimizers = {p: nm.NorMuon([(name, p)], lr=0.02) for name, p in model.named_parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    alone = [nm.NorMuon([pair], lr=0.02) for pair in other.named_parameters()]
    for k in range(3):
        backward(model, k)
        assert all(p.grad is None for p in model.parameters())
        other.zero_grad()
        backward(other, k)
        for optimizer in alone:
            optimizer.step()
    assert same(weights(model), weights(other)) and not same(weights(model), weights(Net()))


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grad_scaler_needs_no_wait_unscales_and_skips_what_is_infinite(
    dtype: torch.dtype, unscale_first: bool
) -> None:
    model, other = Net(dtype=dtype), Net(dtype=dtype)
    optimizer, plain = nm.NorMuon(three(model)), nm.NorMuon(three(other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for k in range(6):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale(model(batch(k)).square().mean()).backward()
        backward(other, k)
        if k == 3:
            assert model.up.weight.grad is not None
            model.up.weight.grad[0, 0] = float("inf")
        if unscale_first:
            scaler.unscale_(optimizer)
        before = weights(model), states(optimizer)
        with graphs.no_host_sync():
            scaler.step(optimizer)
        if k == 3:
            after = {
                name: x for name, x in states(optimizer).items() if not name.endswith(COUNTERS)
            }
            assert same(weights(model), before[0]) and same(
                after, {name: before[1][name] for name in after}
            )
        else:
            plain.step()
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**11, 2.0**11, 2.0**10, 2.0**10, 2.0**11]
    assert same(weights(model), weights(other)) and not hasattr(optimizer, "found_inf")
    assert (int(states(optimizer)["0.step"]), int(states(optimizer)["0.skipped"])) == (6, 1)


def test_a_grad_scaler_recompiles_nothing_and_leaves_a_graph_alone(
    counter: graphs.CompileCounter, rehearsed: list[Rehearsed]
) -> None:
    for graphed in (False, True):
        model = Net()
        optimizer = nm.NorMuon(three(model), graphed=graphed)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        for k in range(4):
            optimizer.zero_grad()
            scaler.scale(model(batch(k)).square().mean()).backward()
            with graphs.no_recompile():
                scaler.step(optimizer)
            scaler.update()
    assert counter.frame_count == 2 and rehearsed[0].did() == "plain capture replay replay replay"


def test_inductor_compiles_the_groups_that_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, config = (Net(), Net()), nm.Config(steps=1, guard="full")
    for net in nets:
        train(net, nm.NorMuon(three(net), config=config), range(4))
        monkeypatch.setattr(normuon, "step_", local_update_)
    assert difference(*map(weights, nets)) < 1e-6  # 1.2e-7 seen


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_on_cuda_a_captured_step_follows_scheduler_and_scaler_without_a_wait() -> None:
    results = []
    for graphed in (False, True):
        model = Net().cuda()
        optimizer = nm.NorMuon(three(model), guard="full", graphed=graphed, on_skip=None)
        schedule = SCHEDULERS["one_cycle"](optimizer)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
        for k in range(8):
            optimizer.zero_grad(set_to_none=False)
            scaler.scale(model(batch(k).cuda()).square().mean()).backward()
            if k == 5:
                assert model.up.weight.grad is not None
                model.up.weight.grad[0, 0] = float("inf")
            if k > 2:  # compiled and captured
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            scaler.update()
            schedule.step()
        if graphed:
            (stage,) = optimizer._planner.steps.values()
            assert stage.graphed is not None and stage.graphed.captured
        results.append((weights(model), states(optimizer)))
        optimizer.release()
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])
    assert int(results[1][1]["0.skipped"]) == 1


@needs_cuda
def test_on_cuda_groups_and_a_tensor_lr_on_the_host_have_the_bits_of_optimizers_of_their_own() -> (
    None
):
    model, other = Net().cuda(), Net().cuda()
    whole = nm.NorMuon(three(model, torch.tensor(0.02)), guard="full")
    alone = [nm.NorMuon([group], guard="full") for group in three(other)]
    for k in range(4):
        for net, optimizers in ((model, [whole]), (other, alone)):
            net.zero_grad()
            net(batch(k).cuda()).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert same(weights(model), weights(other))


# --- errors


def test_errors_name_what_to_do() -> None:
    model = Net()
    named = list(model.named_parameters())
    one, far = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: nm.NorMuon([]), ValueError, "empty parameter list"),
        (lambda: nm.NorMuon(named, lr=-1.0), ValueError, "lr: expected a finite number >= 0"),
        (
            lambda: nm.NorMuon(named, momentum=1.0),
            ValueError,
            r"momentum: expected a number in \[0, 1\)",
        ),
        (lambda: nm.NorMuon(named, lr="fast"), TypeError, "lr: expected a Python number"),  # type: ignore[arg-type]
        (
            lambda: nm.NorMuon(named, lr=torch.ones(2)),
            ValueError,
            "lr: expected a number or a tensor of one element",
        ),
        (
            lambda: nm.NorMuon(named, adamw_betas=0.9),
            TypeError,
            "adamw_betas: expected two numbers",
        ),  # type: ignore[arg-type]
        (lambda: nm.NorMuon(named, algorithm="muon"), ValueError, "'normuon' or 'adamw'"),  # type: ignore[arg-type]
        (lambda: nm.NorMuon(named, guard="on"), ValueError, "Config.guard"),  # type: ignore[arg-type]
        (lambda: nm.NorMuon(named, config="dion"), TypeError, "config: expected a Config"),  # type: ignore[arg-type]
        (
            lambda: nm.NorMuon(named, late_gradients="no"),
            ValueError,
            "late_gradients: expected one",
        ),  # type: ignore[arg-type]
        (
            lambda: nm.NorMuon([{"params": named, "betas": (0.9, 0.99)}]),
            TypeError,
            "'betas' is called 'adamw_betas' here",
        ),
        (
            lambda: nm.NorMuon([{"params": named, "use_muon": True}]),
            TypeError,
            "'use_muon' is called 'algorithm' here",
        ),
        (
            lambda: nm.NorMuon([{"params": named, "nesterov": True}]),
            TypeError,
            r"NorMuon\(config=Config\(nesterov=...\)\)",
        ),
        (
            lambda: nm.NorMuon([{"params": named}, {"params": [("up.weight", one)]}]),
            ValueError,
            "'up.weight'.*prefix",
        ),
        (
            lambda: nm.NorMuon([*named, ("tied", nn.Parameter(model.up.weight.data))]),
            ValueError,
            "pass tied weights once",
        ),
        (lambda: nm.NorMuon([*named, ("far", far)]), ValueError, "one optimizer per device"),
        (
            lambda: nm.make_plan(dict(named), hyper_of={"up.weight": 0}),
            ValueError,
            r"hyper_of\['embed.weight'\]",
        ),
    ]
    for make, kind, message in cases:
        with pytest.raises(kind, match=message):
            make()


def test_a_hyper_without_an_entry_for_every_group_is_refused() -> None:
    params = {name: p.detach() for name, p in Net().named_parameters()}
    plan = nm.make_plan(params, hyper_of={name: k % 2 for k, name in enumerate(params)})
    with pytest.raises(TypeError, match=r"hyper.lr: expected a tensor of shape \(2,\)"):
        nm.update(params, params, nm.init(plan, params), nm.Hyper.of(params, lr=0.1), plan)


# --- ranks: what several of them do is in tests/distributed/test_optimizer_ranks.py


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_fully_sharded_parameters_are_stepped_saved_and_resumed(alone: None) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model, other = Net(), Net()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    optimizer, plain = (
        nm.NorMuon(three(model), guard="full"),
        nm.NorMuon(three(other), guard="full"),
    )
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert isinstance(optimizer.state[model.up.weight]["momentum"], DTensor)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    assert difference(whole, weights(other)) < 1e-6
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert sorted(saved["state"]["up.weight"]) == [
        "consecutive",
        "momentum",
        "skipped",
        "step",
        "variance",
    ]
    resumed = Net(seed=1)
    fully_shard(resumed, mesh=mesh)
    again = nm.NorMuon(three(resumed, lr=0.5), guard="full")
    resumed.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(resumed, again, copy.deepcopy(saved))
    train(model, optimizer, range(3, 5))
    train(resumed, again, range(3, 5))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())  # type: ignore[attr-defined]
