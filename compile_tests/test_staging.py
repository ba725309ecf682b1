"""Momentums in host memory: the operators that move them, in which order a graph has them, and
that on the streams of a GPU nobody reads or writes what somebody else has not finished with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.ops import staging
from normuon_fn.ops.staging import Ring, Transfers
from normuon_fn.planning import chunks, streaming

CPU = torch.device("cpu")


# --- the operators


def lists() -> tuple[list[Tensor], list[Tensor]]:
    host = [torch.randn(4, 6), torch.randn(3, 4, 6).to(torch.bfloat16)]
    return host, [x + 1 for x in host]


@pytest.mark.parametrize("name", ["stage_in", "stage_out_", "stage_like"])
def test_opcheck_passes(name: str) -> None:
    host, staged = lists()
    given: Any = {"stage_in": (host, CPU), "stage_out_": (host, staged), "stage_like": (host,)}
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "stage_like":  # its result has no values yet, which could be compared
        tests.append("test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.normuon_fn, name).default
    outcome = torch.library.opcheck(operator, given[name], test_utils=tests)
    assert set(outcome.values()) == {"SUCCESS"}


def test_a_list_that_came_and_left_is_what_was_written_on_the_device() -> None:
    host, new = lists()
    staged = staging.start(host, CPU, 0)
    assert all(map(torch.equal, staged, host))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(staged, host, strict=True))
    staging.leave(host, new, 0)
    assert all(map(torch.equal, host, new))


def test_tensors_of_a_slot_are_aligned_apart_and_found_again() -> None:
    host, _ = lists()
    ring = Ring(2, sum(staging.slot_bytes(x.shape, x.itemsize) for x in host), CPU)
    slots = [ring.staged(slot, "same", host) for slot in (0, 1)]
    assert ring.staged(1, "same", host) is slots[1]
    flat = [x for slot in slots for x in slot]
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in flat)
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    start = flat[0].data_ptr()
    assert all((x.data_ptr() - start) % staging.ALIGNED == 0 for x in flat)


# --- the order of a graph


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix [8, 8] a piece, three slots, two matrices a stack."""
    monkeypatch.setattr(streaming, "PIECE", 256)
    monkeypatch.setattr(streaming, "RING", 3 * 256)
    monkeypatch.setattr(streaming, "_SHARE", 1)
    monkeypatch.setattr("normuon_fn.planning.buckets.CHUNK", 2 * 8 * 8 * 4)


def targets(guard: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The operators of a step over six matrices in order, by name, and their slot if they have."""
    assert chunks.CHUNK  # the constant that `small` makes smaller where it is used
    small(monkeypatch)
    params = {f"w{k}": torch.randn(8, 8) for k in range(6)}
    config: Any = {"method": "standard", "steps": 1, "orthogonalize_dtype": torch.float32}
    plan = nm.make_plan(
        params, nm.Config(state_device="cpu", guard=guard, **config), routes={"*": nm.Route()}
    )  # type: ignore[arg-type]
    with graphs.recording(monkeypatch) as found:
        nm.step_(params, params, nm.init(params, plan), nm.Hyper.of(params, lr=0.1), plan)
    (graph,) = found
    named = []
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        given = [x for x in node.args if isinstance(x, int)] + [node.kwargs.get("slot", -1)]
        op = str(node.target)
        if op == "auto_functionalized_v2":
            name, given = str(node.args[0]), [node.kwargs.get("slot", -1)]
        named.append((name.replace("normuon_fn.", "").removesuffix(".default"), given[0]))
    return named


@pytest.mark.parametrize("guard", ["off", "full"])
def test_pieces_arrive_and_leave_under_the_products_of_others(
    guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"stage_start_by_handle": "start", "stage_arrived_by_handle": "arrived"}
    short |= {"stage_leave_by_handle": "leave", "stage_join_by_handle": "join"}
    order = [
        f"{short[name]} {slot}" if name in short else "products"
        for name, slot in targets(guard, monkeypatch)
        if name in short or name.startswith(("baddbmm", "aten.baddbmm"))
    ]
    seen = [x for k, x in enumerate(order) if k == 0 or x != "products" or order[k - 1] != x]
    assert [x.removesuffix(" -1") for x in seen] == [
        "start 0", "start 1", "start 2", "arrived 0", "leave 0",
        "start 0", "arrived 1", "leave 1", "products",
        "start 1", "arrived 2", "leave 2", "start 2", "arrived 0", "leave 0", "products",
        "arrived 1", "leave 1", "arrived 2", "leave 2", "products",
        "join",
    ]  # fmt: skip


# --- the streams of a GPU: nobody meets what somebody else has not finished with


class Stream:
    """What a stream has before its next work: its own work, and what it waited for."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, set[int]()

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: frozenset[int]) -> None:
        self.seen |= event

    def record_event(self) -> frozenset[int]:
        return frozenset(self.seen)


