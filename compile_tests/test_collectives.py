"""What the ranks of a step say to each other: so many collectives, for every layout, at any number
of ranks, and when.

A fake process group stands for the other ranks, so that the graph of any rank of any number can be
looked at.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, Problem, Shapes
from normuon_fn.algorithm import guard
from normuon_fn.compat import all_gather, all_to_all, wait
from normuon_fn.distributed import messages as exchange
from normuon_fn.distributed import placements as mesh
from normuon_fn.distributed.shared import SharedWork
from normuon_fn.step import local_update, local_update_

TENSOR_PARALLEL = 4
# Two buckets, of two groups and of one. From 25 ranks on there are some that hold nothing and own
# nothing.
MATRICES: Shapes = {"up": (24, 16), "down": (16, 24), "square": (12, 12)}


class Layout(NamedTuple):
    mesh: str
    placements: list
    strided: int | None = None  # the first placement is a _StridedShard of so many


SHARDED = {
    "FSDP2, rows": Layout("line", [Shard(0)]),
    "FSDP2, columns": Layout("line", [Shard(1)]),
    "HSDP": Layout("copies", [Replicate(), Shard(0)]),
    "tensor parallel, rows": Layout("row", [Shard(0)]),
    "tensor parallel, columns": Layout("row", [Shard(1)]),
    "tensor parallel, columns, FSDP2": Layout("plane", [Shard(0), Shard(1)]),
    "tensor parallel, rows, FSDP2": Layout("plane", [Shard(0), Shard(0)], TENSOR_PARALLEL),
}


def copied(layout: str) -> int:
    """How many of the two buckets of `MATRICES` have copies."""
    return 2 * (layout == "HSDP")


# One that owns a matrix, and one that owns none and, of 64, holds no part.
RANKS = pytest.mark.parametrize(("world", "rank"), [(8, 0), (64, 63)])


def of_tensors(params: dict[str, Tensor], config: nm.Config, *, routes=None, ranks=None) -> Problem:
    plan = nm.make_plan(params, config, routes=routes, mesh=ranks)
    grads = {name: tensor.clone() for name, tensor in params.items()}
    return Problem(params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.02), plan)


def meshes(world: int) -> dict[str, DeviceMesh]:
    plane = world // TENSOR_PARALLEL, TENSOR_PARALLEL
    found = {
        "line": init_device_mesh("cpu", (world,)),
        "copies": init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")),
        "plane": init_device_mesh("cpu", plane, mesh_dim_names=("data", "tensor")),
    }
    return {**found, "row": found["plane"]["tensor"]}


def laid_out(
    layout: str, world: int, config: nm.Config, shapes: Shapes = MATRICES, *, stacked: bool = False
) -> Problem:
    """``stacked``: the shapes are of stacks of matrices, which stay whole."""
    mesh, placements, strided = SHARDED[layout]
    on = meshes(world)[mesh]
    placements = [Shard(p.dim + 1) if stacked and isinstance(p, Shard) else p for p in placements]
    return of_tensors(
        {name: graphs.sharded(shape, on, placements, strided) for name, shape in shapes.items()},
        config,
    )


def local(given: Problem) -> Problem:
    """What `step` compiles."""
    return given._replace(
        **{name: mesh.local_of(getattr(given, name)) for name in ("params", "grads", "state")}
    )


def seen(given: Problem, function: Callable = local_update) -> graphs.Recorded:
    return graphs.captured(function, *local(given), run=False)


def mixed(world: int, config: nm.Config, *, few: bool = False) -> Problem:
    """All layouts in one plan: 4 sharded buckets, 2 of them with copies, a replicated one, and one
    of whole experts and heads.

    ``few``: a sharded bucket and a replicated one, of so many matrices that every rank owns some;
    experts; no heads.
    """
    n = (world,) if few else ()
    rows, cols = Shard(len(n)), Shard(len(n) + 1)
    on = meshes(world)
    of = graphs.sharded
    whole = {
        "experts": of((world, 8, 4), on["line"], [Shard(0)]),
        "qkv": of((4 * world, 8), on["line"], [Shard(0)]),
    }
    parts = {
        "up": of((*n, 32, 16), on["plane"], [rows, rows], TENSOR_PARALLEL),
        "down": of((*n, 16, 32), on["plane"], [rows, cols]),
        "gate": of((*n, 24, 16), on["plane"], [rows, Replicate()]),
        "proj": of((*n, 16, 24), on["copies"], [Replicate(), rows]),
        "low": of((*n, 12, 20), on["row"], [cols]),
        "same": torch.randn((*n, 10, 14)),
    }
    adamw = {
        "wte": of((96, 8), on["plane"], [Shard(0), Shard(0)], TENSOR_PARALLEL),
        "bias": of((24,), on["plane"], [Shard(0), Replicate()]),
        "scale": torch.randn(3),
    }
    params = {**whole, **parts, **adamw}
    if few:
        params = {name: params[name] for name in ("experts", "up", "same", "wte", "bias")}
    routes = None if few else {"qkv": nm.Route(heads=world)}
    return of_tensors(params, config, routes=routes, ranks=dist.group.WORLD)


MIXED, FEW = {"sharded": 4, "gathered": 3}, {"sharded": 1, "gathered": 1}


def check(
    recorded: graphs.Recorded,
    *,
    sharded: int = 0,
    gathered: int = 0,
    reductions: int = 0,
    flags: int = 0,
) -> None:
    """Of so many buckets parts go both ways, of so many updates go to copies; two flags for each of
    ``flags`` parameters.

    Raises:
        AssertionError: naming what was found.
    """
    assert recorded.graphs == 1 and not recorded.break_reasons, (
        f"{recorded.graphs} graphs: {recorded.break_reasons}"
    )
    assert not recorded.host_syncs, f"the host waits for {recorded.host_syncs}"
    expected = Counter(
        all_to_all_single=2 * sharded, all_gather_into_tensor=gathered, all_reduce=reductions
    )
    found = Counter(collective.name for collective in recorded.collectives)
    assert found == expected, f"expected {dict(+expected)}, found {dict(found)}"
    reduced = [
        str(collective) for collective in recorded.collectives if collective.name == "all_reduce"
    ]
    assert reduced == [f"all_reduce [2, {flags}] int32"] * reductions, f"found {reduced}"


def check_overlap(recorded: graphs.Recorded, *, sharded: int, waits_first: int) -> None:
    """Parts are sent before the first product, and updates are waited for after the last one.

    ``waits_first``: so many of the buckets' parts may be waited for before the first product.

    Raises:
        AssertionError: naming what was found.
    """
    at = {node: k for k, node in enumerate(recorded.calls)}
    names = {node: graphs.name_of(node) for node in at}
    products = [at[node] for node, name in names.items() if name in ("aten.bmm", "aten.baddbmm")]
    sent = [node for node, name in names.items() if name == "_c10d_functional.all_to_all_single"]
    waited = {
        node.args[0]: k for node, k in at.items() if names[node] == "_c10d_functional.wait_tensor"
    }
    assert products and len(sent) == 2 * sharded, (
        f"{len(products)} products, {len(sent)} all-to-all"
    )
    there, back = sent[:sharded], sent[sharded:]
    late = [str(node) for node in there if at[node] > products[0]]
    assert not late, f"sent after the first product: {late}"
    early = [str(node) for node in there if waited[node] < products[0]]
    assert len(early) <= waits_first, (
        f"waited for before the first product: {early}, {waits_first} allowed"
    )
    early = [str(node) for node in back if waited[node] < products[-1]]
    assert not early, f"updates waited for before the last product: {early}"


# ----------------------------------------------------------------------------- how many collectives


@RANKS
@pytest.mark.parametrize("layout", SHARDED)
def test_a_sharded_bucket_is_two_collectives_and_one_more_with_copies(
    layout: str, world: int, rank: int
) -> None:
    with graphs.fake_ranks(world, rank=rank):
        given = laid_out(layout, world, nm.Config(**SHORT))
        assert len(given.plan.buckets) == 2
        check(seen(given), sharded=2, gathered=copied(layout))


@RANKS
def test_a_replicated_bucket_is_one_collective(world: int, rank: int) -> None:
    with graphs.fake_ranks(world, rank=rank) as ranks:
        given = of_tensors(
            {name: torch.randn(shape) for name, shape in MATRICES.items()},
            nm.Config(**SHORT),
            ranks=ranks,
        )
        assert len(given.plan.buckets) == 2
        check(seen(given), gathered=2)


@RANKS
def test_experts_and_heads_that_nobody_cuts_go_nowhere(world: int, rank: int) -> None:
    shapes = {"experts": (2 * world, 8, 6), "qkv": (4 * world, 8)}
    with graphs.fake_ranks(world, rank=rank):
        on = meshes(world)["line"]
        params = {name: graphs.sharded(shape, on, [Shard(0)]) for name, shape in shapes.items()}
        given = of_tensors(params, nm.Config(**SHORT), routes={"qkv": nm.Route(heads=world)})
        recorded = seen(given)
    check(recorded)
    assert recorded.ops["aten.bmm"] > 0  # each rank orthogonalizes its own


@pytest.mark.parametrize(
    ("guarded", "world", "rank"),
    [("off", 8, 7), ("off", 64, 63), ("full", 8, 0), ("full", 64, 0), ("full", 64, 63)],
)
def test_all_layouts_in_one_plan_add_up(guarded: str, world: int, rank: int) -> None:
    with graphs.fake_ranks(world, rank=rank):
        given = mixed(world, nm.Config(guard=guarded, **SHORT))
        recorded = seen(given, local_update_ if rank else local_update)
        check(recorded, **MIXED, reductions=int(guarded == "full"), flags=len(given.params))
        assert [graphs.ranks_of(group) for group in recorded.groups] == [world] * int(
            guarded == "full"
        )


@pytest.mark.parametrize(
    ("guarded", "scope"), [("output", "step"), ("output", "bucket"), ("full", "bucket")]
)
@pytest.mark.parametrize(
    ("layout", "world"), [("HSDP", 8), ("replicated", 8), ("FSDP2, rows", 64), ("replicated", 64)]
)
def test_the_guard_is_one_reduction(layout: str, guarded: str, scope: str, world: int) -> None:
    config = nm.Config(guard=guarded, guard_scope=scope, **SHORT)
    with graphs.fake_ranks(world, rank=world - 1) as ranks:
        if layout == "replicated":
            given = of_tensors(
                {name: torch.randn(shape) for name, shape in MATRICES.items()}, config, ranks=ranks
            )
            check(seen(given), gathered=2, reductions=1, flags=len(MATRICES))
        else:
            given = laid_out(layout, world, config)
            check(
                seen(given), sharded=2, gathered=copied(layout), reductions=1, flags=len(MATRICES)
            )


# -------------------------------------------------------------------------------- as it is compiled


@functools.cache
def of_few() -> tuple[Problem, graphs.Recorded]:
    with graphs.fake_ranks(8):
        given = mixed(8, nm.Config(guard="full", **SHORT), few=True)
        return given, graphs.record(local_update, *local(given))


def test_the_compiler_sees_one_graph() -> None:
    given, compiled = of_few()
    check(compiled, **FEW, reductions=1, flags=len(given.params))
    check_overlap(compiled, sharded=1, waits_first=0)  # the experts come first


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="dynamo of torch 2.11 fails on a DTensor made in the graph"
)  # type: ignore[operator]
def test_a_users_graph_of_dtensors_has_the_same_collectives() -> None:
    _, compiled = of_few()
    with graphs.fake_ranks(8):
        given = mixed(8, nm.Config(guard="full", **SHORT), few=True)
        users = graphs.record(nm.update, *given)
    check(users, **FEW, reductions=1, flags=len(given.params))
    check_overlap(users, sharded=1, waits_first=0)
    assert list(map(str, users.collectives)) == list(map(str, compiled.collectives))
    for parameter in given.plan.parameters:
        new = users.result.params[parameter.name]
        assert new.shape == given.params[parameter.name].shape and mesh.has_layout(
            new, parameter.spec.sharded
        )


def test_the_compiler_sees_one_graph_at_64_ranks() -> None:
    with graphs.fake_ranks(64):
        given = laid_out("FSDP2, rows", 64, nm.Config(guard="output", **SHORT), {"up": (64, 8)})
        check(graphs.record(local_update_, *local(given)), sharded=1, reductions=1, flags=1)


def test_the_hops_of_512_ranks_are_one_graph_and_meet_few_ranks_each() -> None:
    with graphs.fake_ranks(512):
        given = laid_out("FSDP2, rows", 512, nm.Config(guard="output", **SHORT), {"up": (512, 8)})
        (bucket,) = given.plan.buckets
        there, back = (x.hops for x in (bucket.exchange.to_owners, bucket.exchange.back))
        hops = 1 + given.plan.hops
        assert len(there.onward) == len(back.onward) == given.plan.hops > 0
        met = [len(hop.incoming) for hop in (back.first, *(hop for _, hop in back.onward))]
        assert math.prod(met) == 512 and max(met) <= 64
        assert "messages go over a grid of" in str(given.plan).splitlines()[-1]
        check(graphs.record(local_update_, *local(given)), sharded=hops, reductions=1, flags=1)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> graphs.CompileCounter:
    """Counts what `step` and `step_` compile."""
    return graphs.counting(monkeypatch)


@pytest.mark.parametrize("step", [nm.step, nm.step_], ids=["step", "step_"])
def test_steps_with_other_rates_and_gradients_are_one_graph(
    step: Callable, counter: graphs.CompileCounter
) -> None:
    with graphs.fake_ranks(8):
        given = laid_out(
            "FSDP2, rows", 8, nm.Config(guard="full", **SHORT), {"up": (24, 16), "wte": (16, 8)}
        )
        params, grads, state, hyper, plan = given
        for _ in range(4):
            with graphs.no_recompile():
                result = step(params, grads, state, hyper, plan)
            params, state = result.params, result.state
            hyper = nm.Hyper(*(value * 0.9 for value in hyper))
            grads = {name: tensor.clone() for name, tensor in grads.items()}
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------ overlap


def two_buckets(layout: str) -> graphs.Recorded:
    """On a rank that owns matrices of both."""
    shapes = {"up": (8, 24, 16), "square": (8, 12, 12)}
    with graphs.fake_ranks(8, rank=7):
        return seen(laid_out(layout, 8, nm.Config(guard="output", **SHORT), shapes, stacked=True))


@pytest.mark.filterwarnings("ignore:guard=.*decide alone")  # tensor parallel ranks of one replica
@pytest.mark.parametrize(
    "layout", ["FSDP2, rows", "HSDP", "tensor parallel, columns", "tensor parallel, rows, FSDP2"]
)
def test_parts_travel_while_others_are_orthogonalized(layout: str) -> None:
    check_overlap(
        two_buckets(layout), sharded=2, waits_first=1
    )  # the first bucket has nothing to wait behind


# ---------------------------------------------------------------------------- the size of the graph


def nodes(layout: str, world: int, shapes: Shapes) -> int:
    with graphs.fake_ranks(world):
        return len(seen(laid_out(layout, world, nm.Config(guard="full", **SHORT), shapes)).calls)


def check_growth(few: int, many: int, more: int, each: int) -> None:
    """At most ``each`` nodes for every one of ``more`` ranks or parameters."""
    assert many - few <= each * more, (
        f"{(many - few) / more:.1f} nodes each, {each} allowed: {few} and {many}"
    )


@pytest.mark.parametrize("layout", ["FSDP2, rows", "tensor parallel, columns, FSDP2", "HSDP"])
def test_ranks_add_no_nodes(layout: str) -> None:
    shapes = {"up": (64, 64)}  # one group, of which every rank holds a part
    check_growth(nodes(layout, 8, shapes), nodes(layout, 64, shapes), 64 - 8, 0)


def test_a_parameter_adds_at_most_5_nodes() -> None:
    few, many = ({f"layers.{k}": (16, 8) for k in range(n)} for n in (8, 24))
    check_growth(nodes("FSDP2, rows", 8, few), nodes("FSDP2, rows", 8, many), 24 - 8, 5)  # seen 3


# ----------------------------------------------------------- every check goes red when it is broken


def change(
    monkeypatch: pytest.MonkeyPatch, name: str, of_words: Callable[[exchange.Sent], Tensor]
) -> None:
    """What a stage of `SharedWork` has sent is put through ``of_words``."""
    kept = getattr(SharedWork, name)

    def changed(work: SharedWork) -> None:
        kept(work)
        assert work.sent is not None
        work.sent = work.sent._replace(words=of_words(work.sent))

    monkeypatch.setattr(SharedWork, name, changed)


def sent_again(sent: exchange.Sent) -> Tensor:
    sizes = [len(sent.words), *[0] * 7]
    return all_to_all(wait(sent.words), sizes, sizes, dist.group.WORLD.group_name)


def gathered_again(sent: exchange.Sent) -> Tensor:
    return all_gather(wait(sent.words), 8, dist.group.WORLD.group_name)[: len(sent.words)]


@pytest.mark.parametrize(
    ("again", "found"),
    [(sent_again, "'all_to_all_single': 6"), (gathered_again, "all_gather_into_tensor")],
)
@pytest.mark.parametrize("stage", ["advance", "orthogonalize"])
def test_a_further_exchange_goes_red(
    stage: str, again: Callable, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, stage, again)
    with graphs.fake_ranks(8), pytest.raises(AssertionError, match=f"expected .*found .*{found}"):
        check(seen(laid_out("FSDP2, rows", 8, nm.Config(**SHORT))), sharded=2)


def test_a_second_reduction_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = guard.all_reduce_max
    monkeypatch.setattr(
        guard, "all_reduce_max", lambda flags, *given: kept(kept(flags, *given), *given)
    )
    with graphs.fake_ranks(8), pytest.raises(AssertionError, match=r"found .*'all_reduce': 2"):
        given = laid_out("FSDP2, rows", 8, nm.Config(guard="output", **SHORT))
        check(seen(given), sharded=2, reductions=1, flags=len(MATRICES))


def multiplied(sent: exchange.Sent) -> Tensor:
    one = torch.ones(1, 1, 1)
    return sent.words * torch.bmm(one, one).int().flatten()


@pytest.mark.parametrize(
    ("way", "of_words", "found"),
    [
        ("advance", lambda sent: wait(sent.words), "waited for before the first product"),
        ("advance", multiplied, "sent after the first product"),
        (
            "orthogonalize",
            lambda sent: wait(sent.words),
            "updates waited for before the last product",
        ),
    ],
)
def test_waiting_at_once_goes_red(
    way: str, of_words: Callable, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, way, of_words)
    with pytest.raises(AssertionError, match=found):
        check_overlap(two_buckets("FSDP2, rows"), sharded=2, waits_first=1)


def test_more_nodes_a_rank_go_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(sent: exchange.Sent) -> Tensor:
        words = sent.words
        for _ in range(dist.get_world_size()):
            words = words + 1
        return words

    change(monkeypatch, "advance", longer)
    with pytest.raises(AssertionError, match="nodes each, 0 allowed"):
        check_growth(*(nodes("FSDP2, rows", world, {"up": (16, 8)}) for world in (4, 8)), 4, 0)


def test_gradients_that_lie_differently_in_memory_are_the_same_graph(
    counter: graphs.CompileCounter,
) -> None:
    with graphs.fake_ranks(8):
        given = laid_out("FSDP2, rows", 8, nm.Config(**SHORT), {"up": (24, 16)})
        nm.step(*given)
        turned = given.grads["up"].to_local().mT.contiguous().mT
        with graphs.no_recompile():
            nm.step(*given._replace(grads={"up": turned}))
