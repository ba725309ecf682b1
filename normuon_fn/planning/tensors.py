"""The tensors of one step: where its buckets find their matrices, and where new ones go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..algorithm.guard import Agreement
from ..algorithm.momentum import SCALE
from ..algorithm.stages import Stages
from ..algorithm.streamed import Conveyor, Piece
from ..algorithm.work import Context, Kind, Members, Own, OwnRates, Rates, Runs
from ..types import Config, Grads, Hyper, Tensors
from .layout import Block, View, join
from .streaming import pieces

K = TypeVar("K", bound=Kind)


class Entries(NamedTuple):
    """Entries of params, grads or state that are one list of matrices, or of whole parameters."""

    what: str  # "param", "grad", or the name of a state
    keys: tuple[str, ...]
    views: tuple[View, ...] | None  # how each is read as matrices; None: all as they are
    # Of a state in host memory where its new values are written: itself if the step is in place.
    places: bool = False

    def read(self, source: Grads) -> list[Any]:
        """Views of the entries; of tensors with odd strides copies."""
        found: list[Any] = [source[key] for key in self.keys]
        if self.views is not None:
            found = [view.read(x) for view, x in zip(self.views, found, strict=True)]
        if self.what == "grad" and len({grad.dtype for grad in found}) > 1:
            return [grad.float() for grad in found]  # a list has one dtype
        return found

    def write_back(self, source: Tensors, parts: Sequence[Tensor]) -> None:
        """Copies to its place what `read` copied, and what has changed since."""
        if self.views is None:
            return
        for key, view, part in zip(self.keys, self.views, parts, strict=True):
            if not view.is_view(source[key]):
                view.write(source[key], part)


class Dicts(Protocol):
    """Where the tensors of a step are: in the dicts of its caller, or outside of a graph."""

    state: Tensors  # at least the guard's counters
    in_place: bool

    def of_bucket(self, bucket: int) -> Dicts:
        """The same for one bucket, which shares no entries with others."""

    def has_gradient(self, name: str) -> bool: ...

    def read(self, entries: Entries) -> list[Tensor]: ...

    def put(self, entries: Entries, tensors: list[Tensor]) -> None:
        """New ones in the place of ``entries``, which are none of `Entries.places`."""

    def count(self, counters: Tensors) -> None:
        """The guard's counters after this step."""


