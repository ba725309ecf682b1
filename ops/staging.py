"""Lists in host memory, which are on the device only while a step works on them.

    start    host -> a slot of the ring, on a stream of its own
    arrived  the current stream waits for that
    leave    a slot -> host, on another stream, after the current stream's work so far
    join     the current stream waits for all copies

A ring of a few slots serves any number of lists, one after the other: a list may `start` once the
list before it in its slot has been told to `leave`. The addresses never change, so a CUDA graph can
capture all of it; both streams begin after the current one and end before it.

In a graph whose lists are inside (the caller's own), and without a graph, nothing is ahead of time:
the copies are on the current stream, and the host waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .handles import Handle, Table, current_table, is_handle
from .registration import count_write, define, empty_like

ALIGNED = 256  # bytes: as the allocators of CUDA align


def slot_bytes(shape: Sequence[int], itemsize: int) -> int:
    """What a tensor takes of a slot."""
    return max(1, -(-prod(shape) * itemsize // ALIGNED)) * ALIGNED


# -------------------------------------------------------------------------------------- the memory


class Ring:
    """Memory on the device, in slots, and two streams. It lives as long as its plan."""

    def __init__(self, slots: int, size: int, device: torch.device) -> None:
        self.slots, self.size, self.device = slots, size, device
        self._memory: Tensor | None = None  # once it is used
        self._lists: dict[tuple[int, str], list[Tensor]] = {}
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def staged(self, slot: int, text: str, host: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous tensors in a slot that look like these. The same text gives the same list."""
        found = self._lists.get((slot, text))
        if found is None:
            found = self._lists[slot, text] = self._cut(slot, host)
        return found

    @torch.inference_mode(False)
    def _cut(self, slot: int, host: Sequence[Tensor]) -> list[Tensor]:
        if self._memory is None:
            self._memory = torch.empty(
                (self.slots, self.size), dtype=torch.uint8, device=self.device
            )
            if self.device.type == "cuda":
                self.streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        found, at = [], 0
        for x in host:
            part = self._memory[slot, at : at + x.nbytes]
            found.append(part.view(x.dtype).view(x.shape))
            at += slot_bytes(x.shape, x.itemsize)
        return found


