"""Parameter groups in the terms of the step: the names and the routes of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..routing.resolve import Routes
from ..routing.routes import Decision
from ..types import Config, Guard
from .hyper import Groups

_RENAMED = {  # keys of other optimizers, and what they are called here
    "betas": "adamw_betas", "eps": "adamw_eps", "mu": "momentum", "muon_beta2": "beta2",
    "use_muon": "algorithm", "adamw_lr": "lr", "adamw_weight_decay": "weight_decay",
}  # fmt: skip
_ELSEWHERE = {  # keys of other optimizers, and what to do instead; None and False ask for nothing
    "maximize": "negate the loss",
    "amsgrad": "leave it out, there is none here",
    "flatten": "write routes={...: Route(flatten=True)}",
    "beta1": "write momentum, or adamw_betas for AdamW",
    "epsilon": "write adamw_eps, or NorMuon(config=Config(eps=...)) for matrices",
    "adjust_lr": "write NorMuon(config=Config(scale=...))",
    "adjust_lr_fn": "write NorMuon(config=Config(scale=...))",
    "ns_steps": "write NorMuon(config=Config(steps=...))",
    "ns_coefficients": "write NorMuon(config=Config(coefficients=...))",
    "cautious_wd": "write NorMuon(config=Config(weight_decay_form='cautious'))",
}


class AddedGroup(NamedTuple):
    """What is remembered about a parameter group from when it was added."""

    params: list[tuple[str, Tensor]]
    routes: Routes
    algorithm: str
    has_algorithm: bool  # its own, which was written, and not the constructor's
    has_names: bool
    decisions: dict[str, Decision] | None = None  # by name, until then not made


# --- what is asked for at construction


def with_guard(config: Config | None, guard: Guard | None, nan_guard_fallback: bool) -> Config:
    """``config`` with the guard that the optimizer's own arguments ask for."""
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    if nan_guard_fallback:
        if guard is not None or config.guard != "off":
            raise ValueError(
                "nan_guard_fallback: means guard='output' per bucket; "
                "pass either nan_guard_fallback=True or guard="
            )
        return replace(config, guard="output", guard_scope="bucket")
    return config if guard is None else replace(config, guard=guard)


def check_params(group: Mapping[str, Any]) -> None:
    """Refuses a model, or a module, in the place of a group's parameters.

    Raises:
        TypeError: with the line to write.
    """
    inside = group.get("params")
    if isinstance(inside, nn.Module):
        kind = type(inside).__name__
        raise TypeError(
            f"params: expected a group's parameters, got the module {kind}. Whether a part is an "
            "output head is told by the model around it: write {'params': module.parameters(), "
            "...} into the group, and routes=nm.routes_for(model) beside the groups; or "
            "nm.NorMuon(model) for one group"
        )
    if isinstance(inside, (list, tuple, Mapping)):
        refuse_models(inside)
    if isinstance(inside, Mapping):
        raise TypeError(
            "params: expected a group's parameters, got a dict; write {'params': "
            "list(named.items()), ...}"
        )


