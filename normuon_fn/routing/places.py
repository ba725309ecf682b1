"""Where a matrix stands: in a block, in a head of several layers, beside experts; by its name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from . import words
from .uses import unwrapped

LEAVES = ("weight", "weight_v", "weight_orig", "kernel")
_BLOCKS = re.compile(r"^(layers?|blocks?|h|resblocks|stages?|encoders?|decoders?|groups?|levels?)$")
_GENERIC = ("proj", "linear", "dense", "fc", "layer", "projection")


class Named(NamedTuple):
    """A matrix with what its name says."""

    name: str
    shape: tuple[int, int]
    own: str  # the name of its layer, or its own where it is no layer's weight
    layer: tuple[str, ...]  # the parts of the layer's path, without wrappers
    is_weight: bool
    in_block: bool
    embedding: words.Strength | None
    head: words.Strength | None
    by_parent: bool  # the head's name is that of the module around the layer


def read(name: str, shape: tuple[int, int], *, is_repeated: bool) -> Named:
    """What a matrix's name says.

    ``is_repeated``: others have its shape, and its name but for a number.
    """
    parts = unwrapped(name)
    leaf = name.rpartition(".")[2]
    is_weight = leaf in LEAVES or not parts or parts[-1] in LEAVES
    layer = [p for p in parts if p not in LEAVES]
    own = layer[-1] if layer else leaf
    numbered = own.isdigit()
    if numbered and len(layer) > 1:
        own = layer[-2]  # the list or the Sequential it stands in
    head = words.head(own)
    by_parent = head is None and own in _GENERIC and len(layer) > 1
    if by_parent and words.head(layer[-2]):
        head = "weak"
    in_block = _in_block(layer, many=is_repeated)
    embedding = words.embedding(own)
    return Named(
        name, shape, own, tuple(layer), is_weight, in_block, embedding, head, by_parent
    )  # fmt: skip


def _in_block(layer: list[str], *, many: bool) -> bool:
    for k, part in enumerate(layer):
        before, inside = layer[k - 1] if k else "", k < len(layer) - 1
        if part.isdigit() and inside and not words.head(before) and (k or many):
            return True
        listed = bool(words.head(before) or words.embedding(before)) or any(
            words.head(around) == "strong" for around in layer[:k]
        )
        if part.isdigit() and k and not inside and not listed and many:
            return True
        numbered = re.match(r"(.*[a-z_])\d+$", part)
        if numbered and inside and (many or _BLOCKS.match(numbered[1].rstrip("_"))):
            return True
    return False


def chain_ends(matrices: Mapping[str, Named]) -> dict[str, bool]:
    """Of the numbered layers of one head: which one is the last of those that feed each other."""
    groups: dict[str, list[Named]] = {}
    for m in matrices.values():
        parts = [p for p in unwrapped(m.name) if p not in LEAVES]
        if m.head and parts and parts[-1].isdigit():
            groups.setdefault(".".join(parts[:-1]), []).append(m)
    ends = {}
    for group in groups.values():
        chained = all(a.shape[0] == b.shape[1] for a, b in itertools.pairwise(group))
        same = len({m.shape for m in group}) == 1  # parallel heads, not a chain
        for m in group:
            ends[m.name] = m is group[-1] or not chained or (same and len(group) > 1)
    return ends


def head_ends(matrices: Mapping[str, Named]) -> dict[str, bool]:
    """The last layers of modules that are named as heads; whether it takes in what is before it."""
    groups: dict[tuple[str, ...], list[Named]] = {}
    for m in matrices.values():
        at = next((k for k, p in enumerate(m.layer[:-1]) if words.head(p) == "strong"), None)
        if at is not None and not m.in_block:
            after = at + 1 + m.layer[at + 1].isdigit()
            groups.setdefault(m.layer[:after], []).append(m)
    return {
        group[-1].name: len(group) == 1 or group[-1].shape[1] == group[-2].shape[0]
        for group in groups.values()
    }


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def template(name: str) -> str:
    return re.sub(r"\d+", "*", name)
