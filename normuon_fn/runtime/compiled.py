"""`step` and `step_`: one compiled graph per plan and per set of missing gradients.

arguments -> the graph for them, compiled at its first use -> local tensors in, results out

A step that cannot be compiled, or that somebody observes, runs operation by operation: eager.py.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from ..compat import apart, observers, plain, without_autocast
from ..distributed import placements
from ..distributed.failures import named as named_failure
from ..ops.compiling import beforehand
from ..planning.checks import check_placements, check_plain, check_step
from ..planning.common import agree_on_step
from ..planning.hyperball import check_first_use, is_new
from ..planning.hypergradients import asks_for_rates, check_derivatives, with_derivative
from ..planning.make_plan import plan_of
from ..planning.memory import check_writable
from ..planning.plan import Plan, check_plan
from ..routing.routes import Decision
from ..step import init, local_update, local_update_, to_dtensors, update, zeros_for_none
from ..types import Grads, Hyper, StepResult, Tensors, result_of
from . import streams
from .eager import NotCompiled, StepFunction, must_be_eager, run_eagerly, saying_what_was_written
from .long_compilation import saying_so_if_long
from .lost_updates import warn_of_lost_updates
from .outside import free, graph_of
from .recent import MANY, Recent
from .unread import warn_of_unread

logger = logging.getLogger("normuon_fn")

GraphKey = tuple[StepFunction, tuple[bool, ...]]  # a function, and which gradients are None
_graphs: WeakKeyDictionary[Plan, Recent[GraphKey, StepFunction]] = WeakKeyDictionary()
_written: WeakKeyDictionary[Plan, tuple[int, ...]] = WeakKeyDictionary()  # by the call before


def step(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """The result of `update`, as one compiled graph (``torch.compile(fullgraph=True)``).

    It is compiled once per plan. Pass detached parameters, so that a result which is passed to the
    next step meets the same graph. Each set of gradients that are None is compiled once; with
    ``Config(missing_grads="zeros")`` there is only one. The fourth such set is said in a warning,
    and the graphs of the last 16 are kept.
    """
    if torch.compiler.is_dynamo_compiling():  # inside the caller's own graph
        return update(params, grads, state, hyper, plan, found_inf=found_inf)
    if asks_for_rates(hyper):
        return with_derivative(step, params, grads, state, hyper, plan, found_inf)
    result = _run(local_update, params, grads, state, hyper, plan, found_inf)
    return to_dtensors(result, plan)


def step_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """The result of `step` in place: it writes ``params`` and ``state``, and nothing else.

    The result has the same tensors. Inside a graph of your own on torch 2.11, parameters must not
    be parts of one storage (see compat.apart); `update` has no such limit.
    """
    if torch.compiler.is_dynamo_compiling():
        result = local_update_(params, grads, state, hyper, plan, found_inf=found_inf)
        return result_of(dict(params), dict(state), result.flags, result.skipped, result.metrics)
    with saying_what_was_written(plan, state):
        result = _run(local_update_, params, grads, state, hyper, plan, found_inf)
        if plan.one_storage:  # the graph wrote through `apart`, which does not count the versions
            torch.autograd.graph.increment_version([placements.local(p) for p in params.values()])
        return result._replace(params=dict(params), state=dict(state))


def eager_step_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """The result of `step_`, operation by operation. Of DTensors it has the local parts."""
    must_be_eager(local_update_, params, grads, state)  # raises
    with saying_what_was_written(plan, state):
        return run_eagerly(local_update_, params, grads, state, hyper, plan, found_inf)


def _run(
    function: StepFunction,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    """The result of ``function`` for the same arguments, on this rank: compiled if that can be."""
    check_plan(plan)
    if not must_be_eager(function, params, grads, state):
        with contextlib.suppress(NotCompiled):
            return _run_compiled(function, params, grads, state, hyper, plan, found_inf)
    return run_eagerly(function, params, grads, state, hyper, plan, found_inf)


def _run_compiled(
    function: StepFunction,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    """The same as one graph. Arguments are checked when it is made, and whenever something raises.

    Raises:
        NotCompiled: dynamo left the step as it was written. Nothing was written.
    """
    agree_on_step(plan, grads, found_inf)
    passed = params, grads, state
    zeros = plan.config.missing_grads == "zeros"
    missing: tuple[bool, ...] = ()
    if not zeros and isinstance(grads, Mapping):
        missing = tuple([grads.get(name) is None for name in plan.names])
    graphs = _graphs.get(plan)
    if graphs is None:
        graphs = _graphs.setdefault(plan, Recent(dropped=free))
        finalize(plan, graphs.drop_all).atexit = False
    compiled, graph = graphs.get((function, missing)), None
    kernels_beside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if compiled is None:
        if not graphs:
            warn_of_lost_updates(plan, params, hyper)
            warn_of_unread(plan, hyper)
            if is_new(plan):
                check_step(plan, *passed, hyper, found_inf)
                check_first_use(plan, params)
        if not graphs and plan.device.type == "cuda" and not observers.is_capturing(plan.device):
            check_step(plan, *passed, hyper, found_inf)
            kernels_beside = _compiling_kernels_beside(plan, function)
    try:
        if function is local_update_:
            _check_writable(plan, params, state)
        if compiled is None:
            graph = graphs[function, missing] = graph_of(function, plan, missing)
            compiled = saying_so_if_long(graph)
            if len({sets for _, sets in graphs}) == MANY:
                graphs.warn_of_sets("step" if function is local_update else "step_")
        if plan.sharded:
            check_placements(plan, *passed)
            params, grads, state = map(placements.local_of, passed)
        if zeros:
            grads = zeros_for_none(params, grads)
        if plan.subclasses:
            params, grads, state = map(_plain_of, (params, grads, state))
        if plan.one_storage:
            params = {name: apart(p) for name, p in params.items()}
        with kernels_beside, without_autocast(plan.device):
            return compiled(params, grads, state, hyper, plan, found_inf=found_inf)
    except NotCompiled:
        raise
    except Exception as error:
        if failure := named_failure(error):
            raise failure from error
        try:
            check_step(plan, *passed, hyper, found_inf)  # in plain words, if they are the cause
        except Exception:
            if graph is not None and graphs.pop((function, missing), None) is graph:
                free(graph)  # the set of a call that was refused is not counted
            raise
        check_derivatives(*passed, hyper, in_place=function is local_update_)
        if not plan.subclasses:
            check_plain(*passed)
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise RuntimeError(
                "step: it was compiled for too many forms of its arguments. Keep these the same "
                "from step to step: the strides of the parameters and gradients, requires_grad, "
                "whether gradients are recorded, and what a Config.orthogonalizer of your own "
                "reads (a tensor there may change its values)"
            ) from error
        raise


def _plain_of(tensors: Grads) -> dict[str, Any]:
    return {name: None if x is None else plain(x) for name, x in tensors.items()}


def _check_writable(plan: Plan, params: Tensors, state: Tensors) -> None:
    """Refuses what cannot be written before anything is: a graph would not notice all of it.

    The tensors of the call before are not looked at again: 20 us for 144 matrices (442 tensors; one
    core of a 2-core CPU machine, torch 2.13.0, 2026-11-28).
    """
    tensors = tuple(map(id, (*params.values(), *state.values())))
    if _written.get(plan) != tensors:
        check_writable({"params": params, "state": state})
        _written[plan] = tensors


@contextlib.contextmanager
def _compiling_kernels_beside(plan: Plan, function: StepFunction) -> Iterator[None]:
    """A thread compiles the Triton kernels of a step while dynamo traces it here.

    It takes a step of one parameter of each kind in `beforehand`: the first step then finds its
    kernels. Where matrices have rates of their own it takes two, because kernels for one are
    others. At the end it is done: a capture that the user begins after the first step would fail
    if another thread were at work on the device.
    """
    if plan.config.orthogonalizer is not None:  # the user's function may not expect another thread
        yield
        return
    thread = threading.Thread(
        target=_compile_kernels, args=(plan, function), name="normuon_fn kernels"
    )
    with contextlib.suppress(RuntimeError):  # no thread can be had: the step compiles by itself
        thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:  # it began
            thread.join()


def _compile_kernels(plan: Plan, function: StepFunction) -> None:
    kinds: dict[Any, dict[Any, Any]] = {}
    for p in plan.parameters:
        kind = p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)
        alike, rates = kinds.setdefault(kind, {}), (p.hyper, p.route.lr_mul, p.route.wd_mul)
        if len(alike) < (1 if plan.own_rates is None else 2):
            alike.setdefault(rates, p)
    some = [p for alike in kinds.values() for p in alike.values()]
    try:
        with (
            torch.cuda.device(plan.device),
            torch.cuda.stream(streams.beside(plan.device)),
            beforehand(plan.device),
        ):
            params = {
                p.name: torch.ones(p.spec.shape, dtype=p.spec.dtype, device=plan.device)
                for p in some
            }
            decisions = {p.name: Decision(p.route, p.reason) for p in some}
            hyper, hyper_of = Hyper.of(params, lr=0.0), None
            if plan.hypers:
                hyper, hyper_of = (
                    Hyper.stack([hyper] * len(some)),
                    {p.name: k for k, p in enumerate(some)},
                )
            few = plan_of(params, decisions, plan.config, hyper_of=hyper_of)
            function(params, params, init(params, few), hyper, few)
    except Exception:  # the step itself raises what is wrong with it
        logger.debug("The first step compiles its kernels by itself", exc_info=True)
