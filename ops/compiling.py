"""A kernel's compilation: at its first launch, or beforehand, many at a time.

A kernel takes Triton 0.1 to 2 s, and the first step of GPT-2 needs 16. While it compiles Triton
lets other threads of Python run, so threads do it beside each other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

THREADS = 8  # of a process; many ranks of a machine compile at once

# What is compiled at this moment, by what tells the variants of a kernel apart.
_begun: dict[Hashable, Any] = {}
# Triton's own caches are not made for several threads. Held for a compilation at a launch, and
# beforehand only until a thread has the work.
_one_at_a_time = threading.Lock()
_thread = threading.local()


@contextlib.contextmanager
def beforehand(device: torch.device) -> Iterator[None]:
    """On this thread launches compile their kernels, in other threads, and do not run them.

    So operators return what was in memory before. At the end all kernels are on the device. One
    that does not compile is left out: its first launch raises.
    """
    mode = importlib.import_module("triton").AsyncCompileMode
    own: list[Hashable] = []
    try:
        with ThreadPoolExecutor(THREADS, "normuon_fn compiler") as pool:
            with mode(pool, ignore_errors=True):
                _thread.begun = own
                yield
            list(pool.map(functools.partial(_load, device), own))
    finally:
        _thread.begun = None
        with _one_at_a_time:
            for key in own:
                _begun.pop(key, None)


def _load(device: torch.device, key: Hashable) -> None:
    """Puts a compiled kernel on the device. Triton also has C to compile for its launches."""
    with contextlib.suppress(Exception), torch.accelerator.device_index(device.index):
        begun = _begun[key]
        kernel = begun.result() if hasattr(begun, "result") else begun
        _ = kernel.run


def is_beforehand() -> bool:
    """Whether this thread is in `beforehand`."""
    return getattr(_thread, "begun", None) is not None


def begin(
    key: Hashable, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Has a thread compile the kernel for these arguments, in `beforehand`."""
    with _one_at_a_time:
        if key not in _begun:
            _begun[key] = kernel.warmup(*arguments, grid=(programs,), **options)
            _thread.begun.append(key)


def first_launch(
    key: Hashable, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """The compiled kernel, after its launch. Waits where a thread is at it, and else compiles."""
    begun = _begun.get(key)
    if begun is not None:
        with contextlib.suppress(Exception):  # one that does not compile raises below
            begun.result()
    with _one_at_a_time:
        return kernel[(programs,)](*arguments, **options)
