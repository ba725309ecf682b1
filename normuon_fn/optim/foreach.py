"""`step_` over lists, in the manner of torch.optim's functional optimizers: for people who own their state.

lists -> a plan, by shapes, cached -> step_
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import fields
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..compat import storage_key
from ..distributed.placements import local
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..routing.routes import Route
from ..runtime.compiled import step_
from ..step import local_update_
from ..types import LARGEST, ONE, Config, Hyper, StepResult


class ForeachResult(NamedTuple):
    """What `step_` tells of a step, in the order of the lists."""

    flags: Tensor  # [2, n_params] int32: non-finite update, non-finite gradient
    skipped: Tensor  # 0-d bool: something kept its bits


def foreach_step_(
    params: Sequence[Tensor],  # [rows, cols] or [..., rows, cols]
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],  # as params, float32 or `Config.momentum_dtype`
    variances: Sequence[Tensor],  # [..., rows, 1] float32; empty with Config(normalize=False)
    masters: Sequence[
        Tensor | None
    ] = (),  # with Config(master="mantissa" | "fp32"); None for parameters that have none
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    config: Config | None = None,
    routes: Sequence[Route] | None = None,
    step: Tensor | None = None,  # 0-d int32
    found_inf: Tensor | None = None,  # 0-d or [1]; > 0 skips the step
    compiled: bool = True,
) -> ForeachResult:
    """The flags of one NorMuon step, which writes ``params``, ``momentums``, ``variances``, ``masters`` and ``step`` in place.

    It is `step_`, bit for bit, with the lists' places as names ("0", "1", ...): so they are called in errors. Every parameter
    gets NorMuon; AdamW is torch's. The plan is made at the first call with such shapes, dtypes, device, ``config`` and
    ``routes``, and found again at the next ones, whatever the tensors; the last 64 plans are kept, each with its graph. Finding
    one takes 0.5 ms for 144 matrices (one core of a 2-core CPU machine, torch 2.13.0, 2026-11-23).

    Args:
        momentums, variances, masters: begin as zeros; a float32 master begins as its parameter. Their shapes and dtypes are
            those of `init` for the same parameters.
        lr, momentum, beta2, weight_decay: as in `Hyper`. A float becomes a tensor by a fill, which waits for nothing; inside a
            graph of your own it is a constant of that graph, so pass tensors there.
        routes: how each parameter is read (heads, splits, flatten), and its multipliers. ``None``: as matrices, or stacks.
        step: counts the calls; ``master="stochastic"`` needs it, for what it draws depends on it. There are no other counters:
            count ``skipped`` yourself.
        compiled: as one graph, like `step_`; ``False``: operation by operation. Inside ``torch.compile``: part of that graph.

    Raises (what depends on shapes, dtypes and devices only at the first call with such tensors):
        TypeError, ValueError: naming the argument and the place in it.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    lists = {"params": params, "grads": grads, "momentums": momentums, "variances": variances}
    for what, given in lists.items():
        _check_list(what, given, len(params), optional=what == "variances" and not config.normalize)
    _check_list("masters", masters, len(params), optional=True)
    if not params:
        raise ValueError("params: expected at least one tensor, got an empty list")
    chosen = None if routes is None else tuple(routes)
    if chosen is not None:
        _check_routes(chosen, len(params))
    looks = (
        *(tuple(map(_look, given)) for given in lists.values()),
        tuple(None if x is None else _look(x) for x in masters),
    )
    if torch.compiler.is_compiling():
        values = tuple(getattr(config, name) for name in _CONFIG)
        each = [tuple(getattr(route, name) for name in _ROUTE) for route in chosen or ()]
        of_routes = None if chosen is None else tuple(each)
        plan = _plans[_plan_number(looks, values, of_routes)]
    else:
        plan = _plans[_find(looks, config, chosen, params)]
        _check_distinct(
            {"params": params, "momentums": momentums, "variances": variances, "masters": masters}
        )

    device = plan.device
    if (
        step is None
        and config.master == "stochastic"
        and any(x.dtype == torch.bfloat16 for x in params)
    ):
        raise ValueError(
            "step: expected a 0-d int32 tensor: without it every step would round by the same chances"
        )
    if step is not None and not (
        isinstance(step, Tensor) and step.ndim == 0 and step.dtype == torch.int32
    ):
        raise TypeError(f"step: expected None or a 0-d int32 tensor, got {step!r}")
    state: dict[str, Tensor] = {}
    for k in range(len(params)):
        state[f"{k}.momentum"] = momentums[k]
        if config.normalize:
            state[f"{k}.variance"] = variances[k]
        rest = masters[k] if masters else None
        if rest is not None:
            state[f"{k}.mantissa" if rest.dtype == torch.int16 else f"{k}.master"] = rest
    zeros = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(3)]
    state |= {
        "guard.step": zeros[0] if step is None else step,
        "guard.skipped": zeros[1],
        "guard.consecutive": zeros[2],
    }
    rate = _scalar("lr", lr, device)
    hyper = Hyper(
        rate, _scalar("momentum", momentum, device, ONE), _scalar("beta2", beta2, device, ONE),
        _scalar("weight_decay", weight_decay, device), rate, rate, rate, rate, rate,
    )  # fmt: skip
    named, gradients = ({str(k): x for k, x in enumerate(tensors)} for tensors in (params, grads))
    function = step_ if compiled else local_update_
    result: StepResult = function(named, gradients, state, hyper, plan, found_inf=found_inf)
    return ForeachResult(result.flags, result.skipped)


