"""The step. Start reading here: data moves down this file, nothing looks back up.

    read -> momentum -> orthogonalize -> normalize -> guard -> apply -> StepResult

`update` is the step as a pure function, for your own graph; `step` is `update` compiled; `step_` the same in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .algorithm import guard
from .algorithm.adamw import Moments, apply_adamw, read_moments
from .algorithm.stages import Back, Front, momentum_late, momentum_of, updates_of
from .compat import without_autocast
from .distributed import placements as mesh
from .distributed import share
from .planning.checks import check_step, check_tensors
from .planning.plan import Bucket, Plan
from .planning.run import Run
from .types import Grads, Hyper, StepResult, Tensors


def init(plan: Plan, params: Tensors) -> dict[str, Tensor]:
    """All state of all parameters: zeros, by name, on the plan's device. Only a master begins as its parameter.

    Shapes: ``"<name>.momentum"`` as the parameter; ``"<name>.variance"`` as ``param[..., :1]`` (one a row; heads and splits
    their own); ``"<name>.exp_avg"``, ``"<name>.exp_avg_sq"`` as the parameter; with `Config.master` also
    ``"<name>.mantissa"`` (int16) or ``"<name>.master"`` (float32), as the parameter; ``"guard.step"``, ``"guard.skipped"``,
    ``"guard.consecutive"`` 0-d int32.

    Ranks that share the work compare their plans here: a collective.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: ``params`` are not those of the plan, or another rank has another plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    check_tensors(plan, "params", params, {p.name: p.spec for p in plan.parameters})
    for group in plan.shared_by:
        mesh.check_alike(plan.summary, group)
    zeros = {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device=plan.device)
        for name, spec in plan.state.items()
    }
    for name in params:
        if f"{name}.master" in zeros:
            zeros[f"{name}.master"].copy_(mesh.local(params[name]).detach())
    return {
        name: mesh.to_dtensor(tensor, plan.state[name].sharded) for name, tensor in zeros.items()
    }


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

    A gradient of ``None`` leaves that parameter and its state as they are; which ones are ``None`` is static. The step has no
    derivative.

    Raises (while tracing, so at no cost per step):
        TypeError: Python floats in ``hyper``, or something that is not a tensor.
        ValueError: names, shapes, dtypes or devices other than the plan's.
    """
    return to_dtensors(
        local_update(params, grads, state, hyper, plan, found_inf=found_inf), params, plan
    )


def local_update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    """`update`, whose result is what lies on this rank."""
    check_step(plan, params, grads, state, hyper, found_inf)
    with torch.no_grad(), without_autocast(plan.device):
        return _advance(params, grads, state, hyper, plan, found_inf, ops.PURE)


def local_update_(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,
) -> StepResult:
    check_step(plan, params, grads, state, hyper, found_inf)
    with torch.no_grad(), without_autocast(plan.device):
        return _advance(params, grads, state, hyper, plan, found_inf, ops.IN_PLACE)


def to_dtensors(result: StepResult, params: Tensors, plan: Plan) -> StepResult:
    """DTensors where the parameters are."""
    if not plan.sharded:
        return result
    specs = {p.name: p.spec for p in plan.parameters}
    new = {
        name: mesh.to_dtensor(tensor, specs[name].sharded) for name, tensor in result.params.items()
    }
    return result._replace(
        params=new,
        state={
            name: mesh.to_dtensor(tensor, plan.state[name].sharded)
            for name, tensor in result.state.items()
        },
    )


def zeros_for_none(params: Tensors, grads: Grads) -> Grads:
    """``missing_grads="zeros"``."""
    return {
        name: torch.zeros_like(params[name]) if grad is None else grad
        for name, grad in grads.items()
    }


def _advance(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
    writes: ops.Writes,
) -> StepResult:
    params, grads, state = mesh.local_of(params), mesh.local_of(grads), mesh.local_of(state)
    if plan.config.missing_grads == "zeros":
        grads = zeros_for_none(params, grads)
    run = Run(params, grads, state, hyper, plan, found_inf, writes, {})

    moments = [read_moments(run, bucket) for bucket in plan.adamw]
    early: guard.Agreed | None = None
    holds: list[guard.Decision] = [None] * len(plan.buckets)
    if not run.holds_late:
        early = _agreed(run, _bad_early(run, moments)) if plan.config.guard == "full" else None
        holds = guard.holds(plan.config, early and early.seen[1] > 0, plan.bucket_has, found_inf)
    # Everything that goes to other ranks is sent first: it travels while the rest is orthogonalized.
    sent = {
        b: share.send(run, b, hold)
        for b, hold in zip(plan.buckets, holds, strict=False)
        if b.exchange
    }
    fronts: list[Front | None] = []
    backs: list[list[Back]] = []
    answers: list[share.Answer | None] = []
    for bucket, hold in zip(plan.buckets, holds, strict=False):
        if bucket.exchange:
            answers.append(share.answer(run, bucket, sent[bucket]))
            fronts.append(sent[bucket].front)
            backs.append([])
        else:
            answers.append(None)
            fronts.append(momentum_of(run, bucket, hold))
            backs.append(updates_of(run, bucket, fronts[-1]))
    finite = [torch.cat([back.finite for back in parts]) if parts else None for parts in backs]
    answers = [
        given and share.relay(bucket, given)
        for bucket, given in zip(plan.buckets, answers, strict=True)
    ]
    for k, (bucket, given) in enumerate(zip(plan.buckets, answers, strict=True)):
        if given is not None:
            backs[k], finite[k] = share.receive(run, bucket, given)

    agreed = _agreed_late(run, fronts, finite, moments, early)
    skips, skipped = guard.decide(plan.config, agreed.seen, plan.bucket_has, found_inf)
    if run.holds_late:
        late = guard.holds(plan.config, agreed.seen[1] > 0, plan.bucket_has, found_inf)
        for bucket, front, hold in zip(plan.buckets, fronts, late, strict=False):
            if front:
                momentum_late(run, bucket, front, hold)
    for of_bucket, skip in zip(backs, skips, strict=False):
        for back in of_bucket:
            _apply(run, back, skip)
    for adamw, lists, skip in zip(plan.adamw, moments, skips[len(backs) :], strict=True):
        apply_adamw(run, adamw, lists, skip)
    _count(run, skipped)
    return run.result(agreed.flags, skipped)


Flags = list[
    Tensor | None
]  # for each bucket, AdamW's last: [n], or [2, n] for non-finite update and non-finite gradient


def _agreed(run: Run, bad: Flags) -> guard.Agreed:
    """What all ranks know: the step's one collective."""
    return guard.agree(
        guard.flags(_by_matrix(run, bad), run.plan.matrix_of),
        run.plan.guard_group,
        run.plan.guard_alike,
    )


