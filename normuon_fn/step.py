"""The step. Start reading here: data moves down this file, nothing looks back up.

    read -> momentum -> orthogonalize -> normalize -> guard -> apply -> StepResult

`update` is the step as a pure function, for your own graph; `step` is `update` compiled; `step_` the same in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import guard, ops
from .adamw import Moments, apply_adamw, read_moments
from .checks import check_step, check_tensors
from .compat import compile_whole
from .normalize import normalize
from .orthogonalize import carry, iterate, to_unit_norm
from .plan import Bucket, Group, Plan
from .run import Run
from .types import Grads, Hyper, StepResult, Tensors


def init(plan: Plan, params: Tensors) -> dict[str, Tensor]:
    """All state of all parameters: zeros, by name, on the plan's device.

    Shapes: ``"<name>.momentum"`` as the parameter; ``"<name>.variance"`` as ``param[..., :1]`` (one a row; heads and splits
    their own); ``"<name>.exp_avg"``, ``"<name>.exp_avg_sq"`` as the parameter; ``"guard.step"``, ``"guard.skipped"``,
    ``"guard.consecutive"`` 0-d int32.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: ``params`` are not those of the plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    check_tensors(plan, "params", params, {p.name: p.spec for p in plan.parameters})
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=plan.device) for name, spec in plan.state.items()}


def update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,  # 0-d or [1]; > 0 skips the step, as in torch.amp.GradScaler
) -> StepResult:
    """One NorMuon step, pure: new parameters and state, the old ones untouched. Not compiled: for your own ``torch.compile``.

    A gradient of ``None`` leaves that parameter and its state as they are; which ones are ``None`` is static.

    Raises (while tracing, so at no cost per step):
        TypeError: Python floats in ``hyper``, or something that is not a tensor.
        ValueError: names, shapes, dtypes or devices other than the plan's.
    """
    with torch.no_grad():
        return _advance(params, grads, state, hyper, plan, found_inf, ops.PURE)


