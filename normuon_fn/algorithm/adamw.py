"""AdamW for what is not a matrix: in the same step, behind the same guard, by the same stages.

Source: arXiv 1711.05101, with the bias correction of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .guard import Decision
from .metrics import SUMS
from .norms import completed, matrix_sums
from .state import State
from .weight_decay import rates
from .work import Context, Kind, Members, Runs, Work, complete

STATES = (State("exp_avg", "entry"), State("exp_avg_sq", "entry"))


class AdamWWork(Work):
    """Parameters of one learning rate, of any shapes, updated when the guard has decided."""

    states: tuple[State, ...] = STATES

    def __init__(self, members: Members[Kind], runs: Runs, context: Context) -> None:
        self.members, self.runs, self.context = members, runs, context
        self.moments: Sequence[list[Tensor]] = ()  # exp_avgs, exp_avg_sqs, grads
        self.norms: Tensor | None = None  # with Config(metrics=True), after `apply`: see metrics.py
        self.bad: Tensor | None = None  # [2, n] bool: non-finite update, non-finite gradient
        if members.tensors:
            first, second = (members.read(state.name) for state in STATES)
            self.moments = first, second, members.read("grad")
            wide, hyper = first[0].dtype, members.rates.hyper
            step, betas = context.adamw_step.double(), (hyper.adamw_beta1, hyper.adamw_beta2)
            if members.rates.missed is not None:
                step = (step - members.rates.missed).clamp(min=1)
            corrections = [(1 - beta.double() ** step).to(wide) for beta in betas]
            found = ops.AdamWRates(*betas, hyper.adamw_eps, *corrections)
            lr, decay = rates(hyper.adamw_lr, hyper.adamw_weight_decay, *members.rates[1:3], wide)
            if max(x.ndim for x in (lr, decay, *found)):  # one of them differs: all are [n]
                count = members.tensors
                lr, decay = lr.expand(count).contiguous(), decay.expand(count).contiguous()
                found = ops.AdamWRates(*(x.expand(count).contiguous() for x in found))
            self.rates, self.lr, self.decay = found, lr, decay
            self.bad = context.operators.adamw_flags(first, second, self.moments[2], self.rates)
            self.look_at_float16()

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
        names = ["param", *(state.name for state in self.states)]
        if self.members.kind.master:
            names.insert(1, self.members.kind.master)
        new = (
            self._measured()
            if self.context.config.metrics
            else self._new(self.context.operators, self.skip)
        )
        for name, tensors in zip(names, new, strict=True):
            self.members.put(name, tensors)

    def _new(self, operators: ops.Operators, skip: Decision) -> Sequence[list[Tensor]]:
        """New parameters, masters if there are any, and moments."""
        members, kind, context = self.members, self.members.kind, self.context
        params = members.read("param")
        how: tuple[Any, ...] = (*self.moments, self.lr, self.decay, self.rates, skip)
        if kind.master:
            return operators.adamw_wide(params, members.read(kind.master), *how)
        chance = (context.step, members.salts) if members.salts else ()
        return operators.adamw(params, *how, *chance)

    def _measured(self) -> Sequence[list[Tensor]]:
        """The same, and the norms that it finds on its way."""
        members, master, context = self.members, self.members.kind.master, self.context
        chance = (context.step, members.salts) if members.salts else ()
        new, self.norms = ops.measured.adamw(
            context.operators, members.read("param"), members.read(master) if master else None,
            self.moments, self.lr, self.decay, self.rates, self.skip, *chance,
        )  # fmt: skip
        return new

    def sums(self) -> Tensor:
        found = None
        if self.norms is not None:
            none = self.norms.new_zeros((3, self.norms.shape[1]), dtype=torch.float64)
            found = matrix_sums(self.norms[:2], self.norms[2:], none)
        return completed(found, len(SUMS), self.runs, self.context)

    def look_at_float16(self) -> None:
        """Behind a guard, updates that float16 cannot hold are bad too: one more pass for them."""
        bad, param = self.bad, self.members.read("param")[0]
        if bad is None or self.context.config.guard == "off" or param.dtype != torch.float16:
            return
        params = self._new(ops.Operators(self.context.operators.kernels, False), None)[0]
        self.bad = torch.stack([bad[0] | ~ops.all_finite(params), bad[1]])
