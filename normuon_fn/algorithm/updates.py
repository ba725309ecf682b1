"""What is known of a group's update before the guard decides, and its parameters in full width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .work import MatrixKind, Members


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
