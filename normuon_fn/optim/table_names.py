"""The names of parameters whose groups have none: a table of routes knows them as tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..routing.resolve import Routes
from ..routing.route_table import RouteTable
from .groups import AddedGroup


def with_names_of_table(added: Sequence[AddedGroup], routes: Routes | None) -> list[AddedGroup]:
    """The groups, where those that are new and have no names take them from a table.

    A group's own table goes before the optimizer's. A name that another parameter has already is
    not taken, as where two models of one kind are trained together. A group whose routes are
    written for numbers keeps these.
    """
    tables = [_table_of(group, routes) for group in added]
    asked: dict[int, tuple[RouteTable, dict[str, Tensor]]] = {}
    for group, table in zip(added, tables, strict=True):
        if table is not None:
            asked.setdefault(id(table), (table, {}))[1].update(group.params)
    names = {key: table.names_of(params) for key, (table, params) in asked.items()}
    taken = {name for group in added for name, _ in group.params}
    found = []
    for group, table in zip(added, tables, strict=True):
        own = []
        for name, p in group.params if table is not None else ():
            new = names[id(table)][name]
            own.append((name if new in taken else new, p))
            taken.add(new)
        found.append(group._replace(params=own) if own else group)
    return found


def _table_of(group: AddedGroup, routes: Routes | None) -> RouteTable | None:
    """The table that may know the names of a group's parameters."""
    if group.has_names or group.decisions is not None:
        return None
    if any(isinstance(key, str) and key.startswith("groups.") for key in group.routes):
        return None
    table = group.routes if isinstance(group.routes, RouteTable) else routes
    return table if isinstance(table, RouteTable) else None
