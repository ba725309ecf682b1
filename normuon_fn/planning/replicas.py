"""``Config(replicas="share")``: which replica keeps the state of which parameter.

All matrices of a parameter have one owner, so that a state is whole on one rank or not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..algorithm.stages import Stages
from ..distributed.owners import Shared
from .parameters import Decided, SizedBlock
from .plan import OwnedState


def with_owned_state(
    decided: Sequence[Decided], stages: Stages, owners: dict[str, int]
) -> tuple[list[Decided], OwnedState]:
    """The same parameters, all matrices of each with one owner; and what follows for the state.

    ``owners``: of parameters that have one already; those of the others are added.

    Raises:
        ValueError: a DTensor has replicas: where it is, and with it its state, its placements say.
    """
    shared: dict[str, list[SizedBlock]] = {}
    for each in decided:
        sized_blocks = [sized for sized in each.sized_blocks if sized.ownership is not None]
        if any(p.ownership is not None and p.ownership.replicas.size > 1 for p in sized_blocks):
            _check_plain(each)
            shared[each.parameter.name] = sized_blocks
    if not shared:
        return list(decided), OwnedState()
    ownership = next(iter(shared.values()))[0].ownership
    assert ownership is not None
    _add_owners(shared, ownership.replicas.size, owners)
    found = [
        replace(
            each, sized_blocks=tuple(x._replace(owner=owners[x.name]) for x in each.sized_blocks)
        )
        if each.parameter.name in shared
        else each
        for each in decided
    ]
    here, kinds = ownership.replicas.number, tuple(state.name for state in stages.states)
    away = [name for name in shared if owners[name] != here]
    note = (
        f"replicas='share': the state of {len(shared) - len(away)} of {len(shared)} parameters "
        "with matrices is on this rank"
    )
    own = {name: owners[name] for name in shared}
    elsewhere = frozenset(f"{name}.{kind}" for name in away for kind in kinds)
    return found, OwnedState(ownership.group, own, kinds, elsewhere, (note,))


def _add_owners(shared: dict[str, list[SizedBlock]], replicas: int, owners: dict[str, int]) -> None:
    """The most expensive parameter first, each to the replica with the least work so far."""
    costs = {name: sum(map(_cost, sized_blocks)) for name, sized_blocks in shared.items()}
    busy = [0.0] * replicas
    for name in [name for name in shared if name in owners]:  # in an order that all ranks have
        busy[owners[name]] += costs[name]
    new = [name for name in shared if name not in owners]
    for name in sorted(new, key=lambda name: costs[name], reverse=True):
        owners[name] = min(range(replicas), key=lambda k: busy[k])
        busy[owners[name]] += costs[name]


def _cost(sized: SizedBlock) -> float:
    assert sized.ownership is not None
    matrices = sized.block.count
    return matrices * Shared(sized.ownership, matrices, sized.rows, sized.cols).cost


def _check_plain(each: Decided) -> None:
    placed = each.parameter.spec.sharded
    if placed is not None:
        raise ValueError(
            f"params[{each.parameter.name!r}]: Config(replicas='share') is for plain tensors and "
            f"mesh=, got a DTensor with {placed.placements}, whose state has its placements; "
            "shard it over all ranks (FSDP2) to divide the state, or leave out replicas='share'"
        )
