"""One step's inputs, and where its new values go: what all stages of step.py share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..types import Grads, Hyper, StepResult, Tensors
from .layout import Block, View, join
from .plan import AdamWBucket, Bucket, Group, Plan


class Run(NamedTuple):
    """What every stage reads, and where it leaves new values: by name, the parts of a tensor with their places in it."""

    params: Tensors
    grads: Grads
    state: Tensors
    hyper: Hyper
    plan: Plan
    found_inf: Tensor | None
    in_place: bool  # new values are written to params and state
    new: dict[str, list[tuple[View | None, Tensor]]]

    @property
    def holds_late(self) -> bool:
        """Whether only the ranks' agreement at the end of the step tells if momentum must keep its bits.

        Where ranks share all matrices, those who own them tell the others about updates, and gradients are agreed about early.
        """
        plan = self.plan
        if plan.config.guard != "full" or plan.guard_group is None:
            return False
        return any(b.exchange is None or b.exchange.group != plan.guard_group for b in plan.buckets)

    def hyper_of(self, of: Bucket | Group | AdamWBucket) -> Hyper:
        """0-d tensors: its own, where the plan has several sets of hyperparameters."""
        return (
            self.hyper
            if self.plan.hypers == 0
            else Hyper(*(values[of.hyper] for values in self.hyper))
        )

    def operators(self, of: Bucket | Group | AdamWBucket) -> ops.Operators:
        """The operators for these parameters, by their device and dtypes."""
        if isinstance(of, AdamWBucket):
            names, moment = of.members, ".exp_avg"
        else:
            groups = of.groups if isinstance(of, Bucket) else (of,)
            names, moment = tuple(name for g in groups for name in g.names), ".momentum"
        dtypes = [x.dtype for n in names for x in (self.params[n], self.state[n + moment])]
        return ops.Operators(ops.kernels_for(self.plan.device, dtypes), self.in_place)

    def grad(self, name: str) -> Tensor:
        grad = self.grads[name]
        assert grad is not None  # the parameters without one were left out before
        return grad

    def no_flags(self, kinds: int, count: int) -> Tensor:
        return torch.zeros((kinds, count), dtype=torch.bool, device=self.plan.device)

    def read(self, blocks: Sequence[Block], suffix: str) -> list[Tensor]:
        """A view [rows, cols] or [count, rows, cols] for each block."""
        if suffix == ".grad":
            return [block.param.read(self.grad(block.name), writable=False) for block in blocks]
        source = self.state if suffix else self.params
        return [block.view(suffix).read(source[block.name + suffix]) for block in blocks]

    def put(self, blocks: Sequence[Block], suffix: str, parts: list[Tensor]) -> None:
        for block, part in zip(blocks, parts, strict=True):
            self.new.setdefault(block.name + suffix, []).append((block.view(suffix), part))

    def chances(self, salts: Sequence[int]) -> tuple[Tensor, list[int]] | tuple[()]:
        """What tells how to round by chance; nothing where that is not asked for."""
        return (self.state["guard.step"], list(salts)) if salts else ()

    def rates(
        self,
        group: Group | AdamWBucket,
        lr: Tensor,
        weight_decay: Tensor,
        dtype: torch.dtype,
        power: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """``(lr, decay)`` in the dtype of the arithmetic: the learning rate, and by what share a parameter decays."""
        lr, weight_decay = lr.to(dtype) * group.lr_mul, weight_decay.to(dtype)
        return lr, (lr * lr if power == 2 else lr) * weight_decay * group.wd_mul

    def result(self, flags: Tensor, skipped: Tensor) -> StepResult:
        if self.in_place:
            return StepResult(dict(self.params), dict(self.state), flags, skipped)
        return StepResult(
            {name: self._joined(name, old) for name, old in self.params.items()},
            {name: self._joined(name, old) for name, old in self.state.items()},
            flags,
            skipped,
        )

    def _joined(self, name: str, old: Tensor) -> Tensor:
        parts = self.new.get(name)
        return old if parts is None else join(parts)
