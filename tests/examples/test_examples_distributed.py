"""The distributed examples, as torchrun starts them: FSDP2, DDP and one process train alike, and a
run may change its ranks. torchrun itself starts one of the runs; the others have what it tells a
rank.

Everything runs eagerly (TORCHDYNAMO_DISABLE), on CPU: one launch then takes seconds.
"""

from __future__ import annotations

import math
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from normuon_fn.compat import has_bfloat16_matrix_unit
from tests import processes, scripts
from tests.processes import ROOT

STEPS, SAVED = 20, 10

# Largest difference of two loss traces that start at 4.7 and end at 2.6 (float32, torch 2.13, CPU,
# 2026-11-22). Ranks add gradients in another order, and the first updates, whose direction is all
# that counts, make most of it. The second number: on a CPU with bfloat16 matrix units, where
# products are in bfloat16 (torch 2.11).
BFLOAT16 = has_bfloat16_matrix_unit(torch.device("cpu"))
OTHER_RANKS = (
    5e-2 if BFLOAT16 else 5e-5
)  # 1.2e-2 and 1.21e-5 seen: 2 ranks against 1, FSDP2 and DDP
RESUMED = (
    3e-4 if BFLOAT16 else 2e-6
)  # 5.6e-5 and 3e-7: 10 steps after a checkpoint of 2 ranks, on 1 and on 4

# Something that is not one of its caches keeps the mesh on torch 2.11.
OLD = TorchVersion(torch.__version__) < (2, 13)
ON_THE_CPU = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
Trace = dict[int, float]
Start = Callable[[int, Sequence[object]], str]


def by_torchrun(world: int, command: Sequence[object]) -> str:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world)
    return processes.run([sys.executable, *torchrun, *command], env=ON_THE_CPU).stdout


def by_itself(world: int, command: Sequence[object]) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    ranks = [{**told, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    file, *arguments = command
    found = scripts.run_all(
        [
            scripts.Script(
                str(file),
                arguments,
                {**ON_THE_CPU, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in own.items()}},
            )
            for own in ranks
        ]
    )
    assert not any(done.returncode for done in found), [done.stderr[-4000:] for done in found]
    return "".join(done.stdout for done in found)


def launch(
    world: int, example: str, *arguments: object, start: Start = by_itself
) -> tuple[Trace, list[int]]:
    """The losses by step, and the steps that were skipped."""
    command: list[object] = [Path(__file__).parent / "threads_left.py"]
    command += [ROOT / "examples" / example, "--steps", STEPS, "--layers", 1, *arguments]
    printed = start(world, command)
    threads = re.findall(r"^threads: (\d+), then (\d+)$", printed, re.MULTILINE)
    assert len(threads) == world
    assert OLD or all(int(after) < int(before) for before, after in threads), (
        f"threads of the process group outlive it, and may abort the process: {threads}"
    )
    rows = re.findall(r"^step (\d+) loss (\S+)( skipped)?$", printed, re.MULTILINE)
    return {int(step): float(loss) for step, loss, _ in rows}, [
        int(step) for step, _, skipped in rows if skipped
    ]


def pretrain(world: int, folder: Path, *arguments: object) -> list[list[float]]:
    """The rows of metrics.csv without tokens per second: step, loss, validation, lr, skipped."""
    tiny = "--steps 8 --log-every 2 --save-every 4 --batch 4 --context 16 --width 16 --layers 1"
    command = [ROOT / "examples" / "pretrain.py", *tiny.split(), "--heads", 2, "--sample", 3]
    command += ["--out", folder, *arguments]
    if world == 1:
        scripts.run(*command, env=ON_THE_CPU)
    else:
        by_itself(world, command)
    assert (folder / "loss.png").stat().st_size > 1000
    lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [[float(x) for x in line.split(",")] for line in lines[1:]]
    return [[*row[:4], row[5]] for row in rows]


def difference(one: Trace, other: Trace) -> float:
    assert one.keys() == other.keys()
    return max(abs(one[step] - other[step]) for step in one)


def after(trace: Trace, step: int) -> Trace:
    return {k: loss for k, loss in trace.items() if k > step}


@pytest.fixture(scope="module")
def alone() -> Trace:
    return launch(1, "train_fsdp2.py")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def fsdp2(folder: Path) -> Trace:
    save = ("--checkpoint", folder, "--save-every", SAVED)
    return launch(2, "train_fsdp2.py", *save, start=by_torchrun)[0]


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Trace:
    return launch(2, "train_ddp.py", "--checkpoint", folder, "--save-every", SAVED)[0]


def test_fsdp2_and_ddp_train_as_one_process_does(alone: Trace, fsdp2: Trace, ddp: Trace) -> None:
    assert list(alone) == list(range(1, STEPS + 1))
    assert alone[STEPS] < 2.8 < 4.5 < alone[1]
    assert difference(fsdp2, alone) < OTHER_RANKS
    assert difference(ddp, alone) < OTHER_RANKS


def test_fsdp2_saved_by_two_ranks_goes_on_with_one(fsdp2: Trace, folder: Path) -> None:
    resumed, skipped = launch(1, "train_fsdp2.py", "--resume", folder / f"step-{SAVED}")
    assert difference(resumed, after(fsdp2, SAVED)) < RESUMED and skipped == []


def test_ddp_saved_by_two_ranks_goes_on_with_one(ddp: Trace, folder: Path) -> None:
    resumed, skipped = launch(1, "train_ddp.py", "--resume", folder / f"step-{SAVED}.pt")
    assert difference(resumed, after(ddp, SAVED)) < RESUMED and skipped == []


@pytest.mark.parametrize(("example", "suffix"), [("train_fsdp2.py", ""), ("train_ddp.py", ".pt")])
def test_as_many_ranks_go_on_exactly_and_skip_the_step_in_which_one_has_nan(
    request: pytest.FixtureRequest, folder: Path, example: str, suffix: str
) -> None:
    whole: Trace = request.getfixturevalue("fsdp2" if suffix == "" else "ddp")
    bad = STEPS - 3
    resumed, skipped = launch(
        2, example, "--resume", folder / f"step-{SAVED}{suffix}", "--nan-at", bad
    )
    assert skipped == [bad] and math.isnan(resumed.pop(bad))
    before = {step: loss for step, loss in resumed.items() if step < bad}
    assert before == {step: whole[step] for step in range(SAVED + 1, bad)}
    assert all(abs(loss - whole[step]) < 0.1 for step, loss in after(resumed, bad).items())
    assert difference(after(resumed, bad), after(whole, bad)) > RESUMED  # the step was missed


def test_pretraining_goes_on_exactly_and_fsdp2_trains_as_one_process_does(tmp_path: Path) -> None:
    whole = pretrain(1, tmp_path / "whole")
    assert [row[0] for row in whole] == [2, 4, 6, 8] and whole[-1][2] < whole[0][2]
    begun = pretrain(1, tmp_path / "parts", "--stop-at", 4)
    assert begun == whole[:2] and pretrain(1, tmp_path / "parts", "--resume") == whole
    pretrain(2, tmp_path / "ranks", "--stop-at", 4)  # under FSDP2, and then on one rank
    both = pretrain(1, tmp_path / "ranks", "--resume")
    assert torch.allclose(torch.tensor(both), torch.tensor(whole), atol=OTHER_RANKS)
    again = scripts.run(
        ROOT / "examples" / "pretrain.py", "--out", tmp_path / "whole", code=2, env=ON_THE_CPU
    )
    assert "--resume" in again.stderr and pretrain(1, tmp_path / "whole", "--resume") == whole
