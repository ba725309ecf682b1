"""Sharded and shared parameters on one, two and four ranks: every layout gives what one device
gives.

Every world is spawned once and runs all its cases (`layouts`); the tests here read what the ranks
saw.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.layouts import (
    COMPILED,
    COUNTERS,
    CUT,
    FAULTED,
    FORMS,
    HOPS,
    LOADED,
    MAIN,
    NARROWED,
    ON,
    ON_FOUR,
    SAVED,
    STAGES,
    WITHOUT_FOUR,
    Seen,
    faulty_ranks,
    forms_of,
    guards_of,
    kinds_of,
    owner,
    run_dying,
    run_worlds,
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)

Ranks = list[dict[str, Seen]]
# Relative, per tensor, in float32. On CUDA cuBLAS multiplies one matrix by another kernel than a
# stack of them (4e-6 apart after Newton-Schulz, 64x128), and an owner may have one only: 4e-6 was
# seen, in a variance.
CLOSE = 1e-5 if torch.cuda.is_available() else 1e-6
# The same with bfloat16 products; 0.058 was seen, in the variance of matrices of 3 columns.
ROUNDED = 1e-1
COMPILED_CLOSE = 2e-5  # of eager; 1.5e-6 was seen after 10 steps, in a variance


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ranks]:
    return run_worlds(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(params=[4, 2, 1], ids=["4 ranks", "2 ranks", "1 rank"])
def ranks(request: pytest.FixtureRequest, worlds: dict[int, Ranks]) -> Ranks:
    return worlds[request.param]


def on(ranks: Ranks) -> tuple[str, ...]:
    return (*WITHOUT_FOUR, *ON_FOUR) if len(ranks) == 4 else WITHOUT_FOUR


def errors(cases: list[Seen]) -> dict[str, float]:
    """By tensor, of all that lies on all ranks."""
    return {
        name: sum(seen["errors"][name] ** 2 for seen in cases) ** 0.5 for name in cases[0]["errors"]
    }


def far(cases: list[Seen], bound: float = CLOSE) -> dict[str, float]:
    return {name: error for name, error in errors(cases).items() if not error <= bound}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_what_one_device_gives(
    ranks: Ranks, form: str, record_property: object
) -> None:
    bound, wrong, most = ROUNDED if form == "bfloat16" else CLOSE, [], 0.0
    for kind in on(ranks):
        if form not in forms_of(kind, len(ranks)):
            continue
        for guard in guards_of(kind, form, len(ranks)):
            cases = [seen["matrix"][f"{kind} {form} {guard}"] for seen in ranks]
            assert set(MAIN) < set(cases[0]["names"]) and (
                "tall.variance" in cases[0]["names"]
            ) == (form != "muon")
            most = max(most, *errors(cases).values())
            if far(cases, bound):
                wrong.append((kind, guard, far(cases, bound)))
    record_property("largest error", most)  # type: ignore[operator]
    assert not wrong, wrong


@pytest.mark.parametrize("form", ["standard", "gram", "modded_nanogpt", "muon"])
def test_a_flattened_convolution_gives_what_one_device_gives(ranks: Ranks, form: str) -> None:
    for kind in kinds_of(len(ranks)):
        cases = [seen["conv"][f"{kind} {form}"] for seen in ranks]
        assert [seen["error"] for seen in cases if "error" in seen] == [], kind
        assert not far(cases), (kind, far(cases))


def test_metrics_are_those_of_whole_parameters_on_every_rank_by_one_collective_more(
    ranks: Ranks,
) -> None:
    for rank in ranks:
        for kind, seen in rank["metrics"].items():
            assert seen["same bits"] and not seen["other nan"], (kind, seen)
            assert seen["updates of a skipped step"] == 0.0, (kind, seen)
            assert seen["off"] < 1e-5, (kind, seen)  # 1e-6 was seen, in a spread
            if kind == "ddp, state divided":
                continue
            sharded = len(ranks) > 1 and kind not in ("ddp", "group", "Replicate")
            assert sum(seen["more"].values()) == int(sharded), (kind, seen)


def test_qk_clip_scales_on_every_rank_the_rows_that_it_has(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["clip"] and not any(rank["clip"].values()), rank["clip"]


def test_the_state_lies_as_its_parameter_and_whole_where_its_dimension_is_one(ranks: Ranks) -> None:
    for seen in ranks:
        for kind in kinds_of(len(ranks)):
            for form in ("standard", "modded_nanogpt"):
                lies = seen["lies"][f"{kind} {form}"]
                assert lies["wrong"] == [], kind
                assert (lies["sharded"] > 0) == (kind not in ("ddp", "group", "owned"))
        assert seen["lies"]["Shard(0)"]["as torch"] and seen["lies"]["Shard(1)"]["as torch"]


def wrong_with(
    ranks: Ranks, kind: str, guard: str, scope: str, stage: str, faulty: int
) -> list[tuple]:
    """What a guarded step with a fault in the shard of one rank did wrong."""
    clean = [seen["faults"][f"{kind} {guard} {scope}"] for seen in ranks]
    cases = [seen["faults"][f"{kind} {guard} {scope} {stage} {faulty}"] for seen in ranks]
    victim, names = cases[faulty]["victim"], clean[0]["names"]
    hit = [int(name == victim) for name in names]
    expected = [hit, hit if stage == "gradient" else [0] * len(hit)]
    wrong: list[tuple] = []
    holds = guard == "full" and stage == "gradient"
    kept: dict[str, set[bool]] = {}
    for rank, seen in enumerate(cases):
        where = (kind, guard, scope, stage, victim, f"fault on rank {faulty}", f"rank {rank}")
        if (
            seen["flags"] != expected
            or not seen["skipped"]
            or seen["counters"] != [2, 1, 1]
            or not seen["finite"]
        ):
            wrong.append((*where, seen["flags"], seen["skipped"], seen["counters"], seen["finite"]))
        for name, keeps in seen["kept"].items():
            if not name.endswith(".momentum"):
                kept.setdefault(name, set()).add(keeps)
                must = scope == "step" or owner(name) == victim
            else:
                must = holds and (scope == "step" or owner(name) == victim)
                if not holds and keeps and owner(name) != victim:
                    wrong.append((*where, "did not move", name))
            if must and not keeps:
                wrong.append((*where, "did not keep", name))
    where = (kind, guard, scope, stage, victim, f"fault on rank {faulty}")
    wrong += [
        (*where, "some ranks skip, some do not", name)
        for name, found in kept.items()
        if len(found) > 1
    ]
    if scope == "bucket" and all(True in found for found in kept.values()):
        wrong.append((*where, "nothing moved"))
    return wrong


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("guard", "scope"), ON)
def test_a_fault_in_one_shard_skips_alike_on_all_ranks(
    ranks: Ranks, guard: str, scope: str, stage: str
) -> None:
    kinds = FAULTED[len(ranks)]
    for kind in kinds:
        for seen in ranks:  # a clean step moves everything: what is kept below is kept by the guard
            clean = seen["faults"][f"{kind} {guard} {scope}"]
            assert not any(clean["kept"].values()) and not any(map(any, clean["flags"]))
    faulty = faulty_ranks(guard, scope, stage, len(ranks))
    where = [(kind, rank) for kind in kinds for rank in faulty]
    assert not [
        w for kind, rank in where for w in wrong_with(ranks, kind, guard, scope, stage, rank)
    ]


@pytest.mark.parametrize(("kind", "replicas"), NARROWED)
def test_replicas_that_share_among_few_give_what_one_device_gives(
    worlds: dict[int, Ranks], kind: str, replicas: int
) -> None:
    cases = [seen["narrowed"][f"{kind} {replicas}"] for seen in worlds[4]]
    assert not far(cases), far(cases)
    every = {"ddp": 4, "HSDP": 2}[kind]
    who = f"each of {every} replicas does" if replicas == 1 else f"{replicas} of {every} replicas"
    assert all(who in seen["table"] for seen in cases)


@pytest.mark.parametrize("kind", CUT)
def test_matrices_of_one_shape_in_two_buckets_give_what_one_device_gives(
    worlds: dict[int, Ranks], kind: str
) -> None:
    cases = [seen["cut"][kind] for seen in worlds[4]]
    assert not far(cases), far(cases)
    assert all(seen["buckets"][1] == seen["buckets"][0] + 1 for seen in cases)


@pytest.mark.parametrize("kind", HOPS)
def test_messages_that_go_in_two_hops_change_no_bit(worlds: dict[int, Ranks], kind: str) -> None:
    for seen in (seen["hops"][kind] for seen in worlds[4]):
        assert seen["same"] == seen["all"]
        one, two = seen["sent"]
        assert two == 2 * one > 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "replicas"), NARROWED)
def test_replicas_that_do_not_share_skip_together(
    worlds: dict[int, Ranks], kind: str, replicas: int, stage: str
) -> None:
    for faulty in range(4):
        cases = [seen["narrowed"][f"{kind} {replicas} {stage} {faulty}"] for seen in worlds[4]]
        assert all(seen["skipped"] and seen["counters"] == [2, 1, 1] for seen in cases)
        assert len({str(seen["flags"]) for seen in cases}) == 1
        for seen in cases:
            moved = {name for name, keeps in seen["kept"].items() if not keeps}
            held = stage == "gradient"  # else the momentum takes the gradient, which was good
            assert not {name for name in moved if held or not name.endswith(".momentum")}


def test_a_bucket_takes_two_exchanges_three_with_copies_one_with_copies_alone_or_none(
    ranks: Ranks,
) -> None:
    if len(ranks) == 1:
        return
    guard = {"allreduce_": 1, "all_reduce": 1}
    for seen in ranks:
        for kind in kinds_of(len(ranks)):
            ways = {"ddp": 1, "group": 1, "owned": 1, "Replicate": 1, "HSDP": 3}.get(kind, 2)
            local = ("Shard(0)", "HSDP", "2-D", "0 and 0", "strided")
            buckets = {"one bucket": 1, "two buckets": 2, "adamw": 0, "qkv": 2}
            if kind in local:
                buckets |= {"heads": 0, "experts": 0}
            for which, count in buckets.items():
                off = sum(seen["counts"][f"{kind} {which} off"].values())
                full = seen["counts"][f"{kind} {which} full"]
                assert off == ways * count, (kind, which)
                assert (
                    sum(full.values()) == off + 1 and sum(full.get(name, 0) for name in guard) == 1
                ), (kind, which, full)


ERRORS = {
    "heads cut by a shard": "cuts through heads",
    "variance without placements": "params['w']",
    "Partial": "expected Shard and Replicate placements",
    "flattened dimension": "a flattened dimension other than the first is sharded",
    "grad's placements": "grads['square']",
    "grad's placements, compiled": "grads['square']",
    "grad's placements, in place": "grads['square']",
    "state's placements": "state['square.momentum']",
    "param's placements": "params['square']",
    "None": "missing_grads='zeros'",
    "None, compiled": "missing_grads='zeros'",
    "matrices and their stack": "shard only one of the two",
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_is_a_value_error_on_every_rank(ranks: Ranks, case: str) -> None:
    if len(ranks) == 1 or (len(ranks) == 2 and case == "matrices and their stack"):
        return
    for seen in ranks:
        assert (
            seen["errors"][case].startswith("ValueError: ") and ERRORS[case] in seen["errors"][case]
        )


def test_a_gradient_that_only_some_ranks_lack_counts_as_zeros(ranks: Ranks) -> None:
    for seen in ranks:
        for kind, case in seen["missing"].items():
            assert case["same"], kind
            if kind in ("ddp", "Replicate"):
                assert case["replica"] == ranks[0]["missing"][kind]["replica"]


def test_a_checkpoint_of_four_ranks_goes_on_at_two_and_at_one_as_if_nothing_had_been(
    ranks: Ranks,
) -> None:
    for saved in SAVED:
        for kind in (saved,) if len(ranks) == 4 else LOADED:
            cases = [seen["checkpoints"][f"{saved} {kind}"] for seen in ranks]
            assert not far(cases), (saved, kind, far(cases))
            if len(ranks) < 4:
                assert all(seen["counters"] == [6, 0, 0] for seen in cases) and len(COUNTERS) == 3


def test_each_rank_keeps_a_share_of_the_state_and_all_of_it_is_somewhere_once(
    ranks: Ranks,
) -> None:
    owned = [set(seen["owned"]["owned"]) for seen in ranks]
    matrices = {name for name in MAIN if name not in ("embed.weight", "bias", "gain", "frozen")}
    assert set.union(*owned) == matrices and sum(map(len, owned)) == len(matrices)
    assert all(owned)


def test_a_state_that_replicas_share_goes_on_on_any_number_of_ranks(ranks: Ranks) -> None:
    for saved in ("owned-4", "owned-same", "owned-one", "owned-4.safetensors"):
        cases = [seen["owned"].get(saved, seen["owned"]["owned-same"]) for seen in ranks]
        assert not far(cases), (saved, far(cases))
        if not torch.cuda.is_available():
            assert not [case["other bits"] for case in cases if case["other bits"]], saved


def test_of_a_state_that_replicas_share_the_owner_captures_what_failed(ranks: Ranks) -> None:
    of_owner = ["uneven.grad", "uneven.input", "uneven.momentum", "uneven.variance"]
    for seen in ranks:
        owns = "uneven" in seen["owned"]["owned"]
        assert seen["owned"]["captured"] == (of_owner if owns else of_owner[:1])


def test_a_part_of_a_state_is_not_saved_as_all_of_it(ranks: Ranks) -> None:
    if len(ranks) > 1:
        assert "nm.gather_state(state, plan)" in ranks[0]["owned"]["error"]


def test_a_module_of_fsdp_and_tensor_parallelism_is_stepped_as_on_one_device(
    worlds: dict[int, Ranks],
) -> None:
    for seen in worlds[4]:
        assert "_StridedShard" in seen["fsdp_tp"]["placements"]["0.weight"]
        assert max(seen["fsdp_tp"]["errors"].values()) <= CLOSE, seen["fsdp_tp"]["errors"]


def test_compiled_it_is_close_to_eager_and_in_place_has_the_same_bits(ranks: Ranks) -> None:
    for seen in ranks:
        for kind in COMPILED[len(ranks)]:
            case = seen["compiled"][kind]
            assert max(case["off"].values()) <= COMPILED_CLOSE, (kind, case["off"])
            assert sorted(case["same"]) == sorted(case["names"]) and case["lies"], kind


def test_a_capture_of_dtensors_holds_whole_matrices(ranks: Ranks) -> None:
    for seen in ranks:
        for kind, case in seen["captured"].items():
            assert case["keys"] == ["tall.grad", "tall.input", "tall.momentum", "tall.variance"], (
                kind
            )
            assert sorted(case["same"]) == case["keys"] and case["blocks"], kind


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="test_dying_ranks has tried gloo")
@pytest.mark.parametrize("kind", ["ddp", "Shard(0)"])
def test_when_a_rank_dies_the_others_get_an_error_and_do_not_hang(
    kind: str, tmp_path: Path
) -> None:
    for seen in run_dying(kind, 3, tmp_path / "dying"):
        assert seen["first"] and seen["error"], seen
