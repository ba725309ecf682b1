"""Which matrices are one group, and the hyperparameters that each of them has.

Matrices of one shape and dtype are one group even where their parameter groups or routes give them
other rates: rates are rows of a tensor, so neither the graph nor its time to compile grows with the
number of parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..algorithm.work import Own, OwnRates
from ..types import Config
from .buckets import Group
from .parameters import Decided, SizedBlock


def stays_apart(shared: bool, config: Config) -> bool:
    """Whether matrices with other hyperparameters are in groups and buckets of their own.

    Ranks that share them send them by group; and a bucket may be what skips a step together.
    """
    return shared or config.guard_scope == "bucket"


def added(table: list[Own], own: Sequence[Own]) -> int | None:
    """Where these begin in the table, to which they are added; None: all are alike."""
    if len(set(own)) < 2 and not any(each.missed for each in own):
        return None
    table.extend(own)
    return len(table) - len(own)


def rate_tensors(table: Sequence[Own], device: torch.device) -> OwnRates | None:
    if not table:
        return None
    hyper, lr_mul, wd_mul, missed = zip(*table, strict=True)
    return OwnRates(
        torch.tensor(hyper, dtype=torch.int64, device=device),
        torch.tensor(lr_mul, dtype=torch.float64, device=device),
        torch.tensor(wd_mul, dtype=torch.float64, device=device),
        torch.zeros(len(table), dtype=torch.int32, device=device) if any(missed) else None,
    )


def groups_of(decided: Sequence[Decided], config: Config) -> list[tuple[torch.dtype, Group]]:
    """Blocks of one shape and dtype, and their dtype."""
    alike: dict[tuple[Any, ...], list[tuple[SizedBlock, Own]]] = {}
    for each in decided:
        p, route = each.parameter, each.parameter.route
        for sized in each.sized_blocks:
            key: tuple[Any, ...] = (
                sized.rows, sized.cols, p.spec.dtype, sized.ownership, each.master,
                route.transposed, *route.of_matrices(config),
            )  # fmt: skip
            own = own_of(each)
            if stays_apart(sized.ownership is not None, config):
                key = (*key, own)
            alike.setdefault(key, []).append((sized, own))
    found = []
    for (
        rows,
        cols,
        dtype,
        ownership,
        master,
        transposed,
        decay,
        cautious,
        *apart,
    ), pairs in alike.items():
        pairs.sort(key=lambda pair: pair[0].owner or 0)
        owners = [sized.owner for sized, _ in pairs if sized.block.count]
        local = [(sized.block, own) for sized, own in pairs if sized.block.count]
        shared = ownership is not None
        group = Group(
            rows=rows, cols=cols, master=master, transposed=transposed,
            decay=decay, cautious_update=cautious,
            blocks=tuple(block for block, _ in local),
            names=tuple(sized.name for sized, _ in pairs), ownership=ownership,
            owners=tuple(owner for owner in owners if owner is not None),
            own=tuple(apart if shared or not local else (own for _, own in local)),
        )  # fmt: skip
        found.append((dtype, group))
    return found


def own_of(each: Decided) -> Own:
    route = each.parameter.route
    return Own(each.parameter.hyper, route.lr_mul, route.wd_mul)
