"""Parameter groups and optimizer state in the terms of the step: names, routes, `Hyper`; a state kept, and a saved one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import mesh
from .plan import Spec
from .routes import Route, Routes, RouteTable, resolve_routes
from .types import Config, Guard, Hyper, _check_number

Groups = Sequence[Mapping[str, Any]]
_FOREIGN = {
    "betas": "adamw_betas", "eps": "adamw_eps", "mu": "momentum", "muon_beta2": "beta2", "use_muon": "algorithm",
    "adamw_lr": "lr", "adamw_weight_decay": "weight_decay",
}  # fmt: skip


class GroupHyper:
    """A `Hyper` whose tensors stay and follow the groups: an entry a group, 0-d if there is only one."""

    def __init__(self, entries: int, device: torch.device) -> None:
        shape = () if entries == 1 else (entries,)
        self.hyper = Hyper(*(torch.zeros(shape, dtype=torch.float32, device=device) for _ in Hyper._fields))
        self._written: list[list[Any]] = [[None] * len(Hyper._fields) for _ in range(entries)]

    @property
    def several(self) -> bool:
        return len(self._written) > 1

    def follow(self, groups: Groups) -> None:
        """Writes what has changed, without a wait: a float only if it is another, a tensor always."""
        for k, (group, written) in enumerate(zip(groups, self._written, strict=False)):
            for field, value in enumerate(_values(group)):
                is_tensor = isinstance(value, Tensor)
                if not is_tensor and value == written[field]:
                    continue
                own = self.hyper[field][k] if self.several else self.hyper[field]
                if is_tensor:  # pinned memory is read when the device gets there: by then it may hold the next value
                    own.copy_(value.detach().reshape(()), non_blocking=not value.is_pinned())
                else:
                    own.fill_(value)
                written[field] = None if is_tensor else value


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A group's hyperparameters in the order of `Hyper`."""
    lr, decay = group["lr"], group["weight_decay"]
    return (lr, group["momentum"], group["beta2"], decay, lr, *group["adamw_betas"], group["adamw_eps"], decay)


def check_keys(group: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(Config)}
    for key in group:
        if key in _FOREIGN:
            raise TypeError(f"param_group: {key!r} is called {_FOREIGN[key]!r} here")
        if key in known:
            raise TypeError(f"param_group: {key!r} is for all groups: NorMuon(config=Config({key}=...))")


def check_values(group: Mapping[str, Any]) -> None:
    if group["algorithm"] not in ("normuon", "adamw"):
        raise ValueError(f"algorithm: expected 'normuon' or 'adamw', got {group['algorithm']!r}; freeze with requires_grad")
    if not isinstance(group["adamw_betas"], (tuple, list)) or len(group["adamw_betas"]) != 2:
        raise TypeError(f"adamw_betas: expected two numbers, got {group['adamw_betas']!r}")
    names = ("lr", "momentum", "beta2", "weight_decay", "lr", "adamw_betas", "adamw_betas", "adamw_eps", "weight_decay")
    for name, value in zip(names, _values(group), strict=True):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
            continue
        _check_number(name, value, 0.0)
        if name in ("momentum", "beta2", "adamw_betas") and value >= 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def guarded(config: Config | None, guard: Guard | None, nan_guard_fallback: bool) -> Config:
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    if nan_guard_fallback:
        if guard is not None or config.guard != "off":
            raise ValueError("nan_guard_fallback: is guard='output' per bucket; give either it or guard=")
        return replace(config, guard="output", guard_scope="bucket")
    return config if guard is None else replace(config, guard=guard)


def route(groups: Groups, of_groups: Sequence[Routes], of_all: Routes | None, named: Mapping[str, Tensor]) -> dict[str, Route]:
    """The routes that were asked for, by name: the group's, then its algorithm, then the optimizer's."""
    routed = _asked(named, {} if of_all is None else of_all)
    names = iter(named)
    for group, routes in zip(groups, of_groups, strict=True):
        own = {name: named[name] for _, name in zip(group["params"], names, strict=False)}
        if group["algorithm"] == "adamw":
            routed |= dict.fromkeys(own, Route("adamw"))
        routed |= _asked(own, routes)
    return routed


