"""Process groups: those that the plan makes for itself, of neighbours, and that of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

_groups: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def group_of(members: Sequence[int]) -> ProcessGroup:
    """The process group of these ranks. Its members alone call this; made at the first call.

    ``members``: as the whole process group numbers them.
    """
    world = dist.group.WORLD
    assert world is not None
    known = _groups.setdefault(world, {})
    key = tuple(members)
    if key not in known:
        with _by_itself(world):
            known[key] = dist.new_group(list(key), use_local_synchronization=True)
    return known[key]


@contextlib.contextmanager
def _by_itself(world: ProcessGroup) -> Iterator[None]:
    """Groups made within are not split off the group of all ranks.

    NCCL would do so where that is bound to a device (``init_process_group(device_id=)``), and then
    waits for all ranks, of which only the members call.
    """
    device = getattr(world, "bound_device_id", None)
    if device is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device


def all_ranks() -> ProcessGroup | None:
    """The group of all ranks; ``None`` where there is one process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
