"""What a bucket of matrices passes from stage to stage, and its parameters in full width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import Measures
from .work import MatrixKind, Members


class Front(NamedTuple):
    """What is to be orthogonalized, and what it takes to bring it to norm 1."""

    groups: list[Members[MatrixKind]]
    sizes: list[int]  # how many tensors each group has
    # Of all groups in order: the new ones; with `Context.holds_late` still the old ones.
    momentums: list[Tensor]
    grads: list[Tensor]
    measures: Measures  # see ops/advance.py
    stacks: list[Tensor] | None = (
        None  # the momentums as one stack per group, where `advance` has them anyway
    )
    matrices: slice | None = None  # which of the bucket's these are; None: all
    scales: list[Tensor] | None = None  # as ``momentums``, where these are codes: ops/codes.py

    def part(self, groups: slice) -> Front:
        """The same of some groups."""
        start = sum([group.count for group in self.groups[: groups.start]])
        end = start + sum([group.count for group in self.groups[groups]])
        first = sum(self.sizes[: groups.start])
        last = first + sum(self.sizes[groups])
        return Front(
            self.groups[groups],
            self.sizes[groups],
            self.momentums[first:last],
            self.grads[first:last],
            Measures(*(x[start:end] for x in self.measures)),
            None if self.stacks is None else self.stacks[groups],
            slice(start, end),
            None if self.scales is None else self.scales[first:last],
        )


class Update(NamedTuple):
    """One group before the guard decides: its parameters change by ``-lr * factor * update``."""

    group: Members[MatrixKind]
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    old: tuple[Tensor, ...]  # states of the normalize stage
    new: tuple[Tensor, ...]
    finite: Tensor  # [n] bool
    decay: Tensor | None = None  # [n], in the place of the one that `Hyper` tells


def wide_parameters(group: Members[MatrixKind], wide: torch.dtype) -> Tensor:
    """[n, rows, cols]: the parameters, or their masters, in float32 (float64)."""
    parameters = ops.stack(group.read("param"))
    if not group.kind.master:
        return parameters.to(wide)
    return ops.joined_with(parameters, ops.stack(group.read(group.kind.master)))