class Transfers:
    """The copies of one run of a graph through a ring."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.arrived: dict[int, torch.cuda.Event] = {}  # by slot, of the last list that started
        self.left: dict[int, torch.cuda.Event] = {}  # by slot, of the last list that left
        self.begun = False

    def start(self, slot: int, text: str, host: Sequence[Tensor]) -> list[Tensor]:
        staged = self.ring.staged(slot, text, host)
        if self.ring.streams is None:
            _copy(staged, host)
            return staged
        into, out = self.ring.streams
        if not self.begun:  # after what wrote the host's memory, and read the slots
            self.begun = True
            current = torch.cuda.current_stream(self.ring.device)
            into.wait_stream(current)
            with torch.cuda.device(self.ring.device):
                capturing = torch.cuda.is_current_stream_capturing()
            if not capturing:  # a step that an error ended may still be copying
                into.wait_stream(out)
        if slot in self.left:
            into.wait_event(self.left[slot])
        with torch.cuda.stream(into):
            _copy(staged, host)
        self.arrived[slot] = into.record_event()
        return staged

    def wait(self, slot: int) -> None:
        if self.ring.streams is not None:
            torch.cuda.current_stream(self.ring.device).wait_event(self.arrived[slot])

    def leave(self, slot: int, host: Sequence[Tensor], staged: Sequence[Tensor]) -> None:
        if self.ring.streams is None:
            _copy(host, staged)
            return
        _, out = self.ring.streams
        out.wait_stream(torch.cuda.current_stream(self.ring.device))
        with torch.cuda.stream(out):
            _copy(host, staged)
        self.left[slot] = out.record_event()

    def join(self) -> None:
        if self.ring.streams is not None:
            current = torch.cuda.current_stream(self.ring.device)
            for stream in self.ring.streams:
                current.wait_stream(stream)


def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(into, source, strict=True):
        a.copy_(b, non_blocking=True)


def pinned_like(x: Tensor) -> Tensor:
    """New memory of the host for a tensor, pinned as it is."""
    contiguous = torch.contiguous_format
    return torch.empty_like(x, pin_memory=x.is_pinned(), memory_format=contiguous)


# --------------------------------------------------------------------------- operators by handle


def _transfers(table: Table) -> Transfers:
    found: Transfers | None = table.transfers
    if found is None:
        raise RuntimeError("normuon_fn: a graph that stages lists was run without a ring")
    return found


def _start(order: Tensor, into: Sequence[int], host: str, slot: int) -> None:
    table = current_table()
    table.lists[into[0]] = _transfers(table).start(slot, host, table.find(host))


def _arrived(order: Tensor, slot: int, after: Tensor | None) -> None:
    _transfers(current_table()).wait(slot)


def _leave(order: Tensor, host: str, staged: str, slot: int) -> None:
    table = current_table()
    into = table.find(host)
    count_write(into)
    _transfers(table).leave(slot, into, table.find(staged))


def _join(order: Tensor) -> None:
    _transfers(current_table()).join()


def _nothing(*_: Any) -> None:
    return None


_start_op = define(
    "stage_start_by_handle",
    "(Tensor(z!) order, int[] into, str host, int slot) -> ()", _start, _nothing,
)  # fmt: skip
_arrived_op = define(  # ``after``: what the current stream is to have done before
    "stage_arrived_by_handle",
    "(Tensor(z!) order, int slot, Tensor? after) -> ()", _arrived, _nothing,
)  # fmt: skip
_leave_op = define(
    "stage_leave_by_handle",
    "(Tensor(z!) order, str host, str staged, int slot) -> ()", _leave, _nothing,
)  # fmt: skip
_join_op = define("stage_join_by_handle", "(Tensor(z!) order) -> ()", _join, _nothing)


# ---------------------------------------------------------------------------- operators over lists


def _stage_in(host: list[Tensor], device: torch.device) -> list[Tensor]:
    return [x.to(device, copy=True, memory_format=torch.contiguous_format) for x in host]


def _stage_in_fake(host: list[Tensor], device: torch.device) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=device) for x in host]


def _stage_out(host: list[Tensor], staged: list[Tensor]) -> None:
    count_write(host)
    for a, b in zip(host, staged, strict=True):
        a.copy_(b)


_stage_in_op = define(
    "stage_in", "(Tensor[] host, Device device) -> Tensor[]", _stage_in, _stage_in_fake
)
_stage_out_op = define(
    "stage_out_", "(Tensor(a!)[] host, Tensor[] staged) -> ()", _stage_out, _nothing
)
_stage_like_op = define(
    "stage_like", "(Tensor[] host) -> Tensor[]", lambda host: [*map(pinned_like, host)], empty_like
)


# ------------------------------------------------------------------------------- what a step calls


def start(host: list[Tensor], device: torch.device, slot: int) -> list[Tensor]:
    """The list on the device, which may not be read before `arrived`."""
    if not is_handle(host):
        return _stage_in_op(host, device)
    handle: Any = host
    staged: Handle = handle.graph.add(handle.likes)
    _start_op(handle.graph.order, [staged.places[0].entry], handle.text, slot)
    return staged  # type: ignore[return-value]


def arrived(staged: list[Tensor], slot: int, after: Tensor | None) -> None:
    """From here on the list may be read and written. ``after``: what comes before that."""
    if is_handle(staged):
        handle: Any = staged
        _arrived_op(handle.graph.order, slot, after)


def leave(host: list[Tensor], staged: list[Tensor], slot: int) -> None:
    """Writes the list into that of the host. It is not read or written afterwards."""
    if is_handle(staged):
        into: Any = host
        handle: Any = staged
        _leave_op(handle.graph.order, into.text, handle.text, slot)
    else:
        _stage_out_op(host, staged)


def join(host: list[Tensor]) -> None:
    """What comes later finds all lists of the host complete. ``host``: any of them."""
    if is_handle(host):
        handle: Any = host
        _join_op(handle.graph.order)


def stage_like(host: list[Tensor]) -> list[Tensor]:
    """New lists of the host for these, pinned as they are."""
    return _stage_like_op(host)
