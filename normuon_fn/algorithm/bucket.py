"""A bucket of matrices on its way through the step, whole on this rank and nobody else's work.

    advance         momentum
    orthogonalize   to norm 1, precondition, Newton-Schulz, normalize
    apply           weight decay and update; or everything keeps its bits

Read `MatrixWork` from top to bottom. What matrices that ranks share need: distributed/shared.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from . import finishing
from .momentum import SCALE, keeps_momentum_finite
from .normalize import Normalized, normalize
from .norms import Norms
from .orthogonalize import carry, iterate, to_norm
from .precondition import PRECONDITIONERS, gathered_wide, preconditioned
from .updates import Front, Update
from .weight_decay import WEIGHT_DECAYS, rates
from .work import Context, MatrixKind, Members, Runs, Stack, Work, complete


class MatrixWork(Work):
    """A bucket whose matrices are whole on this rank, and nobody else's work."""

    def __init__(
        self,
        stack: Stack,
        groups: list[Members[MatrixKind]],
        runs: Runs,
        context: Context,
        chunks: Sequence[int] = (),  # how many groups are orthogonalized at a time; (): all
    ) -> None:
        self.stack, self.groups, self.runs, self.context = stack, groups, runs, context
        self.chunks = chunks
        self.sizes = [group.tensors for group in groups]
        self.front: Front | None = None
        self.updates: list[Update] = []
        self.norms = Norms()  # with Config(metrics=True)
        self.applied: list[Tensor] = []  # whether they were finite: [n] bool of each

    # ------------------------------------------------------------------------------- for the guard

    def bad_gradients(self) -> Tensor:
        """A bad gradient makes a bad update, even where the momentum keeps its bits."""
        largest = None
        if self.groups:
            largest = self.context.operators.largest(self._read("grad"), self.sizes)
        return self._bad_by(largest).expand(2, -1)

    def bad_updates(self) -> Tensor:
        finite = [*self.applied, *(u.finite & self.fits(u) for u in self.updates)]
        bad = ~torch.cat(finite) if finite else None
        return self.with_gradients(complete(bad, self.runs, self.context))

    def fits(self, update: Update) -> Tensor:
        """[n] bool: whether float16 can hold the new parameters; nothing is that large otherwise.

        It costs float16 parameters behind a guard one more pass.
        """
        group, kind = update.group, update.group.kind
        if self.context.config.guard == "off" or group.read("param")[0].dtype != torch.float16:
            return update.finite
        lr, _ = self._rates(update)
        old = ops.stack(group.read(kind.master or "param"))
        new = old - update.update * (update.factor * ops.per_matrix(lr))
        return new.to(torch.float16).isfinite().all((-2, -1))

    def with_gradients(self, update: Tensor) -> Tensor:
        """[2, n_matrices] bool from [n_matrices] bool."""
        if self.front is None or self.context.early:
            return torch.stack([update, torch.zeros_like(update)])
        grad = self._bad_by(self.front.measures[0])
        return torch.stack([update | grad, grad])

    def _bad_by(self, largest: Tensor | None) -> Tensor:
        """[n_matrices] bool: whether gradients of these largest entries break the momentum."""
        if largest is None:
            return complete(None, self.runs, self.context)
        fine = keeps_momentum_finite(largest, self.context.hyper.momentum, self.context.config)
        return complete(~fine, self.runs, self.context)

    # ------------------------------------------------------------------------------------ momentum

    def advance(self) -> None:
        if not self.groups:
            return
        momentums, grads = self._read("momentum"), self._read("grad")
        scales = self._read(SCALE.name) if self.context.stages.momentum.coded else None
        if self.context.holds_late:
            beta, lookahead = self.context.hyper.momentum, self.context.operators.lookahead
            measures = lookahead(momentums, grads, beta, self.sizes, self._rule, scales)
            self.front = Front(self.groups, self.sizes, momentums, grads, measures, scales=scales)
        else:
            self.front = self._advanced(momentums, grads, scales)

    def _advanced(
        self, momentums: list[Tensor], grads: list[Tensor], scales: list[Tensor] | None
    ) -> Front:
        context = self.context
        given = momentums, grads, context.hyper.momentum, self.hold, self.sizes, self._rule
        if context.config.metrics:
            found, self.norms.front = ops.measured.advance(context.operators, *given, scales)
        else:
            found = context.operators.advance(*given, scales)
        new, measures, stacks, of_new = found
        at = 0
        for group in self.groups:
            group.put("momentum", new[at : at + group.tensors])
            if of_new is not None:
                group.put(SCALE.name, of_new[at : at + group.tensors])
            at += group.tensors
        return Front(self.groups, self.sizes, new, grads, measures, stacks, scales=of_new)

    @property
    def _rule(self) -> ops.MomentumRule:
        """What every operator that knows of momentum must know of its stage."""
        form = self.context.stages.momentum.operator_form
        return ops.MomentumRule(form, self.context.config.nesterov)

    def _read(self, name: str) -> list[Tensor]:
        return ops.chained([group.read(name) for group in self.groups])

    # ------------------------------------------------------------------------------- orthogonalize

    def orthogonalize(self) -> None:
        """As one stack [n, rows <= cols], or in chunks; what may enter at once is applied here."""
        if self.front is None:
            return
        if len(self.chunks) < 2:
            self._orthogonalize(self.front)
            return
        start = 0
        for count in self.chunks:
            self._orthogonalize(self.front.part(slice(start, start + count)))
            start += count

    def _orthogonalize(self, front: Front) -> None:
        self.update(front.groups, self.to_norm_1(front))

    def update(self, groups: list[Members[MatrixKind]], stack: Tensor) -> None:
        """From one stack, at norm 1; cut into groups again, and tall ones transposed back."""
        parts = self.iterated(stack).split([group.count for group in groups])
        updates = []
        for group, part in zip(groups, parts, strict=True):
            update = part.mT if group.kind.tall else part
            old = tuple(ops.stack(group.read(s.name)) for s in self.context.stages.normalize.states)
            found = self.normalized(group, update, old)
            updates.append(Update(group, update, found.factor, old, found.states, found.finite))
        self.updates += self.finished(updates)
        if self.context.at_once:
            self._apply_updates()

    def finished(self, updates: list[Update]) -> list[Update]:
        """With what needs numbers of whole matrices; mostly nothing does. See finishing.py."""
        begun, config = finishing.begun(updates, self.context.config), self.context.config
        totals, found = self.over_shards(begun), list(updates)
        for k, each in begun.items():
            lr, _ = self._rates(each.update)
            found[k] = finishing.end(each, totals[k], lr, config)
        return found

    def over_shards(self, begun: dict[int, finishing.Begun]) -> dict[int, dict[str, Tensor]]:
        """The sums over whole matrices, by the place of an update."""
        return {k: each.sums for k, each in begun.items()}

    def to_norm_1(self, front: Front) -> Tensor:
        """[n, rows <= cols], preconditioned, times `carry`."""
        _, power, squares = front.measures
        config = self.context.config
        if PRECONDITIONERS[config.precondition].function is not None:
            stack = self.gathered(front, power, torch.ones_like(power))
            parts = stack.split([g.count for g in front.groups]) if front.groups[1:] else [stack]
            kinds = [group.kind for group in front.groups]
            found = [self.preconditioned(*each) for each in zip(kinds, parts, strict=True)]
            return torch.cat(found) if len(found) > 1 else found[0]
        if config.orthogonalizer is not None:
            power = inverse = torch.ones_like(power)
        else:
            inverse = to_norm(squares, self.stack.coefficients, self.stack.form.dtype)
        return self.gathered(front, power, inverse)

    def preconditioned(self, kind: MatrixKind, stack: Tensor) -> Tensor:
        """The matrices of one group, rows <= cols, whose largest entries are in [2, 4)."""
        own, form = self.context.config.orthogonalizer is not None, self.stack.form
        return preconditioned(
            stack,
            self.context.config,
            along=-1 if kind.transposed == kind.tall else -2,
            norm=1.0 if own else carry(form.dtype) / self.stack.coefficients.norm_factor,
            dtype=self.stack.wide if own else form.dtype,
        )

    def gathered(self, front: Front, power: Tensor, inverse: Tensor) -> Tensor:
        """One stack of what is orthogonalized: ``(x * power) * inverse``, cast."""
        context, wide = self.context, gathered_wide(self.context.config)
        beta = context.hyper.momentum
        if front.matrices is not None:
            beta = ops.part_of(beta, front.matrices)
        return context.operators.gather(
            front.momentums,
            front.grads,
            beta,
            power,
            inverse,
            front.sizes,
            rule=self._rule,
            ahead=context.holds_late,
            dtype=self.stack.wide if wide else self.stack.form.dtype,
            transpose=[group.kind.tall for group in front.groups],
            stacks=front.stacks,
            scales=front.scales,
        )

    def iterated(self, stack: Tensor) -> Tensor:
        """Orthogonalized, by Newton-Schulz or the caller's own function."""
        own, rows, cols = self.context.config.orthogonalizer, self.stack.rows, self.stack.cols
        if own is None:
            whole = iterate(stack, self.stack.coefficients, self.stack.form)
        else:
            whole = own(stack)
        if not isinstance(whole, Tensor) or not whole.dtype.is_floating_point:
            found = whole.dtype if isinstance(whole, Tensor) else type(whole).__name__
            raise TypeError(
                f"Config.orthogonalizer: expected a floating-point tensor, got {found}; it must "
                "return a stack of the shape that it was given"
            )
        if whole.shape != (stack.shape[0], rows, cols):
            raise ValueError(
                f"Config.orthogonalizer: expected [n, {rows}, {cols}], got {tuple(whole.shape)}; "
                "it must return a stack of the shape that it was given"
            )
        return whole if own is None else whole.to(self.stack.wide)

    def normalized(
        self, group: Members[MatrixKind], update: Tensor, states: tuple[Tensor, ...]
    ) -> Normalized:
        config = self.context.config
        carried = 1.0 if config.orthogonalizer is not None else carry(self.stack.form.dtype)
        beta2, transposed = ops.per_matrix(group.rates.hyper.beta2), group.kind.transposed
        wide, most = self.stack.wide, self.stack.most
        return normalize(update, states, beta2, config, wide, carried, transposed, most)

    # --------------------------------------------------------------------------------------- apply

    def apply(self) -> None:
        if self.front is not None and self.context.holds_late:
            self._advanced(self.front.momentums, self.front.grads, self.front.scales)
        self._apply_updates()

    def _apply_updates(self) -> None:
        for update in self.updates:
            self._apply(update)
            self.applied.append(update.finite)
        self.updates = []  # their memory is free from here on

    def _apply(self, update: Update) -> None:
        if update.group.local:
            self._apply_to_parameters(update)
        stages, operators = self.context.stages, self.context.operators
        for state, old, new in zip(stages.normalize.states, update.old, update.new, strict=True):
            kept = new if self.skip is None else torch.where(self.skip, old, new)
            if self.context.config.metrics and update.group.local:
                self.norms.add_lines(state, kept, update.group.kind, update.update, self.context)
            stored = operators.unstack(update.group.read(state.name), kept)
            update.group.put(state.name, stored)

    def _apply_to_parameters(self, update: Update) -> None:
        context, group, kind = self.context, update.group, update.group.kind
        lr, decay = self._rates(update)
        decay = decay if update.decay is None else update.decay
        cautious = WEIGHT_DECAYS[kind.decay].cautious
        how = (update.update, update.factor * ops.per_matrix(lr), decay, self.skip)
        params, operators = group.read("param"), context.operators
        if context.config.metrics:
            self.norms.apply(context, group, how)
            return
        if kind.master:
            masters = group.read(kind.master)
            params, masters = operators.apply_wide(params, masters, *how, cautious=cautious)
            group.put(kind.master, masters)
        else:
            chance = (context.step, group.salts) if group.salts else ()
            params = operators.apply(params, *how, *chance, cautious=cautious)
        group.put("param", params)

    def sums(self) -> Tensor:
        return self.norms.sums(self.runs, self.context)

    def _rates(self, update: Update) -> tuple[Tensor, Tensor]:
        """``(lr, decay)`` of the matrices of one group: 0-d or [n]."""
        hyper, lr_mul, wd_mul = update.group.rates[:3]
        dtype, power = update.factor.dtype, self.context.config.weight_decay_lr_power
        return rates(hyper.lr, hyper.weight_decay, lr_mul, wd_mul, dtype, power)
