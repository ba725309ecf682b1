"""pretrain.py and train_ddp.py, as torchrun starts them: FSDP2, DDP and one process train alike,
and a run may change its ranks. torchrun itself starts one of the runs; the others have what it
tells a rank.

Everything runs eagerly (TORCHDYNAMO_DISABLE), on CPU: one launch then takes seconds.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from normuon_fn.compat import has_bfloat16_matrix_unit
from tests import scripts
from tests.examples.pretraining import (
    ON_THE_CPU,
    SAVED,
    STEPS,
    Row,
    difference,
    from_the_checkpoint,
    run,
    trace,
)
from tests.processes import ROOT

# Largest difference of two traces of losses that start at 6.0 and end at 5.5 (float32, torch 2.13,
# CPU, 2026-11-28). Ranks add gradients in another order, and the first updates, whose direction is
# all that counts, make most of it. The second number: on a CPU with bfloat16 matrix units, where
# products are in bfloat16 (torch 2.11).
BFLOAT16 = has_bfloat16_matrix_unit(torch.device("cpu"))
OTHER_RANKS = 5e-2 if BFLOAT16 else 5e-6  # 9.5e-7 seen in float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folders: Path) -> list[Row]:
    return run(1, folders / "whole")


@pytest.fixture(scope="module")
def fsdp2(folders: Path) -> list[Row]:
    return run(2, folders / "fsdp2", torchrun=True)


@pytest.fixture(scope="module")
def ddp(folders: Path) -> list[Row]:
    return run(2, folders / "ddp", example="train_ddp.py")


def test_one_process_learns_and_goes_on_exactly(whole: list[Row], folders: Path) -> None:
    assert [row["step"] for row in whole] == [2, 4, 6, 8]
    assert whole[-1]["validation"] < whole[0]["validation"]
    begun = run(1, folders / "parts", "--stop-at", SAVED)
    assert trace(begun) == trace(whole)[:2]
    assert trace(run(1, folders / "parts", "--resume")) == trace(whole)
    again = scripts.run(
        ROOT / "examples/pretrain.py", "--out", folders / "whole", code=2, env=ON_THE_CPU
    )
    assert "--resume" in again.stderr
    assert trace(run(1, folders / "whole", "--resume")) == trace(whole)  # nothing is left to do


def test_the_rate_is_that_of_the_schedule(whole: list[Row]) -> None:
    """Up to 0.01 in the first step, and from then to 0 on a line: the state counts the steps."""
    expected = [0.01 * (STEPS - (row["step"] - 1)) / (STEPS - 1) for row in whole]
    assert [row["lr"] for row in whole] == pytest.approx(expected, rel=1e-6)


def test_fsdp2_and_ddp_train_as_one_process_does(
    whole: list[Row], fsdp2: list[Row], ddp: list[Row]
) -> None:
    assert difference(fsdp2, whole) < OTHER_RANKS
    assert difference(ddp, whole) < OTHER_RANKS


@pytest.mark.parametrize("example", ["pretrain.py", "train_ddp.py"])
def test_what_two_ranks_saved_goes_on_with_one(
    request: pytest.FixtureRequest, whole: list[Row], folders: Path, tmp_path: Path, example: str
) -> None:
    name = {"pretrain.py": "fsdp2", "train_ddp.py": "ddp"}[example]
    request.getfixturevalue(name)
    killed = from_the_checkpoint(folders / name, tmp_path / name)
    assert difference(run(1, killed, "--resume", example=example), whole) < OTHER_RANKS


@pytest.mark.parametrize("example", ["pretrain.py", "train_ddp.py"])
def test_as_many_ranks_go_on_exactly_and_skip_the_step_in_which_one_has_nan(
    request: pytest.FixtureRequest, folders: Path, tmp_path: Path, example: str
) -> None:
    name = {"pretrain.py": "fsdp2", "train_ddp.py": "ddp"}[example]
    before = trace(request.getfixturevalue(name))
    killed = from_the_checkpoint(folders / name, tmp_path / name)
    bad = STEPS - 1
    rows = run(2, killed, "--resume", example=example, NAN_AT=bad)
    six, eight = trace(rows)[2:]
    assert six == before[2]
    assert math.isnan(eight[1]) and eight[2] != before[3][2] and math.isfinite(eight[2])
    assert [row["skipped"] for row in rows[-2:]] == [0, 1]


def test_without_tensorboard_there_are_no_events(whole: list[Row], folders: Path) -> None:
    kept = {file.name for file in (folders / "whole").iterdir()}
    assert kept == {"metrics.csv", "loss.png", "step-4", "step-8"}
