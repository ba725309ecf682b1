"""examples/benchmarks/step.py measures what it says and reaches its end, on tiny steps."""

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
from normuon_fn.step import local_update_
from tests.processes import ROOT


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "benchmark_step", ROOT / "examples" / "benchmarks" / "step.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_step", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    monkeypatch.setattr(nm, "step_", local_update_)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(module, "first_step_seconds", lambda device, spec, dtype, guard: 1.5)
    # The rows are the same wherever other libraries are installed.
    monkeypatch.setattr(module, "importable", lambda name: name == "torch")
    return module


def run(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> str:
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", "--rounds", "2", *arguments])
    module.main()
    return capsys.readouterr().out


def test_the_table_holds_every_row_and_the_chart_is_drawn(
    benchmark, monkeypatch, capsys, tmp_path: Path
) -> None:
    file = tmp_path / "step.png"
    printed = run(benchmark, monkeypatch, capsys, "--workload", "tiny", "--plot", str(file))
    for row in (
        "step_, guard off",
        "step_, guard output",
        "step_, guard full",
        "torch Muon",
        "torch AdamW fused",
    ):
        assert row in printed
    assert "Error" not in printed and "failed" not in printed and file.stat().st_size > 1000


def test_json_holds_numbers(benchmark, monkeypatch, capsys) -> None:
    arguments = (
        "--workload",
        "2x32x32,1x64x32",
        "--dtype",
        "bfloat16",
        "--guard",
        "full",
        "--only",
        "step_,Muon",
        "--json",
    )
    found: dict[str, Any] = json.loads(run(benchmark, monkeypatch, capsys, *arguments))
    ours, muon = found["results"]["2x32x32,1x64x32 bfloat16"]
    assert ours["name"] == "normuon_fn step_, guard full" and muon["name"] == "torch Muon"
    assert ours["first_s"] == 1.5 and ours["ratio"] == 1.0 and muon["ratio"] > 0
    assert 0 < ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"] and len(ours["times"]) == 2
    assert ours["floor_ms"] > 0 and found["environment"]["torch"] == torch.__version__


def test_the_bars_are_one_markdown_table(benchmark, monkeypatch, capsys) -> None:
    printed = run(benchmark, monkeypatch, capsys, "--bars", "--tiny")
    bars = [line for line in printed.split("###")[0].splitlines() if line.startswith("| ")]
    assert len(bars) == 2 + 11 + 2 and len({line.count("|") for line in bars}) == 1
    missing = [
        line for line in bars if "not measured" in line
    ]  # what there is no number for without CUDA
    assert len(missing) == 4 and all(
        "peak memory" in line or "host time" in line for line in missing
    )
    assert "Error" not in printed


def test_a_row_that_fails_says_why_and_the_others_go_on(benchmark, monkeypatch, capsys) -> None:
    def fails(*_: object, **__: object) -> nm.StepResult:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(nm, "step_", fails)
    printed = run(benchmark, monkeypatch, capsys, "--workload", "tiny", "--only", "guard off,Muon")
    assert "- normuon_fn step_, guard off: RuntimeError: out of memory, say" in printed
    (muon,) = [line for line in printed.splitlines() if line.startswith("torch Muon")]
    assert (
        float(muon.split()[2]) > 0 and "1.0000" not in muon
    )  # no ratio to another row than the first


def test_rows_for_which_there_is_no_time_say_so(benchmark, monkeypatch, capsys) -> None:
    printed = run(benchmark, monkeypatch, capsys, "--workload", "tiny", "--seconds", "0")
    assert printed.count("TimeoutError: left out: the time was over") == 5
    assert "1.0000" not in printed


def test_a_step_that_changes_nothing_or_is_not_finite_does_not_count(benchmark) -> None:
    workload = benchmark.Workload(benchmark.Device("cpu"), [(2, 8, 8)], torch.float32)
    with pytest.raises(RuntimeError, match="unchanged"):
        workload.changed(lambda: None)
    with pytest.raises(RuntimeError, match="not finite"):
        workload.changed(lambda: next(iter(workload.params.values())).fill_(float("nan")))


@pytest.mark.parametrize(
    ("method", "cols", "restarts", "flop"),
    [("standard", 1, 0, 20), ("standard", 4, 0, 65), ("gram", 4, 1, 38), ("gram", 4, 0, 29)],
)
def test_the_arithmetic_is_that_of_the_formulas(
    benchmark, method: str, cols: int, restarts: int, flop: int
) -> None:
    """Five steps, [n, a n], in n^3: 15a + 5 (standard), 6a + 14 (Gram, one restart), 3a + 17."""
    found = benchmark.products(3, 64, 64 * cols, method, [(1.0, 1.0, 1.0)] * 5, restarts)
    assert sum(each for each, _ in found) == 3 * flop * 64**3
    if method == "standard":
        assert sum(moved for _, moved in found) == 3 * (30 * 64 * 64 * cols + 40 * 64**2)


def test_the_first_step_is_timed_in_its_own_process_part(benchmark, monkeypatch, capsys) -> None:
    assert (
        float(
            run(
                benchmark,
                monkeypatch,
                capsys,
                "--part-first-step",
                "--workload",
                "tiny",
                "--guard",
                "full",
            )
        )
        > 0
    )


def test_a_workload_that_cannot_be_read_is_refused(benchmark, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(benchmark, monkeypatch, capsys, "--workload", "12x768")


def test_a_random_workload_is_decided_by_its_seed_alone(benchmark, monkeypatch, capsys) -> None:
    """Eight shapes, 256 to 14336, from square to 8:1, wide and tall, 1 to 96 of each."""
    drawn = [benchmark.shapes_of(f"random:{seed}") for seed in range(50)]
    assert drawn == [benchmark.shapes_of(f"random:{seed}") for seed in range(50)]
    assert len({tuple(shapes) for shapes in drawn}) == 50
    every = [shape for shapes in drawn for shape in shapes]
    assert len(every) == 8 * 50
    for count, *sides in every:
        short, long = sorted(sides)
        assert 1 <= count <= 96
        assert 256 <= short <= long <= min(14336, 8.1 * short)
    assert any(rows > 2 * cols for _, rows, cols in every)
    assert any(cols > 6 * rows for _, rows, cols in every)
    assert max(count for count, *_ in every) > 60
    assert max(max(sides) for _, *sides in every) > 10000
    for spec in ("random", "random:", "random:x"):
        with pytest.raises(SystemExit):
            run(benchmark, monkeypatch, capsys, "--workload", spec)


def test_the_clock_is_measured_on_a_gpu_alone(monkeypatch, capsys) -> None:
    path = ROOT / "examples" / "benchmarks" / "clock.py"
    spec = importlib.util.spec_from_file_location("benchmark_clock", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["clock.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        module.main()
    assert "needs a CUDA device" in capsys.readouterr().err
