"""The guard on two and on four ranks that step the same parameters: a fault on one rank alone, each
rank in turn.

Every world is spawned once and runs all its cases (`ranks`); the tests here read what the ranks
saw.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.distributed.ranks import ON, Seen, fault, faulty_ranks, key, run
from tests.faults import COUNTERS, SHAPES, STAGES, expected_flags, keeps_its_bits

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)

Ranks = list[dict[str, Seen]]
KINDS = {2: ["in place", "compiled", "group"]}
KINDS[4] = [*KINDS[2], "2-D"]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run(request.param, tmp_path_factory.mktemp("ranks"))


def of_case(ranks: Ranks, kind: str, guard: str, scope: str, stage: str, faulty: int) -> list[Seen]:
    return [seen[key(kind, guard, scope, stage, faulty)] for seen in ranks]


def digests(seen: Seen, names: list[str]) -> list[str]:
    return [seen["digests"][name] for name in names]


def wrong_with(
    ranks: Ranks, kind: str, guard: str, scope: str, stage: str, faulty: int
) -> list[tuple]:
    """What a guarded step with a fault on one rank did wrong."""
    cell, wrong = fault(stage, faulty), []
    keeps = sorted(keeps_its_bits(guard, scope, *cell))
    cases = of_case(ranks, kind, guard, scope, stage, faulty)
    clean = of_case(ranks, kind, guard, scope, "clean", 0)
    for rank, seen in enumerate(cases):
        where = (*cell, f"fault on rank {faulty}", f"rank {rank}")
        if seen["flags"] != expected_flags(*cell):
            wrong.append((*where, "flags", seen["flags"]))
        if seen["kept"] != keeps:
            wrong.append((*where, "kept", set(seen["kept"]) ^ set(keeps)))
        if seen["counters"] != [2, 1, 1] or seen["skipped"] != [True, True]:
            wrong.append((*where, "counters", seen["counters"], seen["skipped"]))
        if digests(seen, list(SHAPES)) != digests(cases[0], list(SHAPES)):
            wrong.append((*where, "other parameters than rank 0"))
        moved = [name for name in SHAPES if name not in keeps]
        if digests(seen, moved) != digests(clean[rank], moved):
            wrong.append((*where, "what was not skipped differs from a clean step"))
        if set(seen["not finite"]) & set(SHAPES):
            wrong.append((*where, "not finite", seen["not finite"]))
    return wrong


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("guard", "scope"), ON)
def test_a_fault_on_any_one_rank_keeps_the_same_bits_on_all_and_every_rank_names_the_parameter(
    ranks: Ranks, guard: str, scope: str, stage: str
) -> None:
    assert not [
        w
        for faulty in range(len(ranks))
        for w in wrong_with(ranks, "eager", guard, scope, stage, faulty)
    ]


def test_in_place_compiled_by_group_and_on_a_mesh_of_two_dimensions_it_is_the_same(
    ranks: Ranks,
) -> None:
    wrong = []
    for kind in KINDS[len(ranks)]:
        for stage in STAGES:
            for faulty in faulty_ranks(kind, stage, len(ranks)):
                wrong += [
                    (kind, *w) for w in wrong_with(ranks, kind, "full", "step", stage, faulty)
                ]
    assert not wrong


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_gradient_on_one_rank_leaves_all_state_equal_on_all_ranks_under_full(
    ranks: Ranks, stage: str
) -> None:
    for faulty in range(len(ranks)):
        if expected_flags(*fault(stage, faulty))[1].count(1):
            cases = of_case(ranks, "eager", "full", "step", stage, faulty)
            assert all(seen["digests"] == cases[0]["digests"] for seen in cases)


@pytest.mark.parametrize("stage", STAGES)
def test_with_the_guard_off_only_that_rank_is_damaged(ranks: Ranks, stage: str) -> None:
    (clean, *_) = of_case(ranks, "eager", "off", "step", "clean", 0)
    for faulty in range(len(ranks)):
        cell = fault(stage, faulty)
        for rank, seen in enumerate(of_case(ranks, "eager", "off", "step", stage, faulty)):
            assert not seen["kept"] and seen["counters"] == [2, 0, 0]
            if rank == faulty:
                assert seen["flags"] == expected_flags(*cell)
                assert seen["not finite"] and all(
                    name.startswith(cell[2]) for name in seen["not finite"]
                )
            else:
                assert seen["digests"] == clean["digests"] and not any(map(any, seen["flags"]))


def test_without_a_mesh_every_rank_decides_alone_and_the_replicas_drift(ranks: Ranks) -> None:
    for stage in STAGES:
        for faulty in faulty_ranks("alone", stage, len(ranks)):
            cases = of_case(ranks, "alone", "full", "step", stage, faulty)
            assert [seen["skipped"][0] for seen in cases] == [
                rank == faulty for rank in range(len(ranks))
            ]
            assert {tuple(digests(seen, list(SHAPES))) for seen in cases} != {
                tuple(digests(cases[0], list(SHAPES)))
            }


def test_a_guard_mesh_of_some_ranks_skips_on_those_and_no_others(ranks: Ranks) -> None:
    if len(ranks) < 4:
        pytest.skip("two groups of two need four ranks")
    for stage in STAGES:
        for faulty in faulty_ranks("row", stage, 4):
            cases = of_case(ranks, "row", "full", "step", stage, faulty)
            together = {0, 1} if faulty < 2 else {2, 3}
            assert {rank for rank, seen in enumerate(cases) if seen["skipped"][0]} == together
            assert all(
                any(seen["flags"][0]) == (rank in together) for rank, seen in enumerate(cases)
            )


def test_a_clean_step_is_skipped_nowhere_warns_nowhere_and_has_the_bits_of_guard_off(
    ranks: Ranks,
) -> None:
    (off, *_) = of_case(ranks, "eager", "off", "step", "clean", 0)
    kinds = [("eager", *on) for on in ON] + [
        (kind, "full", "step") for kind in KINDS[len(ranks)] if kind != "compiled"
    ]
    for kind in kinds:
        for seen in of_case(ranks, *kind, "clean", 0):
            assert seen["digests"] == off["digests"]
            assert seen["skipped"] == [False, False] and not seen["warned"] and not seen["logged"]


def test_check_warns_on_rank_zero_only_and_names_the_parameter_wherever_the_fault_is(
    ranks: Ranks,
) -> None:
    for stage in STAGES:
        for faulty in range(len(ranks)):
            name = fault(stage, faulty)[2]
            first, *others = of_case(ranks, "eager", "full", "step", stage, faulty)
            (message,) = first["warned"]
            assert message.startswith("RuntimeWarning: step 2 skipped") and name in message
            assert all(
                not seen["warned"] and seen["logged"] and "WARNING" not in seen["logged"]
                for seen in others
            )


def test_max_consecutive_raises_on_every_rank_with_the_parameter_that_only_one_rank_saw(
    ranks: Ranks,
) -> None:
    for seen in ranks:
        first, second = seen["raises"]["messages"]
        assert first == "" and "2 steps in a row" in second and "tall" in second


def test_a_run_with_faults_on_random_ranks_ends_everywhere_as_the_run_that_never_saw_them(
    ranks: Ranks,
) -> None:
    for seen in ranks:
        assert seen["run"]["digests"] == ranks[0]["run without them"]["digests"]
        assert seen["run"]["counters"][:2] == [20, 8] and seen["run without them"]["counters"] == [
            12,
            0,
            0,
        ]
        assert len(seen["run"]["digests"]) > len(SHAPES) and not set(COUNTERS) & set(
            seen["run"]["digests"]
        )
