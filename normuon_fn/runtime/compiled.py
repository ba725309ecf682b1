"""How `step` and `step_` run: one compiled graph for every plan and every set of missing gradients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compat import apart, compile_whole, without_autocast
from ..distributed import placements as mesh
from ..planning.checks import check_placements, check_step
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..step import init, local_update, local_update_, to_dtensors, update, zeros_for_none
from ..types import Grads, Hyper, StepResult, Tensors
from . import streams

Form = tuple[
    Callable[..., StepResult], tuple[bool, ...]
]  # what is compiled: a function, and which gradients it is without
_cache: WeakKeyDictionary[Plan, dict[Form, Callable[..., StepResult]]] = WeakKeyDictionary()


def step(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """`update` as one compiled graph (``torch.compile(fullgraph=True, dynamic=False)``), compiled once for every plan.

    Pass detached parameters: a result fed back then meets the graph it came from. Each set of gradients that are None is
    compiled once; with ``Config(missing_grads="zeros")`` there is only one.
    """
    if torch.compiler.is_compiling():  # inside the caller's own graph
        return update(params, grads, state, hyper, plan, found_inf=found_inf)
    return to_dtensors(
        run_compiled(local_update, params, grads, state, hyper, plan, found_inf), plan
    )


def step_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """`step` in place: ``params`` and ``state`` are written, nothing else is. The result holds the same tensors.

    Inside a graph of your own on torch 2.11, parameters must not be parts of one storage: see compat.apart. `update` is safe.
    """
    if torch.compiler.is_compiling():
        result = local_update_(params, grads, state, hyper, plan, found_inf=found_inf)
    else:
        result = run_compiled(local_update_, params, grads, state, hyper, plan, found_inf)
        if plan.one_storage:
            torch.autograd.graph.increment_version([mesh.local(p) for p in params.values()])
    return result._replace(params=dict(params), state=dict(state))


def run_compiled(
    function: Callable[..., StepResult],
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: torch.Tensor | None,
) -> StepResult:
    """``function`` of the same arguments, compiled at its first call. What is wrong with them is said in plain words.

    Parameters that are parts of one storage come with storages of their own: who writes to them counts their versions up.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    own = _cache.setdefault(plan, {})
    zeros = plan.config.missing_grads == "zeros"
    without = (
        ()
        if zeros or not isinstance(grads, Mapping)
        else tuple([grad is None for grad in grads.values()])
    )
    form = function, without
    if form not in own:
        if not own and plan.device.type == "cuda" and not streams.is_capturing(plan.device):
            check_step(plan, params, grads, state, hyper, found_inf)
            threading.Thread(
                target=_compile_kernels,
                args=(plan, function),
                name="normuon_fn kernels",
                daemon=True,
            ).start()
        own[form] = compile_whole(function, overlap=plan.sends)
    given = params, grads, state
    try:
        if plan.sharded:
            check_placements(plan, *given)
            params, grads, state = map(mesh.local_of, given)
        if zeros:
            grads = zeros_for_none(params, grads)
        if plan.one_storage:
            params = {name: apart(p) for name, p in params.items()}
        with without_autocast(plan.device):
            return own[form](params, grads, state, hyper, plan, found_inf=found_inf)
    except Exception as error:
        check_step(
            plan, *given, hyper, found_inf
        )  # tracing stumbled over it: say it in plain words
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise RuntimeError(
                "step: compiled for many forms of its arguments already. Keep them alike from step to step: the order of the "
                "keys, the strides of the gradients, requires_grad, and whether gradients are recorded"
            ) from error
        raise


def _compile_kernels(plan: Plan, function: Callable[..., StepResult]) -> None:
    """A step of one parameter of each kind, on zeros, beside the tracing: Triton then has what the first step needs."""
    if (
        plan.config.orthogonalizer is not None
    ):  # the caller's, who does not expect it in another thread
        return
    kinds = {
        (p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)): p
        for p in plan.parameters
    }
    with (
        contextlib.suppress(Exception),  # whatever is wrong shows in the step itself
        torch.cuda.device(plan.device),
        torch.cuda.stream(streams.beside(plan.device)),
    ):
        params = {
            p.name: torch.zeros(p.spec.shape, dtype=p.spec.dtype, device=plan.device)
            for p in kinds.values()
        }
        few = make_plan(params, plan.config, routes={p.name: p.route for p in kinds.values()})
        function(params, params, init(params, few), Hyper.of(params, lr=0.0), few)
