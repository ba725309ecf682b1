"""What a bucket goes through on the rank that holds its matrices: momentum, orthogonalize, normalize."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..planning.layout import Block
from ..planning.plan import Bucket, Group
from ..planning.run import Run
from . import guard
from .normalize import normalize
from .orthogonalize import carry, iterate, to_norm


class Front(NamedTuple):
    """One bucket after the momentum: what is to be orthogonalized, and what it takes to bring it to norm 1."""

    groups: list[Group]  # those of their blocks that have a gradient
    blocks: list[Block]  # of all groups, in order
    sizes: list[int]  # how many blocks each group has
    grads: list[Tensor]
    momentums: list[Tensor]  # the new ones; with `Run.holds_late` still the old
    measures: ops.Measures  # see ops/advance.py
    stacks: list[Tensor] | None = None  # the momentums as stacks, where `advance` has them anyway


class Back(NamedTuple):
    """One group before the guard's decision: the parameters change by ``-lr * factor * update``."""

    group: Group
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    variances: tuple[Tensor, Tensor] | None  # the old one and the new
    finite: Tensor  # [n] bool


def momentum_of(run: Run, bucket: Bucket, hold: guard.Decision) -> Front | None:
    """The new momentum is written here, unless only the ranks' agreement tells whether it may be."""
    config = run.plan.config
    groups = [group for group in bucket.with_grad(run.grads) if group.held]
    blocks = [block for group in groups for block in group.blocks]
    if not blocks:
        return None
    grads, momentums = run.read(blocks, ".grad"), run.read(blocks, ".momentum")
    sizes = [len(group.blocks) for group in groups]
    how = (sizes, ops.MomentumRule(config.momentum_form, config.nesterov))
    operators = run.operators(bucket)
    if run.holds_late:
        measures = operators.lookahead(momentums, grads, run.hyper_of(bucket).momentum, *how)
        return Front(groups, blocks, sizes, grads, momentums, measures)
    momentums, measures, stacks = operators.advance(
        momentums, grads, run.hyper_of(bucket).momentum, hold, *how
    )
    run.put(blocks, ".momentum", momentums)
    return Front(groups, blocks, sizes, grads, momentums, measures, stacks)


def momentum_late(run: Run, bucket: Bucket, front: Front, hold: guard.Decision) -> None:
    config = run.plan.config
    how = (front.sizes, ops.MomentumRule(config.momentum_form, config.nesterov))
    new, *_ = run.operators(bucket).advance(
        front.momentums, front.grads, run.hyper_of(bucket).momentum, hold, *how
    )
    run.put(front.blocks, ".momentum", new)


def updates_of(run: Run, bucket: Bucket, front: Front | None) -> list[Back]:
    """Orthogonalized as one stack [n, rows <= cols], tall ones transposed; cut, transposed back and normalized."""
    if front is None:
        return []
    stack = iterated(run, bucket, brought_to_norm(run, bucket, front))
    parts = stack.split([group.count for group in front.groups])
    return [
        _normalized(run, bucket, group, part.mT if group.tall else part)
        for group, part in zip(front.groups, parts, strict=True)
    ]


def _normalized(run: Run, bucket: Bucket, group: Group, update: Tensor) -> Back:
    old = ops.stack(run.read(group.blocks, ".variance")) if run.plan.config.normalize else None
    beta2 = run.hyper_of(bucket).beta2
    factor, new, finite = normalize(
        update, old, beta2, run.plan.config, carried(run, bucket), group.transposed
    )
    return Back(group, update, factor, None if old is None or new is None else (old, new), finite)


def brought_to_norm(run: Run, bucket: Bucket, front: Front) -> Tensor:
    """[n, rows <= cols], ready to be iterated on."""
    _, power, squares = front.measures
    if run.plan.config.orthogonalizer is not None:
        power = inverse = torch.ones_like(power)
    else:
        inverse = to_norm(squares, bucket.coefficients, bucket.form.dtype)
    return gathered(run, bucket, front, power, inverse, [group.tall for group in front.groups])


def gathered(
    run: Run, bucket: Bucket, front: Front, power: Tensor, inverse: Tensor, turn: list[bool]
) -> Tensor:
    config = run.plan.config
    dtype = power.dtype if config.orthogonalizer else bucket.form.dtype
    return run.operators(bucket).gather(
        front.momentums, front.grads, run.hyper_of(bucket).momentum, power, inverse, front.sizes,
        rule=ops.MomentumRule(config.momentum_form, config.nesterov), ahead=run.holds_late,
        dtype=dtype, transpose=turn, stacks=front.stacks,
    )  # fmt: skip


def iterated(run: Run, bucket: Bucket, stack: Tensor) -> Tensor:
    own = run.plan.config.orthogonalizer
    whole = iterate(stack, bucket.coefficients, bucket.form) if own is None else own(stack)
    if whole.shape[1:] != (bucket.rows, bucket.cols):
        raise ValueError(
            f"Config.orthogonalizer: expected [n, {bucket.rows}, {bucket.cols}], got {tuple(whole.shape)}"
        )
    return whole


def carried(run: Run, bucket: Bucket) -> float:
    return 1.0 if run.plan.config.orthogonalizer else carry(bucket.form.dtype)
