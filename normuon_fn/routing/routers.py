"""Which weights are logits over experts: their rows are experts, each a vector of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from . import adapters, gates, words
from .attributes import first, get, is_a, is_layer, kind_of, outputs_and_inputs, sources_of
from .routes import Decision, Route

_ROUTER_CLASS = re.compile(r"Router|(MoE?|Top_?K\w*|Switch|Routing|Expert)_?Gat(e|ing)$", re.I)
_CHOOSES = frozenset(("gate", "gates", "gating", "router", "routers", "switch", "wg", "noise"))
_ROUTER_LEAF = re.compile(r"^w_?(gate|g|noise|router)$")


def decide(
    parts: Sequence[str],  # the module's unwrapped path, and what it calls the parameter
    owners: Sequence[nn.Module],  # the nearest first
    leaf: str,
    shape: tuple[int, ...],  # [outputs, inputs]
) -> Decision | None:
    """The rule of a router, or of what may be one; ``None`` if it is none."""
    if leaf == "weight" and parts and words.router(parts[-1]) and set(shape[2:]) == {1}:
        shape = shape[:2]  # a convolution of one place
    if len(shape) != 2 or _feeds_another(owners):
        return None
    if leaf == "weight" and _is_followed(parts, owners, shape[0]):
        return None
    weak = leaf == "weight" and len(owners) > 1 and parts and words.router(parts[-1]) == "weak"
    if weak and gates.is_hidden(parts[-1], owners[1], shape[0]):
        return None
    text = _reason(parts, owners, leaf, shape)
    if text is not None:
        return Decision(Route("adamw"), text)
    has_few = gates.has_few_outputs(shape, either_way=leaf != "weight")
    if not (has_few or (leaf == "weight" and any(map(words.router, parts[-2:])))):
        return None
    place = _place(parts, owners, leaf)
    if place is None:
        return None
    own, around = place
    count = experts(around)
    counts = gates.members(around[-1]) | ({count} if count else set())
    if not has_few:
        return gates.counted(own, around, shape) if shape[0] in counts else None
    return gates.decide(own, around, shape, counts)


def _place(
    parts: Sequence[str], owners: Sequence[nn.Module], leaf: str
) -> tuple[str, Sequence[nn.Module]] | None:
    """What a layer that may choose is called, and the modules around it up to the one that has it.

    ``None`` for a member of a list, and for what is not the last layer of its router.
    """
    up = int(leaf == "weight")
    if not parts or up >= len(owners):
        return None
    while len(parts) > 1 and up + 1 < len(owners):
        holder = owners[up]
        numbered = parts[-1].isdigit() and not is_a(holder, *gates.LISTS)
        if not numbered and words.router(parts[-2]) is None:
            break
        layers = [
            child for child in holder.children() if next(child.parameters(), None) is not None
        ]
        if up and owners[up - 1] is not layers[-1]:
            return None
        parts, up = parts[:-1], up + 1
    return None if parts[-1].isdigit() else (parts[-1], owners[: up + 1])


def _feeds_another(owners: Sequence[nn.Module]) -> bool:
    """Whether a router multiplies a layer's outputs by a matrix that it has beside the layer."""
    if len(owners) < 2 or not (is_layer(owners[0]) and _ROUTER_CLASS.search(kind_of(owners[1]))):
        return False
    outputs = outputs_and_inputs(owners[0])[0]
    return any(
        p is not None and p.ndim == 2 and outputs in p.shape
        for name, p in owners[1]._parameters.items()
        if not adapters.is_adapters(name)
    )


