"""What names, shapes and the order of the parameters tell where no module can be asked.

A name counts by its words (`words`), and only where the shapes agree: an output head is outside the
blocks, near the end, and has outputs that no other layer has; a vocabulary is a dimension far
larger than all others. What the two do not settle is decided all the same, and marked as likely or
untold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from . import adapters, fused_names, words
from .named_gates import NamedGates
from .parametrized import doubted_by_name
from .places import LEAVES, Named, chain_ends, head_ends, leaf_of, read, template
from .routes import Decision, Route
from .uses import is_window, unwrapped

_NAMED = "embedding or output head, by name"
_FEW = 4  # rows of a parameter of no known layer: a table or a few vectors
_FAR_LARGER = 2  # a vocabulary of 32000 beside a feed-forward of 11008 is the closest in use


def by_names(params: Mapping[str, Tensor]) -> dict[str, Decision]:
    """The decision for every parameter, from all names and shapes; linear in their number."""
    shapes = {name: tuple(t.shape) for name, t in params.items()}
    if _is_ensemble(shapes):
        inside = _decide({name: shape[1:] for name, shape in shapes.items()})
        return {name: _per_member(found, len(shapes[name])) for name, found in inside.items()}
    return _decide(shapes)


def _is_ensemble(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every tensor is a stack over the same members, as torch.func.stack_module_state makes
    them: one leading size in all, and biases and norms of two dimensions.

    A single dimension has what is a scalar in every member.
    """
    vectors = [shape for name, shape in shapes.items() if _is_vector(name)]
    return (
        bool(vectors)
        and all(len(shape) == 2 for shape in vectors)
        and all(shapes.values())
        and len({shape[0] for shape in shapes.values()}) == 1
        and any(len(shape) > 2 for shape in shapes.values())
    )


def _is_vector(name: str) -> bool:
    """Whether a name says that a parameter of one model is a vector: a bias, or a norm's scale."""
    own = unwrapped(name)[-1:]
    return words.is_biases(leaf_of(name)) or (
        leaf_of(name) in LEAVES and any(map(words.is_norm, own))
    )


def _per_member(found: Decision, ndim: int) -> Decision:
    if found.route.flatten:
        text = f"{found.reason}, one per member of an ensemble: no route flattens each"
        return Decision(Route("adamw"), text, "likely")
    return found._replace(reason=f"{found.reason}, one per member of an ensemble")


def _decide(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Decision]:
    context = _Context(shapes)
    found = {name: context.decide(name, shape) for name, shape in shapes.items()}
    return {
        name: fused_names.doubted(name, shapes, doubted_by_name(name, each))
        for name, each in found.items()
    }


