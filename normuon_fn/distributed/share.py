"""What a bucket goes through whose matrices several ranks hold parts or copies of: each rank orthogonalizes its share.

    parts of momentums  --send-->  whole matrices: orthogonalize, normalize  --answer, relay, receive-->  parts of updates

See exchange.py for what is on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..algorithm import guard
from ..algorithm.normalize import normalize
from ..algorithm.orthogonalize import to_norm
from ..algorithm.stages import (
    Back,
    Front,
    brought_to_norm,
    carried,
    gathered,
    iterated,
    momentum_of,
)
from ..planning.layout import pick
from ..planning.plan import Bucket, Group
from ..planning.run import Run
from . import messages as exchange


class Parts(NamedTuple):
    """A bucket whose parts are on their way to the owners."""

    front: Front | None  # None: nothing of it lies here
    sent: exchange.Sent | None  # None: they have them


class Answer(NamedTuple):
    """A bucket whose updates are on their way back."""

    front: Front | None
    sent: exchange.Sent


def send(run: Run, bucket: Bucket, hold: guard.Decision) -> Parts:
    """This rank's parts of its copy's share of the bucket's new momentums, to the matrices' owners."""
    assert bucket.exchange is not None
    front = momentum_of(run, bucket, hold)
    if not bucket.exchange.sharded:
        return Parts(front, None)
    parts: list[exchange.Part | None] = []
    for group, piece, shards in zip(
        bucket.groups, _shares(bucket, front), bucket.exchange.groups, strict=True
    ):
        variance = (
            _variance(run, group) if shards.stores_states(bucket.exchange.shards.number) else None
        )
        if piece is not None:
            _, power, squares = piece.measures
            stack = gathered(run, bucket, piece, power, torch.ones_like(power), [group.tall])
        elif variance is not None:
            squares, stack = variance.new_zeros(variance.shape[:1]), variance.new_empty(0)
            power = squares + float("inf")
        else:
            parts.append(None)
            continue
        if variance is not None:  # others may hold the same and send theirs
            power = torch.where(variance.isfinite().all(1), power, float("nan"))
        parts.append(exchange.Part(stack, power, squares, _states(variance)))
    return Parts(front, bucket.exchange.send(parts))


def _states(variance: Tensor | None) -> tuple[Tensor, ...]:
    return () if variance is None else (variance,)


def _variance_of(states: tuple[Tensor, ...]) -> Tensor | None:
    return states[0] if states else None


def _shares(bucket: Bucket, front: Front | None) -> list[Front | None]:
    """A front for every group, of the matrices that this copy orthogonalizes; ``None`` where nothing of them lies here."""
    found: list[Front | None] = []
    k = block = matrix = 0
    for group in bucket.groups:
        assert group.spread is not None
        if front is None or not group.held:
            found.append(None)
            continue
        size, share = front.sizes[k], group.spread.replica_share
        grads, momentums = (
            pick(tensors[block : block + size], share) for tensors in (front.grads, front.momentums)
        )
        largest, power, squares = (
            x[matrix + share.start : matrix + share.stop] for x in front.measures
        )
        stacks = None if front.stacks is None else [front.stacks[k][share]]
        piece = Front(
            [group],
            list(group.blocks),
            [len(momentums)],
            grads,
            momentums,
            (largest, power, squares),
            stacks,
        )
        found.append(piece if share.start < share.stop else None)
        k, block, matrix = k + 1, block + size, matrix + group.count
    return found


def _variance(run: Run, group: Group) -> Tensor | None:
    """[n, rows or cols], of this copy's share."""
    assert group.spread is not None
    share = group.spread.replica_share
    if not run.plan.config.normalize or share.start == share.stop:
        return None
    return ops.stack(pick(run.read(group.blocks, ".variance"), share)).flatten(1)


