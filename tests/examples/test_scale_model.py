"""examples/benchmarks/scale_model.py counts what the step's graph sends, and reaches its end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import normuon_fn as nm
from compile_tests import graphs
from tests import scripts
from tests.processes import ROOT

SCRIPT = ROOT / "examples" / "benchmarks" / "scale_model.py"
WORLD, SIDE = 8, 64
SQUARE = [(WORLD, SIDE, SIDE)]  # one matrix a rank


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setitem(sys.modules, "scale_model", module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        sys.modules.pop("step", None)
    return module


def by_hand() -> int:
    """Bytes of one rank's part of one matrix, in float16, on the way to its owner.

    Power, squares and variances come on top.
    """
    rows = SIDE // WORLD
    extras = 2 + rows
    return 2 * rows * SIDE + 8 * -(-4 * extras // 8)


def by_hand_back() -> int:
    """And of its update: finite, factors, variances."""
    rows = SIDE // WORLD
    extras = 1 + 2 * rows
    return 2 * rows * SIDE + 8 * -(-4 * extras // 8)


@pytest.mark.parametrize("rank", [0, 5])
def test_one_square_matrix_a_rank_sends_seven_eighths_of_its_parts(
    model: ModuleType, rank: int
) -> None:
    found, plan = model.count(SQUARE, "fsdp2", WORLD, rank)
    assert model.owned(plan, rank)[0] == 1 and found.parameters == SIDE * SIDE
    there, back = found.collectives
    assert (there.name, back.name) == ("all_to_all_single",) * 2
    assert there.sent == there.received == (by_hand(),) * WORLD
    assert back.sent == back.received == (by_hand_back(),) * WORLD
    assert model.beyond(found, there.ranks, there.sent) == ((WORLD - 1) * by_hand(), 0, WORLD - 1)


def test_a_copy_on_another_node_gets_the_updates_of_this_ones_share(model: ModuleType) -> None:
    found, plan = model.count(SQUARE, "hsdp", 2 * WORLD, 0)
    there, back, relay = found.collectives
    assert model.owned(plan, 0)[0] == 1  # half of the ranks own one, in both copies alike
    assert there.ranks == back.ranks == tuple(range(WORLD)) and relay.ranks == (0, WORLD)
    assert (
        model.beyond(found, there.ranks, there.sent)[1]
        == model.beyond(found, back.ranks, back.sent)[1]
        == 0
    )
    flags = 4 * len(range(WORLD))  # of all matrices, in the message of every owner
    assert (
        model.beyond(found, relay.ranks, relay.sent)[1]
        == WORLD * flags + WORLD // 2 * by_hand_back()
    )


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "ddp"])
def test_the_count_is_that_of_the_traced_graph(model: ModuleType, layout: str, rank: int) -> None:
    shapes = [(9, 16, 16), (5, 32, 16), (3, 16, 32)]
    counted, _ = model.count(shapes, layout, WORLD, rank)
    with model.fake_ranks(WORLD, rank):
        plan, params = model.problem(shapes, layout, WORLD, device="cpu")
        recorded = graphs.captured(model.in_place, *model.arguments(plan, params), run=False)
    sent = [4 * collective.shape[0] for collective in recorded.collectives]
    made = [n for n in recorded.calls if graphs.name_of(n).startswith("_c10d_functional.all_")]
    received = [4 * node.meta["val"].shape[0] for node in made]
    gathered = [c.name == "all_gather_into_tensor" for c in counted.collectives]
    assert sent == [
        c.sent[0] if g else sum(c.sent) for c, g in zip(counted.collectives, gathered, strict=True)
    ]
    assert received == [sum(c.received) for c in counted.collectives]
    assert sent and any(sent)


def test_a_stack_is_counted_as_its_matrices_would_be(model: ModuleType) -> None:
    shape = (SIDE, SIDE)
    with graphs.fake_ranks(WORLD, "1-D mesh") as mesh:
        placed = {str(k): graphs.sharded(shape, mesh, [model.Shard(0)]) for k in range(WORLD)}
        plan = nm.make_plan(placed, model.CONFIG)
        with model.Caught() as caught:
            model.in_place(*model.arguments(plan, placed))
    assert tuple(caught.found) == model.count(SQUARE, "fsdp2", WORLD, 0)[0].collectives


def printed(*arguments: object) -> str:
    return scripts.run(SCRIPT, "--workload", "8x64x64", "--ranks", 8, *arguments).stdout


def test_the_table_has_its_columns_and_the_measurements_stand_beside(tmp_path: Path) -> None:
    file = tmp_path / "scale.png"
    lines = printed("--plot", file).splitlines()
    measured = [line for line in lines if "measured" in line]
    assert [line.split(":")[0].strip() for line in measured] == [
        "1 H200 alone",
        "2 H200 fsdp2",
        "2 H200 ddp",
    ]
    head = next(line for line in lines if line.startswith("layout"))
    for column in (
        "ranks",
        "matrices",
        "products ms",
        "first in ms",
        "other comm ms",
        "step ms",
        "MB sent",
        "MB off node",
    ):
        assert column in head
    rows = [line.split() for line in lines[lines.index(head) + 1 :]]
    assert [row[:3] for row in rows] == [["fsdp2", "8", "1"], ["hsdp", "8", "1"]]
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "ddp"])
def test_more_ranks_never_make_a_step_slower(model: ModuleType, layout: str) -> None:
    """Of a 1.3B model, as many as there may be: with all replicas sharing, 4096 ranks took 69 ms
    under HSDP (7 times as long as 8 ranks), and 4.3 s under DDP; with exchanges in one hop, 16 ms
    under FSDP2.
    """
    shapes, best = model.shapes_of("1.3b"), float("inf")
    rates = model.Rates(544e12, 4.3e12, 34.2, 4.45, 224e9, 40e9, 1e-6)  # the script's own
    for world in (8, 16, 32, 128, 512, 2048, 4096):
        ms = model.predict(shapes, layout, world, rates).step_ms
        # Less is not predicted: RELATIVE and SECONDS of distributed/cost.py. Seen: FSDP2 on 4096
        # ranks takes 0.025 ms more than on 2048, and nothing else takes more than before.
        assert ms <= 1.02 * best + 0.05, (world, ms, best)
        best = min(best, ms)


def test_a_step_is_the_first_exchange_and_the_longer_of_the_rest(model: ModuleType) -> None:
    for slow in (1e3, 1e12):
        row = model.predict(
            SQUARE, "fsdp2", WORLD, model.Rates(1e9, 1e9, 30.0, 4.0, slow, 1e9, 1e-6)
        )
        assert row.sent == row.received == (WORLD - 1) * (by_hand() + by_hand_back())
        compute = row.products_ms + row.passes_ms + row.packing_ms
        assert (row.other_ms > compute) == (slow == 1e3)
        assert row.step_ms == pytest.approx(row.first_ms + max(compute, row.other_ms))
    assert row.first_ms == pytest.approx(
        1e3 * ((WORLD - 1) * 1e-6 + (WORLD - 1) * by_hand() / slow)
    )
