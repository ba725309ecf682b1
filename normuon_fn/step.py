"""The step. Start reading here: data moves down this file, nothing looks back up.

    read -> momentum -> orthogonalize -> normalize -> guard -> apply -> StepResult

`update` is the step as a pure function, for your own graph. `normuon_fn.step` is `update` compiled
and `normuon_fn.step_` the same in place: see runtime/compiled.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .algorithm.guard import Agreement
from .algorithm.streamed import Conveyor
from .algorithm.work import Work
from .compat import outside_inference_mode, without_autocast
from .compat.graphs import is_functionalized, is_traced
from .distributed.placements import check_alike, local, local_of, to_dtensor
from .planning.before_ranks import check_ranks
from .planning.checks import check_step, check_tensors
from .planning.common import agree_on_step
from .planning.hyperball import check_first_use, check_sizes
from .planning.hypergradients import asks_for_rates, check_derivatives, with_derivative
from .planning.memory import check_writable
from .planning.plan import Plan, check_plan
from .planning.tensors import CallersDicts, Dicts, StepTensors
from .types import Grads, Hyper, StepResult, Tensors, result_of


@outside_inference_mode
def init(params: Tensors | Plan, plan: Plan | Tensors) -> dict[str, Tensor]:
    """All state of all parameters, by name, on the plan's device.

    With ``Config(state_device="cpu")`` momentums of matrices are in host memory, pinned for a GPU.
    Everything begins as zeros, except a float32 master, which begins as its parameter.

    Shapes: ``"<name>.momentum"`` as the parameter; ``"<name>.variance"`` as ``param[..., :1]`` (one
    number per row; heads and splits have their own), with ``Config(reduction="entries")`` as the
    parameter; ``"<name>.exp_avg"``, ``"<name>.exp_avg_sq"`` as the parameter; with a momentum of
    int8 also ``"<name>.momentum_scale"`` (uint8), as the parameter with one column for 64; with
    `Config.master` also ``"<name>.mantissa"`` (int16) or ``"<name>.master"`` (float32), as the
    parameter; ``"guard.step"``, ``"guard.skipped"``, ``"guard.consecutive"`` 0-d int32. With
    ``Config(replicas="share")`` the state of what other ranks own is not there.

    Ranks that share work compare their plans here: a collective. ``init(plan, params)``, the order
    of version 0.1, is accepted too.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: ``params`` are not those of the plan, another rank has another plan, or a matrix
            that is to keep its norm is zero.
    """
    if isinstance(params, Plan):
        params, plan = plan, params
    check_plan(plan)
    plan, params = cast(Plan, plan), cast(Tensors, params)
    check_tensors(plan, "params", params, {p.name: p.spec for p in plan.parameters})
    for group in plan.shared_by:
        check_alike(plan.summary(group), group)
    check_sizes(plan, params)
    state = {}
    for key, spec in plan.state.items():
        tensor = spec.zeros(plan.device)
        if spec.starts_as_parameter:
            tensor.copy_(local(params[key.rpartition(".")[0]]).detach())
        state[key] = to_dtensor(tensor, spec.sharded)
    return state


def update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,  # 0-d or [1]; > 0 skips the step, as in torch.amp.GradScaler
) -> StepResult:
    """One NorMuon step, pure: new parameters and new state; for your own ``torch.compile``.

    A gradient of ``None`` leaves that parameter and its state as they are: they come back as the
    same tensors (see `StepResult`). Which ones are ``None`` is static.

    The parameters that come back have a derivative by ``hyper.lr``, ``weight_decay``, ``adamw_lr``
    and ``adamw_weight_decay`` where torch is to differentiate by them (``requires_grad``, or a
    transform of torch.func), which costs a second step: see planning/hypergradients.py. There is
    none by anything else.

    ``found_inf`` of any rank skips the step of all ranks that decide together. Ranks that share
    parameters must lack the same gradients, and give ``found_inf`` all or none: hosts compare it at
    a plan's first step and when it changes, but nobody does in a graph of your own. At a plan's
    first step they also compare, waiting for the device, the gradients of copies that are plain
    tensors, and warn where nobody has averaged them.

    With ``weight_decay_form="hyperball"`` the first step of a plan that `init` and `load` have not
    seen waits for the device, once, to refuse a matrix of zeros. What a matrix becomes later, or is
    in a graph of your own or a capture, cannot be told without waiting: zeros stay zeros there.

    Raises (while tracing, so at no cost per step):
        TypeError: Python floats in ``hyper``, or something that is not a tensor.
        ValueError: names, shapes, dtypes or devices other than the plan's; ranks that differ in
            what they lack; a matrix of zeros that is to keep its norm; or torch is to differentiate
            by something else.
    """
    if asks_for_rates(hyper):
        return with_derivative(update, params, grads, state, hyper, plan, found_inf)
    return to_dtensors(local_update(params, grads, state, hyper, plan, found_inf=found_inf), plan)


def local_update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """`update`, whose result are the local parts of DTensors."""
    return _checked_step(params, grads, state, hyper, plan, found_inf, in_place=False)


def local_update_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """The same in place: ``params`` and ``state`` are written, nothing else is."""
    return _checked_step(params, grads, state, hyper, plan, found_inf, in_place=True)


def _checked_step(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
    *,
    in_place: bool,
) -> StepResult:
    if isinstance(plan, Plan):
        if is_traced():
            check_ranks(plan)
        else:
            agree_on_step(plan, grads, found_inf)
    check_step(plan, params, grads, state, hyper, found_inf)
    if not is_traced():
        check_first_use(plan, params)
    if in_place and not is_traced():
        check_writable({"params": params, "state": state})
    if not is_functionalized():  # where gradients are the tracer's own
        check_derivatives(params, grads, state, hyper, in_place=in_place)
    with torch.no_grad(), without_autocast(plan.device):
        params, grads, state = local_of(params), local_of(grads), local_of(state)
        if plan.config.missing_grads == "zeros":
            grads = zeros_for_none(params, grads)
        dicts = CallersDicts(params, grads, state, in_place=in_place)
        flags, skipped, metrics = step_of(dicts, hyper, plan, found_inf)
        return result_of(*dicts.after(), flags, skipped, metrics)


def _pass_on(works: Sequence[Work], times: int) -> None:
    """Lets messages that take several hops go so many further."""
    for _ in range(times):
        for work in works:
            work.pass_on()


def step_of(
    dicts: Dicts, hyper: Hyper, plan: Plan, found_inf: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(flags, skipped, metrics)`` of a step whose tensors are read from ``dicts``, and written.

    Every bucket goes through the same stages; some leave some out. See algorithm/work.py.
    """
    agreement, streaming = Agreement(plan.guard, found_inf), plan.streaming
    conveyor = streaming and Conveyor(streaming.size, streaming.slots, plan.device)
    tensors = StepTensors(
        dicts, hyper, hypers=plan.hypers, own=plan.own_rates, config=plan.config,
        stages=plan.stages, agreement=agreement, conveyor=conveyor,
    )  # fmt: skip
    works = [bucket.work(tensors.of_bucket(k)) for k, bucket in enumerate(plan.all_buckets)]
    agreement.before(works)  # guard="full": are all gradients finite?
    for work in works:
        work.advance()  # momentum; what other ranks need of it sets out
    _pass_on(works, plan.hops)
    for k, work in enumerate(works):
        work.orthogonalize()  # and normalize, while messages travel
        _pass_on(works[:k], min(1, plan.hops))
    _pass_on(works, plan.hops)
    for work in works:
        work.relay()
    for work in works:
        work.receive()
    agreement.after(works)  # are all updates finite? The guard's one collective: here, or above
    for work in works:
        work.apply()  # weight decay and update, or every bit as it was; without a guard done above
    if conveyor is not None:
        conveyor.end()  # momentums are in host memory again
    assert agreement.flags is not None
    dicts.count(_counted(dicts.state, agreement.skipped))
    metrics = None if plan.metrics is None else plan.metrics.of(works)
    return agreement.flags, agreement.skipped, metrics


