"""What a saved state means: the options and routes that it was made with, and which of them matter.

Tensors do not tell whether a momentum is a sum or an average, nor which rows are a head. So files
of `save` and the groups of an optimizer have the options and routes as text beside the state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..routing.routes import Route
from ..types import Config

# The options that decide what the state means, or how a state of the same shape is laid out, each
# with the rule whose parameters it is about. A run does not continue from a state that was saved
# with another value of one of them.
_CONFIG_OF_STATE = {
    "momentum_form": "normuon", "normalize": "normuon", "reduction": "normuon", "other": "adamw",
}  # fmt: skip
_ROUTE_OF_STATE = ("algorithm", "flatten", "heads", "splits", "dim", "transposed")
_MULTIPLIERS = ("lr_mul", "wd_mul")
# What has no state: a decay form too, also one that keeps the norm of the weights as they are now.
_ROUTE_OF_STEPS = (*_MULTIPLIERS, "weight_decay_form", "cautious_update")
_NOT_OF_A_RUN = ("orthogonalizer", "metrics", "state_device")
_SHOWN = 8
BEGIN_ANEW = (
    "To begin a parameter's state anew instead, delete its entry of state_dict['state'] before "
    "loading: del state_dict['state'][group['params'][group['param_names'].index(name)]]"
)
FORM = "state_form"  # the key of a parameter group
MISSED = "missed"  # beside the fields of a route in it: see optim/missed_steps.py
Texts = Mapping[str, str]  # field -> repr of its value


class Meaning(NamedTuple):
    """Options and routes as text. A field that is not there had its default."""

    config: Texts
    routes: Mapping[str, Texts]  # by parameter, or by its place


class Differences(NamedTuple):
    """What was otherwise when a state was saved, as parts of a sentence."""

    fatal: list[str]  # the state would be read as something else
    harmless: list[str]  # the state is the same


def listed(lines: Sequence[str]) -> str:
    """The first of these lines, and how many more there are."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def misfits(compared: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str | None:
    """What to say of a state of a model with other shapes: routes follow the shapes.

    ``compared``: what a tensor is called, the shape that is expected and the one that was saved.
    """
    lines = [
        f"{what}: expected shape {tuple(expected)}, got {tuple(came)}"
        for what, expected, came in compared
        if tuple(expected) != tuple(came)
    ]
    if not lines:
        return None
    return (
        f"belongs to a model with other shapes: {listed(lines)}. Build the model with the sizes "
        "that it had when this was saved, and its parameters in that order"
    )


def config_texts(config: Config) -> dict[str, str]:
    """Every option that belongs to a run."""
    return {name: repr(getattr(config, name)) for name in _CONFIG_DEFAULTS}


def route_texts(route: Route) -> dict[str, str]:
    """Every field of a route."""
    return {f.name: repr(getattr(route, f.name)) for f in dataclasses.fields(route)}


def differences(
    saved: Meaning, config: Config, routes: Mapping[str, Route], rules_too: bool = True
) -> Differences:
    """What differs between a saved state and ``config`` and ``routes`` now.

    ``routes`` are those of the parameters whose state was saved. One that ``saved`` does not know
    is not compared. ``rules_too``: whether ``saved`` also tells which algorithm each had.
    """
    fatal, harmless = [], []
    rules = {str(route.algorithm) for route in routes.values()}
    for name, now in config_texts(config).items():
        old = saved.config.get(name, _CONFIG_DEFAULTS[name])
        if old == now:
            continue
        line = f"Config.{name} was {old}, is {now}"
        if _CONFIG_OF_STATE.get(name) in rules and not _is_unread(name, saved.config, config):
            fatal.append(f"{line}: write Config({name}={old})")
        else:
            harmless.append(line)
    for parameter, route in routes.items():
        before, after = saved.routes.get(parameter), _read(route)
        if before is None:
            continue
        for k, default in _ROUTE_DEFAULTS.items():
            old = before.get(k, default)
            if _is_alike(k, old, after[k]) or (k == "algorithm" and not rules_too):
                continue
            line = f"the route of {parameter!r} had {k}={old}, has {after[k]}"
            if k in _ROUTE_OF_STATE:
                fatal.append(f"{line}: write Route({k}={old})")
            else:
                harmless.append(line)
    return Differences(fatal, harmless)


