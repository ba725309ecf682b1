"""Parameters that belong to no layer of torch: tables of vectors, and matrices of other forms."""

from __future__ import annotations

import re
from collections.abc import Callable

from . import routers, words
from .attention import attention
from .attributes import get, kind_of, says_nothing
from .routes import Decision, Route
from .uses import Use, unwrapped

_FILTERS = re.compile(r"Conv(olution)?(\dd)?$")
_FEW = 4  # rows of a parameter of no known layer: a table or a few vectors


def decide(use: Use, by_name: Callable[[], Decision]) -> Decision | None:
    """A parameter that no layer of torch's has: a table of vectors, or another matrix."""
    shape, kind = use.shape, kind_of(use.module)
    if words.is_table(use.leaf) or (len(shape) == 3 and shape[0] == 1):
        return Decision(Route("adamw"), "table of vectors, by name")
    if len(shape) > 2 and all(size == 1 for size in shape[1:-1]):
        return Decision(Route("adamw"), "table of vectors, by shape")
    if len(shape) > 3 and shape[0] == 1:
        return Decision(Route("adamw"), "one table of several dimensions, by shape")
    if re.search(r"quer(y|ies)$", use.leaf) and len(shape) == 2 and shape[0] != shape[1]:
        return Decision(Route("adamw"), "queries that are learned, by name")
    is_head = kind.endswith(("Head", "Heads")) or words.head(use.own) == "strong"
    if is_head and len(shape) == 3:
        return Decision(Route("adamw"), "output heads, one per codebook or task, by name")
    if len(shape) == 2 and _FILTERS.search(kind) and min(shape) <= 8:
        return Decision(Route("adamw"), f"depthwise {kind}: every filter sees one channel")
    if use.leaf == "D" and get(use.module, "A_log") is not None:
        return Decision(Route("adamw"), "a state space's D: a scale per channel")
    per_head = _of_heads(use)
    if per_head is not None:
        return per_head
    experts = _flat_experts(use)
    if experts is not None:
        return experts
    if says_nothing(use.module) and by_name().route.algorithm == "adamw":
        return by_name()
    if len(shape) == 2 and min(shape) <= _FEW:
        few = f"{min(shape)} vectors of {max(shape)}, of no known layer"
        return Decision(Route("adamw"), few, "untold")
    return None


def _of_heads(use: Use) -> Decision | None:
    """[inputs, heads, head_dim], as XLNet keeps q, k, v and o: one matrix, flattened."""
    shape, known = use.shape, attention(use.owners)
    if len(shape) != 3 or known.heads != shape[1] or shape[0] <= max(shape[1:]):
        return None
    if known.head_dim not in (None, shape[2]) and shape[1] * shape[2] != shape[0]:
        return None
    flat = f"{shape[0]}x{shape[1] * shape[2]} with its {shape[1]} heads flattened"
    if use.own in ("o", "out", "wo", "W_O", "o_proj", "out_proj"):
        return Decision(Route(flatten=True), f"matrix of {flat}")
    return Decision(Route(flatten=True, transposed=True), f"matrix of {flat}: rows are inputs")


def _flat_experts(use: Use) -> Decision | None:
    """[experts * hidden, width], as DBRX keeps them: one matrix per expert."""
    named = "expert" in kind_of(use.module).lower() or "experts" in unwrapped(use.name)[-2:]
    count = routers.experts(use.owners) if named and len(use.shape) == 2 else None
    if not count or count < 2 or use.shape[0] % count or use.shape[0] == count:
        return None
    each = use.shape[0] // count
    return Decision(Route(heads=count), f"{count} experts of {each} rows each")