Look = tuple[Hashable, ...]  # shape, dtype, device; of a DTensor also where it lies

_SIZE = 64
_numbers: OrderedDict[Hashable, int] = OrderedDict()
_plans: dict[int, Plan] = {}
_next = count()


def _look(x: Tensor) -> Look:
    if isinstance(x, DTensor):
        return x.shape, x.dtype, x.device, x.device_mesh, x.placements
    return x.shape, x.dtype, x.device


def _find(
    looks: tuple, config: Config, routes: tuple[Route, ...] | None, params: Sequence[Tensor] | None
) -> int:
    """The number of the plan. ``params``: None for stand-ins of that look."""
    key = (looks, config, routes)
    number = _numbers.get(key)
    if number is None:
        plan = _make(looks, config, routes, params)
        number = next(_next)
        _numbers[key], _plans[number] = number, plan
        if len(_numbers) > _SIZE:
            del _plans[_numbers.popitem(last=False)[1]]
    else:
        _numbers.move_to_end(key)
    return number


_CONFIG, _ROUTE = (tuple(field.name for field in fields(of)) for of in (Config, Route))


@torch.compiler.assume_constant_result
def _plan_number(looks: tuple, config: tuple, routes: tuple[tuple, ...] | None) -> int:
    """The same while a graph is traced, where there are no tensors. Dynamo runs it once, and guards on what was read for it:
    all fields of the config and the routes, for an object it would take for a constant.
    """
    own = (
        None
        if routes is None
        else tuple(Route(**dict(zip(_ROUTE, route, strict=True))) for route in routes)
    )
    return _find(looks, Config(**dict(zip(_CONFIG, config, strict=True))), own, None)


