"""Python's garbage collector."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def without_collection(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, during which no cycles are collected.

    For code that makes many objects which all stay: every few hundred of them the collector would
    look at all objects of the program. A quarter of `NorMuon` of 4000 parameters (one core of a
    2-core CPU machine, torch 2.13.0, 2026-11-28: 0.80 and 0.59 s of CPU time).
    """

    @functools.wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> T:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return paused
