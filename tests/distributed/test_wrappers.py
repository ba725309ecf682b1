"""`NorMuon` on two ranks under DistributedDataParallel, FSDP2 with mixed precision and Accelerate:
as on one device.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.processes import run_ranks
from tests.distributed.wrapper_ranks import WORLD, compiled, main

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wrappers")
    return run_ranks(partial(main, folder), WORLD, folder, eagerly=True)


@pytest.mark.parametrize("kind", ["ddp", "ddp, work shared"])
def test_ddp_with_gradients_in_buckets_accumulates_clips_and_resumes_exactly(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for seen in ranks:
        assert seen[kind]["views"] and seen[kind]["learned"] < 0.9
        assert seen[kind]["off"] < 1e-6
        assert seen[kind]["resumed"] == 0.0 and seen[kind]["from the first rank"] == 0.0


def test_fsdp2_in_bfloat16_steps_float32_parameters_and_resumes_exactly(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert seen["fsdp2, mixed"]["dtypes"] == ["torch.float32"]
        assert seen["fsdp2, mixed"]["off"] < 1e-6 and seen["fsdp2, mixed"]["resumed"] == 0.0


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_shards_in_bfloat16_with_masters_follow_what_is_loaded_and_resume_exactly(
    ranks: list[dict[str, Any]], master: str
) -> None:
    for seen in ranks:
        found = seen["fsdp2, masters"][master]
        assert (
            found["off"] <= 2**-8 < 2**-6 < found["moved"]
        )  # a bit of bfloat16 at 1, of shards summed in another order
        assert found["resumed"] == 0.0


def test_parameters_that_are_sharded_after_the_construction_are_stepped_and_their_state_is_saved(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert seen["fsdp2, switched"]["off"] < 1e-6
        assert seen["fsdp2, switched"]["keys"]["0.weight"] == [
            "consecutive",
            "momentum",
            "skipped",
            "step",
            "variance",
        ]


def test_accelerate_on_two_ranks_is_ddp_and_resumes_exactly(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("accelerate", minversion="1")
    for seen in ranks:
        assert seen["accelerate"]["wrapped"] and seen["accelerate"]["off"] < 1e-6
        assert seen["accelerate"]["resumed"] == 0.0


def test_a_trainer_on_two_ranks_is_ddp_whose_ranks_skip_together_and_resumes_exactly(
    ranks: list[dict[str, Any]],
) -> None:
    pytest.importorskip("transformers", minversion="5.18")  # see `resumes_on_cpu_ranks`
    for seen in ranks:
        found = seen["trainer"]
        assert found["wrapped"] == "DistributedDataParallel" and found["learned"] < 0.9
        assert found["resumed"] and found["skipped"] == 1 and found["from the first rank"] == 0.0


def test_the_steps_of_two_ranks_are_compiled_once_and_they_skip_together(
    tmp_path: Path,
) -> None:
    for seen in run_ranks(compiled, WORLD, tmp_path):
        assert seen["off"] < 1e-6 < 0.01 < seen["moved"]
        assert seen["skipped"] == [False, True, False] * 2
