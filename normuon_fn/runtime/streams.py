"""CUDA streams of our own, and why there are so few of them.

cuBLAS writes to a workspace, 32 MiB on an H100, which torch keeps for every stream and thread that ever multiplied on it: a new
stream for every plan or graph would be that much memory for good. And a captured graph goes on writing to the workspace that it
met, whoever has the memory by then: Inductor gives all workspaces back when it records a graph, and newer torch (2.13, not
2.11) those of a stream when any graph that was captured there goes (pytorch/pytorch#193402). So there are two kinds, both used
again:

- `beside`: for work that is thrown away. One for all.
- `borrow`, `give_back`: to capture a graph on. Of two live graphs each has its own, and its workspace lies in memory that is
  never anybody else's. (torch hands out 32 streams in turn. Only code that makes as many meets ours.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CaptureStream:
    """A stream to capture on, and where its workspace lies."""

    stream: torch.cuda.Stream
    memory: torch.cuda.MemPool


_idle: dict[torch.device, list[CaptureStream]] = {}


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def borrow(device: torch.device) -> CaptureStream:
    """One that no live graph was captured on."""
    with torch.cuda.device(device):
        try:
            lent = _idle.setdefault(device, []).pop()
        except IndexError:
            lent = CaptureStream(torch.cuda.Stream(device), torch.cuda.MemPool())
        with torch.cuda.stream(lent.stream), torch.cuda.use_mem_pool(lent.memory, device):
            torch.cuda.current_blas_handle()  # allocates the workspace here and now, if it is not there
    return lent


def give_back(device: torch.device, lent: CaptureStream) -> None:
    _idle[device].append(lent)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device, which need not be the current device, is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
