"""A bounded number of graphs: those that were used last stay, and many of them are said once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from ..routing.doubts import warn_at_caller

K = TypeVar("K")
V = TypeVar("V")

# Choices, not measurements. A model with two halves that take turns has two sets of gradients, and
# one that is unfrozen step by step a few; experts without tokens make a new set at almost every
# step, and each costs a compilation.
KEPT = 16
MANY = 4


class Recent(OrderedDict[K, V]):
    """A dict of the ``size`` entries that were read or written last.

    ``dropped`` is called with every value that leaves because it was used longest ago.
    """

    def __init__(self, size: int = KEPT, dropped: Callable[[V], object] = lambda _: None) -> None:
        super().__init__()
        self._size, self._dropped = size, dropped
        self._last: Any = None
        self._told = False

    def get(self, key: K, default: Any = None) -> Any:
        found = super().get(key, default)
        if found is not None and found is not self._last:
            self.move_to_end(key)
            self._last = found
        return found

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        self._last = value
        while len(self) > self._size:
            self._dropped(self.popitem(last=False)[1])

    def drop_all(self) -> None:
        while self:
            self._dropped(self.popitem()[1])

    def warn_of_sets(self, what: str) -> None:
        """Says once that every new set of gradients costs a compilation."""
        if self._told:
            return
        self._told = True
        warn_at_caller(
            f"{what}: this is the {MANY}th set of parameters that have a gradient, and every new "
            "set is compiled anew. Where the set goes on changing, as with experts that get no "
            'tokens, write Config(missing_grads="zeros"): a missing gradient counts as zeros, so '
            "that a matrix without one moves on by its momentum, at full size, and there is one "
            f"graph. Otherwise the graphs of the last {self._size} sets are kept"
        )
