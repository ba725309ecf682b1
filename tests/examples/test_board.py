"""What pretrain.py and the guide to metrics write for TensorBoard, and the picture of it: with a
stand-in everywhere, and with TensorBoard where it is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

from tests import guides, scripts
from tests.examples import watched
from tests.examples.pretraining import COLUMNS, from_the_checkpoint, run, trace
from tests.processes import ROOT

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
BOARDS = ["stand-in", pytest.param("tensorboard", marks=needs_tensorboard)]


@pytest.mark.parametrize("board", BOARDS)
def test_a_run_logs_the_rows_of_its_file_and_what_the_step_did_to_each_parameter(
    tmp_path: Path, board: str
) -> None:
    rows = run(1, tmp_path / "run", BOARD=board)
    killed = from_the_checkpoint(tmp_path / "run", tmp_path / "killed")
    again = run(1, killed, "--resume", BOARD=board)
    assert trace(again) == trace(rows)  # and what was logged after the checkpoint is there once
    for folder, logged in ((tmp_path / "run", rows), (killed, again)):
        numbers = watched.numbers_of(folder)
        for name in COLUMNS[1:]:
            each = {int(row["step"]): row[name] for row in logged}
            assert numbers[name] == pytest.approx(each, rel=1e-6), name
        rates = {int(row["step"]): 0.2 * row["lr"] for row in logged}
        assert numbers["update_rms/blocks.0.up.weight"] == pytest.approx(rates, rel=1e-4)
        assert numbers["nonfinite_gradient/head.weight"] == dict.fromkeys((2, 4, 6, 8), 0.0)
    if board == "tensorboard":
        for options in ((), ("--all",)):
            file = tmp_path / f"picture{len(options)}.png"
            script = ROOT / "examples" / "plot_metrics.py"
            scripts.run(script, tmp_path / "run", "--out", file, *options)
            assert file.stat().st_size > 10_000


@pytest.mark.parametrize("board", BOARDS)
def test_the_guide_to_metrics_logs_its_numbers(tmp_path: Path, board: str) -> None:
    start = "import tempfile, torch; from tests.examples import watched"
    start += f"; watched.take_board({board!r}); tempfile.tempdir = {str(tmp_path)!r}"
    start += "; torch.compiler.set_stance('force_eager')"
    file = tmp_path / "metrics.py"
    file.write_text(guides.script("metrics.md", start), encoding="utf-8")
    scripts.run(file)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    numbers = watched.numbers_of(folder)
    assert numbers["update_rms/up.weight"] == {2: pytest.approx(0.2 * 0.01, rel=1e-4)}
    of_each = {name.partition("/")[2] for name in numbers}  # two of them have neurons' variances
    assert len(numbers) == 7 * len(of_each) + 2


@needs_tensorboard
def test_the_stand_in_is_called_as_torchs_class_is() -> None:
    torchs = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for name in ("__init__", "add_scalar", "close"):
        ours = inspect.signature(getattr(watched.SummaryWriter, name))
        theirs = inspect.signature(getattr(torchs, name))
        common = list(theirs.parameters)[: len(ours.parameters)]
        assert name == "__init__" or list(ours.parameters) == common
        assert set(ours.parameters) <= set(theirs.parameters)


def test_without_tensorboard_a_run_leaves_no_events(tmp_path: Path) -> None:
    run(1, tmp_path / "run")
    kept = {file.name for file in (tmp_path / "run").iterdir()}
    assert kept == {"metrics.csv", "loss.png", "step-4", "step-8"}
