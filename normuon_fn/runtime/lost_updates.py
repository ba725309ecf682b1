"""Whether most entries of 16-bit parameters are too coarse for their updates: said once, at the
first step.

    sample of the entries, read once -> the learning rate that each needs -> compared on the host
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..algorithm.normalize import SCALES
from ..compat import observers
from ..distributed.placements import local
from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..types import Config
from ..types.hyper import Hyper, peaks_of

_SAMPLE = 1024  # entries per parameter: the share of them is right within 3 %
# Of an update per unit of lr; AdamW's is usually 0.2 to 0.4 (arXiv 2502.16982, section 2.2).
OTHER_RMS = {"adamw": 0.4, "lion": 1.0}


class Kind(NamedTuple):
    """Entries of one rule and between the same two powers of two."""

    needed: float  # the learning rate from which on the RMS of their updates is half a step
    of_adamw: bool


@dataclass(frozen=True)
class Coarseness:
    """How coarse the parameters of one entry of `Hyper` are; numbers on the host."""

    entries: Counter[Kind]  # how many there are of each kind
    dtypes: set[torch.dtype]

    def doubt(self, lr: float, adamw_lr: float) -> str | None:
        """The text of a warning if these rates lose the updates of most entries.

        An update is taken as normal: rounding to nearest loses what is under half a step.
        """
        total = lost = moved = 0.0
        for (needed, of_adamw), count in self.entries.items():
            rate = adamw_lr if of_adamw else lr
            if rate > 0:
                total += count
                lost += count * (rate < needed)
                moved += count * math.erfc(needed / rate / math.sqrt(2))
        if lost <= 0.5 * total:
            return None
        master = "fp32" if torch.float16 in self.dtypes else "mantissa"
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        rates = f"lr={lr:g}" + (f" (adamw_lr={adamw_lr:g})" if adamw_lr != lr else "")
        return (
            f"{rates} with {kinds} parameters and Config.master='none': for {lost / total:.0%} of "
            "the entries an update is less than half a step between two numbers of that dtype, "
            f"and only about {moved / total:.1%} of all entries move at a step. Write "
            f"Config(master={master!r}), which keeps such updates"
        )


def coarseness_of(
    plan: Plan, params: Mapping[str, Tensor], names: Collection[str] | None = None
) -> dict[int, Coarseness]:
    """By entry of `Hyper`: how coarse 16-bit parameters without a master are; reads the device.

    ``names`` are the parameters that count, ``None`` stands for all. Empty where nothing is that
    coarse, or where there are no values to read: on the meta device or inside a capture.
    """
    if plan.config.master != "none" or plan.device.type == "meta":
        return {}
    if plan.device.type == "cuda" and observers.is_capturing(plan.device):
        return {}
    chosen = [
        p
        for p in plan.parameters
        if p.spec.dtype.itemsize < 4
        and p.route.algorithm != "frozen"
        and (names is None or p.name in names)
        and all(p.spec.shape)
    ]
    flat = [local(params[p.name]).detach().flatten() for p in chosen]
    # An odd stride, so that a sample is not one column of a matrix of 2^k columns.
    samples = [x[:: len(x) // _SAMPLE | 1] for x in flat]
    exponents = torch.frexp(torch.cat([x.float() for x in samples]))[1].tolist() if flat else []
    rms, found, at = _rms_of_matrices(plan), dict[int, Coarseness](), 0
    for p, whole, sample in zip(chosen, flat, samples, strict=True):
        of_adamw, kind = p.route.algorithm == "adamw", torch.finfo(p.spec.dtype)
        per_lr = (
            OTHER_RMS[plan.config.other] if of_adamw else rms.get(p.name, plan.config.rms)
        ) * p.route.lr_mul
        each = found.setdefault(p.hyper, Coarseness(Counter(), set()))
        each.dtypes.add(p.spec.dtype)
        for exponent, count in Counter(exponents[at : at + len(sample)]).items():
            half = max(2.0 ** (exponent - 1), kind.smallest_normal) * kind.eps / 2
            needed = half / per_lr if per_lr else math.inf
            each.entries[Kind(needed, of_adamw)] += count * len(whole) // len(sample)
        at += len(sample)
    return found


def _rms_of_matrices(plan: Plan) -> dict[str, float]:
    """The RMS of an entry's update per unit of lr, by parameter; see `normalize`."""
    return {
        name: _rms(plan.config, *((g.cols, g.rows) if g.transposed else (g.rows, g.cols)))
        for bucket in plan.buckets
        for g in bucket.groups
        for name in g.names
    }


def _rms(config: Config, outputs: int, inputs: int) -> float:
    if config.scale == "paper":
        return config.rms
    keeps_norm = config.renormalize or not config.normalize  # that of an orthogonal matrix
    return SCALES[config.scale](config, outputs, inputs) * (
        max(outputs, inputs) ** -0.5 if keeps_norm else 1.0
    )


def warn_of_lost_updates(plan: Plan, params: Mapping[str, Tensor], hyper: Hyper) -> None:
    """Warns if the peak rates that `Hyper.of` was given are too small for 16-bit parameters.

    Nothing is said about a Hyper whose peaks are not known. For the first step of a plan: it waits
    for the device.
    """
    try:
        lr, adamw_lr = peaks_of(hyper)
        found = coarseness_of(plan, params) if lr and adamw_lr else {}
        doubts = [each.doubt(lr[k], adamw_lr[k]) for k, each in found.items()]
    except Exception:  # whatever is wrong with the arguments, the step says it in plain words
        return
    for text in filter(None, doubts):
        warn_at_caller(text)
