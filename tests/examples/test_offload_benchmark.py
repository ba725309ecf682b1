"""examples/benchmarks/offload.py reaches its end on a CPU, with tiny matrices."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import normuon_fn as nm
from normuon_fn.step import local_update_
from tests.processes import ROOT


@pytest.mark.parametrize("more", [[], ["--streamed", "--momentum-dtype", "bfloat16"]])
def test_its_steps_have_the_bits_of_steps_that_stayed(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / "benchmarks" / "offload.py"
    spec = importlib.util.spec_from_file_location("benchmark_offload", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(nm, "step_", local_update_)
    given = ["offload.py", "--device", "cpu", "--workload", "tiny", *more]
    monkeypatch.setattr(sys, "argv", given)
    module.main()
    printed = capsys.readouterr().out
    assert ("ratio" in printed) == bool(more)
    assert "same bits" in printed and printed.rstrip().endswith("True")
