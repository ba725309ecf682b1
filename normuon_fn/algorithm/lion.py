"""Lion for what is not a matrix, in the place of AdamW: half its state, and one sign per entry.

It takes AdamW's hyperparameters: ``adamw_lr``, ``adamw_betas``, ``adamw_weight_decay``.

Source: arXiv 2302.06675, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..types import Other
from .adamw import STATES, AdamWWork
from .guard import Decision
from .state import State
from .weight_decay import rates
from .work import Context, Kind, Members, Runs


class LionWork(AdamWWork):
    """Parameters of one learning rate, of any shapes, updated when the guard has decided."""

    states = (State("exp_avg", "entry"),)

    def __init__(self, members: Members[Kind], runs: Runs, context: Context) -> None:
        self.members, self.runs, self.context = members, runs, context
        self.moments, self.bad, self.norms = (), None, None
        if not members.tensors:
            return
        averages, grads = members.read("exp_avg"), members.read("grad")
        self.moments = averages, grads
        wide, hyper = averages[0].dtype, members.rates.hyper
        lr, decay = rates(hyper.adamw_lr, hyper.adamw_weight_decay, *members.rates[1:3], wide)
        self.numbers: Sequence[Tensor] = (lr, decay, hyper.adamw_beta1, hyper.adamw_beta2)
        if any(x.ndim for x in self.numbers):  # one of them differs: all are [n]
            self.numbers = [x.expand(members.tensors).contiguous() for x in self.numbers]
        bad = ~ops.all_finite(grads)
        self.bad = torch.stack([bad | ~ops.all_finite(averages), bad])
        self.look_at_float16()

    def _new(self, operators: ops.Operators, skip: Decision) -> Sequence[list[Tensor]]:
        members, context = self.members, self.context
        params = members.read("param")
        how = (*self.moments, *self.numbers, skip)
        found: Sequence[list[Tensor]]
        if members.kind.master:
            run = ops.lion_wide_ if operators.in_place else ops.lion_wide
            found = run(params, members.read(members.kind.master), *how)
        else:
            chance = (context.step, members.salts) if members.salts else ()
            run = ops.lion_ if operators.in_place else ops.lion
            found = run(params, *how, *chance)
        return found

    def _measured(self) -> Sequence[list[Tensor]]:
        members, master, context = self.members, self.members.kind.master, self.context
        chance = (context.step, members.salts) if members.salts else ()
        new, self.norms = ops.measured.lion(
            context.operators, members.read("param"), members.read(master) if master else None,
            (*self.moments, *self.numbers, self.skip), *chance,
        )  # fmt: skip
        return new


class OtherRule(NamedTuple):
    """One entry of `OTHERS`."""

    work: type[AdamWWork]
    states: tuple[State, ...]
    source: str


# What updates the parameters that routes give to AdamW: `Config.other`.
OTHERS: dict[Other, OtherRule] = {
    "adamw": OtherRule(AdamWWork, STATES, "arXiv 1711.05101"),
    "lion": OtherRule(LionWork, LionWork.states, "arXiv 2302.06675"),
}