def _is_followed(parts: Sequence[str], owners: Sequence[nn.Module], outputs: int) -> bool:
    """Whether a router has a later layer: one in its Sequential, or one that takes the outputs."""
    for up in range(1, min(len(parts), len(owners))):
        holder, name = owners[up], parts[-up]
        numbered = name.isdigit() and not is_a(holder, *gates.LISTS)
        if not numbered and words.router(parts[-up - 1]) is None:
            return False
        names = list(holder._modules)
        if name not in names:
            return False
        layers = [
            module
            for after in names[names.index(name) + 1 :]
            if not (words.of_experts(after) or adapters.is_adapters(after))
            and (child := holder._modules[after]) is not None
            for module in (child, *gates.inside(child, skip=adapters.is_adapters))
            if is_layer(module)
        ]
        if is_a(holder, nn.Sequential) and layers:
            return True
        if any(outputs == outputs_and_inputs(m)[1] for m in layers):
            return True
    return False


def _reason(
    parts: Sequence[str], owners: Sequence[nn.Module], leaf: str, shape: tuple[int, ...]
) -> str | None:
    """Why a weight is certainly a router's; ``None`` if it may be none."""
    beside = _choice(parts, owners, leaf)
    if beside is not None:
        rows, inputs = shape if leaf == "weight" or shape[0] in beside else shape[::-1]
        if rows in beside and rows < inputs:
            return _logits(rows)
    named = any(part.lower() in words.ROUTERS for part in parts[-2:])
    routers = [owner for owner in owners[:3] if _ROUTER_CLASS.search(kind_of(owner))]
    is_router = bool(parts) and words.words_of(parts[-1])[-1:] == ["router"]
    if not (named or routers or is_router or _ROUTER_LEAF.match(leaf)):
        return None
    count = experts(owners)
    if is_router and 8 * shape[0] <= shape[1]:
        return f"router: logits of {shape[0]} choices" if shape[0] != count else _logits(count)
    counted = shape[0] == count or (leaf != "weight" and shape[1] == count)
    if count is not None and counted and (named or _ROUTER_LEAF.match(leaf)):
        return _logits(count)
    if not routers and not (named and count is not None and _has_experts(owners)):
        return None
    if shape[0] > shape[1] // 2 and shape[0] != count:
        return None  # a hidden layer of a router with several
    if routers:
        layers = [m for m in routers[-1].modules() if is_layer(m)]
        if layers and owners[0] in layers and owners[0] is not layers[-1] and shape[0] != count:
            return None
    known = f", of which the model counts {count}" if count not in (None, shape[0]) else ""
    return f"router: logits of {shape[0]} experts{known}"


def _logits(count: int) -> str:
    return f"router: logits of {count} experts"


def experts(owners: Sequence[nn.Module]) -> int | None:
    """How many experts the nearest module has that says so, or that has a list or a stack."""
    for owner in owners:
        count = first(sources_of([owner]), gates.EXPERTS)
        if count is not None:
            return count
        inner = get(owner, "experts")
        if isinstance(inner, nn.Module) and is_a(inner, nn.ModuleList, nn.ModuleDict):
            return len(inner._modules)
        if isinstance(inner, nn.Module):
            return next((p.shape[0] for p in inner.parameters() if p.ndim == 3), None)
    return None


def _choice(parts: Sequence[str], owners: Sequence[nn.Module], leaf: str) -> set[int] | None:
    """How many members the stacks and lists have beside what is named as a router.

    Of a router with several layers it is the last one that chooses.
    """
    up = int(leaf == "weight")
    if up and len(parts) > 1 and parts[-1].isdigit() and len(owners) > 2:
        if owners[0] is not [*owners[1].children()][-1]:
            return None
        parts, up = parts[:-1], 2
    named = parts and (_CHOOSES & {*words.words_of(parts[-1])} or _ROUTER_LEAF.match(parts[-1]))
    return _beside(owners[up]) if named and up < len(owners) else None


def _beside(holder: nn.Module) -> set[int]:
    """How many members the stacks and lists have that a module holds, or that its children do."""
    found = set()
    for module in (holder, *holder.children()):
        if module is not holder and is_a(module, *gates.LISTS):
            found |= {len(module._modules), len(module._parameters)}
        found |= {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3}
    return found - {0, 1}


def _has_experts(owners: Sequence[nn.Module]) -> bool:
    return any(isinstance(get(owner, "experts"), nn.Module) for owner in owners[:3])
