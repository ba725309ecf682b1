"""Process groups: those that the plan makes for itself, of neighbours, and that of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

_groups: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def group_of(members: Sequence[int]) -> ProcessGroup:
    """The process group of these ranks, which alone make it, at the first call.

    ``members``: as the whole process group numbers them.
    """
    assert dist.group.WORLD is not None
    known = _groups.setdefault(dist.group.WORLD, {})
    key = tuple(members)
    if key not in known:
        known[key] = dist.new_group(list(key), use_local_synchronization=True)
    return known[key]


def all_ranks() -> ProcessGroup | None:
    """The group of all ranks; ``None`` where there is one process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