def _bad_early(run: Run, moments: list[Moments]) -> Flags:
    """``guard="full"`` reads all gradients once before anything is written. Of updates, AdamW's are known by then.

    A non-finite gradient is a non-finite update, even where the momentum is held.
    """
    bad: Flags = []
    for bucket in run.plan.buckets:
        groups = [group for group in bucket.with_grad(run.grads) if group.held]
        grads = [run.read(group.blocks, ".grad") for group in groups]
        found = (
            ops.largest([grad for part in grads for grad in part], [*map(len, grads)])
            if groups
            else None
        )
        bad.append(
            None
            if found is None
            else _of_all(run, bucket, ~_fits(run, bucket, found)).expand(2, -1)
        )
    return bad + [lists.bad if lists.names else None for lists in moments]


def _fits(run: Run, bucket: Bucket, largest: Tensor) -> Tensor:
    """Whether gradients with those largest entries keep the momentum finite: one that is not would be so for good."""
    config = run.plan.config
    if config.momentum_dtype is None and config.momentum_form == "ema":
        return largest.isfinite()
    limit = min(
        torch.finfo(dtype).max for dtype in (config.momentum_dtype or largest.dtype, largest.dtype)
    )
    if config.momentum_form == "ema":
        return largest <= limit
    return largest <= limit * (1.0 - run.hyper_of(bucket).momentum.to(largest.dtype))


