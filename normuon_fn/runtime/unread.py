"""What a plan does not read, a hyperparameter or a gradient: said once, at its first step."""

from __future__ import annotations

from typing import Any

from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..routing.routes import NO_GRADIENT
from ..types.hyper import Hyper, written_eps

_SHOWN = 8


def warn_of_frozen(plan: Plan, grads: Any) -> None:
    """Warns of gradients for parameters that required none when the plan was made."""
    if not isinstance(grads, dict):
        return
    frozen = [p.name for p in plan.parameters if p.reason == NO_GRADIENT]
    names = [name for name in frozen if grads.get(name) is not None]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(map(repr, names[:_SHOWN])) + more
        warn_at_caller(
            f"grads: has gradients for {shown}, which the plan does not move, because they did not "
            "require a gradient when it was made. To train them, make the plan again after "
            "requires_grad_(True), with state for them from nm.init; if they stay frozen, pass None"
        )


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
