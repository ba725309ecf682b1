"""Whether the learning rates of groups are too small for 16-bit parameters, at their peak."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..runtime.lost_updates import Coarseness, coarseness_of
from .hyper import Groups, adamw_lr_of
from .written_rates import BASE

_PEAKS = ("initial_lr", "max_lr")  # what torch's schedulers write into a group


def to_watch(
    named: Mapping[str, Tensor], begun: Collection[str], before: Sequence[Any]
) -> RateWatch | None:
    """The watch of the parameters in 16 bits that no step has moved in this dtype.

    ``before``: ``groups.fingerprint_of`` the parameters that were there before, or nothing.
    """
    had = {key: dtype for _, params in before for key, _, dtype in params}
    narrow = {name: p for name, p in named.items() if p.dtype.itemsize < 4}
    new = {n for n, p in narrow.items() if n not in begun or had.get(id(p), p.dtype) != p.dtype}
    return RateWatch(new) if new else None


class RateWatch:
    """Looks at the learning rates on the host until it is known whether they are too small.

    A warm-up begins with rates that are, and says nothing about the run. So a group's rate is
    judged once it no longer rises: at the first step if it is the one that the group was added with
    and no scheduler is there; else at the first step whose rate is not above the last one's. A rate
    that is large enough, now or by what a scheduler wrote into the group, ends the watch.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._open: dict[int, Coarseness] | None = None  # by group
        self._last: dict[int, float] = {}

    def settled(self, groups: Groups, plan: Plan, params: Mapping[str, Tensor]) -> bool:
        """Whether nothing is left to watch. It reads the device at the first call alone."""
        if self._open is None:
            self._open = coarseness_of(plan, params, self._names)
        for k, found in [*self._open.items()]:
            text, is_settled = self._judge(k, groups[k], found)
            if is_settled:
                del self._open[k]
            if text:
                where = f"param_groups[{k}]: " if len(groups) > 1 else ""
                warn_at_caller(where + text)
        return not self._open

    def _judge(
        self, k: int, group: Mapping[str, Any], found: Coarseness
    ) -> tuple[str | None, bool]:
        is_read = isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"
        lr = float(group["lr"])
        known = [float(group[key]) for key in _PEAKS if isinstance(group.get(key), (Real, Tensor))]
        peak = max(lr, *known) if known else lr
        last, self._last[k] = self._last.get(k), lr
        text = found.doubt(peak, float(adamw_lr_of({**group, "lr": peak})))
        if is_read or (text is None and peak > 0):
            return text, True  # what is on another device is read once
        if last is None:
            stands = not known and lr == group.get(BASE)
        else:
            stands = lr <= last
        return (text, True) if stands and lr > 0 else (None, False)
