"""The operators of the step. Imports nothing of ``normuon_fn``, under which it is shipped as ``normuon_fn.ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .adamw import adamw, adamw_, adamw_flags, adamw_wide, adamw_wide_
from .advance import advance, advance_, largest, lookahead, measure
from .apply import apply, apply_, apply_wide, apply_wide_
from .gather import gather
from .launch import has_kernel
from .lists import stack, unstack, unstack_
from .orient import orient, orientation
from .products import LIBRARY, SYMMETRIC, Products
from .reinterpret import reinterpret
from .repack import repack

__all__ = [
    "IN_PLACE",
    "LIBRARY",
    "PURE",
    "SYMMETRIC",
    "Products",
    "Writes",
    "adamw_flags",
    "gather",
    "has_kernel",
    "largest",
    "lookahead",
    "measure",
    "orient",
    "orientation",
    "reinterpret",
    "repack",
    "stack",
]


class Writes(NamedTuple):
    """The operators that give new parameters and state: as new tensors (`PURE`) or in the old ones' place (`IN_PLACE`)."""

    advance: Callable[..., Any]
    apply: Callable[..., Any]
    unstack: Callable[..., Any]
    adamw: Callable[..., Any]
    apply_wide: Callable[..., Any]  # of parameters with float32 masters
    adamw_wide: Callable[..., Any]


PURE = Writes(advance, apply, unstack, adamw, apply_wide, adamw_wide)
IN_PLACE = Writes(advance_, apply_, unstack_, adamw_, apply_wide_, adamw_wide_)
