"""`put_state_`: a flat state, as `convert_state` and `init` make it, put into an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnostics.monitor import find_inside
from .matching import some, unwrapped
from .missed_steps import MissedSteps
from .offloading import wait_for_copies_sync
from .saved import Saved
from .state import COUNTERS, SAVED_WITH

Params = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@torch.no_grad()
def put_state_(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], params: Params | None = None
) -> None:
    """Puts the flat state of a plan into a `NorMuon`, which goes on from it.

        state = nm.convert_state(saved, nm.make_plan(model, optimizer.config), names)
        nm.put_state_(optimizer, state, model)

    Parameters are found as tensors, whatever the optimizer calls them and however its groups are
    made. The values are copied into the optimizer's own tensors, whose dtypes stay; ``state`` may
    be used for something else afterwards. Hyperparameters and schedules are left alone. Of a model
    whose parts several optimizers have, each takes its part.

    Returns nothing: ``optimizer`` is written. A flat state has one count of steps, so that AdamW's
    bias correction takes it for that of all its parameters.

    Shapes: of ``state``, as `init` makes it for the plan of the same options and routes.

    Units: those of `init`'s state. A momentum of floats becomes one of int8, and the reverse, as
    the optimizer keeps it.

    Args:
        optimizer: the NorMuon, also inside of a framework's wrapper.
        state: as `convert_state`, `init`, `step` or `load` return it, with the names of ``params``.
        params: the model, ``model.named_parameters()``, or a dict of it. ``None``: ``state`` has
            the optimizer's own names, as where it was made from the model.

    Raises:
        TypeError: ``optimizer`` is no NorMuon and has none inside, or ``state`` is no flat state.
        ValueError: ``params`` lacks a parameter of the optimizer; or ``state`` lacks a parameter or
            a kind of state, or has an unknown one, or another shape. Nothing is written then.

    Source: this library's own; what `convert_state` reads is of other optimizers.
    """
    own = find_inside(optimizer)
    if own is None:
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer: expected a NorMuon, got a {kind}; write nm.NorMuon(model)")
    by_name = _by_name(state)
    planner = own._settled()
    wait_for_copies_sync(planner)
    names, known = _names_of(planner.named, params)
    counters = {kind: state[f"guard.{kind}"] for kind in COUNTERS}
    short = {unwrapped(name): name for name in by_name}
    states: dict[str, Mapping[str, Any]] = {}
    lacking = []
    for name, p in planner.named.items():
        found = next((key for each in names[name] if (key := short.get(unwrapped(each)))), None)
        states[name] = {} if found is None else {**by_name[found], **counters}
        if found is None and own.state.get(p):
            lacking.append(names[name][0])
    of_model = {unwrapped(name) for name in known}
    strangers = [name for name in by_name if unwrapped(name) not in of_model]
    if lacking or strangers:
        raise ValueError(
            f"state: lacks the state of {some(lacking)}, and has that of {some(strangers)}, which "
            "params does not have; make it with nm.make_plan(model, optimizer.config) and the "
            "routes= of the optimizer, and give the model that its names are from: "
            "nm.put_state_(optimizer, state, model)"
        )
    try:
        saved = Saved(states, [], {}, {})
        own._begun = planner.load(own.state, own._begun, saved, MissedSteps())
        own._missed = planner.missed
    except ValueError as error:
        text = str(error).replace("state_dict: ", "state: ", 1)
        raise ValueError(
            f"{text.partition(SAVED_WITH)[0]}; it was made for other options or routes: write "
            "nm.make_plan(model, optimizer.config), and into it the optimizer's routes= if it has "
            "any, and convert or make the state anew for that plan"
        ) from error


def _by_name(state: Any) -> dict[str, dict[str, Tensor]]:
    """The state of each parameter, by its name and by kind.

    Raises:
        TypeError, ValueError: it is no flat state, with what to write.
    """
    flat = isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
    if not flat or not state:
        raise TypeError(
            "state: expected the flat state of a plan, name.kind -> tensor, as nm.convert_state "
            f"returns it, got {type(state).__name__}"
        )
    if {"state", "param_groups"} <= state.keys():
        raise ValueError(
            "state: expected the flat state of a plan, got an optimizer's state_dict(). Write "
            "optimizer.load_state_dict(state) for one of NorMuon; nm.convert_state makes that of "
            "another optimizer a flat state"
        )
    missing = [key for kind in COUNTERS if (key := f"guard.{kind}") not in state]
    if missing:
        raise ValueError(f"state: expected the flat state of a plan, which has {missing} too")
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if not isinstance(value, Tensor):
            raise ValueError(f"state[{key!r}]: expected a tensor, got {type(value).__name__}")
        if not (name == "guard" and kind in COUNTERS):
            found.setdefault(name, {})[kind] = value
    return found


def _names_of(
    named: Mapping[str, Tensor], params: Params | None
) -> tuple[dict[str, list[str]], set[str]]:
    """By the optimizer's name, what ``params`` calls a parameter; and all names that there are.

    Raises:
        ValueError: ``params`` lacks some.
    """
    if params is None:
        return {name: [name] for name in named}, {*named}
    if isinstance(params, nn.Module):
        pairs: Iterable[tuple[str, Tensor]] = params.named_parameters(remove_duplicate=False)
    else:
        pairs = params.items() if isinstance(params, Mapping) else params
    paths: dict[int, list[str]] = {}
    known = set()
    for name, p in pairs:
        paths.setdefault(id(p), []).append(name)
        known.add(name)
    missing = [tuple(p.shape) for p in named.values() if id(p) not in paths]
    if missing:
        raise ValueError(
            f"params: expected all of the optimizer's parameters, got none for {len(missing)} of "
            f"them, of shapes {missing[:8]}; write nm.put_state_(optimizer, state, model)"
        )
    return {name: paths[id(p)] for name, p in named.items()}, known
