"""The names of parameters whose groups have none: a table of routes knows them as tensors."""

from __future__ import annotations

from collections.abc import Sequence

from ..routing.resolve import Routes
from ..routing.route_table import RouteTable
from .groups import AddedGroup


def with_names_of_table(added: Sequence[AddedGroup], routes: Routes | None) -> list[AddedGroup]:
    """The groups, where those that are new and have no names take them from a table.

    A group's own table goes before the optimizer's. A name that another parameter has already is
    not taken, as where two models of one kind are trained together.
    """
    taken = {name for group in added for name, _ in group.params}
    found = []
    for group in added:
        table = group.routes if isinstance(group.routes, RouteTable) else routes
        if group.has_names or group.decisions is not None or not isinstance(table, RouteTable):
            found.append(group)
            continue
        names = table.names_of(dict(group.params))
        own = []
        for name, p in group.params:
            new = names[name] if names[name] not in taken else name
            taken.add(new)
            own.append((new, p))
        found.append(group._replace(params=own))
    return found
