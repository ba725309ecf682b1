"""CUDA streams of our own, and why there are so few of them.

cuBLAS writes to a workspace, 32 MiB on an H100, which torch keeps for every stream and thread that ever multiplied on it. A
new stream for every plan or graph would be that much memory for good. So there are two kinds, and both are used again:

- `beside`: for work that is thrown away. One for all.
- `borrow`, `give_back`: to capture a graph on. Nothing else ever runs there, and no two live graphs have the same one. The
  workspace then comes from the graph's own memory pool and stays the graph's, whoever clears torch's list of them: Inductor
  does when it records a graph, and torch since 2.13 clears a stream's when any graph that was captured on it goes
  (pytorch/pytorch#193402).
"""

from __future__ import annotations

import functools

import torch

_idle: dict[torch.device, list[torch.cuda.Stream]] = {}


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def borrow(device: torch.device) -> torch.cuda.Stream:
    try:
        return _idle.setdefault(device, []).pop()
    except IndexError:
        return torch.cuda.Stream(device)


def give_back(device: torch.device, stream: torch.cuda.Stream) -> None:
    _idle[device].append(stream)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device, which need not be the current device, is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        return torch.cuda.is_current_stream_capturing()
