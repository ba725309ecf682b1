"""AdamW over a list of tensors of any shapes, and what of it would not be finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .registration import empty_like, register


def _flags_fake(grads: list[Tensor], *rest: Any) -> Tensor:
    return grads[0].new_empty((2, len(grads)), dtype=torch.bool)


def _adamw_fake(
    params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return empty_like(params), empty_like(exp_avgs), empty_like(exp_avg_sqs)


adamw_flags, _ = register(
    "adamw_flags",
    "(Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor beta1, Tensor beta2, Tensor eps, Tensor step) -> Tensor",
    reference.adamw_flags,
    _flags_fake,
)
adamw, adamw_ = register(
    "adamw",
    "(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads, Tensor lr, Tensor decay, "
    "Tensor beta1, Tensor beta2, Tensor eps, Tensor step, Tensor? skip) -> (Tensor[], Tensor[], Tensor[])",
    reference.adamw,
    _adamw_fake,
    writes=("params", "exp_avgs", "exp_avg_sqs"),
)
