"""A plan or an optimizer that was made before the process group knows of no other rank, and says so
before anything is written.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normuon_fn as nm
from compile_tests import graphs

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
MADE_LATE = r"before torch.distributed.init_process_group.*mesh=torch.distributed.group.WORLD"


def model_of() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).square().sum().backward()
    return model


def with_plan(model: nn.Module, entrance: Any, **options: Any) -> Callable[[], Any]:
    """The steps of a plan that is made now."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    mesh = options.pop("mesh", None)
    plan = nm.make_plan(params, nm.Config(**options), mesh=mesh)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    return lambda: entrance(params, grads, state, hyper, plan)


def with_optimizer(model: nn.Module, _: Any, **options: Any) -> Callable[[], Any]:
    mesh, guard = options.pop("mesh", None), options.pop("guard", None)
    return nm.NorMuon(model, lr=0.1, mesh=mesh, guard=guard, config=nm.Config(**options)).step


def with_copy(model: nn.Module, _: Any, **options: Any) -> Callable[[], Any]:
    step: Any = with_optimizer(model, None, **options)
    step.__self__._planner = None  # as one that was unpickled has it
    return step


MADE: dict[str, tuple[Any, Any]] = {
    "NorMuon": (with_optimizer, None),
    "NorMuon, unpickled": (with_copy, None),
    "step": (with_plan, nm.step),
    "step_": (with_plan, nm.step_),
    "update": (with_plan, nm.update),
}
ASKS: dict[str, dict[str, Any]] = {
    "guard": {"guard": "full"},
    "guard per bucket": {"guard": "output", "guard_scope": "bucket"},
    "owned state": {"replicas": "share"},
}
ASKS_NOTHING: dict[str, dict[str, Any]] = {"off": {}, "alone": {"guard": "full", "mesh": "alone"}}


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("asked", ASKS)
@pytest.mark.parametrize("how", MADE)
def test_what_was_made_before_the_ranks_were_there_is_refused_at_its_first_step(
    without_inductor: None, eager: None, how: str, asked: str
) -> None:
    model = model_of()
    make, entrance = MADE[how]
    step, before = make(model, entrance, **ASKS[asked]), bits(model)
    with graphs.fake_ranks(2):
        for _ in range(2):
            with pytest.raises(ValueError, match=MADE_LATE):
                step()
    assert all(map(torch.equal, bits(model), before))


def test_a_graph_of_ones_own_that_is_traced_when_the_ranks_are_there_is_refused() -> None:
    own = torch.compile(nm.update, fullgraph=True, backend="eager")
    step = with_plan(model_of(), own, guard="full")
    with graphs.fake_ranks(2), pytest.raises(Exception, match="init_process_group"):
        step()
    step()


@pytest.mark.parametrize("how", ["NorMuon", "step_"])
def test_ranks_that_come_between_two_steps_are_noticed_at_the_next(
    without_inductor: None, eager: None, how: str
) -> None:
    model = model_of()
    make, entrance = MADE[how]
    step = make(model, entrance, guard="full")
    step()
    with graphs.fake_ranks(2), pytest.raises(ValueError, match=MADE_LATE):
        step()
    step()


def test_a_set_of_gradients_that_is_planned_after_the_ranks_came_is_refused_too(
    eager: None,
) -> None:
    model = model_of()
    optimizer = nm.NorMuon(model, guard="full")
    model.bias.grad = None
    with graphs.fake_ranks(2), pytest.raises(ValueError, match=MADE_LATE):
        optimizer.step()


@pytest.mark.parametrize("asked", ASKS_NOTHING)
@pytest.mark.parametrize("how", MADE)
def test_where_nothing_depends_on_other_ranks_there_is_no_error(
    without_inductor: None, eager: None, how: str, asked: str
) -> None:
    make, entrance = MADE[how]
    step = make(model_of(), entrance, **ASKS_NOTHING[asked])
    with graphs.fake_ranks(2):
        step()


def test_a_process_group_of_one_rank_changes_nothing(eager: None) -> None:
    optimizer = nm.NorMuon(model_of(), guard="full")
    dist.init_process_group("fake", rank=0, world_size=1)
    try:
        optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("make", [nm.make_plan, nm.NorMuon])
@pytest.mark.parametrize("size", ["2", "1", "many"])
def test_a_launchers_environment_without_a_process_group_is_said_at_construction(
    monkeypatch: pytest.MonkeyPatch, size: str, make: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        make(model_of(), config=nm.Config(guard="full"))
        make(model_of(), config=nm.Config(guard="full"), mesh="alone")
        make(model_of())
    if size != "2":
        assert not said
        return
    (warning,) = said
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert "WORLD_SIZE is 2" in str(warning.message)
    assert "init_process_group" in str(warning.message)


def test_for_trainer_tells_a_mesh_that_was_none_before_the_arguments_were_made() -> None:
    model = model_of()
    make, kwargs = nm.for_trainer(model, guard="full", mesh=dist.group.WORLD)
    assert kwargs["mesh"] is None
    with graphs.fake_ranks(2), pytest.raises(ValueError, match="TrainingArguments first"):
        make()(model, **kwargs)
    make()(model, **kwargs)  # one process, with the same script
    with graphs.fake_ranks(2):
        make, kwargs = nm.for_trainer(model, guard="full", mesh=dist.group.WORLD)
        make()(model, **kwargs)


def test_for_trainer_says_so_of_shared_work_too() -> None:
    model = model_of()
    make, kwargs = nm.for_trainer(model, mesh=dist.group.WORLD)
    with graphs.fake_ranks(2), pytest.warns(UserWarning, match="TrainingArguments first"):
        make()(model, **kwargs)


def test_foreach_step_plans_anew_when_there_are_ranks(without_inductor: None) -> None:
    def step() -> None:
        lists = [[torch.ones(4, 4)] for _ in range(3)]
        variances = [torch.zeros(4, 1)]
        params, grads, momentums = lists
        options: dict[str, Any] = {"momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
        options["config"] = nm.Config(guard="full")
        nm.foreach_step_(params, grads, momentums, variances, lr=0.1, **options)

    step()
    with graphs.fake_ranks(2), pytest.warns(UserWarning, match="each decides alone"):
        step()
