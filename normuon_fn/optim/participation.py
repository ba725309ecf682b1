"""Which steps AdamW's parameters took part in: into the plan of a step, and into what is saved."""

from __future__ import annotations

from ..compat import outside_inference_mode
from ..runtime.graphed import GraphedStep
from .planned import Chosen, PlannedStep, Planner
from .state import States


@outside_inference_mode
def with_missed_steps(
    planner: Planner, chosen: Chosen, planned: PlannedStep, states: States, begun: set[str]
) -> PlannedStep:
    """The planned step of the chosen parameters, which counts the steps that each has missed.

    It is planned anew where it did not count them so far. ``begun``: who was stepped before.
    """
    own, missed = _of_adamw(planner), planner.missed
    late = own & planned.params.keys() - begun if begun or missed.counts else set()
    missed.follow(planned.accepted, late, own & begun - planned.params.keys())
    names = frozenset(own & planned.params.keys() & missed.counts.keys())
    if names != planned.missed:
        planned.release()
        before, planned = planned, planner.plan(chosen, states, begun, names)
        planned.stepped, planned.counted = before.stepped, before.counted
        planned.graphed = before.graphed and GraphedStep(planned.plan)
        planner.steps[chosen] = planned
    rates = planned.plan.own_rates
    if rates is not None and rates.missed is not None:
        rates.missed.copy_(missed.of(planned.plan.missed, rates.missed.device))
    missed.planned = planned
    return planned


def missed_so_far(planner: Planner, states: States, begun: set[str]) -> dict[str, int]:
    """How many steps AdamW's parameters have missed. Waits for the device if any has."""
    named, missed = planner.named, planner.missed
    own = {name for name in _of_adamw(planner) & named.keys() if states.get(named[name])}
    if not own or not (missed.counts or missed.absent or (begun and own - begun)):
        return {}
    kinds = states[named[next(iter(own))]]
    skipped = 0 if planner.config.guard_scope == "bucket" else kinds["skipped"]
    return missed.saved(kinds["step"] - skipped, begun, own)


def _of_adamw(planner: Planner) -> set[str]:
    """The parameters whose moments have a bias correction."""
    if planner.config.other != "adamw":
        return set()
    return {name for name, d in planner.decisions.items() if d.route.algorithm == "adamw"}
