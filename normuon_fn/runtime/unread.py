"""A hyperparameter that a plan does not read: said once, at the first step of the plan."""

from __future__ import annotations

from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..types.hyper import Hyper, written_eps


def warn_of_unread(plan: Plan, hyper: Hyper) -> None:
    """Warns where ``adamw_eps`` was written, and Lion is in the place of AdamW."""
    if plan.config.other != "lion" or not isinstance(hyper, Hyper):
        return
    eps = written_eps(hyper)
    if eps is not None:
        warn_at_caller(
            f"hyper: adamw_eps={eps!r} has no effect: Config(other='lion') has signs, which no eps "
            "changes; leave it out of Hyper.of"
        )
