"""A kernel's compilation: at its first launch, or beforehand, many at a time.

A kernel takes Triton 0.1 to 2 s, and the first step of GPT-2 needs 16. While it compiles Triton
lets other threads of Python run, so threads do it beside each other:

    launch in `beforehand` -> a thread compiles the kernel -> another puts it on the device
    its first launch elsewhere waits for both
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

THREADS = 8  # of a process; many ranks of a machine compile at once


class _Beforehand(NamedTuple):
    """What `beforehand` keeps for the thread that is in it."""

    device: torch.device
    loaders: ThreadPoolExecutor
    keys: list[tuple[Any, ...]]


# What is being compiled and put on the device, by the keys of `launch`, which begin with a kernel.
_begun: dict[tuple[Any, ...], Future[None]] = {}
# Triton's own caches are not made for several threads. Held for a compilation at a launch, and
# beforehand only until a thread has the work.
_one_at_a_time = threading.Lock()
_thread = threading.local()


@contextlib.contextmanager
def beforehand(device: torch.device) -> Iterator[None]:
    """On this thread launches compile their kernels, in other threads, and do not run them.

    So operators return what was in memory before. At the end all kernels are on the device. One
    that does not compile is left out: its first launch compiles it again, and raises.
    """
    mode = importlib.import_module("triton").AsyncCompileMode
    keys: list[tuple[Any, ...]] = []
    try:
        with (
            ThreadPoolExecutor(THREADS, "normuon_fn compiler") as compilers,
            ThreadPoolExecutor(THREADS, "normuon_fn loader") as loaders,
            mode(compilers, ignore_errors=True),
        ):
            _thread.beforehand = _Beforehand(device, loaders, keys)
            yield
    finally:
        _thread.beforehand = None
        with _one_at_a_time:
            for key in keys:
                _begun.pop(key, None)


def is_beforehand() -> bool:
    """Whether this thread is in `beforehand`."""
    return getattr(_thread, "beforehand", None) is not None


def begin(
    key: tuple[Any, ...],
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Has threads compile the kernel for these arguments and load it, in `beforehand`."""
    own: _Beforehand = _thread.beforehand
    with _one_at_a_time:
        if key not in _begun:
            promised = kernel.warmup(*arguments, grid=(programs,), **options)
            _begun[key] = own.loaders.submit(_load, own.device, kernel, promised)
            own.keys.append(key)


def _load(device: torch.device, kernel: Any, promised: Any) -> None:
    """Puts what Triton promised on the device. It also has C to compile for the launches."""
    try:
        compiled = _kept(promised)
    except Exception:
        _forget(kernel, promised)
        raise
    with torch.accelerator.device_index(device.index):
        _ = compiled.run


def _kept(promised: Any) -> Any:
    """The kernel that Triton compiled or, in the mode of `beforehand`, promised."""
    return promised.result() if hasattr(promised, "result") else promised


def _forget(kernel: Any, promised: Any) -> None:
    """Lets Triton compile again what failed: 3.7 and 3.8 would raise the same error for ever."""
    with _one_at_a_time:
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            for key in [key for key, value in cache.items() if value is promised]:
                del cache[key]


def first_launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """The compiled kernel, after its launch. Waits where threads are at it, and else compiles.

    It waits for all variants of this kernel: two keys may be one to Triton, which knows fewer.
    """
    with _one_at_a_time:
        variants = [loaded for begun, loaded in _begun.items() if begun[0] is kernel]
    wait(variants)
    with _one_at_a_time:
        return _kept(kernel[(programs,)](*arguments, **options))
