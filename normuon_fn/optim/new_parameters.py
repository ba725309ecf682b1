"""Parameters that no step moves: those without a gradient, and those that a model got later."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..routing.doubts import warn_at_caller

_SHOWN = 8


def notes_of(named: Mapping[str, Tensor], chosen: Sequence[bool], had: set[str]) -> list[str]:
    """The lines of a plan about trained parameters that are not in it. ``had``: a gradient ever."""
    lacking = [
        name
        for (name, p), is_in in zip(named.items(), chosen, strict=True)
        if p.requires_grad and not is_in
    ]
    each = {
        "no gradient yet": [name for name in lacking if name not in had],
        "no gradient in this step": [name for name in lacking if name in had],
    }
    return [f"{what}: {_some(names)}" for what, names in each.items() if names]


class ModelWatch:
    """Says once which parameters a model has got since its optimizer was made, new or instead.

    It looks at the first step, and at the second, the fourth, the eighth and so on: to go through
    the modules takes milliseconds.
    """

    def __init__(self) -> None:
        self._steps = 0
        # by id, a model and the parameters that it had: name -> id
        self._models: dict[int, tuple[weakref.ref[nn.Module], dict[str, int]]] = {}

    def remember(self, models: Iterable[nn.Module]) -> None:
        """Takes what the models have now for what they had when the optimizer was made."""
        for model in models:
            if id(model) not in self._models:
                known = {name: id(p) for name, p in _named(model).items()}
                self._models[id(model)] = weakref.ref(model), known

    def look(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warns of new parameters that have gradients and are in no group."""
        self._steps += 1
        if not self._models or self._steps & (self._steps - 1):
            return
        own = {id(p) for group in groups for p in group["params"]}
        new = [
            name
            for ref, known in self._models.values()
            if (model := ref()) is not None
            for name, p in _named(model).items()
            if p.grad is not None and id(p) not in own
            # One that belongs to another optimizer was there before, under this name.
            if name not in known or (known[name] != id(p) and known[name] in own)
        ]
        if new:
            self._models = {}
            warn_at_caller(
                f"{_some(map(repr, new))}: added to the model, or put in the place of another "
                "parameter, after the optimizer was made, so that no step of this optimizer moves "
                "it, although it has a gradient. Make the optimizer when the model is complete: "
                "optimizer = nm.NorMuon(model, ...); or add what is new: optimizer.add_param_group("
                "{'params': module.named_parameters(prefix='...')}). This is said once"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": 0, "_models": {}}  # a copy's parameters are no model's


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{', '.join(listed[:_SHOWN])}{more}"