def answer(run: Run, bucket: Bucket, given: Parts) -> Answer:
    """Orthogonalizes and normalizes the matrices that this rank owns, and sends their updates to who holds a part of them."""
    shared, config = bucket.exchange, run.plan.config
    assert shared is not None
    stacks: list[Tensor | None] = []
    variances: list[Tensor | None] = []
    if given.sent is None:
        for group, piece in zip(bucket.groups, _shares(bucket, given.front), strict=True):
            stacks.append(None if piece is None else brought_to_norm(run, bucket, piece))
            variances.append(None if piece is None else _variance(run, group))
    else:
        for part in shared.receive(given.sent):
            stacks.append(None if part is None else _whole_to_norm(run, bucket, part))
            variances.append(None if part is None else _variance_of(part.states))
    mine = [stack for stack in stacks if stack is not None]
    whole = iterated(run, bucket, torch.cat(mine) if len(mine) > 1 else mine[0]) if mine else None
    parts = iter(() if whole is None else whole.split([*map(len, mine)]))
    updates: list[exchange.Update | None] = []
    for group, stack, variance, shards in zip(
        bucket.groups, stacks, variances, shared.groups, strict=True
    ):
        if stack is None:
            updates.append(None)
            continue
        part = next(parts)
        before = None if variance is None else variance.unsqueeze(2 if shards.by_row else 1)
        update = part.mT if group.tall else part
        beta2 = run.hyper_of(bucket).beta2
        factor, new, finite = normalize(
            update, before, beta2, config, carried(run, bucket), group.transposed
        )
        updates.append(
            exchange.Update(
                part,
                factor.flatten(1),
                _states(None if new is None else new.flatten(1)),
                finite,
            )
        )
    sound = _sound(run, bucket, given.front) if shared.replicas.size > 1 else None
    return Answer(given.front, shared.send_back(updates, sound))


def _whole_to_norm(run: Run, bucket: Bucket, part: exchange.Whole) -> Tensor:
    if run.plan.config.orthogonalizer is not None:
        return part.x * (part.shift / part.power[:, None, None])
    inverse = to_norm(part.squares, bucket.coefficients, bucket.form.dtype)
    return (part.x.to(inverse.dtype) * (part.shift * inverse[:, None, None])).to(bucket.form.dtype)


def _sound(run: Run, bucket: Bucket, front: Front | None) -> Tensor:
    """[matrices of the bucket] bool: whether momentum and variance are finite here. What another copy has goes to no owner."""
    found, matrix = [], 0
    for group in bucket.groups:
        sound = run.no_flags(1, group.count)[0].logical_not()
        if front is not None and group.held:
            sound = front.measures[2][matrix : matrix + group.count].isfinite()
            matrix += group.count
        if run.plan.config.normalize and group.blocks:
            sound = sound & ops.stack(run.read(group.blocks, ".variance")).isfinite().flatten(
                1
            ).all(1)
        found.append(sound)
    return torch.cat(found)


def relay(bucket: Bucket, given: Answer) -> Answer:
    """This copy's updates to the other copies."""
    assert bucket.exchange is not None
    return given._replace(sent=bucket.exchange.relay(given.sent))


def receive(run: Run, bucket: Bucket, given: Answer) -> tuple[list[Back], Tensor]:
    """This rank's parts of the updates; and [matrices of the bucket] bool, whether they are finite, alike on all ranks."""
    assert bucket.exchange is not None
    backs, finite = [], []
    for group, part, shards in zip(
        bucket.groups, bucket.exchange.receive_back(given.sent), bucket.exchange.groups, strict=True
    ):
        finite.append(part.finite)
        if not group.held and not part.factor.shape[1]:
            continue  # nothing of it lies here, not even a variance
        old = ops.stack(run.read(group.blocks, ".variance")) if run.plan.config.normalize else None
        dim = 2 if shards.by_row else 1
        variances = None if old is None else (old, part.states[0].unsqueeze(dim))
        update = part.x.mT if group.tall else part.x
        backs.append(Back(group, update, part.factor.unsqueeze(dim), variances, part.finite))
    return backs, torch.cat(finite)
