"""The soak study at a size of seconds.

What it claims about a short run, and that it notices when a claim does not hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.study.common import read_csv
from examples.study.soak import claims, same_bits
from tests import scripts
from tests.processes import ROOT


def soak(out: Path, *arguments: str) -> tuple[int, str]:
    done = scripts.run(
        "examples.study.soak", "--device", "cpu", "--out", out, *arguments, code=None
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    out = tmp_path_factory.mktemp("soak")
    return out, *soak(out, "--steps", "24", "--no-compile", "--batch", "2", "--fault-rate", "0.2")


def read(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return read_csv(out / "soak-cpu.csv"), json.loads((out / "soak-cpu.json").read_text())


def failed(rows: list[dict[str, Any]], facts: dict[str, Any], device: str = "cpu") -> list[str]:
    return [row["claim"] for row in claims(rows, facts, device) if row["holds"] == "no"]


def test_a_short_run_with_faults_resumes_exactly_and_skips_each_of_them(
    short: tuple[Path, int, str],
) -> None:
    out, status, printed = short
    rows, facts = read(out)
    assert "resume bit-exact: True" in printed
    assert [int(row["step"]) for row in rows] == 2 * list(range(1, 25)) and facts["cuts"][
        "resumed"
    ] == [0, 6, 12, 18, 24]
    assert facts["faults"] > 0 and {rows[23]["skipped"], rows[47]["skipped"]} == {
        str(facts["faults"])
    }
    assert [row["loss"] for row in rows[:24]] == [row["loss"] for row in rows[24:]]
    no = failed(rows, facts)
    assert status == bool(no) and all(
        "rss" in claim for claim in no
    )  # 0.5 MB seen; what else a machine does is not ours
    assert (out / "soak-cpu.png").stat().st_size > 1000


def test_the_section_is_made_again_from_the_csv(short: tuple[Path, int, str]) -> None:
    out, status, printed = short
    section, figure = (out / "RESULTS.md").read_text(), (out / "soak-cpu.png").read_bytes()
    (out / "soak-cpu.png").unlink()
    (out / "RESULTS.md").write_text(
        "before\n\n<!-- soak cpu -->\nold\n<!-- end of soak cpu -->\n\nbehind\n"
    )
    assert soak(out, "--from-csv") == (status, printed)
    assert (out / "RESULTS.md").read_text() == f"before\n\n{section.strip()}\n\nbehind\n"
    assert (out / "soak-cpu.png").read_bytes() == figure
    assert str(ROOT) not in section and str(out) not in section


def steady() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """40 rows a run of a soak in which nothing happens."""
    cuts = {"resumed": [0, 100, 200, 300, 400], "uninterrupted": [0, 400]}
    rows = [
        {"run": run, "step": step, "ms": 5.0, "rss": 900.0, "allocated": 70.0, "reserved": 90.0}
        | {"graphs": len(cuts[run]) - 1, "skipped": 3, "loss": 4.0 - step / 200}
        for run in cuts
        for step in range(10, 410, 10)
    ]
    return rows, {"cuts": cuts, "faults": 3, "compiled": True, "bit_exact": True}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_that_climbs_by_5_mb_is_noticed(device: str) -> None:
    kind = {"cpu": "rss", "cuda": "allocated"}[device]
    rows, facts = steady()
    assert failed(rows, facts, device) == []
    for k, row in enumerate(rows[40:]):
        row[kind] += 5 * k / 40
    assert failed(rows, facts, device) == [f"uninterrupted: {kind} memory, most - least in a piece"]


def test_every_other_defect_is_noticed() -> None:
    def planted(
        device: str = "cuda", of_row: dict[str, Any] | None = None, **facts: Any
    ) -> list[str]:
        rows, sound = steady()
        rows[79] |= of_row or {}
        return failed(rows, sound | facts, device)

    assert planted(bit_exact=False) == ["resume bit-exact"]
    assert planted(of_row={"graphs": 2}) == ["uninterrupted: one compilation for every plan"]
    assert planted(of_row={"skipped": 4}) == ["uninterrupted: skipped steps, faults"]
    assert planted(of_row={"loss": 4.0}) == ["uninterrupted: loss went down"]
    assert planted(of_row={"ms": 9.0}) == ["uninterrupted: time a step, slope over the run"]
    assert planted("cpu", of_row={"ms": 9.0}) == []  # reported only
    assert planted(of_row={"loss": float("nan")}) == ["uninterrupted: loss went down"]


def test_the_first_tenth_of_a_piece_does_not_count() -> None:
    rows, facts = steady()
    rows[40]["allocated"] = 0.0
    assert failed(rows, facts, "cuda") == []


def test_memory_that_a_restart_leaves_behind_counts_on_cuda_and_is_reported_on_the_cpu() -> None:
    rows, facts = steady()
    for row in rows[10:40]:
        row["allocated"] += 5.0
        row["rss"] += 5.0
    assert failed(rows, facts, "cuda") == [
        "resumed: allocated memory, most - least over all pieces"
    ]
    assert failed(rows, facts, "cpu") == []


def test_bits_are_compared_not_values() -> None:
    zero = {"a": torch.tensor([0.0, float("nan")])}
    assert same_bits(zero, {"a": zero["a"].clone()})
    assert not same_bits(zero, {"a": torch.tensor([-0.0, float("nan")])})
    assert not same_bits(zero, zero | {"b": torch.tensor(1)})
