"""A rank is killed or frozen at every stage of a step: the others end with an error that names the
collective, and after a restart nothing is lost.

One process forks all ranks of all cases (`dying`).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from normuon_fn.distributed import failures, messages
from tests import scripts
from tests.distributed.dying import CASES, COMPILED, TIMEOUT, Case, error_of

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


@pytest.mark.parametrize("case", [*CASES, *COMPILED], ids=lambda case: case.name)
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
        assert (survivor["graphs"] > 0) == case.compiled


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_after_a_restart_from_the_last_checkpoint_the_run_equals_one_that_never_failed(
    seen: dict[str, Any], case: Case
) -> None:
    whole = [rank["digest"] for rank in seen[case.whole]]
    assert [rank["digest"] for rank in seen[case.name]["restarted"]] == whole
    # Every rank has shards of its own, or all have the same.
    assert len(set(whole)) == (1 if case.replicated else case.world)


def generated(code: str) -> tuple[str, ...]:
    """What the error names when each wait of this code fails, and each launch."""
    lines = code.strip().splitlines()
    return tuple(
        failures._name_at(number, 1, lines)
        for number, line in enumerate(lines, 1)
        if "_c10d_functional" in line
    )


def test_the_code_of_a_graph_tells_which_collective_it_waited_for() -> None:
    """As Inductor writes it: two buckets whose messages overlap, and the guard's reduction."""
    c10d = "torch.ops._c10d_functional"
    assert generated(f"""
        {c10d}.all_reduce_.default(buf3, 'max', '0')
        {c10d}.wait_tensor.default(buf3)
        buf41 = {c10d}.all_to_all_single.default(buf40, [0, 0], [36, 0], '0')
        buf62 = {c10d}.all_to_all_single.default(buf61, [20, 12], [0, 12], '0')
        {c10d}.wait_tensor.default(buf41)
        buf66 = {c10d}.all_to_all_single.default(buf65, [38, 0], [0, 0], '0')
        assert_size_stride(buf66, (38,), (1,))
        {c10d}.wait_tensor.default(buf62)
        buf88 = {c10d}.all_to_all_single.default(buf87, [0, 12], [22, 12], '0')
        {c10d}.wait_tensor.default(buf66)
        buf90 = {c10d}.all_gather_into_tensor.default(buf66, 2, '1')
        {c10d}.wait_tensor.default(buf88)
        {c10d}.wait_tensor.default(buf90)
        {c10d}.wait_tensor.default(buf99)
    """) == (
        failures.GUARD, failures.GUARD, messages.GATHER, messages.GATHER, messages.GATHER,
        messages.SCATTER, messages.GATHER, messages.SCATTER, messages.SCATTER, messages.RELAY,
        messages.SCATTER, messages.RELAY, "a collective",
    )  # fmt: skip


def test_an_error_of_something_else_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("out of luck")
    assert failures.named(raised.value) is None and failures.named(ValueError("x")) is None
