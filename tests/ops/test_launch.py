"""Which launches share a compiled kernel; no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normuon_fn.ops import launch
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
