"""``lr`` and ``adamw_lr`` of a group that do not belong together, which is said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..routing.doubts import warn_at_caller

BASE = "adamw_lr_base"  # the key of a group: its lr when it was added, where AdamW has adamw_lr


class WrittenRates:
    """Compares every group's ``adamw_lr`` with the one that was there before, until it has warned.

    ``adamw_lr`` is multiplied by what became of ``lr``. A loop that writes both at every step so
    has its schedule in AdamW's rate twice, and nothing else shows it.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.said = False
        self.remember(groups)

    def remember(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes the values that there are now as those that nobody wrote."""
        self._before = [group.get("adamw_lr") for group in groups]

    def _look_at_peak(self, k: int, group: Mapping[str, Any]) -> None:
        """Warns where ``lr`` goes beyond what AdamW's rate is in proportion to.

        So it is where OneCycleLR sets a peak that the optimizer was not made with.
        """
        rates: tuple[Any, ...] = (group["lr"], group.get(BASE), group.get("adamw_lr"))
        lr, base, adamw_lr = rates
        numbers = all(isinstance(x, (int, float)) for x in rates)
        if numbers and adamw_lr and lr > base * (1 + 1e-6):  # a scheduler rounds
            self.said = True
            warn_at_caller(
                f"param_groups[{k}]: lr is {lr:.4g} by now, and was {base:.4g} when its group was "
                f"added; adamw_lr={adamw_lr:.4g} belongs to that, and follows in proportion, so "
                f"AdamW's rate is {adamw_lr * lr / base:.4g}. Make the optimizer with the peak's "
                "lr (of OneCycleLR and CyclicLR: max_lr), so that adamw_lr is AdamW's peak"
            )

    def look(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warns once, at the caller's line. Tensors are left alone: reading one would wait."""
        if self.said:
            return
        for k, (group, before) in enumerate(zip(groups, self._before, strict=False)):
            now = group.get("adamw_lr")
            if now is before:
                self._look_at_peak(k, group)
                continue
            self._before[k] = now
            lr, base = group["lr"], group.get(BASE)
            if any(isinstance(x, Tensor) for x in (now, before, lr)) or not now or not base:
                continue
            if now == before or lr == base:
                continue
            self.said = True
            warn_at_caller(
                f"param_groups[{k}]: adamw_lr was written as {now:.4g} while lr is {lr:.4g}, "
                f"{lr / base:.4g} of what it was when its group was added; adamw_lr follows lr in "
                f"proportion, so AdamW's rate is now {now * lr / base:.4g}. Where a schedule moves "
                "both, write lr alone. Where AdamW's rate has a schedule of its own, give its "
                "parameters a group with algorithm='adamw', whose lr is theirs"
            )
            return


def borrowed_rates(
    group: Mapping[str, Any], written: Mapping[str, Any]
) -> tuple[float, float] | None:
    """A group's ``lr``, and the constructor's ``adamw_lr``, where it has none of its own."""
    lr, adamw_lr = group["lr"], group.get("adamw_lr")
    of_adamw = "algorithm" in written and group["algorithm"] == "adamw"  # lr is AdamW's
    if of_adamw or adamw_lr is None or written.get("adamw_lr") is not None:
        return None
    if not all(isinstance(x, (int, float)) for x in (lr, adamw_lr)):
        return None
    return float(lr), float(adamw_lr)