class _Context:
    """All parameters together: which names repeat, and which sizes are common."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.templates = Counter((template(name), shape) for name, shape in shapes.items())
        self.gates = NamedGates(shapes)
        windows = (name for name, s in shapes.items() if len(s) > 2 and s[0] > 1)
        self.first_window = next(windows, None)
        self.matrices: dict[str, Named] = {}
        for name, shape in shapes.items():
            if len(shape) == 2 and min(shape) > 1:
                self.matrices[name] = read(
                    name,
                    (shape[0], shape[1]),
                    is_repeated=self.templates[template(name), shape] > 1,
                )
        hidden = [m for m in self.matrices.values() if not (m.embedding or m.head) or m.in_block]
        self.sizes = Counter(size for m in hidden for size in m.shape)
        common = self.sizes.most_common(1)
        self.width = common[0][0] if common else None
        self.largest = max((max(m.shape) for m in hidden if m.in_block), default=0)
        order = list(self.matrices)
        outside = [m.name for m in self.matrices.values() if not m.in_block]
        place = {name: at for at, name in enumerate(order)}
        blocks = [place[m.name] for m in self.matrices.values() if m.in_block]
        self.first = {n for n in outside if place[n] < (min(blocks) if blocks else 1)}
        self.last = {n for n in outside if place[n] > (max(blocks) if blocks else len(order) - 2)}
        self.tables = {m.shape for m in self.matrices.values() if m.embedding == "strong"}
        self.columns = Counter(m.shape[1] for m in self.matrices.values())
        self.chains, self.head_ends = chain_ends(self.matrices), head_ends(self.matrices)

    def decide(self, name: str, shape: tuple[int, ...]) -> Decision:
        if len(shape) < 2:
            return Decision(Route("adamw"), f"{len(shape)}-D")
        if 0 in shape:
            return Decision(Route("frozen"), "no entries")
        if sum(size != 1 for size in shape) < 2:
            return Decision(Route("adamw"), "vector: one dimension alone is larger than 1")
        leaf = leaf_of(name)
        if words.is_biases(leaf) or self._is_affine(name, shape):
            return Decision(Route("adamw"), "biases or scales, one vector per row")
        if len(shape) == 2 and _is_vector(name) and not self._has_bias(name, shape[0]):
            text = "scales of norms, by name, one vector per row"
            return Decision(Route("adamw"), text, "untold")
        adapter = adapters.by_name(name, shape)
        if adapter is not None:
            return adapter
        if len(shape) == 2:
            return self._matrix(self.matrices[name])
        return self._stack(name, leaf, shape)

    def _is_affine(self, name: str, shape: tuple[int, ...]) -> bool:
        """A weight whose bias has its shape is a norm's."""
        stem, _, leaf = name.rpartition(".")
        return leaf == "weight" and self.shapes.get(f"{stem}.bias") == shape

    def _has_bias(self, name: str, rows: int) -> bool:
        """Whether it is a linear layer's weight, whose bias has as many entries as it has rows."""
        return self.shapes.get(f"{name.rpartition('.')[0]}.bias") == (rows,)

    def _stack(self, name: str, leaf: str, shape: tuple[int, ...]) -> Decision:
        own = unwrapped(name)[-1] if unwrapped(name) else leaf
        named = words.is_table(leaf) if leaf not in LEAVES else words.embedding(own) == "strong"
        named = named and not (leaf in LEAVES and is_window(shape))
        if named and "expert" not in name:
            return Decision(Route("adamw"), "table of vectors, by name")
        if shape[0] == 1 and "expert" not in name:
            return Decision(Route("adamw"), "table of vectors: one of them", "likely")
        if len(shape) == 3 and words.head(own) == "strong" and not is_window(shape):
            return Decision(Route("adamw"), "output heads, one per codebook or task, by name")
        if words.head(own) == "strong" and all(size == 1 for size in shape[2:]):
            return Decision(Route("adamw"), "output head, by name: a convolution of one place")
        if shape[1] == 1 and shape[0] > 1 and (len(shape) == 3 or max(shape[2:]) <= 11):
            if name == self.first_window and self.templates[template(name), shape] == 1:
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
        found = self.gates.decide(m) or (None if m.is_weight else self._of_no_layer(m))
        if found is not None:
            return found
        vocabulary = self._vocabulary(m)
        if m.in_block:
            return self._inside(m, vocabulary)
        looked_up = vocabulary and rows > cols
        if m.embedding == "weak" and not looked_up and self.columns[rows] > 0:
            return Decision(Route(), "matrix: named as an embedding, of patches or such", "likely")
        if m.embedding == "strong" or (m.embedding and (vocabulary or m.name in self.first)):
            wide = self.sizes[rows] > 1 and not words.is_well_known(m.own)
            sure = vocabulary or (m.embedding == "strong" and not wide)
            return Decision(Route("adamw"), _NAMED, "certain" if sure else "likely")
        if m.head and not self._ends_its_own(m):
            return Decision(Route(), "matrix: a layer before the last of a head")
        if m.head == "strong":
            return Decision(Route("adamw"), _NAMED, "untold" if rows == cols else "certain")
        if m.name in self.head_ends and (self.columns[rows] == 0 or 8 * rows <= cols):
            sure = self.head_ends[m.name] and rows < cols
            return Decision(
                Route("adamw"), "last layer of a head, by name", "certain" if sure else "likely"
            )
        unique = self.sizes[rows] - (m.head is None) < 1 and self.columns[rows] == 0
        if m.head or m.embedding:
            if vocabulary or (unique and m.name in self.last):
                sure = self.columns[rows] == 0 and self._is_near_the_top(m)
                return Decision(
                    Route("adamw"),
                    "output head, by name and shape",
                    "certain" if sure else "likely",
                )
            if m.by_parent:
                return Decision(Route(), "matrix")
            if unique or m.embedding:
                return Decision(Route("adamw"), "output head, by name alone", "likely")
            return Decision(
                Route(), "matrix: named as a head, with outputs as other layers have", "untold"
            )
        table = self._table(m)
        if table is not None:
            return table
        if vocabulary and rows > cols and (m.name in self.first or m.name in self.last):
            return Decision(Route("adamw"), f"vocabulary of {rows}, by shape", "likely")
        ends = (m.name in self.last and unique) or (
            m.name in self.first | self.last and rows > cols and self.columns[rows] == 0
        )
        chained = m.name in self.last and m.is_weight and self.columns[rows] == 0
        enough = len(self.matrices) > 2 or (len(self.matrices) == 2 and chained)
        if enough and ends and cols in self.sizes:
            what = (
                "last layer, which may be an output head"
                if m.name in self.last
                else "first layer, which may be an embedding"
            )
            return Decision(Route(), f"matrix: the {what}", "untold")
        return Decision(Route(), "matrix")

    def _is_near_the_top(self, m: Named) -> bool:
        """Whether no part of a model, but for the model itself, stands around it."""
        around = m.layer[: -2 if m.by_parent or m.layer[-1].isdigit() else -1]
        return all(words.is_model(part) for part in around)

    def _of_no_layer(self, m: Named) -> Decision | None:
        """A parameter that is no layer's weight: a table of vectors, or a few of them."""
        if m.embedding is not None or m.head is not None:
            return None
        if words.is_table(m.own):
            return Decision(Route("adamw"), "table of vectors, by name")
        stem = m.name.rpartition(".")[0]
        if m.own == "D" and f"{stem}.A_log" in self.shapes:
            return Decision(Route("adamw"), "a state space's D: a scale per channel")
        query = re.search(r"quer(y|ies)$", m.own) and m.shape[0] != m.shape[1]
        if query and f"{stem}.key" not in self.shapes:
            return Decision(Route("adamw"), "queries that are learned, by name", "likely")
        few, many = sorted(m.shape)
        if few <= _FEW and 16 * few <= many and stem and not m.own.startswith(("weight_", "in_")):
            return Decision(Route("adamw"), f"{few} vectors of {many}, of no known layer", "untold")
        return None

    def _table(self, m: Named) -> Decision | None:
        """A layer's weight outside the blocks whose rows, by its name, are vectors."""
        before = m.layer[-2] if len(m.layer) > 1 else ""
        own = {*words.words_of(m.own)}
        unique = self.columns[m.shape[0]] == 0 and self.sizes[m.shape[0]] < 2
        if words.embedding(before) == "strong" and not words.is_projection(m.own):
            return Decision(Route("adamw"), "table of vectors, by its module's name", "likely")
        if own & {"bias", "biases"}:
            return Decision(Route("adamw"), "biases, by name", "likely")
        if own & {"query", "queries", "reference", "anchors"} and unique:
            return Decision(Route("adamw"), "queries that are learned, by name", "likely")
        return None

    def _inside(self, m: Named, vocabulary: bool) -> Decision:
        if m.embedding == "strong" or (not m.is_weight and words.is_table(m.own)):
            rows, cols = m.shape
            sure = rows != cols and not (m.is_weight and cols == self.width and 4 * rows >= cols)
            return Decision(
                Route("adamw"), "table of vectors, by name", "certain" if sure else "untold"
            )
        if m.head == "strong" and m.own.lower() not in ("heads", "logits", "score", "classifier"):
            hidden = all(self.sizes[size] > 1 for size in m.shape) and not vocabulary
            if not hidden:
                return Decision(Route("adamw"), "output head of a block, by name", "likely")
            return Decision(Route(), "matrix: named as a head, inside a block", "untold")
        return Decision(Route(), "matrix")

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
