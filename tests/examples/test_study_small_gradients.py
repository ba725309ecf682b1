"""The small-gradient study, at a size that takes seconds.

Who keeps every bit, and whose updates shrink or degenerate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import scripts

STEPS = 4
FILES = ("RESULTS.md", "small_gradients.csv", "small_gradients.json", "small_gradients.png")
Rows = dict[tuple[str, int], dict[str, Any]]  # by arm and exponent of the scale


def study(out: Path, *arguments: object) -> str:
    return scripts.run("examples.study.small_gradients", "--out", out, *arguments).stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    size = ("--steps", STEPS, "--batch", 1, "--windows", 4)
    study(folder, *size, "--device", "cpu", "--no-compile")
    return folder


@pytest.fixture
def rows(out: Path) -> Rows:
    found = json.loads((out / "small_gradients.json").read_text())["rows"]
    return {(row["arm"], row["exponent"]): row for row in found}


@pytest.mark.parametrize("arm", ["NorMuon", "Muon"])
def test_normuon_fn_has_the_same_bits_at_every_scale(arm: str, rows: Rows) -> None:
    plain, *small = (rows[arm, exponent] for exponent in (0, -26, -66))
    for row in small:
        assert row["same"]
        assert [row[key] for key in ("train", "val", "rms", "rank")] == [
            plain[key] for key in ("train", "val", "rms", "rank")
        ]


@pytest.mark.parametrize("arm", ["torch.optim.Muon", "Muon, norm + 1e-7"])
def test_with_an_eps_the_update_shrinks_to_nothing(arm: str, rows: Rows) -> None:
    assert not rows[arm, -26]["same"] and not rows[arm, -66]["same"]
    assert rows[arm, -26]["rms"] < 0.8 * rows[arm, 0]["rms"]  # 0.5 seen
    assert rows[arm, -66]["rms"] < 1e-9 * rows[arm, 0]["rms"]  # 3e-11 seen


def test_with_an_eps_and_normuons_normalization_the_update_is_not_orthogonal(rows: Rows) -> None:
    plain, small = rows["NorMuon, norm + 1e-7", 0], rows["NorMuon, norm + 1e-7", -66]
    assert not small["same"]
    assert small["rms"] == pytest.approx(plain["rms"], rel=1e-2)  # the normalization hides it
    assert small["rank"] < 0.2 * plain["rank"]  # 0.04 seen


def test_without_small_gradients_the_textbook_newton_schulz_is_ours(rows: Rows) -> None:
    for ours, textbook in (("Muon", "Muon, norm + 1e-7"), ("NorMuon", "NorMuon, norm + 1e-7")):
        assert rows[textbook, 0]["val"] == pytest.approx(
            rows[ours, 0]["val"], abs=1e-2
        )  # 1e-4 seen


def test_table_and_figure_are_made_again_from_the_files(out: Path) -> None:
    curves, section = (out / "small_gradients.csv").read_text(), (out / "RESULTS.md").read_text()
    assert len(curves.splitlines()) == 1 + 5 * 3 * STEPS
    assert (
        "| torch.optim.Muon | 2^-66 |" in section
        and "- NorMuon: the scale changes no bit" in section
    )
    (out / "small_gradients.png").unlink()
    assert study(out, "--from-csv").strip() in section
    assert (out / "RESULTS.md").read_text() == section
    assert (out / "small_gradients.csv").read_text() == curves
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES)
    assert (out / "small_gradients.png").stat().st_size > 1000
