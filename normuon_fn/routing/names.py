"""What names, shapes and the order of the parameters tell where no module can be asked.

A name counts by its words (`words`), and only where the shapes agree: an output head is outside the
blocks, near the end, and has outputs that no other layer has; a vocabulary is a dimension far
larger than all others. What the two do not settle is decided all the same, and marked as likely or
untold.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from . import words
from .routes import Decision, Route
from .uses import is_window, unwrapped

_FAR_LARGER = 2  # a vocabulary of 32000 beside a feed-forward of 11008 is the closest in use
_BLOCKS = re.compile(r"^(layers?|blocks?|h|resblocks|stages?|encoders?|decoders?|groups?|levels?)$")
_GENERIC = ("proj", "linear", "dense", "fc", "layer", "projection")
_LEAVES = ("weight", "weight_v", "weight_orig", "kernel")


class Named(NamedTuple):
    """A matrix with what its name says."""

    name: str
    shape: tuple[int, int]
    own: str  # the name of its layer, or its own where it is no layer's weight
    is_weight: bool
    in_block: bool
    embedding: words.Strength | None
    head: words.Strength | None
    by_parent: bool  # the head's name is that of the module around the layer


def by_names(params: Mapping[str, Tensor]) -> dict[str, Decision]:
    """The decision for every parameter, from all names and shapes; linear in their number."""
    shapes = {name: tuple(t.shape) for name, t in params.items()}
    if _is_ensemble(shapes):
        inside = _decide({name: shape[1:] for name, shape in shapes.items()})
        return {name: _per_member(found, len(shapes[name])) for name, found in inside.items()}
    return _decide(shapes)


def _is_ensemble(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every tensor is a stack over the same members, as torch.func.stack_module_state makes
    them: one leading size in all, no vectors, and biases of two dimensions."""
    biases = [shape for name, shape in shapes.items() if words.is_biases(_leaf(name))]
    return (
        bool(biases)
        and all(len(shape) == 2 for shape in biases)
        and all(len(shape) > 1 for shape in shapes.values())
        and len({shape[0] for shape in shapes.values()}) == 1
    )


def _per_member(found: Decision, ndim: int) -> Decision:
    if found.route.flatten:
        text = f"{found.reason}, one per member of an ensemble: no route flattens each"
        return Decision(Route("adamw"), text, "likely")
    return found._replace(reason=f"{found.reason}, one per member of an ensemble")


def _decide(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Decision]:
    context = _Context(shapes)
    return {name: context.decide(name, shape) for name, shape in shapes.items()}


