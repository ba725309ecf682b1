"""Which route each parameter of a plan has: the one asked for, the table's, or what names tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import Any, get_args

import torch
from torch import Tensor

from .doubts import warn_at_caller
from .keys import Key, Keys, is_glob
from .names import by_names
from .route_table import RouteTable
from .routes import Algorithm, Decision, Route
from .uses import is_window, unwrapped

# The keys are `Key`s. A Mapping does not vary with its keys, so a dict of names and predicates, or
# of predicates alone, would be no Mapping[Key, Route] to a type checker.
Routes = Mapping[Any, Route]


def decide_routes(
    params: Mapping[str, Tensor], routes: Routes, *, say: bool = True
) -> dict[str, Decision]:
    """The route of every parameter, its reason, and how sure that is.

    ``say``: whether entries that have no effect are said; they were, where parameters are added.

    Raises:
        TypeError: routes that are no mapping, or have a key or value of another type.
        ValueError: a key that matches no parameter.
    """
    if isinstance(routes, RouteTable):
        found = routes.decide_all(params)
    else:
        entries = Entries("routes", routes)
        found = _asked(entries, params, say)
        if len(found) < len(params) or not all(each.route.decides for each in found.values()):
            named = by_names(params)
            found = {n: found[n].over(base) if n in found else base for n, base in named.items()}
            entries.check_options({name: each.route for name, each in found.items()})
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
    return _asked(Entries("routes", routes), params, False)


def asked_of_group(
    params: Mapping[str, Tensor], routes: Routes, *, say: bool
) -> tuple[dict[str, Decision], Callable[[Mapping[str, Route]], None]]:
    """`asked`, and `Entries.check_options` for when it is known what these routes go over."""
    entries = Entries("routes", routes)
    return _asked(entries, params, say), entries.check_options


def _asked(entries: Entries, params: Mapping[str, Tensor], say: bool) -> dict[str, Decision]:
    decided = {name: entries.decide([(name, tensor)]) for name, tensor in params.items()}
    entries.check_used()
    if say:
        entries.warn_of_no_effect()
    return {name: found for name, found in decided.items() if found is not None}


class Entries:
    """What a user writes for names, globs and predicates.

    Of the entries that match a parameter the first that decides a rule wins, and the multipliers of
    those before it apply on top, the first of each. Where none decides, the route has multipliers
    alone. Multipliers that stand behind, and so do not reach a parameter, are said, and so are
    entries that change nothing at all. Reasons begin with ``what``; errors with ``called``, the
    argument of the caller.
    """

    def __init__(self, what: str, routes: Routes, called: str | None = None) -> None:
        self._called = called or what
        if not isinstance(routes, Mapping):
            raise TypeError(
                f"{self._called}: expected a dict of name, glob or predicate -> Route, got "
                f"{type(routes).__name__}"
            )
        for key, route in routes.items():
            if not isinstance(route, Route):
                raise TypeError(f"{self._called}[{key!r}]: {_no_route(route)}")
            if isinstance(key, type):
                raise TypeError(
                    f"{self._called}: expected names, globs or predicates as keys, got the class "
                    f"{key.__name__}; write the names of its parameters, for example with a glob "
                    "(no decay of norms and biases: nm.routes_for(model, decay_vectors=False))"
                )
            if not isinstance(key, str) and not callable(key):
                raise TypeError(
                    f"{self._called}: expected names, globs or predicates as keys, got {key!r}"
                )
        self._what, self._routes = what, dict[Key, Route](routes.items())
        self._keys, self._used, self._names = Keys(self._routes), set[Key](), list[str]()
        self._options: dict[Key, list[str]] = {}  # of matrices: which parameters get them
        self._lost: dict[tuple[Key, Key], list[str]] = {}  # multipliers, and what stands before
        self._vain: dict[Key, tuple[Key, str]] = {}  # what stands before an entry, for a parameter
        self._worked: set[Key] = set()  # entries that changed something, or asked for what is so
        self._matched: Counter[Key] = Counter()  # how many parameters

    def decide(self, names: Sequence[tuple[str, Tensor]]) -> Decision | None:
        """What is asked for a tensor with these names; ``None``: nothing."""
        self._names += [name for name, _ in names]
        matching = self._keys.matching(names)
        if not matching:
            return None
        first = next((k for k, key in enumerate(matching) if self._routes[key].decides), None)
        *before, last = matching if first is None else matching[: first + 1]
        self._check_tied(matching, names)
        after = matching[len(before) + 1 :] if names[0][1].numel() else ()
        self._note((*before, last), after, names[0][0])
        route, reason = self._routes[last], self._label(last)
        for key in reversed(before):
            route, reason = self._routes[key].over(route), f"{reason}; {self._label(key)}"
        return Decision(route, reason)

    def _note(self, used: Sequence[Key], after: Sequence[Key], name: str) -> None:
        """What `check_used` and `check_options` want to know of a parameter."""
        self._used.update(used)
        self._matched.update((*used, *after))
        above: list[Route] = []
        for key in used:
            route = self._routes[key]
            if route.has_options and not route.decides:
                self._options.setdefault(key, []).append(name)
            works = route.decides or route.has_options or not above
            if works or route.adds_to(above) or route.agrees_with(above):
                self._worked.add(key)
            else:
                self._vain.setdefault(key, (used[0], name))
            above.append(route)
        for key in after:
            route = self._routes[key]
            if route.decides and route != above[-1]:
                self._vain.setdefault(key, (used[-1], name))
            elif route.decides:
                self._worked.add(key)
            elif route.adds_to(above) and not route.agrees_with(above):
                self._lost.setdefault((key, used[-1]), []).append(name)

    def _check_tied(self, matching: Sequence[Key], names: Sequence[tuple[str, Tensor]]) -> None:
        """That a tensor with several names has one route."""
        if len(names) < 2:
            return
        exact = [key for key in matching if isinstance(key, str) and not is_glob(key)]
        pairs = combinations([self._routes[key] for key in exact], 2)
        if any(one.contradicts(other) for one, other in pairs):
            raise ValueError(
                f"{self._called}: {exact!r} are one tensor (tied), and have different routes; "
                "write one of them"
            )

    def check_used(self) -> None:
        """That every key matches a parameter, and that no multipliers stand behind what decides."""
        unmatched = self._keys.unmatched()
        if unmatched:
            numbered = self._names and all(name.startswith("groups.") for name in self._names)
            hint = (
                "; parameters without names are found by routes=nm.routes_for(model, {...})"
                if numbered
                else ""
            )
            raise ValueError(
                f"{self._called}: {unmatched!r} match no parameter{self._meant(unmatched[0])}; the "
                f"parameters are {self._names[:8]!r} ...{hint}"
            )
        for key, route in self._routes.items():
            if not route.decides and key not in self._used:
                raise ValueError(
                    f"{self._label(key, self._called)}: expected to change multipliers, but "
                    "entries before it decide everything about the parameters that it matches; "
                    "write it before them (for a table: nm.routes_for(model, {...}))"
                )

    def _meant(self, key: Key) -> str:
        """What was meant by a key that matches nothing, if that can be guessed."""
        if not isinstance(key, str):
            return ""
        if any(name.startswith(f"{key}.") for name in self._names):
            return f" (did you mean {key + '.*'!r}?)"
        wrapped = [name for name in self._names if unwrapped(name) == unwrapped(key) != []]
        if wrapped:
            return f" (did you mean {wrapped[0]!r}? The model is wrapped; the one inside works too)"
        close = get_close_matches(key, self._names, n=1, cutoff=0.8)
        return f" (did you mean {close[0]!r}?)" if close else ""

    def warn_of_no_effect(self) -> None:
        """Says which entries change nothing, and which multipliers do not reach a parameter."""
        for key, (before, name) in self._vain.items():
            special = self._matched[key] < self._matched[before] or key == name
            if key not in self._worked and special:
                warn_at_caller(
                    f"{self._label(key, self._called)}: {self._routes[key]} changes nothing, "
                    f"because {self._label(before, self._called)} stands before it and has decided "
                    f"for {name}; of entries for one parameter the first counts, so write what is "
                    "special before what is general (for a table: nm.routes_for(model, {...}))"
                )
        for (key, last), names in self._lost.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warn_at_caller(
                f"{self._label(key, self._called)}: {self._routes[key]} does not reach "
                f"{', '.join(names[:3])}{more}, because {self._label(last, self._called)} stands "
                "before it and decides all; write the multipliers first, or in that route too"
            )

    def check_options(self, routes: Mapping[str, Route]) -> None:
        """That options of matrices alone reach one; ``routes`` are what was decided in the end."""
        for key, names in self._options.items():
            if not any(routes[name].is_of_matrices for name in names if name in routes):
                raise ValueError(
                    f"{self._label(key, self._called)}: weight_decay_form and cautious_update are "
                    f"for matrices that NorMuon updates, and it matches none: {names[:8]}; leave "
                    "them out"
                )

    def _label(self, key: Key, called: str | None = None) -> str:
        text = repr(key) if isinstance(key, str) else getattr(key, "__name__", "predicate")
        return f"{called or self._what}[{text}]"


def _no_route(given: object) -> str:
    """What to write in the place of something that is no Route."""
    if isinstance(given, str):
        name = given.lower()
        meant = name if name in get_args(Algorithm) else None
        write = f"nm.Route({meant!r})" if meant else "nm.Route('adamw') or nm.Route('normuon')"
        return f"expected a Route, got {given!r}; write {write}"
    if isinstance(given, Mapping):
        return f"expected a Route, got a dict; write nm.Route(**{dict(given)!r:.60})"
    lr = ", or nm.Route(lr_mul=...) for a rate" if isinstance(given, (int, float)) else ""
    call = "; call it: nm.Route()" if given is Route else f"; write nm.Route('adamw'){lr}"
    return f"expected a Route, got {type(given).__name__}{call}"
