"""A bucket of replicas of whole matrices whose state their owners alone keep.

advance         momentums of the matrices that this rank owns: gradients are read there alone
orthogonalize   the same matrices; updates set out for all replicas
receive         the updates of all matrices
apply           all parameters; and the state of what this rank owns
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..algorithm.bucket import MatrixWork
from ..algorithm.updates import Front, Update
from ..algorithm.work import Context, MatrixKind, Members, Stack
from ..compat import group_named
from .messages import Exchange
from .shared import SharedWork


def write_from_owner(tensor: Tensor, owner: int, group: str) -> None:
    """Writes the owner's tensor into those of all other ranks of a group: a collective."""
    ranks = group_named(group)
    dist.broadcast(tensor, dist.get_global_rank(ranks, owner), group=ranks)


class OwnedWork(SharedWork):
    """One rank's part in a bucket whose state is divided among the replicas."""

    def __init__(
        self,
        stack: Stack,
        groups: Sequence[Members[MatrixKind]],
        owned: Sequence[Members[MatrixKind]],  # of each group, what this rank owns, in order
        context: Context,
        exchange: Exchange,
    ) -> None:
        shares = [group.ownership.replica_share for group in exchange.groups]
        runs = [
            run
            for group, share in zip(groups, shares, strict=True)
            for run in (
                (False, share.start),
                (True, share.stop - share.start),
                (False, group.count - share.stop),
            )
        ]
        MatrixWork.__init__(self, stack, [each for each in owned if each.count], runs, context)
        self.exchange, self.all_groups, self.owned, self.places = exchange, groups, owned, shares
        names = [state.name for state in context.stages.line_states]
        self.lines = [
            tuple(ops.stack(each.read(name)) for name in names) if each.count else ()
            for each in owned
        ]
        self.new_lines: list[tuple[Tensor, ...]] = []
        self.sent, self.finite = None, None

    def _shares(self) -> list[Front | None]:
        shares: list[Front | None] = []
        tensor = matrix = at = 0
        for each in self.owned:
            if self.front is None or not each.count:
                shares.append(None)
                continue
            front, end, stop = self.front, tensor + each.tensors, matrix + each.count
            measures = ops.Measures(*(x[matrix:stop] for x in front.measures))
            stacks = None if front.stacks is None else [front.stacks[at]]
            own = front.momentums[tensor:end], front.grads[tensor:end]
            scales = None if front.scales is None else front.scales[tensor:end]
            shares.append(Front([each], [each.tensors], *own, measures, stacks, scales=scales))
            tensor, matrix, at = end, stop, at + 1
        return shares

    def _line_states(self, k: int) -> tuple[Tensor, ...]:
        return tuple(x.flatten(1) for x in self.lines[k])

    def _sound(self) -> Tensor:
        """True for what others own: nothing here could make its update wrong."""
        starts = accumulate((group.count for group in self.all_groups), initial=0)
        sound = torch.ones(
            self.exchange.matrices, dtype=torch.bool, device=self.context.step.device
        )
        parts, done, matrix = [], 0, 0
        for start, share, each, lines in zip(
            starts, self.places, self.owned, self.lines, strict=False
        ):
            if self.front is None or not each.count:
                continue
            own = self.front.measures[2][matrix : matrix + each.count].isfinite()
            for state in lines:
                own = own & state.isfinite().flatten(1).all(1)
            parts += [sound[done : start + share.start], own]
            done, matrix = start + share.stop, matrix + each.count
        return torch.cat([*parts, sound[done:]])

    def receive(self) -> None:
        assert self.sent is not None
        for k, part in enumerate(self.exchange.receive_back(self.sent)):
            group, dim, wide = self.all_groups[k], self._line_dim(k), self.stack.wide
            update = part.x.mT if group.kind.tall else part.x
            factor = part.factor.unsqueeze(dim).to(wide)
            self.updates.append(Update(group, update, factor, (), (), part.finite))
            new = (state[self.places[k]].unsqueeze(dim).to(wide) for state in part.states)
            self.new_lines.append(tuple(new) if self.owned[k].count else ())
        self.updates = self.finished(self.updates)
        self.finite = torch.cat([update.finite & self.fits(update) for update in self.updates])

    def apply(self) -> None:
        super().apply()
        states = self.context.stages.line_states
        for each, lines, news in zip(self.owned, self.lines, self.new_lines, strict=True):
            for state, old, new in zip(states, lines, news, strict=False):
                kept = new if self.skip is None else torch.where(self.skip, old, new)
                if self.context.config.metrics and each.count:
                    whole = ops.stack(each.read("param"))
                    self.norms.add_lines(state, kept, each.kind, whole, self.context)
                stored = self.context.operators.unstack(each.read(state.name), kept)
                each.put(state.name, stored)

    def _apply(self, update: Update) -> None:
        self._apply_to_parameters(update)

    def sums(self) -> Tensor:
        return self.norms.sums_of_owner(self.runs, self.context, self.exchange.replicas.size)