def _update_(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    with torch.no_grad():
        return _advance(params, grads, state, hyper, plan, found_inf, ops.IN_PLACE)


def step(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    """`update` as one compiled graph (``torch.compile(fullgraph=True, dynamic=False)``), compiled once for every plan.

    Pass detached parameters: a result fed back then meets the graph it came from.
    """
    return _compiled(update, params, grads, state, hyper, plan, found_inf)


def step_(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    """`step` in place: ``params`` and ``state`` are written, nothing else is. The result holds the same tensors."""
    return _compiled(_update_, params, grads, state, hyper, plan, found_inf)


_cache: WeakKeyDictionary[Plan, dict[Callable[..., StepResult], Callable[..., StepResult]]] = WeakKeyDictionary()


def _compiled(
    function: Callable[..., StepResult],
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    if torch.compiler.is_compiling():  # inside the caller's own graph
        return function(params, grads, state, hyper, plan, found_inf=found_inf)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    own = _cache.setdefault(plan, {})
    if function not in own:
        own[function] = compile_whole(function)
    try:
        return own[function](params, grads, state, hyper, plan, found_inf=found_inf)
    except Exception:
        check_step(plan, params, grads, state, hyper, found_inf)  # tracing stumbled over it: say it in plain words
        raise


class _Front(NamedTuple):
    """One group after the momentum: what is to be orthogonalized."""

    group: Group  # its blocks that have a gradient
    grads: list[Tensor]
    momentums: list[Tensor]
    update: Tensor  # [n, rows, cols] float32 (float64 for float64 parameters)
    largest: Tensor  # [n], the largest entry of every gradient: not finite if any entry is not


class _Back(NamedTuple):
    """One group before the guard's decision: the parameters change by ``-lr * factor * update``."""

    front: _Front
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    variance: Tensor | None  # the new one
    bad: Tensor  # [2, n] bool: non-finite update, non-finite gradient


def _advance(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, found_inf: Tensor | None, writes: ops.Writes
) -> StepResult:
    check_step(plan, params, grads, state, hyper, found_inf)
    run = Run(params, grads, state, hyper, plan, found_inf, writes, {})

    backs = []
    for bucket in plan.buckets:
        fronts = [_momentum(run, group) for group in bucket.with_grad(grads)]
        updates = _orthogonalize(run, bucket, fronts)
        backs.append([_normalize(run, bucket, front, update) for front, update in zip(fronts, updates, strict=True)])
    moments = [read_moments(run, bucket) for bucket in plan.adamw]

    flags = guard.agree(guard.flags(_by_matrix(run, backs, moments), plan.matrix_of), plan.guard_group)
    decisions, skipped = guard.decide(plan.config, flags, plan.bucket_has, found_inf)

    for parts, decision in zip(backs, decisions, strict=False):
        for back in parts:
            _apply(run, back, decision)
    for adamw, lists, decision in zip(plan.adamw, moments, decisions[len(backs) :], strict=True):
        apply_adamw(run, adamw, lists, decision)
    _count(run, skipped)
    return run.result(flags, skipped)


def _momentum(run: Run, group: Group) -> _Front:
    """The new momentum is written here, unless a non-finite gradient must leave the old one: then in `_apply`."""
    config = run.plan.config
    grads, momentums = run.read(group, ".grad"), run.read(group, ".momentum")
    arguments = (run.hyper.momentum, config.momentum_form, config.nesterov)
    if run.holds_momentum:
        update, largest = ops.lookahead(grads, momentums, *arguments)
    else:
        new, update, largest = run.writes.advance(momentums, grads, *arguments)
        run.put(group, ".momentum", new)
    return _Front(group, grads, momentums, update, largest)


def _orthogonalize(run: Run, bucket: Bucket, fronts: list[_Front]) -> list[Tensor]:
    """The groups' updates, tall ones transposed, as one stack [n, rows <= cols]; cut and transposed back."""
    if not fronts:
        return []
    stacks = [front.update.mT if front.group.tall else front.update for front in fronts]
    own = run.plan.config.orthogonalizer
    if own is None:
        stacks = [to_unit_norm(stack, bucket.coefficients, bucket.form.dtype) for stack in stacks]
        whole = iterate(_cat(stacks), bucket.coefficients, bucket.form)
    else:
        whole = own(_cat(stacks))
        if whole.shape[1:] != (bucket.rows, bucket.cols):
            raise ValueError(f"Config.orthogonalizer: expected [n, {bucket.rows}, {bucket.cols}], got {tuple(whole.shape)}")
    parts = whole.split([front.group.count for front in fronts])
    return [part.mT if front.group.tall else part for front, part in zip(fronts, parts, strict=True)]


def _normalize(run: Run, bucket: Bucket, front: _Front, update: Tensor) -> _Back:
    config = run.plan.config
    variance = ops.stack(run.read(front.group, ".variance")) if config.normalize else None
    carried = 1.0 if config.orthogonalizer else carry(bucket.form.dtype)
    factor, variance, finite = normalize(update, variance, run.hyper.beta2, config, carried)
    return _Back(front, update, factor, variance, torch.stack([~finite, ~front.largest.isfinite()]))


def _by_matrix(run: Run, backs: list[list[_Back]], moments: list[Moments]) -> Tensor:
    """[2, n_matrices + 1] bool in the plan's order; False where there is no gradient, and in the last column."""
    columns = []
    for bucket, parts in zip(run.plan.buckets, backs, strict=True):
        left = list(parts)
        for group in bucket.groups:
            found = left.pop(0).bad if any(run.grads[block.name] is not None for block in group.blocks) else None
            columns.append(_spread(run, found, [(block.name, block.count) for block in group.blocks]))
    for adamw, lists in zip(run.plan.adamw, moments, strict=True):
        columns.append(_spread(run, lists.bad, [(name, 1) for name in adamw.names]))
    return torch.cat([*columns, run.no_flags(1)], 1)


def _spread(run: Run, bad: Tensor | None, owners: list[tuple[str, int]]) -> Tensor:
    if bad is not None and all(run.grads[name] is not None for name, _ in owners):
        return bad
    pieces, at = [], 0
    for name, count in owners:
        if bad is None or run.grads[name] is None:
            pieces.append(run.no_flags(count))
        else:
            pieces.append(bad[:, at : at + count])
            at += count
    return torch.cat(pieces, 1)


def _apply(run: Run, back: _Back, decision: guard.Decision) -> None:
    config, front, hyper = run.plan.config, back.front, run.hyper
    group = front.group
    lr, decay = run.rates(group, hyper.lr, hyper.weight_decay, front.update.dtype, config.weight_decay_lr_power)
    cautious = config.weight_decay_form == "cautious"
    new = run.writes.apply(run.read(group, ""), back.update, back.factor * lr, decay, decision.skip, cautious)
    run.put(group, "", new)
    if run.holds_momentum:
        new = run.writes.hold(front.momentums, front.grads, hyper.momentum, decision.hold, config.momentum_form)
        run.put(group, ".momentum", new)
    if back.variance is not None:
        run.put(group, ".variance", run.writes.unstack(run.read(group, ".variance"), back.variance, decision.skip))


def _count(run: Run, skipped: Tensor) -> None:
    """The guard's counters: steps so far, skipped ones, skipped ones in a row."""
    step, total, in_a_row = (run.state[f"guard.{name}"] for name in ("step", "skipped", "consecutive"))
    counted = {
        "guard.step": step + 1,
        "guard.skipped": total + skipped.to(total.dtype),
        "guard.consecutive": torch.where(skipped, in_a_row + 1, 0),
    }
    for name, value in counted.items():
        run.new[name] = [(None, value)]
        if run.writes is ops.IN_PLACE:
            run.state[name].copy_(value)


def _cat(stacks: list[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)
