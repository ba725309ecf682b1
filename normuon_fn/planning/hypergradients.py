"""The derivative of a step by its rates; by everything else a derivative is refused by name.

For a parameter W with the orthogonalized update U (for AdamW: its own), the step is

    W <- W - decay W - lr lr_mul U        decay = (lr lr_mul)^p weight_decay wd_mul

and U depends on none of ``lr`` and ``weight_decay``. So the derivative by them is exact, also
through several orders of differentiation. U comes from a second step: of zeros, with ``lr`` 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm.weight_decay import rates
from ..compat.observers import is_differentiated, may_differentiate
from ..types import Grads, Hyper, StepResult, Tensors, result_of
from .plan import Parameter, Plan

RATES = ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay")
_HAS = f"the step has a derivative by {', '.join(RATES)} of Hyper alone"


def asks_for_rates(hyper: Hyper) -> bool:
    """Whether torch is to differentiate by a tensor of ``hyper``. Costs the host nothing else."""
    return (
        may_differentiate()
        and isinstance(hyper, Hyper)
        and any([isinstance(x, Tensor) and is_differentiated(x) for x in hyper])  # noqa: C419
    )


def check_derivatives(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, *, in_place: bool
) -> None:
    """Refuses what the step has no derivative by.

    A model's own parameters require gradients at every step: leaves of autograd are no question.

    Raises:
        ValueError: naming the tensor.
    """
    if not may_differentiate():
        return
    for name, value in zip(Hyper._fields, hyper, strict=True):
        if is_differentiated(value) and (in_place or name not in RATES):
            has = "step_ and foreach_step_ write in place and have none" if in_place else _HAS
            instead = "write step or update, or " if in_place and name in RATES else ""
            raise ValueError(
                f"hyper.{name}: torch is to differentiate by it, and {has}; {instead}pass "
                f"hyper.{name}.detach()"
            )
    for what, given in (("params", params), ("grads", grads), ("state", state)):
        for name, x in given.items():
            if x is not None and is_differentiated(x, leaves=what != "params"):
                raise ValueError(
                    f"{what}[{name!r}]: torch is to differentiate by it, and {_HAS}; pass "
                    f"{what}[{name!r}].detach()"
                )


def with_derivative(
    run: Callable[..., StepResult],  # `update` or `step`
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    """The result of ``run``, whose parameters have a derivative by the rates.

    A float32 master has it too; of 16-bit parameters without one, U is rounded to their dtype.

    Raises:
        ValueError: as `check_derivatives`; or a parameter is a DTensor.
    """
    check_derivatives(params, grads, state, hyper, in_place=False)
    if plan.sharded:
        raise ValueError(
            f"hyper: torch is to differentiate by it, and {_HAS} only of plain tensors, not of "
            "DTensors; pass detached ones"
        )
    for p in plan.parameters:
        sphere = p.route.of_matrices(plan.config)[0] == "hyperball"
        if p.route.algorithm == "normuon" and (sphere or plan.config.update_floor > 0):
            raise ValueError(
                f"hyper: torch is to differentiate by it, and the update of {p.name!r} depends on "
                "its own size (weight_decay_form='hyperball' or update_floor); pass detached ones"
            )
    constant = Hyper(*(x.detach() for x in hyper))
    one, none = torch.ones_like(constant.lr), torch.zeros_like(constant.lr)
    unit = constant._replace(lr=one, weight_decay=none, adamw_lr=one, adamw_weight_decay=none)
    masters = {f"{p.name}.{kind}" for p in plan.parameters for kind in ("mantissa", "master")}
    at_zero = {k: torch.zeros_like(x) if k in masters else x.detach() for k, x in state.items()}
    zeros = {name: torch.zeros_like(x) for name, x in params.items()}
    with torch.no_grad():
        result = run(params, grads, state, constant, plan, found_inf=found_inf)
        moved = run(zeros, grads, at_zero, unit, plan, found_inf=found_inf)
    new, kept = dict(result.params), dict(result.state)
    for p in plan.parameters:
        if p.route.algorithm not in ("normuon", "adamw"):
            continue
        if grads[p.name] is None and plan.config.missing_grads == "skip":
            continue
        key = f"{p.name}.master"
        wide = key in state
        old = (state[key] if wide else params[p.name]).detach()
        step = moved.state[key] if wide else moved.params[p.name]
        change = _change(old, step, result.skipped, hyper, p, plan)
        zero = change - change.detach()  # but for its derivative
        new[p.name] = result.params[p.name] + zero.to(result.params[p.name].dtype)
        if wide:
            kept[key] = result.state[key] + zero
    return result_of(new, kept, result.flags, result.skipped, result.metrics)


def _change(
    old: Tensor, moved: Tensor, skipped: Tensor, hyper: Hyper, p: Parameter, plan: Plan
) -> Tensor:
    """What the step adds to a parameter, as a function of the rates. ``moved``: ``-lr_mul U``."""
    matrix = p.route.algorithm == "normuon"
    names = RATES[:2] if matrix else RATES[2:]
    lr, decay = (getattr(hyper, name) for name in names)
    if plan.hypers:
        lr, decay = lr[p.hyper], decay[p.hyper]
    wide = torch.promote_types(old.dtype, torch.float32)
    old, moved = old.to(wide), moved.to(wide)
    power = plan.config.weight_decay_lr_power if matrix else 1
    _, share = rates(lr, decay, p.route.lr_mul, p.route.wd_mul, wide, power)
    if matrix and p.route.of_matrices(plan.config)[0] == "cautious":
        old = torch.where(moved * old <= 0, old, 0.0)
    holds = skipped & (moved == 0).all()  # the guard kept its bits
    return torch.where(holds, 0.0, lr.to(wide) * moved - share * old)