def _is_alike(field: str, old: str, new: str) -> bool:
    return old == new or (field in _MULTIPLIERS and old in ("0", "1") and f"{old}.0" == new)


def _is_unread(name: str, saved: Texts, config: Config) -> bool:
    """Whether an option is about variances, and neither side has any."""
    return name == "reduction" and not config.normalize and saved.get("normalize") == "False"


# --- as the value of a key of a parameter group


def form_of(config: Config, routes: Iterable[Route], missed: Iterable[int] = ()) -> str:
    """JSON of what is not the default, with routes by their place: {"config": .., "routes": ..}.

    One string, because torch.distributed.checkpoint loads a dict key by key, and ignores those that
    the optimizer which loads does not have. The algorithms are left out: each has other tensors.

    ``missed``: by the place of a route too, how many steps its parameter has missed.
    """
    texts = config_texts(config)
    own = {k: text for k, text in texts.items() if text != _CONFIG_DEFAULTS[k]}
    found, routes = {}, list(routes)
    for k, (route, steps) in enumerate(zip(routes, [*missed] or [0] * len(routes), strict=True)):
        written = {
            f: x for f, x in _read(route).items() if x != _ROUTE_DEFAULTS[f] and f != "algorithm"
        }
        if steps:
            written[MISSED] = str(steps)
        if written:
            found[str(k)] = written
    return json.dumps({"config": own, "routes": found})


def read_form(text: object, where: str) -> Meaning:
    """What `form_of` wrote.

    Raises:
        ValueError: it did not write ``text``; ``where`` stands before the message.
    """
    try:
        found: Any = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() == {"config", "routes"}:
        config, routes = found["config"], found["routes"]
        if _is_texts(config) and isinstance(routes, dict) and all(map(_is_texts, routes.values())):
            return Meaning(config, routes)
    raise ValueError(
        f"{where}{FORM}: expected what NorMuon wrote there when the state was saved, got "
        f"{text!r:.80}; delete the key from the group to load its state without this check"
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())


def _read(route: Route) -> dict[str, str]:
    """What is compared of a route."""
    texts = route_texts(route) | {"algorithm": repr(str(route.algorithm))}
    texts |= {k: repr(float(getattr(route, k))) for k in _MULTIPLIERS}
    return {k: texts[k] for k in (*_ROUTE_OF_STATE, *_ROUTE_OF_STEPS)}


# --- what tensors tell


def fields_of(expected: Iterable[str], saved: Iterable[str]) -> str:
    """What to write so that a state of the kinds ``saved`` fits, or nothing that is known.

    Both are kinds of state of one parameter.
    """
    lines, own, found = [], {*expected}, {*saved}
    missing, extra = own - found, found - own
    if "exp_avg" in missing and "momentum" in extra:
        lines.append("give it the Route('normuon')")
    elif "momentum" in missing and "exp_avg" in extra:
        lines.append("give it the Route('adamw')")
    else:
        for kind, field, on, off in _BY_KIND:
            if kind in missing or kind in extra:
                lines.append(f"write Config({field}={on if kind in extra else off})")
    masters = {kind: name for name, kind in (("mantissa", "mantissa"), ("fp32", "master"))}
    had = next((masters[kind] for kind in masters if kind in extra), None)
    if had is not None or missing & masters.keys():
        lines.append(f"write Config(master={had or 'none'!r})")
    return "; ".join(lines)


def field_of_variance(shape: Sequence[int], of_momentum: Sequence[int]) -> str:
    """What to write so that a variance of ``shape`` fits."""
    reduction = "entries" if tuple(shape) == tuple(of_momentum) else "rows"
    return f"write Config(reduction={reduction!r})"


_BY_KIND = (  # a kind of state, the field of Config, its value with that kind and without
    ("variance", "normalize", "True", "False"),
    ("exp_avg_sq", "other", "'adamw'", "'lion'"),
)
_CONFIG_DEFAULTS = {
    f.name: repr(f.default) for f in dataclasses.fields(Config) if f.name not in _NOT_OF_A_RUN
}
_ROUTE_DEFAULTS = _read(Route("normuon"))
