"""A bucket whose matrices several ranks have parts or replicas of: each orthogonalizes a share.

    advance         momentums of the local parts, which set out for the owners of their matrices
    orthogonalize   the matrices that this rank owns; updates set out for all that have a part
    relay           from the replica that computed an update to the others
    receive         the local part of every update
    apply           as on one device

See messages.py for what the messages hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..algorithm import finishing
from ..algorithm.bucket import MatrixWork
from ..algorithm.orthogonalize import to_norm
from ..algorithm.precondition import PRECONDITIONERS
from ..algorithm.updates import Front, Update
from ..algorithm.work import Context, MatrixKind, Members, Runs, Stack
from ..compat import all_gather, wait
from . import messages
from .messages import TOTALS, Exchange


class SharedWork(MatrixWork):
    """One rank's part in a bucket that others share in. Its groups are those of the exchange."""

    def __init__(
        self,
        stack: Stack,
        groups: Sequence[Members[MatrixKind]],
        runs: Runs,
        context: Context,
        exchange: Exchange,
    ) -> None:
        super().__init__(stack, [group for group in groups if group.local], runs, context)
        self.exchange, self.all_groups = exchange, groups
        names = [state.name for state in context.stages.line_states]
        self.lines = [tuple(ops.stack(group.read(name)) for name in names) for group in groups]
        self.sent: messages.Sent | None = None
        self.finite: Tensor | None = None  # [n_matrices] bool, the same on all ranks

    def pass_on(self) -> None:
        if self.sent is not None:
            self.sent = self.exchange.pass_on(self.sent)

    # ----------------------------------------- parts of momentums, to the owners of their matrices

    def advance(self) -> None:
        super().advance()
        if self.exchange.sharded:
            parts = [self._part(k, share) for k, share in enumerate(self._shares())]
            self.sent = self.exchange.send(parts)

    def _shares(self) -> list[Front | None]:
        """By group, the matrices that this replica orthogonalizes; ``None``: no part is local."""
        shares: list[Front | None] = []
        tensor = matrix = local = 0
        for group, shards in zip(self.all_groups, self.exchange.groups, strict=True):
            if self.front is None or not group.local:
                shares.append(None)
                continue
            front, share = self.front, shards.ownership.replica_share
            end = tensor + group.tensors
            momentums = picked(front.momentums[tensor:end], share)
            grads = picked(front.grads[tensor:end], share)
            measures = ops.Measures(*(x[matrix:][share] for x in front.measures))
            stacks = None if front.stacks is None else [front.stacks[local][share]]
            of = front.scales
            scales = None if of is None else picked(of[tensor:end], share)
            sizes = [len(momentums)]
            own = Front([group], sizes, momentums, grads, measures, stacks, scales=scales)
            shares.append(own if momentums else None)
            tensor, matrix, local = end, matrix + group.count, local + 1
        return shares

    def _line_states(self, k: int) -> tuple[Tensor, ...]:
        """[n, rows or cols] each: of this replica's share of a group."""
        return tuple(
            x.flatten(1)[self.exchange.groups[k].ownership.replica_share] for x in self.lines[k]
        )

    def _part(self, k: int, share: Front | None) -> messages.Part | None:
        """What the owners need of the local part of a group; ``None``: nothing is local."""
        shards = self.exchange.groups[k]
        own = shards.ownership.replica_share
        has_states = shards.stores_states(self.exchange.shards.number)
        states = self._line_states(k) if has_states and own.start < own.stop else ()
        if share is not None:
            _, power, squares = share.measures
            x = self.gathered(share, power, torch.ones_like(power))
        elif states:
            squares, x = states[0].new_zeros(states[0].shape[:1]), states[0].new_empty(0)
            power = squares + float("inf")
        else:
            return None
        for state in states:  # other shards may have the same numbers and send theirs
            power = torch.where(state.isfinite().all(1), power, float("nan"))
        return messages.Part(x, power, squares, states)

    # -------------------------------------------------------------- whole matrices on their owners

    def orthogonalize(self) -> None:
        owned = self._owned()
        stacks = [stack for stack, _ in owned if stack is not None]
        parts: Iterator[Tensor] = iter(())
        if stacks:
            whole = self.iterated(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
            parts = iter(whole.split([*map(len, stacks)]))
        updates = [
            None if stack is None else self._answer(k, next(parts), states)
            for k, (stack, states) in enumerate(owned)
        ]
        sound = self._sound() if self.exchange.replicas.size > 1 else None
        self.sent = self.exchange.send_back(updates, sound)

    def _owned(self) -> list[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """By group, the matrices that this rank owns, brought to norm 1, and their line states."""
        if self.sent is None:  # replicas of whole matrices: the owner has them
            return [
                (None, ()) if share is None else (self.to_norm_1(share), self._line_states(k))
                for k, share in enumerate(self._shares())
            ]
        return [
            (None, ())
            if whole is None
            else (self._whole_to_norm_1(group.kind, whole), whole.states)
            for group, whole in zip(self.all_groups, self.exchange.receive(self.sent), strict=True)
        ]

    def _whole_to_norm_1(self, kind: MatrixKind, whole: messages.Whole) -> Tensor:
        if PRECONDITIONERS[self.context.config.precondition].function is not None:
            return self.preconditioned(kind, (whole.x * whole.shift).to(self.stack.wide))
        if self.context.config.orthogonalizer is not None:
            return (whole.x * (whole.shift / whole.power[:, None, None])).to(self.stack.wide)
        inverse = to_norm(whole.squares, self.stack.coefficients, self.stack.form.dtype)
        scaled = whole.x.to(inverse.dtype) * (whole.shift * inverse[:, None, None])
        return scaled.to(self.stack.form.dtype)

    def _answer(self, k: int, part: Tensor, states: tuple[Tensor, ...]) -> messages.Update:
        group, dim = self.all_groups[k], self._line_dim(k)
        update = part.mT if group.kind.tall else part
        found = self.normalized(group, update, tuple(state.unsqueeze(dim) for state in states))
        new = tuple(state.flatten(1) for state in found.states)
        return messages.Update(
            part.to(self.exchange.dtype), found.factor.flatten(1), new, found.finite
        )

    def _line_dim(self, k: int) -> int:
        """The dimension that a line state lacks: [n, rows] of [n, rows, 1]."""
        return 2 if self.exchange.groups[k].by_row else 1

    def _sound(self) -> Tensor:
        """[n_matrices] bool: whether the local momentum and line states are finite.

        No owner sees those of another replica.
        """
        found, matrix = [], 0
        for group, lines in zip(self.all_groups, self.lines, strict=True):
            sound = torch.ones(group.count, dtype=torch.bool, device=self.context.step.device)
            if self.front is not None and group.local:
                sound = self.front.measures[2][matrix : matrix + group.count].isfinite()
                matrix += group.count
            for state in lines:
                sound = sound & state.isfinite().flatten(1).all(1)
            found.append(sound)
        return torch.cat(found)

    # -------------------------------------------------------------- the local part of every update

    def relay(self) -> None:
        assert self.sent is not None
        self.sent = self.exchange.relay(self.sent)

    def receive(self) -> None:
        assert self.sent is not None
        finite, places = [], []
        for k, part in enumerate(self.exchange.receive_back(self.sent)):
            group, dim = self.all_groups[k], self._line_dim(k)
            finite.append(part.finite)
            if not group.local and not (self.lines[k] and part.factor.shape[1]):
                continue  # nothing of it is local, not even a line state
            wide = self.stack.wide
            new = tuple(state.unsqueeze(dim).to(wide) for state in part.states)
            update = part.x.mT if group.kind.tall else part.x
            factor = part.factor.unsqueeze(dim).to(wide)
            old = self.lines[k]
            if group.local and not old:  # states that no message carries
                states = self.context.stages.normalize.states
                old = tuple(ops.stack(group.read(state.name)) for state in states)
            self.updates.append(Update(group, update, factor, old, new, part.finite))
            places.append(k)
        self.updates = self.finished(self.updates)
        for k, found in zip(places, self.updates, strict=True):
            if found.group.local:
                finite[k] = found.finite & self.fits(found)
        self.finite = torch.cat(finite)

    def over_shards(self, begun: dict[int, finishing.Begun]) -> dict[int, dict[str, Tensor]]:
        """One message for all groups of the bucket: every shard has the same totals."""
        config, exchange = self.context.config, self.exchange
        kinds = [group.kind for group in self.all_groups]
        needs = [finishing.needs_of(kind, config) for kind in kinds]
        if not exchange.sharded or not any(map(any, needs)):
            return super().over_shards(begun)
        own = {id(each.update.group): k for k, each in begun.items()}
        parts: list[Tensor] = []
        slots: list[tuple[int, int, str, slice]] = []
        for group, needed, shards in zip(self.all_groups, needs, exchange.groups, strict=True):
            kind, rect = group.kind, shards.ownership.local_rect
            outputs = kind.cols if kind.transposed else kind.rows
            first, count = (rect.col, rect.cols) if kind.transposed else (rect.row, rect.rows)
            k = own.get(id(group))
            for name, width in finishing.sums_of(needed, config, outputs).items():
                if k is None:
                    x = torch.zeros(group.count, width, dtype=torch.float64, device=exchange.device)
                else:
                    x = begun[k].sums[name]
                    if x.shape[1] < width:
                        x = torch.nn.functional.pad(x, (first, outputs - first - count))
                    lines = slice(first, first + count) if width > 1 else slice(None)
                    slots.append((len(parts), k, name, lines))
                parts.append(x)
        flat = torch.cat([x.flatten() for x in parts])
        gathered = wait(all_gather(flat, exchange.shards.size, exchange.shards.group), TOTALS)
        totals = gathered.view(exchange.shards.size, -1).sum(0).split([x.numel() for x in parts])
        found: dict[int, dict[str, Tensor]] = {k: {} for k in begun}
        for place, k, name, lines in slots:
            found[k][name] = totals[place].view(parts[place].shape)[:, lines]
        return found

    def bad_updates(self) -> Tensor:
        assert self.finite is not None
        return self.with_gradients(~self.finite)


def picked(tensors: list[Tensor], at: slice) -> list[Tensor]:
    """The matrices ``at`` of all those of a list, as a list."""
    found, start = [], 0
    for k, x in enumerate(tensors):
        n = x.shape[0] if x.ndim == 3 else 1
        low, high = max(at.start - start, 0), min(at.stop - start, n)
        if low < high:
            found.append(tensors[k : k + 1] if high - low == n else ops.cut(tensors, k, low, high))
        start += n
    return ops.chained(found)
