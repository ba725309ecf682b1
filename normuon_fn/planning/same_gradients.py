"""Whether replicas have the same gradients: looked at once, at the first step of a plan.

Plain tensors do not tell whether somebody averages their gradients. Where nobody does, as without
DistributedDataParallel, ranks go apart from the first step on, and nothing else shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from ..compat import gather_objects, group_named, observers
from ..compat.graphs import is_functionalized
from ..distributed.placements import local
from ..routing.doubts import warn_at_caller
from ..types import Grads
from .plan import Plan

# Of a gradient's norm: what its sum may differ by between ranks that averaged it in bfloat16. The
# sums of two batches differ by about as much as the norm of what the gradients differ by.
_ROUNDING = 0.05
_told: WeakSet[object] = WeakSet()  # process groups
Sums = dict[str, tuple[float, float]]  # by name: the sum and the norm of a gradient


def warn_of_own_gradients(plan: Plan, grads: Grads) -> None:
    """Warns, once for a process group, where ranks that have copies have other gradients.

    It waits for the device, and is a collective of hosts: for the first step of a plan alone.
    """
    if is_functionalized() or observers.is_capturing(plan.device) or plan.device.type == "meta":
        return
    plain = {p.name for p in plan.parameters if p.spec.sharded is None}
    for group in sorted(plan.common):
        names = [name for name in plan.common[group] if name in plain]
        if not names or group_named(group) in _told:
            continue
        given = {name: grad for name in names if (grad := grads.get(name)) is not None}
        found = gather_objects(_sums(given), group)
        if text := _doubt(found):
            _told.add(group_named(group))
            warn_at_caller(text)


def _sums(grads: Mapping[str, Tensor]) -> Sums:
    if not grads:
        return {}
    with torch.no_grad():
        each = [local(grad).detach() for grad in grads.values()]
        wide = [torch.promote_types(x.dtype, torch.float32) for x in each]
        sums = [x.sum(dtype=w).float() for x, w in zip(each, wide, strict=True)]
        norms = [
            torch.linalg.vector_norm(x, dtype=w).float() for x, w in zip(each, wide, strict=True)
        ]
        found = torch.stack([torch.stack(sums), torch.stack(norms)], dim=1).tolist()
    return {name: (total, norm) for name, (total, norm) in zip(grads, found, strict=True)}


def _doubt(found: Sequence[Sums]) -> str | None:
    """What to say, or ``None``. A fault of one rank is the guard's to tell."""
    for name in found[0]:
        if any(name not in rank for rank in found):
            continue
        sums, norms = zip(*(rank[name] for rank in found), strict=True)
        if not all(map(math.isfinite, (*sums, *norms))):
            continue
        if max(sums) - min(sums) > _ROUNDING * max(norms):
            shown = ", ".join(f"{norm:.4g}" for norm in norms[:8])
            return (
                f"mesh: its {len(found)} ranks are said to have the same parameters, but have "
                f"other gradients at the first step, as of {name!r} (norms by rank: {shown}), so "
                "that their parameters go apart. Average the gradients before the step: wrap the "
                "model in torch.nn.parallel.DistributedDataParallel, or call "
                "torch.distributed.all_reduce(p.grad, op=torch.distributed.ReduceOp.AVG) for each "
                "parameter. If it is wrapped already: forward goes through the wrapper, and the "
                "last backward() of a step stands outside of no_sync(). If every rank trains a "
                "model of its own, write mesh='alone'"
            )
    return None
