"""The operators of the step. Imports nothing of ``normuon_fn``, under which it is shipped as ``normuon_fn.ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .adamw import adamw, adamw_, adamw_flags
from .apply import apply, apply_
from .momentum import advance, advance_, hold, hold_, lookahead
from .stack import stack, unstack, unstack_

__all__ = ["IN_PLACE", "PURE", "Writes", "adamw_flags", "lookahead", "stack"]


class Writes(NamedTuple):
    """The operators that give new parameters and state: as new tensors (`PURE`) or in the old ones' place (`IN_PLACE`)."""

    advance: Callable[..., Any]
    hold: Callable[..., Any]
    apply: Callable[..., Any]
    unstack: Callable[..., Any]
    adamw: Callable[..., Any]


PURE = Writes(advance, hold, apply, unstack, adamw)
IN_PLACE = Writes(advance_, hold_, apply_, unstack_, adamw_)
