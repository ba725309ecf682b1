"""Kernels that are compiled before their first launch; stand-ins take the places of kernels."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from normuon_fn.ops import compiling, launch

pytest.importorskip("triton")
CPU = torch.device("cpu")
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Promise:
    """Stands in for what Triton gives beforehand. It is kept once the kernel is ``done``."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def result(self) -> Kernel:
        assert self.kernel.done.wait(20)
        if self.kernel.fails:
            raise RuntimeError("ptxas")
        return self.kernel


class Kernel:
    """Stands in for a kernel of which Triton has one variant, whatever `launch` distinguishes."""

    def __init__(self) -> None:
        self.done, self.fails = threading.Event(), False
        self.begun, self.launched, self.loaded = 0, 0, False
        self.cache: dict[str, Any] = {}
        self.device_caches = {0: (self.cache,)}

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        self.begun += 1
        return self.cache.setdefault("variant", Promise(self))

    @property
    def run(self) -> None:
        self.loaded = True

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.launched += 1
            found = self.cache.get("variant", self)
            if self.fails:
                raise RuntimeError("ptxas" if found is self else "the old error")
            return found  # Triton 3.7 gives the promise where it has one

        return run


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of "cpu"


def launched(kernel: Kernel, number: int = 64) -> None:
    launch.launch(kernel, 1, (torch.zeros(4),), (number,), **OPTIONS)


def test_a_kernel_is_begun_once_and_loaded_and_does_not_run() -> None:
    kernel = Kernel()
    kernel.done.set()
    with compiling.beforehand(CPU):
        launched(kernel)
        launched(kernel)
        assert compiling.is_beforehand()
    assert (kernel.begun, kernel.launched, kernel.loaded) == (1, 0, True)
    assert not compiling.is_beforehand()
    launched(kernel)
    launched(kernel)
    assert (kernel.begun, kernel.launched) == (1, 2)


def test_another_thread_waits_for_what_is_begun_and_not_for_the_rest() -> None:
    slow, other = Kernel(), Kernel()
    with compiling.beforehand(CPU):
        launched(slow)
        threads = [threading.Thread(target=launched, args=(kernel,)) for kernel in (slow, other)]
        for thread in threads:
            thread.start()
        threads[1].join(20)
        assert (other.begun, other.launched, slow.launched) == (0, 1, 0)
        slow.done.set()
        threads[0].join(20)
        assert slow.launched == 1


def test_a_launch_under_another_key_waits_too_and_keeps_the_kernel() -> None:
    kernel = Kernel()
    with compiling.beforehand(CPU):
        launched(kernel, 1)
        thread = threading.Thread(target=launched, args=(kernel, 12))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and kernel.launched == 0
        kernel.done.set()
        thread.join(20)
        launched(kernel, 1)
    launched(kernel, 12)
    assert kernel.launched == 2
    assert [found for key, found in launch._compiled.items() if key[0] is kernel] == [kernel]  # type: ignore[index]


def test_one_that_does_not_compile_is_compiled_again_at_its_launch() -> None:
    kernel = Kernel()
    kernel.fails = True
    kernel.done.set()
    with compiling.beforehand(CPU):
        launched(kernel)
    with pytest.raises(RuntimeError, match="ptxas"):
        launched(kernel)
    kernel.fails = False
    launched(kernel)
    assert kernel.launched == 2


def test_what_was_launched_before_is_not_begun_and_does_not_run() -> None:
    kernel = Kernel()
    launched(kernel)
    with compiling.beforehand(CPU):
        launched(kernel)
    assert (kernel.begun, kernel.launched) == (0, 1)


def test_an_error_in_it_leaves_nothing_begun() -> None:
    kernel = Kernel()
    kernel.done.set()
    with pytest.raises(ZeroDivisionError), compiling.beforehand(CPU):
        launched(kernel)
        raise ZeroDivisionError
    assert not compiling.is_beforehand() and not compiling._begun
