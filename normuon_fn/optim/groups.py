"""Parameter groups and optimizer state in the terms of the step: names, routes, `Hyper`; a state kept, and a saved one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..distributed import placements as mesh
from ..planning.plan import Spec
from ..routing.resolve import Routes, resolve_routes
from ..routing.routes import Route, RouteTable
from ..types import ONE, Config, Guard, Hyper, check_number

Groups = Sequence[Mapping[str, Any]]
_NUMBERS = ("lr", "momentum", "beta2", "weight_decay", "adamw_eps")
_FOREIGN = {
    "betas": "adamw_betas", "eps": "adamw_eps", "mu": "momentum", "muon_beta2": "beta2", "use_muon": "algorithm",
    "adamw_lr": "lr", "adamw_weight_decay": "weight_decay",
}  # fmt: skip
_ELSEWHERE = {  # what asks for something that is elsewhere; None and False ask for nothing
    "maximize": "negate the loss", "amsgrad": "leave it out: there is none", "flatten": "routes={...: Route(flatten=True)}",
    "beta1": "momentum, or adamw_betas for AdamW", "epsilon": "adamw_eps, or NorMuon(config=Config(eps=...)) for matrices",
    "adjust_lr": "NorMuon(config=Config(scale=...))", "adjust_lr_fn": "NorMuon(config=Config(scale=...))",
    "ns_steps": "NorMuon(config=Config(steps=...))", "ns_coefficients": "NorMuon(config=Config(coefficients=...))",
    "cautious_wd": "NorMuon(config=Config(weight_decay_form='cautious'))",
}  # fmt: skip


class Added(NamedTuple):
    """What is remembered of a group that was added."""

    params: list[tuple[str, Tensor]]
    routes: Routes
    algorithm: str


class GroupHyper:
    """A `Hyper` whose tensors stay and follow the groups: an entry a group, 0-d if there is only one."""

    def __init__(self, entries: int, device: torch.device) -> None:
        shape = () if entries == 1 else (entries,)
        self.hyper = Hyper(
            *(torch.zeros(shape, dtype=torch.float32, device=device) for _ in Hyper._fields)
        )
        self._written: list[list[Any]] = [[None] * len(Hyper._fields) for _ in range(entries)]

    @property
    def several(self) -> bool:
        return len(self._written) > 1

    def follow(self, groups: Groups) -> None:
        """Writes what has changed, without a wait: a float only if it is another, a tensor always."""
        for k, (group, written) in enumerate(zip(groups, self._written, strict=False)):
            for field, value in enumerate(_values(group)):
                is_tensor = isinstance(value, Tensor)
                if not is_tensor:
                    if value == written[field]:
                        continue
                    _check_value(f"param_groups[{k}]: {_VALUES[field]}", value)
                own = self.hyper[field][k] if self.several else self.hyper[field]
                if is_tensor:  # pinned memory is read when the device gets there: by then it may hold the next value
                    own.copy_(value.detach().reshape(()), non_blocking=not value.is_pinned())
                else:
                    own.fill_(value)
                written[field] = None if is_tensor else value


_VALUES = (
    "lr",
    "momentum",
    "beta2",
    "weight_decay",
    "lr",
    "adamw_betas",
    "adamw_betas",
    "adamw_eps",
    "weight_decay",
)


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A group's hyperparameters in the order of `Hyper`."""
    lr, decay = group["lr"], group["weight_decay"]
    return (
        lr,
        group["momentum"],
        group["beta2"],
        decay,
        lr,
        *group["adamw_betas"],
        group["adamw_eps"],
        decay,
    )


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Of a group as it is added: later, schedulers write keys of their own into all groups."""
    known = {field.name for field in fields(Config)}
    for key, value in group.items():
        if key in _FOREIGN:
            raise TypeError(f"param_group: {key!r} is called {_FOREIGN[key]!r} here")
        if key in _ELSEWHERE and value is not None and value is not False:
            raise TypeError(
                f"param_group: {key}={value!r} is not for a group here; {_ELSEWHERE[key]}"
            )
        if key in known:
            raise TypeError(
                f"param_group: {key!r} is for all groups: NorMuon(config=Config({key}=...))"
            )
    if group.get("algorithm", defaults["algorithm"]) == "adamw" and not group.get("routes"):
        for key in ("momentum", "beta2"):
            if key in group and group[key] != defaults[key]:
                raise TypeError(
                    f"param_group: {key!r} is for matrices; with algorithm='adamw' give adamw_betas"
                )


def settle_values(group: dict[str, Any], where: str = "") -> None:
    """A group's hyperparameters checked, as Python numbers or tensors of one element."""
    if group["algorithm"] not in ("normuon", "adamw"):
        raise ValueError(
            f"{where}algorithm: expected 'normuon' or 'adamw', got {group['algorithm']!r}; freeze with requires_grad"
        )
    betas = group["adamw_betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{where}adamw_betas: expected two numbers, got {betas!r}")
    group |= {key: _number(group[key]) for key in _NUMBERS}
    group["adamw_betas"] = (
        [*map(_number, betas)] if isinstance(betas, list) else tuple(map(_number, betas))
    )
    for name, value in zip(_VALUES, _values(group), strict=True):
        if not isinstance(value, Tensor):
            _check_value(where + name, value)
        elif value.numel() != 1:
            raise ValueError(
                f"{where}{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}"
            )


