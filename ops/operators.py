"""The operations of the step, by kernels or by their twins, pure or in place: the plan chooses.

`Operators` are for lists of tensors, of which a plan knows device and dtypes. `measure` and
`scale_and_cast` are for one stack, and choose by its device and dtype.

A list is n matrices in all: tensors [rows, cols] and [b, rows, cols], see lists.py. ``sizes`` tells
that the list is so many tensors of one shape, then so many of another, and so on. "fp32" is float64
where the parameters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import adamw as _adamw
from . import advance as _advance
from . import apply as _apply
from . import coded as _coded
from . import gather as _gather
from . import lists, reference
from .launch import has_kernel
from .reference import Measures


class MomentumRule(NamedTuple):
    """How momentum and update follow from a gradient g: static."""

    form: str  # "ema": m <- beta m + (1 - beta) g; "sum": m <- beta m + g
    nesterov: bool  # the update is beta m + (1 - beta) g (or + g) with the new m; otherwise it is m


class Advanced(NamedTuple):
    """What `Operators.advance` returns."""

    momentums: list[Tensor]  # the new ones, as the list
    measures: Measures
    stacks: list[Tensor] | None  # one stack per size, where the twin made them: for `gather`
    scales: list[Tensor] | None = None  # the new ones, where the momentums are codes


class AdamWRates(NamedTuple):
    """What AdamW's moments and updates depend on: all 0-d or all [n], in the moments' dtype."""

    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    correction1: Tensor  # 1 - beta1**step
    correction2: Tensor  # 1 - beta2**step


class Operators(NamedTuple):
    """The operations over lists: ``Operators(kernels_for(device, dtypes), in_place).advance(...)``.

    A method whose result is new values of its arguments returns new tensors, or with ``in_place``
    the arguments, which it wrote.
    """

    kernels: bool  # by kernels, as `kernels_for` tells; otherwise in plain PyTorch
    in_place: bool = False

    def advance(
        self,
        momentums: list[Tensor],  # n matrices, 16 bits or fp32
        grads: list[Tensor],  # as the momentums, of any floating dtype
        beta: Tensor,  # 0-d or [n] fp32
        keep: Tensor | None,  # 0-d bool: whether the momentums keep their bits
        sizes: list[int],
        rule: MomentumRule,
        scales: list[Tensor] | None = None,  # of momentums that are codes: see codes.py
    ) -> Advanced:
        """The new momentums, and the measures of the update that follows from them."""
        if scales is not None:
            run = _coded.advance_coded.choose(self.kernels, self.in_place)
            new, of_new, measures, *stacks = run(momentums, scales, grads, beta, keep, sizes, *rule)
            return Advanced(new, _measures(measures), stacks[0] if stacks else None, of_new)
        run = _advance.advance.choose(self.kernels, self.in_place)
        new, measures, *stacks = run(momentums, grads, beta, keep, sizes, *rule)
        return Advanced(new, _measures(measures), stacks[0] if stacks else None)

    def lookahead(
        self,
        momentums: list[Tensor],  # n matrices, 16 bits or fp32
        grads: list[Tensor],  # as the momentums, of any floating dtype
        beta: Tensor,  # 0-d or [n] fp32
        sizes: list[int],
        rule: MomentumRule,
        scales: list[Tensor] | None = None,  # as for `advance`
    ) -> Measures:
        """The measures that `advance` would return; nothing is written."""
        if scales is not None:
            run = _coded.lookahead_coded.choose(self.kernels)
            return _measures(run(momentums, scales, grads, beta, sizes, *rule))
        run = _advance.lookahead.choose(self.kernels)
        return _measures(run(momentums, grads, beta, sizes, *rule))

    def largest(
        self,
        tensors: list[Tensor],  # n matrices, of any floating dtype
        sizes: list[int],
    ) -> Tensor:
        """[n] fp32: the largest absolute entry; not finite if any entry is not."""
        return _advance.largest.choose(self.kernels)(tensors, sizes)

    def gather(
        self,
        momentums: list[Tensor],  # n matrices, 16 bits or fp32
        grads: list[Tensor],  # as the momentums; not read without nesterov and ``ahead``
        beta: Tensor,  # 0-d or [n] fp32
        power: Tensor,  # [n] fp32
        inverse: Tensor,  # [n] fp32
        sizes: list[int],
        *,
        rule: MomentumRule,
        ahead: bool,  # the momentums are the old ones: they are advanced first, and not written
        dtype: torch.dtype,
        transpose: list[bool],  # one per size
        stacks: list[Tensor] | None = None,  # from `advance`, in the place of the momentums
        scales: list[Tensor] | None = None,  # as for `advance`
    ) -> Tensor:
        """[n, rows, cols] in ``dtype``, contiguous: ``(update * power) * inverse``, transposed."""
        arguments = momentums, grads, beta, power, inverse, sizes, *rule, ahead, dtype, transpose
        if stacks is not None:
            return reference.gather(*arguments, stacks=stacks)
        if scales is not None:
            return _coded.gather_coded.choose(self.kernels)(momentums, scales, *arguments[1:])
        return _gather.gather.choose(self.kernels)(*arguments)

    def apply(
        self,
        params: list[Tensor],  # n matrices
        update: Tensor,  # [n, rows, cols]
        factor: Tensor,  # [n, rows, 1] or [n, 1, cols] fp32
        decay: Tensor,  # 0-d or [n] fp32
        skip: Tensor | None,  # 0-d bool: whether the parameters keep their bits
        step: Tensor | None = None,  # 0-d integer: parameters are rounded by chance
        salts: Sequence[int] = (),  # one per matrix, with ``step``: see `rounding.noise`
        *,
        cautious: bool,  # decay only where it has the sign of the update
    ) -> list[Tensor]:
        """The new parameters: ``param - (param * decay + update * factor)``."""
        chance = () if step is None else (step, list(salts))
        run = _apply.apply.choose(self.kernels, self.in_place)
        return run(params, update, factor, decay, skip, cautious, *chance)

    def apply_wide(
        self,
        params: list[Tensor],  # n matrices, 16 bits
        rests: list[Tensor],  # as the parameters, int16 or fp32: see rounding.py
        update: Tensor,  # [n, rows, cols]
        factor: Tensor,  # [n, rows, 1] or [n, 1, cols] fp32
        decay: Tensor,  # 0-d or [n] fp32
        skip: Tensor | None,  # 0-d bool: whether the parameters keep their bits
        *,
        cautious: bool,  # decay only where it has the sign of the update
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`apply` to float32 masters: the new parameters and the new rests."""
        run = _apply.apply_wide.choose(self.kernels, self.in_place)
        return run(params, rests, update, factor, decay, skip, cautious)

    def unstack(
        self,
        tensors: list[Tensor],  # n matrices
        stacked: Tensor,  # [n, rows, cols]
    ) -> list[Tensor]:
        """The matrices of the stack, as the list has them."""
        return (lists.unstack_ if self.in_place else lists.unstack)(tensors, stacked)

    def adamw_flags(
        self,
        exp_avgs: list[Tensor],  # n tensors of any shapes, fp32
        exp_avg_sqs: list[Tensor],  # as exp_avgs
        grads: list[Tensor],  # as exp_avgs, of any floating dtype
        rates: AdamWRates,
    ) -> Tensor:
        """[2, n] bool: whether an update, and whether a gradient, is not finite."""
        return _adamw.adamw_flags(exp_avgs, exp_avg_sqs, grads, *rates)

    def adamw(
        self,
        params: list[Tensor],  # n tensors of any shapes
        exp_avgs: list[Tensor],  # as the parameters, fp32
        exp_avg_sqs: list[Tensor],  # as the parameters, fp32
        grads: list[Tensor],  # as the parameters
        lr: Tensor,  # as ``rates``
        decay: Tensor,  # as ``rates``
        rates: AdamWRates,
        skip: Tensor | None,  # 0-d bool: whether everything keeps its bits
        step: Tensor | None = None,  # 0-d integer: parameters are rounded by chance
        salts: Sequence[int] = (),  # one per tensor, with ``step``: see `rounding.noise`
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The new parameters, exp_avgs and exp_avg_sqs."""
        chance = () if step is None else (step, list(salts))
        run = _adamw.adamw_ if self.in_place else _adamw.adamw
        return run(params, exp_avgs, exp_avg_sqs, grads, lr, decay, *rates, skip, *chance)

    def adamw_wide(
        self,
        params: list[Tensor],  # n tensors of any shapes, 16 bits
        rests: list[Tensor],  # as the parameters, int16 or fp32: see rounding.py
        exp_avgs: list[Tensor],  # as the parameters, fp32
        exp_avg_sqs: list[Tensor],  # as the parameters, fp32
        grads: list[Tensor],  # as the parameters
        lr: Tensor,  # as ``rates``
        decay: Tensor,  # as ``rates``
        rates: AdamWRates,
        skip: Tensor | None,  # 0-d bool: whether everything keeps its bits
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """`adamw` of float32 masters: the new parameters, rests, exp_avgs and exp_avg_sqs."""
        run = _adamw.adamw_wide_ if self.in_place else _adamw.adamw_wide
        return run(params, rests, exp_avgs, exp_avg_sqs, grads, lr, decay, *rates, skip)


def measure(
    x: Tensor,  # [n, rows, cols], of any floating dtype
) -> Measures:
    """The measures of a stack as it is."""
    return _measures(_advance.measure.choose(has_kernel([x]))([x], [1]))


def scale_and_cast(
    x: Tensor,  # [n, rows, cols], of any floating dtype
    power: Tensor,  # [n] fp32
    inverse: Tensor,  # [n] fp32
    dtype: torch.dtype,
    *,
    transpose: bool = False,
) -> Tensor:
    """``(x * power) * inverse`` in ``dtype``, contiguous: [n, rows, cols] or [n, cols, rows].

    One operator serves this and `Operators.gather`: here the stack is its only momentum, which is
    taken as it is.
    """
    run = _gather.gather.choose(has_kernel([x]))
    unused = power  # in the place of beta
    return run([x], [x], unused, power, inverse, [1], "", False, False, dtype, [transpose])


def _measures(found: Tensor | Measures) -> Measures:
    """A twin returns the measures; the operator returns them as one tensor [3, n]."""
    return found if isinstance(found, Measures) else Measures(*found.unbind(0))