class Device:
    """Streams in the place of CUDA's, which remember who reads and writes which memory.

    Only copies of the ring are seen; `compute` stands for what a step does with a piece.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, captures: bool) -> None:
        self.current, self.copying = Stream("current"), Stream("none")
        self.side = Stream("into"), Stream("out")
        self.count = 0
        self.written: dict[int, int] = {}  # by address: the last work that wrote it
        self.read: dict[int, set[int]] = {}  # and what has read that
        monkeypatch.setattr(staging, "_copy", self.copy)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.copying = stream
        yield

    def work(self, stream: Stream, reads: list[Tensor], writes: list[Tensor]) -> None:
        self.count += 1
        for x in [*reads, *writes]:
            assert {self.written.get(x.data_ptr(), 0)} - {0} <= stream.seen, "reads what is missing"
        for x in writes:
            assert self.read.pop(x.data_ptr(), set()) <= stream.seen, "writes what is still read"
            self.written[x.data_ptr()] = self.count
        for x in reads:
            self.read.setdefault(x.data_ptr(), set()).add(self.count)
        stream.seen.add(self.count)

    def copy(self, into: list[Tensor], source: list[Tensor]) -> None:
        for a, b in zip(into, source, strict=True):
            a.copy_(b)
        self.work(self.copying, list(source), list(into))

    def compute(self, staged: list[Tensor]) -> None:
        self.work(self.current, staged, staged)


def steps(device: Device, ring: Ring, host: list[list[Tensor]]) -> None:
    """Three steps over all pieces, in the order in which a conveyor has them."""
    for _ in range(3):
        transfers, staged = Transfers(ring), list[list[Tensor]]()
        for k, piece in enumerate(host):
            for n in range(len(staged), min(k + ring.slots, len(host))):
                staged.append(transfers.start(n % ring.slots, "", host[n]))
            transfers.wait(k % ring.slots)
            device.compute(staged[k])
            transfers.leave(k % ring.slots, piece, staged[k])
        transfers.join()
        device.work(device.current, [x for piece in host for x in piece], [])  # the caller


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_no_stream_reads_or_writes_what_another_is_not_done_with(
    slots: int, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, captures=captures)
    host = [[torch.randn(4, 6)] for _ in range(5)]
    ring = Ring(slots, 256, CPU)
    ring.staged(0, "", host[0])  # the memory, and no streams on a CPU
    ring.streams = device.side  # type: ignore[assignment]
    steps(device, ring, host)
    waits = [stream.seen for stream in (device.current, *device.side)]
    assert waits[0] == waits[0] | waits[1] | waits[2]  # a capture ends where it began


@pytest.mark.parametrize("left_out", ["wait", "join", "left", "begun"])
def test_the_streams_of_a_test_notice_a_wait_that_is_left_out(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, captures=True)
    host = [[torch.randn(4, 6)] for _ in range(5)]
    ring = Ring(2, 256, CPU)
    ring.staged(0, "", host[0])
    ring.streams = device.side  # type: ignore[assignment]
    if left_out in ("wait", "join"):
        monkeypatch.setattr(Transfers, left_out, lambda self, slot=0: None)
    elif left_out == "left":
        monkeypatch.setattr(device.side[0], "wait_event", lambda event: None)
    else:
        monkeypatch.setattr(device.side[0], "wait_stream", lambda other: None)
    with pytest.raises(AssertionError, match=r"reads what is missing|writes what is still read"):
        steps(device, ring, host)
