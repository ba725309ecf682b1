"""What a step tells about itself: six numbers per parameter, in its graph, without a sync.

    sums of squares by matrix, which the passes of the step return anyway  (ops/measured.py)
    -> sums by parameter -> of DTensors: over their shards, one all_reduce -> [6, n_params]

With U what a step subtracts besides weight decay, W the parameter before the step:

    update_rms       RMS of U
    grad_rms         RMS of the gradient, as the step was given it
    momentum_rms     RMS of the momentum after the step (AdamW: of exp_avg)
    weight_norm      Frobenius norm of W (of its float32 master, where there is one)
    update_ratio     norm of U over norm of W
    variance_spread  standard deviation of a parameter's neuron variances over their mean

A step that was skipped subtracts nothing: its updates are 0, on every layout. What it would have
subtracted depends on when ranks hear of the fault, and it may be no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..compat import all_reduce_sum
from .guard import Decision

METRICS = (
    "update_rms", "grad_rms", "momentum_rms", "weight_norm", "update_ratio", "variance_spread",
)  # fmt: skip
# Sums of squares; of the neuron variances their number, sum and sum of squares; and one that is
# not zero where a matrix takes part in the step.
SUMS = ("grad", "momentum", "weight", "update", "lines", "variance", "variance squared", "present")


class Measured(Protocol):
    """A work of the step, as metrics see it."""

    skip: Decision  # whether its parameters keep their bits

    def sums(self) -> Tensor:
        """[8, n_matrices] float64: `SUMS` of each of its matrices on this rank."""


@dataclass(frozen=True)
class Together:
    """Parameters whose parts are on several ranks of one process group."""

    group: str
    columns: Tensor  # int64 on the device: their places in the plan


@dataclass(frozen=True)
class MetricsRule:
    """The static half of the metrics."""

    # [n_matrices] int64 on the device: as in `guard.Rule`
    parameter_of: Tensor
    entries: Tensor  # [n_params] float64 on the device: of whole parameters
    # [n_params] float64 on the device: 1 / how many ranks of its group have each part
    share: Tensor
    together: tuple[Together, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device besides ``parameter_of``."""
        return [self.entries, self.share, *(each.columns for each in self.together)]

    def of(self, works: Sequence[Measured]) -> Tensor:
        """[6, n_params] float32: `METRICS` of each parameter, of all its shards."""
        sums = torch.zeros(
            (len(SUMS), len(self.entries)), dtype=torch.float64, device=self.entries.device
        )
        if works:
            columns = torch.cat([_made(work.sums(), work.skip) for work in works], 1)
            sums = sums.index_add(1, ops.input_for(self.parameter_of), columns)
        sums = sums * ops.input_for(self.share)
        for each in self.together:
            columns = ops.input_for(each.columns)
            whole = all_reduce_sum(sums[:, columns], each.group, "the all_reduce of the metrics")
            sums = sums.index_copy(1, columns, whole)
        return numbers_of(sums, ops.input_for(self.entries))


def _made(sums: Tensor, skip: Decision) -> Tensor:
    """The same with the updates that were made: zeros where ``skip`` is true."""
    if skip is None:
        return sums
    k = SUMS.index("update")
    return torch.cat([sums[:k], torch.where(skip, 0.0, sums[k : k + 1]), sums[k + 1 :]])


def numbers_of(
    sums: Tensor,  # [8, n_params] float64
    entries: Tensor,  # [n_params] float64
) -> Tensor:
    """[6, n_params] float32, NaN where there is no such number."""
    grad, momentum, weight, update, lines, variance, squares, present = sums.unbind(0)
    mean = variance / lines
    spread = (squares / lines - mean.square()).clamp(min=0.0).sqrt() / mean
    found = torch.stack(
        [
            (update / entries).sqrt(),
            (grad / entries).sqrt(),
            (momentum / entries).sqrt(),
            weight.sqrt(),
            (update / weight).sqrt(),
            spread,
        ]
    )
    return torch.where(present > 0, found, float("nan")).float()