def _check_value(name: str, value: Any) -> None:
    value = _number(value)
    check_number(name, value, 0.0)
    if name.endswith(("momentum", "beta2", "adamw_betas")) and value >= ONE:
        raise ValueError(f"{name}: expected a number in [0, 1) in float32, got {value!r}")


def _number(value: Any) -> Any:
    """Of numpy and others, as Python's."""
    if isinstance(value, (int, float)):
        return value
    return float(value) if isinstance(value, Real) else value


def guarded(config: Config | None, guard: Guard | None, nan_guard_fallback: bool) -> Config:
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    if nan_guard_fallback:
        if guard is not None or config.guard != "off":
            raise ValueError(
                "nan_guard_fallback: is guard='output' per bucket; give either it or guard="
            )
        return replace(config, guard="output", guard_scope="bucket")
    return config if guard is None else replace(config, guard=guard)


def route(
    added: Sequence[Added], of_all: Routes | None, named: Mapping[str, Tensor]
) -> dict[str, Route]:
    """The routes that were asked for, by name: the group's, then its algorithm, then the optimizer's."""
    routed = _asked(named, {} if of_all is None else of_all)
    for group in added:
        if group.algorithm == "adamw":  # what is AdamW's already keeps its multipliers
            others = [
                name
                for name, _ in group.params
                if name not in routed or routed[name].algorithm != "adamw"
            ]
            routed |= dict.fromkeys(others, Route("adamw"))
        routed |= _asked(dict(group.params), group.routes)
    return routed


def _asked(named: Mapping[str, Tensor], routes: Routes) -> dict[str, Route]:
    is_table = isinstance(routes, RouteTable)  # which decides about everything
    return {
        name: route.unfrozen
        or route  # only what has a gradient is planned for, unfrozen meanwhile or not
        for name, (route, why) in resolve_routes(named, routes).items()
        if is_table or why.startswith("routes[")
    }


def plain(value: Any) -> Any:
    """A number for a tensor of one element or a numpy scalar: what ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    one = value.numel() == 1 if isinstance(value, Tensor) else getattr(value, "ndim", None) == 0
    return value.item() if one else value


def check_device(device: torch.device, expected: str) -> None:
    if device.type != expected:
        raise ValueError(
            f"graphed=True: expected parameters on a {expected.upper()} device, got {device}; the step is the same without"
        )


def pairs(
    name: str, own: Mapping[str, Tensor], given: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """A parameter's state tensors, each with what is to be copied into it."""
    if own.keys() != given.keys():
        raise ValueError(
            f"state_dict: expected {sorted(own)} for {name!r}, got {sorted(map(str, given))}; was it saved by it?"
        )
    for kind, into in own.items():
        value = given[kind]
        if (
            not isinstance(value, Tensor)
            or value.shape != into.shape
            or isinstance(value, DTensor) != isinstance(into, DTensor)
        ):
            what = (
                f"{type(value).__name__} {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else repr(value)
            )
            raise ValueError(
                f"state_dict: expected {type(into).__name__} {tuple(into.shape)} for {name!r} {kind}, got {what}"
            )
    return [(into, given[kind]) for kind, into in own.items()]


def looks_of(groups: Groups) -> list[Any]:
    """What tells that parameters are not those that were planned for: ``.to()`` and frameworks replace them."""
    return [
        (group["algorithm"], [(id(p), p.device, p.dtype) for p in group["params"]])
        for group in groups
    ]


def added(groups: Sequence[dict[str, Any]], routes: Routes) -> Added:
    """Of the last group, which was just added. Tensors that other groups hold are cloned: each is written on its own."""
    *others, group = groups
    held = {id(value) for other in others for value in other.values() if isinstance(value, Tensor)}
    group |= {key: value.detach().clone() for key, value in group.items() if id(value) in held}
    names = group.get("param_names") or [
        f"groups.{len(others)}.{i}" for i in range(len(group["params"]))
    ]
    return Added([*zip(names, group["params"], strict=True)], routes, group["algorithm"])


