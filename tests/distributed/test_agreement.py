"""What two ranks must decide alike, and what they say where they cannot: found_inf, gradients of
None, guards, and ranks that decide alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.agreement_ranks import GUARDS, KINDS, NONE, SHORT, main
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)

Ranks = list[dict[str, Any]]
FOUND = [(k, g, s) for k in KINDS for g, s in GUARDS if (k, s) != ("stages", "bucket")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(main, 2, tmp_path_factory.mktemp("agreement"), eagerly=True)


def of(ranks: Ranks, case: str) -> list[Any]:
    return [seen[case] for seen in ranks]


@pytest.mark.parametrize(("kind", "guard", "scope"), FOUND)
def test_found_inf_of_one_rank_skips_the_step_of_all_and_every_bit_stays(
    ranks: Ranks, kind: str, guard: str, scope: str
) -> None:
    first, second = of(ranks, f"found {kind} {guard} {scope}")
    for seen in (first, second):
        assert seen["skipped"] == [False, True, False] and seen["moved"] == []
        assert seen["counters"] == [3, 1, 0] and not any(map(any, seen["flags"]))
    if kind != "sharded":
        assert first["params"] == second["params"]
    assert (
        len(first["said"]) == 1 and "found_inf was set" in first["said"][0] and not second["said"]
    )


@pytest.mark.parametrize("kind", ["mesh", "sharded"])
def test_found_inf_given_on_one_rank_alone_is_an_error_on_all(ranks: Ranks, kind: str) -> None:
    for error in of(ranks, f"found alone {kind}"):
        assert "found_inf is given on rank 1, None on rank 0" in error
        assert "zeros where nothing was found" in error


@pytest.mark.parametrize(("kind", "guard", "lacking"), NONE)
def test_a_gradient_of_none_on_one_rank_at_first_is_an_error_on_all_that_names_the_rank(
    ranks: Ranks, kind: str, guard: str, lacking: str
) -> None:
    """AdamW's replicas drifted apart; matrices that ranks share waited for each other."""
    for seen in of(ranks, f"none {kind} {guard} {lacking}"):
        assert f"the gradient of '{lacking}' is None on rank 1, a tensor on rank 0" in seen["error"]
        assert "missing_grads='zeros'" in seen["error"]
        assert seen["kept"] and seen["steps again"] and seen["on all"]


def test_a_gradient_that_one_rank_alone_lacks_later_is_an_error_there_and_the_step_can_be_made(
    ranks: Ranks,
) -> None:
    first, second = of(ranks, "none later")
    assert "rank 1 alone" in second["error"] and "'embed.weight' is None" in second["error"]
    assert "[0] did not come" in second["error"] and SHORT <= second["waited"] < 20 * SHORT
    assert first["params"] == second["params"]


def test_a_rank_that_ends_by_that_error_ends_the_others(ranks: Ranks) -> None:
    first, second = of(ranks, "the end")
    assert second.startswith("ValueError: rank 1 alone") and "'bias'" in second
    assert first.startswith(("RuntimeError", "DistBackendError")), first


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_normuon_names_the_rank_that_lacks_a_gradient_and_goes_on_as_if_nothing_was(
    ranks: Ranks, kind: str
) -> None:
    clean = of(ranks, f"optimizer {kind} -1")
    for late in (0, 1):
        for rank, seen in enumerate(of(ranks, f"optimizer {kind} {late}")):
            raised = seen["errors"][late]
            if late == 0:
                assert "the gradient of '2.weight' is None on rank 1, a tensor on rank 0" in raised
            elif rank == 1:
                assert "rank 1 alone" in raised and "'2.weight' is None" in raised
            assert sum(map(bool, seen["errors"])) == int(late == 0 or rank == 1)
            assert seen["steps"] == 3 and seen["params"] == clean[rank]["params"]


def test_a_rank_without_any_gradient_does_not_let_the_others_wait(ranks: Ranks) -> None:
    assert all("'weight' is None on rank 1" in error for error in of(ranks, "without any"))


def test_ranks_that_decide_alone_say_so_once_at_the_callers_line(ranks: Ranks) -> None:
    for seen in of(ranks, "alone"):
        for case in ("off", "mesh", "alone", "sharded", "NorMuon, mesh", "NorMuon, alone"):
            assert seen[case] == [], case
        for case in ("make_plan", "NorMuon"):
            ((text, file),) = seen[case]
            assert "2 ranks" in text and "each decides alone" in text
            for line in ("mesh=torch.distributed.group.WORLD", "mesh='alone'"):
                assert line in text
            assert file.endswith("agreement_ranks.py")


def test_a_rank_that_skipped_alone_warns_for_itself(ranks: Ranks) -> None:
    first, second = of(ranks, "alone")
    ((text, _),) = second["a skip"]
    assert first["a skip"] == [] and "tall (non-finite gradient" in text


@pytest.mark.parametrize("kind", ["shapes", "alone"])
def test_stages_of_the_same_names_are_no_copies_and_the_one_that_knows_the_name_says_it(
    ranks: Ranks, kind: str
) -> None:
    first, second = of(ranks, f"stages {kind}")
    assert first["said"] == second["said"] == [] and first["skipped"] and second["skipped"]
    assert first["flags"] == [[0], [0]] and second["flags"] == [[1], [1]]
    ((elsewhere, _),), ((named, _),) = first["report"], second["report"]
    assert "which it names itself" in elsewhere and "layer.weight" not in elsewhere
    assert "layer.weight (non-finite gradient" in named


def test_what_may_be_copies_or_stages_is_taken_for_copies_with_a_warning(ranks: Ranks) -> None:
    for seen in of(ranks, "untold"):
        ((text, file),) = seen
        assert "taken for copies" in text and "mesh='alone'" in text
        assert file.endswith("agreement_ranks.py")


def test_replicas_whose_gradients_nobody_averaged_are_told_once_at_the_first_step(
    ranks: Ranks,
) -> None:
    for seen in of(ranks, "unlike"):
        assert [case for case in seen if seen[case]] == ["their own"]
        ((text, file),) = seen["their own"]
        assert "DistributedDataParallel" in text and "'weight'" in text and "2 ranks" in text
        assert file.endswith("agreement_ranks.py")


@pytest.mark.parametrize("pair", [("off", "full"), ("output", "full")])
def test_stages_of_different_guards_are_refused_on_all_ranks(
    ranks: Ranks, pair: tuple[str, str]
) -> None:
    for error in of(ranks, f"guards {' '.join(pair)}"):
        assert "Config.guard" in error and str(list(pair)) in error


def test_a_stage_may_have_a_late_gradient_alone(ranks: Ranks) -> None:
    assert of(ranks, "late stage") == [[False, False]] * 2


def test_process_groups_that_are_made_anew_on_the_same_store_agree_as_the_first_ones(
    ranks: Ranks,
) -> None:
    for rank, errors in enumerate(of(ranks, "made anew")):
        for steps in (1, 2, 3):
            of_steps, (alone, together) = errors[:steps], errors[steps : steps + 2]
            assert of_steps == [""] * steps and together == ""
            assert ("rank 1 alone came" in alone) == (rank == 1)
            errors = errors[steps + 2 :]
