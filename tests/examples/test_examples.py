"""Every example runs, at a size that takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import scripts
from tests.processes import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object) -> str:
    return scripts.run(EXAMPLES / name, *arguments).stdout


def test_train_gpt_compares_both_optimizers(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"  # 4096 characters to validate on, not 110000
    text.write_text((EXAMPLES / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:45000])
    six = ("train_gpt.py", "--steps", 6, "--no-compile", "--data", text, "--out", tmp_path)
    printed = run(*six)
    assert re.search(r"validation loss: \d\.\d+ normuon .*, \d\.\d+ adamw", printed)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_train_digits_reaches_93_percent_in_5_epochs() -> None:
    pytest.importorskip("sklearn")
    printed = run("train_digits.py", "--no-compile")
    assert "Conv2d, flattened to 32x144" in printed
    reached = re.search(r"^accuracy: (\d\.\d+) normuon$", printed, re.MULTILINE)
    assert reached is not None and float(reached[1]) > 0.93  # 0.947 to 0.969 seen with four seeds
    assert "--epochs" in run("train_digits.py", "--help")


def test_the_learning_rate_sweep_is_one_vmapped_graph(tmp_path: Path) -> None:
    """Compiled by Inductor in compile_tests/test_transforms.py, with fewer kernels."""
    size = ("--steps", 2, "--layers", 1, "--backend", "aot_eager")
    printed = run("lr_sweep_vmap.py", *size, "--out", tmp_path)
    assert len(re.findall(r"^ +[\d.e-]+ +\d\.\d+ +0$", printed, re.MULTILINE)) == 8
    assert "best:" in printed and (tmp_path / "lr_sweep.png").exists()


def test_the_guarded_run_survives_and_the_other_does_not(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    size = ("--steps", 6, "--every", 3, "--layers", 1)
    printed = run("nan_survival.py", *size, "--no-compile", "--out", figure)
    assert "guard off:  loss NaN from step 3 on" in printed and "skipped steps [2, 5]" in printed
    assert "bit for bit: True" in printed and figure.exists()
