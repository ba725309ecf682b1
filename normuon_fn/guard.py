"""The guard against non-finite updates: from one finite flag a matrix to one decision, without a host sync.

finite [n_matrices]  --flags-->  [2, n_params] int32  --decide-->  what keeps its bits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


def decide(config: Config, bad: Tensor, sizes: Sequence[int], found_inf: Tensor | None) -> tuple[list[Decision], Tensor]:
    """What ``bad`` means under ``config.guard``, for each of the buckets that own ``sizes`` of its columns; whether any skips.

    ``found_inf`` > 0 skips everything, in every mode.
    """
    found = None if found_inf is None else (found_inf > 0).reshape(())
    if config.guard == "off":
        skipped = torch.zeros((), dtype=torch.bool, device=bad.device) if found is None else found
        return [Decision(found, found)] * len(sizes), skipped
    if config.guard_scope == "step":
        skip, hold = _skip_and_hold(config, bad, found)
        return [Decision(skip, hold)] * len(sizes), skip
    pairs = [_skip_and_hold(config, part, found) for part in bad[:, : sum(sizes)].split(list(sizes), 1)]
    return [Decision(*pair) for pair in pairs], torch.stack([skip for skip, _ in pairs]).any()


def _skip_and_hold(config: Config, bad: Tensor, found: Tensor | None) -> tuple[Tensor, Tensor | None]:
    update, grad = bad[0].any(), bad[1].any()
    skip = update | grad if config.guard == "full" else update
    hold = grad if config.guard == "full" else None
    if found is None:
        return skip, hold
    return skip | found, found if hold is None else hold | found
