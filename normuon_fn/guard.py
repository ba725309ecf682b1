"""The guard against non-finite updates: from one finite flag a matrix to one decision, without a host sync.

finite [n_matrices]  --flags-->  [2, n_params] int32  --decide-->  what keeps its bits
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .compat import all_reduce_max
from .types import Config


class Decision(NamedTuple):
    """``None`` where nothing can be skipped: the graph then has no select at all."""

    skip: Tensor | None  # 0-d bool: params, variance and AdamW's moments keep their bits
    hold: Tensor | None  # 0-d bool: momentum keeps its bits


def flags(bad: Tensor, matrix_of: Tensor) -> Tensor:
    """Flags by parameter, [2, n_params] int32, from flags by matrix.

    Args:
        bad: [2, n_matrices + 1] bool: non-finite update, non-finite gradient; the last column is False.
        matrix_of: [n_params, most] int64, the columns of ``bad`` that are a parameter's, filled up with any of its own.
    """
    return bad[:, matrix_of].any(-1).to(torch.int32)


def agree(flags: Tensor, group: str | None) -> Tensor:
    """The flags of all ranks, by maximum: the one collective of the step. Nothing at all without a group."""
    return flags if group is None else all_reduce_max(flags, group)


def decide(
    config: Config,
    flags: Tensor,  # [2, n_params] int32, agreed
    bucket_has: Tensor,  # [n_buckets, n_params] bool
    found_inf: Tensor | None,
) -> tuple[list[Decision], Tensor]:
    """What the flags mean under ``config.guard``: a decision for each bucket, and whether any of them skips.

    A bucket is bad if a parameter of it is: one whose splits lie in several buckets is never updated by half. ``found_inf`` > 0
    skips everything, in every mode.
    """
    count = bucket_has.shape[0]
    found = None if found_inf is None else (found_inf > 0).reshape(())
    if config.guard == "off":
        skipped = torch.zeros((), dtype=torch.bool, device=flags.device) if found is None else found
        return [Decision(found, found)] * count, skipped
    update, grad = (flags > 0).unbind(0)
    if config.guard_scope == "step":
        skip, hold = _skip_and_hold(config, update.any(), grad.any(), found)
        return [Decision(skip, hold)] * count, skip
    skips, holds = _skip_and_hold(config, (bucket_has & update).any(1), (bucket_has & grad).any(1), found)
    each = [None] * count if holds is None else list(holds.expand(count).unbind(0))
    return [Decision(*pair) for pair in zip(skips.unbind(0), each, strict=True)], skips.any()


def _skip_and_hold(config: Config, update: Tensor, grad: Tensor, found: Tensor | None) -> tuple[Tensor, Tensor | None]:
    skip = update | grad if config.guard == "full" else update
    hold = grad if config.guard == "full" else None
    if found is None:
        return skip, hold
    return skip | found, found if hold is None else hold | found
