"""examples/benchmarks/scale.py measures what it says and reaches its end, on tiny steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import normuon_fn as nm
from normuon_fn.optim import normuon
from normuon_fn.step import local_update_
from tests.processes import ROOT


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose processes are calls in this one, and whose steps are not compiled."""
    path = ROOT / "examples" / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("benchmark_scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(nm, "step_", local_update_)
    monkeypatch.setattr(normuon, "step_", local_update_)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def here(device: str, part: str, matrices: int, calls: int, count: int, cache: str) -> Any:
        more = {"count": count} if part == "groups" else {}
        return getattr(module, part)(torch.device(device), matrices, calls, **more)

    monkeypatch.setattr(module, "in_process", here)
    return module


def run(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> str:
    monkeypatch.setattr(sys, "argv", ["scale.py", "--device", "cpu", *arguments])
    module.main()
    return capsys.readouterr().out


def test_the_table_holds_every_row_and_the_chart_is_drawn(
    scale, monkeypatch, capsys, tmp_path: Path
) -> None:
    file = tmp_path / "scale.png"
    printed = run(scale, monkeypatch, capsys, "--tiny", "--plot", str(file))
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 + 2 + 2 + 1 and {line.count("|") for line in rows} == {7}
    for name in ("empty cache", "warm cache", "warm step_", "groups: 2", "NorMuon(model)"):
        assert name in printed
    assert file.stat().st_size > 1000


def test_ratios_are_to_the_first_row_of_their_kind(scale, monkeypatch, capsys) -> None:
    times = iter(range(1, 100))
    monkeypatch.setattr(
        scale, "in_process", lambda *_: {"s": 1.0, "cpu_s": float(next(times)), "ms": 1.0}
    )
    arguments = ("--tiny", "--only", "first,groups", "--json")
    rows = json.loads(run(scale, monkeypatch, capsys, *arguments))["rows"]
    assert [row["matrices"] for row in rows] == [2, 2, 4, 4, 4, 4]
    # Empty and warm caches of 2 matrices, then of 4 (3 / 1 and 4 / 2); one group, then two.
    assert [row["ratio"] for row in rows] == [1.0, 1.0, 3.0, 2.0, 1.0, 6 / 5]


def test_groups_have_rates_of_their_own(scale, monkeypatch) -> None:
    seen: list[nm.NorMuon] = []
    monkeypatch.setattr(scale, "timed", lambda call, device: seen.append(call.__self__) or {})
    scale.groups(torch.device("cpu"), 6, 1, count=3)
    (optimizer,) = seen
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02, 0.03]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]


def test_each_part_runs_in_a_process_and_prints_json(scale, monkeypatch, capsys) -> None:
    printed = run(scale, monkeypatch, capsys, "--part", "first", "--matrices", "2")
    assert json.loads(printed)["cpu_s"] > 0
    printed = run(scale, monkeypatch, capsys, "--part", "optimizer", "--matrices", "8")
    assert json.loads(printed)["s"] > 0


def test_a_part_that_there_is_not_is_refused(scale, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(scale, monkeypatch, capsys, "--only", "first,nonsense")
