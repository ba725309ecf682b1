"""Which launches share a compiled kernel, and what threads may do at a time; no kernel runs."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from normuon_fn.ops import launch, lazy
from normuon_fn.ops.launch import launch as launch_kernel


class Kernel:
    """Stands in for a kernel, and counts what Triton would compile."""

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*arguments: Any, **options: Any) -> dict[Any, Any]:
            self.compiled.append(options)
            self.launched.append(options)
            return {(*grid, 1, 1): lambda *again: self.launched.append(options)}

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of "cpu"
    return Kernel()


OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


@pytest.mark.parametrize("other", [{"num_warps": 8}, {"num_stages": 4}, {"enable_fp_fusion": True}])
def test_launches_that_differ_in_one_option_are_compiled_apart(
    kernel: Kernel, other: dict[str, Any]
) -> None:
    x, changed = torch.zeros(4), {**OPTIONS, **other}
    for options in (OPTIONS, changed, OPTIONS, changed):
        launch_kernel(kernel, 1, (x,), (64,), **options)
    assert kernel.compiled == [OPTIONS, changed]
    assert kernel.launched == [OPTIONS, changed, OPTIONS, changed]


def test_a_launch_that_does_not_say_whether_it_fuses_is_refused(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="enable_fp_fusion"):
        launch_kernel(kernel, 1, (torch.zeros(4),), (64,), num_warps=4)


def at_once(*calls: Any) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_one_thread_at_a_time_is_in_the_compiler(kernel: Kernel) -> None:
    inside, most = [0], [0]

    class Slow(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            compiled = super().__getitem__(grid)

            def slowly(*arguments: Any, **options: Any) -> Any:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.05)
                inside[0] -= 1
                return compiled(*arguments, **options)

            return slowly

    x = torch.zeros(4)
    at_once(*(lambda: launch_kernel(Slow(), 1, (x,), (64,), **OPTIONS) for _ in range(3)))
    assert most == [1]


def test_a_thread_has_no_kernel_before_all_modules_have_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton reads the functions that a kernel calls where it is compiled."""
    outer, helper = (lazy.Kernel(lambda: None, {}) for _ in range(2))
    module = ModuleType(f"{lazy.__package__}.made_for_a_test")
    module.__dict__.update(outer=outer, helper=helper)
    jitted: list[object] = []

    def jit(function: object) -> object:
        jitted.append(function)
        time.sleep(0.1)
        return SimpleNamespace(function=function)

    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: SimpleNamespace(jit=jit) if name == "triton" else real(name),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(lazy, "_waiting", [outer, helper])
    seen: list[bool] = []

    def launches() -> None:
        lazy.loaded(outer)
        seen.append(type(module.helper) is lazy.Kernel)

    def launches_later() -> None:
        while not jitted:
            time.sleep(0.005)
        while outer.loaded is None:
            time.sleep(0.001)
        launches()

    at_once(launches, launches_later)
    assert seen == [False, False]
