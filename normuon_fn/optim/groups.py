"""Parameter groups in the terms of the step: the names and the routes of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..routing.resolve import Routes
from ..routing.routes import Decision
from ..types import Config, Guard, config_given
from ..types.other_names import (
    ELSEWHERE,
    OF_ROUTES,
    RENAMED,
    F,
    alike,
    arguments_of,
    hint,
    with_hints,
)
from .hyper import OF_ADAMW, Groups, plain, remember_base
from .written_rates import BASE, borrowed_rates

CONFIG_FIELDS = tuple(field.name for field in fields(Config))
_OF_ALL = (  # arguments of the constructor that no group can have for itself
    "config", "nan_guard_fallback", "mesh", "guard_mesh", "late_gradients", "graphed",
)  # fmt: skip


_OF_MATRICES: dict[str, tuple[Any, str]] = {  # what NorMuon takes if nothing is written
    "momentum": (0.95, "write adamw_betas=(beta1, beta2)"),
    "beta2": (0.95, "write adamw_betas=(beta1, beta2)"),
    "lr": (1e-3, "write it in the place of adamw_lr"),
    "weight_decay": (0.0, "write it in the place of adamw_weight_decay"),
}


class AddedGroup(NamedTuple):
    """What is remembered about a parameter group from when it was added."""

    params: list[tuple[str, Tensor]]
    routes: Routes
    algorithm: str
    has_algorithm: bool  # its own, which was written, and not the constructor's
    has_names: bool
    decisions: dict[str, Decision] | None = None  # by name, until then not made
    # its lr, and the constructor's adamw_lr; None if it has one of its own
    rates: tuple[float, float] | None = None


# --- what is asked for at construction


def with_config_hints(function: F, *, example: str = "nm.NorMuon(model, lr=0.01)") -> F:
    """``function``, which has a ``config``, with hints for arguments that it does not have."""
    return with_hints(function, options=CONFIG_FIELDS, example=example)


def check_arguments(function: Callable[..., Any], kwargs: Iterable[str]) -> None:
    """Refuses arguments that ``function``, which has a ``config``, does not have.

    Raises:
        TypeError: naming the argument and what to write instead.
    """
    known, where = arguments_of(function), function.__qualname__.removesuffix(".__init__")
    for key in kwargs:
        if key not in known:
            raise TypeError(hint(where, key, known, CONFIG_FIELDS))


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def with_guard(config: Config | None, guard: Guard | None, nan_guard_fallback: bool) -> Config:
    """``config`` with the guard that the optimizer's own arguments ask for."""
    config = config_given(config)
    if nan_guard_fallback:
        if guard is not None or config.guard != "off":
            raise ValueError(
                "nan_guard_fallback: means guard='output' per bucket; "
                "pass either nan_guard_fallback=True or guard="
            )
        return replace(config, guard="output", guard_scope="bucket")
    if guard is not None and config.guard not in ("off", guard):
        raise ValueError(
            f"guard: {guard!r} contradicts config.guard, which is {config.guard!r}; write one of "
            "them"
        )
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


def _refused(key: str, value: Any, defaults: Mapping[str, Any]) -> str | None:
    """What to write instead of a key of a group; ``None`` where it may stay."""
    asks = value is not None and value is not False
    if key == "use_muon":
        return f"{key!r} is called 'algorithm' here: write 'normuon' for True, 'adamw' for False"
    if key in RENAMED and RENAMED[key] in defaults:
        return f"{key!r} is called {RENAMED[key]!r} here"
    if key in ELSEWHERE and asks:
        return f"{key}={value!r} cannot be set per group; {ELSEWHERE[key]}"
    if key in (*OF_ROUTES, "weight_decay_form", "cautious_update"):
        route = f"routes={{...: Route({key}=...)}}"
        return f"{key!r} is of single parameters; write {route} into the group"
    if key in CONFIG_FIELDS:
        return f"{key!r} is the same for all groups; write NorMuon(config=Config({key}=...))"
    if RENAMED.get(key, key) in _OF_ALL and asks:
        return f"{key!r} is the same for all groups; write NorMuon({RENAMED.get(key, key)}=...)"
    known = (*defaults, BASE, "params", "param_names", "routes")
    meant = None if key in known or key in ELSEWHERE else alike(key, known)
    return None if meant is None else f"there is no key {key!r}; did you mean {meant!r}?"


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses keys that would have no effect in a group.

    Only when a group is added: later, schedulers write keys of their own into all groups.

    Raises:
        TypeError: naming the key and what to write instead; or as `check_params`.
    """
    check_params(group)
    refused = [_refused(key, value, defaults) for key, value in group.items()]
    if any(refused):  # all at once: a group of another optimizer has several
        raise TypeError("\n".join([f"param_group: {text}" for text in refused if text]))
    if group.get("algorithm", defaults["algorithm"]) != "adamw" or group.get("routes"):
        return
    for key in ("momentum", "beta2"):
        if key in group and group[key] != defaults[key]:
            raise TypeError(
                f"param_group: {key!r} is for matrices; with algorithm='adamw' write adamw_betas"
            )
    if BASE in group:  # a group of another NorMuon, which has the constructor's values too
        return
    for key, of_adamw in OF_ADAMW.items():
        own, other = group.get(key), group.get(of_adamw)
        if own is not None and other is not None and plain([own]) != plain([other]):
            raise TypeError(
                f"param_group: {key}={own!r} and {of_adamw}={other!r} contradict each other; with "
                f"algorithm='adamw' {key} is AdamW's already, write {key} alone"
            )


def check_used(defaults: Mapping[str, Any], added: Sequence[AddedGroup]) -> None:
    """Refuses arguments of the constructor for matrices where ``algorithm="adamw"`` leaves none.

    Raises:
        TypeError: naming the argument and what to write instead.
    """
    rules = [found.route for group in added for found in (group.decisions or {}).values()]
    if defaults["algorithm"] != "adamw" or any(rule.algorithm == "normuon" for rule in rules):
        return
    for key, (usual, instead) in _OF_MATRICES.items():
        if defaults.get(OF_ADAMW.get(key, key)) is not None and plain(defaults[key]) != usual:
            raise TypeError(
                f"{key}: {defaults[key]!r} is for matrices, and algorithm='adamw' leaves none; "
                f"{instead}"
            )


# --- names


def remember_last(groups: Sequence[dict[str, Any]], written: Mapping[str, Any]) -> AddedGroup:
    """What to remember about the last group, which was just added as somebody has written it."""
    *others, group = groups
    remember_base(group, written)
    names = group.get("param_names") or [
        f"groups.{len(others)}.{i}" for i in range(len(group["params"]))
    ]
    params = [*zip(names, group["params"], strict=True)]
    has_algorithm, has_names = "algorithm" in written, "param_names" in group
    routes = {} if written.get("routes") is None else written["routes"]
    rates = borrowed_rates(group, written)
    return AddedGroup(params, routes, group["algorithm"], has_algorithm, has_names, rates=rates)


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
