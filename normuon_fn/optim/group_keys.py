"""Keys that somebody writes into a group that is there, and that no step reads: said once each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..routing.doubts import warn_at_caller
from .groups import check_keys


class KeyWatch:
    """Looks at a group's keys at the first step, and again when there are more or fewer of them.

    A key that is unlike any argument may be a scheduler's or a program's own: nothing is said.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []  # by group: the keys that were looked at
        self._told: set[tuple[int, str]] = set()

    def look(self, groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
        sizes = [*map(len, groups)]
        if sizes == self._sizes:
            return
        self._sizes = sizes
        lines = []
        for k, group in enumerate(groups):
            for key in [key for key in group if key not in defaults and key != "params"]:
                text = _unread(key, group[key], defaults)
                if text and (k, key) not in self._told:
                    self._told.add((k, key))
                    lines.append(f"param_groups[{k}]: {text}")
        if lines:
            warn_at_caller("NorMuon.step: keys that no step reads. " + "; ".join(lines))


def _unread(key: str, value: Any, defaults: Mapping[str, Any]) -> str | None:
    """What `check_keys` says of one key, if that is anything."""
    try:
        check_keys({key: value}, defaults)
    except TypeError as error:
        return str(error).removeprefix("param_group: ")
    return None
