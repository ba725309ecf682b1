"""What a route is, how sure one is, and the table of a model's routes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from .table import render

Algorithm = Literal["normuon", "adamw", "frozen"]
Certainty = Literal["certain", "likely", "untold"]


@dataclass(frozen=True)
class Route:
    """What one parameter gets.

    Args:
        algorithm: ``"normuon"``, ``"adamw"``, or ``"frozen"`` (never changed, no state).
        lr_mul, wd_mul: multiply the learning rate and the weight decay.
        flatten: a tensor [o, i, ...] is the matrix [o, i * ...] (convolutions) instead of a stack
            of its last two dimensions.
        splits: sizes along ``dim`` of projections fused in one matrix; each gets the update that a
            parameter of its own would get.
        heads: the number of equal matrices along ``dim``; with ``splits``, one number for all
            splits or one per split.
        dim: the dimension of ``splits`` and ``heads``: 0 (rows) or 1 (columns). A stack can have
            ``splits``, but not ``heads``.
        transposed: the rows are the inputs and the columns the outputs, as in the Conv1D of GPT-2:
            wherever the rule tells them apart (variance, scale), they change places. ``dim`` counts
            as the tensor is stored.
        unfrozen: for ``"frozen"``: the route in a plan of a tensor that requires a gradient. Routes
            that differ in it alone are equal.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, or that has no meaning for the
            algorithm.
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
                "Route.unfrozen: expected a Route, for 'frozen' alone, got "
                f"{self.unfrozen!r} for {self.algorithm!r}"
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


class Decision(NamedTuple):
    """What was decided for a parameter, why, and how sure that is.

    ``certain`` is done without a word. ``likely`` is done and said once. ``untold``: what is known
    fits both rules; one is taken and said once.
    """

    route: Route
    reason: str
    certainty: Certainty = "certain"


class Routed(NamedTuple):
    """One parameter, or buffer, in a `RouteTable`."""

    name: str
    shape: tuple[int, ...]
    module: str  # the class of the module that it belongs to
    route: Route
    reason: str
    certainty: Certainty = "certain"


class RouteTable(dict[str, Route]):
    """What `routes_for` returns: name -> Route, for all of a model. ``str(table)`` says why.

    A plan may have fewer parameters than the table, but no others. A parameter is found as the
    tensor that the model has now, whatever its name in the plan, and otherwise by its name. Merged
    into a plain dict the table is one, by names alone; so is a pickled table.
    """

    def __init__(self, entries: Iterable[Routed], model: nn.Module | None = None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        # The model and not its tensors: torch does not swap tensors that have weak references.
        self._model = None if model is None else weakref.ref(model)
        super().__init__({name: entry.route for name, entry in self.entries.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __str__(self) -> str:
        rows = [("parameter", "shape", "module", "route", "why")]
        for e in self.entries.values():
            shape = "x".join(map(str, e.shape)) or "scalar"
            sure = "" if e.certainty == "certain" else f" ({e.certainty})"
            rows.append((e.name, shape, e.module, str(self.get(e.name, e.route)), e.reason + sure))
        return render(rows)

    def decisions(self) -> dict[str, Decision]:
        """Every route with its reason and how sure it is; a route that was written over is."""
        return {name: self._decision(name) for name in self}

    def unsure(self) -> dict[str, Decision]:
        """The decisions that are likely, or could not be told. `doubts.warning_text` says them."""
        return {k: d for k, d in self.decisions().items() if d.certainty != "certain"}

    def find(self, name: str) -> tuple[Route, str]:
        return self.decide(name, None)[:2]

    def decide_all(self, params: Mapping[str, Tensor]) -> dict[str, Decision]:
        """The decision for each of ``params``, found as a tensor of the model or by name.

        Raises:
            ValueError: as `decide`.
        """
        names: dict[int, list[str]] = {}
        model = None if self._model is None else self._model()
        for path, module in () if model is None else model.named_modules(remove_duplicate=False):
            for leaf, tensor in module._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if name in self:
                    names.setdefault(id(tensor), []).append(name)
        found = {}
        for name, tensor in params.items():
            known = names.get(id(tensor), [name])
            found[name] = self.decide(name if name in known else known[0], tuple(tensor.shape))
        return found

    def decide(self, name: str, shape: tuple[int, ...] | None) -> Decision:
        """The route of a parameter of that shape, or of one such per member of an ensemble.

        Raises:
            ValueError: the table has no such name, or its route has no meaning for an ensemble.
        """
        if name not in self:
            raise ValueError(
                f"params[{name!r}]: routes_for() was given a model without it, neither as a tensor "
                f"nor by name; it has {list(self)[:8]!r} ... Give it the module that params come "
                "from, or make a plain dict of it: {**routes_for(model)}"
            )
        found, entry = self._decision(name), self.entries.get(name)
        stacked = entry is not None and shape is not None and shape[1:] == entry.shape
        parts = found.route.flatten or found.route.heads is not None
        if entry is not None and stacked and parts:
            raise ValueError(
                f"params[{name!r}]: expected the shape {entry.shape}, got {shape}, one "
                f"per member of an ensemble, for which there is no {found.route}; write "
                f"routes={{**routes_for(model), {name!r}: nm.Route('adamw')}}"
            )
        return found

    def _decision(self, name: str) -> Decision:
        entry = self.entries.get(name)
        if entry is not None and entry.route == self[name]:
            return Decision(self[name], entry.reason, entry.certainty)
        return Decision(self[name], "routes")
