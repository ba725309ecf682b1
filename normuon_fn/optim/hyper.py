"""The hyperparameters of parameter groups: checked, written into one `Hyper`, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..distributed.placements import local
from ..types import ONE, Hyper, check_number

Groups = Sequence[Mapping[str, Any]]
_NUMBERS = ("lr", "momentum", "beta2", "weight_decay", "adamw_eps")
_KEYS = (  # by field of `Hyper`: the key of a group that it comes from
    "lr", "momentum", "beta2", "weight_decay",
    "lr", "adamw_betas", "adamw_betas", "adamw_eps", "weight_decay",
)  # fmt: skip


class GroupHyper:
    """A `Hyper` that follows the parameter groups; its tensors stay the same objects.

    Its tensors have one entry per group, and are 0-d if there is only one group.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        shape = () if groups == 1 else (groups,)
        self.hyper = Hyper(
            *(torch.zeros(shape, dtype=torch.float32, device=device) for _ in Hyper._fields)
        )
        self._written: list[list[Any]] = [[None] * len(Hyper._fields) for _ in range(groups)]

    @property
    def several(self) -> bool:
        return len(self._written) > 1

    def follow(self, groups: Groups) -> None:
        """Writes the groups' values without waiting: a float only if it changed, a tensor always.

        Raises:
            TypeError, ValueError: a value that changed to one that no step can take.
        """
        for k, (group, written) in enumerate(zip(groups, self._written, strict=False)):
            for field, value in enumerate(_values(group)):
                is_tensor = isinstance(value, Tensor)
                if not is_tensor:
                    if value == written[field]:
                        continue
                    _check_value(f"param_groups[{k}]: {_KEYS[field]}", value)
                own = self.hyper[field][k] if self.several else self.hyper[field]
                if is_tensor:
                    # The device reads pinned memory later, when it may contain the next value.
                    own.copy_(value.detach().reshape(()), non_blocking=not value.is_pinned())
                else:
                    own.fill_(value)
                written[field] = None if is_tensor else value


def unscale(optimizer: Any, grads: Iterable[Tensor | None], into: Tensor) -> Tensor | None:
    """Unscales by what a GradScaler left in the optimizer. Its ``found_inf`` comes in ``into``."""
    scale, found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    if scale is not None:
        inverse = scale.double().reciprocal().float().reshape(())
        torch._foreach_mul_([local(grad) for grad in grads if grad is not None], inverse)
    if found_inf is None:
        return None
    return into.copy_(found_inf.reshape(()), non_blocking=True)


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A group's hyperparameters in the order of `Hyper`'s fields."""
    lr, decay = group["lr"], group["weight_decay"]
    return (
        lr, group["momentum"], group["beta2"], decay,
        lr, *group["adamw_betas"], group["adamw_eps"], decay,
    )  # fmt: skip


def check_hyperparameters(group: dict[str, Any], where: str = "") -> None:
    """Checks a group's hyperparameters, and makes numbers of other libraries Python's numbers.

    ``where`` stands before the name of the parameter in a message.

    Raises:
        TypeError, ValueError: naming the hyperparameter.
    """
    if group["algorithm"] not in ("normuon", "adamw"):
        raise ValueError(
            f"{where}algorithm: expected 'normuon' or 'adamw', got {group['algorithm']!r}; "
            "to freeze parameters, set requires_grad to False"
        )
    betas = group["adamw_betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{where}adamw_betas: expected two numbers, got {betas!r}")
    group |= {key: _number(group[key]) for key in _NUMBERS}
    numbers = [*map(_number, betas)]
    group["adamw_betas"] = numbers if isinstance(betas, list) else tuple(numbers)
    for name, value in zip(_KEYS, _values(group), strict=True):
        if not isinstance(value, Tensor):
            _check_value(where + name, value)
        elif value.numel() != 1:
            raise ValueError(
                f"{where}{name}: expected a number or a tensor of one element, "
                f"got shape {tuple(value.shape)}"
            )


def _check_value(name: str, value: Any) -> None:
    value = _number(value)
    check_number(name, value)
    if name.endswith(("momentum", "beta2", "adamw_betas")) and value >= ONE:
        raise ValueError(f"{name}: expected a number in [0, 1) in float32, got {value!r}")


def _number(value: Any) -> Any:
    """A numpy scalar or another library's number as Python's float; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    return float(value) if isinstance(value, Real) else value


def plain(value: Any) -> Any:
    """Numbers for tensors of one element and numpy scalars, also inside dicts, tuples and lists.

    ``torch.load(weights_only=True)`` can read the result.
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    one = value.numel() == 1 if isinstance(value, Tensor) else getattr(value, "ndim", None) == 0
    return value.item() if one else value


def saved_groups(groups: Groups, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values that a ``state_dict`` has for each group, checked. Nothing is written.

    Raises:
        TypeError, ValueError: the groups are not those of this optimizer, or have a value that it
            cannot take.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict: expected the keys 'state' and 'param_groups', "
            f"got {sorted(map(str, state_dict))}"
        )
    saved = state_dict["param_groups"]
    own_sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved))
    if own_sizes != saved_sizes:
        raise ValueError(
            f"state_dict: expected groups of {own_sizes} parameters, got {saved_sizes}"
        )
    found = []
    for k, (own, other) in enumerate(zip(groups, saved, strict=True)):
        if other.get("algorithm") != own["algorithm"]:
            raise ValueError(
                f"state_dict: group {k} has algorithm {other.get('algorithm')!r}, "
                f"expected {own['algorithm']!r}; was it saved by another optimizer?"
            )
        new = {
            key: copy.deepcopy(value)
            for key, value in other.items()
            if key not in ("params", "param_names")
        }
        both = {**own, **new}
        check_hyperparameters(both, f"state_dict: group {k}: ")
        found.append({key: both[key] for key in new})
    return found


def load_groups(groups: Sequence[dict[str, Any]], saved: Groups) -> None:
    """Writes what `saved_groups` found. A tensor of one element stays that tensor."""
    for own, other in zip(groups, saved, strict=True):
        for key, value in other.items():
            into, number = own.get(key), plain(value)
            if isinstance(into, Tensor) and into.numel() == 1 and isinstance(number, (int, float)):
                into.detach().fill_(number)
            else:
                own[key] = value
