"""Which steps AdamW's parameters took part in: into the plan of a step, and into what is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import outside_inference_mode
from ..runtime.graphed import GraphedStep
from .planned import Chosen, Planner
from .planned_step import PlannedStep
from .state import States


@outside_inference_mode
def with_missed_steps(
    planner: Planner, chosen: Chosen, planned: PlannedStep, states: States, begun: set[str]
) -> PlannedStep:
    """The planned step of the chosen parameters, which counts the steps that each has missed.

    It is planned anew where it did not count them so far. ``begun``: who was stepped before.
    """
    own, missed, here = planner.of_adamw, planner.missed, planned.params.keys()
    late: set[str] = set()
    if begun or missed.counts_anything:
        late = missed.new_among(_second_moments(planner, states, own & here))
    missed.follow(planned.accepted, late, own & begun - here)
    if planner.counting(here) != planned.missed:
        planned.release()
        before, planned = planned, planner.plan(chosen, states, begun)
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
    missed, seconds = planner.missed, _second_moments(planner, states, planner.of_adamw)
    some_new = missed.has_new(seconds) and (begun or missed.counts_anything)
    if not seconds or not (missed.counts or missed.absent or some_new):
        return {}
    kinds = states[planner.named[next(iter(seconds))]]
    step, skipped = (_as_tensor(kinds[kind]) for kind in ("step", "skipped"))
    accepted = step.clone() if planner.config.guard_scope == "bucket" else step - skipped
    return missed.saved(accepted, seconds)


def _as_tensor(count: Any) -> Tensor:
    """A counter, in whose place somebody may have put a number."""
    if isinstance(count, Tensor):
        return count
    return torch.tensor(count, dtype=torch.int32, device="cpu")


def _second_moments(planner: Planner, states: States, names: set[str]) -> dict[str, Tensor]:
    """Of those parameters that have any."""
    found = {name: states.get(p, {}) for name, p in planner.named.items() if name in names}
    return {name: kinds["exp_avg_sq"] for name, kinds in found.items() if "exp_avg_sq" in kinds}