def named_again(groups: Sequence[dict[str, Any]], before: Sequence[Added]) -> list[Added]:
    """The groups as they are now: a parameter has the name that it was added by, also where others were removed.

    Frameworks put sharded parameters in the place of all; one that takes the place of another takes its name.
    """
    if len(groups) != len(before):
        raise ValueError(
            f"param_groups: {len(before)} were added, {len(groups)} are there; add_param_group() takes in a group"
        )
    names = {id(p): name for group in before for name, p in group.params}
    here = {id(p) for group in groups for p in group["params"]}
    now = []
    for k, (group, old) in enumerate(zip(groups, before, strict=True)):
        if group["algorithm"] != old.algorithm:
            raise ValueError(
                f"param_groups[{k}]: algorithm was {old.algorithm!r} when it was added, is {group['algorithm']!r}; "
                "make a new optimizer"
            )
        own = []
        for i, p in enumerate(group["params"]):
            as_many = len(group["params"]) == len(old.params)
            if id(p) not in names and (not as_many or id(old.params[i][1]) in here):
                raise ValueError(
                    f"param_groups[{k}]: parameter {i}, of shape {tuple(p.shape)}, was put in by hand, so that it has no name; "
                    "take it out and give it to add_param_group()"
                )
            own.append((names[id(p)] if id(p) in names else old.params[i][0], p))
        if "param_names" in group:
            group["param_names"] = [name for name, _ in own]
        now.append(old._replace(params=own))
    return now


def names_of(added: Sequence[Added]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The parameters by name, and the number of each one's group."""
    flat = [(name, p, k) for k, group in enumerate(added) for name, p in group.params]
    names = [name for name, _, _ in flat]
    seen: set[int] = set()
    for name, p, _ in flat:
        if id(p) in seen:
            raise ValueError(f"params: the tensor {name!r} is there twice; pass tied weights once")
        seen.add(id(p))
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"params: {twice[:8]} are names of more than one parameter; give each module a prefix"
        )
    return {name: p for name, p, _ in flat}, {name: k for name, _, k in flat}


def keep(
    owner: dict[str, Tensor],
    name: str,
    kind: str,
    spec: Spec,
    device: torch.device,
    stepped: bool,
    param: Tensor | None,
) -> Tensor:
    """The tensor of one kind of state: what ``owner`` has, brought to ``device``, or one that it has from here on."""
    own = owner.get(kind)
    if own is not None:
        here = mesh.local(own)
        if (
            tuple(here.shape) == spec.shape
            and here.dtype == spec.dtype
            and mesh.lies_as(own, spec.sharded)
        ):
            owner[kind] = own if here.device == device else own.to(device)
            return owner[kind]
        if stepped:
            raise ValueError(
                f"{name}: has another shape, dtype or placement than its {kind}; make a new optimizer"
            )
    new = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    if kind == "master" and param is not None:
        new.copy_(mesh.local(param).detach())
    owner[kind] = mesh.whole(new, spec.sharded)
    return owner[kind]


def refresh(params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Masters as the parameters are now."""
    for name, p in params.items():
        if f"{name}.master" in state:
            mesh.local(state[f"{name}.master"]).copy_(mesh.local(p))


def saved_groups(groups: Groups, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a state_dict has for each group. Checked: they are groups of this optimizer, with values that it can take."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"state_dict: expected the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}"
        )
    saved = state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in of] for of in (groups, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"state_dict: expected groups of {sizes[0]} parameters, got {sizes[1]}")
    found = []
    for k, (own, other) in enumerate(zip(groups, saved, strict=True)):
        if other.get("algorithm") != own["algorithm"]:
            raise ValueError(
                f"state_dict: group {k} has algorithm {other.get('algorithm')!r}, expected {own['algorithm']!r}; "
                "was it saved by another optimizer?"
            )
        new = {
            key: copy.deepcopy(value)
            for key, value in other.items()
            if key not in ("params", "param_names")
        }
        both = {**own, **new}
        settle_values(both, f"state_dict: group {k}: ")
        found.append({key: both[key] for key in new})
    return found


def take(groups: Sequence[dict[str, Any]], saved: Groups) -> None:
    """The hyperparameters of `saved_groups`; a tensor of one element stays one."""
    for own, other in zip(groups, saved, strict=True):
        for key, value in other.items():
            into, number = own.get(key), plain(value)
            if isinstance(into, Tensor) and into.numel() == 1 and isinstance(number, (int, float)):
                into.detach().fill_(number)
            else:
                own[key] = value
