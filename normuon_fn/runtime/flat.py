"""A step as a function of tensors alone, which Dynamo takes for one operation.

    dicts -> one list of tensors -> the compiled graph -> a list of tensors -> dicts

Dynamo interprets every line of Python that it traces, and a plan is mostly Python: with hundreds of
matrices that took most of the first step. The function here is called while the graph is made, on
fake tensors and by Python itself; the graph that comes of it is the same. What Dynamo still sees
and guards are the tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..compat.graphs import compile_whole, free_graph
from ..planning.plan import Plan
from ..step import local_update, local_update_
from ..types import Grads, Hyper, StepResult, Tensors
from .eager import NotCompiled

Flat = Sequence[Tensor]


class FlatStep:
    """One of the step's functions, for one plan and one set of arguments that are there.

    It does not keep the plan alive: a graph must not outlive it.
    """

    def __init__(
        self, function: Callable[..., StepResult], plan: Plan, missing: Sequence[bool]
    ) -> None:
        self.function, self.plan = function, weakref.ref(plan)
        names = plan.names
        self.names, self.known, self.state = names, frozenset(names), tuple(plan.state)
        absent = missing or (False,) * len(names)
        self.lacking = frozenset(name for name, lacks in zip(names, absent, strict=True) if lacks)
        self.graded = tuple(name for name in names if name not in self.lacking)
        self.written: list[tuple[str, ...]] = []  # new parameters, new state; known once traced

    def flatten(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        plan: Plan,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        """All tensors that the step reads, in an order of its own.

        Raises:
            KeyError: other names than the plan's. `check_step` says which.
        """
        if (
            len(params) != len(self.names)
            or len(state) != len(self.state)
            or grads.keys() != self.known  # a name that is not there would look like a None
        ):
            raise KeyError("params, grads and state: expected the names of the plan")
        flat = [plan.guard.parameter_of, plan.guard.members, *hyper]
        flat += [params[name] for name in self.names]
        flat += [state[key] for key in self.state]
        flat += [grads[name] for name in self.graded]  # type: ignore[misc]
        return flat if found_inf is None else [*flat, found_inf]

    def traced(self, *flat: Tensor) -> list[Tensor]:
        """The step on fake tensors: flags, whether it was skipped, and what is new."""
        plan = self.plan()
        assert plan is not None
        given: Iterator[Tensor] = iter(flat)
        rule = replace(plan.guard, parameter_of=next(given), members=next(given))
        hyper = Hyper(*(next(given) for _ in Hyper._fields))
        params = {name: next(given) for name in self.names}
        state = {key: next(given) for key in self.state}
        grads: dict[str, Tensor | None] = dict.fromkeys(self.names)
        grads |= {name: next(given) for name in self.graded}
        found_inf = next(given, None)
        result = self.function(
            params, grads, state, hyper, replace(plan, guard=rule), found_inf=found_inf
        )
        new = [
            {name: x for name, x in after.items() if x is not before[name]}
            for after, before in ((result.params, params), (result.state, state))
        ]
        self.written = [tuple(each) for each in new]
        return [result.flags, result.skipped, *(x for each in new for x in each.values())]

    def unflatten(self, flat: Flat, params: Tensors, state: Tensors) -> StepResult:
        """The result with the keys of what was given, in the same order."""
        flags, skipped, *rest = flat
        new_params, new_state = self.written
        after_params = {**params, **dict(zip(new_params, rest, strict=False))}
        after_state = {**state, **dict(zip(new_state, rest[len(new_params) :], strict=True))}
        return StepResult(after_params, after_state, flags, skipped)


class Operation:
    """One of the step's functions for the same arguments, as a graph."""

    def __init__(
        self, function: Callable[..., StepResult], plan: Plan, missing: Sequence[bool]
    ) -> None:
        self.flat = flat = FlatStep(function, plan, missing)
        traced = torch.compiler.allow_in_graph(lambda *tensors: flat.traced(*tensors))

        def run(tensors: list[Tensor]) -> list[Tensor]:
            if not torch.compiler.is_dynamo_compiling():
                raise NotCompiled
            return traced(*tensors)

        self.graph = compile_whole(run, overlap=plan.sends)

    def __call__(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        plan: Plan,
        *,
        found_inf: Tensor | None = None,
    ) -> StepResult:
        tensors = self.flat.flatten(params, grads, state, hyper, plan, found_inf)
        return self.flat.unflatten(self.graph(tensors), params, state)


def _only_traced(function: Callable[..., StepResult]) -> Callable[..., StepResult]:
    """``function`` where Dynamo traces it. Where it does not, the step must not run either: Dynamo
    would raise afterwards, "found no compiled frames".
    """

    def traced(
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        plan: Plan,
        *,
        found_inf: Tensor | None = None,
    ) -> StepResult:
        if not torch.compiler.is_dynamo_compiling():
            raise NotCompiled
        return function(params, grads, state, hyper, plan, found_inf=found_inf)

    return traced


_BY_DYNAMO = {each: _only_traced(each) for each in (local_update, local_update_)}


def graph_of(
    function: Callable[..., StepResult], plan: Plan, missing: Sequence[bool]
) -> Callable[..., StepResult]:
    """``function`` for the same arguments, compiled when it is first called.

    Dynamo traces a function of the user's own itself, and steps whose ranks send to each other,
    whose plans have tables that the graph must take for constants.
    """
    if plan.config.orthogonalizer is not None or plan.sends:
        return compile_whole(_BY_DYNAMO[function], overlap=plan.sends)
    return Operation(function, plan, missing)


def free(graph: Callable[..., StepResult]) -> None:
    """Frees what `graph_of` returned."""
    free_graph(graph.graph if isinstance(graph, Operation) else graph)