def refuse_models(given: Any) -> None:
    """Refuses several models, or one, that are no model themselves.

    Raises:
        TypeError: with the line to write.
    """
    keyed = isinstance(given, Mapping)
    values = list(given.values()) if keyed else list(given)
    pairs = [v[1] if isinstance(v, tuple) and len(v) == 2 else v for v in values]
    models = [type(v).__name__ for v in pairs if isinstance(v, nn.Module)]
    if not models:
        return
    one = "nm.NorMuon(model, ...)"
    more = f"nm.NorMuon(torch.nn.Module{'Dict' if keyed else 'List'}(...), ...)"
    raise TypeError(
        f"params: expected a model, got a {type(given).__name__} of {', '.join(models[:8])}: write "
        f"{one} for one model, and {more} for several"
    )


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses keys that would have no effect in a group.

    Only when a group is added: later, schedulers write keys of their own into all groups.

    Raises:
        TypeError: naming the key and what to write instead; or as `check_params`.
    """
    check_params(group)
    known = {field.name for field in fields(Config)}
    for key, value in group.items():
        if key in _RENAMED:
            raise TypeError(f"param_group: {key!r} is called {_RENAMED[key]!r} here")
        if key in _ELSEWHERE and value is not None and value is not False:
            raise TypeError(
                f"param_group: {key}={value!r} cannot be set per group; {_ELSEWHERE[key]}"
            )
        if key in known:
            raise TypeError(
                f"param_group: {key!r} is the same for all groups; "
                f"write NorMuon(config=Config({key}=...))"
            )
    if group.get("algorithm", defaults["algorithm"]) == "adamw" and not group.get("routes"):
        for key in ("momentum", "beta2"):
            if key in group and group[key] != defaults[key]:
                raise TypeError(
                    f"param_group: {key!r} is for matrices; "
                    "with algorithm='adamw' write adamw_betas"
                )


# --- names


def remember_last(
    groups: Sequence[dict[str, Any]], routes: Routes | None, has_algorithm: bool
) -> AddedGroup:
    """What to remember about the last group, which was just added.

    Its hyperparameters that are tensors of an earlier group are cloned, so that every group's can
    be written separately.
    """
    *others, group = groups
    shared = {
        id(value) for other in others for value in other.values() if isinstance(value, Tensor)
    }
    group |= {key: value.detach().clone() for key, value in group.items() if id(value) in shared}
    names = group.get("param_names") or [
        f"groups.{len(others)}.{i}" for i in range(len(group["params"]))
    ]
    params = [*zip(names, group["params"], strict=True)]
    has_names = "param_names" in group
    routes = {} if routes is None else routes
    return AddedGroup(params, routes, group["algorithm"], has_algorithm, has_names)


def named_again(groups: Sequence[dict[str, Any]], before: Sequence[AddedGroup]) -> list[AddedGroup]:
    """The groups as they are now. A parameter keeps the name with which it was added.

    It keeps it where other parameters were removed. Frameworks put sharded parameters in the place
    of all parameters of a group: a parameter that replaces another one takes its name.

    Raises:
        ValueError: a group or a parameter was put in by hand, or a group's algorithm changed.
    """
    if len(groups) != len(before):
        raise ValueError(
            f"param_groups: {len(before)} were added, {len(groups)} are there; "
            "add a group with add_param_group()"
        )
    names = {id(p): name for group in before for name, p in group.params}
    present = {id(p) for group in groups for p in group["params"]}
    now = []
    for k, (group, old) in enumerate(zip(groups, before, strict=True)):
        if group["algorithm"] != old.algorithm:
            raise ValueError(
                f"param_groups[{k}]: algorithm was {old.algorithm!r} when it was added, "
                f"is {group['algorithm']!r}; make a new optimizer"
            )
        same_length = len(group["params"]) == len(old.params)
        own = []
        for i, p in enumerate(group["params"]):
            if id(p) in names:
                name = names[id(p)]
            elif same_length and id(old.params[i][1]) not in present:
                name = old.params[i][0]
            else:
                raise ValueError(
                    f"param_groups[{k}]: parameter {i}, of shape {tuple(p.shape)}, was put in by "
                    "hand and has no name; remove it and pass it to add_param_group()"
                )
            own.append((name, p))
        if "param_names" in group:
            group["param_names"] = [name for name, _ in own]
        now.append(old._replace(params=own))
    return now


def names_of(added: Sequence[AddedGroup]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The parameters by name, and the number of each one's group by the same names.

    Raises:
        ValueError: a parameter or a name occurs twice.
    """
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


def fingerprint_of(groups: Groups) -> list[Any]:
    """Equal as long as the parameters are those that were planned for.

    ``model.to(...)`` changes parameters in place, and frameworks replace them.
    """
    return [
        (group["algorithm"], [(id(p), p.device, p.dtype) for p in group["params"]])
        for group in groups
    ]