def _asked(named: Mapping[str, Tensor], routes: Routes) -> dict[str, Route]:
    is_table = isinstance(routes, RouteTable)  # which decides about everything
    return {
        name: route for name, (route, why) in resolve_routes(named, routes).items() if is_table or why.startswith("routes[")
    }


def plain(value: Any) -> Any:
    """A number for a tensor of one element or a numpy scalar: what ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    return value.item() if hasattr(value, "item") else value


def check_device(device: torch.device, expected: str) -> None:
    if device.type != expected:
        raise ValueError(
            f"graphed=True: expected parameters on a {expected.upper()} device, got {device}; the step is the same without"
        )


def pairs(name: str, own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """A parameter's state tensors, each with what is to be copied into it."""
    if own.keys() != given.keys():
        raise ValueError(f"state_dict: expected {sorted(own)} for {name!r}, got {sorted(map(str, given))}; was it saved by it?")
    for kind, into in own.items():
        value = given[kind]
        if (
            not isinstance(value, Tensor)
            or value.shape != into.shape
            or isinstance(value, DTensor) != isinstance(into, DTensor)
        ):
            what = f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state_dict: expected {type(into).__name__} {tuple(into.shape)} for {name!r} {kind}, got {what}")
    return [(into, given[kind]) for kind, into in own.items()]


def looks_of(params: Sequence[Tensor]) -> list[tuple[int, torch.device, torch.dtype]]:
    """What tells that parameters are not those that were planned for: ``.to()`` and frameworks replace them."""
    return [(id(p), p.device, p.dtype) for p in params]


def names_of(groups: Groups) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The parameters by name, and the number of each one's group."""
    flat = [(k, i) for k, group in enumerate(groups) for i in range(len(group["params"]))]
    names = [groups[k].get("param_names", {i: f"groups.{k}.{i}"})[i] for k, i in flat]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"params: {twice[:8]} are names of more than one parameter; give each module a prefix")
    return {name: groups[k]["params"][i] for name, (k, i) in zip(names, flat, strict=True)}, dict(
        zip(names, (k for k, _ in flat), strict=True)
    )


def keep(
    owner: dict[str, Tensor], name: str, kind: str, spec: Spec, device: torch.device, stepped: bool, param: Tensor | None
) -> Tensor:
    """The tensor of one kind of state: what ``owner`` has, brought to ``device``, or one that it has from here on."""
    own = owner.get(kind)
    if own is not None:
        here = mesh.local(own)
        if tuple(here.shape) == spec.shape and here.dtype == spec.dtype and mesh.lies_as(own, spec.sharded):
            owner[kind] = own if here.device == device else own.to(device)
            return owner[kind]
        if stepped:
            raise ValueError(f"{name}: has another shape, dtype or placement than its {kind}; make a new optimizer")
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


def check_saved(groups: Groups, saved: Groups) -> None:
    """That saved groups are those of this optimizer."""
    sizes = [[len(group["params"]) for group in of] for of in (groups, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"state_dict: expected groups of {sizes[0]} parameters, got {sizes[1]}")
    for k, (own, other) in enumerate(zip(groups, saved, strict=True)):
        if other.get("algorithm") != own["algorithm"]:
            raise ValueError(
                f"state_dict: group {k} has algorithm {other.get('algorithm')!r}, expected {own['algorithm']!r}; "
                "was it saved by another optimizer?"
            )


def take(groups: Sequence[dict[str, Any]], saved: Groups) -> None:
    """The hyperparameters of saved groups; a tensor stays one."""
    for own, other in zip(groups, saved, strict=True):
        for key, value in other.items():
            if isinstance(own.get(key), Tensor):
                own[key].fill_(float(value))
            elif key not in ("params", "param_names"):
                own[key] = copy.deepcopy(value)
