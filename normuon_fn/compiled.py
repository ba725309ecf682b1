"""How `step` and `step_` run: one compiled graph for every plan and every set of missing gradients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch

from . import mesh, streams
from .checks import check_lies, check_step
from .compat import apart, compile_whole, without_autocast
from .plan import Plan
from .planner import make_plan
from .types import Grads, Hyper, StepResult, Tensors

Form = tuple[Callable[..., StepResult], tuple[bool, ...]]  # what is compiled: a function, and which gradients it is without
_cache: WeakKeyDictionary[Plan, dict[Form, Callable[..., StepResult]]] = WeakKeyDictionary()


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
    without = () if zeros or not isinstance(grads, Mapping) else tuple([grad is None for grad in grads.values()])
    form = function, without
    if form not in own:
        if not own and plan.device.type == "cuda" and not streams.is_capturing(plan.device):
            check_step(plan, params, grads, state, hyper, found_inf)
            threading.Thread(target=_compile_kernels, args=(plan, function), name="normuon_fn kernels", daemon=True).start()
        own[form] = compile_whole(function, overlap=any(bucket.exchange for bucket in plan.buckets))
    given = params, grads, state
    try:
        if plan.sharded:
            check_lies(plan, *given)
            params, grads, state = map(mesh.local_of, given)
        if zeros:
            grads = zeros_for_none(params, grads)
        if plan.one_storage:
            params = {name: apart(p) for name, p in params.items()}
        with without_autocast(plan.device):
            return own[form](params, grads, state, hyper, plan, found_inf=found_inf)
    except Exception as error:
        check_step(plan, *given, hyper, found_inf)  # tracing stumbled over it: say it in plain words
        if type(error).__name__ == "FailOnRecompileLimitHit":
            raise RuntimeError(
                "step: compiled for many forms of its arguments already. Keep them alike from step to step: the order of the "
                "keys, the strides of the gradients, requires_grad, and whether gradients are recorded"
            ) from error
        raise


def zeros_for_none(params: Tensors, grads: Grads) -> Grads:
    """``missing_grads="zeros"``."""
    return {name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in grads.items()}


def _compile_kernels(plan: Plan, function: Callable[..., StepResult]) -> None:
    """A step of one parameter of each kind, on zeros, beside the tracing: Triton then has what the first step needs."""
    from .step import init  # which imports this file

    if plan.config.orthogonalizer is not None:  # the caller's, who does not expect it in another thread
        return
    kinds = {(p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)): p for p in plan.parameters}
    with (
        contextlib.suppress(Exception),  # whatever is wrong shows in the step itself
        torch.cuda.device(plan.device),
        torch.cuda.stream(streams.beside(plan.device)),
    ):
        params = {p.name: torch.zeros(p.spec.shape, dtype=p.spec.dtype, device=plan.device) for p in kinds.values()}
        few = make_plan(params, plan.config, routes={p.name: p.route for p in kinds.values()})
        function(params, params, init(few, params), Hyper.of(params, lr=0.0), few)
