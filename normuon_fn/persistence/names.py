"""In which order another optimizer had its parameters, from itself or from its saved state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.doubts import warn_at_caller
from .other_optimizers import StateDict

_SHAPED = ("exp_avg", "momentum_buffer", "momentum", "exp_avg_sq")  # kinds shaped as the parameter


def names_in(
    optimizer: torch.optim.Optimizer | StateDict,
    params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> list[str]:
    """The names of an optimizer's parameters in its own order: the ``names`` of `convert_state`.

    Some optimizers sort their parameters, so that the order is not the model's.

    Args:
        optimizer: the optimizer; or, where only a file is left of it, its ``state_dict()``. One
            without names is taken in the order of ``params``, with a warning, if it has as many
            parameters and their shapes, and one group or groups without a shape in common.
        params: the model, ``model.named_parameters()``, or a dict of it.

    Raises:
        TypeError: ``optimizer`` is neither.
        ValueError: ``params`` lacks a parameter that the optimizer has; or a ``state_dict()`` does
            not tell the names.
    """
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    named = dict(params.items() if isinstance(params, Mapping) else params)
    if isinstance(optimizer, Mapping):
        return _names_in_state(optimizer, named)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "optimizer: expected an optimizer or its state_dict(), got "
            f"{type(optimizer).__name__}; write nm.names_in(optimizer, model.named_parameters())"
        )
    known = {id(p): name for name, p in named.items()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [tuple(p.shape) for p in own if id(p) not in known]
    if missing:
        raise ValueError(
            f"params: expected all of the optimizer's parameters, got none for {len(missing)} of "
            f"them, of shapes {missing[:8]}"
        )
    return [known[id(p)] for p in own]


def _names_in_state(source: StateDict, named: Mapping[str, Tensor]) -> list[str]:
    if not {"state", "param_groups"} <= source.keys():
        raise ValueError(
            "optimizer: expected an optimizer's state_dict(), with 'state' and 'param_groups', got "
            f"a dict with {sorted(map(str, source))[:8]}; a checkpoint has it under one of its keys"
        )
    groups = source["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = own_names(source)
    if len(names) == len(keys):
        return names
    unlike = _unlike(source, keys, named)
    if len(groups) == 1 and unlike is None:
        warn_at_caller(
            f"names_in: the state_dict has no names; its {len(keys)} parameters are taken in the "
            "order of params, which have the same shapes. If the optimizer sorted them, make it "
            "again as it was made and write nm.names_in(optimizer, model.named_parameters())"
        )
        return [*named]
    if len(groups) > 1 and (found := _in_groups(source, named)) is not None:
        warn_at_caller(
            f"names_in: the state_dict has no names; its {len(groups)} groups have no shape in "
            "common, and the parameters of each are taken in the order of params. If the optimizer "
            "sorted them, make it again as it was made and write "
            "nm.names_in(optimizer, model.named_parameters())"
        )
        return found
    several = f"it has {len(groups)} groups" if len(groups) > 1 else unlike
    raise ValueError(
        f"optimizer: its state_dict() has no names, and {several}, so its order is not that of "
        "params. Make the optimizer again by the lines that made it, and write "
        "nm.names_in(optimizer, model.named_parameters()); or write the names in the order of its "
        "groups"
    )


def _in_groups(source: StateDict, named: Mapping[str, Tensor]) -> list[str] | None:
    """The names where each group has shapes of its own, as matrices and vectors have.

    Every group is then in the order of ``named``; ``None`` where it cannot be told.
    """
    left = {name: tuple(p.shape) for name, p in named.items()}
    found: list[str] = []
    for group in source["param_groups"]:
        shapes = [_shape_of(source["state"].get(key)) for key in group["params"]]
        own = {name: shape for name, shape in left.items() if shape in shapes}
        if None in shapes or [*own.values()] != shapes:
            return None
        found += own
        left = {name: shape for name, shape in left.items() if name not in own}
    return None if left else found


def _shape_of(kinds: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    shaped = [x for kind in _SHAPED if isinstance(x := (kinds or {}).get(kind), Tensor)]
    return tuple(shaped[0].shape) if shaped else None


def own_names(source: StateDict) -> list[str]:
    """The names that a ``state_dict()`` has itself, in its order; fewer if it has none."""
    keys = [key for group in source["param_groups"] for key in group["params"]]
    if keys and all(isinstance(key, str) for key in keys):
        return keys
    return [name for group in source["param_groups"] for name in group.get("param_names", ())]


def _unlike(source: StateDict, keys: list[Any], named: Mapping[str, Tensor]) -> str | None:
    """Why a state cannot be that of these parameters in this order, if it cannot."""
    if len(keys) != len(named):
        return f"it has {len(keys)} parameters where params has {len(named)}"
    for key, (name, p) in zip(keys, named.items(), strict=True):
        shape = _shape_of(source["state"].get(key))
        if shape not in (None, tuple(p.shape)):
            return f"its state has shape {shape} where {name!r} has {tuple(p.shape)}"
    return None
