"""The plans of `foreach_step_`: made once for lists of such tensors, then found by their looks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import fields
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.graphs import constant_in_graphs
from ..distributed.placements import mesh_and_placements, rank_and_world_size
from ..planning.make_plan import make_plan
from ..planning.plan import Plan, Spec
from ..routing.doubts import warn_at_caller
from ..routing.routes import Route
from ..types import Config

Routes = tuple[Route, ...] | None  # by place in the lists
Look = tuple[Any, ...]  # shape, dtype, device; of a DTensor also its mesh and placements

_SIZE = 64
_numbers: OrderedDict[Hashable, int] = OrderedDict()
_plans: dict[int, Plan] = {}
_next = count()
_told = False
_CONFIG, _ROUTE = (tuple(field.name for field in fields(each)) for each in (Config, Route))


class Looks(NamedTuple):
    """What a plan depends on in each list of tensors."""

    params: tuple[Look, ...]
    grads: tuple[Look, ...]
    momentums: tuple[Look, ...]
    variances: tuple[Look, ...]
    masters: tuple[Look | None, ...]

    @staticmethod
    def of(*lists: Sequence[Tensor | None]) -> Looks:
        return Looks(*(tuple(map(_look, tensors)) for tensors in lists))  # type: ignore[arg-type]


def _look(x: Tensor | None) -> Look | None:
    return None if x is None else (x.shape, x.dtype, x.device, *mesh_and_placements(x))


def plan_for(looks: Looks, config: Config, routes: Routes, params: Sequence[Tensor]) -> Plan:
    """The plan for lists of such tensors, also while a graph of the caller's is traced.

    Raises:
        ValueError: naming the list and the place in it that does not fit.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _plans[_number(looks, config, routes, params)]
    config_values = tuple(getattr(config, name) for name in _CONFIG)
    each = [tuple(getattr(route, name) for name in _ROUTE) for route in routes or ()]
    route_values = None if routes is None else tuple(each)
    return _plans[_number_in_a_graph(tuple(looks), config_values, route_values)]


def _number(looks: Looks, config: Config, routes: Routes, params: Sequence[Tensor] | None) -> int:
    """The number of the plan. With ``params`` None, tensors of such looks stand in for them."""
    key = (looks, config, routes, rank_and_world_size()[1])
    if config.orthogonalizer is not None and config.orthogonalizer.__hash__ is None:
        raise TypeError(
            "config: expected an orthogonalizer that can be hashed, by which foreach_step_ finds "
            f"its plan again, got a {type(config.orthogonalizer).__name__}; pass a function"
        )
    number = _numbers.get(key)
    if number is None:
        plan = _make(looks, config, routes, params)
        number = next(_next)
        _numbers[key], _plans[number] = number, plan
        if len(_numbers) > _SIZE:
            del _plans[_numbers.popitem(last=False)[1]]
            _warn_of_many(looks)
    else:
        _numbers.move_to_end(key)
    return number


def _warn_of_many(looks: Looks) -> None:
    """Says once in a process that plans are made anew."""
    global _told
    if not (_told or torch.compiler.is_compiling()):
        _told = True
        warn_at_caller(
            f"foreach_step_: these lists of {len(looks.params)} tensors need another plan after "
            f"{_SIZE}, and every new plan is compiled anew; the last {_SIZE} are kept. Where the "
            "lists go on changing because some gradients are missing, pass zeros for those "
            "gradients and always the same lists, as "
            'Config(missing_grads="zeros") does in step'
        )


@constant_in_graphs
def _number_in_a_graph(looks: tuple, config: tuple, routes: tuple[tuple, ...] | None) -> int:
    """`_number` while a graph is traced, where there are no tensors.

    Dynamo calls it once, and guards what was read for its arguments. These are all fields of the
    config and the routes, because dynamo would take the objects themselves for constants.
    """
    own = (
        None
        if routes is None
        else tuple(Route(**dict(zip(_ROUTE, route, strict=True))) for route in routes)
    )
    return _number(Looks(*looks), Config(**dict(zip(_CONFIG, config, strict=True))), own, None)


def _make(looks: Looks, config: Config, routes: Routes, params: Sequence[Tensor] | None) -> Plan:
    if params is None:
        if any(len(look) > 3 for look in looks.params):
            raise ValueError(
                "params: expected plain tensors inside torch.compile, got DTensors of an unknown "
                "plan; call foreach_step_ once outside of torch.compile before"
            )
        params = [
            torch.empty(1, dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in looks.params
        ]
    named = {str(k): x for k, x in enumerate(params)}
    of_each = [Route()] * len(params) if routes is None else routes
    plan = make_plan(named, config, routes=dict(zip(named, of_each, strict=True)))
    for k, (shape, dtype, device, *_) in enumerate(looks.params):
        if plan.parameters[k].route.algorithm != "normuon":
            raise ValueError(
                f"params[{k}]: expected a matrix with entries, got shape {tuple(shape)}; "
                "leave it out of the lists"
            )
        _check_look(f"grads[{k}]", looks.grads[k], shape, dtype, device)
        for what, kinds in (
            ("momentums", ["momentum"]),
            ("variances", ["variance"]),
            ("masters", ["mantissa", "master"]),
        ):
            found = [plan.state[f"{k}.{kind}"] for kind in kinds if f"{k}.{kind}" in plan.state]
            list_looks = getattr(looks, what)
            look = list_looks[k] if list_looks else None
            _check_state(f"{what}[{k}]", look, found[0] if found else None, config, device)
    return plan


def _check_state(
    what: str, look: Look | None, spec: Spec | None, config: Config, device: torch.device
) -> None:
    if spec is None:
        if look is not None:
            raise ValueError(
                f"{what}: expected nothing with this config and the parameter's dtype, got a tensor"
            )
        return
    shape = spec.shape if spec.sharded is None else spec.sharded.shape
    if look is None:
        raise ValueError(
            f"{what}: expected a tensor of shape {tuple(shape)}, {spec.dtype}, "
            f"for {config.master=}, got nothing"
        )
    _check_look(what, look, shape, spec.dtype, spec.on(device))


def _check_look(
    what: str, look: Look, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(look[0]) != tuple(shape) or look[1] != dtype or look[2] != device:
        raise ValueError(
            f"{what}: expected shape {tuple(shape)}, {dtype} on {device}, "
            f"got {tuple(look[0])}, {look[1]} on {look[2]}"
        )
