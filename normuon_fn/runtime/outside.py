"""A step as a graph of stacks: its lists of parameters, gradients and state stay outside.

    dicts -> lists, in a table  -->  graph(order, guard, hyper, counters)  -->  lists -> dicts

What a graph costs to make grows with what it takes: Dynamo interprets Python for every parameter
and guards every tensor, AOTAutograd wraps each, Inductor looks at all of them again and again. Here
the graph takes what does not grow with the model, and finds its lists by handle: ops/handles.py.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..compat import is_plain_type
from ..compat.graphs import alike, compile_whole, free_graph
from ..compat.observers import any_differentiated
from ..ops.handles import Handle
from ..planning.hypergradients import check_derivatives
from ..planning.layout import View
from ..planning.plan import Plan
from ..planning.tensors import CallersDicts, Entries
from ..step import local_update, local_update_, step_of
from ..types import Grads, Hyper, StepResult, Tensors, result_of
from .eager import NotCompiled
from .rings import transfers_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COUNTERS = ("guard.step", "guard.skipped", "guard.consecutive")
Dtypes = tuple[torch.dtype, ...]
# of a gradient and its parameter
GRADIENTS = {(x, x) for x in (*FLOATS, torch.float64)} | {(torch.float32, x) for x in FLOATS}


class OutsideDicts:
    """The dicts of a step while its graph is made: what is read and written there, in order."""

    def __init__(
        self,
        orders: Sequence[Tensor],  # one per bucket, or one for all: see `Graph`
        plan: Plan,
        grads: Mapping[str, torch.dtype],
        state: Tensors,
        *,
        in_place: bool,
    ) -> None:
        self.grads, self.state, self.in_place = grads, state, in_place
        entries = itertools.count()
        graphs = [ops.Graph(order, entries) for order in orders]
        self.graphs = graphs * len(plan.all_buckets) if len(graphs) == 1 else graphs
        self.graph: ops.Graph | None = None
        self.device = plan.device
        self.specs = {**{p.name: p.spec for p in plan.parameters}, **plan.state}
        self.read_at: dict[Entries, Handle] = {}
        self.written: list[tuple[Entries, str]] = []  # and the text of their handle
        self.counters: Tensors = {}

    def of_bucket(self, bucket: int) -> OutsideDicts:
        found = copy.copy(self)  # what was read and written stays common
        found.graph = self.graphs[bucket]
        return found

    def has_gradient(self, name: str) -> bool:
        return name in self.grads

    def read(self, entries: Entries) -> Any:
        handle = self.read_at.get(entries)
        if handle is None:
            assert self.graph is not None
            handle = self.read_at[entries] = self.graph.add(self._likes(entries))
        return handle

    def _likes(self, entries: Entries) -> list[ops.Like]:
        views: Sequence[View | None] = entries.views or (None,) * len(entries.keys)
        shapes = [
            torch.Size(self.specs[key].shape if view is None else view.read_shape)
            for key, view in zip(entries.keys, views, strict=True)
        ]
        of = (
            self.grads if entries.what == "grad" else {k: self.specs[k].dtype for k in entries.keys}
        )
        dtypes = [of[key] for key in entries.keys]
        if len(set(dtypes)) > 1 and entries.what == "grad":
            dtypes = [torch.float32] * len(dtypes)  # see `Entries.read`
        return [ops.Like(*each, self.device) for each in zip(shapes, dtypes, strict=True)]

    def put(self, entries: Entries, tensors: Any) -> None:
        self.written.append((entries, tensors.text))

    def count(self, counters: Tensors) -> None:
        self.counters = counters
        if self.in_place:
            for key, value in counters.items():
                self.state[key].copy_(value)


class Graph:
    """One of the step's functions for one plan, and for gradients of which some are missing.

    It does not keep the plan alive: a graph must not outlive it.
    """

    def __init__(self, plan: Plan, grads: Mapping[str, torch.dtype], *, in_place: bool) -> None:
        self.plan, self.grads, self.in_place = weakref.ref(plan), grads, in_place
        kind: Any = {"dtype": torch.uint8, "device": plan.device}
        # Without a guard an update enters as soon as it is there. One order for all makes sure that
        # its memory is free before the next bucket asks for some. A ring serves all in one order.
        in_turn = (plan.guard.mode == "off" and not plan.sends) or plan.streaming is not None
        self.orders = [torch.zeros((), **kind) for _ in plan.all_buckets[: 1 if in_turn else None]]
        self.kept = plan.tensors
        # Known once traced: what is read, by entry of the table; what is written, by handle.
        self.reads: dict[int, Entries] = {}
        self.writes: list[tuple[Entries, str]] = []
        traced = torch.compiler.allow_in_graph(lambda *tensors: self._traced(*tensors))

        def run(tensors: list[Tensor]) -> list[Tensor]:
            if not torch.compiler.is_dynamo_compiling():
                raise NotCompiled
            return traced(*tensors)

        self.compiled = compile_whole(run, overlap=plan.sends)

    def _traced(self, *flat: Tensor) -> list[Tensor]:
        """The step on fake tensors: flags, whether it was skipped, if pure counters, metrics."""
        plan = self.plan()
        assert plan is not None
        given = iter(flat)
        orders = [next(given) for _ in self.orders]
        kept = {id(tensor): next(given) for tensor in plan.tensors}
        hyper = Hyper(*(next(given) for _ in Hyper._fields))
        state = {key: next(given) for key in COUNTERS}
        dicts = OutsideDicts(orders, plan, self.grads, state, in_place=self.in_place)
        with ops.inputs(kept):
            flags, skipped, metrics = step_of(dicts, hyper, plan, next(given, None))
        self.reads = {handle.places[0].entry: entries for entries, handle in dicts.read_at.items()}
        self.writes = dicts.written
        new = () if self.in_place else dicts.counters.values()
        return [flags, skipped, *new] if metrics is None else [flags, skipped, *new, metrics]

    def __call__(
        self, dicts: CallersDicts, hyper: Hyper, plan: Plan, found_inf: Tensor | None
    ) -> StepResult:
        found = () if found_inf is None else (found_inf,)
        counters = [dicts.state[key] for key in COUNTERS]
        table = ops.Table(lambda entry: dicts.read(self.reads[entry]), transfers_of(plan))
        with torch.no_grad(), ops.lists_outside(table):
            flags, skipped, *new = self.compiled(
                [*self.orders, *self.kept, *hyper, *counters, *found]
            )
        for entries, text in self.writes:
            dicts.put(entries, table.find(text))
        if not self.in_place:
            dicts.count(dict(zip(COUNTERS, new, strict=False)))
        metrics = None if plan.metrics is None else new[-1]
        return result_of(*dicts.after(), flags, skipped, metrics)


class Looks(NamedTuple):
    """What the tensors of the last call that was checked looked like, none of them differentiated.

    Where others look the same, nothing has to be checked again.
    """

    alike: Callable[..., bool]
    dtypes: Dtypes  # of the gradients
    requires_grad: bool  # some parameters do; they were leaves of autograd


class Operation:
    """One of the step's functions for the same arguments: one graph, unless dtypes change."""

    def __init__(
        self, function: Callable[..., StepResult], plan: Plan, missing: Sequence[bool]
    ) -> None:
        self.in_place = function is local_update_
        names = plan.names
        absent = missing or (False,) * len(names)
        self.names, self.state = names, tuple(plan.state)
        self.graded = [name for name, lacks in zip(names, absent, strict=True) if not lacks]
        specs = {p.name: p.spec for p in plan.parameters}
        each = [*map(specs.__getitem__, names), *plan.state.values()]
        self.dtypes = [spec.dtype for spec in each]
        each += map(specs.__getitem__, self.graded)
        self.sizes = [torch.Size(spec.shape) for spec in each]
        self.devices = [spec.on(plan.device) for spec in each]
        self.of_graded = [specs[name].dtype for name in self.graded]
        self.hyper_sizes = [torch.Size((plan.hypers,) if plan.hypers else ())] * len(Hyper._fields)
        self.looks: Looks | None = None
        self.graphs: dict[tuple[Dtypes, bool], Graph] = {}

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
        dtypes = self._checked(params, grads, state, hyper, plan)
        # On what ranks may find, it depends when momentums are written, and so what is read first.
        key = dtypes, found_inf is None
        graph = self.graphs.get(key)
        if graph is None:
            of_grads = dict(zip(self.graded, dtypes, strict=True))
            graph = self.graphs[key] = Graph(plan, of_grads, in_place=self.in_place)
        dicts = CallersDicts(params, grads, state, in_place=self.in_place)
        return graph(dicts, hyper, plan, found_inf)

    def _checked(
        self, params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan
    ) -> Dtypes:
        """The dtypes of the gradients.

        Raises:
            KeyError, ValueError: something is not as the plan says. `check_step` says what.
        """
        if not len(params) == len(grads) == len(self.names) or len(state) != len(self.state):
            raise KeyError("params, grads and state: expected the names of the plan")
        own = [params[name] for name in self.names]
        written = [state[key] for key in self.state]
        graded: list[Any] = [grads[name] for name in self.graded]
        tensors, others = own + written + graded, [*written, *graded, *hyper]
        looks = self.looks
        if (
            looks is not None
            and looks.alike(*own, *others)
            and not (looks.requires_grad and any_differentiated(own, ()))
        ):
            return looks.dtypes
        dtypes = tuple([x.dtype for x in graded])
        if (
            [*map(Tensor.size, tensors)] != self.sizes
            or [x.dtype for x in tensors[: len(self.dtypes)]] != self.dtypes
            or not {*zip(dtypes, self.of_graded, strict=True)} <= GRADIENTS
            or [x.device for x in tensors] != self.devices
            or {x.layout for x in tensors} != {torch.strided}
            or [x.shape for x in hyper] != self.hyper_sizes
            or not all(is_plain_type(kind) for kind in {*map(type, tensors)})
        ):
            raise ValueError("params, grads, state and hyper: expected the tensors of the plan")
        if any_differentiated(own, others):
            check_derivatives(params, grads, state, hyper, in_place=self.in_place)
        elif not any([x.requires_grad for x in others]):  # noqa: C419 - a list is twice as fast
            has_leaves = any([x.requires_grad for x in own])  # noqa: C419
            self.looks = Looks(alike([*own, *others]), dtypes, has_leaves)
        return dtypes

    def free(self) -> None:
        for graph in self.graphs.values():
            free_graph(graph.compiled)


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

    Dynamo traces a function of the user's own itself, and guards what it reads.
    """
    if plan.config.orthogonalizer is not None:
        return compile_whole(_BY_DYNAMO[function], overlap=plan.sends)
    return Operation(function, plan, missing)


def free(graph: Callable[..., StepResult]) -> None:
    """Frees what `graph_of` returned."""
    graph.free() if isinstance(graph, Operation) else free_graph(graph)
