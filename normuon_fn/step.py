"""The step. Start reading here: data moves down this file, nothing looks back up.

    read -> momentum -> orthogonalize -> normalize -> guard -> apply -> StepResult

`update` is the step as a pure function, for your own graph; `step` is `update` compiled; `step_` the same in place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import guard, ops
from .adamw import Moments, apply_adamw, read_moments
from .checks import check_step, check_tensors
from .compat import compile_whole
from .layout import Block
from .normalize import normalize
from .ops.reference import Measures
from .orthogonalize import carry, iterate, to_norm
from .plan import Bucket, Group, Plan, make_plan
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
        if not own and plan.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            check_step(plan, params, grads, state, hyper, found_inf)
            threading.Thread(target=_compile_kernels, args=(plan, function), daemon=True).start()
        own[function] = compile_whole(function)
    try:
        return own[function](params, grads, state, hyper, plan, found_inf=found_inf)
    except Exception:
        check_step(plan, params, grads, state, hyper, found_inf)  # tracing stumbled over it: say it in plain words
        raise


def _compile_kernels(plan: Plan, function: Callable[..., StepResult]) -> None:
    """A step of one parameter of each kind, on zeros, beside the tracing: Triton then has what the first step needs."""
    if plan.config.orthogonalizer is not None:  # the caller's, who does not expect it in another thread
        return
    kinds = {(p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)): p for p in plan.parameters}
    with (
        contextlib.suppress(Exception),  # whatever is wrong shows in the step itself
        torch.cuda.device(plan.device),
        torch.cuda.stream(torch.cuda.Stream(plan.device)),
    ):
        params = {p.name: torch.zeros(p.spec.shape, dtype=p.spec.dtype, device=plan.device) for p in kinds.values()}
        few = make_plan(params, plan.config, routes={p.name: p.route for p in kinds.values()})
        function(params, params, init(few, params), Hyper.of(params, lr=0.0), few)


class _Front(NamedTuple):
    """One bucket after the momentum: what is to be orthogonalized, and what it takes to bring it to norm 1."""

    groups: list[Group]  # those of their blocks that have a gradient
    blocks: list[Block]  # of all groups, in order
    sizes: list[int]  # how many blocks each group has
    grads: list[Tensor]
    momentums: list[Tensor]  # the new ones; with `Run.holds_late` still the old
    measures: Measures  # see ops/advance.py
    stacks: list[Tensor] | None = None  # the momentums as stacks, where `advance` has them anyway


class _Back(NamedTuple):
    """One group before the guard's decision: the parameters change by ``-lr * factor * update``."""

    group: Group
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    variances: tuple[Tensor, Tensor] | None  # the old one and the new
    finite: Tensor  # [n] bool


def _advance(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, found_inf: Tensor | None, writes: ops.Writes
) -> StepResult:
    check_step(plan, params, grads, state, hyper, found_inf)
    run = Run(params, grads, state, hyper, plan, found_inf, writes, {})

    moments = [read_moments(run, bucket) for bucket in plan.adamw]
    bad_grads = _bad_gradients(run, moments) if plan.config.guard == "full" and not run.holds_late else None
    holds = _holds(run, bad_grads)
    fronts, backs = [], []
    for bucket, hold in zip(plan.buckets, holds, strict=False):
        front = _momentum(run, bucket, hold)
        updates = _orthogonalize(run, bucket, front) if front else []
        fronts.append(front)
        backs.append([_normalize(run, bucket, *pair) for pair in zip(front.groups if front else [], updates, strict=True)])

    known = [None] * len(fronts) if bad_grads is None else bad_grads[: len(fronts)]
    bad = [_bad(front, parts, of) if front else None for front, parts, of in zip(fronts, backs, known, strict=True)]
    bad += [lists.bad if lists.names else None for lists in moments]
    flags = guard.agree(guard.flags(_by_matrix(run, bad, 2), plan.matrix_of), plan.guard_group)
    skips, skipped = guard.decide(plan.config, flags, plan.bucket_has, found_inf)

    if run.holds_late:
        for front, hold in zip(fronts, guard.holds(plan.config, flags[1] > 0, plan.bucket_has, found_inf), strict=False):
            if front:
                _momentum_late(run, front, hold)
    for parts, skip in zip(backs, skips, strict=False):
        for back in parts:
            _apply(run, back, skip)
    for adamw, lists, skip in zip(plan.adamw, moments, skips[len(backs) :], strict=True):
        apply_adamw(run, adamw, lists, skip)
    _count(run, skipped)
    return run.result(flags, skipped)


def _bad_gradients(run: Run, moments: list[Moments]) -> list[Tensor | None]:
    """[1, n] bool for each bucket, AdamW's last: ``guard="full"`` reads all gradients once before anything is written."""
    bad: list[Tensor | None] = []
    for bucket in run.plan.buckets:
        groups = bucket.with_grad(run.grads)
        grads = [run.read(group.blocks, ".grad") for group in groups]
        found = ops.largest([grad for part in grads for grad in part], [*map(len, grads)]) if groups else None
        bad.append(None if found is None else ~found.isfinite().unsqueeze(0))
    return bad + [lists.bad[1:] if lists.names else None for lists in moments]


