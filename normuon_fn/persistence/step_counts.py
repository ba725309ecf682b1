"""One number of steps for all parameters of a state that another optimizer has counted for each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from ..planning.plan import Plan
from .other_optimizers import Found

_SHOWN = 4


def with_one_count(
    found: Mapping[str, Found], plan: Plan, step: int | None
) -> tuple[dict[str, Found], int]:
    """The state, by parameter, and the number of steps that it is of.

    Where AdamW's parameters have different counts, the moments are multiplied so that the bias
    correction of the one count makes of them what their own correction did.

    Args:
        step: the number to take; ``None``: the largest.

    Raises:
        ValueError: counts differ, and the source does not have the betas.
    """
    adamw = {p.name for p in plan.parameters if p.route.algorithm == "adamw"}
    counts = {name: e.step for name, e in found.items() if name in adamw and e.step is not None}
    if not counts:
        counts = {name: e.step for name, e in found.items() if e.step is not None}
    different = sorted(set(counts.values()))
    if len(different) < 2:
        own = different[0] if different else 0
        return dict(found), own if step is None else step
    total = different[-1] if step is None else step
    others = [name for name in counts if name in adamw and counts[name] != total]
    known = bool(others) and all(found[name].betas is not None for name in others)
    if step is not None and (not known or step == 0):  # as somebody wants it
        return dict(found), step
    if not known:
        raise ValueError(
            f"source: expected one number of steps for all parameters, got {different}; say which "
            "with step="
        )
    if step is None:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        warnings.warn(
            f"source: {', '.join(others[:_SHOWN])}{more} were in fewer steps than others "
            f"({different}); step={total} is taken, and their moments are multiplied so that "
            "AdamW's bias correction gives what it gave. step= sets another number",
            stacklevel=3,
        )
    return {**found, **{name: _as_of(found[name], total) for name in others}}, total


def _as_of(found: Found, total: int) -> Found:
    """Moments of ``found.step`` steps as those of ``total`` steps."""
    assert found.betas is not None and found.step is not None and found.second is not None
    if found.step == 0:  # zeros
        return found
    first, second = ((1 - b**total) / (1 - b**found.step) for b in found.betas)
    return found._replace(first=found.first * first, second=found.second * second)
