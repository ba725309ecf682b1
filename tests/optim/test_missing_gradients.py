"""Gradients that never come, and those that come in another set at every step."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import normuon_fn as nm
from normuon_fn.runtime import compiled, outside
from normuon_fn.runtime.recent import KEPT, MANY

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHORT = nm.Config(coefficients=((1.5, -0.5, 0.0),), steps=1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)
        self.side = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return (self.down(hidden) + self.side(hidden)).square().mean()


def backward(model: nn.Module) -> None:
    model(torch.randn(3, 4)).backward()


def heard(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    assert {w.filename for w in seen} <= {__file__}
    return [str(w.message) for w in seen]


# --- no gradient at all


@pytest.mark.parametrize("missing", ["skip", "zeros"])
@pytest.mark.parametrize("of", ["model", "parameters"])
def test_a_step_without_any_gradient_is_said_once(eager: None, missing: Any, of: str) -> None:
    model = Tied()
    params: Any = model if of == "model" else [*model.named_parameters()]
    optimizer = nm.NorMuon(params, config=nm.Config(missing_grads=missing))
    texts = heard(lambda: [optimizer.step() for _ in range(3)])
    assert len(texts) == 1 and "no parameter has a gradient. Was backward() not" in texts[0]
    backward(model)
    assert heard(lambda: [optimizer.step() for _ in range(2)]) == []


def test_a_copy_of_the_model_that_is_trained_instead_is_said(eager: None) -> None:
    model = Tied()
    optimizer, other = nm.NorMuon(model), copy.deepcopy(model)
    backward(other)
    assert ["deepcopy" in text for text in heard(optimizer.step)] == [True]


# --- parameters that the model has no longer


@pytest.fixture
def alone() -> Any:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: x.clone() for k, x in model.state_dict().items()}, assign=True)


def overwrite(model: nn.Module) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.to(torch.float64).to(torch.float32)
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def anew(model: nn.Module) -> None:
    model.up = nn.Linear(4, 8)


REPLACED = {"fully_shard": shard, "assign": assign, "overwrite": overwrite, "a new layer": anew}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("how", list(REPLACED))
def test_a_model_that_has_other_tensors_by_now_is_refused_by_name(
    eager: None, alone: None, how: str, stepped: bool
) -> None:
    model = Tied()
    optimizer = nm.NorMuon(model)
    if stepped:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    REPLACED[how](model)
    backward(model)
    before = optimizer.state_dict()["state"][0]["step"].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'up.weight'.*the model has another tensor by this"):
            optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == before


def test_a_model_that_was_on_no_device_is_refused_by_name(eager: None) -> None:
    with torch.device("meta"):
        model = Tied()
    optimizer = nm.NorMuon(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    backward(model)
    with pytest.raises(ValueError, match=r"'up.weight', 'up.bias', 'down.weight', 'side.weight'"):
        optimizer.step()


def test_weights_that_are_tied_later_are_said_once_and_trained(eager: None) -> None:
    model = Tied()
    optimizer = nm.NorMuon(model)
    model.side.weight = model.down.weight
    backward(model)
    before = model.down.weight.detach().clone()
    texts = heard(lambda: [optimizer.step() for _ in range(2)])
    assert len(texts) == 1 and texts[0].startswith("'side.weight': without a gradient, and no long")
    assert not torch.equal(model.down.weight, before)


def test_what_changes_parameters_in_place_or_leaves_them_alone_is_said_nothing_about(
    eager: None, alone: None
) -> None:
    """As with torch.optim.AdamW: these are the same tensors before and after."""
    model = Tied()
    optimizer = nm.NorMuon(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    model.to(torch.float64).float().requires_grad_(True)
    model.side.requires_grad_(False)
    backward(wrapped)
    assert heard(lambda: [optimizer.step() for _ in range(2)]) == []


def test_parameters_that_a_framework_puts_into_the_groups_are_the_ones_that_are_stepped(
    eager: None, alone: None
) -> None:
    """Accelerate does it for FSDP2, between a forward and a backward pass too."""
    model = Tied()
    optimizer = nm.NorMuon(model)
    shard(model)
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    model(torch.randn(3, 4))  # the model has whole parameters now
    assert len(heard(optimizer.step)) == 1  # no gradient
    backward(model)
    assert heard(optimizer.step) == []


# --- sets of gradients that change


EXPERTS = KEPT + 4


def with_grad_of(params: list[nn.Parameter], k: int) -> None:
    for i, p in enumerate(params):
        p.grad = torch.ones_like(p) if i in (0, k) else None


def test_the_optimizer_keeps_the_last_sets_and_says_once_that_they_change(eager: None) -> None:
    params = [nn.Parameter(torch.randn(2, 2)) for _ in range(EXPERTS)]
    optimizer = nm.NorMuon([(f"e{k}", p) for k, p in enumerate(params)], config=SHORT)
    twin_params = [nn.Parameter(p.detach().clone()) for p in params]
    twin = nm.NorMuon([(f"e{k}", p) for k, p in enumerate(twin_params)], config=SHORT)

    def run(k: int) -> None:
        with_grad_of(params, k)
        optimizer.step()

    assert heard(lambda: [run(k) for k in range(1, MANY)]) == []
    texts = heard(lambda: [run(k) for k in range(MANY, EXPERTS)])
    assert len(texts) == 1 and f"{MANY}th set" in texts[0] and 'missing_grads="zeros"' in texts[0]
    steps = optimizer._planner.steps  # type: ignore[union-attr]
    assert len(steps) == KEPT
    run(1)  # was forgotten, and its state was not
    twin._planner.steps._size = 99  # type: ignore[union-attr]
    for k in (*range(1, EXPERTS), 1):
        with_grad_of(twin_params, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.step()
    assert len(twin._planner.steps) > KEPT  # type: ignore[union-attr]
    assert all(torch.equal(p, q) for p, q in zip(params, twin_params, strict=True))


def test_a_set_that_is_used_stays_and_a_captured_one_that_leaves_is_released(
    eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = []
    params = [nn.Parameter(torch.randn(2, 2)) for _ in range(EXPERTS)]
    optimizer = nm.NorMuon([(f"e{k}", p) for k, p in enumerate(params)], config=SHORT)
    planner = optimizer._planner
    assert planner is not None
    monkeypatch.setattr(planner.steps, "_dropped", released.append)
    for k in range(1, EXPERTS):
        for each in (1, k):  # the first set is used all the time
            with_grad_of(params, each)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
    kept = [planned.places for planned in planner.steps.values()]
    assert [0, 1] in kept and [0, 2] not in kept
    assert [planned.places for planned in released][1] == [0, 2] and len(kept) == KEPT


@pytest.mark.parametrize("function", [nm.step, nm.step_])
def test_the_functional_step_keeps_the_last_graphs_and_frees_the_others(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def uncompiled(of: Any, **_: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return of(*args, **kwargs)

        made.append(weakref.ref(run))
        return run

    monkeypatch.setattr(outside, "compile_whole", uncompiled)
    params = {f"e{k}": torch.randn(2, 2) for k in range(EXPERTS)}
    plan = nm.make_plan(params, SHORT, routes=dict.fromkeys(params, nm.Route()))
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)

    def run(k: int) -> None:
        grads = {name: x if name in ("e0", f"e{k}") else None for name, x in params.items()}
        function(params, grads, state, hyper, plan)

    assert heard(lambda: [run(k) for k in range(1, MANY)]) == []
    texts = heard(lambda: [run(k) for k in range(MANY, EXPERTS)])
    assert len(texts) == 1 and texts[0].startswith(f"{function.__name__}: this is the {MANY}th set")
    gc.collect()
    assert sum(ref() is not None for ref in made) == KEPT < len(made)


@pytest.mark.parametrize("how", ["another set", "another plan"])
def test_dynamo_frees_a_graph_that_leaves(without_inductor: None, how: str) -> None:
    params = {"a": torch.randn(2, 2), "b": torch.randn(2, 2)}
    plan = nm.make_plan(params, SHORT, routes=dict.fromkeys(params, nm.Route()))
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    nm.step_(params, params | {"b": None}, state, hyper, plan)
    graphs = compiled._graphs[plan]
    (graph,) = next(iter(graphs.values())).graphs.values()
    traced = graph.compiled._torchdynamo_orig_callable.__code__
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(traced)
    codes = [weakref.ref(entry.code) for entry in entries]  # what dynamo runs in its place
    del traced, entries, graph
    if how == "another set":
        graphs._size = 1
        nm.step_(params, params, state, hyper, plan)
        assert len(graphs) == 1
    else:
        del plan, graphs
    gc.collect()
    assert len(codes) == 1 and codes[0]() is None


@pytest.mark.usefixtures("eager")
def test_steps_that_were_refused_are_no_new_sets_of_gradients(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = nn.Linear(4, 4)
    optimizer = nm.NorMuon(model, lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for lr in (float("nan"), -1.0, "fast", float("inf"), None):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises((TypeError, ValueError), match="lr"):
            optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert [str(w.message) for w in recwarn.list if "set of parameters" in str(w.message)] == []


# --- parameters that no step moves


class Unused(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_a_plan_names_what_has_no_gradient_yet(eager: None) -> None:
    model = Unused()
    optimizer = nm.NorMuon(model)
    assert optimizer.plan is None
    backward(model)
    optimizer.step()
    assert "no gradient yet: unused.weight, unused.bias" in str(optimizer.plan)
    assert "frozen" not in str(optimizer.plan)
    backward(model)
    model.unused.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert "no gradient yet: unused.bias\n" in f"{optimizer.plan}\n"
    model.unused.bias.grad, model.unused.weight.grad = torch.ones(4), None
    optimizer.step()
    text = str(optimizer.plan)
    assert "no gradient in this step: unused.weight" in text and "no gradient yet" not in text


@pytest.mark.parametrize("missing", ["skip", "zeros"])
def test_a_plan_of_all_parameters_says_nothing_of_gradients(eager: None, missing: Any) -> None:
    model = Tied() if missing == "skip" else Unused()
    optimizer = nm.NorMuon(model, config=nm.Config(missing_grads=missing))
    backward(model)
    optimizer.step()
    assert "no gradient" not in str(optimizer.plan)


class Extended(Tied):
    """Has a further layer from some time on."""

    def extend(self) -> None:
        self.extra = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.extra(x) if hasattr(self, "extra") else x)


@pytest.mark.parametrize("of", ["model", "groups and a table", "wrapped"])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_module_that_is_added_later_is_told_once(eager: None, of: str, before: int) -> None:
    model = Extended()
    whole: nn.Module = nn.Sequential(model) if of == "wrapped" else model
    if of == "groups and a table":
        optimizer = nm.NorMuon([{"params": list(model.parameters())}], routes=nm.routes_for(model))
    else:
        optimizer = nm.NorMuon(whole)

    def run(steps: int) -> None:
        for _ in range(steps):
            backward(model)
            optimizer.step()

    assert heard(lambda: run(before)) == []
    model.extend()
    texts = heard(lambda: run(20))
    prefix = "0." if of == "wrapped" else ""
    assert len(texts) == 1
    assert f"'{prefix}extra.weight', '{prefix}extra.bias'" in texts[0]
    assert "nm.NorMuon(model, ...)" in texts[0]


def test_parts_that_another_optimizer_has_or_that_are_frozen_are_not_told(eager: None) -> None:
    model = Extended()
    model.extend()
    optimizer = nm.NorMuon(
        [{"params": list(model.up.parameters())}, {"params": list(model.down.parameters())}],
        routes=nm.routes_for(model),
    )
    later = nm.NorMuon(list(model.side.parameters()), routes=nm.routes_for(model))
    model.adapter = nn.Linear(4, 4).requires_grad_(False)

    def run() -> None:
        for _ in range(4):
            backward(model)
            optimizer.step()
            later.step()

    assert heard(run) == []


def test_a_copied_or_pickled_optimizer_watches_no_model(eager: None) -> None:
    model = Extended()
    optimizer = nm.NorMuon(model)
    copied_model, copied = copy.deepcopy((model, optimizer))
    copied_model.extend()
    backward(copied_model)
    assert heard(copied.step) == []
