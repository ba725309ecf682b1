"""Where a layer stands in its model, and what that says against its name, or for no name at all.

The order is that in which modules were registered, which is mostly the order in which they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from . import words
from .attributes import get, is_a, is_layer, kind_of, outputs_and_inputs
from .projections import is_of_attention

LAST = "the last layer, which may be an output head"
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Doubt(NamedTuple):
    """What speaks against a head that was told by its name."""

    is_matrix: bool  # whether it is taken for one
    reason: str


def against(name: str, layer: nn.Module, owner: nn.Module, *, is_strong: bool) -> Doubt | None:
    """What speaks against a layer that is called a head, by the other layers of its model.

    ``name``: that of the child of ``owner`` that is the layer, or has it.
    """
    outputs, inputs = outputs_and_inputs(layer)
    found = [(path, m) for path, m in owner.named_modules() if is_layer(m)]
    layers = [m for _, m in found]
    at = next((k for k, m in enumerate(layers) if m is layer), None)
    if at is None:  # a wrapper's own kind of layer
        return None
    behind = found[at + 1 :]
    if (not is_strong or outputs == inputs) and _is_beside_queries(owner, layer):
        return Doubt(True, "named as a head, beside the queries of an attention")
    if is_strong and (layers[0] is not layer or not behind or outputs < inputs):
        return None
    rest = (m for path, m in behind if not any(p == name or words.head(p) for p in path.split(".")))
    first = next((m for path, m in found if path.split(".")[0] == name), layer)
    taken_in = outputs_and_inputs(first)[1]
    later = next((m for m in rest if outputs_and_inputs(m)[1] != taken_in), None)
    if later is None:
        square = outputs == inputs and len(layers) > 1 and not is_strong
        return Doubt(False, "by name, although it is square") if square else None
    place = "the first layer" if layers[0] is layer else "followed by other layers"
    taken = outputs_and_inputs(later)[1]
    if not is_strong and (outputs > inputs or outputs % taken == 0 or taken % outputs == 0):
        return Doubt(True, f"named as a head, but {place}")
    return Doubt(False, f"by name, although it is {place}")


def _is_beside_queries(owner: nn.Module, layer: nn.Module) -> bool:
    """Whether it is square, or puts out what the projections of an attention beside it take in."""
    outputs, inputs = outputs_and_inputs(layer)
    beside = [m for name, m in owner.named_children() if is_of_attention(name) and is_layer(m)]
    if "att" not in kind_of(owner).lower() and not beside:
        return False
    return outputs == inputs or any(outputs_and_inputs(m)[1] == outputs for m in beside)


class Ends:
    """The layers at the end of a model, whose outputs nothing in it takes in."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        distinct = {id(m): m for m in modules}.values()
        self._taken = Counter(size for module in distinct for size in _takes(module))

    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """The last layer of the last part of a model, and of the parts beside it."""
        # A chain that puts out as many as it takes in may be a block of something larger.
        is_chain = type(model) is nn.Sequential
        taken_in = next((outputs_and_inputs(m)[1] for m in model.modules() if is_layer(m)), 0)
        units = list(_units(model))
        beside = None
        for unit in reversed(units):
            layers = [m for m in unit.modules() if is_layer(m)]
            if not layers:
                continue
            first = outputs_and_inputs(layers[0])[1]
            if beside not in (None, first) or len(units) < 2:
                return
            outputs, inputs = outputs_and_inputs(layers[-1])
            is_last = is_chain and beside is None and unit is layers[-1] and outputs != taken_in
            if not is_last and self._is_taken(outputs, inputs):
                return
            yield layers[-1]
            beside = first

    def _is_taken(self, outputs: int, inputs: int) -> bool:
        return outputs == inputs or self._taken[outputs] > 0


def _units(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if is_a(child, *CONTAINERS):
            yield from child.children()
        else:
            yield child


def _takes(module: nn.Module) -> tuple[int, ...]:
    """The sizes that a module takes in: of a norm, what it scales; of an embedding, its width."""
    if not module._parameters:
        return ()
    if is_layer(module):
        outputs, inputs = outputs_and_inputs(module)
        return () if outputs == inputs else (inputs,)
    names = (
        "input_size", "embed_dim", "embedding_dim", "num_features", "num_channels", "in1_features",
        "in2_features",
    )  # fmt: skip
    found = [get(module, name) for name in names]
    shape = get(module, "normalized_shape")
    found += list(shape) if isinstance(shape, tuple) else []
    return tuple(size for size in found if isinstance(size, int))