class _Context:
    """All parameters together: which names repeat, and which sizes are common."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.templates = Counter((_template(name), shape) for name, shape in shapes.items())
        self.experts = _experts(shapes)
        windows = (name for name, s in shapes.items() if len(s) > 2 and s[0] > 1)
        self.first_window = next(windows, None)
        self.matrices: dict[str, Named] = {}
        for name, shape in shapes.items():
            if len(shape) == 2 and min(shape) > 1:
                self.matrices[name] = self._named(name, (shape[0], shape[1]))
        hidden = [m for m in self.matrices.values() if not (m.embedding or m.head) or m.in_block]
        self.sizes = Counter(size for m in hidden for size in m.shape)
        common = self.sizes.most_common(1)
        self.width = common[0][0] if common else None
        self.largest = max((max(m.shape) for m in hidden if m.in_block), default=0)
        order = list(self.matrices)
        outside = [m.name for m in self.matrices.values() if not m.in_block]
        blocks = [order.index(m.name) for m in self.matrices.values() if m.in_block]
        place = {name: at for at, name in enumerate(order)}
        self.first = {n for n in outside if place[n] < (min(blocks) if blocks else 1)}
        self.last = {n for n in outside if place[n] > (max(blocks) if blocks else len(order) - 2)}
        self.tables = {m.shape for m in self.matrices.values() if m.embedding == "strong"}
        self.columns = Counter(m.shape[1] for m in self.matrices.values())
        self.chains = _chain_ends(self.matrices)

    def _named(self, name: str, shape: tuple[int, int]) -> Named:
        parts = unwrapped(name)
        leaf = name.rpartition(".")[2]
        is_weight = leaf in _LEAVES or not parts or parts[-1] in _LEAVES
        layer = [p for p in parts if p not in _LEAVES]
        own = layer[-1] if layer else leaf
        numbered = own.isdigit()
        if numbered and len(layer) > 1:
            own = layer[-2]  # the list or the Sequential it stands in
        head = words.head(own)
        by_parent = head is None and own in _GENERIC and len(layer) > 1
        if by_parent and words.head(layer[-2]):
            head = "weak"
        in_block = self._in_block(name, layer, shape)
        return Named(name, shape, own, is_weight, in_block, words.embedding(own), head, by_parent)

    def _in_block(self, name: str, layer: list[str], shape: tuple[int, ...]) -> bool:
        many = self.templates[_template(name), shape] > 1
        for k, part in enumerate(layer):
            before, inside = layer[k - 1] if k else "", k < len(layer) - 1
            if part.isdigit() and inside and not words.head(before) and (k or many):
                return True
            listed = words.head(before) or words.embedding(before)
            if part.isdigit() and k and not inside and not listed and many:
                return True
            numbered = re.match(r"(.*[a-z_])\d+$", part)
            if numbered and inside and (many or _BLOCKS.match(numbered[1].rstrip("_"))):
                return True
        return False

    def decide(self, name: str, shape: tuple[int, ...]) -> Decision:
        if len(shape) < 2:
            return Decision(Route("adamw"), f"{len(shape)}-D")
        if 0 in shape:
            return Decision(Route("frozen"), "no entries")
        if sum(size != 1 for size in shape) < 2:
            return Decision(Route("adamw"), "vector: one dimension alone is larger than 1")
        leaf = _leaf(name)
        if words.is_biases(leaf) or self._is_affine(name, shape):
            return Decision(Route("adamw"), "biases or scales, one vector per row")
        if len(shape) == 2:
            return self._matrix(self.matrices[name])
        return self._stack(name, leaf, shape)

    def _is_affine(self, name: str, shape: tuple[int, ...]) -> bool:
        """A weight whose bias has its shape is a norm's."""
        stem, _, leaf = name.rpartition(".")
        return leaf == "weight" and self.shapes.get(f"{stem}.bias") == shape

    def _stack(self, name: str, leaf: str, shape: tuple[int, ...]) -> Decision:
        own = unwrapped(name)[-1] if unwrapped(name) else leaf
        named = words.is_table(leaf) if leaf not in _LEAVES else words.embedding(own) == "strong"
        named = named and not (leaf in _LEAVES and is_window(shape))
        if named and "expert" not in name:
            return Decision(Route("adamw"), "table of vectors, by name")
        if shape[0] == 1 and "expert" not in name:
            return Decision(Route("adamw"), "table of vectors: one of them", "likely")
        if words.head(own) == "strong" and all(size == 1 for size in shape[2:]):
            return Decision(Route("adamw"), "output head, by name: a convolution of one place")
        if shape[1] == 1 and shape[0] > 1 and (len(shape) == 3 or max(shape[2:]) <= 11):
            if name == self.first_window and self.templates[_template(name), shape] == 1:
                return Decision(
                    Route(flatten=True), "convolution of one channel, flattened", "likely"
                )
            return Decision(Route("adamw"), "depthwise convolution, or vectors", "likely")
        if is_window(shape):
            cols = 1
            for size in shape[1:]:
                cols *= size
            return Decision(
                Route(flatten=True), f"convolution, flattened to {shape[0]}x{cols}", "likely"
            )
        return Decision(Route(), "stack of matrices")

    def _matrix(self, m: Named) -> Decision:
        rows, cols = m.shape
        if not m.is_weight and words.is_table(m.own) and m.embedding is None and m.head is None:
            return Decision(Route("adamw"), "table of vectors, by name")
        router = self._router(m)
        if router is not None:
            return router
        vocabulary = self._vocabulary(m)
        if m.in_block:
            return self._inside(m, vocabulary)
        if m.embedding == "strong" or (m.embedding and (vocabulary or m.name in self.first)):
            sure = m.embedding == "strong" or vocabulary
            return Decision(
                Route("adamw"),
                "embedding or output head, by name",
                "certain" if sure else "likely",
            )
        if m.head and not self._ends_its_own(m):
            return Decision(Route(), "matrix: a layer before the last of a head")
        if m.head == "strong":
            return Decision(Route("adamw"), "embedding or output head, by name")
        unique = self.sizes[rows] - (m.head is None) < 1 and self.columns[rows] == 0
        if m.head or m.embedding:
            if vocabulary or (unique and m.name in self.last):
                return Decision(Route("adamw"), "output head, by name and shape")
            if m.by_parent:
                return Decision(Route(), "matrix")
            if unique or m.embedding:
                return Decision(Route("adamw"), "output head, by name alone", "likely")
            return Decision(
                Route(), "matrix: named as a head, with outputs as other layers have", "untold"
            )
        if vocabulary and rows > cols and (m.name in self.first or m.name in self.last):
            return Decision(Route("adamw"), f"vocabulary of {rows}, by shape", "likely")
        if len(self.matrices) > 2 and m.name in self.last and unique and cols in self.sizes:
            return Decision(
                Route(), "matrix: the last layer, which may be an output head", "untold"
            )
        return Decision(Route(), "matrix")

    def _inside(self, m: Named, vocabulary: bool) -> Decision:
        if m.embedding == "strong" or (not m.is_weight and words.is_table(m.own)):
            square = m.shape[0] == m.shape[1]
            return Decision(
                Route("adamw"), "table of vectors, by name", "untold" if square else "certain"
            )
        if m.head == "strong" and m.own.lower() not in ("heads", "logits", "score", "classifier"):
            hidden = all(self.sizes[size] > 1 for size in m.shape) and not vocabulary
            if not hidden:
                return Decision(Route("adamw"), "output head of a block, by name", "likely")
            return Decision(Route(), "matrix: named as a head, inside a block", "untold")
        return Decision(Route(), "matrix")

    def _router(self, m: Named) -> Decision | None:
        layer = [p for p in unwrapped(m.name) if p not in _LEAVES]
        if not any(p.lower() in words.ROUTERS for p in layer[-2:]):
            return None
        counts = {n for stem, n in self.experts.items() if m.name.startswith(stem)}
        if m.shape[0] in counts:
            return Decision(Route("adamw"), f"router: logits of {m.shape[0]} experts")
        router = any("router" in p.lower() for p in layer[-2:])
        if (counts or router) and m.shape[0] * 4 <= m.shape[1]:
            return Decision(Route("adamw"), "router: logits of experts", "likely")
        return None

    def _vocabulary(self, m: Named) -> bool:
        if m.shape in self.tables and m.embedding != "strong":
            return True
        large, small = max(m.shape), min(m.shape)
        return bool(
            self.largest
            and large >= _FAR_LARGER * self.largest
            and (small == self.width or self.sizes[small] > 1)
        )

    def _ends_its_own(self, m: Named) -> bool:
        """Whether it is the last layer of the Sequential that is named as a head."""
        return self.chains.get(m.name, True)


