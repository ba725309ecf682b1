"""Low-rank factors that are told by their sizes, as people write LoRA by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from torch import Tensor, nn

from . import words
from .attributes import get, is_a, is_layer, kind_of, outputs_and_inputs
from .routes import Decision, Route
from .uses import Use, unwrapped

_MANY = 64  # parameters or layers of one module: each is compared with all others
_OF_HEAD = "low-rank factor of an output head: its rows are the head's outputs"


def decide(use: Use, *, of_head: bool) -> Decision | None:
    """The rule of a parameter that is one of two factors beside a frozen layer; else ``None``.

    The two are chained, [rank, inputs] and [outputs, rank] or their transposes, and their module
    is the frozen layer, holds it, or stands beside it. ``of_head``: that layer is an output head.
    """
    owner, shape = use.owners[0], use.shape
    if len(shape) != 2 or use.leaf == "weight" or words.is_table(use.leaf):
        return None
    if len(owner._parameters) > _MANY or not (layers := [*_frozen(use.owners)]):
        return None
    others = [
        tuple(p.shape)
        for name, p in owner._parameters.items()
        if p is not None and p is not use.tensor and p.ndim == 2 and name != "weight"
    ]
    for layer, outputs, inputs in layers:
        for side, own, other in (("a", inputs, outputs), ("b", outputs, inputs)):
            if any(_chained(shape, own, each, other) for each in others):
                what = f"low-rank factor beside a frozen {kind_of(layer)} of {outputs}x{inputs}"
                if is_a(layer, nn.Embedding):
                    return Decision(Route("adamw"), what)
                if side == "b" and (of_head or _adapts_a_head(use, 3)):
                    return Decision(Route("adamw"), _OF_HEAD)
                return Decision(Route(), f"{what}: a matrix of its own")
    return None


def adapts_a_head(use: Use) -> bool:
    """Whether the module that holds a parameter is named as an output head."""
    return _adapts_a_head(use, 2)


def _adapts_a_head(use: Use, depth: int) -> bool:
    return any(words.head(part) == "strong" for part in unwrapped(use.name)[-depth:-1])


def _frozen(owners: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, int, int]]:
    """The frozen layers that the nearest module is, holds or has beside it: outputs and inputs."""
    around = [child for owner in owners[:2] for child in islice(owner.children(), _MANY)]
    for layer in (owners[0], *around):
        weight = get(layer, "weight")
        if not isinstance(weight, Tensor) or weight.requires_grad:
            continue
        outputs, inputs = get(layer, "out_features"), get(layer, "in_features")
        if isinstance(outputs, int) and isinstance(inputs, int):  # also of a packed weight
            yield layer, outputs, inputs
        elif weight.ndim == 2 and (is_layer(layer) or is_a(layer, nn.Embedding)):
            yield layer, *outputs_and_inputs(layer)


def _chained(shape: tuple[int, ...], own: int, other_shape: tuple[int, ...], other: int) -> bool:
    """Whether a factor with ``own`` and one with ``other`` are chained by a smaller rank."""
    return any(  # k is where the rank stands in this factor; in the other one it is at 1 - k
        shape[k] < min(own, other)
        and (shape[1 - k], other_shape[1 - k], other_shape[k]) == (own, shape[k], other)
        for k in (0, 1)
    )
