"""examples/benchmarks/train_step.py reaches its end on a tiny model, on one rank and on two."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests import scripts
from tests.processes import ROOT

SCRIPT = ROOT / "examples" / "benchmarks" / "train_step.py"
EAGER = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
TINY = ("--tiny", "--steps", 2)


def test_a_whole_step_is_the_sum_of_its_phases_for_both_optimizers(tmp_path: Path) -> None:
    figure = tmp_path / "step.png"
    arguments = (*TINY, "--tokens", "64,32", "--json", "--plot", figure)
    found = json.loads(scripts.run(SCRIPT, *arguments, env=EAGER).stdout)
    names = [(row["tokens"], row["name"]) for row in found["rows"]]
    both = ("torch AdamW fused", "normuon_fn")
    assert names == [(tokens, name) for tokens in (64, 32) for name in both]
    for row in found["rows"]:
        phases = [row[f"{phase}_ms"] for phase in ("forward", "backward", "optimizer")]
        assert min(phases) > 0
        assert row["teraflops"] > 0
    for each in found["overhead"]:
        adamw, ours = (row for row in found["rows"] if row["tokens"] == each["tokens"])
        difference = ours["optimizer_ms"] - adamw["optimizer_ms"]
        assert each["by_optimizers"] == pytest.approx(100 * difference / adamw["whole_ms"])
    assert figure.stat().st_size > 1000


def test_two_ranks_of_fsdp2_train_and_the_first_reports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {**EAGER, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    first, second = scripts.run_all([scripts.Script(SCRIPT, TINY, own) for own in ranks])
    assert "128 tokens a step: NorMuon takes" in first.stdout
    assert "ranks 2" in first.stdout
    assert second.stdout == ""


def test_tokens_that_no_whole_number_of_micro_batches_makes_are_refused() -> None:
    refused = scripts.run(SCRIPT, *TINY, "--tokens", "48", env=EAGER, code=1)
    assert "--tokens: expected a multiple of 32" in refused.stderr
