"""How many steps each of AdamW's parameters has missed, for its bias correction.

A step counts for all parameters of an optimizer. One that is unfrozen or added later, whose state
is begun anew, or that has no gradient in some steps, has taken part in fewer of them. Its moments
are corrected by those, as torch.optim.AdamW does: what it missed is taken off the common count.

    steps of one set of parameters -> another set: who was not in it gets its accepted steps added

The counts stay on the device, and nothing is done as long as the set is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class MissedSteps:
    """The counts of one optimizer, by parameter. One that is not there has missed none."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        # by name, 0-d int32; from a file they are on the host
        self.counts = {
            name: torch.tensor(n, dtype=torch.int32, device="cpu")
            for name, n in (counts or {}).items()
            if n
        }
        self.absent: tuple[str, ...] = ()  # who misses the steps from `_since` on
        self._since: Tensor | None = None
        self.planned: Any = (
            None  # the planned step that the counts were last brought up to date for
        )

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
        found = [self.counts.get(name, zero) for name in names]
        return torch.stack([count.to(device) for count in found])

    def saved(
        self, accepted: Tensor, begun: Collection[str], of_adamw: Iterable[str]
    ) -> dict[str, int]:
        """What is saved of ``of_adamw``, the parameters that have moments. Waits for the device.

        Moments that have not ``begun`` miss all steps so far.
        """
        self.settle(accepted)
        found = {
            name: int(self.counts[name] if name in begun else accepted)
            for name in of_adamw
            if name in self.counts or name not in begun
        }
        return {name: count for name, count in found.items() if count}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "planned": None}
