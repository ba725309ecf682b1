"""One bucket of matrices on its way through the step. `MatrixWork` is the way on one device; read it top to bottom.

advance         momentum
orthogonalize   to norm 1, precondition, Newton-Schulz, normalize
relay, receive  nothing here: messages of matrices that ranks share (distributed/shared.py)
apply           weight decay and update; or everything keeps its bits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import Measures
from ..types import Config, Hyper
from .coefficients import CoefficientSet
from .guard import Decision
from .momentum import keeps_momentum_finite
from .normalize import Normalized, normalize
from .orthogonalize import Form, carry, iterate, to_norm
from .stages import Stages
from .weight_decay import rates

# ---------------------------------------------------------------------- what a bucket is made of


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the parameters of one group have in common."""

    lr_mul: float
    wd_mul: float
    master: str = ""  # the state that makes float32 masters of them: "mantissa", "master" or none


@dataclass(frozen=True, kw_only=True)
class MatrixKind(Kind):
    """The same of matrices, which are one stack for everything but the orthogonalization."""

    rows: int
    cols: int
    transposed: bool = False  # the outputs are the columns

    @property
    def tall(self) -> bool:
        return self.rows > self.cols


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What the groups of one bucket have in common: tall matrices transposed, they are one stack [n, rows, cols]."""

    rows: int  # rows <= cols
    cols: int
    form: Form
    coefficients: CoefficientSet


K = TypeVar("K", bound=Kind, covariant=True)


@dataclass(frozen=True)
class Members(Generic[K]):
    """The tensors of one group in this step. Whose they are, only ``read`` and ``put`` know."""

    kind: K
    count: int  # of matrices
    tensors: (
        int  # that these are in: each is one matrix [rows, cols] or several [count, rows, cols]
    )
    read: Callable[[str], list[Tensor]]  # "param", "grad", or the name of a state
    put: Callable[[str, list[Tensor]], None]  # new ones in their place
    salts: list[int]  # one per matrix, where parameters are rounded by chance
    local: bool = True  # False: none of their entries is on this rank


class Context(NamedTuple):
    """What all works of a step share."""

    config: Config
    stages: Stages
    hyper: Hyper  # 0-d tensors
    writes: ops.Writes
    step: Tensor  # 0-d int32, the number of steps so far: rounding by chance depends on it
    adamw_step: Tensor  # 0-d int32, the number of this step for the bias correction of AdamW
    early: bool  # the guard agrees about gradients before anything is written
    holds_late: bool  # only the agreement at the end of the step tells if momentums keep their bits


Runs = Sequence[
    tuple[bool, int]
]  # of a bucket's matrices in order: do they take part here, how many


def complete(
    flags: Tensor | None,  # [..., n] bool, of the matrices that take part; None: none does
    runs: Runs,
    context: Context,
) -> Tensor:
    """[..., n_matrices]: False for the matrices that take no part in this step on this rank."""
    if flags is not None and all(here for here, _ in runs):
        return flags
    lead = () if flags is None else flags.shape[:-1]
    found, at = [], 0
    for here, count in runs:
        if here and flags is not None:
            found.append(flags[..., at : at + count])
            at += count
        else:
            none = torch.zeros((*lead, count), dtype=torch.bool, device=context.step.device)
            found.append(none)
    return torch.cat(found, -1)


class Work:
    """The stages of the step, of which a bucket may leave any out. `guard.Agreement` sets ``hold`` and ``skip``."""

    hold: Decision = None
    skip: Decision = None

    def bad_gradients(self) -> Tensor:
        """See `guard.Guarded`."""
        raise NotImplementedError

    def bad_updates(self) -> Tensor:
        """See `guard.Guarded`."""
        raise NotImplementedError

    def advance(self) -> None:
        """The new momentum, and messages that can set out by then."""

    def orthogonalize(self) -> None:
        """The update of every matrix that this rank orthogonalizes."""

    def relay(self) -> None:
        """Updates to other replicas."""

    def receive(self) -> None:
        """Updates from other ranks."""

    def apply(self) -> None:
        """New parameters, or the old ones."""


# -------------------------------------------------------------------------------- on one device


class Front(NamedTuple):
    """What is to be orthogonalized, and what it takes to bring it to norm 1."""

    groups: list[Members[MatrixKind]]
    sizes: list[int]  # how many tensors each group has
    momentums: list[
        Tensor
    ]  # the new ones, of all groups in order; with `Context.holds_late` still the old ones
    grads: list[Tensor]
    measures: Measures  # see ops/advance.py
    stacks: list[Tensor] | None = (
        None  # the momentums as one stack per group, where `advance` has them anyway
    )


class Update(NamedTuple):
    """One group before the guard decides: its parameters change by ``-lr * factor * update``."""

    group: Members[MatrixKind]
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    old: tuple[Tensor, ...]  # states of the normalize stage
    new: tuple[Tensor, ...]
    finite: Tensor  # [n] bool


class MatrixWork(Work):
    """A bucket whose matrices are whole on this rank, and nobody else's work."""

    def __init__(
        self, stack: Stack, groups: list[Members[MatrixKind]], runs: Runs, context: Context
    ) -> None:
        self.stack, self.groups, self.runs, self.context = stack, groups, runs, context
        self.sizes = [group.tensors for group in groups]
        self.front: Front | None = None
        self.updates: list[Update] = []

    # ------------------------------------------------------------------------------- for the guard

    def bad_gradients(self) -> Tensor:
        """A non-finite gradient makes a non-finite update, even where the momentum keeps its bits."""
        grads = [group.read("grad") for group in self.groups]
        largest = (
            ops.largest([x for part in grads for x in part], [*map(len, grads)]) if grads else None
        )
        return self._bad_by(largest).expand(2, -1)

    def bad_updates(self) -> Tensor:
        found = [update.finite for update in self.updates]
        return self.with_gradients(
            complete(~torch.cat(found) if found else None, self.runs, self.context)
        )

    def with_gradients(self, update: Tensor) -> Tensor:
        """[2, n_matrices] bool from [n_matrices] bool."""
        if self.front is None or self.context.early:
            return torch.stack([update, torch.zeros_like(update)])
        grad = self._bad_by(self.front.measures[0])
        return torch.stack([update | grad, grad])

    def _bad_by(self, largest: Tensor | None) -> Tensor:
        """[n_matrices] bool: whether gradients with these largest entries are bad for the momentum."""
        if largest is None:
            return complete(None, self.runs, self.context)
        fine = keeps_momentum_finite(largest, self.context.hyper.momentum, self.context.config)
        return complete(~fine, self.runs, self.context)

    # ------------------------------------------------------------------------------------ momentum

    def advance(self) -> None:
        if not self.groups:
            return
        momentums, grads = self._read("momentum"), self._read("grad")
        if self.context.holds_late:
            measures = ops.lookahead(momentums, grads, self.context.hyper.momentum, *self._rule())
            self.front = Front(self.groups, self.sizes, momentums, grads, measures)
        else:
            self.front = self._advanced(momentums, grads)

    def _advanced(self, momentums: list[Tensor], grads: list[Tensor]) -> Front:
        beta, advance = self.context.hyper.momentum, self.context.writes.advance
        new, measures, stacks = advance(momentums, grads, beta, self.hold, *self._rule())
        at = 0
        for group in self.groups:
            group.put("momentum", new[at : at + group.tensors])
            at += group.tensors
        return Front(self.groups, self.sizes, new, grads, measures, stacks)

    def _rule(self) -> tuple[list[int], str, bool]:
        """The same for every operator that knows of momentum."""
        form = self.context.stages.momentum.operator_form
        return self.sizes, form, self.context.config.nesterov

    def _read(self, name: str) -> list[Tensor]:
        return [x for group in self.groups for x in group.read(name)]

    # ------------------------------------------------------------------------------- orthogonalize

    def orthogonalize(self) -> None:
        """As one stack [n, rows <= cols]; cut into groups again, and tall ones transposed back."""
        if self.front is None:
            return
        parts = self.iterated(self.to_norm_1(self.front)).split(
            [g.count for g in self.front.groups]
        )
        for group, part in zip(self.front.groups, parts, strict=True):
            update = part.mT if group.kind.tall else part
            old = tuple(ops.stack(group.read(s.name)) for s in self.context.stages.normalize.states)
            found = self.normalized(group.kind, update, old)
            self.updates.append(
                Update(group, update, found.factor, old, found.states, found.finite)
            )

    def to_norm_1(self, front: Front) -> Tensor:
        """[n, rows <= cols], times `carry`."""
        _, power, squares = front.measures
        if self.context.config.orthogonalizer is not None:
            power = inverse = torch.ones_like(power)
        else:
            inverse = to_norm(squares, self.stack.coefficients, self.stack.form.dtype)
        return self.gathered(front, power, inverse)

    def gathered(self, front: Front, power: Tensor, inverse: Tensor) -> Tensor:
        """One stack of what is orthogonalized, ``(x * power) * inverse`` in the dtype of the products."""
        context = self.context
        _, form, nesterov = self._rule()
        dtype = power.dtype if context.config.orthogonalizer else self.stack.form.dtype
        tall = [group.kind.tall for group in front.groups]
        return ops.gather(
            front.momentums, front.grads, context.hyper.momentum, power, inverse, front.sizes, form,
            nesterov, context.holds_late, dtype, tall, stacks=front.stacks,
        )  # fmt: skip

    def iterated(self, stack: Tensor) -> Tensor:
        """Orthogonalized, by Newton-Schulz or the caller's own function."""
        own, rows, cols = self.context.config.orthogonalizer, self.stack.rows, self.stack.cols
        stack = self.context.stages.precondition.function(stack)
        whole = (
            iterate(stack, self.stack.coefficients, self.stack.form) if own is None else own(stack)
        )
        if whole.shape[1:] != (rows, cols):
            raise ValueError(
                f"Config.orthogonalizer: expected [n, {rows}, {cols}], got {tuple(whole.shape)}; it "
                "must return a stack of the shape that it was given"
            )
        return whole

    def normalized(self, kind: MatrixKind, update: Tensor, states: tuple[Tensor, ...]) -> Normalized:
        config = self.context.config
        carried = 1.0 if config.orthogonalizer else carry(self.stack.form.dtype)
        beta2 = self.context.hyper.beta2
        return normalize(update, states, beta2, config, carried, kind.transposed)

    # --------------------------------------------------------------------------------------- apply

    def apply(self) -> None:
        if self.front is not None and self.context.holds_late:
            self._advanced(self.front.momentums, self.front.grads)
        for update in self.updates:
            self._apply(update)

    def _apply(self, update: Update) -> None:
        if update.group.local:
            self._apply_to_parameters(update)
        stages, writes = self.context.stages, self.context.writes
        for state, old, new in zip(stages.normalize.states, update.old, update.new, strict=True):
            kept = new if self.skip is None else torch.where(self.skip, old, new)
            update.group.put(state.name, writes.unstack(update.group.read(state.name), kept))

    def _apply_to_parameters(self, update: Update) -> None:
        group, kind, hyper, config = (
            update.group,
            update.group.kind,
            self.context.hyper,
            self.context.config,
        )
        lr, decay = rates(
            hyper.lr, hyper.weight_decay, kind.lr_mul, kind.wd_mul, update.factor.dtype,
            config.weight_decay_lr_power,
        )  # fmt: skip
        cautious = self.context.stages.weight_decay.cautious
        how = (update.update, update.factor * lr, decay, self.skip, cautious)
        params, writes = group.read("param"), self.context.writes
        if kind.master:
            params, masters = writes.apply_wide(params, group.read(kind.master), *how)
            group.put(kind.master, masters)
        elif group.salts:
            params = writes.apply(params, *how, self.context.step, group.salts)
        else:
            params = writes.apply(params, *how)
        group.put("param", params)
