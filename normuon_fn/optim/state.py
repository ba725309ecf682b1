"""The state of `NorMuon`: ``optimizer.state`` owns every tensor, a planned step refers to them.

``optimizer.state[p]`` is a dict of kind -> tensor, with the kinds that `init` names. `collect`
makes it complete for one plan and builds the step's flat dict from it; nothing else does. When
other tensors were put into ``optimizer.state`` (frameworks move a state to the host and back), the
next step notices it (`PlannedStep.is_current`) and collects again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor

from ..distributed import placements
from ..planning.plan import Plan, Spec

States = MutableMapping[Tensor, dict[str, Any]]  # optimizer.state
COUNTERS = ("step", "skipped", "consecutive")  # of the guard, shared by all parameters
_MASTERS = ("mantissa", "master")


def collect(
    states: States,
    plan: Plan,
    params: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    begun: set[str],
) -> dict[str, Tensor]:
    """The flat state of a plan, taken from ``optimizer.state``, which is made complete for it.

    Args:
        known: a flat state that was collected before, whose counters go on.
        begun: names of parameters that were stepped, whose state must therefore fit.

    Raises:
        ValueError: a parameter that was stepped has a state of another shape, dtype or placement.
    """
    counters = {
        kind: _counter(states, kind, known.get(f"guard.{kind}"), plan.device) for kind in COUNTERS
    }
    flat = {}
    for key, spec in plan.state.items():
        name, _, kind = key.rpartition(".")
        if name == "guard" and kind in COUNTERS:
            flat[key] = counters[kind]
        else:
            flat[key] = _kept(states[params[name]], name, kind, spec, params[name], name in begun)
    for name, p in params.items():
        for kind in _MASTERS:
            if f"{name}.{kind}" not in plan.state:  # the parameter was bfloat16 before
                states[p].pop(kind, None)
    for p in [*params.values(), *(p for p, kinds in states.items() if kinds)]:
        states[p].update(counters)
    return flat


def _counter(states: States, kind: str, known: Tensor | None, device: torch.device) -> Tensor:
    """One tensor for all parameters. The value that somebody put in its place is copied into it.

    Without a known tensor the one that most parameters share is taken for it. A counter that no
    parameter has starts at zero.
    """
    seen = [kinds[kind] for kinds in states.values() if kind in kinds]
    before: Any = known
    if before is None and seen:
        shared_by = Counter(map(id, seen))
        before = max(seen, key=lambda x: shared_by[id(x)])
    if isinstance(before, Tensor) and before.shape == () and before.dtype == torch.int32:
        own = before.to(device)
    else:
        own, before = torch.zeros((), dtype=torch.int32, device=device), None
    if not seen:
        return own.zero_()
    other = next((x for x in seen if x is not before), None)
    if other is None:
        return own
    return own.copy_(torch.as_tensor(other, device=device).reshape(()))


def _kept(
    kinds: dict[str, Any], name: str, kind: str, spec: Spec, param: Tensor, begun: bool
) -> Tensor:
    """The tensor of one kind in ``kinds``, moved to the parameter's device, or a new one."""
    device = placements.local(param).device
    own = kinds.get(kind)
    if own is not None:
        local = placements.local(own)
        fits = tuple(local.shape) == spec.shape and local.dtype == spec.dtype
        if fits and placements.has_layout(own, spec.sharded):
            kinds[kind] = own if local.device == device else own.to(device)
            return kinds[kind]
        if begun:
            raise ValueError(
                f"{name}: has another shape, dtype or placement than its {kind}; "
                "make a new optimizer"
            )
    new = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    if kind == "master":
        new.copy_(placements.local(param).detach())
    kinds[kind] = placements.to_dtensor(new, spec.sharded)
    return kinds[kind]


def follow_parameters(params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Makes masters equal to their parameters."""
    for name, p in params.items():
        if f"{name}.master" in state:
            placements.local(state[f"{name}.master"]).copy_(placements.local(p))


# --- loading


def saved_by_name(
    state_dict: Mapping[str, Any], named: Mapping[str, Tensor]
) -> dict[str, Mapping[str, Any]]:
    """What a ``state_dict`` has for every parameter, by name; empty for one without state.

    Without names, or with those of a wrapped model, the parameters are taken in their order.
    """
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    if set(names) != named.keys():
        names = [*named]
    found = {
        name: state_dict["state"].get(key) or {} for name, key in zip(names, keys, strict=True)
    }
    return {name: found[name] for name in named}


def load(
    states: States,
    named: Mapping[str, Tensor],
    saved: Mapping[str, Mapping[str, Any]],  # of `saved_by_name`
    make_state: Callable[[tuple[bool, ...]], object],  # of the chosen parameters, in ``states``
) -> None:
    """Copies a saved state into the tensors of ``states``; removes what is not saved.

    Raises:
        ValueError: something does not fit. Nothing was written then.
    """
    lacking = tuple(bool(saved[name]) and not states.get(p) for name, p in named.items())
    try:
        if any(lacking):
            make_state(lacking)
        copies = [_copies(name, states[p], saved[name]) for name, p in named.items() if saved[name]]
    except BaseException:
        for p in compress(named.values(), lacking):
            states.pop(p, None)
        raise
    with torch.no_grad():
        for into, value in chain.from_iterable(copies):
            into.copy_(value)
    for name, p in named.items():
        if not saved[name]:
            states.pop(p, None)


def _copies(
    name: str, own: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """A parameter's state tensors, each with the saved one to copy into it. Nothing is written.

    Raises:
        ValueError: other kinds of state, or one of another shape.
    """
    if own.keys() != saved.keys():
        raise ValueError(
            f"state_dict: expected {sorted(own)} for {name!r}, got {sorted(map(str, saved))}; "
            "was it saved with another config?"
        )
    for kind, into in own.items():
        value = saved[kind]
        if (
            not isinstance(value, Tensor)
            or value.shape != into.shape
            or placements.is_dtensor(value) != placements.is_dtensor(into)
        ):
            shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else f" {value!r}"
            raise ValueError(
                f"state_dict: expected {type(into).__name__} {tuple(into.shape)} for {name!r} "
                f"{kind}, got {type(value).__name__}{shape}"
            )
    return [(into, saved[kind]) for kind, into in own.items()]
