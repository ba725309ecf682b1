"""The hyperparameters of parameter groups: checked, written into one `Hyper`, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..routing.doubts import warn_at_caller
from ..routing.routes import Route
from ..types import ONE, Config, Hyper, check_number
from ..types.hyper import BETA2, EPS
from .written_rates import BASE, WrittenRates

Groups = Sequence[Mapping[str, Any]]
OF_ADAMW = {"lr": "adamw_lr", "weight_decay": "adamw_weight_decay"}  # None: the same as the first
_NUMBERS = ("lr", "momentum", "beta2", "weight_decay", "adamw_eps", *OF_ADAMW.values())
_KEYS = (  # by field of `Hyper`: the key of a group that it comes from
    "lr", "momentum", "beta2", "weight_decay",
    "adamw_lr", "adamw_betas", "adamw_betas", "adamw_eps", "adamw_weight_decay",
)  # fmt: skip
_NOTHING = object()  # not None, which somebody may write


class GroupHyper:
    """A `Hyper` that follows the parameter groups; its tensors stay the same objects.

    Its tensors have one entry per group, and are 0-d if there is only one group.
    """

    def __init__(self, groups: Groups, count: int, device: torch.device) -> None:
        shape = () if count == 1 else (count,)
        self.hyper = Hyper(
            *(torch.zeros(shape, dtype=torch.float32, device=device) for _ in Hyper._fields)
        )
        self._written: list[list[Any]] = [[_NOTHING] * len(Hyper._fields) for _ in range(count)]
        self.written_rates = WrittenRates(groups)
        self.followed = False  # whether a step has used these values

    @property
    def several(self) -> bool:
        return len(self._written) > 1

    def follow(self, groups: Groups) -> None:
        """Writes the groups' values without waiting: a float only if it changed, a tensor always.

        Raises:
            TypeError, ValueError: a value that changed to one that no step can take.
        """
        for k, (group, written) in enumerate(zip(groups, self._written, strict=False)):
            for field, value in enumerate(_values(group, k)):
                is_tensor = isinstance(value, Tensor)
                if not is_tensor and value == written[field]:
                    continue
                if not is_tensor or value.numel() != 1:
                    check_value(f"param_groups[{k}]: {_KEYS[field]}", value)
                own = self.hyper[field][k] if self.several else self.hyper[field]
                if is_tensor:
                    # The device reads pinned memory later, when it may contain the next value.
                    own.copy_(value.detach().reshape(()), non_blocking=not value.is_pinned())
                else:
                    own.fill_(value)
                written[field] = _NOTHING if is_tensor else value
        self.followed = True
        self.written_rates.look(groups)

    def rates(self, group: Mapping[str, Any], k: int) -> tuple[float, float]:
        """``lr`` and AdamW's ``lr`` of the last step of group ``k``; before it, what it would use.

        A tensor's value is read, which waits for the device.
        """
        found = []
        for field in map(Hyper._fields.index, ("lr", "adamw_lr")):
            value: Any = self._written[k][field] if k < len(self._written) else _NOTHING
            if value is _NOTHING:
                own = self.hyper[field][k] if self.several else self.hyper[field]
                value = own if self.followed else _values(group, k)[field]
            found.append(float(value))
        return found[0], found[1]


def _values(group: Mapping[str, Any], k: int) -> tuple[Any, ...]:
    """The hyperparameters of group ``k`` in the order of `Hyper`'s fields."""
    try:
        decay, betas = group["weight_decay"], group["adamw_betas"]
        check_betas(f"param_groups[{k}]: ", betas)
        of_adamw = group.get("adamw_weight_decay")
        return (
            group["lr"], group["momentum"], group["beta2"], decay,
            adamw_lr_of(group), *betas, group["adamw_eps"],
            decay if of_adamw is None else of_adamw,
        )  # fmt: skip
    except KeyError as error:
        key = error.args[0]
        raise ValueError(
            f"param_groups[{k}]: has no {key!r} any more; write param_groups[{k}][{key!r}] = ..."
        ) from None