class CallersDicts:
    """What a step was given, and what it has made so far. Of DTensors the local parts."""

    def __init__(self, params: Tensors, grads: Grads, state: Tensors, *, in_place: bool) -> None:
        self.params, self.grads, self.state, self.in_place = params, grads, state, in_place
        # by key: parts, and their places
        self.new: dict[str, list[tuple[View | None, Tensor]]] = {}
        self.places: dict[str, Tensor] = {}  # new memory of the host, whole: see `Entries.places`

    def of_bucket(self, bucket: int) -> CallersDicts:
        return self

    def has_gradient(self, name: str) -> bool:
        return self.grads[name] is not None

    def read(self, entries: Entries) -> list[Tensor]:
        if entries.places and not self.in_place:
            for key in dict.fromkeys(entries.keys):
                if key not in self.places:
                    (self.places[key],) = ops.staging.stage_like([self.state[key]])
            return entries.read(self.places)
        return entries.read(self._source(entries.what))

    def put(self, entries: Entries, tensors: list[Tensor]) -> None:
        if self.in_place:
            entries.write_back(self._source(entries.what), tensors)
            return
        views = entries.views or (None,) * len(entries.keys)
        for key, view, tensor in zip(entries.keys, views, tensors, strict=True):
            self.new.setdefault(key, []).append((view, tensor))

    def count(self, counters: Tensors) -> None:
        for key, value in counters.items():
            if self.in_place:
                self.state[key].copy_(value)
            else:
                self.new[key] = [(None, value)]

    def _source(self, what: str) -> Any:
        return {"param": self.params, "grad": self.grads}.get(what, self.state)

    def after(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(params, state)`` after the step, in the order of the keys that came in."""
        if self.in_place:
            return dict(self.params), dict(self.state)
        params, state = (
            {k: self._joined(k, x) for k, x in d.items()} for d in (self.params, self.state)
        )
        return params, state

    def _joined(self, key: str, old: Tensor) -> Tensor:
        if key in self.places:
            return self.places[key]
        parts = self.new.get(key)
        return old if parts is None else _laid_out_as(old, join(parts))


class StepTensors:
    """The tensors of one step, as its buckets ask for them."""

    def __init__(
        self,
        dicts: Dicts,
        hyper: Hyper,
        *,
        hypers: int,
        own: OwnRates | None,
        config: Config,
        stages: Stages,
        agreement: Agreement,
        conveyor: Conveyor | None = None,
    ) -> None:
        self.conveyor = conveyor  # of momentums in host memory
        self.dicts, self.hyper, self.hypers, self.own = dicts, hyper, hypers, own
        self.config, self.stages, self.agreement = config, stages, agreement
        self.lines = {state.name for state in stages.line_states}

    def of_bucket(self, bucket: int) -> StepTensors:
        """The same for one bucket."""
        return StepTensors(
            self.dicts.of_bucket(bucket), self.hyper, hypers=self.hypers, own=self.own,
            config=self.config, stages=self.stages, agreement=self.agreement,
            conveyor=self.conveyor,
        )  # fmt: skip

    def rates(self, own: Own) -> Rates:
        """The hyperparameters that a whole group shares."""
        hyper = self.hyper
        if self.hypers:
            hyper = Hyper(*(values[own.hyper] for values in hyper))
        return Rates(hyper, own.lr_mul, own.wd_mul)

    def own_rates(self, start: int, runs: Runs) -> Rates:
        """Each its own: of those from ``start`` on in the plan's table that have a gradient."""
        assert self.own is not None
        parts = []
        for here, count in runs:
            if here:
                parts.append(slice(start, start + count))
            start += count
        parts = joined_slices(parts) or [slice(0)]

        def rows_of(x: Tensor) -> Tensor:
            return torch.cat([ops.input_for(x)[part] for part in parts])

        index, lr_mul, wd_mul = map(rows_of, self.own[:3])
        missed = None if self.own.missed is None else rows_of(self.own.missed)
        hyper = Hyper(*(values[index] for values in self.hyper)) if self.hypers else self.hyper
        return Rates(hyper, lr_mul, wd_mul, missed)

    def context(self, hyper: Hyper, kernels: bool = False) -> Context:
        """What the works of a step share, and the hyperparameters of one of them."""
        step = self.dicts.state["guard.step"]
        # The bias correction and rounding by chance count accepted steps: a skipped one leaves no
        # trace. With the guard's scope a bucket, the skips of other buckets must not count, so all
        # steps do.
        count = step + 1
        if self.config.guard_scope == "step":
            skipped = self.dicts.state["guard.skipped"]
            count, step = count - skipped, step - skipped
        return Context(
            config=self.config,
            stages=self.stages,
            hyper=hyper,
            operators=ops.Operators(kernels, self.dicts.in_place),
            step=step,
            adamw_step=count,
            early=self.agreement.early,
            holds_late=self.agreement.holds_late,
            at_once=self.agreement.at_once,
        )

    def has_gradient(self, name: str) -> bool:
        return self.dicts.has_gradient(name)

    def members(
        self, kind: K, blocks: Sequence[Block], rates: Rates, local: bool = True
    ) -> Members[K]:
        """The blocks of a group that have a gradient."""
        blocks = [block for block in blocks if self.has_gradient(block.name)]

        def entries(what: str) -> Entries:
            views = tuple(self._view(block, what) for block in blocks)
            keys = tuple(_key(block.name, what) for block in blocks)
            return Entries(what, keys, None if all(view.is_whole for view in views) else views)

        count = sum(block.count for block in blocks)
        salts = [salt for block in blocks for salt in block.salts]
        return self._members(kind, count, len(blocks), entries, salts, rates, local)

    def pieces(self, kind: K, blocks: Sequence[Block], rates: Rates, start: int) -> Iterator[Piece]:
        """The same in pieces for the conveyor. ``start``: the place of the first in the bucket."""
        assert self.conveyor is not None
        for each in pieces(blocks, self.conveyor.size):
            part = slice(start, start + sum(block.count for block in each))
            members: Any = self.members(kind, each, rates.part(part))
            yield Piece(members, part, each[0].staged > 0)
            start = part.stop

    def _view(self, block: Block, what: str) -> View:
        """How a state's entry is read for the matrices of a block."""
        if what == SCALE.name:
            return block.scale
        return block.line if what in self.lines else block.param

    def whole_members(
        self, kind: K, names: Sequence[str], salts: Sequence[int], rates: Rates
    ) -> Members[K]:
        """Whole parameters of any shapes: those of ``names`` that have a gradient."""
        own = [name for name in names if self.has_gradient(name)]

        def entries(what: str) -> Entries:
            return Entries(what, tuple(_key(name, what) for name in own), None)

        drawn = [salt for name, salt in zip(names, salts, strict=False) if self.has_gradient(name)]
        return self._members(kind, len(own), len(own), entries, drawn, rates)

    def _members(
        self,
        kind: K,
        count: int,
        tensors: int,
        entries: Callable[[str], Entries],
        salts: list[int],
        rates: Rates,
        local: bool = True,
    ) -> Members[K]:
        def read(what: str) -> list[Tensor]:
            return self.dicts.read(entries(what))

        def places(what: str) -> list[Tensor]:
            found = entries(what)
            return self.dicts.read(found if self.dicts.in_place else found._replace(places=True))

        def put(what: str, new: list[Tensor]) -> None:
            self.dicts.put(entries(what), new)

        return Members(kind, count, tensors, read, put, places, salts, rates, local)


def joined_slices(parts: Sequence[slice]) -> list[slice]:
    """The same, with neighbours as one."""
    found: list[slice] = []
    for part in parts:
        if found and found[-1].stop == part.start:
            found[-1] = slice(found[-1].start, part.stop)
        else:
            found.append(part)
    return found


def _laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with the strides of ``old``, so that the next step meets the same graph."""
    if old.is_contiguous() or new.stride() == old.stride():
        return new
    return torch.empty_like(old).copy_(new)


def _key(name: str, what: str) -> str:
    """In ``params`` or ``grads``, or in ``state``."""
    return name if what in ("param", "grad") else f"{name}.{what}"
