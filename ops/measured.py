"""The passes of the step that also return norms of what they read: no pass is added for them.

    advance_measured       `advance`, and the norms of gradients and new momentums
    advance_coded_measured the same of momentums in one byte an entry (coded.py)
    apply_measured         `apply`, and the norms of the parameters and of their updates
    adamw_measured         `adamw`, and all four; lion_measured, of Lion (lion.py)

They write the same bits. Norms are summed in float64. They are of what is there, also where
``keep`` or ``skip`` is true: of the momentum that keeps its bits, of the update that is not made.
An update's norm is that of what is subtracted, without the share of weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import adamw as _adamw
from . import adamw_reference, checks, reference
from .advance import launch_measured as launch_advance
from .apply import launch_measured as launch_apply
from .apply import launch_measured_wide as launch_apply_wide
from .coded import advance_coded_measured
from .implementations import with_kernel
from .launch import has_kernel
from .lion import lion_measured, lion_wide_measured
from .lists import total
from .operators import AdamWRates, Advanced, Measures, MomentumRule, Operators
from .registration import Lists, register

# ------------------------------------------------------------------------------------ momentum


def _advance_fake(momentums: list[Tensor], *rest: Any) -> Tensor:
    dtype = reference.compute_dtype(momentums[0].dtype)
    return momentums[0].new_empty((5, total(momentums)), dtype=dtype)


_advance_measured = with_kernel(
    "advance_measured",
    "(Tensor[] momentums, Tensor[] grads, Tensor beta, Tensor? keep, int[] sizes, str form, "
    "bool nesterov) -> (Tensor[], Tensor)",
    launch_advance,
    _advance_fake,
    check=checks.advance,
    writes=("momentums",),
    twin=partial(reference.advance, norms=True),
)


def advance(
    operators: Operators,
    momentums: list[Tensor],  # n matrices
    grads: list[Tensor],
    beta: Tensor,  # 0-d or [n] fp32
    keep: Tensor | None,  # 0-d bool
    sizes: list[int],
    rule: MomentumRule,
    scales: list[Tensor] | None = None,  # of momentums that are codes: see codes.py
) -> tuple[Advanced, Tensor]:
    """`Operators.advance`, and [2, n]: the norms of gradients and new momentums."""
    of_new = None
    if scales is not None:
        run = advance_coded_measured.choose(operators.kernels, operators.in_place)
        new, of_new, found, *stacks = run(momentums, scales, grads, beta, keep, sizes, *rule)
    else:
        run = _advance_measured.choose(operators.kernels, operators.in_place)
        new, found, *stacks = run(momentums, grads, beta, keep, sizes, *rule)
    rows = found.unbind(0) if isinstance(found, Tensor) else found
    advanced = Advanced(new, Measures(*rows[:3]), stacks[0] if stacks else None, of_new)
    return advanced, torch.stack(tuple(rows[3:]))


# ----------------------------------------------------------------------------------- parameters


_UPDATE = "Tensor update, Tensor factor, Tensor decay, Tensor? skip, bool cautious"
_apply_measured = with_kernel(
    "apply_measured",
    f"(Tensor[] params, {_UPDATE}, Tensor? step=None, int[] salts=[]) -> (Tensor[], Tensor)",
    launch_apply,
    lambda params, update, factor, *rest: factor.new_empty((2, total(params))),
    check=checks.apply,
    writes=("params",),
    twin=partial(reference.apply, norms=True),
)
_apply_wide_measured = with_kernel(
    "apply_wide_measured",
    f"(Tensor[] params, Tensor[] rests, {_UPDATE}) -> (Tensor[], Tensor[], Tensor)",
    launch_apply_wide,
    lambda params, rests, update, factor, *rest: factor.new_empty((2, total(params))),
    check=checks.apply_wide,
    writes=("params", "rests"),
    twin=partial(reference.apply_wide, norms=True),
)


def apply(
    operators: Operators,
    params: list[Tensor],  # n matrices
    rests: list[Tensor] | None,  # with float32 masters: see rounding.py
    update: Tensor,  # [n, rows, cols]
    factor: Tensor,  # [n, rows, 1] or [n, 1, cols] fp32
    decay: Tensor,  # 0-d or [n] fp32
    skip: Tensor | None,  # 0-d bool
    step: Tensor | None = None,  # as in `Operators.apply`
    salts: Sequence[int] = (),
    *,
    cautious: bool,
) -> tuple[list[list[Tensor]], Tensor]:
    """New parameters (and rests), and [2, n]: the norms of old parameters and of their updates."""
    how = update, factor, decay, skip, cautious
    if rests is not None:
        *new, norms = _apply_wide_measured.choose(operators.kernels, operators.in_place)(
            params, rests, *how
        )
    else:
        chance = () if step is None else (step, list(salts))
        *new, norms = _apply_measured.choose(operators.kernels, operators.in_place)(
            params, *how, *chance
        )
    return new, norms if isinstance(norms, Tensor) else torch.stack(norms)


# ---------------------------------------------------------------------------------------- AdamW


def _run_adamw(
    into: Lists,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    *rest: Any,
) -> Tensor:
    """[4, n]. ``rest``: five rates, skip, step, salts."""
    olds, rates = (params, exp_avgs, exp_avg_sqs), rest[:5]
    if has_kernel(params, exp_avgs, grads):
        norms = grads[0].new_zeros((len(grads), 4), dtype=torch.float64)
        skip, step, salts = (*rest[5:], None, ())[:3]
        _adamw.launch_adamw(into, olds, grads, (lr, decay, *rates), skip, step, salts, norms)
        return norms.sqrt().T.to(exp_avgs[0].dtype)
    wide = [param.to(x.dtype) for param, x in zip(params, exp_avgs, strict=True)]
    found = _adamw_norms(wide, exp_avgs, exp_avg_sqs, grads, lr, rates)
    _adamw.copy_lists(into, adamw_reference.adamw(*olds, grads, lr, decay, *rest))
    return found


def _run_adamw_wide(
    into: Lists,
    params: list[Tensor],
    rests: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    *rest: Any,
) -> Tensor:
    rates, skip = rest[:5], rest[5]
    if has_kernel(params, rests, exp_avgs, grads):
        new_params, new_rests, new_avgs, new_sqs = into
        norms = grads[0].new_zeros((len(grads), 4), dtype=torch.float64)
        _adamw.launch_adamw(
            (new_params, new_avgs, new_sqs, new_rests),
            (params, exp_avgs, exp_avg_sqs, rests),
            grads, (lr, decay, *rates), skip, norms=norms,
        )  # fmt: skip
        return norms.sqrt().T.to(exp_avgs[0].dtype)
    wide = [reference.joined_with(p, rest) for p, rest in zip(params, rests, strict=True)]
    found = _adamw_norms(wide, exp_avgs, exp_avg_sqs, grads, lr, rates)
    olds = (params, rests, exp_avgs, exp_avg_sqs)
    _adamw.copy_lists(into, adamw_reference.adamw_wide(*olds, grads, lr, decay, *rest))
    return found


def _adamw_norms(
    params: list[Tensor],  # in the dtype of the moments
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    rates: Sequence[Tensor],
) -> Tensor:
    """[4, n]: of gradients, new exp_avgs, old parameters and their updates."""
    updates, first, _ = adamw_reference.update_of(exp_avgs, exp_avg_sqs, grads, *rates)
    torch._foreach_mul_(updates, lr if lr.ndim == 0 else list(lr.unbind()))
    return adamw_reference.norms_of((grads, first, params, updates), exp_avgs[0].dtype)


_MOMENTS = "Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] grads"
_RATES = "Tensor beta1, Tensor beta2, Tensor eps, Tensor correction1, Tensor correction2"
_adamw_measured = register(
    "adamw_measured",
    f"(Tensor[] params, {_MOMENTS}, Tensor lr, Tensor decay, {_RATES}, Tensor? skip, "
    "Tensor? step=None, int[] salts=[]) -> (Tensor[], Tensor[], Tensor[], Tensor)",
    _run_adamw,
    lambda params, exp_avgs, *rest: exp_avgs[0].new_empty((4, len(exp_avgs))),
    check=checks.adamw,
    writes=("params", "exp_avgs", "exp_avg_sqs"),
)
_adamw_wide_measured = register(
    "adamw_wide_measured",
    f"(Tensor[] params, Tensor[] rests, {_MOMENTS}, Tensor lr, Tensor decay, {_RATES}, "
    "Tensor? skip) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor)",
    _run_adamw_wide,
    lambda params, rests, exp_avgs, *rest: exp_avgs[0].new_empty((4, len(exp_avgs))),
    check=checks.adamw_wide,
    writes=("params", "rests", "exp_avgs", "exp_avg_sqs"),
)


def adamw(
    operators: Operators,
    params: list[Tensor],  # n tensors of any shapes
    rests: list[Tensor] | None,  # with float32 masters: see rounding.py
    moments: Sequence[list[Tensor]],  # exp_avgs, exp_avg_sqs, grads
    lr: Tensor,
    decay: Tensor,
    rates: AdamWRates,
    skip: Tensor | None,
    step: Tensor | None = None,  # as in `Operators.adamw`
    salts: Sequence[int] = (),
) -> tuple[list[list[Tensor]], Tensor]:
    """What `Operators.adamw` returns, and [4, n]: the norms of gradients, of the new exp_avgs, of
    old parameters and of their updates.
    """
    how = (*moments, lr, decay, *rates, skip)
    if rests is not None:
        *new, norms = _adamw_wide_measured[int(operators.in_place)](params, rests, *how)
    else:
        chance = () if step is None else (step, list(salts))
        *new, norms = _adamw_measured[int(operators.in_place)](params, *how, *chance)
    return new, norms


def lion(
    operators: Operators,
    params: list[Tensor],  # n tensors of any shapes
    rests: list[Tensor] | None,  # with float32 masters: see rounding.py
    how: Sequence[Any],  # exp_avgs, grads, lr, decay, beta1, beta2 and skip
    step: Tensor | None = None,  # as in `Operators.adamw`
    salts: Sequence[int] = (),
) -> tuple[list[list[Tensor]], Tensor]:
    """What `ops.lion` or `ops.lion_wide` returns, and [4, n] as of `adamw`."""
    if rests is not None:
        *new, norms = lion_wide_measured[int(operators.in_place)](params, rests, *how)
    else:
        chance = () if step is None else (step, list(salts))
        *new, norms = lion_measured[int(operators.in_place)](params, *how, *chance)
    return new, norms
