"""Kernels that are compiled before their first launch; stand-ins take the places of kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from normuon_fn.ops import compiling, launch

pytest.importorskip("triton")
CPU = torch.device("cpu")
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Kernel:
    """Stands in for a kernel. What Triton would compile has a result once ``done`` is set."""

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.done = threading.Event()
        self.begun, self.launched, self.loaded = 0, 0, False

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Kernel:
        self.begun += 1
        return self

    def result(self) -> Kernel:
        assert self.done.wait(20)
        if not self.compiles:
            raise RuntimeError("ptxas")
        return self

    @property
    def run(self) -> None:
        self.loaded = True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> dict[Any, Any]:
            self.launched += 1
            if not self.compiles:
                raise RuntimeError("ptxas")
            return {(*grid, 1, 1): run}

        return run


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of "cpu"


def launched(kernel: Kernel) -> None:
    launch.launch(kernel, 1, (torch.zeros(4),), (64,), **OPTIONS)


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


def test_one_that_does_not_compile_raises_at_its_launch() -> None:
    kernel = Kernel(compiles=False)
    with compiling.beforehand(CPU):
        launched(kernel)
        kernel.done.set()
        raised: list[str] = []

        def main() -> None:
            try:
                launched(kernel)
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=main)
        thread.start()
        thread.join(20)
    assert raised == ["ptxas"]


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
