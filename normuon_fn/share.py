"""What a bucket goes through whose matrices several ranks hold parts or copies of: each rank orthogonalizes its share.

    momentum of the parts  --send-->  whole matrices: orthogonalize, normalize  --answer, receive-->  updates of the parts

Two collectives a bucket, one where every rank holds everything; see mesh.py for what is on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import guard, mesh, ops
from .layout import pick
from .normalize import normalize
from .orthogonalize import to_norm
from .plan import Bucket
from .run import Run
from .stages import Back, Front, brought_to_norm, carried, gathered, iterated, momentum_of


class Parts(NamedTuple):
    """A bucket whose parts are on their way to the owners."""

    front: Front | None  # None: nothing of it lies here
    sent: mesh.Sent | None  # None: they have them


class Answer(NamedTuple):
    """A bucket whose updates are on their way back."""

    front: Front | None
    sent: mesh.Sent


def send(run: Run, bucket: Bucket, hold: guard.Decision) -> Parts:
    """This rank's parts of the bucket's new momentums, to the matrices' owners."""
    assert bucket.exchange is not None
    front = momentum_of(run, bucket, hold)
    if bucket.exchange.replicated:
        return Parts(front, None)
    parts: list[mesh.Part | None] = []
    pieces = iter(_by_group(run, front))
    for group in bucket.groups:
        if not group.held:
            parts.append(None)
            continue
        piece = next(pieces)
        power = piece.measures[1]
        stack = gathered(run, bucket, piece, power, torch.ones_like(power), [group.tall])
        variance = ops.stack(run.read(group.blocks, ".variance")).flatten(1) if run.plan.config.normalize else None
        parts.append(mesh.Part(stack, power, variance))
    return Parts(front, bucket.exchange.send(parts))


def _by_group(run: Run, front: Front | None) -> list[Front]:
    """A front for every group, of all its matrices; of replicated ones, of those that this rank owns."""
    found, block, matrix = [], 0, 0
    for k, (group, size) in enumerate(zip(front.groups, front.sizes, strict=True)) if front else ():
        assert front is not None and group.spread is not None
        own = group.spread.own if group.spread.replicated else slice(0, group.count)
        grads, momentums = (pick(tensors[block : block + size], own) for tensors in (front.grads, front.momentums))
        largest, power, squares = (x[matrix + own.start : matrix + own.stop] for x in front.measures)
        stacks = None if front.stacks is None else [front.stacks[k][own]]
        measures = largest, power, squares
        found.append(Front([group], list(group.blocks), [len(momentums)], grads, momentums, measures, stacks))
        block, matrix = block + size, matrix + group.count
    return found


def answer(run: Run, bucket: Bucket, given: Parts) -> Answer:
    """Orthogonalizes and normalizes the matrices that this rank owns, and sends their updates to who holds a part of them."""
    exchange, config = bucket.exchange, run.plan.config
    assert exchange is not None
    stacks: list[Tensor | None] = []
    variances: list[Tensor | None] = []
    if given.sent is None:
        for group, piece in zip(bucket.groups, _by_group(run, given.front), strict=True):
            own = group.spread.own if group.spread else slice(0, 0)
            stacks.append(brought_to_norm(run, bucket, piece) if own.start < own.stop else None)
            old = run.read(group.blocks, ".variance") if config.normalize and own.start < own.stop else None
            variances.append(None if old is None else ops.stack(pick(old, own)).flatten(1))
    else:
        for part in exchange.receive(given.sent):
            stacks.append(None if part is None else _whole_to_norm(run, bucket, part))
            variances.append(None if part is None else part.variance)
    mine = [stack for stack in stacks if stack is not None]
    whole = iterated(run, bucket, torch.cat(mine)) if mine else None
    parts = iter(() if whole is None else whole.split([*map(len, mine)]))
    updates: list[mesh.Update | None] = []
    for group, stack, variance, by_row in zip(bucket.groups, stacks, variances, exchange.by_row, strict=True):
        if stack is None:
            updates.append(None)
            continue
        part = next(parts)
        update = part.mT if group.tall else part
        before = None if variance is None else variance.unsqueeze(2 if by_row else 1)
        factor, new, finite = normalize(update, before, run.hyper_of(bucket).beta2, config, carried(run, bucket))
        updates.append(mesh.Update(update, factor.flatten(1), None if new is None else new.flatten(1), finite))
    return Answer(given.front, exchange.send_back(updates))


def _whole_to_norm(run: Run, bucket: Bucket, part: mesh.Whole) -> Tensor:
    if run.plan.config.orthogonalizer is not None:
        return part.x / part.power[:, None, None]
    inverse = to_norm(part.squares, bucket.coefficients, bucket.form.dtype)
    return (part.x * inverse[:, None, None]).to(bucket.form.dtype)


def receive(run: Run, bucket: Bucket, given: Answer) -> list[Back]:
    """This rank's parts of the updates."""
    assert bucket.exchange is not None
    backs = []
    for group, part, by_row in zip(
        bucket.groups, bucket.exchange.receive_back(given.sent), bucket.exchange.by_row, strict=True
    ):
        if part is None:
            continue
        old = ops.stack(run.read(group.blocks, ".variance")) if run.plan.config.normalize else None
        dim = 2 if by_row else 1
        variances = None if old is None or part.variance is None else (old, part.variance.unsqueeze(dim))
        finite = part.finite if old is None else part.finite & old.isfinite().flatten(1).all(1)
        backs.append(Back(group, part.x, part.factor.unsqueeze(dim), variances, finite))
    return backs
