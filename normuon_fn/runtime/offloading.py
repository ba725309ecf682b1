"""State in pinned host memory between phases of training, and back again.

    offload_: device -> pinned host memory, wait, free   |   reload_: host -> device, on its stream

Every tensor stays the same object and changes the memory behind it, so whoever refers to it (an
optimizer, a plan's graph, the last result) keeps no memory on the device. A compiled step reads
addresses anew at every call and is not compiled again. A captured one notices that they moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..compat import outside_inference_mode
from ..distributed.placements import local
from ..planning.checks import check_tensors
from ..planning.plan import Plan, check_plan
from .inputs import note_move

HOST = torch.device("cpu")
T = TypeVar("T", bound=Mapping[str, Tensor])


def offload_(state: T) -> T:
    """The same dict of the same tensors, which are in pinned host memory now.

    For phases that need the memory of the device, such as the generation of a reinforcement
    learning loop:

    >>> graphed.release()             # only where there is a GraphedStep
    >>> nm.offload_(state)
    >>> generate()
    >>> nm.reload_(state, plan)

    It waits for the device, and gives the memory back to it. `step` and `step_` are not compiled
    again afterwards, and refuse the state until `reload_`. `save` and ``state_dict`` take it as it
    is. A `GraphedStep` keeps memory of its own: ``release()`` frees that too, and the second step
    after `reload_` captures again. Without ``release()`` the first step notices where addresses
    moved, warns, and is a plain `step_`; the second captures.

    0-d tensors (the guard's counters) stay where they are. Of DTensors the local parts move. What
    is on the host already stays as it is: a second call does nothing, and on a CPU none does.

    Units: pinned memory comes in powers of two of bytes per tensor, and torch keeps it for the next
    call, which is faster than the first.

    Raises:
        TypeError: ``state`` is not a dict of tensors.
        RuntimeError: there is not enough host memory. Nothing has moved then.
    """
    _check(state)
    move([(x, HOST) for x in state.values()])
    return state


def reload_(state: T, plan: Plan) -> T:
    """The same dict of the same tensors, which are on the plan's device again.

    The copies are queued on the current stream, where the next step finds them complete. What is
    there already stays as it is, so a second call does nothing, and on a CPU none does.

    Momentums that ``Config(state_device="cpu")`` keeps in host memory stay there.

    Raises:
        TypeError, ValueError: ``state`` is not that of the plan.
        torch.OutOfMemoryError: there is no room on the device. Nothing has moved then.
    """
    check_plan(plan)
    check_tensors(plan, "state", state, plan.state, anywhere=True)
    move([(x, plan.state[key].on(plan.device)) for key, x in state.items()])
    return state


@outside_inference_mode
@torch.no_grad()
def move(pairs: Iterable[tuple[Tensor, torch.device]]) -> int:
    """Gives every tensor memory on its device. Returns how many of them had other memory before.

    All new memory is there before the first tensor changes, and all copies are complete before the
    memory of what moves to the host is freed.
    """
    found = {id(own): (own, to) for x, to in pairs if is_elsewhere(own := local(x), to)}
    copies = [(x, _empty_like(x, to)) for x, to in found.values()]
    for x, copy in copies:
        copy.copy_(x, non_blocking=True)
    left = {x.device for x, copy in copies if x.is_cuda and not copy.is_cuda}
    for device in left:
        torch.cuda.synchronize(device)
    note_move()
    for x, copy in copies:
        x.data = copy
    count = len(copies)
    del copies, found
    for device in left:  # to other processes and allocators too
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    return count


def is_elsewhere(x: Tensor, device: torch.device) -> bool:
    """Whether a tensor has to move. A tensor without dimensions is not worth it."""
    return x.ndim > 0 and x.device != device


def _empty_like(x: Tensor, device: torch.device) -> Tensor:
    pinned = device.type == "cpu" and x.is_cuda
    return torch.empty_like(x, device=device, pin_memory=pinned, requires_grad=False)


def _check(state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict of tensors, got {type(state).__name__}")
    for key, x in state.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"state[{key!r}]: expected a Tensor, got {type(x).__name__}")
