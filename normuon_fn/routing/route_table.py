"""`RouteTable`: a route for every parameter and buffer of a model, with the reasons."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .doubts import unsure
from .keys import is_glob
from .routes import Certainty, Decision, Route
from .table import render


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
    tensor that the model has now, whatever its name in the plan, and otherwise by its name.
    ``table | {name: Route(...)}`` is another table, in which a route with multipliers alone keeps
    the rest of what the table had. ``{**table}`` is a plain dict, by names alone: there a new route
    takes the place of the table's wholly. A pickled table goes by names alone too.
    """

    def __init__(self, entries: Iterable[Routed], model: nn.Module | None = None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        # The model and not its tensors: torch does not swap tensors that have weak references.
        self._model = None if model is None else weakref.ref(model)
        # the table of a model as it is now, by the same overrides
        self.read_again: Callable[[nn.Module], RouteTable] | None = None
        super().__init__({name: entry.route for name, entry in self.entries.items()})

    @property
    def model(self) -> nn.Module | None:
        """The model whose modules were read, if it still exists."""
        return None if self._model is None else self._model()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "read_again": None}

    def grown(self, params: Mapping[str, Tensor]) -> RouteTable:
        """The same table, with entries for what the model has got since, if ``params`` have any."""
        model = self.model
        known = self.names_of(params).values()
        if model is None or self.read_again is None or all(name in self for name in known):
            return self
        new = {k: e for k, e in self.read_again(model).entries.items() if k not in self}
        table = copy.copy(self)
        table.entries = self.entries | new
        table.update({name: entry.route for name, entry in new.items()})
        return table

    def __str__(self) -> str:
        rows = [("parameter", "shape", "module", "route", "why")]
        for e in self.entries.values():
            shape = "x".join(map(str, e.shape)) or "scalar"
            found = self._decision(e.name) if e.name in self else e
            sure = "" if found.certainty == "certain" else f" ({found.certainty})"
            rows.append((e.name, shape, e.module, str(found.route), found.reason + sure))
        return render(rows)

    def __or__(self, routes: Mapping[str, Route]) -> RouteTable:  # type: ignore[override]
        table = copy.copy(self)
        table |= routes
        return table

    def __ior__(self, routes: Mapping[str, Route]) -> RouteTable:  # type: ignore[override]
        entries = self.entries | getattr(routes, "entries", {})
        for name, route in routes.items():
            is_name = isinstance(name, str) and not is_glob(name)
            if name not in self and not (is_name and route.decides):
                raise ValueError(
                    f"table | {{{name!r}: ...}}: expected a name of the table; for globs, "
                    "predicates and multipliers of other names write nm.routes_for(model, {...})"
                )
            if not route.decides:
                before = self._decision(name)
                if route.has_options and not before.route.is_of_matrices:
                    raise ValueError(
                        f"table | {{{name!r}: ...}}: weight_decay_form and cautious_update are for "
                        f"matrices that NorMuon updates, and it has {before.route}; leave them out"
                    )
                found = Decision(route, "routes").over(before)
                entries[name] = self.entries[name]._replace(**found._asdict())
        self.update({k: x if x.decides else entries[k].route for k, x in routes.items()})
        self.entries = entries
        return self

    def decisions(self) -> dict[str, Decision]:
        """Every route with its reason and how sure it is; a route that was written over is."""
        return {name: self._decision(name) for name in self}

    def unsure(self) -> dict[str, Decision]:
        """The decisions that are likely, or could not be told. `doubts.warning_text` says them."""
        return unsure(self.decisions())

    def find(self, name: str) -> tuple[Route, str]:
        return self.decide(name, None)[:2]

    def names_of(self, params: Mapping[str, Tensor]) -> dict[str, str]:
        """What the table calls each of ``params``: the tensor's name in the model, or its own."""
        names: dict[int, list[str]] = {}
        model = self.model
        for path, module in () if model is None else model.named_modules(remove_duplicate=False):
            for leaf, tensor in module._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if name in self:
                    names.setdefault(id(tensor), []).append(name)
        known = {name: names.get(id(tensor), [name]) for name, tensor in params.items()}
        return {name: name if name in found else found[0] for name, found in known.items()}

    def decide_all(self, params: Mapping[str, Tensor]) -> dict[str, Decision]:
        """The decision for each of ``params``, found as a tensor of the model or by name.

        Raises:
            ValueError: as `decide`.
        """
        names = self.names_of(params)
        return {n: self.decide(names[n], tuple(tensor.shape)) for n, tensor in params.items()}

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
                f"per member of an ensemble, for which there is no {found.route}; make the plan of "
                "one member, and step all with torch.func.vmap over nm.update (or give it AdamW: "
                f"routes={{**routes_for(model), {name!r}: nm.Route('adamw')}})"
            )
        return found

    def _decision(self, name: str) -> Decision:
        entry = self.entries.get(name)
        if entry is not None and entry.route == self[name]:
            return Decision(self[name], entry.reason, entry.certainty)
        asked = Decision(self[name], "routes")
        if entry is None:
            return asked
        return asked.over(Decision(entry.route, entry.reason, entry.certainty))
