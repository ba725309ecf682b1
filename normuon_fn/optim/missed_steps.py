"""How many steps each of AdamW's parameters has missed, for its bias correction.

A step counts for all parameters of an optimizer. One that is unfrozen or added later, whose state
is begun anew, or that has no gradient in some steps, has taken part in fewer of them. Its moments
are corrected by those, as torch.optim.AdamW does: what it missed is taken off the common count.

    steps of one set of parameters -> another set: who was not in it gets its accepted steps added

The counts stay on the device, and nothing is done as long as the set is the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.placements import local


class _Made(NamedTuple):
    """A second moment as it was made, of zeros."""

    tensor: weakref.ref[Tensor]
    version: int


class MissedSteps:
    """The counts of one optimizer, by parameter. One that is not there has missed none."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        # by name, 0-d int32; from a file they are on the host at first
        self.counts = {
            name: torch.tensor(n, dtype=torch.int32, device="cpu")
            for name, n in (counts or {}).items()
            if n
        }
        self.absent: tuple[str, ...] = ()  # who misses the steps from `_since` on
        self._since: Tensor | None = None
        # Moments that no step has seen; of those that were copied or pickled no tensor is known.
        self._new: dict[str, _Made | None] = {}
        self.planned: Any = None  # the planned step that the counts are up to date for

    # --- moments that begin

    def begin(self, name: str, second: Tensor) -> None:
        """Remembers moments that were made just now."""
        self._new[name] = _Made(weakref.ref(second), local(second)._version)

    def has_new(self, names: Collection[str]) -> bool:
        return bool(self._new) and not self._new.keys().isdisjoint(names)

    def new_among(self, seconds: Mapping[str, Tensor]) -> set[str]:
        """Whose moments are still as they were made: nobody has put others in their place."""
        return {name for name, second in seconds.items() if self.is_new(name, second)}

    def is_new(self, name: str, second: Tensor) -> bool:
        made = self._new.get(name, ())
        if not made:
            return made is None
        return made.tensor() is second and local(second)._version == made.version

    def stepped(self, names: Iterable[str]) -> None:
        """To be called after a step of ``names``."""
        if self._new:
            for name in names:
                self._new.pop(name, None)

    # --- the counts

    @property
    def counts_anything(self) -> bool:
        """Whether a step may have been missed, as far as the host knows."""
        return self._since is not None or bool(self.counts)

    def follow(self, accepted: Tensor, late: Iterable[str], absent: Iterable[str]) -> None:
        """Brings the counts up to date when other parameters are stepped than before.

        Args:
            accepted: 0-d, the steps that the bias correction counts so far; it is kept.
            late: the parameters whose moments begin now.
            absent: those whose moments have begun, and that are not in the next steps.
        """
        self.settle(accepted)
        self.counts |= dict.fromkeys(late, accepted)
        self.absent = tuple(absent)

    def settle(self, accepted: Tensor) -> None:
        """The same while the set of parameters stays."""
        if self._since is not None and self.absent:
            more = accepted - self._since.to(accepted.device)
            for name in self.absent:
                before = self.counts.get(name)
                self.counts[name] = more if before is None else before.to(more.device) + more
        self._since = accepted

    def of(self, names: Iterable[str], device: torch.device) -> Tensor:
        """[n] int32: the counts of ``names``, zero for what has none."""
        zero = torch.zeros((), dtype=torch.int32, device=device)
        self.counts |= {n: c.to(device) for n, c in self.counts.items() if c.device != device}
        return torch.stack([self.counts.get(name, zero) for name in names])

    def saved(self, accepted: Tensor, seconds: Mapping[str, Tensor]) -> dict[str, int]:
        """What is saved of the parameters that have these moments. Waits for the device.

        Moments that no step has seen miss all steps so far.
        """
        self.settle(accepted)
        found = dict.fromkeys(self.new_among(seconds), accepted)
        found |= {n: c for n, c in self.counts.items() if n in seconds and n not in found}
        return {name: steps for name, count in found.items() if (steps := int(count))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "planned": None, "_new": dict.fromkeys(self._new)}
