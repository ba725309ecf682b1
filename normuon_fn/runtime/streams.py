"""Our own CUDA streams, and why there are so few of them.

cuBLAS writes to a workspace, 32 MiB on an H100, which torch keeps for every stream and thread that
ever multiplied on it. A new stream for every plan or graph would keep that much memory for good.
And a captured graph goes on writing to the workspace that it was captured with, whoever has that
memory by then: Inductor frees all workspaces when it records a graph, and newer torch (2.13, not
2.11) frees those of a stream when any graph that was captured on it is freed
(pytorch/pytorch#193402). So there are two kinds of streams, and both are used again:

- `beside`: one for all work whose result is thrown away.
- `borrow` and `give_back`: to capture a graph on. Two graphs that exist at the same time have
  different ones, with workspaces in memory that nobody else ever gets. (torch gives out 32 streams
  in turn, so only code that makes as many can share ours.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CaptureStream:
    """A stream to capture on, and the memory of its workspace."""

    stream: torch.cuda.Stream
    memory: torch.cuda.MemPool


_idle: dict[torch.device, list[CaptureStream]] = {}


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream:
    """The stream for work whose result is thrown away."""
    return torch.cuda.Stream(device)


def borrow(device: torch.device) -> CaptureStream:
    """A stream on which no graph was captured that still exists. `give_back` it with the graph."""
    with torch.cuda.device(device):
        try:
            lent = _idle.setdefault(device, []).pop()
        except IndexError:
            lent = CaptureStream(torch.cuda.Stream(device), torch.cuda.MemPool())
        with torch.cuda.stream(lent.stream), torch.cuda.use_mem_pool(lent.memory, device):
            torch.cuda.current_blas_handle()  # allocates the workspace now, if there is none
    return lent


def give_back(device: torch.device, lent: CaptureStream) -> None:
    _idle[device].append(lent)
