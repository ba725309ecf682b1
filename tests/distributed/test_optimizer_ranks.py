"""`NorMuon` on two ranks: FSDP2 and DDP step as one device does, and skip a step in which one rank
has a NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.optimizer_ranks import BAD, STEPS, main
from tests.distributed.processes import run_ranks
from tests.optim.saved_state import WAYS

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(main, WORLD, tmp_path_factory.mktemp("optimizer"), eagerly=True)


@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "owned"])
def test_two_ranks_step_as_one_device_and_skip_together(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for seen in ranks:
        assert seen[kind]["skipped"] == [k == BAD for k in range(STEPS)]
        assert seen[kind]["off"] < 1e-6  # 9e-8 seen


def test_replicated_parameters_have_the_same_bits_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [seen["ddp"]["from the first rank"] for seen in ranks] == [0.0] * WORLD


def test_a_state_on_its_owners_alone_goes_on_from_every_kind_of_checkpoint(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        for how, error in seen["owned"]["resumed"].items():
            # Of one device as in the test of its steps above; 3e-8 seen.
            assert error <= (1e-6 if "one" in how else 0.0), (how, error)
        assert "gathered_state_dict()" in seen["owned"]["error"]
        quiet, text = seen["owned"]["said"]
        assert quiet == 0 and "write optimizer.gathered_state_dict(), which all ranks" in text
    kinds = [seen["owned"]["keys"] for seen in ranks]
    for name in ("0.weight", "2.weight"):
        assert sorted("momentum" in keys[name] for keys in kinds) == [False, True]
    assert all("exp_avg" in keys["0.bias"] for keys in kinds)


def test_sharded_state_has_the_same_keys_on_all_ranks_before_the_first_step(
    ranks: list[dict[str, Any]],
) -> None:
    keys = ranks[0]["fsdp2"]["keys"]
    assert all(seen["fsdp2"]["keys"] == keys for seen in ranks)
    assert keys["0.weight"] == ["consecutive", "momentum", "skipped", "step", "variance"]
    assert keys["0.bias"] == ["consecutive", "exp_avg", "exp_avg_sq", "skipped", "step"]


def test_sharded_state_goes_through_a_distributed_checkpoint_and_on_exactly(
    ranks: list[dict[str, Any]],
) -> None:
    assert [seen["fsdp2"]["resumed"] for seen in ranks] == [0.0] * WORLD


@pytest.mark.parametrize("kind", ["NorMuon", "AdamW"])
@pytest.mark.parametrize("way", WAYS)
def test_sharded_parameters_in_another_order_get_their_own_state_and_rate(
    ranks: list[dict[str, Any]], way: str, kind: str
) -> None:
    assert [seen["reordered"][f"{kind} {way}"] for seen in ranks] == [[]] * WORLD


def test_routes_of_owned_state_are_compared_alike_on_all_ranks(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert seen["nameless"]["the same"] == ""
        assert "its state has another meaning" in seen["nameless"]["other heads"]


def test_ranks_whose_optimizers_are_not_alike_say_so(ranks: list[dict[str, Any]]) -> None:
    assert all("Config.nesterov" in seen["unlike"]["error"] for seen in ranks)
