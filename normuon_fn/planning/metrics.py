"""What a plan must know for the metrics: how large parameters are, and on which ranks they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..algorithm.guard import Rule
from ..algorithm.metrics import MetricsRule, Together
from ..compat import group_named
from .layout import size_of
from .plan import OwnedState, Parameter


def metrics_rule(
    parameters: Sequence[Parameter], guard: Rule, owned: OwnedState, device: torch.device
) -> MetricsRule:
    """The static half of the metrics: see algorithm/metrics.py.

    Plain tensors need no other rank: whoever has a copy has all of it, and the same gradient. But
    where replicas share the state, owners alone know of momentum and variance.
    """
    layouts = [p.spec.sharded for p in parameters]
    together: dict[str, list[int]] = {}
    for k, layout in enumerate(layouts):
        if layout is not None and layout.shards.size > 1:
            together.setdefault(layout.group, []).append(k)
        elif owned.group is not None and parameters[k].name in owned.owners:
            together.setdefault(owned.group, []).append(k)
    entries = [
        size_of(p.spec.shape if layout is None else layout.shape)
        for p, layout in zip(parameters, layouts, strict=True)
    ]
    # Ranks of a group that have the same part all send it.
    shares = [
        1.0 if layout is None or layout.shards.size == 1 else 1.0 / layout.replicas.size
        for layout in layouts
    ]
    if owned.group is not None:
        size = group_named(owned.group).size()
        for k, p in enumerate(parameters):
            if p.name in owned.owners:
                shares[k] = 1.0 / size
    return MetricsRule(
        parameter_of=guard.parameter_of,
        entries=torch.tensor(entries, dtype=torch.float64, device=device),
        share=torch.tensor(shares, dtype=torch.float64, device=device),
        together=tuple(
            Together(group, torch.tensor(columns, dtype=torch.int64, device=device))
            for group, columns in together.items()
        ),
    )
