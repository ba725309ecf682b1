"""Planned steps: one for each set of parameters that an optimizer's groups have gradients for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import compress
from typing import Any

import torch

from ..compat import Ranks, outside_inference_mode
from ..compat.collection import without_collection
from ..distributed import placements
from ..planning.before_ranks import asks_for_ranks
from ..planning.common import agree_on_gradients, common_of
from ..planning.deciding import Alone, alone_doubt, checked_ranks
from ..planning.hyperball import check_sizes
from ..planning.make_plan import plan_of
from ..planning.memory import check_each_writable
from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..runtime.graphed import GraphedStep
from ..runtime.recent import MANY, Recent
from ..types import Config
from .groups import AddedGroup, fingerprint_of, names_of
from .hyper import GroupHyper, Groups
from .missed_steps import MissedSteps
from .new_parameters import notes_of
from .planned_step import PlannedStep
from .rate_watch import RateWatch, to_watch
from .saved import Saved
from .shared_state import gathered, taking
from .state import COUNTERS, States, collect, load

Chosen = tuple[bool, ...]  # by parameter: whether a step is planned for it


class Planner:
    """The parameters of the groups by name, and their planned steps; a change makes another."""

    def __init__(
        self,
        groups: Groups,
        added: Sequence[AddedGroup],
        config: Config,
        mesh: Ranks | Alone | None,
        guard_mesh: Ranks | None,
        owners: dict[str, int],  # see planning/replicas.py; planners of one optimizer go on with it
    ) -> None:
        self.owners = owners
        self.fingerprint = fingerprint_of(groups)
        self.named, self.group_of = names_of(added)
        self.decisions = {
            name: found for group in added for name, found in (group.decisions or {}).items()
        }
        self.config, self._mesh, self._guard_mesh = config, mesh, guard_mesh
        params = list(self.named.values())
        device = placements.local(params[0]).device if params else torch.device("cpu")
        self.hyper = GroupHyper(groups, 1 + max(self.group_of.values(), default=0), device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.steps: Recent[Chosen, PlannedStep] = Recent(dropped=PlannedStep.release)
        self._sets = 0  # of gradients that a step was begun with
        self._had_gradients: set[str] | None = None
        self._watch: RateWatch | None = None
        self._chosen: Chosen | None = None  # what the ranks have agreed on
        self._alike: bool | None = None  # whether the ranks of guard_mesh have the same parameters
        self.before_ranks = False  # whether the optimizer was made before the process group
        self.offloaded = False  # whether state stays where it is: see offloading.py
        self.missed = MissedSteps()  # of the optimizer, which other planners go on with

    @without_collection
    def prepare(
        self, states: States, begun: set[str], offloaded: bool, before: Sequence[Any]
    ) -> None:
        """Plans for all parameters that require a gradient, which makes their state.

        ``before``: the fingerprint of the planner in whose place it is.
        """
        self.offloaded = offloaded
        if self.config.master == "none":
            self._watch = to_watch(self.named, begun, before)
        chosen = tuple(p.requires_grad for p in self.named.values())
        if any(chosen):
            self.steps[chosen] = self.plan(chosen, states, begun)

    def follow(self, groups: Groups, planned: PlannedStep) -> None:
        """Writes the groups' values into `hyper`; says once if 16-bit parameters cannot move.

        Raises:
            TypeError, ValueError: as `GroupHyper.follow`.
        """
        self.hyper.follow(groups)
        if self._watch is not None and self._watch.settled(groups, planned.plan, planned.params):
            self._watch = None

    def warn_if_alone(self) -> None:
        """Warns where this rank decides alone what its guard skips, and probably should not."""
        for planned in self.steps.values():
            doubt = alone_doubt(planned.plan, self._mesh, self._guard_mesh)
            if doubt:
                warn_at_caller(doubt)

    def agree(self, chosen: Chosen) -> None:
        """Checks that ranks which share parameters have gradients for the same ones.

        A collective of hosts, at the first step and whenever the set is new.

        Raises:
            ValueError: as `agree_on_gradients`.
        """
        if chosen != self._chosen:
            before = None if self._chosen is None else self._lacking(self._chosen)
            agree_on_gradients(self.common, self._lacking(chosen), before)
            self._chosen = chosen

    def _lacking(self, chosen: Chosen) -> set[str]:
        return {name for name, is_in in zip(self.named, chosen, strict=True) if not is_in}

    @cached_property
    def common(self) -> dict[str, tuple[str, ...]]:
        """By process group, the parameters that its ranks share. See planning/common.py."""
        layouts = {name: placements.sharded_layout(name, p) for name, p in self.named.items()}
        copies = checked_ranks(self._mesh, self._guard_mesh)
        rule = next((step.plan.guard for step in self.steps.values()), None)
        return common_of(layouts, copies, rule, self._guard_mesh)

    def first(
        self, chosen: Chosen, states: States, begun: set[str], *, late: str, graphed: bool
    ) -> PlannedStep:
        """The planned step for a set of parameters that was not stepped before.

        Raises:
            ValueError: ``late`` is "error" and a parameter has its first gradient now; or the step
                is to be ``graphed`` and is not on a CUDA device.
        """
        names = {*compress(self.named, chosen)}
        had = names if self._had_gradients is None else self._had_gradients
        new = [name for name in self.named if name in names - had]
        if new and late == "error":
            raise ValueError(
                f"{new[:8]}: first gradient after the first step, which means another plan and "
                "another compilation. Pass zeros as gradients from the start, freeze the parameter "
                "(requires_grad_(False)), or write late_gradients='replan'"
            )
        planned = self.steps.get(chosen)
        if planned is None:
            planned = self.plan(chosen, states, begun)
        else:
            check_sizes(planned.plan, planned.params)  # weights may have been loaded since
            self.collect(planned, states, begun)
        if graphed:
            _check_device(planned.plan.device, GraphedStep._device_type)
            planned.graphed = GraphedStep(planned.plan)
        self._had_gradients = names | had
        self.steps[chosen] = planned
        self._sets += not planned.counted  # a step that was refused comes here again
        planned.counted = True
        if self._sets == MANY:
            self.steps.warn_of_sets("NorMuon")
        return planned

    @cached_property
    def of_adamw(self) -> set[str]:
        """The parameters whose moments have a bias correction."""
        if self.config.other != "adamw":
            return set()
        return {name for name, d in self.decisions.items() if d.route.algorithm == "adamw"}

    def counting(self, names: Iterable[str]) -> frozenset[str]:
        """Whose missed steps a plan of these parameters counts: of all if any has missed some.

        So a set of parameters is planned anew once at most.
        """
        own = self.of_adamw.intersection(names)
        return frozenset(own if own & self.missed.counts.keys() else ())

    @outside_inference_mode
    def plan(self, chosen: Chosen, states: States, begun: set[str]) -> PlannedStep:
        """A planned step for the chosen parameters, with its state. It is not remembered here."""
        params = dict(compress(self.named.items(), chosen))
        devices = {str(placements.local(p).device): name for name, p in params.items()}
        if len(devices) > 1:
            raise ValueError(
                f"params: expected one device, got {devices}; make one optimizer per device"
            )
        check_each_writable({"params": params})
        plan = plan_of(
            params,
            self.decisions,
            self.config,
            self._mesh,
            self._guard_mesh,
            self.group_of if self.hyper.several else None,
            self._alike,
            self.owners,
            missed := self.counting(params),
        )
        if self.before_ranks and asks_for_ranks(self.config) and plan.guard.group is None:
            plan = replace(plan, before_ranks=True)  # its ranks may have come since
        if lines := notes_of(self.named, chosen, self._had_gradients or set()):
            plan = replace(plan, notes=(*plan.notes, *lines))
        self._alike = plan.guard.alike
        for ranks in plan.shared_by:
            placements.check_alike(plan.summary(ranks), ranks)
        check_sizes(plan, params)
        places = [k for k, is_in in enumerate(chosen) if is_in]
        planned = PlannedStep(plan, places, params, missed=missed)
        self.collect(planned, states, begun)
        return planned

    def load(self, states: States, begun: set[str], saved: Saved, missed: MissedSteps) -> set[str]:
        """Writes a saved state into ``optimizer.state`` (see `state.load`).

        Returns the names of the parameters that were stepped, as far as that is known now.
        ``missed`` takes the place of the counts that there are.
        """
        before, self.missed = self.missed, missed
        try:
            return self._load(states, begun, saved)
        except BaseException:
            self.missed = before
            raise

    def _load(self, states: States, begun: set[str], saved: Saved) -> set[str]:
        plans: dict[str, Plan] = {}
        kinds = partial(self.kinds, states=states, begun=begun, plan_of=plans)
        load(states, self.named, saved.states, kinds, taking(plans))
        states.update(saved.others)
        for planned in self.steps.values():
            self.collect(planned, states, begun)
        step = next((states[p]["step"] for p in self.named.values() if p in states), 0)
        return {name for name in (self.named if step > 0 else begun) if saved.states[name]}

    @torch.no_grad()
    def gathered(self, states: States, begun: set[str]) -> dict[Any, dict[str, Any]]:
        """``optimizer.state`` with copies of what other ranks own: a collective of the replicas."""
        if self.config.replicas == "each":
            return {p: dict(kinds) for p, kinds in states.items()}
        chosen = tuple([bool(states.get(p)) for p in self.named.values()])
        steps = self.planned_for(chosen, states, begun)
        return gathered(states, [(step.plan, step.params, step.state) for step in steps])

    def planned_for(self, chosen: Chosen, states: States, begun: set[str]) -> list[PlannedStep]:
        """All planned steps, and one more for chosen parameters that are in none of them.

        So it is with what was frozen when the optimizer was made, or made its plans anew, and with
        what is only in steps that were forgotten. The state of all of them is complete then.
        """
        found = [*self.steps.values()]
        for planned in found:
            self.collect(planned, states, begun)
        names = {name for planned in found for name in planned.params}
        rest = tuple(
            is_in and name not in names for name, is_in in zip(self.named, chosen, strict=True)
        )
        return [*found, self.plan(rest, states, begun)] if any(rest) else found

    def kinds(
        self, chosen: Chosen, states: States, begun: set[str], plan_of: dict[str, Plan]
    ) -> dict[str, set[str]]:
        """By name, the kinds of state that a step of the chosen parameters reads.

        Their state is complete then, and their plans are in ``plan_of``. The guard's counters
        belong to every parameter.
        """
        plans = [planned.plan for planned in self.planned_for(chosen, states, begun)]
        plan_of.update({p.name: plan for plan in plans for p in plan.parameters})
        found = {name: set(COUNTERS) for name in self.named}
        for key in [key for plan in plans for key in plan.state]:
            name, _, kind = key.rpartition(".")
            if name in found:
                found[name].add(kind)
        return found

    def collect(self, planned: PlannedStep, states: States, begun: set[str]) -> None:
        """Takes a planned step's state from ``optimizer.state``, the owner (see state.py).

        All planned steps have the same counters.
        """
        known: Any = next((step.state for step in self.steps.values()), {})
        stays = self.offloaded
        planned.state = collect(
            states, planned.plan, planned.params, known, begun, self.missed, stays=stays
        )
        planned.collected = [(p, [*states[p].items()]) for p in planned.params.values()]

    def release(self) -> None:
        """Frees the graphs that were captured."""
        for planned in self.steps.values():
            planned.release()


def _check_device(device: torch.device, expected: str) -> None:
    if device.type != expected:
        raise ValueError(
            f"graphed=True: expected parameters on a {expected.upper()} device, got {device}; "
            "leave out graphed=True, the step is the same without it"
        )