def _chain_ends(matrices: Mapping[str, Named]) -> dict[str, bool]:
    """Of the numbered layers of one head: which one is the last of those that feed each other."""
    groups: dict[str, list[Named]] = {}
    for m in matrices.values():
        parts = [p for p in unwrapped(m.name) if p not in _LEAVES]
        if m.head and parts and parts[-1].isdigit():
            groups.setdefault(".".join(parts[:-1]), []).append(m)
    ends = {}
    for group in groups.values():
        chained = all(a.shape[0] == b.shape[1] for a, b in itertools.pairwise(group))
        same = len({m.shape for m in group}) == 1  # parallel heads, not a chain
        for m in group:
            ends[m.name] = m is group[-1] or not chained or (same and len(group) > 1)
    return ends


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many experts each prefix has: numbered modules, or the first size of a stack."""
    counts: dict[str, set[str]] = {}
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        at = re.search(r"(^|\.)experts?(\.|_)", name)
        if at is None:
            continue
        stem = name[: at.start()]
        number = re.match(r"(?:\w+\.)?(\d+)\.", name[at.end() :])
        if number:
            counts.setdefault(stem, set()).add(number[1])
        elif len(shape) == 3:
            found[stem] = shape[0]
    return found | {stem: len(numbers) for stem, numbers in counts.items()}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _template(name: str) -> str:
    return re.sub(r"\d+", "*", name)
