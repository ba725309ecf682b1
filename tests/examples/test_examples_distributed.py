"""pretrain.py and train_ddp.py, as torchrun starts them: FSDP2, DDP and one process train alike,
and a run may change its ranks. torchrun itself starts one of the runs; the others have what it
tells a rank.

Everything runs eagerly (TORCHDYNAMO_DISABLE), on CPU: one launch then takes seconds.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from normuon_fn.compat import has_bfloat16_matrix_unit
from tests import processes, scripts
from tests.examples import watched
from tests.processes import ROOT

STEPS, SAVED = 8, 4
COLUMNS = ("step", "loss", "validation", "lr", "tokens_per_second", "skipped")
TINY = f"--steps {STEPS} --log-every 2 --save-every {SAVED} --batch 4 --context 16 --width 16"

# Largest difference of two traces of losses that start at 6.0 and end at 5.5 (float32, torch 2.13,
# CPU, 2026-11-28). Ranks add gradients in another order, and the first updates, whose direction is
# all that counts, make most of it. The second number: on a CPU with bfloat16 matrix units, where
# products are in bfloat16 (torch 2.11).
BFLOAT16 = has_bfloat16_matrix_unit(torch.device("cpu"))
OTHER_RANKS = 5e-2 if BFLOAT16 else 5e-6  # 9.5e-7 seen in float32

ON_THE_CPU = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
Row = dict[str, float]


def by_itself(world: int, command: Sequence[object], env: dict[str, str]) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    ranks = [{**told, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    file, *arguments = command
    own = [{"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in of.items()}} for of in ranks]
    found = scripts.run_all([scripts.Script(str(file), arguments, {**env, **of}) for of in own])
    assert not any(done.returncode for done in found), [done.stderr[-4000:] for done in found]
    return "".join(done.stdout for done in found)


def run(
    world: int,
    folder: Path,
    *arguments: object,
    example: str = "pretrain.py",
    torchrun: bool = False,
    **env: object,
) -> list[Row]:
    """The rows of metrics.csv. ``env``: what watched.py reads."""
    file = ROOT / "examples" / example
    options = [*TINY.split(), "--layers", 1, "--heads", 2, "--sample", 3, "--out", folder]
    told = {**ON_THE_CPU, "BOARD": "none", **{k: str(v) for k, v in env.items()}}
    command = [ROOT / "tests" / "examples" / "watched.py", file, *options, *arguments]
    if torchrun:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world)
        processes.run([sys.executable, *launcher, *command[1:]], env=told)
    elif world == 1:
        scripts.run(*command, env=told)
    else:
        printed = by_itself(world, command, told)
        left = re.findall(r"^threads: (\d+), then (\d+)$", printed, re.MULTILINE)
        assert len(left) == world and all(int(after) < int(before) for before, after in left), (
            f"threads of the process group outlive it, and may abort the process: {left}"
        )
    assert (folder / "loss.png").stat().st_size > 1000
    head, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert tuple(head.split(",")) == COLUMNS
    return [dict(zip(COLUMNS, map(float, line.split(",")), strict=True)) for line in lines]


def trace(rows: list[Row]) -> list[list[float]]:
    """All but the speed; of a step that was logged again the last row."""
    each = {row["step"]: row for row in rows}
    return [[row[name] for name in COLUMNS if name != "tokens_per_second"] for row in each.values()]


def difference(one: list[Row], other: list[Row]) -> float:
    return float((torch.tensor(trace(one)) - torch.tensor(trace(other))).abs().max())


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


def from_the_checkpoint(folder: Path, to: Path) -> Path:
    """A copy of a run that was killed after its first checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / f"step-{STEPS}")
    return to


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


def numbers_of(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars in TensorBoard's events, or in the file of the stand-in."""
    if (folder / "board.jsonl").exists():
        return watched.scalars(folder / "board.jsonl")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


HAS_BOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.parametrize("board", ["stand-in", "tensorboard"])
def test_the_board_has_the_rows_of_the_file_and_what_the_step_did_to_each_parameter(
    whole: list[Row], tmp_path: Path, board: str
) -> None:
    if board == "tensorboard" and not HAS_BOARD:
        pytest.skip("tensorboard is not installed")
    rows = run(1, tmp_path / "run", BOARD=board)
    assert trace(rows) == trace(whole)  # metrics change nothing that is trained
    killed = from_the_checkpoint(tmp_path / "run", tmp_path / "killed")
    again = run(1, killed, "--resume", BOARD=board)
    for folder, logged in ((tmp_path / "run", rows), (killed, again)):
        numbers = numbers_of(folder)
        for name in COLUMNS[1:]:
            each = {int(row["step"]): row[name] for row in logged}
            assert numbers[name] == pytest.approx(each, rel=1e-6), name
        rms = numbers["update_rms/blocks.0.up.weight"]
        rates = {int(row["step"]): 0.2 * row["lr"] for row in logged}
        assert rms == pytest.approx(rates, rel=1e-4)
        assert numbers["nonfinite_gradient/head.weight"] == dict.fromkeys((2, 4, 6, 8), 0.0)


@pytest.mark.skipif(not HAS_BOARD, reason="tensorboard is not installed")
def test_the_stand_in_is_called_as_torchs_class_is() -> None:
    torchs = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for name in ("__init__", "add_scalar", "close"):
        ours = inspect.signature(getattr(watched.SummaryWriter, name))
        theirs = inspect.signature(getattr(torchs, name))
        assert list(ours.parameters) == list(theirs.parameters)[: len(ours.parameters)]
