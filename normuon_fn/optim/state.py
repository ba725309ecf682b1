"""The state of `NorMuon`: ``optimizer.state`` owns every tensor, a planned step refers to them.

``optimizer.state[p]`` is a dict of kind -> tensor, with the kinds that `init` names. `collect`
makes it complete for one plan and builds the step's flat dict from it; nothing else does. When
other tensors were put into ``optimizer.state`` (frameworks move a state to the host and back), the
next step notices it (`PlannedStep.is_current`) and collects again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..compat import outside_inference_mode
from ..distributed import placements
from ..distributed.dtensors import is_dtensor
from ..persistence.meaning import BEGIN_ANEW, field_of_variance, fields_of
from ..planning.plan import Plan, Spec
from ..planning.streaming import in_place_of_host
from .missed_steps import MissedSteps

States = MutableMapping[Any, dict[str, Any]]  # optimizer.state; others may add keys of their own
SAVED_WITH = "; was it saved with another config?"
COUNTERS = ("step", "skipped", "consecutive")  # of the guard, shared by all parameters
_MASTERS = ("mantissa", "master")
_OWN = {  # kinds that nobody else adds
    "momentum", "momentum_scale", "variance", "exp_avg", "exp_avg_sq", *_MASTERS,
}  # fmt: skip


@outside_inference_mode
def collect(
    states: States,
    plan: Plan,
    params: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    begun: set[str],
    missed: MissedSteps,
    *,
    stays: bool = False,
) -> dict[str, Tensor]:
    """The flat state of a plan, taken from ``optimizer.state``, which is made complete for it.

    Args:
        known: a flat state that was collected before, whose counters go on.
        begun: names of parameters that were stepped, whose state must therefore fit.
        missed: is told of AdamW's moments that are made.
        stays: state on another device than its parameter stays there.

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
            own, p = states[params[name]], params[name]
            is_new = kind == "exp_avg_sq" and (kind not in own or missed.is_new(name, own[kind]))
            flat[key] = _kept(own, name, kind, spec, p, name in begun, stays)
            if is_new:
                missed.begin(name, flat[key])
    for name, p in params.items():
        for kind in _MASTERS:
            if f"{name}.{kind}" not in plan.state:  # the parameter was bfloat16 before
                states[p].pop(kind, None)
    begun_elsewhere = (p for p, kinds in states.items() if isinstance(p, Tensor) and kinds)
    for p in [*params.values(), *begun_elsewhere]:
        states[p].update(counters)
    return flat


def _counter(states: States, kind: str, known: Tensor | None, device: torch.device) -> Tensor:
    """One tensor for all parameters. The value that somebody put in its place is copied into it.

    Without a known tensor the one that most parameters share is taken for it. A counter that no
    parameter has starts at zero.
    """
    seen = [own[kind] for p, own in states.items() if isinstance(p, Tensor) and kind in own]
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
    kinds: dict[str, Any],
    name: str,
    kind: str,
    spec: Spec,
    param: Tensor,
    begun: bool,
    stays: bool,
) -> Tensor:
    """The tensor of one kind in ``kinds``, moved to the parameter's device, or a new one."""
    device = placements.local(param).device
    own = kinds.get(kind)
    if own is not None:
        local = placements.local(own)
        fits = tuple(local.shape) == spec.shape and local.dtype == spec.dtype
        if fits and placements.has_layout(own, spec.sharded):
            if spec.host:
                kinds[kind] = in_place_of_host(own, device)
            else:
                kinds[kind] = own if stays or local.device == device else own.to(device)
            return kinds[kind]
        if begun:
            raise ValueError(
                f"{name}: has another shape, dtype or placement than its {kind}; "
                "make a new optimizer"
            )
    new = spec.zeros(device)
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


