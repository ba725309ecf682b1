"""Names, globs and predicates as the keys of a mapping, and which of them match a parameter."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from torch import Tensor

Key = str | Callable[[str, Tensor], bool]


def is_glob(key: Key) -> bool:
    return isinstance(key, str) and bool(set(key) & set("*?["))


class Keys:
    """The keys of a mapping. An exact name costs one look into a dict, a glob is compiled once."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = [*keys]
        self._place = {key: k for k, key in enumerate(self._keys)}
        self._matched: set[int] = set()
        self._tests: list[tuple[int, Callable[[str, Tensor], object]]] = []
        for k, key in enumerate(self._keys):
            if not isinstance(key, str):
                self._tests.append((k, key))
            elif is_glob(key):
                self._tests.append((k, _glob(key)))

    def matching(self, tensors: Iterable[tuple[str, Tensor]]) -> list[Key]:
        """The keys that match any of these names, in the order of the mapping."""
        found: set[int] = set()
        for name, tensor in tensors:
            found.update(k for k, matches in self._tests if matches(name, tensor))
            if name in self._place:
                found.add(self._place[name])
        self._matched |= found
        return [self._keys[k] for k in sorted(found)]

    def unmatched(self) -> list[Key]:
        """The keys that have matched nothing so far."""
        return [key for k, key in enumerate(self._keys) if k not in self._matched]


def _glob(text: str) -> Callable[[str, Tensor], object]:
    match = re.compile(fnmatch.translate(text)).match
    return lambda name, tensor: match(name)
