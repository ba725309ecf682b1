"""The guard against non-finite updates: from one finite flag a matrix to one decision, without a host sync.

finite [n_matrices]  --flags-->  [2, n_params] int32  --decide-->  what keeps its bits
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..compat import all_reduce_max
from ..types import Config


def flags(bad: Tensor, matrix_of: Tensor) -> Tensor:
    """Flags by parameter, [k, n_params] int32, from flags by matrix.

    Args:
        bad: [k, n_matrices + 1] bool: non-finite update, non-finite gradient; the last column is False.
        matrix_of: [n_params, most] int64, the columns of ``bad`` that are a parameter's, filled up with any of its own.
    """
    return bad[:, matrix_of].any(-1).to(torch.int32)


class Agreed(NamedTuple):
    flags: Tensor  # [2, n_params] int32, of the parameters that this rank knows
    seen: Tensor  # [2, k] int32: what is decided on


def agree(flags: Tensor, group: str | None, alike: bool) -> Agreed:
    """The flags of all ranks, by maximum: the one collective of the step. Nothing at all without a group.

    ``alike``: the ranks have the same parameters. Otherwise each knows its own flags, and of the others' only whether there are
    any.
    """
    if group is None:
        return Agreed(flags, flags)
    if alike:
        flags = all_reduce_max(flags, group)
        return Agreed(flags, flags)
    return Agreed(flags, all_reduce_max(flags.amax(1, keepdim=True), group))


Decision = Tensor | None
"""0-d bool: what keeps its bits. ``None`` where nothing ever does: the graph then has no select at all."""


def holds(
    config: Config, bad_grad: Tensor | None, bucket_has: Tensor, found_inf: Tensor | None
) -> list[Decision]:
    """Whether each bucket's momentum keeps its bits: under ``guard="full"``, if a gradient of it (or of any) is not finite."""
    if config.guard != "full":
        return [_found(found_inf)] * bucket_has.shape[0]
    assert bad_grad is not None
    return _by_bucket(config, bad_grad, bucket_has, _found(found_inf))


def decide(
    config: Config,
    flags: Tensor,  # [2, n_params] int32, agreed; or [2, 1], see `agree`
    bucket_has: Tensor,  # [n_buckets, n_params] bool
    found_inf: Tensor | None,
) -> tuple[list[Decision], Tensor]:
    """Whether each bucket's parameters, variances and AdamW moments keep their bits, and whether any of them does.

    A bucket is bad if a parameter of it is: one whose splits lie in several buckets is never updated by half. ``found_inf`` > 0
    skips everything, in every mode.
    """
    count, found = bucket_has.shape[0], _found(found_inf)
    if config.guard == "off":
        skipped = torch.zeros((), dtype=torch.bool, device=flags.device) if found is None else found
        return [found] * count, skipped
    bad = flags > 0
    bad = bad.any(0) if config.guard == "full" else bad[0]
    return _by_bucket(
        config, bad, bucket_has, found
    ), bad.any() if found is None else bad.any() | found


def _by_bucket(
    config: Config, bad: Tensor, bucket_has: Tensor, found: Tensor | None
) -> list[Decision]:
    count = bucket_has.shape[0]
    if config.guard_scope == "step":
        each = bad.any() if found is None else bad.any() | found
        return [each] * count
    each = (bucket_has & bad).any(1)
    return list((each if found is None else each | found).unbind(0))


def _found(found_inf: Tensor | None) -> Decision:
    return None if found_inf is None else (found_inf > 0).reshape(())
