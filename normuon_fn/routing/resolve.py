"""Which route each parameter of a plan has: the one asked for, the table's, or what names tell."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .names import by_names
from .routes import Decision, Route, RouteTable
from .uses import is_window

Key = str | Callable[[str, Tensor], bool]
Routes = Mapping[str, Route] | Mapping[Key, Route]


def decide_routes(params: Mapping[str, Tensor], routes: Routes) -> dict[str, Decision]:
    """The route of every parameter, its reason, and how sure that is.

    Raises:
        TypeError: routes that are no mapping, or have a key or value of another type.
        ValueError: a key that matches no parameter.
    """
    if not isinstance(routes, Mapping):
        raise TypeError(
            "routes: expected a dict of name, glob or predicate -> Route, got "
            f"{type(routes).__name__}"
        )
    if isinstance(routes, RouteTable):
        found = routes.decide_all(params)
    else:
        found = asked(params, routes)
        if len(found) < len(params):
            named = by_names(params)
            found = {name: found.get(name, named[name]) for name in params}
    return {name: _seen(found[name], tensor) for name, tensor in params.items()}


def is_written(decision: Decision) -> bool:
    """Whether somebody wrote the route for this parameter, by name, pattern or group."""
    return decision.reason.startswith(("routes", "overrides[", "algorithm="))


def _seen(found: Decision, tensor: Tensor) -> Decision:
    """The decision with what the tensor itself tells: it is empty, or looks like a convolution."""
    shape, route = tuple(tensor.shape), found.route
    if tensor.numel() == 0:
        if is_written(found) and len(shape) == 1:
            return Decision(Route("frozen"), f"{found.reason}: no entries")
        return Decision(Route("frozen"), "no entries")
    if route.algorithm == "normuon" and not route.flatten and len(shape) > 2 and is_window(shape):
        count = torch.Size(shape[:-2]).numel()
        how = f"shape {shape} is read as {count} matrices of {shape[-2]}x{shape[-1]}"
        return Decision(route, f"{found.reason}; {how}", "likely")
    return found


def asked(params: Mapping[str, Tensor], routes: Routes) -> dict[str, Decision]:
    """The routes that were asked for by name, glob or predicate, of the parameters they match."""
    for key, route in routes.items():
        if not isinstance(route, Route):
            raise TypeError(f"routes[{key!r}]: expected a Route, got {type(route).__name__}")
        if not isinstance(key, str) and not callable(key):
            raise TypeError(f"routes: expected names, globs or predicates as keys, got {key!r}")
    order = {key: at for at, key in enumerate(routes)}
    plain = {key for key in order if isinstance(key, str) and not set(key) & set("*?[")}
    patterns = [key for key in order if key not in plain]
    matched, found = set(), {}
    for name, tensor in params.items():
        keys = [key for key in patterns if _matches(key, name, tensor)]
        keys += [name] if name in order and name not in keys else []
        matched.update(keys)
        if keys:
            key = min(keys, key=order.__getitem__)
            label = repr(key) if isinstance(key, str) else getattr(key, "__name__", "predicate")
            found[name] = Decision(routes[key], f"routes[{label}]")  # type: ignore[index]
    unmatched = [key for key in order if key not in matched]
    if unmatched:
        raise ValueError(
            f"routes: {unmatched!r} match no parameter; the parameters are {list(params)[:8]!r} ..."
        )
    return found


def _matches(key: Key, name: str, tensor: Tensor) -> bool:
    return fnmatch.fnmatchcase(name, key) if isinstance(key, str) else bool(key(name, tensor))
