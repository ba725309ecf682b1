"""AdamW for what is not a matrix: in the same step, behind the same guard, by the same stages.

Source: arXiv 1711.05101, with the bias correction of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from .state import State
from .weight_decay import rates
from .work import Context, Kind, Members, Runs, Work, complete

STATES = (State("exp_avg", "entry"), State("exp_avg_sq", "entry"))


class AdamWWork(Work):
    """Parameters of one learning rate, of any shapes, updated when the guard has decided."""

    def __init__(self, members: Members[Kind], runs: Runs, context: Context) -> None:
        self.members, self.runs, self.context = members, runs, context
        self.moments: Sequence[list[Tensor]] = ()  # exp_avgs, exp_avg_sqs, grads
        self.bad: Tensor | None = None  # [2, n] bool: non-finite update, non-finite gradient
        if members.tensors:
            first, second = (members.read(state.name) for state in STATES)
            self.moments = first, second, members.read("grad")
            wide, hyper = first[0].dtype, context.hyper
            step, betas = context.adamw_step.double(), (hyper.adamw_beta1, hyper.adamw_beta2)
            corrections = [(1 - beta.double() ** step).to(wide) for beta in betas]
            self.rates = ops.AdamWRates(*betas, hyper.adamw_eps, *corrections)
            self.bad = context.operators.adamw_flags(first, second, self.moments[2], self.rates)

    def bad_gradients(self) -> Tensor:
        """Updates included: they are known by now."""
        bad = complete(self.bad, self.runs, self.context)
        return bad if self.bad is not None else bad.expand(2, -1)

    def bad_updates(self) -> Tensor:
        if self.context.early:  # the guard knows
            return complete(None, self.runs, self.context).expand(2, -1)
        return self.bad_gradients()

    def apply(self) -> None:
        if not self.moments:
            return
        members, kind, context = self.members, self.members.kind, self.context
        hyper, wide = context.hyper, self.moments[0][0].dtype
        lr, decay = rates(hyper.adamw_lr, hyper.adamw_weight_decay, kind.lr_mul, kind.wd_mul, wide)
        params = members.read("param")
        how: tuple[Any, ...] = (*self.moments, lr, decay, self.rates, self.skip)
        names = ["param", *(state.name for state in STATES)]
        new: Sequence[list[Tensor]]
        if kind.master:
            names.insert(1, kind.master)
            new = context.operators.adamw_wide(params, members.read(kind.master), *how)
        else:
            chance = (context.step, members.salts) if members.salts else ()
            new = context.operators.adamw(params, *how, *chance)
        for name, tensors in zip(names, new, strict=True):
            members.put(name, tensors)
