"""AdamW's moments that begin in the middle of a run, where that makes first updates too large.

The bias correction counts the accepted steps of all parameters. A parameter that is unfrozen or
added later, or whose saved state was left out, begins with moments of zeros all the same, which are
taken for averages over all of those steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..routing.doubts import warn_at_caller
from .planned import PlannedStep, Planner

_SHOWN, _MUCH = 4, 1.25


def largest_update(betas: Sequence[float], step: int) -> float:
    """By how many rates a gradient that stays the same moves an entry of such a parameter at most.

    It should be by 1. The moments of k steps are corrected as if they were of ``step + k - 1``.
    """
    b1, b2 = betas
    shares = [
        ((1 - b1**k) / (1 - b1 ** (step + k - 1)), (1 - b2**k) / (1 - b2 ** (step + k - 1)))
        for k in range(1, 100)
    ]
    return float(max(mean / square**0.5 for mean, square in shares))


def warn_of_late_moments(
    planner: Planner,
    planned: PlannedStep,
    fresh: Collection[str],  # parameters of this step that were not stepped before
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Says once per parameter that its moments begin late, and what to write. Reads the count of
    steps, which waits for the device.
    """
    late = [name for name in planned.params if name in fresh]
    late = [name for name in late if f"{name}.exp_avg_sq" in planned.state]
    if not late:
        return
    counts = [int(planned.state[f"guard.{kind}"]) for kind in ("step", "skipped")]
    step = counts[0] - counts[1] + 1
    of_group = [tuple(map(float, group["adamw_betas"])) for group in groups]  # or tensors
    betas = {name: of_group[planner.group_of.get(name, 0)] for name in late}
    sizes = {name: largest_update(betas[name], step) for name in late}
    large = [name for name in late if sizes[name] > _MUCH]
    if not large:
        return
    name = max(large, key=lambda name: sizes[name])
    more = f" and {len(large) - _SHOWN} more" if len(large) > _SHOWN else ""
    warn_at_caller(
        f"adamw_betas: the moments of {', '.join(large[:_SHOWN])}{more} begin at step {step}, and "
        f"AdamW's bias correction counts the steps of all parameters: with {betas[name]} "
        f"the first updates are up to {sizes[name]:.1f} times what they should be, for "
        f"{1 / (1 - betas[name][1]):.0f} steps or so. Write adamw_betas=(0.9, 0.95), with which "
        f"they are not, or nm.Route(lr_mul={1 / sizes[name]:.2g}) for these parameters"
    )
