"""Matrices that keep their norm need one: zeros would stay zeros for good."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakSet

from torch import Tensor

from ..compat import address, gather_objects, observers
from ..distributed.placements import local
from .plan import Parameter, Plan

_looked_at: WeakSet[Plan] = WeakSet()


def is_new(plan: Plan) -> bool:
    """Whether `check_first_use` of this plan has something to do."""
    return plan not in _looked_at and bool(_kept(plan))


def check_first_use(plan: Plan, params: Mapping[str, Tensor]) -> None:
    """`check_sizes`, if no parameters of this plan were looked at before and somebody can wait.

    Not where single operations are observed or transformed (vmap), nor during a capture.

    Raises:
        ValueError: as `check_sizes`.
    """
    if plan in _looked_at:
        return
    if observers.is_observed(params.values()) or observers.is_capturing(plan.device):
        return
    check_sizes(plan, params)


def check_sizes(plan: Plan, params: Mapping[str, Tensor]) -> None:
    """That no matrix with ``weight_decay_form="hyperball"`` is zero. Waits for the device.

    Of matrices that ranks share this is a collective. Without such matrices it does nothing.

    Raises:
        ValueError: naming a parameter, on all ranks that have a part of it.
    """
    kept = _kept(plan)
    if not all(_has_values(params[p.name]) for p in kept):
        return
    zero = [p.name for p in kept if _has_zero(p, params[p.name].detach())]
    for group in dict.fromkeys(p.spec.sharded.group for p in kept if p.spec.sharded is not None):
        own = [p.name for p in kept if p.spec.sharded is not None and p.spec.sharded.group == group]
        found = gather_objects([name for name in own if name in zero], group)
        zero = [name for name in zero if name not in own or all(name in each for each in found)]
    if zero:
        raise ValueError(
            f"params[{zero[0]!r}]: has a matrix of zeros, and weight_decay_form='hyperball' keeps "
            "its norm, so it would stay zero for good; initialize it otherwise, or give it "
            f"Route(weight_decay_form='decoupled'). All of them: {zero[:8]}"
        )
    _looked_at.add(plan)


def _kept(plan: Plan) -> list[Parameter]:
    """The parameters whose matrices keep their norms."""
    return [
        p
        for p in plan.parameters
        if p.route.algorithm == "normuon" and p.route.of_matrices(plan.config)[0] == "hyperball"
    ]


def _has_values(tensor: Tensor) -> bool:
    """Whether there is something to read: not on the meta device, nor while a graph is traced."""
    return not local(tensor).numel() or address(local(tensor)) is not None


def _has_zero(parameter: Parameter, tensor: Tensor) -> bool:
    """Whether a matrix of it is zero; of shards, whether all that is here is."""
    if parameter.spec.sharded is not None:
        return not bool(local(tensor).count_nonzero())
    return any(
        not bool(block.param.read(tensor).flatten(-2).any(-1).all()) for block in parameter.blocks
    )
