"""Which algorithm each parameter gets, why, and how it is read as matrices."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from .table import render

Algorithm = Literal["normuon", "adamw", "frozen"]


@dataclass(frozen=True)
class Route:
    """What one parameter gets.

    Args:
        algorithm: ``"normuon"``, ``"adamw"``, or ``"frozen"`` (never changed, no state).
        lr_mul, wd_mul: multiply the learning rate and the weight decay.
        flatten: a tensor [o, i, ...] is the matrix [o, i * ...] (convolutions) instead of a stack of its last two dimensions.
        splits: sizes along ``dim`` of projections fused in one matrix; each gets the update that a parameter of its own would.
        heads: so many equal matrices along ``dim``; with ``splits``, one number for all or one a split.
        dim: the dimension of ``splits`` and ``heads``: 0 (rows) or 1 (columns). A stack can have ``splits``, not ``heads``.
        transposed: the rows are the inputs and the columns the outputs, as in the Conv1D of GPT-2: wherever the rule tells them
            apart (variance, scale), they change places. ``dim`` counts as the tensor lies.
        unfrozen: of ``"frozen"``: what it is instead in a plan of a tensor that requires a gradient. Routes that differ in it
            alone are equal.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, or that has no meaning for the algorithm.
    """

    algorithm: Algorithm = "normuon"
    lr_mul: float = 1.0
    wd_mul: float = 1.0
    flatten: bool = False
    heads: int | tuple[int, ...] | None = None
    splits: tuple[int, ...] | None = None
    dim: int = 0
    transposed: bool = False
    unfrozen: Route | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(
                f"Route.algorithm: expected one of {get_args(Algorithm)}, got {self.algorithm!r}"
            )
        for name in ("lr_mul", "wd_mul"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Route.{name}: expected a number, got {value!r}")
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"Route.{name}: expected a finite number >= 0, got {value!r}")
        for name in ("heads", "splits"):
            value = getattr(self, name)
            sizes = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
            if name == "splits" and value is not None and not isinstance(value, (tuple, list)):
                raise TypeError(f"Route.splits: expected a tuple of sizes, got {value!r}")
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or (
                value is not None and not sizes
            ):
                raise ValueError(f"Route.{name}: expected ints >= 1, got {value!r}")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.dim not in (0, 1):
            raise ValueError(f"Route.dim: expected 0 or 1, got {self.dim!r}")
        if self.algorithm != "normuon" and (
            self.flatten or self.heads is not None or self.splits is not None or self.transposed
        ):
            raise ValueError(
                f"Route: flatten, heads and splits are for 'normuon', not for {self.algorithm!r}"
            )
        if self.flatten and (self.heads is not None or self.splits is not None):
            raise ValueError("Route: flatten cannot be combined with heads or splits")
        if self.unfrozen is not None and (
            self.algorithm != "frozen" or not isinstance(self.unfrozen, Route)
        ):
            raise ValueError(
                f"Route.unfrozen: expected a Route, for 'frozen' alone, got {self.unfrozen!r} for {self.algorithm!r}"
            )

    def __str__(self) -> str:
        """In few words, for a table."""
        words: list[str] = [self.algorithm]
        words += [
            f"{word}={value:g}"
            for word, value in (("lr*", self.lr_mul), ("wd*", self.wd_mul))
            if value != 1.0
        ]
        words += [
            word for word, on in (("flatten", self.flatten), ("transposed", self.transposed)) if on
        ]
        along = "rows" if self.dim == 0 else "columns"
        if self.splits is not None:
            words.append(f"splits {'+'.join(map(str, self.splits))} of {along}")
        if self.heads is not None:
            counts = self.heads if isinstance(self.heads, tuple) else (self.heads,)
            words.append(
                f"heads {'+'.join(map(str, counts))}{'' if self.splits else f' of {along}'}"
            )
        return " ".join(words)


class Routed(NamedTuple):
    """One parameter, or buffer, in a `RouteTable`."""

    name: str
    shape: tuple[int, ...]
    module: str  # the class of the module that it belongs to
    route: Route
    reason: str


class RouteTable(dict[str, Route]):
    """What `routes_for` returns: name -> Route, for all of a model. ``str(table)`` says why.

    A plan may be of fewer parameters than the table has, but not of others. Merged into a plain dict it is one.
    """

    def __init__(self, entries: Iterable[Routed]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        super().__init__({name: entry.route for name, entry in self.entries.items()})

    def __str__(self) -> str:
        rows = [("parameter", "shape", "module", "route", "why")]
        for e in self.entries.values():
            rows.append(
                (
                    e.name,
                    "x".join(map(str, e.shape)) or "scalar",
                    e.module,
                    str(self.get(e.name, e.route)),
                    e.reason,
                )
            )
        return render(rows)

    def find(self, name: str) -> tuple[Route, str]:
        if name not in self:
            raise ValueError(
                f"params[{name!r}]: routes_for() was given a model without it; it has {list(self)[:8]!r} ... Give it the "
                "module that the names of params come from, or make a plain dict of it: {**routes_for(model)}"
            )
        entry = self.entries.get(name)
        return (
            (self[name], entry.reason)
            if entry is not None and entry.route == self[name]
            else (self[name], "routes")
        )


Key = str | Callable[[str, Tensor], bool]
Routes = Mapping[str, Route] | Mapping[Key, Route]


def resolve_routes(params: Mapping[str, Tensor], routes: Routes) -> dict[str, tuple[Route, str]]:
    if not isinstance(routes, Mapping):
        raise TypeError(
            f"routes: expected a dict of name, glob or predicate -> Route, got {type(routes).__name__}"
        )
    if isinstance(routes, RouteTable):
        return {
            name: (Route("frozen"), "no entries") if t.numel() == 0 else routes.find(name)
            for name, t in params.items()
        }
    unmatched: dict[object, Route] = dict(routes.items())
    routed = {}
    for name, tensor in params.items():
        for key, route in routes.items():
            if not isinstance(route, Route):
                raise TypeError(f"routes[{key!r}]: expected a Route, got {type(route).__name__}")
            if not isinstance(key, str) and not callable(key):
                raise TypeError(f"routes: expected names, globs or predicates as keys, got {key!r}")
            matches = (
                (key == name or fnmatch.fnmatchcase(name, key))
                if isinstance(key, str)
                else bool(key(name, tensor))
            )
            if matches:
                unmatched.pop(key, None)
                if name not in routed:
                    label = (
                        repr(key) if isinstance(key, str) else getattr(key, "__name__", "predicate")
                    )
                    routed[name] = (route, f"routes[{label}]")
        if name not in routed:
            routed[name] = _default_route(name, tensor)
        if tensor.numel() == 0:
            routed[name] = (Route("frozen"), "no entries")
    if unmatched:
        raise ValueError(
            f"routes: {list(unmatched)!r} match no parameter; the parameters are {list(params)[:8]!r} ..."
        )
    return routed


_LOOKUP = re.compile(
    r"(^|[._])(embed\w*|\w*_emb|emb|wte|wpe|lm_head|head|unembed\w*)([._]|$)", re.IGNORECASE
)


def _default_route(name: str, tensor: Tensor) -> tuple[Route, str]:
    if tensor.ndim < 2:
        return Route("adamw"), f"{tensor.ndim}-D"
    if (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[0] == 1)) and _LOOKUP.search(name):
        return Route("adamw"), "embedding or output head, by name"
    return Route("normuon"), "matrix" if tensor.ndim == 2 else "stack of matrices"
