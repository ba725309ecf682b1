"""``Config(replicas="share")`` in an optimizer: what a rank takes of a state, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..algorithm.momentum import MOMENTUM, SCALE
from ..persistence.gathered import gather_state
from ..planning.momentum_codes import fitted
from ..planning.plan import Plan
from .state import States

Kinds = Mapping[str, Any]  # of one parameter


def taking(plans: Mapping[str, Plan]) -> Callable[[str, Kinds], Kinds]:
    """By name and saved state, what of it this rank keeps, with the momentum as its plan keeps it.

    ``plans``: by parameter; they may be added later.
    """

    def taken(name: str, saved: Kinds) -> Kinds:
        if name not in plans:
            return saved
        away = plans[name].owned.elsewhere
        lacks = {kind for kind in saved if f"{name}.{kind}" in away}
        if MOMENTUM.name in lacks:  # codes have a scale, which a plan of floats does not know
            lacks.add(SCALE.name)
        return fitted(plans[name], name, {k: x for k, x in saved.items() if k not in lacks})

    return taken


def gathered(
    states: States, steps: Iterable[tuple[Plan, dict[str, Tensor], dict[str, Tensor]]]
) -> dict[Any, dict[str, Any]]:
    """``optimizer.state`` with copies of what other ranks own: a collective of the replicas.

    ``steps``: plans, parameters and state, together of all parameters that have state.
    """
    found = {p: dict(kinds) for p, kinds in states.items()}
    done: set[str] = set()
    for plan, params, state in steps:
        new = [name for name in plan.owned.owners if name not in done]
        if plan.owned.group is not None and new:
            whole = gather_state(state, plan)
            for name in new:
                kept = {kind: whole[f"{name}.{kind}"] for kind in plan.owned.kinds}
                found[params[name]].update(kept)
        done.update(new)
    return found
