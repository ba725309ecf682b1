"""How an optimizer is saved and loaded: the methods of `NorMuon` that say ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..compat.graphs import outside_graphs
from ..routing.doubts import is_called_by, warn_at_caller
from ..types import Config
from . import hyper as hyper_of
from . import saved as saved_of
from .foreign import refuse_foreign
from .groups import AddedGroup
from .missed_steps import MissedSteps
from .offloading import wait_for_copies_sync
from .participation import missed_so_far
from .planned import Planner
from .saved_meaning import check_meaning, check_shapes, missed_steps_of, routes_of, write_forms
from .state import States


class SavedOptimizer(torch.optim.Optimizer):
    """What `NorMuon` inherits: it has the groups and the state, and this reads and writes them."""

    _begun: set[str]
    _added: list[AddedGroup]
    _missed: MissedSteps
    _told_part = False
    config: Config

    def _settled(self) -> Planner:
        raise NotImplementedError

    @outside_graphs()
    def state_dict(self) -> dict[str, Any]:
        """As for every optimizer, with hyperparameters as plain numbers and no tensor twice.

        With ``Config(replicas="share")`` it has what this rank owns: see `gathered_state_dict`.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        planner = self._settled()
        wait_for_copies_sync(planner)
        self._say_if_a_part(planner)
        return self._packed(planner, self.state)

    def _say_if_a_part(self, planner: Planner) -> None:
        """Says once that other ranks own state which is not in a `state_dict`."""
        away = any(step.plan.owned.elsewhere for step in planner.steps.values())
        if away and not self._told_part and not is_called_by("torch/distributed/checkpoint"):
            self._told_part = True
            warn_at_caller(
                "state_dict: with Config(replicas='share') it has what this rank owns, no more. "
                "For a file of one rank write optimizer.gathered_state_dict(), which all ranks "
                "call; or save with torch.distributed.checkpoint. This is said once"
            )

    @outside_graphs()
    def gathered_state_dict(self) -> dict[str, Any]:
        """A `state_dict` of all ranks, with ``Config(replicas="share")``: all of them call it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        planner = self._settled()
        return self._packed(planner, planner.gathered(self.state, self._begun))

    def _packed(self, planner: Planner, states: States) -> dict[str, Any]:
        missed = missed_so_far(planner, self.state, self._begun)
        write_forms(self.param_groups, self._added, self.config, missed)
        packed = saved_of.pack(self.param_groups, states)
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    @outside_graphs()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies a `state_dict` into this optimizer's tensors, whose dtypes stay.

        Parameters are found by name (but for wrappers' prefixes) if both sides have names, and by
        order otherwise. A group takes the values that its parameters had. A parameter without
        saved state, because it was frozen, starts anew. What others added to ``optimizer.state``
        comes back too. Nothing is written if anything does not fit. Options that differ from those
        of the saved optimizer and do not touch the state (guard, coefficients, ...) cause a
        warning; a momentum of int8 becomes one of floats, and the reverse.

        Raises:
            ValueError, TypeError: other names, groups, algorithms or values, or a state of another
                kind or shape, or of another meaning (``momentum_form``, ``reduction``, heads, ...);
                naming the parameter, the group or the option.
        """
        saved: Any = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = hook(self, saved) or saved
        planner = self._settled()
        wait_for_copies_sync(planner)
        refuse_foreign(saved, planner.named, self.state)
        found = saved_of.read(saved, self.param_groups, planner.named, planner.group_of)
        check_shapes(found, planner.named)
        routes = routes_of(self._added)
        check_meaning(found, saved["param_groups"], self.config, routes)
        missed = MissedSteps(missed_steps_of(found, saved["param_groups"], routes))
        write_values = hyper_of.loading(self.param_groups, found.groups)
        self._begun = planner.load(self.state, self._begun, found, missed)
        self._missed = missed
        write_values()
        planner.hyper.written_rates.remember(self.param_groups)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
