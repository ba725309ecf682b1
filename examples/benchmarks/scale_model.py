"""What a step should cost on 8 to 4096 ranks: bytes that are counted, at rates that are given.

    # FSDP2 and HSDP, the matrices of a 1.3B model
    python examples/benchmarks/scale_model.py --plot scale.png
    python examples/benchmarks/scale_model.py --workload 8x256x256 --ranks 8,16 --layouts fsdp2 \\
        --json
    python examples/benchmarks/scale_model.py --network 20e9 --message-us 5

    fsdp2    [Shard(0)] on all ranks
    hsdp     [Replicate, Shard(0)], 8 ranks a shard group, one node each
    ddp      replicated, every rank orthogonalizes its share

Between nodes as many replicas share a bucket as the plan decides, and the shards of very many ranks
go in as many hops, by the same rates as here (normuon_fn/distributed/cost.py): with other rates it
would decide otherwise.

Counted: the step runs on tensors without values under a fake process group, and every collective
that it calls is caught with the sizes it has for every other rank. A count is of one rank; of
several (those that own most, in all and of a shape, or least, the first and the last) the largest
counts. Matrices of one shape are one stack here, Shard(1) instead of Shard(0): the same words,
fewer tensors.

Computed: the products of the matrices that a rank owns, passes over its parameters, passes that
pack and unpack what is sent. A collective takes its bytes to and from other nodes at the network's
speed, or those within the node (8 ranks) at NVLink's, whichever takes longer, in or out, and a
message's cost for every rank that is met. Then

    ms = what comes before the first product + max(compute, all other exchanges)

The guard is off: it adds one all_reduce of 8 bytes a parameter. Not in it: that few matrices keep a
GPU less busy than many do, launches, congestion, and that packing comes before the first exchange.
From about 100 ranks on it is a lower bound.

Rates, unless given: one H200, 1.3B parameters in float32, torch 2.11, 2026-11-22. 69.6 ms a step,
of which 60 ms are products (their FLOP by step.py: the rate), and 9.6 ms passes at 4.3 TB/s (41 GB,
34 B a parameter; step.py's floor has 26). Two of them, FSDP2, when nothing overlapped: 44.3 ms,
NCCL 5.4 ms for the 1.2 GB that a rank sends (224 GB/s each way), packing 5 ms. Network: an
assumption, 400 Gbit/s a GPU at 80 %; a message: another one, 1 us.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from step import Shapes, products, render, shapes_of

import normuon_fn as nm
from normuon_fn.distributed.placements import local_of

in_place = import_module(
    "normuon_fn.step"
).local_update_  # what step_ compiles; the package names the function the same

NODE = 8  # ranks
LAYOUTS = ("fsdp2", "hsdp", "ddp")
# float16 everywhere sends as many bytes as bfloat16 and float16 do on a GPU, and chooses the same
# forms.
CONFIG = nm.Config(guard="off", orthogonalize_dtype=torch.float16)
MEASURED = [  # ranks, layout, ms, overlapped, what of it the rates come from
    (1, "", 68.7, True, "products and passes"),
    (2, "fsdp2", 40.6, True, "NVLink and packing, of an earlier version at 44.3 ms"),
    (2, "ddp", 44.5, True, "nothing"),
]


@dataclass(frozen=True)
class Collective:
    """One that a rank takes part in: bytes by rank of its group; those for itself included."""

    name: str
    ranks: tuple[int, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True)
class Rank:
    rank: int
    flop: float
    parameters: int  # that lie on it
    collectives: tuple[Collective, ...]


@dataclass(frozen=True)
class Rates:
    product: float  # FLOP/s
    bandwidth: float  # B/s
    parameter: float  # B moved a parameter
    packing: float  # B moved for every byte that is sent or received
    nvlink: float  # B/s, each way
    network: float  # B/s of a GPU, each way
    message: float  # s


@dataclass(frozen=True)
class Row:
    """One line of the table; ms and bytes of the busiest rank."""

    layout: str
    ranks: int
    owned: int  # matrices, at most
    products_ms: float
    passes_ms: float
    packing_ms: float
    first_ms: float
    other_ms: float
    step_ms: float
    sent: int  # to other ranks
    received: int
    off_node: int  # the larger of what is sent to other nodes and received from them
    messages: int
    sampled: tuple[int, ...]


class Caught(TorchDispatchMode):
    """Collectives are noted and not done."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[Collective]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, name = function.namespace, function._opname
        if namespace != "_c10d_functional":
            return function(*args, **(kwargs or {}))
        if name == "wait_tensor":
            return args[0]
        words, size = args[0], args[0].element_size()
        ranks = tuple(
            dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(args[-1]))
        )
        if name == "all_to_all_single":
            incoming, outgoing = args[1], args[2]
            assert sum(outgoing) == len(words)
        elif name == "all_gather_into_tensor":
            incoming, outgoing = [len(words)] * len(ranks), [len(words)] * len(ranks)
        else:
            raise NotImplementedError(f"no count of {name}")
        self.found.append(
            Collective(
                name, ranks, tuple(n * size for n in outgoing), tuple(n * size for n in incoming)
            )
        )
        return words.new_empty(sum(incoming))


