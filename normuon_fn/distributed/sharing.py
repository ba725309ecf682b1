"""How many replicas share the matrices of a bucket: all, those of one block of replicas, or none.

Sharing divides the products among replicas and brings every update to all of them. With more
replicas there is less to divide and as much to send, so that sharing among very many is slower than
none. Within a node all share, as its links are fast. Beyond, the replicas are cut into equal blocks
of neighbours, and each block does the whole work by itself, in the same stacks as the others, so
that on GPUs of one kind all of them get the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from . import cost
from .cost import Load
from .groups import group_of
from .mesh_ranks import ALONE, RankGroup
from .owners import Ownership
from .placements import ranks_of


def replicas_to_share(load: Load) -> int:
    """How many replicas share these matrices; the same on all ranks."""
    every = len(load.ranks)
    if not is_open(load):
        return every
    seconds = {k: load.step(k) for k in range(1, every + 1) if every % k == 0}
    # Within what a prediction can tell, more replicas share: one of them computes an update, and
    # the others need not be GPUs of the same kind to get the same bits.
    enough = cost.RELATIVE * min(seconds.values()) + cost.SECONDS
    return max(k for k, t in seconds.items() if t <= enough)


def is_open(load: Load) -> bool:
    """Whether it is a question at all: there are replicas, and ranks of several nodes."""
    nodes = {rank // cost.NODE for of_replica in load.ranks for rank in of_replica}
    return len(load.ranks) > 1 and len(nodes) > 1


def global_ranks(ownership: Ownership) -> tuple[tuple[int, ...], ...]:
    """[replicas, shards]: as the whole process group numbers them; of the first block of replicas
    where these do the work by themselves.

    So all ranks of the process group decide by the same numbers. Blocks may lie differently on
    nodes, but the buckets that all replicas share must come in one order everywhere.
    """
    numbers = ranks_of(ownership.group)
    ranks = ownership.first or ownership.ranks
    return tuple(tuple(numbers[rank] for rank in of_replica) for of_replica in ranks)


def narrowed(ownership: Ownership, replicas: int) -> Ownership | None:
    """The same among the block of so many replicas that this rank's replica is in.

    ``None``: every rank has the matrices to itself. A collective of the ranks of the block.
    """
    if replicas == ownership.replicas.size:
        return ownership
    start = ownership.replicas.number // replicas * replicas
    ranks = ownership.ranks[start : start + replicas]
    alone = replace(
        ownership, replicas=ALONE, ranks=ranks, narrowed=True, first=ownership.ranks[:replicas]
    )
    if replicas == 1:
        return alone if alone.shards.size > 1 else None
    shard = ownership.shards.number
    members = [of_replica[shard] for of_replica in global_ranks(ownership)[start:][:replicas]]
    group = group_of(members)
    number = {rank: k for k, rank in enumerate(members)}
    order = tuple(number[rank] for rank in dist.get_process_group_ranks(group))
    block = RankGroup(group.group_name, order[group.rank()], order)
    return replace(alone, replicas=block)