def _make(
    looks: tuple, config: Config, routes: tuple[Route, ...] | None, params: Sequence[Tensor] | None
) -> Plan:
    if params is None:
        if any(len(look) > 3 for look in looks[0]):
            raise ValueError(
                "params: DTensors: call foreach_step_ once outside of torch.compile, so that it knows the ranks"
            )
        params = [
            torch.empty(1, dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in looks[0]
        ]
    named = {str(k): x for k, x in enumerate(params)}
    plan = make_plan(
        named,
        config,
        routes=dict.fromkeys(named, Route())
        if routes is None
        else dict(zip(named, routes, strict=True)),
    )
    for k, (name, of) in enumerate(zip(named, looks[0], strict=True)):
        if plan.parameters[k].route.algorithm != "normuon":
            raise ValueError(
                f"params[{k}]: expected a matrix with entries, got shape {tuple(of[0])}; leave it out of the lists"
            )
        _check_look(f"grads[{k}]", looks[1][k], of[0], of[1], of[2])
        for what, at, suffixes in (
            ("momentums", 2, (".momentum",)), ("variances", 3, (".variance",)), ("masters", 4, (".mantissa", ".master"))
        ):  # fmt: skip
            spec = next(
                (plan.state[name + suffix] for suffix in suffixes if name + suffix in plan.state),
                None,
            )
            look = looks[at][k] if looks[at] else None
            if spec is None and look is not None:
                raise ValueError(
                    f"{what}[{k}]: expected nothing with this config and dtype of the parameter, got a tensor"
                )
            if spec is not None and look is None:
                raise ValueError(
                    f"{what}[{k}]: expected a tensor of shape {spec.shape}, {spec.dtype}, for {config.master=}"
                )
            if spec is not None and look is not None:
                _check_look(
                    f"{what}[{k}]",
                    look,
                    spec.shape if spec.sharded is None else spec.sharded.shape,
                    spec.dtype,
                    of[2],
                )
    return plan


def _check_look(
    what: str, look: Look, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(look[0]) != tuple(shape) or look[1] != dtype or look[2] != device:  # type: ignore[arg-type]
        found = f"{tuple(look[0])}, {look[1]} on {look[2]}"  # type: ignore[arg-type]
        raise ValueError(f"{what}: expected shape {tuple(shape)}, {dtype} on {device}, got {found}")


def _check_list(what: str, given: Sequence[Tensor | None], length: int, *, optional: bool) -> None:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{what}: expected a list of tensors, got {type(given).__name__}")
    if len(given) != length and not (optional and not given):
        raise ValueError(f"{what}: expected as many as params, {length}, got {len(given)}")
    for k, x in enumerate(given):
        if not isinstance(x, Tensor) and not (x is None and what == "masters"):
            hint = "; leave out parameters without a gradient" if what == "grads" else ""
            raise TypeError(f"{what}[{k}]: expected a Tensor, got {type(x).__name__}{hint}")


def _check_distinct(written: dict[str, Sequence[Tensor | None]]) -> None:
    """That nothing is written twice. Not inside a graph: there are no objects to compare."""
    here = [
        (what, k, local(x))
        for what, given in written.items()
        for k, x in enumerate(given)
        if x is not None
    ]
    places = [(what, k, (storage_key(x), x.storage_offset())) for what, k, x in here if x.numel()]
    if len({place for _, _, place in places}) == len(places):
        return
    seen: dict[Hashable, str] = {}
    for what, k, place in places:
        if place in seen:
            raise ValueError(
                f"{what}[{k}]: is the tensor of {seen[place]}, and would be written twice; pass tied weights once"
            )
        seen[place] = f"{what}[{k}]"


def _check_routes(routes: tuple[Route, ...], length: int) -> None:
    if len(routes) != length:
        raise ValueError(f"routes: expected as many as params, {length}, got {len(routes)}")
    for k, route in enumerate(routes):
        if not isinstance(route, Route) or route.algorithm != "normuon":
            raise ValueError(
                f"routes[{k}]: expected a Route('normuon', ...), got {route!r}; AdamW is torch.optim's"
            )


def _scalar(
    name: str, value: float | Tensor, device: torch.device, below: float = LARGEST
) -> Tensor:
    """0-d float32; a float by a fill, for a copy to the device would wait."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise TypeError(
                f"{name}: expected a float or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float or a 0-d tensor, got {type(value).__name__}")
    if not 0.0 <= value < below:
        raise ValueError(f"{name}: expected a number in [0, {below:g}), got {value!r} as float32")
    return torch.full((), value, dtype=torch.float32, device=device)
