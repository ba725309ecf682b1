"""Whether a group that is added has names where the others have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .hyper import Groups


def with_names_alike(group: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The group, whose parameters are a list if they were an iterator.

    Raises:
        ValueError: its parameters have names and those of the other groups have none, or the
            reverse; with the line to write.
    """
    params = group.get("params")
    if isinstance(params, (Tensor, set, Mapping, nn.Module)) or not isinstance(params, Iterable):
        return group
    if "param_names" in group:  # of another optimizer, whose names go on
        return group
    listed = list(params)
    named = [isinstance(p, tuple) for p in listed]
    wanted = "param_names" in groups[0] if groups else any(named)
    where = "as the other groups have them" if groups else "as others of this group have them"
    if wanted and not all(named):
        kind = type(listed[named.index(False)]).__name__
        raise ValueError(
            f"params: expected named parameters, {where}, got a {kind}; "
            "write {'params': module.named_parameters(prefix='...'), ...} for a module, or "
            "{'params': [('name', parameter)], ...}"
        )
    if not wanted and any(named):
        raise ValueError(
            "params: expected parameters without names, as the other groups have them, got "
            f"{listed[named.index(True)][0]!r} with its name; write {{'params': "
            "module.parameters(), ...}, or make all groups from named_parameters()"
        )
    return {**group, "params": listed}