@outside_inference_mode
def load(
    states: States,
    named: Mapping[str, Tensor],
    saved: Mapping[str, Mapping[str, Any]],  # of `saved.read`
    complete: Callable[[tuple[bool, ...]], Mapping[str, set[str]]],
    fitted: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Copies a saved state into the tensors of ``states``; removes what is not saved.

    What others added to a parameter's state is replaced by what they had there when it was saved.

    Args:
        complete: makes the state of the chosen parameters complete in ``states``, and tells by name
            which kinds a step reads.
        fitted: makes a momentum of floats one of codes, or the reverse, as the plan keeps it.

    Raises:
        ValueError: something does not fit. ``states`` has its tensors and their values then.
    """
    before = {p: dict(kinds) for p, kinds in states.items() if isinstance(kinds, dict)}
    try:
        kinds = complete(tuple(bool(saved[name]) for name in named))
        saved = {name: own and fitted(name, own) for name, own in saved.items()}
        present = {name: p for name, p in named.items() if saved[name]}
        copies = [_copies(name, states[p], kinds[name], saved[name]) for name, p in present.items()]
        added = [
            (states[p], _added(saved[name], kinds[name], placements.local(p).device))
            for name, p in present.items()
        ]
        _check_counters({name: saved[name] for name in present})
    except BaseException:
        for p in [p for p in states if p not in before and isinstance(p, Tensor)]:
            del states[p]
        for p, own in before.items():
            states[p].clear()
            states[p].update(own)
        raise
    with torch.no_grad():
        for into, value in chain.from_iterable(copies):
            into.copy_(value)
    for (own, new), name in zip(added, present, strict=True):
        for kind in own.keys() - kinds[name]:
            del own[kind]
        own.update(new)
    for name, p in named.items():
        if not saved[name]:
            states.pop(p, None)


def _copies(
    name: str, own: Mapping[str, Tensor], kinds: set[str], saved: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """A parameter's state tensors, each with the saved one to copy into it. Nothing is written.

    Raises:
        ValueError: other kinds of state, or one of another shape.
    """
    if not kinds <= saved.keys() or _OWN & saved.keys() - kinds:
        raise ValueError(
            f"state_dict: expected {sorted(kinds)} for {name!r}, got {sorted(map(str, saved))}"
            f"{_hint(kinds, saved)}"
        )
    for kind in sorted(kinds):
        value, into = saved[kind], own[kind]
        if (
            not isinstance(value, Tensor)
            or value.shape != into.shape
            or is_dtensor(value) != is_dtensor(into)
        ):
            shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else f" {value!r}"
            raise ValueError(
                f"state_dict: expected {type(into).__name__} {tuple(into.shape)} for {name!r} "
                f"{kind}, got {type(value).__name__}{shape}{_hint_of_shape(kind, value, own)}"
            )
    return [(own[kind], saved[kind]) for kind in kinds]


def _hint_of_shape(kind: str, value: Any, own: Mapping[str, Tensor]) -> str:
    if kind != "variance" or not isinstance(value, Tensor):
        return ""
    write = field_of_variance(value.shape, own["momentum"].shape)
    return f"{SAVED_WITH} Then {write}"


def _hint(kinds: set[str], saved: Mapping[str, Any]) -> str:
    if kinds - saved.keys() and not _OWN & saved.keys():
        return (
            "; was it saved by one rank of Config(replicas='share')? Save gathered_state_dict(), "
            "or with torch.distributed.checkpoint"
        )
    write = fields_of(kinds - {*COUNTERS}, saved)
    then = f" Then {write}." if write else ""
    return f"{SAVED_WITH}{then} {BEGIN_ANEW}"


def _added(saved: Mapping[str, Any], kinds: set[str], device: torch.device) -> dict[str, Any]:
    """Copies of what others added to a parameter's state, on the parameter's device."""
    return {kind: _copied(value, device) for kind, value in saved.items() if kind not in kinds}


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if type(value) is dict:
        return {key: _copied(each, device) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each, device) for each in value)
    return copy.deepcopy(value)


def _check_counters(saved: Mapping[str, Mapping[str, Any]]) -> None:
    """That the saved parameters have counted the same steps, because there is one count for all."""
    for kind in COUNTERS:
        seen: dict[int, str] = {}  # by count: the first parameter that has it
        tensors: set[int] = set()
        for name, kinds in saved.items():
            if id(kinds[kind]) not in tensors:
                tensors.add(id(kinds[kind]))
                seen.setdefault(int(kinds[kind]), name)
        if len(seen) > 1:
            (one, name), (other, of), *_ = seen.items()
            raise ValueError(
                f"state_dict: {kind} is {one} for {name!r} and {other} for {of!r}, but all "
                "parameters of an optimizer have one count; write the one that is meant into all: "
                f"for kinds in state_dict['state'].values(): kinds[{kind!r}].fill_({other})"
            )