def check_betas(where: str, betas: Any) -> None:
    """Refuses what are not two values, with a TypeError."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{where}adamw_betas: expected two numbers, got {betas!r}")


def adamw_lr_of(group: Mapping[str, Any]) -> Any:
    """AdamW's learning rate now: ``adamw_lr``, times what became of ``lr`` since it was added.

    So everything that moves ``lr`` moves AdamW's rate in proportion. Nothing waits for a tensor.
    """
    lr, peak = group["lr"], group.get("adamw_lr")
    if peak is None:
        return lr
    base = group.get(BASE)
    if base is None or not base > 0:
        raise ValueError(
            "adamw_lr: is AdamW's rate while lr is what it was when its group was added, and "
            f"follows lr from there; expected an lr > 0 by then, got {base!r}. Write lr at its "
            "peak and let a scheduler begin at 0, or give AdamW's parameters a group with "
            "algorithm='adamw' and an lr of their own"
        )
    if isinstance(lr, Tensor) or isinstance(peak, Tensor):
        each = [x.detach().reshape(()) if isinstance(x, Tensor) else x for x in (peak, lr)]
        return each[0] * (each[1] / base)
    return peak if lr == base else peak * (lr / base)


def remember_base(group: dict[str, Any], written: Mapping[str, Any]) -> None:
    """Settles AdamW's own values of a group that is being added; ``written`` are its own keys.

    In a group with ``algorithm="adamw"``, ``lr`` and ``weight_decay`` are AdamW's: there they go
    before the constructor's ``adamw_lr`` and ``adamw_weight_decay``.
    """
    if group["algorithm"] == "adamw" and BASE not in written:
        for key, of_adamw in OF_ADAMW.items():
            if key in written and written.get(of_adamw) is None:
                group[of_adamw] = None
    lr = group["lr"]
    if BASE not in group and (group.get("adamw_lr") is not None or not isinstance(lr, Tensor)):
        is_number = lr.numel() == 1 if isinstance(lr, Tensor) else isinstance(lr, Real)
        group[BASE] = float(lr) if is_number else None
    group.setdefault(BASE, None)


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
    check_betas(where, betas)
    group |= {key: _number(group[key]) for key in _NUMBERS if key in group}
    numbers = [*map(_number, betas)]
    group["adamw_betas"] = numbers if isinstance(betas, list) else tuple(numbers)
    own = {key: group.get(key) for key in ("lr", *OF_ADAMW.values())}
    for name, value in own.items():  # before AdamW's rate is computed from them
        if value is not None:
            check_value(where + name, value)
    for name, value in zip(_KEYS, _values(group, 0), strict=True):
        check_value(where + name, value)


def check_read(group: Mapping[str, Any], config: Config) -> None:
    """Refuses a hyperparameter of a group that no rule reads.

    Raises:
        TypeError: naming it.
    """
    if config.other == "lion" and plain(group["adamw_eps"]) != EPS:
        raise TypeError(
            f"adamw_eps: {group['adamw_eps']!r} has no effect: Config(other='lion') has signs, "
            "which no eps changes; leave it out"
        )
    if not config.normalize and plain(group["beta2"]) != BETA2:
        raise TypeError(
            f"beta2: {group['beta2']!r} has no effect: Config(normalize=False) leaves out the "
            "variance that it is about; leave it out"
        )


def say_if_nothing_decays(
    defaults: Mapping[str, Any], routes: Sequence[Route], config: Config
) -> None:
    """Warns of a weight decay where all parameters are matrices that keep their norms."""
    moved = [route for route in routes if route.algorithm != "frozen"]
    if plain(defaults["weight_decay"]) == 0.0 or not moved:
        return
    if all(
        route.algorithm == "normuon" and route.of_matrices(config)[0] == "hyperball"
        for route in moved
    ):
        warn_at_caller(
            f"weight_decay: {defaults['weight_decay']!r} has no effect: all parameters are matrices"
            " with weight_decay_form='hyperball', which keep their norms; leave it out, or give "
            "those that are to decay Route(weight_decay_form='decoupled')"
        )


def check_value(name: str, value: Any) -> None:
    """Refuses what is no number of its kind, with a TypeError or ValueError that names it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected a number or a tensor of one element, "
                f"got shape {tuple(value.shape)}"
            )
        return
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


def loading(groups: Sequence[dict[str, Any]], saved: Groups) -> Callable[[], None]:
    """A function that writes the values which `saved.read` found. Nothing is written before.

    A tensor of one element stays that tensor. One that several groups share stays shared by those
    with the first one's value; the others get a tensor of their own, and a warning says so.
    """
    fills: list[tuple[Tensor, float]] = []
    numbers: dict[int, float] = {}  # by tensor
    parted: list[str] = []

    def loaded(where: str, into: Any, value: Any) -> Any:
        number = plain(value)
        if type(into) in (tuple, list) and type(value) in (tuple, list) and len(into) == len(value):
            return type(value)(loaded(where, *pair) for pair in zip(into, value, strict=True))
        if (
            not isinstance(into, Tensor)
            or into.numel() != 1
            or not isinstance(number, (int, float))
        ):
            return value
        if numbers.setdefault(id(into), number) != number:
            parted.append(where)
            into = into.detach().clone()
        fills.append((into.detach(), number))
        return into

    new = [
        {
            key: loaded(f"param_groups[{k}][{key!r}]", own.get(key), value)
            for key, value in other.items()
        }
        for k, (own, other) in enumerate(zip(groups, saved, strict=True))
    ]
    if parted:
        warn_at_caller(
            f"state_dict: {', '.join(parted)} shares a tensor with an earlier group, for which "
            "another value was saved: it gets a tensor of its own, and no longer follows the "
            "shared one"
        )

    def write() -> None:
        for into, number in fills:
            into.fill_(number)
        for own, values in zip(groups, new, strict=True):
            own.update(values)

    return write
