"""The guard against non-finite updates: one decision per step for all ranks, without a host sync.

    flags by matrix  -->  flags by parameter  -->  agreed between ranks  -->  what keeps its bits

The ranks agree once per step, by one all_reduce. With ``guard="full"`` they do it before anything
is written, about gradients, if all who share in a bucket hear of its updates in the messages that
they exchange anyway; otherwise they do it at the end of the step, about gradients and updates
together, and the momentum is written only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..compat import all_reduce_max
from ..types import Guard, GuardScope

Decision = Tensor | None
"""0-d bool: whether something keeps its bits. ``None``: it never does, and there is no select."""


class Guarded(Protocol):
    """A bucket on its way through the step, as far as the guard knows it."""

    hold: Decision  # whether its momentum keeps its bits
    # whether its parameters, their masters, its variances and AdamW moments keep theirs
    skip: Decision

    def bad_gradients(self) -> Tensor:
        """[2, n_matrices] bool before anything is written: updates as far as known, gradients."""

    def bad_updates(self) -> Tensor:
        """[2, n_matrices] bool at the end: update, gradient (if nobody asked before)."""


@dataclass(frozen=True, eq=False)
class Rule:
    """The static half of the guard."""

    mode: Guard
    scope: GuardScope
    # [n_matrices] int64 on the device: the place of its parameter in the plan, bucket by bucket
    parameter_of: Tensor
    # [n_buckets, n_params] bool on the device: which parameters a bucket decides about
    members: Tensor
    group: str | None = None  # the process group whose ranks decide together
    alike: bool = True  # all of them have these parameters
    # All who share a bucket hear of its updates in its messages, or there is nobody else: then an
    # agreement before anything is written is enough.
    early: bool = False

    @property
    def shares_flags(self) -> bool:
        """Whether all ranks of the group have the same flags after a step."""
        return self.group is not None and self.alike and self.mode != "off"

    def by_parameter(self, bad: Sequence[Tensor]) -> Tensor:
        """[2, n_params] int32: whether any matrix of a parameter is bad.

        ``bad``: [2, n] bool per bucket.
        """
        flags = torch.zeros(
            (2, self.members.shape[1]), dtype=torch.int32, device=self.members.device
        )
        if not bad:  # every parameter is frozen
            return flags
        columns = torch.cat(list(bad), 1).to(torch.int32)
        parameter_of = ops.input_for(self.parameter_of).expand(columns.shape)
        return flags.scatter_reduce(1, parameter_of, columns, "amax")


class Agreement:
    """What is known of one step's faults, and what follows from it.

    ``found_inf`` of any rank counts for all of them. It is a further column of the flags when
    these are agreed on; with ``guard="off"`` it is all that is agreed on. So the ranks must either
    all have it or all not.
    """

    def __init__(self, rule: Rule, found_inf: Tensor | None) -> None:
        self.rule = rule
        self.found: Decision = None
        if found_inf is not None:
            self.found = (found_inf > 0).reshape(()).to(rule.members.device)
        joint = rule.group is not None and rule.mode != "off"
        # Whether a momentum keeps its bits for what the agreement says: for what it says of
        # gradients, or of another rank's found_inf.
        decides = rule.mode == "full" or (joint and self.found is not None)
        self.early = decides and rule.early  # agreed on before anything is written
        self.holds_late = decides and not rule.early  # momentums are written after the agreement
        self.at_once = rule.mode == "off"  # no update decides whether it, or another, enters
        self._joint = joint
        self.flags: Tensor | None = (
            None  # [2, n_params] int32, of the parameters that this rank knows
        )
        self.seen: Tensor | None = None  # [2, n_params] or [2, 1] int32: what is decided on

    def before(self, works: Sequence[Guarded]) -> None:
        """Decides about momentums before anything is written, as far as that is known by then."""
        if self.rule.mode == "off" and self.rule.group is not None and self.found is not None:
            self.found = _over_all_ranks(self.found.to(torch.int32), self.rule.group) > 0
        if self.early:
            self._add([work.bad_gradients() for work in works])
        if not self.holds_late:
            self._decide_holds(works)
        if self.at_once:
            for work in works:
                work.skip = self.found

    def after(self, works: Sequence[Guarded]) -> None:
        """Decides about everything else, and about momentums that nobody decided about yet."""
        self._add([work.bad_updates() for work in works])
        if self.holds_late:
            self._decide_holds(works)
        bad = self._bad()
        for work, decision in zip(works, self._by_bucket(bad), strict=True):
            work.skip = decision
        self.skipped = self._any(bad)

    def _add(self, bad: Sequence[Tensor]) -> None:
        """The first flags are agreed on, the one collective; later ones all concerned know."""
        flags, rule = self.rule.by_parameter(bad), self.rule
        if self.flags is None or self.seen is None:
            self.flags = self.seen = flags
            if self._joint and rule.alike:
                self.flags = self.seen = self._agreed(flags)
            elif self._joint:
                self.seen = self._agreed_among_others(flags)
        else:
            self.flags = torch.maximum(self.flags, flags)
            later = flags if rule.alike else flags.amax(1, keepdim=True)
            self.seen = torch.maximum(self.seen, later)

    def _agreed(self, flags: Tensor) -> Tensor:
        """[2, n_params]: the flags of all ranks. ``found_inf`` is one column more."""
        assert self.rule.group is not None
        if self.found is None:
            return _over_all_ranks(flags, self.rule.group)
        found = self.found.to(flags.dtype).expand(2, 1)
        flags = _over_all_ranks(torch.cat([flags, found], 1), self.rule.group)
        self.found = flags[0, -1] > 0
        return flags[:, :-1]

    def _agreed_among_others(self, flags: Tensor) -> Tensor:
        """[2, 1]: of others' parameters a rank knows only whether there is a fault at all.

        The second row is whether momentums keep their bits. Its size does not depend on
        ``found_inf``, which some of these ranks may have and others not.
        """
        assert self.rule.group is not None
        fault = flags.amax(1, keepdim=True)
        if self.found is not None:
            found = self.found.to(flags.dtype).expand(1, 1)
            fault = (
                fault.maximum(found) if self.rule.mode == "full" else torch.cat([fault[:1], found])
            )
        fault = _over_all_ranks(fault, self.rule.group)
        if self.found is not None:
            self.found = fault[1, 0] > 0
        return fault

    def _decide_holds(self, works: Sequence[Guarded]) -> None:
        """Under ``guard="full"`` a momentum keeps its bits if a gradient of it, or any, is bad."""
        bad = None
        if self.rule.mode == "full":
            assert self.seen is not None
            bad = self.seen[1] > 0
        for work, decision in zip(works, self._by_bucket(bad), strict=True):
            work.hold = decision

    def _bad(self) -> Tensor | None:
        """Whose update must not enter: [n_params] or [1] bool. With ``guard="off"`` nobody's."""
        if self.rule.mode == "off":
            return None
        assert self.seen is not None
        bad = self.seen > 0
        return bad.any(0) if self.rule.mode == "full" else bad[0]

    def _by_bucket(self, bad: Tensor | None) -> list[Decision]:
        """One decision per bucket. ``found_inf`` > 0 skips everything, in every mode.

        A bucket is bad if a parameter of it is: a parameter whose splits are in several buckets is
        never updated by half.
        """
        count = self.rule.members.shape[0]
        if bad is None:
            return [self.found] * count
        if self.rule.scope == "step":
            return [self._any(bad)] * count
        each = (ops.input_for(self.rule.members) & bad).any(1)
        return list((each if self.found is None else each | self.found).unbind(0))

    def _any(self, bad: Tensor | None) -> Tensor:
        """0-d bool: whether anything keeps its bits."""
        if bad is None:
            none = torch.zeros((), dtype=torch.bool, device=self.rule.members.device)
            return none if self.found is None else self.found
        return bad.any() if self.found is None else bad.any() | self.found


def _over_all_ranks(flags: Tensor, group: str) -> Tensor:
    return all_reduce_max(flags, group, "the guard's all_reduce")
