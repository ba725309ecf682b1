"""`step` and `step_`: one compiled graph per plan and per set of missing gradients.

arguments -> the graph for them, compiled at its first use -> local tensors in, results out

A step that cannot be compiled, or that somebody observes, runs operation by operation: eager.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from ..compat import apart, observers, plain, without_autocast
from ..compat.graphs import import_inductor
from ..distributed import placements
from ..distributed.failures import named as named_failure
from ..planning.checks import check_order, check_placements, check_plain, check_step
from ..planning.common import agree_on_step
from ..planning.hyperball import check_first_use, is_new
from ..planning.hypergradients import asks_for_rates, check_derivatives, with_derivative
from ..planning.memory import check_writable
from ..planning.plan import Plan, check_plan
from ..step import local_update, local_update_, to_dtensors, update, zeros_for_none
from ..types import Grads, Hyper, StepResult, Tensors, result_of
from .eager import NotCompiled, StepFunction, must_be_eager, run_eagerly, saying_what_was_written
from .kernels_beside import compiling_kernels_beside
from .long_compilation import saying_so_if_long
from .lost_updates import warn_of_lost_updates
from .outside import free, graph_of
from .recent import MANY, Recent
from .unread import warn_of_frozen, warn_of_unread

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
    graphs, key = _graphs_of(plan), (function, _missing(plan, grads))
    compiled, made = graphs.get(key), None
    kernels_beside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not graphs:
        kernels_beside = _before_the_first(function, *passed, hyper, plan, found_inf)
    try:
        if function is local_update_:
            _check_writable(plan, params, state)
        if compiled is None:
            made = graphs[key] = graph_of(function, plan, key[1])
            compiled = saying_so_if_long(made)
            check_order(params, grads)  # dynamo does not tell a Parameter from a tensor
        arguments = _plain_and_local(plan, *passed)
        with kernels_beside, without_autocast(plan.device):
            result = compiled(*arguments, hyper, plan, found_inf=found_inf)
    except NotCompiled:
        _count_sets(function, graphs, made)
        raise
    except Exception as error:
        if failure := named_failure(error):
            raise failure from error
        try:
            check_step(plan, *passed, hyper, found_inf)  # in plain words, if they are the cause
            _say_plainly(error, function, *passed, hyper, plan)
        except Exception:
            if made is not None and graphs.pop(key, None) is made:
                free(made)  # the set of a call that was refused is not counted
            raise
        raise
    _count_sets(function, graphs, made)
    return result


def _count_sets(
    function: StepFunction, graphs: Recent[GraphKey, StepFunction], made: StepFunction | None
) -> None:
    """Says so where a call that was not refused has made the graph of one set too many."""
    if made is not None and len({missing for _, missing in graphs}) == MANY:
        graphs.warn_of_sets("step" if function is local_update else "step_")


def _graphs_of(plan: Plan) -> Recent[GraphKey, StepFunction]:
    """The graphs of a plan, which are freed with it."""
    graphs = _graphs.get(plan)
    if graphs is None:
        graphs = _graphs.setdefault(plan, Recent(dropped=free))
        finalize(plan, graphs.drop_all).atexit = False
    return graphs


def _missing(plan: Plan, grads: Grads) -> tuple[bool, ...]:
    """By parameter, whether its gradient is None; nothing where that makes no difference."""
    if plan.config.missing_grads == "zeros" or not isinstance(grads, Mapping):
        return ()
    return tuple([grads.get(name) is None for name in plan.names])


def _before_the_first(
    function: StepFunction,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> contextlib.AbstractContextManager[None]:
    """What is looked at once per plan; and what is to be done beside the first step."""
    import_inductor()
    warn_of_lost_updates(plan, params, hyper)
    warn_of_frozen(plan, grads)
    warn_of_unread(plan, hyper)
    beside = plan.device.type == "cuda" and not observers.is_capturing(plan.device)
    if beside or is_new(plan):
        check_step(plan, params, grads, state, hyper, found_inf)
    if is_new(plan):
        check_first_use(plan, params)
    return compiling_kernels_beside(plan, function) if beside else contextlib.nullcontext()


def _plain_and_local(
    plan: Plan, params: Tensors, grads: Grads, state: Tensors
) -> tuple[Tensors, Grads, Tensors]:
    """The arguments as a graph takes them."""
    if plan.sharded:
        check_placements(plan, params, grads, state)
        params, grads, state = map(placements.local_of, (params, grads, state))
    if plan.config.missing_grads == "zeros":
        grads = zeros_for_none(params, grads)
    if plan.subclasses:
        params, grads, state = map(_plain_of, (params, grads, state))
    if plan.one_storage:
        params = {name: apart(p) for name, p in params.items()}
    return params, grads, state


def _say_plainly(
    error: Exception,
    function: StepFunction,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
) -> None:
    """Raises what says in plain words why a graph raised ``error``, where that is known."""
    check_derivatives(params, grads, state, hyper, in_place=function is local_update_)
    if not plan.subclasses:
        check_plain(params, grads, state)
    if type(error).__name__ == "FailOnRecompileLimitHit":
        raise RuntimeError(
            "step: it was compiled for too many forms of its arguments. Keep these the same from "
            "step to step: the strides of the parameters and gradients, requires_grad, whether "
            "gradients are recorded, and what a Config.orthogonalizer of your own reads (a tensor "
            "there may change its values)"
        ) from error


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
