"""The tensors of one step: where its buckets find their matrices, and where new ones go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import ops
from ..algorithm.guard import Agreement
from ..algorithm.stages import Stages
from ..algorithm.work import Context, Kind, Members
from ..types import Config, Grads, Hyper, Tensors
from .layout import Block, View, join

K = TypeVar("K", bound=Kind)


class StepTensors:
    """What a step was given, and what it has made so far. Of DTensors the local parts."""

    def __init__(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        *,
        hypers: int,
        config: Config,
        stages: Stages,
        agreement: Agreement,
        in_place: bool,
    ) -> None:
        self.params, self.grads, self.state, self.hyper = params, grads, state, hyper
        self.hypers, self.config, self.stages, self.agreement = hypers, config, stages, agreement
        self.in_place = in_place
        self.lines = {state.name for state in stages.line_states}
        self.new: dict[
            str, list[tuple[View | None, Tensor]]
        ] = {}  # by key: parts, and their places

    def context(self, hyper: int, kernels: bool = False) -> Context:
        """What the works of a step share. ``hyper``: which entry of `Hyper`'s tensors."""
        own = self.hyper if self.hypers == 0 else Hyper(*(values[hyper] for values in self.hyper))
        step = self.state["guard.step"]
        # The bias correction and rounding by chance count accepted steps: a skipped one leaves no
        # trace. With the guard's scope a bucket, the skips of other buckets must not count, so all
        # steps do.
        count = step + 1
        if self.config.guard_scope == "step":
            skipped = self.state["guard.skipped"]
            count, step = count - skipped, step - skipped
        return Context(
            config=self.config,
            stages=self.stages,
            hyper=own,
            operators=ops.Operators(kernels, self.in_place),
            step=step,
            adamw_step=count,
            early=self.agreement.early,
            holds_late=self.agreement.holds_late,
        )

    def has_gradient(self, name: str) -> bool:
        return self.grads[name] is not None

    def members(self, kind: K, blocks: Sequence[Block], local: bool = True) -> Members[K]:
        """The blocks of a group that have a gradient."""
        blocks = [block for block in blocks if self.has_gradient(block.name)]

        def read(what: str) -> list[Tensor]:
            found = [self._read(block, what) for block in blocks]
            if what == "grad" and len({grad.dtype for grad in found}) > 1:
                return [grad.float() for grad in found]  # a list has one dtype
            return found

        def put(what: str, tensors: list[Tensor]) -> None:
            for block, tensor in zip(blocks, tensors, strict=True):
                view = block.line if what in self.lines else block.param
                self.new.setdefault(_key(block.name, what), []).append((view, tensor))
                if self.in_place and not view.is_view(self._source(block.name, what)):
                    view.write(self._source(block.name, what), tensor)

        count = sum(block.count for block in blocks)
        salts = [salt for block in blocks for salt in block.salts]
        return Members(kind, count, len(blocks), read, put, salts, local)

    def whole_members(self, kind: K, names: Sequence[str], salts: Sequence[int]) -> Members[K]:
        """Whole parameters of any shapes: those of ``names`` that have a gradient."""
        own = [name for name in names if self.has_gradient(name)]

        def read(what: str) -> list[Tensor]:
            return [self._source(name, what) for name in own]

        def put(what: str, tensors: list[Tensor]) -> None:
            for name, tensor in zip(own, tensors, strict=True):
                self.new[_key(name, what)] = [(None, tensor)]

        drawn = [salt for name, salt in zip(names, salts, strict=False) if self.has_gradient(name)]
        return Members(kind, len(own), len(own), read, put, drawn)

    def _read(self, block: Block, what: str) -> Tensor:
        """A view [rows, cols] or [count, rows, cols]; of a tensor with odd strides a copy."""
        view = block.line if what in self.lines else block.param
        return view.read(self._source(block.name, what))

    def _source(self, name: str, what: str) -> Tensor:
        if what == "grad":
            grad = self.grads[name]
            assert grad is not None  # the parameters without one were left out before
            return grad
        return self.params[name] if what == "param" else self.state[_key(name, what)]

    def count(self, counters: Tensors) -> None:
        """Counters of the guard."""
        for key, value in counters.items():
            self.new[key] = [(None, value)]
            if self.in_place:
                self.state[key].copy_(value)

    def after(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(params, state)`` after the step, in the order of the keys that came in."""
        if self.in_place:
            return dict(self.params), dict(self.state)
        params, state = (
            {k: self._joined(k, x) for k, x in d.items()} for d in (self.params, self.state)
        )
        return params, state

    def _joined(self, key: str, old: Tensor) -> Tensor:
        parts = self.new.get(key)
        return old if parts is None else _laid_out_as(old, join(parts))


def _laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with the strides of ``old``, so that the next step meets the same graph."""
    if old.is_contiguous() or new.stride() == old.stride():
        return new
    return torch.empty_like(old).copy_(new)


def _key(name: str, what: str) -> str:
    """In ``params`` or in ``state``."""
    return name if what == "param" else f"{name}.{what}"
