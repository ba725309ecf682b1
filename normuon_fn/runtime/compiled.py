"""`step` and `step_`: one compiled graph per plan and per set of missing gradients.

arguments -> the graph for them, compiled at its first use -> local tensors in, results out

A step that cannot be compiled, or that somebody observes, runs operation by operation: eager.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compat import apart, compile_whole, without_autocast
from ..distributed import placements
from ..hypergradients import asks_for_rates, check_derivatives, with_derivative
from ..planning.checks import check_placements, check_step
from ..planning.make_plan import plan_of
from ..planning.plan import Plan
from ..routing.routes import Decision
from ..step import init, local_update, local_update_, to_dtensors, update, zeros_for_none
from ..types import Grads, Hyper, StepResult, Tensors
from . import streams
from .eager import NotCompiled, StepFunction, must_be_eager, run_eagerly, saying_what_was_written

GraphKey = tuple[StepFunction, tuple[bool, ...]]  # a function, and which gradients are None
_graphs: WeakKeyDictionary[Plan, dict[GraphKey, StepFunction]] = WeakKeyDictionary()


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
    ``Config(missing_grads="zeros")`` there is only one.
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
    else:
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
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
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
    passed = params, grads, state
    zeros = plan.config.missing_grads == "zeros"
    missing: tuple[bool, ...] = ()
    if not zeros and isinstance(grads, Mapping):
        missing = tuple([grad is None for grad in grads.values()])
    graphs = _graphs.setdefault(plan, {})
    compiled = graphs.get((function, missing))
    if compiled is None:
        if not graphs and plan.device.type == "cuda" and not streams.is_capturing(plan.device):
            check_step(plan, *passed, hyper, found_inf)
            _compile_kernels_beside(plan, function)
        compiled = compile_whole(_TRACED[function], overlap=plan.sends)
        graphs[function, missing] = compiled
    try:
        if plan.sharded:
            check_placements(plan, *passed)
            params, grads, state = map(placements.local_of, passed)
        if zeros:
            grads = zeros_for_none(params, grads)
        if plan.one_storage:
            params = {name: apart(p) for name, p in params.items()}
        with without_autocast(plan.device), saying_what_was_written(function, plan):
            return compiled(params, grads, state, hyper, plan, found_inf=found_inf)
    except NotCompiled:
        raise
    except Exception as error:
        check_step(plan, *passed, hyper, found_inf)  # raises in plain words if they are the cause
        check_derivatives(*passed, hyper, in_place=function is local_update_)
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise RuntimeError(
                "step: it was compiled for too many forms of its arguments. Keep these the same "
                "from step to step: the order of the keys, the strides of the gradients, "
                "requires_grad, whether gradients are recorded, and what a Config.orthogonalizer "
                "of your own reads (a tensor there may change its values)"
            ) from error
        raise


def _traced_update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """`local_update` where it is traced. Where dynamo does not trace it, it must not run either:
    dynamo would raise afterwards, "found no compiled frames".
    """
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiled
    return local_update(params, grads, state, hyper, plan, found_inf=found_inf)


def _traced_update_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """The same of `local_update_`."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiled
    return local_update_(params, grads, state, hyper, plan, found_inf=found_inf)


_TRACED = {local_update: _traced_update, local_update_: _traced_update_}


def _compile_kernels_beside(plan: Plan, function: StepFunction) -> None:
    """Starts a thread that compiles the Triton kernels of a step while dynamo traces it.

    It runs a step of one parameter of each kind, on zeros: the first step then finds its kernels.
    """
    if plan.config.orthogonalizer is not None:  # the user's function may not expect another thread
        return
    run = threading.Thread(
        target=_step_on_zeros, args=(plan, function), name="normuon_fn kernels", daemon=True
    )
    run.start()


def _step_on_zeros(plan: Plan, function: StepFunction) -> None:
    kinds = {
        (p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)): p
        for p in plan.parameters
    }
    with (
        contextlib.suppress(Exception),  # the step itself will raise it
        torch.cuda.device(plan.device),
        torch.cuda.stream(streams.beside(plan.device)),
    ):
        params = {
            p.name: torch.zeros(p.spec.shape, dtype=p.spec.dtype, device=plan.device)
            for p in kinds.values()
        }
        decisions = {p.name: Decision(p.route, p.reason) for p in kinds.values()}
        few = plan_of(params, decisions, plan.config)
        function(params, params, init(params, few), Hyper.of(params, lr=0.0), few)
