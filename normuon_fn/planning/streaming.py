"""``Config(state_device="cpu")``: in which pieces momentums in host memory pass through the device.

A piece takes a slot of a ring on the device, from when it starts to arrive until it has left. Small
pieces let the copies in both directions begin early and end late; many slots let them go on while a
stack of several pieces is orthogonalized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..algorithm.guard import Rule
from ..algorithm.momentum import MOMENTUM, SCALE
from ..compat import address
from ..compat.observers import is_mapped
from ..distributed.placements import ShardedLayout
from ..ops.staging import slot_bytes
from ..types import Grads
from .layout import Block

if TYPE_CHECKING:
    from .plan import Plan, Spec

# Choices: 128 MiB take some 2.5 ms over PCIe 5, a hundred times what starts their copies, and eight
# slots are as large as the momentums, in float32, of the largest stack (chunks.py).
PIECE, RING = 2**27, 2**30
_SHARE = 4  # a small model has a ring of this share of its momentums,
_FEW, _MANY = 16, 256  # in so many pieces, and a large one in few more than so many: a graph grows


class Streaming(NamedTuple):
    """How the momentums of a plan pass through the device."""

    size: int  # bytes of a slot
    slots: int
    total: int  # bytes of the momentums

    @property
    def note(self) -> str:
        return (
            f"state_device='cpu': {self.total / 2**20:.1f} MiB of momentums in host memory, "
            f"through {self.slots} slots of {self.size / 2**20:.1f} MiB on the device"
        )


def streaming_of(blocks: Sequence[Block]) -> Streaming | None:
    """The ring for these blocks, of which some may have their momentums on the device."""
    sizes = [block.staged for block in blocks if block.staged]
    if not sizes:
        return None
    total, largest = sum(sizes), max(sizes)
    parts = min(PIECE, total // _FEW), total // _MANY
    size = max(largest, *(slot_bytes([part], 1) for part in parts))
    slots = max(2, min(RING, total // _SHARE) // size)
    return Streaming(size, min(slots, len(sizes)), total)


def pieces(blocks: Sequence[Block], size: int) -> Iterator[list[Block]]:
    """The blocks in order, in host memory as many at a time as a slot of this size takes."""
    found: list[Block] = []
    for block in blocks:
        if found and not _fits(found, block, size):
            yield found
            found = []
        found.append(block)
    if found:
        yield found


def _fits(piece: list[Block], block: Block, size: int) -> bool:
    if (piece[0].staged > 0) != (block.staged > 0):
        return False
    return sum(each.staged for each in piece) + block.staged <= size


def in_host_memory(
    name: str, blocks: Sequence[Block], state: Mapping[str, Spec]
) -> tuple[list[Block], dict[str, Spec]]:
    """The blocks of a parameter and its state, with the momentum in host memory.

    It stays on the device where a block is no single piece of memory, as splits along the columns
    are: those would be copied row by row, and not without waiting.
    """
    keys = [key for key in (f"{name}.{MOMENTUM.name}", f"{name}.{SCALE.name}") if key in state]
    views = [[block.param, block.scale][: len(keys)] for block in blocks]
    if not all(view.is_one_piece for each in views for view in each):
        return list(blocks), dict(state)
    sizes = [state[key].dtype.itemsize for key in keys]
    found = [
        replace(block, staged=sum(map(slot_bytes, [view.shape for view in each], sizes)))
        for block, each in zip(blocks, views, strict=True)
    ]
    return found, {**state, **{key: replace(state[key], host=True) for key in keys}}


def check_alone(name: str, placed: ShardedLayout | None, shared: Sequence[object]) -> None:
    """That nobody else has a part or a copy of a parameter whose momentum is in host memory.

    Raises:
        ValueError: naming it.
    """
    whose = f"a DTensor with {placed.placements}" if placed is not None else "one that ranks share"
    if placed is not None or any(x is not None for x in shared):
        raise ValueError(
            f"params[{name!r}]: Config(state_device='cpu') is for plain tensors that no ranks "
            f"share by mesh=, got {whose}; leave out state_device, or write momentum_dtype='int8' "
            "for a smaller momentum"
        )


def check_early(rule: Rule) -> None:
    """That nothing which ranks decide at the end of a step may keep a momentum as it was.

    Raises:
        ValueError: naming the argument.
    """
    if rule.group is not None and rule.mode != "off" and not rule.early:
        raise ValueError(
            "guard_mesh: Config(state_device='cpu') writes momentums back before ranks have "
            "decided whether they skip the step; leave out state_device, or write guard='off'"
        )


def check_pinned(what: str, tensor: Tensor, device: torch.device) -> None:
    """That a momentum in host memory can be copied to the device and back without waiting.

    Raises:
        ValueError: ``what``, and what to write.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{what}: expected a contiguous tensor, got strides {tensor.stride()}; pass its "
            "contiguous()"
        )
    if device.type != "cuda" or torch.compiler.is_dynamo_compiling() or is_mapped(tensor):
        return
    if address(tensor) is not None and not tensor.is_pinned():
        raise ValueError(
            f"{what}: expected pinned memory with Config(state_device='cpu'), got pageable memory; "
            "write state = nm.init(params, plan) and copy into its tensors, or pass its "
            "pin_memory()"
        )


def check_unmapped(given: Mapping[str, Grads]) -> None:
    """That `torch.vmap` maps over hyperparameters alone: there is one ring for all it maps over.

    Raises:
        ValueError: naming a tensor.
    """
    for what, tensors in given.items():
        for name, x in tensors.items():
            if x is not None and is_mapped(x):
                raise ValueError(
                    f"{what}[{name!r}]: expected one tensor for all that torch.vmap maps over, "
                    "with Config(state_device='cpu'); leave out state_device"
                )


def in_place_of_host(x: Tensor, device: torch.device) -> Tensor:
    """``x`` in host memory, contiguous, and pinned where the plan is on a GPU; itself if it is."""
    pinned = device.type == "cuda"
    if x.device.type == "cpu" and x.is_contiguous() and (not pinned or x.is_pinned()):
        return x
    found = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
    return found.copy_(x.detach())


def placed(x: Tensor, spec: Spec, plan: Plan) -> Tensor:
    """A tensor of the state where a step of the plan expects it."""
    return in_place_of_host(x, plan.device) if spec.host else x.to(plan.device)


def wait_for_copies_sync(plan: Plan | None) -> None:
    """Waits for the device, where steps may still copy momentums to host memory or from it.

    Before anybody on the host reads or writes them.
    """
    if plan is not None and plan.streaming is not None and plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