def _agreed_late(
    run: Run,
    fronts: list[Front | None],
    finite: Flags,
    moments: list[Moments],
    early: guard.Agreed | None,
) -> guard.Agreed:
    """With updates. Where gradients were agreed about early, those who share a bucket know of its updates already."""
    bad: Flags = []
    for bucket, front, sound in zip(run.plan.buckets, fronts, finite, strict=True):
        update = None if sound is None else ~sound
        if update is None or front is None or early is not None:
            bad.append(None if update is None else torch.stack([update, torch.zeros_like(update)]))
        else:
            grad = _of_all(run, bucket, ~_fits(run, bucket, front.measures[0]))
            bad.append(torch.stack([update | grad, grad]))
    if early is None:
        return _agreed(run, bad + [lists.bad if lists.names else None for lists in moments])
    late = guard.flags(_by_matrix(run, bad + [None] * len(moments)), run.plan.matrix_of)
    flags = torch.maximum(early.flags, late)
    return guard.Agreed(
        flags,
        torch.maximum(early.seen, late if run.plan.guard_alike else late.amax(1, keepdim=True)),
    )


def _of_all(run: Run, bucket: Bucket, flags: Tensor) -> Tensor:
    """Flags of the groups that lie here, filled up with False for those that do not."""
    if all(group.held for group in bucket.groups):
        return flags
    parts = iter(flags.split([group.count for group in bucket.groups if group.held]))
    return torch.cat(
        [next(parts) if group.held else run.no_flags(1, group.count)[0] for group in bucket.groups]
    )


def _by_matrix(run: Run, bad: Flags) -> Tensor:
    """Flags of all buckets as [2, n_matrices + 1] bool in the plan's order.

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
                columns.append(run.no_flags(2, count))
            else:
                columns.append(found[:, at : at + count])
                at += count
    return torch.cat([*columns, run.no_flags(2, 1)], 1)


def _apply(run: Run, back: Back, skip: guard.Decision) -> None:
    config, blocks, hyper = run.plan.config, back.group.blocks, run.hyper_of(back.group)
    lr, decay = run.rates(
        back.group, hyper.lr, hyper.weight_decay, back.factor.dtype, config.weight_decay_lr_power
    )
    cautious = config.weight_decay_form == "cautious"
    if back.group.held:
        params, rest = run.read(blocks, ""), back.group.rest
        how = (back.update, back.factor * lr, decay, skip, cautious)
        if rest:
            params, rests = run.writes.apply_wide(params, run.read(blocks, rest), *how)
            run.put(blocks, rest, rests)
        else:
            params = run.writes.apply(
                params, *how, *run.chances([salt for block in blocks for salt in block.salts])
            )
        run.put(blocks, "", params)
    if back.variances is not None:
        old, new = back.variances
        new = new if skip is None else torch.where(skip, old, new)
        run.put(blocks, ".variance", run.writes.unstack(run.read(blocks, ".variance"), new))


def _count(run: Run, skipped: Tensor) -> None:
    """The guard's counters: steps so far, skipped ones, skipped ones in a row."""
    step, total, in_a_row = (
        run.state[f"guard.{name}"] for name in ("step", "skipped", "consecutive")
    )
    counted = {
        "guard.step": step + 1,
        "guard.skipped": total + skipped.to(total.dtype),
        "guard.consecutive": torch.where(skipped, in_a_row + 1, 0),
    }
    for name, value in counted.items():
        run.new[name] = [(None, value)]
        if run.writes is ops.IN_PLACE:
            run.state[name].copy_(value)
