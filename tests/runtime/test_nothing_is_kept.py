"""When a model and its optimizer go, their memory goes: nothing of this package keeps a tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm

Use = Callable[[Path], Iterable[Any]]  # uses the package, and returns what has to go afterwards


def tensors(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"w{k}": torch.randn(shape) for k, shape in enumerate(shapes)}


def functions(folder: Path, **options: Any) -> Iterable[Any]:
    params = tensors((8, 8), (8, 12), (4, 6, 8), (8,))
    routes = {"w3": nm.Route("adamw"), "*": nm.Route()}
    plan = nm.make_plan(params, nm.Config(**options), routes=routes)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    result = nm.step(params, grads, state, hyper, plan)
    nm.step_(params, grads, state, hyper, plan)
    nm.update(params, grads, state, hyper, plan)
    nm.check(result, plan)
    if plan.config.metrics:
        nm.report_metrics(result, plan)
    nm.save(folder / "checkpoint", params, state, plan)
    loaded = nm.load(folder / "checkpoint", plan, params=params, state=state)
    return [
        plan,
        *loaded.params.values(),
        *params.values(),
        *grads.values(),
        *state.values(),
        *result.params.values(),
    ]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)))


def optimizer(folder: Path, **options: Any) -> Iterable[Any]:
    model = Model()
    own = nm.NorMuon(model, lr=0.1, **options)
    for _ in range(2):
        model(torch.arange(16)).square().mean().backward()
        own.step()
    own.load_state_dict(own.state_dict())
    grads = [p.grad for p in model.parameters()]
    state = [x for each in own.state.values() for x in each.values() if isinstance(x, Tensor)]
    return [model, own, *model.parameters(), *grads, *state]


def skipping(folder: Path) -> Iterable[Any]:
    model = Model()
    own = nm.NorMuon(model, lr=0.1, guard="full")
    monitor = nm.SkipMonitor(own)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    with pytest.warns(RuntimeWarning, match="step 1 skipped"):
        own.step()
    assert monitor() == 1 and own.result is not None and own.plan is not None
    assert nm.check(own.result, own.plan)
    return [model, own, own.result.flags, own.plan, own._reports.skips, monitor]


def table_of_routes(folder: Path) -> Iterable[Any]:
    model = Model()
    return [nm.routes_for(model), model, *model.parameters()]


def lists(folder: Path) -> Iterable[Any]:
    params = [torch.randn(8, 8), torch.randn(8, 12)]
    momentums, grads = [map(torch.zeros_like, params), map(torch.randn_like, params)]
    state = [*momentums], [torch.zeros(8, 1) for _ in params]
    given = [*grads]
    nm.foreach_step_(
        params, given, *state, lr=0.1, momentum=0.95, beta2=0.95, weight_decay=0.0, compiled=False
    )
    return [*params, *given, *state[0], *state[1]]


def clipped(folder: Path) -> Iterable[Any]:
    names = ["a.q_proj.weight", "a.k_proj.weight"]
    params = {name: torch.randn(8, 8) for name in names}
    plan = nm.make_plan(params, routes={name: nm.Route(heads=2) for name in names})
    largest = {"a": torch.tensor([300.0, 1.0])}
    before = params[names[0]].clone()
    nm.qk_clip_(params, largest, plan)
    assert not torch.equal(params[names[0]], before)
    return [plan, *params.values(), *largest.values()]


def one_matrix(folder: Path) -> Iterable[Any]:
    x = torch.randn(8, 8)
    return [x, nm.orthogonalize(x)]


USES: dict[str, Use] = {
    "functions": functions,
    "functions with a guard and metrics": lambda folder: functions(
        folder, guard="full", metrics=True
    ),
    "an optimizer": optimizer,
    "an optimizer whose last step was skipped": skipping,
    "a table of routes": table_of_routes,
    "lists": lists,
    "qk_clip_": clipped,
    "orthogonalize": one_matrix,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_was_given_goes_when_the_caller_lets_it_go(use: Use, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        left = [weakref.ref(x) for x in use(tmp_path)]
    gc.collect()
    assert len(left) > 1
    assert [type(x()) for x in left if x() is not None] == []


def test_so_does_what_a_compiled_step_was_given() -> None:
    params = tensors((8, 8), (8, 12))
    plan = nm.make_plan(params, nm.Config(), routes={"*": nm.Route()})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    for _ in range(2):
        nm.step_(params, grads, state, hyper, plan)
    given = [plan, *params.values(), *grads.values(), *state.values(), *hyper]
    left = [weakref.ref(x) for x in given]
    del params, plan, state, hyper, grads, given
    gc.collect()
    assert [type(x()) for x in left if x() is not None] == []
