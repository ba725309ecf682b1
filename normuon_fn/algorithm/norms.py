"""What the passes of a bucket find out for the metrics: see metrics.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .metrics import SUMS
from .normalize import per_row
from .state import State
from .weight_decay import WEIGHT_DECAYS
from .work import Context, MatrixKind, Members, Runs, complete


class Norms:
    """Of the matrices of one bucket, in their order."""

    def __init__(self) -> None:
        self.front: Tensor | None = None  # [2, n]: of gradients and momentums
        self.back: list[Tensor] = []  # by group [2, n]: of parameters and updates
        self.lines: list[Tensor] = []  # by group [3, n]: see `line_sums`

    def apply(self, context: Context, group: Members[MatrixKind], how: tuple[Any, ...]) -> None:
        """The new parameters of a group. ``how``: update, factor, decay and skip."""
        master = group.kind.master
        chance = (context.step, group.salts) if group.salts else ()
        (params, *masters), norms = ops.measured.apply(
            context.operators, group.read("param"), group.read(master) if master else None,
            *how, *chance, cautious=WEIGHT_DECAYS[group.kind.decay].cautious,
        )  # fmt: skip
        for rest in masters:
            group.put(master, rest)
        group.put("param", params)
        self.back.append(norms)

    def add_lines(
        self,
        state: State,
        values: Tensor,  # [n, rows, 1] or [n, 1, cols], of the local part of every matrix
        kind: MatrixKind,
        local: Tensor,  # [n, rows, cols], of the same part
        context: Context,
    ) -> None:
        """If they are the variances of neurons, they are added.

        Shards of the other dimension have the same variances: each counts its part of them.
        """
        if state.name != "variance" or state.per != "line":
            return
        rows, cols = local.shape[-2:]
        by_row = per_row(context.config, kind.rows, kind.cols, kind.transposed)
        part = cols / kind.cols if by_row else rows / kind.rows
        self.lines.append(line_sums(values) * part)

    def sums(self, runs: Runs, context: Context) -> Tensor:
        """[8, n_matrices] float64: see `metrics.Measured`."""
        found = None
        if self.front is not None:
            found = matrix_sums(self.front, torch.cat(self.back, 1), self._lines(self.front))
        return completed(found, len(SUMS), runs, context)

    def sums_of_owner(self, runs: Runs, context: Context, replicas: int) -> Tensor:
        """The same where all replicas have parameters and updates, and owners alone the rest.

        Each counts for as many as there are replicas, because all ranks count for one.
        """
        own = None
        if self.front is not None:
            lines = self._lines(self.front)
            own = torch.cat([self.front.double().square(), lines]) * replicas
        front = completed(own, 5, runs, context)
        back = torch.cat(self.back, 1).double().square()
        return torch.cat([front[:2], back, front[2:], torch.ones_like(back[:1])])

    def _lines(self, front: Tensor) -> Tensor:
        if self.lines:
            return torch.cat(self.lines, 1)
        return front.new_zeros((3, front.shape[1]), dtype=torch.float64)


def matrix_sums(
    front: Tensor,  # [2, n]: the norms of gradients and momentums
    back: Tensor,  # [2, n]: the norms of parameters and updates
    lines: Tensor,  # [3, n] float64: of the neuron variances
) -> Tensor:
    """[8, n] float64, from what the passes of the step return."""
    squares = torch.cat([front.double(), back.double()]).square()
    return torch.cat([squares, lines, torch.ones_like(squares[:1])])


def line_sums(variance: Tensor) -> Tensor:
    """[3, n] float64: how many variances there are, their sum, and that of their squares."""
    wide = variance.double().flatten(1)
    count = torch.full_like(wide[:, 0], wide.shape[1])
    return torch.stack([count, wide.sum(1), wide.square().sum(1)])


def completed(sums: Tensor | None, rows: int, runs: Runs, context: Context) -> Tensor:
    """[rows, n_matrices] float64; 0 for the matrices that take no part in this step here."""
    done = complete(sums, runs, context)
    return done.double().expand(rows, -1) if sums is None else done
