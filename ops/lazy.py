"""Triton, which is imported when the first kernel is launched and not before.

Its import takes as long as that of all of this package, and a process that has no step on CUDA does
not need it. `jit` keeps a function as it is; `load` makes kernels of all of them, and puts these in
the places of the functions, where kernels that call others find them.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

HAS_TRITON = find_spec("triton") is not None
# Kernels run on the CPU. As Triton reads it, once.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1", "true", "on", "yes", "y",
)  # fmt: skip


class _Language:
    """`triton.language` on the host. In a kernel's module it stands as ``tl`` until `load`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of whoever looks at a module's names: nothing is to be loaded
            raise AttributeError(name)
        return getattr(importlib.import_module("triton.language"), name)


class Kernel:
    """A function that `load` makes a kernel of. ``kernel[grid](...)`` is a kernel's launch."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.loaded: Any = None

    def __getitem__(self, grid: Any) -> Any:
        return loaded(self)[grid]


_IS_THERE = "triton" in sys.modules  # somebody else imported it: then nothing has to wait
tl: Any = importlib.import_module("triton.language") if _IS_THERE else _Language()
_waiting: list[Kernel] = []
_lock = threading.RLock()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, later; the function itself where triton is not installed."""
    if function is None:  # a decorator with options
        return functools.partial(jit, **options)
    if not HAS_TRITON:
        return function
    if _IS_THERE:
        return importlib.import_module("triton").jit(function, **options)
    kernel = Kernel(function, options)
    _waiting.append(kernel)
    return kernel


def loaded(kernel: Any) -> Any:
    """The kernel as Triton knows it."""
    if type(kernel) is not Kernel:
        return kernel
    if kernel.loaded is None:
        load()
    return kernel.loaded


def load() -> None:
    """Imports Triton and makes all kernels, in all modules of this folder."""
    with _lock:
        if not _waiting:
            return
        triton = importlib.import_module("triton")
        language = importlib.import_module("triton.language")
        made = {id(k): triton.jit(k.function, **k.options) for k in _waiting}
        own = [m for name, m in [*sys.modules.items()] if name.startswith(f"{__package__}.")]
        for module in own:
            for name, value in [*vars(module).items()]:
                if id(value) in made:
                    setattr(module, name, made[id(value)])
                elif value is tl and module.__name__ != __name__:
                    setattr(module, name, language)
        for kernel in _waiting:  # last: another thread launches a kernel as soon as it has it
            kernel.loaded = made[id(kernel)]
        _waiting.clear()
