"""What a step costs, and how far that is from what the device could do.

    python examples/benchmarks/step.py                        # the matrices of GPT-2 124M
    python examples/benchmarks/step.py --workload 1.3b --guard off,full --plot step.png
    python examples/benchmarks/step.py --workload 12x768x768,4x3072x768 --dtype bfloat16 --json
    python examples/benchmarks/step.py --workload 1.3b --dtype bfloat16 --guard full --no-peers \
        --no-first-step --momentum-dtype float32,bfloat16,int8 --only momentum
    # the rows whose name has one of these
    python examples/benchmarks/step.py --only Muon,graph --no-first-step
    python examples/benchmarks/step.py --device cpu --workload cpu            # ratios
    # shapes that nobody chose
    python examples/benchmarks/step.py --workload random:7 --only graph --guard off --no-first-step
    python examples/benchmarks/step.py --bars                 # every bar of the project: Markdown
    # or ddp; rank 0's times
    torchrun --nproc-per-node 2 examples/benchmarks/step.py --workload 1.3b --layout fsdp2

All rows of a workload share one process, one set of parameters and gradients (random, made on the
device), and their calls are interleaved in blocks, forwards and backwards in turn: drift of clocks
and temperature meets all alike, and a ratio (the median over rounds of block median against block
median) is good to less than the spread that stands beside it.

    median p10 p90   ms a call, by CUDA events; on CPU by the clock
    x first          against the first row
    TFLOP/s          the arithmetic of the Newton-Schulz form that the plan chose, symmetric
                     products counted as half
    floor            max(arithmetic, bytes) summed over the products of each bucket, plus 26 B per
                     parameter in float32 for the passes over parameters, gradients and momentum, at
                     this device's own ceilings: a matmul of 8192^3 and a large copy, measured here
    share            floor over median
    held             the same with the ceiling that the matmul holds when it is repeated for 1.5 s:
                     a GPU under load is kept at its power limit, and its clock falls (H200: from
                     1980 to 1470 MHz), as it does under every row of more than 50 ms
    host ms          of one call on an idle device
    peak GiB         the most that was allocated (2^30) above params + grads + state, including the
                     first call and the capture
    first s          the first call in a process of its own, with empty compile caches, without
                     imports and the device's start

A row that fails says why in its own line, and the others go on. A peer counts if its update is
finite and changed every parameter. microsoft/dion and Emerging-Optimizers join where they can be
imported.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm import tqdm

import normuon_fn as nm
from normuon_fn.runtime.graphed import GraphedStep

MATRICES = {"*": nm.Route("normuon")}  # every parameter of a workload is meant as matrices

Shapes = list[tuple[int, int, int]]  # (matrices, rows, cols)

WORKLOADS: dict[str, Shapes] = {
    "gpt2": [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)],
    "1.3b": [(96, 2048, 2048), (24, 8192, 2048), (24, 2048, 8192)],
    "cpu": [(2, 768, 768), (1, 3072, 768)],  # GPT-2 with fewer layers
    "tiny": [(4, 64, 64), (2, 128, 64)],
}
GUARDS = ("off", "output", "full")
BLOCK = 5  # calls in a row
ROUNDS = 6
FIRST_CALLS = 0.6  # of the time that there is
HELD = 1.5  # seconds of a product, after which the clock does not fall any more


@dataclass
class Row:
    """One line of the table. ``times``: ms a call, a list for every round."""

    name: str
    times: list[list[float]] = field(default_factory=list)
    host_ms: float | None = None
    flop: float | None = None
    floor_ms: float | None = None
    held_floor_ms: float | None = None
    peak_gib: float | None = None
    first_s: float | None = None
    ratio: float | None = None  # against the first row of the workload
    spread: float | None = None  # of that ratio: half the distance of its quartiles
    error: str | None = None

    def quantile(self, q: float) -> float:
        """ms; NaN if nothing was measured."""
        times = sorted(t for block in self.times for t in block)
        return times[min(len(times) - 1, int(q * len(times)))] if times else math.nan

    @property
    def median(self) -> float:
        return (
            statistics.median(t for block in self.times for t in block) if self.times else math.nan
        )

    def as_json(self) -> dict[str, Any]:
        numbers = {"median": self.median, "p10": self.quantile(0.1), "p90": self.quantile(0.9)}
        return {
            **asdict(self),
            **{f"{name}_ms": None if math.isnan(x) else x for name, x in numbers.items()},
        }


class Device:
    """The device, its clock, and its own ceilings."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.cuda = self.device.type == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def block(self, call: Callable[[], Any], calls: int) -> list[float]:
        """ms of each of so many calls in a row; on CPU no more than fill 0.2 s."""
        if not self.cuda:
            times: list[float] = []
            while len(times) < calls and sum(times) < 200:
                times.append(1e3 * seconds(call))
            return times
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def warm_median(self, call: Callable[[], Any]) -> float:
        self.block(call, 3)
        return statistics.median(self.block(call, 20))

    def host_ms(self, call: Callable[[], Any], calls: int = 10) -> float | None:
        """What one call keeps the host busy; None on CPU, where that is all of it."""
        if not self.cuda:
            return None
        spent = []
        for _ in range(calls):
            self.sync()
            spent.append(1e3 * seconds(call))
        return statistics.median(spent)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else 0

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        source = torch.empty(
            2**30 if self.cuda else 2**25, dtype=torch.float32, device=self.device
        ).fill_(1.0)
        target = torch.empty_like(source)
        ms = self.warm_median(lambda: target.copy_(source))
        return 2 * source.numel() * 4 / ms * 1e3

    def flops(self, dtype: torch.dtype, held: bool = False) -> float:
        """FLOP a second of a large square product, at once or ``held`` under load.

        float16 counts as bfloat16: the same units.
        """
        return self._flops(torch.bfloat16 if dtype == torch.float16 else dtype, held)

    @functools.cache  # noqa: B019 - one object, for the life of the process
    def _flops(self, dtype: torch.dtype, held: bool) -> float:
        n = (8192 if dtype == torch.bfloat16 else 4096) if self.cuda else 1024
        a, b = (torch.randn(n, n, dtype=dtype, device=self.device) for _ in range(2))
        if held:
            start = time.perf_counter()
            while time.perf_counter() - start < HELD:
                ms = statistics.median(self.block(lambda: a @ b, 20))
        else:
            ms = self.warm_median(lambda: a @ b)
        return 2 * n**3 / ms * 1e3

    def __str__(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        name = platform.processor() or platform.machine()
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
            name = next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")),
                name,
            )
        return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def short(error: BaseException) -> str:
    """The first line of an error, fit for a cell."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:100]


# --- what the arithmetic asks for


def products(
    count: int, rows: int, cols: int, method: str, coefficients: list[Any], restarts: int
) -> list[tuple[float, float]]:
    """(FLOP, bytes) of every batched product of one stack in a 2-byte dtype.

    Symmetric results cost half.

    Standard: x x^T, (x x^T)^2, the product with x, at every step. Gram: x x^T and the product with
    x for every start, and on the small side up to four products a step. Together 15a + 5 and, with
    one restart, 6a + 14 times rows^3 FLOP for five steps.
    """
    n2, nm_ = rows * rows, rows * cols
    gram, square, wide = (
        (rows * nm_, 2 * (nm_ + n2)),
        (rows * n2, 4 * n2),
        (2 * rows * nm_, 2 * (n2 + 2 * nm_)),
    )
    mixed = (rows * n2, 6 * n2)  # of three different small matrices: two read, one written
    steps, squares = len(coefficients), sum(1 for row in coefficients if row[2])
    if method == "standard":
        found = [gram, wide] * steps + [square] * squares
    else:
        found = (
            [gram, wide] * (1 + restarts)
            + [square] * squares
            + [mixed, mixed, mixed] * (steps - 1 - restarts)
        )
    return [(count * flop, count * moved) for flop, moved in found]


def plan_products(plan: nm.Plan) -> list[tuple[torch.dtype, list[tuple[float, float]]]]:
    found = []
    for bucket in plan.buckets:
        count = sum(group.count for group in bucket.groups)
        form, rows = bucket.form, list(bucket.coefficients.rows)
        found.append(
            (
                form.dtype,
                products(count, bucket.rows, bucket.cols, form.method, rows, len(form.restarts)),
            )
        )
    return found


def floor_ms(
    device: Device,
    parts: list[tuple[torch.dtype, list[tuple[float, float]]]],
    passes: float = 0.0,
    held: bool = False,
) -> float:
    """``passes``: bytes moved besides the products."""
    total = passes / device.bandwidth
    for dtype, each in parts:
        scale = dtype.itemsize / 2
        total += sum(
            max(flop / device.flops(dtype, held), scale * moved / device.bandwidth)
            for flop, moved in each
        )
    return 1e3 * total


def total_flop(parts: list[tuple[torch.dtype, list[tuple[float, float]]]]) -> float:
    return sum(flop for _, each in parts for flop, _ in each)


def set_floor(
    row: Row,
    device: Device,
    parts: list[tuple[torch.dtype, list[tuple[float, float]]]],
    passes: float = 0.0,
) -> None:
    row.flop, row.floor_ms = total_flop(parts), floor_ms(device, parts, passes)
    if device.cuda:
        row.held_floor_ms = floor_ms(device, parts, passes, held=True)


def pass_bytes(params: dict[str, Tensor]) -> float:
    """26 B in float32: read g, read and write the momentum, write the update, read it twice, and
    read and write p.
    """
    return sum(p.numel() * (3 * p.element_size() + 8 + 6) for p in params.values())


# --- the rows


@dataclass
class Entry:
    """What is timed: ``call`` is one step; ``free`` lets go of what it holds."""

    row: Row
    call: Callable[[], Any]
    free: Callable[[], Any] = lambda: None


class Workload:
    """Parameters and gradients on the device, shared by all rows.

    On several ranks they are sharded or replicated.
    """

    def __init__(
        self,
        device: Device,
        shapes: Shapes,
        dtype: torch.dtype,
        mesh: DeviceMesh | None = None,
        layout: str = "",
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.base = device.allocated()
        sizes = [(rows, cols) for count, rows, cols in shapes for _ in range(count)]
        make = functools.partial(torch.randn, dtype=dtype, device=device.device)
        self.ranks = 1 if mesh is None else mesh.size()
        self.mesh = mesh if layout == "ddp" else None

        def lie(x: Tensor) -> Tensor:
            return (
                distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
                if layout == "fsdp2"
                else x
            )

        self.params = {
            f"layers.{k}.weight": lie(make(size).mul_(0.02)) for k, size in enumerate(sizes)
        }
        self.grads = {name: lie(make(p.shape).mul_(1e-3)) for name, p in self.params.items()}
        self.here = {
            name: p.to_local() if isinstance(p, DTensor) else p for name, p in self.params.items()
        }

    def changed(self, call: Callable[[], Any]) -> None:
        """One call. Raises if its update is not finite, or left a parameter as it was."""
        before = {
            name: p[:8].clone() for name, p in self.here.items()
        }  # some rows: all of them would cost their memory again
        call()
        bad = [name for name, p in self.here.items() if not bool(p.isfinite().all())]
        still = [name for name, p in self.here.items() if torch.equal(p[:8], before[name])]
        if bad or still:
            raise RuntimeError(f"not finite: {bad[:3]}; unchanged: {still[:3]}")

    def ours(self, guard: str, graph: bool, row: Row, momentum: str = "") -> Entry:
        device = self.device
        device.clear()
        before = device.allocated()
        dtype = getattr(torch, momentum) if momentum else None
        config = nm.Config(guard=guard, momentum_dtype=dtype)  # type: ignore[arg-type]
        plan = nm.make_plan(self.params, config, routes=MATRICES, mesh=self.mesh)
        state, hyper = nm.init(self.params, plan), nm.Hyper.of(self.params, lr=1e-4)
        own = sum(
            torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in plan.state.values()
        )
        graphed = GraphedStep(plan) if graph else None
        run = graphed if graphed is not None else functools.partial(nm.step_, plan=plan)
        call = functools.partial(run, self.params, self.grads, state, hyper)
        self.changed(call)
        for _ in range(2):
            call()
        device.sync()
        if device.cuda:
            row.peak_gib = (device.peak() - before - own) / 2**30
        row.host_ms = device.host_ms(call)
        parts = [
            (dtype, [(f / self.ranks, b / self.ranks) for f, b in each])
            for dtype, each in plan_products(plan)
        ]
        set_floor(row, device, parts, pass_bytes(self.here))
        return Entry(row, call, graphed.release if graphed is not None else lambda: None)

    def peer(
        self, build: Callable[[list[Tensor]], torch.optim.Optimizer], row: Row, graph: bool = False
    ) -> Entry:
        """``graph``: its step captured in a CUDA graph, with the rates of that step."""
        self.device.clear()
        leaves = []
        for name, p in self.params.items():
            leaf = torch.nn.Parameter(p)  # the same memory
            leaf.grad = self.grads[name]
            leaves.append(leaf)
        before = self.device.allocated()
        optimizer = build(leaves)
        self.changed(optimizer.step)
        optimizer.step()
        self.device.sync()
        if self.device.cuda:
            own = sum(
                x.numel() * x.element_size()
                for s in optimizer.state.values()
                for x in tensors_of(s)
            )
            row.peak_gib = (self.device.peak() - before - own) / 2**30
        call: Callable[[], Any] = optimizer.step
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                optimizer.step()
            call = captured.replay
            self.changed(call)
        row.host_ms = self.device.host_ms(call)
        return Entry(row, call, optimizer.state.clear)


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [x for x in state.values() if isinstance(x, Tensor)]


def dion(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return importlib.import_module("dion").NorMuon(params, lr=1e-4, weight_decay=0.0, **options)


def emerging(params: list[Tensor]) -> torch.optim.Optimizer:
    made = importlib.import_module("emerging_optimizers.orthogonalized_optimizers").AdaptiveMuon
    return made(params, 1e-4, 0.95, 0.0, moment2_method="normuon")


def fused_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)


def torch_muon(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=1e-4, weight_decay=0.0)


PEERS: dict[
    str, tuple[str, Callable[[list[Tensor]], torch.optim.Optimizer]]
] = {  # the module it comes from
    "torch AdamW fused": ("torch", fused_adamw),
    "torch Muon": ("torch", torch_muon),
    "dion NorMuon": ("dion", dion),
    "dion NorMuon Triton": ("dion", functools.partial(dion, use_triton=True)),
    # with the kernels of quack, which gram-newton-schulz takes where it can be imported
    "dion NorMuon Gram": ("dion", functools.partial(dion, use_gram_newton_schulz=True)),
    "Emerging-Optimizers normuon": ("emerging_optimizers", emerging),
}

CAPTURED = ("dion NorMuon Triton", "dion NorMuon Gram")


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a broken installation is no installation
        return False
    return True


@dataclass
class Options:
    dtype: torch.dtype = torch.float32
    guards: tuple[str, ...] = GUARDS
    momentums: tuple[str, ...] = ()  # dtypes, of rows of their own
    graph: bool = True
    peers: bool = True
    first_step: bool = True
    only: tuple[str, ...] = ()
    rounds: int = ROUNDS
    mesh: DeviceMesh | None = None
    layout: str = ""
    until: float = math.inf  # of time.monotonic(); what does not fit is left out, and said


def rows_of(device: Device, spec: str, options: Options) -> list[Row]:
    """All rows of one workload, measured. What fails is a row with its error."""
    wanted: dict[str, Callable[[Workload, Row], Entry]] = {}
    for guard in options.guards:
        if options.graph:
            wanted[f"normuon_fn graph, guard {guard}"] = functools.partial(
                Workload.ours, guard=guard, graph=True
            )
    for guard in options.guards[:1] if options.graph else options.guards:
        wanted[f"normuon_fn step_, guard {guard}"] = functools.partial(
            Workload.ours, guard=guard, graph=False
        )
    for momentum in options.momentums:
        wanted[f"normuon_fn momentum {momentum}"] = functools.partial(
            Workload.ours, guard=options.guards[0], graph=options.graph, momentum=momentum
        )
    if options.peers:
        for name, (module, build) in PEERS.items():
            if importable(module):
                wanted[name] = functools.partial(Workload.peer, build=build)
            if importable(module) and options.graph and name in CAPTURED:
                peer = functools.partial(Workload.peer, build=build, graph=True)
                wanted[f"{name}, captured"] = peer
    if options.only:
        wanted = {
            name: make
            for name, make in wanted.items()
            if any(part.lower() in name.lower() for part in options.only)
        }
    rows = {name: Row(name) for name in wanted}

    if options.first_step:
        row = next((row for name, row in rows.items() if name.startswith("normuon_fn step_")), None)
        if row is not None:  # the first call of a GraphedStep is that of step_
            with reported(row):
                row.first_s = first_step_seconds(device, spec, options.dtype, row.name.split()[-1])
    try:
        measure(device, spec, options, wanted, rows)
    except Exception as error:  # no room for the workload itself
        for row in rows.values():
            row.error = row.error or short(error)
    device.clear()
    return list(rows.values())


def measure(
    device: Device,
    spec: str,
    options: Options,
    wanted: dict[str, Callable[[Workload, Row], Entry]],
    rows: dict[str, Row],
) -> None:
    workload = Workload(device, shapes_of(spec), options.dtype, options.mesh, options.layout)
    entries: list[Entry] = []
    started = time.monotonic()
    for name, make in tqdm(wanted.items(), desc=f"{spec}: first calls", disable=None):
        with reported(rows[name]):
            before = time.monotonic()
            if before - started > FIRST_CALLS * (options.until - started):
                raise TimeoutError("left out: the time was over")
            entries.append(make(workload, row=rows[name]))  # type: ignore[call-arg]
            took = time.monotonic() - before
            print(f"{spec}, {name}: first calls in {took:.1f} s", file=sys.stderr, flush=True)
    interleave(device, entries, options, spec, next(iter(rows.values()), None))
    for entry in entries:
        with reported(entry.row):
            entry.free()


@contextlib.contextmanager
def reported(row: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        row.error = row.error or short(error)


def interleave(
    device: Device, entries: list[Entry], options: Options, what: str, base: Row | None
) -> None:
    """Blocks of calls in turn, forwards and backwards, in as many rounds as there is time for.

    Then every row's ratio to ``base``, if that was measured.
    """
    for k in tqdm(range(options.rounds), desc=f"{what}: rounds", disable=None):
        if k and time.monotonic() > options.until:
            break
        for entry in entries[:: 1 if k % 2 == 0 else -1]:
            if entry.row.error is None:
                with reported(entry.row):
                    entry.row.times.append(device.block(entry.call, BLOCK))
    for entry in entries:
        if base is not None and len(base.times) == len(entry.row.times) > 0:
            entry.row.ratio, entry.row.spread = ratio(entry.row, base)


def ratio(row: Row, base: Row) -> tuple[float, float]:
    """The median over rounds of block median against block median; half the quartiles' distance."""
    each = sorted(
        statistics.median(a) / statistics.median(b)
        for a, b in zip(row.times, base.times, strict=True)
    )
    return statistics.median(each), (each[(3 * len(each)) // 4] - each[len(each) // 4]) / 2


def first_step_seconds(device: Device, spec: str, dtype: torch.dtype, guard: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        command = [
            sys.executable,
            __file__,
            "--part-first-step",
            "--workload",
            spec,
            "--device",
            str(device.device),
        ]
        command += ["--dtype", str(dtype).removeprefix("torch."), "--guard", guard]
        done = subprocess.run(
            command, env={**os.environ, **caches}, capture_output=True, text=True, timeout=300
        )
    if done.returncode:
        raised = [
            line
            for line in done.stderr.splitlines()
            if re.match(r"[\w.]+(Error|Exception)\b", line)
        ]
        raise RuntimeError("first step: " + (raised or ["failed"])[-1])
    return float(done.stdout.splitlines()[-1])


def first_step(device: Device, spec: str, options: Options) -> float:
    workload = Workload(device, shapes_of(spec), options.dtype)
    config = nm.Config(guard=options.guards[0])  # type: ignore[arg-type]
    plan = nm.make_plan(workload.params, config, routes=MATRICES)
    state, hyper = nm.init(workload.params, plan), nm.Hyper.of(workload.params, lr=1e-4)
    device.sync()

    def call() -> None:
        nm.step_(workload.params, workload.grads, state, hyper, plan)
        device.sync()

    return seconds(call)


def orthogonalize_rows(
    device: Device, spec: str, dtype: torch.dtype, options: Options
) -> list[Row]:
    """`orthogonalize` on one stack: compiled, and as it is called eagerly."""
    ((count, rows, cols),) = shapes_of(spec)
    compiled = torch.compile(nm.orthogonalize, fullgraph=True, dynamic=False)
    entries, found = [], []
    torch.manual_seed(0)
    x = torch.randn(count, rows, cols, dtype=dtype, device=device.device)
    plan = nm.make_plan({"x": x}, routes=MATRICES)
    for how, function in (("compiled", compiled), ("eager", nm.orthogonalize)):
        row = Row(f"orthogonalize {spec} {how}")
        found.append(row)
        if options.only and not any(part.lower() in row.name.lower() for part in options.only):
            found.pop()
            continue
        with reported(row):
            device.clear()
            before = device.allocated()
            for _ in range(3):
                if not bool(function(x).isfinite().all()):
                    raise RuntimeError("not finite")
            row.peak_gib = (device.peak() - before) / 2**30 if device.cuda else None
            row.host_ms = device.host_ms(functools.partial(function, x))
            parts = plan_products(plan)
            set_floor(row, device, parts)
            entries.append(Entry(row, functools.partial(function, x)))
    interleave(device, entries, options, f"orthogonalize {spec}", found[0] if found else None)
    del x, plan
    device.clear()
    return found


def guarded(spec: str, make: Callable[[], list[Row]]) -> list[Row]:
    try:
        return make()
    except Exception as error:
        return [Row(spec, error=short(error))]


# --- what is printed


def table(rows: list[Row], markdown: bool = False) -> str:
    cells = [
        (
            "row",
            "median ms",
            "p10",
            "p90",
            "x first",
            "TFLOP/s",
            "floor ms",
            "share",
            "held",
            "host ms",
            "peak GiB",
            "first s",
        )
    ]
    for row in rows:
        rated = (
            f"{row.ratio:.4f} ±{row.spread:.4f}"
            if row.ratio is not None and row.spread is not None
            else "-"
        )
        speed = None if row.flop is None else row.flop / row.median * 1e-9
        shares = [percent(floor, row.median) for floor in (row.floor_ms, row.held_floor_ms)]
        cells.append(
            (
                row.name,
                number(row.median, 3) if row.times or not row.error else "failed",
                *(number(row.quantile(q), 3) for q in (0.1, 0.9)),
                rated,
                number(speed, 1),
                number(row.floor_ms, 2),
                *shares,
                number(row.host_ms, 3),
                number(row.peak_gib, 2),
                number(row.first_s, 1),
            )
        )
    failed = [f"- {row.name}: {row.error}" for row in rows if row.error]
    return "\n".join([render(cells, markdown), *([""] if failed else []), *failed])


def number(x: float | None, digits: int) -> str:
    return "-" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def percent(floor: float | None, ms: float) -> str:
    share = number(None if floor is None else 100 * floor / ms, 0)
    return share if share == "-" else f"{share} %"


def render(cells: list[tuple[str, ...]], markdown: bool) -> str:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def environment(device: Device) -> dict[str, Any]:
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    found = {
        "device": str(device),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "normuon_fn": nm.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda if device.cuda else None,
        "python": platform.python_version(),
        "copy": f"{device.bandwidth * 1e-9:.0f} GB/s",
    }
    for dtype in (torch.bfloat16, torch.float32):
        if device.cuda or dtype == torch.float32:
            rate = f"{device.flops(dtype) * 1e-12:.3g} TFLOP/s"
            if device.cuda:
                rate += f" (held {device.flops(dtype, True) * 1e-12:.3g})"
            found[str(dtype).removeprefix("torch.")] = rate
    device.clear()
    return {name: value for name, value in found.items() if value is not None}


def plot(results: dict[str, list[Row]], header: dict[str, Any], file: str) -> None:
    """A bar a row, 10th to 90th percentile as a whisker, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: [r for r in rows if r.times] for name, rows in results.items()}
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return
    heights = [0.6 + 0.35 * len(rows) for rows in shown.values()]
    figure, all_axes = plt.subplots(
        len(shown),
        1,
        figsize=(9, 0.8 + sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, rows) in zip(all_axes[:, 0], shown.items(), strict=True):
        medians = [row.median for row in rows]
        spread = [
            [r.median - r.quantile(0.1) for r in rows],
            [r.quantile(0.9) - r.median for r in rows],
        ]
        colors = [
            "tab:blue"
            if "normuon_fn" in r.name or r.name.startswith("orthogonalize")
            else "tab:gray"
            for r in rows
        ]
        names = [r.name for r in rows]
        axes.barh(names, medians, xerr=spread, color=colors, error_kw={"linewidth": 1})
        for k, row in enumerate(rows):
            axes.text(row.quantile(0.9), k, f"  {row.median:.3g}", va="center")
        floors = [r.floor_ms for r in rows if r.floor_ms is not None]
        if floors:
            axes.axvline(floors[0], color="tab:red", linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        dashed = f"; dashed: the floor, {floors[0]:.3g} ms" if floors else ""
        axes.set(title=name, xlabel=f"ms a step{dashed}")
    figure.suptitle(f"{header['device']}, torch {header['torch']}, {header['date']}")
    figure.savefig(file, dpi=120)
    plt.close(figure)


# --- the bars


@dataclass
class Bar:
    name: str
    unit: str
    must: float
    aim: float | None
    measured: float | None
    note: str = ""
    at_least: bool = False
    counts: bool = True  # False: another workload than the bar's

    def cells(self) -> tuple[str, ...]:
        sign = "≥" if self.at_least else "≤"
        got = "-" if self.measured is None else f"{self.measured:.3g} {self.unit}".strip()
        aim = "" if self.aim is None else f"{sign} {self.aim:g}"
        return (self.name, got, f"{sign} {self.must:g}", aim, self._met(), self.note)

    def _met(self) -> str:
        if self.measured is None or not self.counts:
            return "not measured" if self.measured is None else "does not count"
        for limit, word in ((self.aim, "aim"), (self.must, "must")):
            if limit is not None and (
                self.measured >= limit if self.at_least else self.measured <= limit
            ):
                return word
        return "missed"


def find(rows: list[Row], part: str) -> Row:
    """The row, or an empty one that says it is missing."""
    return next((row for row in rows if part in row.name), Row(part, error="not measured"))


def value(row: Row, what: str) -> tuple[float | None, str]:
    """A number of a row, and the note beside it."""
    got = {"percent": None if row.ratio is None else 100 * (row.ratio - 1)}.get(
        what, getattr(row, what, None)
    )
    got = None if got is None or math.isnan(got) else got
    note = "" if got is not None else row.error or "not measured"
    if got is not None and what == "percent" and row.spread is not None:
        note = f"± {100 * row.spread:.2g} %"
    if got is not None and what == "median" and row.floor_ms is not None:
        note = f"floor here {row.floor_ms:.3g}, {percent(row.floor_ms, row.median)}"
        if row.held_floor_ms is not None:
            note += f"; at the clock held under load {percent(row.held_floor_ms, row.median)}"
    return got, note


def bars(
    device: Device, tiny: bool, rounds: int, until: float
) -> tuple[list[Bar], dict[str, list[Row]]]:
    """Everything that the project's bars name, in this process (the first step in its own).

    ``until``: of the time that there is, the small workload gets two fifths.
    """
    now = time.monotonic()
    until_small = until if math.isinf(until) else now + 0.4 * (until - now)
    small, large = ("tiny", "tiny") if tiny else ("gpt2", "1.3b")
    squares, wides = ("2x64x64", "2x64x256") if tiny else ("96x2048x2048", "48x2048x8192")
    found: list[Bar] = []
    results: dict[str, list[Row]] = {}
    graph = device.cuda
    if device.cuda or tiny:
        fast = Options(guards=("off",), graph=graph, rounds=rounds, until=until_small)
        results[f"{small} fp32"] = one = guarded(small, lambda: rows_of(device, small, fast))
        every = Options(graph=graph, rounds=rounds, first_step=False, until=until)
        results[f"{large} fp32"] = two = guarded(large, lambda: rows_of(device, large, every))
        alone = Options(rounds=rounds)
        for spec in (squares, wides):  # bfloat16, as peers hand it on
            results[f"orthogonalize {spec} bf16"] = guarded(
                spec, lambda spec=spec: orthogonalize_rows(device, spec, torch.bfloat16, alone)
            )
        form = "graph" if graph else "step_"
        a, b = find(one, f"{form}, guard off"), find(two, f"{form}, guard off")
        eager, full = find(two, "step_, guard off"), find(two, f"{form}, guard full")
        listed = [
            (f"{small}, fp32", "ms", 2.8, 2.5, a, "median"),
            (f"{large}, fp32", "ms", 64, 58, b, "median"),
            (
                f'guard "output" on / off at {large}',
                "%",
                1,
                0,
                find(two, f"{form}, guard output"),
                "percent",
            ),
            (
                f'guard "full" on / off at {large}',
                "%",
                1.5,
                0.5,
                full,
                "percent",
            ),
            (f"peak memory over params + grads + state at {large}", "GiB", 3.0, 2.3, b, "peak_gib"),
            (
                f'peak memory over params + grads + state at {large}, guard "full"',
                "GiB",
                3.5,
                2.6,
                full,
                "peak_gib",
            ),
            (f"host time of a replayed step, {large}", "ms", 0.1, None, b, "host_ms"),
            (f"host time of step_ without a graph, {large}", "ms", 3, 1, eager, "host_ms"),
            (
                f"first step, empty caches, {small}",
                "s",
                12,
                8,
                find(one, "step_, guard off"),
                "first_s",
            ),
            (
                f"orthogonalize alone, {squares} bf16",
                "ms",
                28,
                25,
                results[f"orthogonalize {squares} bf16"][0],
                "median",
            ),
            (
                f"orthogonalize alone, {wides} bf16",
                "ms",
                28,
                25,
                results[f"orthogonalize {wides} bf16"][0],
                "median",
            ),
        ]
        for name, unit, must, aim, row, what in listed:
            got, note = value(row, what)
            found.append(Bar(name, unit, must, aim, got, note, counts=not tiny))
    if not device.cuda:
        spec = "tiny" if tiny else "cpu"
        pair = Options(
            guards=("off",),
            graph=False,
            rounds=rounds,
            first_step=False,
            only=("step_", "torch Muon"),
        )
        for dtype in (torch.float32, torch.bfloat16):
            given = Options(**{**vars(pair), "dtype": dtype})
            key = f"{spec} {str(dtype).removeprefix('torch.')}"
            results[key] = guarded(spec, lambda given=given: rows_of(device, spec, given))
            muon = find(results[key], "torch Muon")
            got, note = value(muon, "ratio")
            note = note or f"± {muon.spread:.2g}"
            found.append(
                Bar(
                    f"torch Muon / step_, {key}",
                    "x",
                    1.3,
                    None,
                    got,
                    note,
                    at_least=True,
                    counts=not tiny,
                )
            )
    return found, results


def bars_table(found: list[Bar], results: dict[str, list[Row]], header: dict[str, Any]) -> str:
    head = ("bar", "measured", "must", "aim", "met", "note")
    parts = [
        ", ".join(f"{name} {text}" for name, text in header.items()),
        render([head, *(bar.cells() for bar in found)], True),
    ]
    for name, rows in results.items():
        parts += [f"### {name}", table(rows, markdown=True)]
    return "\n\n".join(parts)


# --- the command


RANDOM_SHAPES, RANDOM_ENTRIES = 8, 6e8  # 6e8: 2.2 GiB in float32


def random_shapes(seed: int) -> Shapes:
    """Eight shapes that nobody chose, the same for the same seed.

    The shorter side is between 256 and 14336, evenly by its logarithm, and a multiple of 8; the
    longer one is up to 8 times as long, and no longer than 14336. Of each there are 1 to 96, but of
    large ones no more than have 75 million entries together, or one.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(RANDOM_SHAPES):
        short = 8 * round(256 * 56 ** rng.random() / 8)
        long = 8 * round(min(14336.0, short * 8 ** rng.random()) / 8)
        sides = (short, long) if rng.random() < 0.5 else (long, short)
        most = max(1, min(96, int(RANDOM_ENTRIES / RANDOM_SHAPES / (short * long))))
        found.append((rng.randint(1, most), *sides))
    return found


def shapes_of(spec: str) -> Shapes:
    """A name of `WORKLOADS`, random:SEED, or 12x768x768,4x3072x768."""
    if spec in WORKLOADS:
        return WORKLOADS[spec]
    kind, _, seed = spec.partition(":")
    if kind == "random" and seed.isdecimal():
        return random_shapes(int(seed))
    try:
        found = [tuple(map(int, part.split("x"))) for part in spec.split(",")]
    except ValueError:
        found = []
    if not found or any(len(part) != 3 or min(part) < 1 for part in found):
        raise argparse.ArgumentTypeError(
            f"expected one of {sorted(WORKLOADS)}, random:SEED or COUNTxROWSxCOLS,..., got {spec!r}"
        )
    return found  # type: ignore[return-value]


def workload_name(spec: str) -> str:
    shapes_of(spec)
    return spec


def guards_of(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(GUARDS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(GUARDS)}, got {text!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    toggle = argparse.BooleanOptionalAction
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--workload",
        type=workload_name,
        default="gpt2" if cuda else "cpu",
        help="gpt2, 1.3b, tiny, random:SEED or NxRxC,...",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--guard",
        type=guards_of,
        default=GUARDS,
        help="some of off,output,full; the first is the base",
    )
    parser.add_argument(
        "--graph", action=toggle, default=True, help="capture the step in a CUDA graph (CUDA only)"
    )
    parser.add_argument("--peers", action=toggle, default=True)
    parser.add_argument(
        "--orthogonalize",
        action=toggle,
        default=None,
        help="orthogonalize alone too; with 1.3b by default",
    )
    parser.add_argument(
        "--first-step",
        action=toggle,
        default=True,
        help="measure it, in a process with empty caches",
    )
    parser.add_argument(
        "--momentum-dtype",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="a row for each: float32, bfloat16, int8",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"blocks of {BLOCK} calls a row")
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="rows whose name holds one of these",
    )
    parser.add_argument(
        "--layout", choices=["ddp", "fsdp2"], help="on the ranks of torchrun: our rows alone"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="leave out the last rows that do not fit"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="a bar chart")
    parser.add_argument(
        "--bars",
        action="store_true",
        help="the project's bars, in Markdown; about 5 minutes on an H100",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="with --bars: its course on tiny matrices, as a test"
    )
    parser.add_argument(
        "--part-first-step", action="store_true", help=argparse.SUPPRESS
    )  # in a process of its own
    args = parser.parse_args()
    if args.layout and "RANK" not in os.environ:
        parser.error("--layout is for torchrun")
    rank = int(os.environ.get("RANK", 0)) if args.layout else 0
    device = Device(
        f"cuda:{os.environ['LOCAL_RANK']}" if args.layout and args.device == "cuda" else args.device
    )
    dtype = getattr(torch, args.dtype)
    options = Options(
        dtype,
        args.guard,
        args.momentum_dtype,
        args.graph and device.cuda,
        args.peers,
        args.first_step,
        args.only,
        max(1, args.rounds),
        until=time.monotonic() + args.seconds,
    )
    if args.layout:
        if device.cuda:
            torch.cuda.set_device(device.device)
        dist.init_process_group(
            "nccl" if device.cuda else "gloo", device_id=device.device if device.cuda else None
        )
        mesh = init_device_mesh(device.device.type, (dist.get_world_size(),))
        options = replace(options, peers=False, first_step=False, mesh=mesh, layout=args.layout)
        args.orthogonalize = False
    if args.part_first_step:
        print(first_step(device, args.workload, options))
        return

    header = environment(device)
    if args.layout:
        header |= {"ranks": str(dist.get_world_size()), "layout": args.layout}
    found: list[Bar] = []
    if args.bars:
        found, results = bars(device, args.tiny, options.rounds, options.until)
    else:
        results = {
            f"{args.workload} {args.dtype}": guarded(
                args.workload, lambda: rows_of(device, args.workload, options)
            )
        }
        alone = args.workload == "1.3b" if args.orthogonalize is None else args.orthogonalize
        for spec in (
            ("96x2048x2048", "48x2048x8192") if device.cuda else ("2x256x256", "1x256x1024")
        ):
            if alone:
                key = f"orthogonalize {spec} {args.dtype}"
                results[key] = guarded(
                    spec, lambda spec=spec: orthogonalize_rows(device, spec, dtype, options)
                )
    if options.mesh is not None:
        dist.destroy_process_group()
    if rank:
        return
    if args.json:
        listed = {name: [row.as_json() for row in rows] for name, rows in results.items()}
        print(
            json.dumps(
                {"environment": header, "bars": [asdict(bar) for bar in found], "results": listed},
                indent=2,
            )
        )
    elif args.bars:
        print(bars_table(found, results, header))
    else:
        print(", ".join(f"{name} {text}" for name, text in header.items()))
        for name, rows in results.items():
            print(f"\n{name}\n{table(rows)}")
    if args.plot:
        plot(results, header, args.plot)


if __name__ == "__main__":
    main()
