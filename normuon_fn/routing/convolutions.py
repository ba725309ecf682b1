"""Convolutions: one matrix, flattened; or the parts of a fused projection that is one."""

from __future__ import annotations

import torch
from torch import nn

from . import projections as fused
from .attributes import get, is_a, kind_of, outputs_and_inputs
from .feedforward import FIRST, second_inputs
from .mixers import Cut
from .routes import Decision, Route
from .uses import Use


def decide(use: Use, *, per_head: bool) -> Decision:
    """The route of a convolution's weight, [outputs, inputs, ...] or, transposed, the reverse."""
    module, shape = use.module, use.shape
    kind, groups = kind_of(module), get(module, "groups")  # which a traced module does not have
    if groups != 1 and shape[1] == 1:
        return Decision(Route("adamw"), f"depthwise {kind}: every filter sees one channel")
    what = f"{kind}, flattened to {shape[0]}x{torch.Size(shape[1:]).numel()}"
    transposed = is_a(module, nn.modules.conv._ConvTransposeNd) or bool(get(module, "transposed"))
    if not transposed and groups not in (None, 1):
        what += f": its {groups} groups together"
    elif transposed:
        what += ": the rows are inputs"
    whole = Decision(Route(flatten=True, transposed=transposed), what)
    # The outputs of the groups of a transposed convolution lie in different rows.
    cut = None if transposed and groups not in (None, 1) else _cut(use, per_head)
    if cut is None:
        return whole
    dim = int(transposed) if cut.splits or cut.heads else 0
    route = Route(flatten=True, splits=cut.splits, heads=cut.heads, dim=dim, transposed=transposed)
    return Decision(route, f"{what}; {cut.reason}")


def _cut(use: Use, per_head: bool) -> Cut | None:
    """As of a linear layer, but for what neighbours alone tell of a gate: half of the outputs of a
    convolution may have gone into its places too (a pixel shuffle of one dimension)."""
    if use.own.isdigit():
        return None
    outputs, inputs = outputs_and_inputs(use.module)
    cut = fused.cut(use.own, use.owners, outputs, inputs, per_head=per_head, by_neighbours=False)
    if cut is None and FIRST.match(use.own) and 2 * (second_inputs(use.owners) or 0) == outputs:
        half = "the next layer takes in half of its outputs, which may be gate and up"
        return Cut(None, None, f"left whole: {half}; give splits=")
    return cut