def _counted(state: Tensors, skipped: Tensor) -> Tensors:
    """The guard's counters: steps so far, skipped ones, skipped ones in a row."""
    step, total, in_a_row = (state[f"guard.{k}"] for k in ("step", "skipped", "consecutive"))
    return {
        "guard.step": step + 1,
        "guard.skipped": total + skipped.to(total.dtype),
        "guard.consecutive": torch.where(skipped, in_a_row + 1, 0),
    }


def zeros_for_none(params: Tensors, grads: Grads) -> Grads:
    """``missing_grads="zeros"``: a gradient of ``None`` counts as zeros."""
    return {
        name: torch.zeros_like(params[name]) if grad is None else grad
        for name, grad in grads.items()
    }


def to_dtensors(result: StepResult, plan: Plan) -> StepResult:
    """The same result with DTensors where the plan has them."""
    if not plan.sharded:
        return result
    specs = {p.name: p.spec for p in plan.parameters}
    params = {name: to_dtensor(x, specs[name].sharded) for name, x in result.params.items()}
    state = {name: to_dtensor(x, plan.state[name].sharded) for name, x in result.state.items()}
    # Made anew, because torch 2.11 cannot trace `_replace` of a result that leaves the graph.
    return result_of(params, state, result.flags, result.skipped, result.metrics)
