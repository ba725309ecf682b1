"""`step_` over lists, as torch.optim's functional optimizers are: for people who own their state.

lists -> the plan for their shapes (list_plans.py) -> step_
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..compat import address, storage_key
from ..distributed.placements import local
from ..routing.routes import Route
from ..runtime.compiled import eager_step_, step_
from ..types import LARGEST, ONE, Config, Hyper, StepResult, config_given
from .groups import with_config_hints
from .list_plans import Looks, plan_for

Masters = Sequence[Tensor | None]

_EXAMPLE = (
    "nm.foreach_step_(params, grads, momentums, variances, lr=0.01, momentum=0.95, beta2=0.95, "
    "weight_decay=0.0)"
)


class ForeachResult(NamedTuple):
    """What a step reports, in the order of the lists."""

    flags: Tensor  # [2, n_params] int32: non-finite update, non-finite gradient
    skipped: Tensor  # 0-d bool: at least one parameter was not updated

    @property
    def metrics(self) -> Tensor | None:
        """None: with ``Config(metrics=True)`` it is a `MeasuredForeachResult`."""
        return None


class MeasuredForeachResult(NamedTuple):
    """The `ForeachResult` of a step with ``Config(metrics=True)``."""

    flags: Tensor
    skipped: Tensor
    metrics: Tensor  # [6, n_params] float32: see `report_metrics`


@partial(with_config_hints, example=_EXAMPLE)
def foreach_step_(
    params: Sequence[Tensor],  # [rows, cols] or [..., rows, cols]
    grads: Sequence[Tensor],
    momentums: Sequence[Tensor],  # as params, float32 or `Config.momentum_dtype`
    variances: Sequence[Tensor],  # [..., rows, 1] float32; empty with Config(normalize=False)
    masters: Masters = (),  # with Config(master="mantissa" | "fp32"); None where there is none
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
    """The flags of one NorMuon step.

    It writes ``params``, ``momentums``, ``variances``, ``masters`` and ``step`` in place, and has
    the bits of `step_`. All parameters get NorMuon; for AdamW use torch's.

    The first call with certain shapes, dtypes, device, ``config`` and ``routes`` makes a plan, and
    later calls with such tensors use it again: finding it takes 0.5 ms for 144 matrices (one core
    of a 2-core CPU machine, torch 2.13.0, 2026-11-23). The last 64 plans are kept, each with its
    graph. A plan names a parameter by its place in the list, "0", "1" and so on, and so do errors
    of the step.

    Args:
        momentums, variances, masters: zeros at first, but a float32 master equals its parameter.
            Their shapes, dtypes and devices are those of `init` for the same parameters.
        lr, momentum, beta2, weight_decay: as in `Hyper`. A float becomes a tensor without waiting
            for the device. In a graph of your own it is a constant of that graph; pass tensors
            there.
        routes: how each parameter is read (heads, splits, flatten), and its multipliers. ``None``:
            as matrices or stacks of matrices.
        step: counts the calls. ``master="stochastic"`` needs it, because its random numbers depend
            on it. There are no other counters: count ``skipped`` yourself.
        compiled: as one graph, like `step_`; ``False``: operation by operation. Inside
            ``torch.compile`` the step is part of that graph either way.

    With ``weight_decay_form="hyperball"`` the first call with such tensors waits for the device,
    once, to refuse matrices of zeros, which would stay zeros; calls in a graph of your own do not.

    Raises (what depends on shapes, dtypes and devices: only at the first call with such tensors):
        TypeError, ValueError: naming the argument and the place in it.
    """
    config = config_given(config)
    _check_config(config)
    lists = {"params": params, "grads": grads, "momentums": momentums, "variances": variances}
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"params: expected a list of tensors, got {type(params).__name__}")
    for what, tensors in lists.items():
        optional = what == "variances" and not config.normalize
        _check_list(what, tensors, len(params), optional=optional)
    _check_list("masters", masters, len(params), optional=True)
    if not params:
        raise ValueError("params: expected at least one tensor, got an empty list")
    chosen = None if routes is None else tuple(routes)
    if chosen is not None:
        _check_routes(chosen, len(params))
    plan = plan_for(Looks.of(params, grads, momentums, variances, masters), config, chosen, params)
    if not torch.compiler.is_dynamo_compiling():  # a graph has no objects to compare
        _check_distinct(
            {"params": params, "momentums": momentums, "variances": variances, "masters": masters}
        )
    _check_step(step, config, params)
    state: dict[str, Tensor] = {}
    for k in range(len(params)):
        state[f"{k}.momentum"] = momentums[k]
        if config.normalize:
            state[f"{k}.variance"] = variances[k]
        master = masters[k] if masters else None
        if master is not None:
            state[f"{k}.mantissa" if master.dtype == torch.int16 else f"{k}.master"] = master
    device = plan.device
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
    function = step_ if compiled or torch.compiler.is_dynamo_compiling() else eager_step_
    result: StepResult = function(named, gradients, state, hyper, plan, found_inf=found_inf)
    if result.metrics is None:
        return ForeachResult(result.flags, result.skipped)
    measured = MeasuredForeachResult(result.flags, result.skipped, result.metrics)
    return cast(ForeachResult, measured)


def _check_config(config: Config) -> None:
    """Refuses what lists have no place for."""
    if config.momentum_dtype == torch.int8:
        raise ValueError(
            "config: expected a momentum of floats, got momentum_dtype='int8', whose scales none "
            "of the lists holds; write momentum_dtype=torch.bfloat16, or use step_ or NorMuon, "
            "which keep them in their state"
        )
    if config.other != "adamw":
        raise ValueError(
            f"config: Config(other={config.other!r}) has no effect, because all parameters of "
            "lists get NorMuon; leave it out, or use step_ or NorMuon for what is no matrix"
        )
    if config.replicas != "each":
        raise ValueError(
            f"config: Config(replicas={config.replicas!r}) has no effect, because lists have no "
            "mesh= whose ranks could share a state; write replicas='each', or use NorMuon(mesh=)"
        )


def _check_step(step: Tensor | None, config: Config, params: Sequence[Tensor]) -> None:
    is_counter = isinstance(step, Tensor) and step.ndim == 0 and step.dtype == torch.int32
    if step is not None and not is_counter:
        raise TypeError(f"step: expected None or a 0-d int32 tensor, got {step!r}")
    is_rounded = config.master == "stochastic" and any(x.dtype == torch.bfloat16 for x in params)
    if step is None and is_rounded:
        raise ValueError(
            "step: expected a 0-d int32 tensor: without it every step would round with the same "
            "random numbers; pass torch.zeros((), dtype=torch.int32), which each call counts up"
        )


def _check_list(what: str, tensors: Masters, length: int, *, optional: bool) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{what}: expected a list of tensors, got {type(tensors).__name__}")
    if len(tensors) != length and not (optional and not tensors):
        raise ValueError(f"{what}: expected as many as params, {length}, got {len(tensors)}")
    for k, x in enumerate(tensors):
        if not isinstance(x, Tensor) and not (x is None and what == "masters"):
            hint = "; leave out parameters without a gradient" if what == "grads" else ""
            raise TypeError(f"{what}[{k}]: expected a Tensor, got {type(x).__name__}{hint}")


def _check_distinct(written: dict[str, Masters]) -> None:
    """Refuses a tensor that would be written twice."""
    places = [
        (what, k, address(local(x)) or (storage_key(local(x)), local(x).storage_offset()))
        for what, tensors in written.items()
        for k, x in enumerate(tensors)
        if x is not None and local(x).numel()
    ]
    if len({place for _, _, place in places}) == len(places):
        return
    seen: dict[Hashable, str] = {}
    for what, k, place in places:
        if place in seen:
            raise ValueError(
                f"{what}[{k}]: is the tensor of {seen[place]}, and would be written twice; "
                "pass tied weights once"
            )
        seen[place] = f"{what}[{k}]"


def _check_routes(routes: tuple[Route, ...], length: int) -> None:
    if len(routes) != length:
        raise ValueError(f"routes: expected as many as params, {length}, got {len(routes)}")
    for k, route in enumerate(routes):
        if not isinstance(route, Route) or route.algorithm != "normuon":
            got = repr(route) if isinstance(route, Route) else type(route)
            raise ValueError(
                f"routes[{k}]: expected a Route('normuon', ...), got {got}; "
                "for AdamW use torch.optim.AdamW"
            )


def _scalar(
    name: str, value: float | Tensor, device: torch.device, below: float = LARGEST
) -> Tensor:
    """0-d float32. A float is filled in on the device, because a copy to the device would wait."""
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
