"""Weight decay: by what share of itself a parameter shrinks, and in which of its entries.

    decoupled   W <- (1 - lr wd) W - lr U
    cautious    the same, but only in entries where U W >= 0: decay never works against the update
    hyperball   none: every matrix keeps its Frobenius norm. With R = |W|, the step is
                W <- R (W - lr R U / |U|) / |W - lr R U / |U||, so lr is relative to the matrix

One pass over memory does it together with the update: the operators ``apply`` and ``apply_wide`` of
ops/.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import DecayForm


@dataclass(frozen=True)
class WeightDecay:
    """One entry of `WEIGHT_DECAYS`."""

    cautious: bool  # as the operators ``apply`` and ``apply_wide`` call it
    source: str


WEIGHT_DECAYS: dict[DecayForm, WeightDecay] = {
    "decoupled": WeightDecay(False, "arXiv 1711.05101 (AdamW); arXiv 2510.05491, Algorithm 1"),
    "cautious": WeightDecay(True, "KellerJordan/modded-nanogpt train_gpt.py, f411b3d3"),
    "hyperball": WeightDecay(False, "arXiv 2606.16899; Emerging-Optimizers muon_hyperball.py"),
}


def rates(
    lr: Tensor,  # 0-d or [n]
    weight_decay: Tensor,  # 0-d or [n]
    lr_mul: float | Tensor,  # a number or [n]
    wd_mul: float | Tensor,  # a number or [n]
    dtype: torch.dtype,
    lr_power: int = 1,
) -> tuple[Tensor, Tensor]:
    """``(lr, decay)``: the learning rate, and the share by which a parameter decays.

    ``lr_power`` 2 makes that share lr^2 wd (KellerJordan/modded-nanogpt).
    """
    lr_mul, wd_mul = (x.to(dtype) if isinstance(x, Tensor) else x for x in (lr_mul, wd_mul))
    lr, weight_decay = lr.to(dtype) * lr_mul, weight_decay.to(dtype)
    return lr, (lr * lr if lr_power == 2 else lr) * weight_decay * wd_mul