@contextlib.contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def problem(
    shapes: Shapes, layout: str, world: int, device: str = "meta"
) -> tuple[nm.Plan, dict[str, Tensor]]:
    """Under the process group. One stack for every shape."""
    if layout not in LAYOUTS:
        return _planned(
            {f"stack.{k}": torch.empty(shape, device=device) for k, shape in enumerate(shapes)},
            None,
        )
    if layout == "ddp":
        return _planned(
            {f"stack.{k}": torch.empty(shape, device=device) for k, shape in enumerate(shapes)},
            dist.group.WORLD,
        )
    if layout == "hsdp":
        mesh = init_device_mesh(
            "cpu", (max(1, world // NODE), min(world, NODE)), mesh_dim_names=("replicate", "shard")
        )
        placements, ranks, at = [Replicate(), Shard(1)], min(world, NODE), dist.get_rank() % NODE
    else:
        mesh = init_device_mesh("cpu", (world,))
        placements, ranks, at = [Shard(1)], world, dist.get_rank()
    params: dict[str, Tensor] = {}
    for k, (count, rows, cols) in enumerate(shapes):
        chunk = -(-rows // ranks)
        part = torch.empty((count, max(0, min(chunk, rows - chunk * at)), cols), device=device)
        whole = torch.Size((count, rows, cols))
        stride = (rows * cols, cols, 1)
        params[f"stack.{k}"] = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=whole, stride=stride
        )
    return _planned(params, None)


def _planned(params: dict[str, Tensor], ranks: Any) -> tuple[nm.Plan, dict[str, Tensor]]:
    return nm.make_plan(params, CONFIG, routes={"*": nm.Route("normuon")}, mesh=ranks), params


def arguments(plan: nm.Plan, params: dict[str, Tensor]) -> tuple[Any, ...]:
    """Of the step, as it is compiled."""
    here, state = local_of(params), local_of(nm.init(params, plan))
    device = next(iter(here.values())).device
    hyper = nm.Hyper(*(value.to(device) for value in nm.Hyper.of({"": torch.empty(1)}, lr=0.0)))
    return here, {name: torch.empty_like(p) for name, p in here.items()}, state, hyper, plan


def owned(plan: nm.Plan, rank: int) -> tuple[int, float]:
    """Matrices, and the FLOP of their products. By a plan of a rank of the same block of replicas:
    others own none there, and do the same by plans of their own.
    """
    matrices, flop = 0, 0.0
    for bucket in plan.buckets:
        n = sum(
            group.ownership.by_rank.get(rank, 0) if group.ownership else group.count
            for group in bucket.groups
        )
        form, rows = bucket.form, list(bucket.coefficients.rows)
        each = products(n, bucket.rows, bucket.cols, form.method, rows, len(form.restarts))
        matrices, flop = matrices + n, flop + sum(f for f, _ in each)
    return matrices, flop


def count(shapes: Shapes, layout: str, world: int, rank: int) -> tuple[Rank, nm.Plan]:
    """What one rank computes, and every collective of its step."""
    with fake_ranks(world, rank) if world > 1 else contextlib.nullcontext():
        plan, params = problem(shapes, layout, world)
        given = arguments(plan, params)
        with Caught() as caught:
            in_place(*given)
        here = sum(p.numel() for p in given[0].values())
        return Rank(rank, owned(plan, rank)[1], here, tuple(caught.found)), plan


def counts(shapes: Shapes, layout: str, world: int) -> tuple[list[Rank], int]:
    """The ranks that own most (in all, and of each group) and least, the first and the last.

    And the most that one of them owns.
    """
    first, plan = count(shapes, layout, world, 0)
    work = [owned(plan, rank) for rank in range(world)]
    most_flop = max(range(world), key=lambda rank: work[rank][1])
    most = max(range(world), key=lambda rank: work[rank][0])
    least = min(range(world), key=lambda rank: work[rank][1])
    groups = [group for bucket in plan.buckets for group in bucket.groups]
    ownerships = [group.ownership for group in groups if group.ownership]
    of_each = {
        max(range(world), key=lambda rank: by_rank.get(rank, 0))
        for by_rank in (s.by_rank for s in ownerships)
    }
    others = sorted({most_flop, most, least, world - 1, *of_each} - {0})
    return [first, *(count(shapes, layout, world, rank)[0] for rank in others)], work[most][0]


def beyond(given: Rank, ranks: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """(bytes to other ranks, of these to other nodes, how many ranks) of bytes by rank."""
    away = [(rank, n) for rank, n in zip(ranks, sizes, strict=True) if rank != given.rank and n]
    off = sum(n for rank, n in away if rank // NODE != given.rank // NODE)
    return sum(n for _, n in away), off, len(away)


def seconds(given: Rank, collective: Collective, rates: Rates) -> float:
    ways = []
    for sizes in (collective.sent, collective.received):
        total, off, messages = beyond(given, collective.ranks, sizes)
        ways.append(
            max((total - off) / rates.nvlink, off / rates.network) + messages * rates.message
        )
    return max(ways)


def packed(given: Rank) -> int:
    """Bytes that are packed and unpacked. What an all-gather sends is packed once."""
    return sum(
        (c.sent[0] if c.name.startswith("all_gather") else sum(c.sent)) + sum(c.received)
        for c in given.collectives
    )


def before_products(given: Rank, world: int) -> int:
    """How many collectives come before the first product: the first bucket's parts, and, where
    exchanges go in hops, those of the other buckets but for their last hop.
    """
    sizes = [len(c.ranks) for c in given.collectives if c.name == "all_to_all_single"]
    if not sizes or world in sizes or min(sizes) == max(sizes):  # none of them goes in hops
        return 1
    parts = sizes[: len(sizes) // 2]
    return len(parts) - round(math.log(math.prod(parts), world)) + 1


def predict(shapes: Shapes, layout: str, world: int, rates: Rates, *, overlap: bool = True) -> Row:
    ranks, most = counts(shapes, layout, world)
    flop = 1e3 * max(r.flop for r in ranks) / rates.product
    passes = 1e3 * max(r.parameters for r in ranks) * rates.parameter / rates.bandwidth
    packing = 1e3 * max(map(packed, ranks)) * rates.packing / rates.bandwidth
    moved = [r.parameters * rates.parameter + packed(r) * rates.packing for r in ranks]
    busy = 1e3 * max(
        r.flop / rates.product + n / rates.bandwidth for r, n in zip(ranks, moved, strict=True)
    )
    # All wait for the slowest rank of each.
    by_collective = zip(*(r.collectives for r in ranks), strict=True)
    times = [
        1e3 * max(seconds(r, c, rates) for r, c in zip(ranks, of, strict=True))
        for of in by_collective
    ]
    # Replicated matrices are where they are needed: no exchange comes before the first product.
    ahead = sum(times[: before_products(ranks[0], world)]) if times and layout != "ddp" else 0.0
    other = sum(times) - ahead
    totals = {
        way: max(sum(beyond(r, c.ranks, getattr(c, way))[0] for c in r.collectives) for r in ranks)
        for way in ("sent", "received")
    }
    off = max(
        sum(beyond(r, c.ranks, getattr(c, way))[1] for c in r.collectives)
        for r in ranks
        for way in totals
    )
    messages = max(
        sum(beyond(r, c.ranks, getattr(c, way))[2] for c in r.collectives)
        for r in ranks
        for way in totals
    )
    step = ahead + (max(busy, other) if overlap else busy + other)
    sampled = tuple(r.rank for r in ranks)
    sizes = totals["sent"], totals["received"], off, messages
    return Row(layout, world, most, flop, passes, packing, ahead, other, step, *sizes, sampled)


def table(rows: list[Row]) -> str:
    heads = (
        "layout,ranks,matrices,products ms,passes ms,packing ms,first in ms,other comm ms,step ms"
    )
    cells = [(*heads.split(","), "MB sent", "MB received", "MB off node", "messages")]
    for r in rows:
        times = (r.products_ms, r.passes_ms, r.packing_ms, r.first_ms, r.other_ms, r.step_ms)
        sizes = (r.sent, r.received, r.off_node)
        numbers = (*(f"{t:.3f}" for t in times), *(f"{n / 1e6:.3f}" for n in sizes))
        cells.append((r.layout, str(r.ranks), str(r.owned), *numbers, str(r.messages)))
    return render(cells, False)


def compared(rates: Rates) -> list[dict[str, Any]]:
    """The prediction beside what was measured."""
    shapes, found = shapes_of("1.3b"), []
    for world, layout, measured, overlap, source in MEASURED:
        ms = predict(shapes, layout, world, rates, overlap=overlap).step_ms
        found.append(
            {
                "ranks": world,
                "layout": layout or "alone",
                "measured_ms": measured,
                "predicted_ms": ms,
                "deviation": ms / measured - 1,
                "rates_from_it": source,
            }
        )
    return found


def plot(rows: list[Row], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for k, layout in enumerate(dict.fromkeys(row.layout for row in rows)):
        own, color = [row for row in rows if row.layout == layout], f"C{k}"
        ranks = [row.ranks for row in own]
        compute = [row.products_ms + row.passes_ms + row.packing_ms for row in own]
        left.plot(ranks, [row.step_ms for row in own], "o-", color=color, label=layout)
        left.plot(ranks, compute, "--", color=color, linewidth=1, label=f"{layout}, compute alone")
        right.plot(
            ranks,
            [max(row.sent, row.received) / 1e6 for row in own],
            "o-",
            color=color,
            label=layout,
        )
        right.plot(
            ranks,
            [row.off_node / 1e6 for row in own],
            "--",
            color=color,
            linewidth=1,
            label=f"{layout}, off the node",
        )
    left.set(title="predicted, the busiest rank", ylabel="ms a step")
    right.set(title="counted, the busiest rank", ylabel="MB a step, one way")
    for axes in (left, right):
        axes.set(xlabel="ranks", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workload", default="1.3b", help="a name of step.py's, or COUNTxROWSxCOLS,..."
    )
    parser.add_argument("--ranks", type=listed(int), default=[2**k for k in range(3, 13)])
    parser.add_argument(
        "--layouts", type=listed(str), default=["fsdp2", "hsdp"], help=f"of {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--product", type=float, default=544e12, help="FLOP/s of the products")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="B/s of the passes")
    parser.add_argument("--parameter", type=float, default=34.2, help="B moved for a parameter")
    parser.add_argument(
        "--packing", type=float, default=4.45, help="B moved for a byte of a send or receive buffer"
    )
    parser.add_argument("--nvlink", type=float, default=224e9, help="B/s each way within a node")
    parser.add_argument(
        "--network", type=float, default=40e9, help="B/s each way of a GPU to other nodes"
    )
    parser.add_argument(
        "--message-us", type=float, default=1.0, help="for every rank that is sent to"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument(
        "--no-measured", action="store_true", help="leave out the comparison with 1 and 2 GPUs"
    )
    args = parser.parse_args()
    if set(args.layouts) - set(LAYOUTS):
        parser.error(f"--layouts: expected some of {', '.join(LAYOUTS)}")
    if any(n < 2 or ("hsdp" in args.layouts and n % NODE) for n in args.ranks):
        parser.error(f"--ranks: expected 2 or more; with hsdp, multiples of {NODE}")
    shapes = shapes_of(args.workload)
    rates = Rates(
        args.product,
        args.bandwidth,
        args.parameter,
        args.packing,
        args.nvlink,
        args.network,
        1e-6 * args.message_us,
    )
    beside = [] if args.no_measured else compared(rates)
    rows = [
        predict(shapes, layout, world, rates) for layout in args.layouts for world in args.ranks
    ]
    if args.json:
        print(
            json.dumps(
                {"rates": asdict(rates), "measured": beside, "rows": [asdict(row) for row in rows]},
                indent=2,
            )
        )
    else:
        for b in beside:
            print(
                f"{b['ranks']} H200 {b['layout']}: predicted {b['predicted_ms']:.1f} ms, "
                f"measured {b['measured_ms']:.1f} ms, "
                f"{100 * b['deviation']:+.1f} % (rates that come from it: {b['rates_from_it']})"
            )
        print(f"\n{args.workload}, {asdict(rates)}\n{table(rows)}")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