def _holds(run: Run, bad_grads: list[Tensor | None] | None) -> list[guard.Decision]:
    """Whether each bucket's momentum keeps its bits, before it is written; not known yet with `Run.holds_late`."""
    plan = run.plan
    if run.holds_late:
        return [None] * len(plan.buckets)
    bad = None if bad_grads is None else guard.flags(_by_matrix(run, bad_grads, 1), plan.matrix_of)[0] > 0
    return guard.holds(plan.config, bad, plan.bucket_has, run.found_inf)


def _momentum(run: Run, bucket: Bucket, hold: guard.Decision) -> _Front | None:
    """The new momentum is written here, unless only the ranks' agreement tells whether it may be."""
    config = run.plan.config
    groups = bucket.with_grad(run.grads)
    blocks = [block for group in groups for block in group.blocks]
    if not blocks:
        return None
    grads, momentums = run.read(blocks, ".grad"), run.read(blocks, ".momentum")
    sizes = [len(group.blocks) for group in groups]
    how = (sizes, config.momentum_form, config.nesterov)
    if run.holds_late:
        measures = ops.lookahead(momentums, grads, run.hyper.momentum, *how)
        return _Front(groups, blocks, sizes, grads, momentums, measures)
    momentums, measures, stacks = run.writes.advance(momentums, grads, run.hyper.momentum, hold, *how)
    run.put(blocks, ".momentum", momentums)
    return _Front(groups, blocks, sizes, grads, momentums, measures, stacks)


def _momentum_late(run: Run, front: _Front, hold: guard.Decision) -> None:
    how = (front.sizes, run.plan.config.momentum_form, run.plan.config.nesterov)
    new, *_ = run.writes.advance(front.momentums, front.grads, run.hyper.momentum, hold, *how)
    run.put(front.blocks, ".momentum", new)


def _orthogonalize(run: Run, bucket: Bucket, front: _Front) -> list[Tensor]:
    """The groups' updates, tall ones transposed, as one stack [n, rows <= cols]; cut and transposed back."""
    config = run.plan.config
    own = config.orthogonalizer
    _, power, squares = front.measures
    inverse = to_norm(squares, bucket.coefficients, bucket.form.dtype)
    if own is not None:
        power = inverse = torch.ones_like(power)
    stack = ops.gather(
        front.momentums, front.grads, run.hyper.momentum, power, inverse, front.sizes,
        config.momentum_form, config.nesterov, run.holds_late, power.dtype if own else bucket.form.dtype, stacks=front.stacks,
    )  # fmt: skip
    whole = iterate(stack, bucket.coefficients, bucket.form) if own is None else own(stack)
    if whole.shape[1:] != (bucket.rows, bucket.cols):
        raise ValueError(f"Config.orthogonalizer: expected [n, {bucket.rows}, {bucket.cols}], got {tuple(whole.shape)}")
    parts = whole.split([group.count for group in front.groups])
    return [part.mT if group.tall else part for group, part in zip(front.groups, parts, strict=True)]


def _normalize(run: Run, bucket: Bucket, group: Group, update: Tensor) -> _Back:
    config = run.plan.config
    old = ops.stack(run.read(group.blocks, ".variance")) if config.normalize else None
    carried = 1.0 if config.orthogonalizer else carry(bucket.form.dtype)
    factor, new, finite = normalize(update, old, run.hyper.beta2, config, carried)
    return _Back(group, update, factor, None if old is None or new is None else (old, new), finite)


def _bad(front: _Front, parts: list[_Back], grad: Tensor | None) -> Tensor:
    """[2, n] bool: non-finite update, non-finite gradient (which is a non-finite update, even where the momentum was held)."""
    grad = ~front.measures[0].isfinite() if grad is None else grad[0]
    return torch.stack([~torch.cat([back.finite for back in parts]) | grad, grad])


def _by_matrix(run: Run, bad: list[Tensor | None], kinds: int) -> Tensor:
    """Flags of all buckets, AdamW's last, as [kinds, n_matrices + 1] bool in the plan's order.

    False where there is no gradient, and in the last column.
    """
    owners = [[(block.name, block.count) for block in bucket.blocks] for bucket in run.plan.buckets]
    owners += [[(name, 1) for name in bucket.names] for bucket in run.plan.adamw]
    columns = []
    for found, names in zip(bad, owners, strict=True):
        if found is not None and all(run.grads[name] is not None for name, _ in names):
            columns.append(found)
            continue
        at = 0
        for name, count in names:
            if found is None or run.grads[name] is None:
                columns.append(run.no_flags(kinds, count))
            else:
                columns.append(found[:, at : at + count])
                at += count
    return torch.cat([*columns, run.no_flags(kinds, 1)], 1)


def _apply(run: Run, back: _Back, skip: guard.Decision) -> None:
    config, blocks, hyper = run.plan.config, back.group.blocks, run.hyper
    lr, decay = run.rates(back.group, hyper.lr, hyper.weight_decay, back.factor.dtype, config.weight_decay_lr_power)
    cautious = config.weight_decay_form == "cautious"
    params = run.writes.apply(run.read(blocks, ""), back.update, back.factor * lr, decay, skip, cautious)
    run.put(blocks, "", params)
    if back.variances is not None:
        old, new = back.variances
        new = new if skip is None else torch.where(skip, old, new)
        run.put(blocks, ".variance", run.writes.unstack(run.read(blocks, ".variance"), new))


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
