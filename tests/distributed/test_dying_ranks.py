"""A rank is killed or frozen at every stage of a step: the others end with an error that names the
collective, and after a restart nothing is lost.

One process forks all ranks of all cases (`dying`).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from tests import scripts
from tests.distributed.dying import CASES, TIMEOUT, Case, error_of

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
LATE = 10.0  # seconds that a busy machine may add; 0.4 were seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dying")
    own = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    scripts.run("tests.distributed.dying", folder, env=own)
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_when_a_rank_ends_the_others_name_the_collective_within_the_timeout(
    seen: dict[str, Any], case: Case
) -> None:
    survivors = seen[case.name]["survivors"]
    step, name = error_of(case)
    assert len(survivors) == case.world - 1
    for survivor in survivors:
        assert survivor["error"].startswith(f"{name} failed on rank "), survivor
        assert survivor["step"] == step and survivor["seconds"] < TIMEOUT + LATE
        assert (survivor["seconds"] > TIMEOUT - 1) == (case.how == "freeze")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_after_a_restart_from_the_last_checkpoint_the_run_equals_one_that_never_failed(
    seen: dict[str, Any], case: Case
) -> None:
    whole = [rank["digest"] for rank in seen[case.whole]]
    assert [rank["digest"] for rank in seen[case.name]["restarted"]] == whole
    # Every rank has shards of its own, or all have the same.
    assert len(set(whole)) == (1 if case.replicated else case.world)
