"""What is saved of an optimizer, and whose state and values each entry of a ``state_dict`` are.

A saved parameter is found by its name where both sides have names, and by its place where they
have none. Everything here reads; `state.load` and what `hyper.loading` returns write.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..persistence.meaning import FORM
from ..routing.doubts import warn_at_caller
from .hyper import Groups, check_hyperparameters, plain
from .matching import SHOWN, matched, some, unwrapped

_NOT_VALUES = ("params", "param_names", FORM)


class Place(NamedTuple):
    """Where a parameter is in a ``state_dict``."""

    key: Any  # in ``state_dict["state"]``
    group: int  # in ``state_dict["param_groups"]``


class Saved(NamedTuple):
    """A ``state_dict`` in the terms of this optimizer."""

    states: dict[str, Mapping[str, Any]]  # by parameter; empty for one without state
    groups: list[dict[str, Any]]  # by group of this optimizer, checked
    others: dict[Any, Any]  # what ``state`` has under keys that are no parameters
    places: dict[str, Place]  # by parameter


# --- saving


def pack(groups: Groups, states: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """What `torch.optim.Optimizer.state_dict` returns, with hyperparameters as plain numbers.

    No tensor is there twice, because safetensors refuses that: of a counter that all parameters
    share the first parameter has the optimizer's own tensor, as every other state has, and the
    others have copies. So what is written into all tensors in place, as `dcp.load` does, is what
    the next step uses.
    """
    places: dict[int, int] = {}
    for p in chain.from_iterable(group["params"] for group in groups):
        places.setdefault(id(p), len(places))
    seen: set[int] = set()
    packed: dict[Any, Any] = {}
    for p, kinds in states.items():
        is_param = isinstance(p, Tensor)
        packed[places[id(p)] if is_param else p] = _once_each(kinds, seen) if is_param else kinds
    return {
        "state": packed,
        "param_groups": [
            plain({key: value for key, value in group.items() if key != "params"})
            | {"params": [places[id(p)] for p in group["params"]]}
            for group in groups
        ],
    }


def _once_each(kinds: Mapping[str, Any], seen: set[int]) -> dict[str, Any]:
    own = {}
    for kind, value in kinds.items():
        is_second = isinstance(value, Tensor) and id(value) in seen
        own[kind] = value.detach().clone() if is_second else value
        seen.add(id(value))
    return own


# --- reading


def read(
    state_dict: Mapping[str, Any],
    groups: Groups,
    named: Mapping[str, Tensor],
    group_of: Mapping[str, int],
) -> Saved:
    """What a ``state_dict`` has for every parameter and every group of this optimizer.

    Raises:
        TypeError, ValueError: parameters that cannot be told from each other, groups that are not
            those of this optimizer, or a value that it cannot take.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict: expected the keys 'state' and 'param_groups', "
            f"got {sorted(map(str, state_dict))}"
        )
    state, saved = state_dict["state"], state_dict["param_groups"]
    places = _places(saved)
    has_names = all("param_names" in group for group in groups if group["params"])
    names = _saved_names(saved) if has_names else None
    if names is None:
        found = dict(zip(named, _in_order(groups, saved, places), strict=True))
    else:
        by_name = dict(zip(names, places, strict=True))
        is_key = bool(places) and isinstance(places[0].key, str)
        found = {own: by_name[name] for own, name in matched(named, names, is_key).items()}
    claimed = {place.key for place in places}
    others = {key: value for key, value in state.items() if key not in claimed}
    kind = type(places[0].key) if places else int
    unclaimed = [key for key in others if isinstance(key, kind)]
    if unclaimed:
        raise ValueError(
            f"state_dict: 'state' has entries for {unclaimed[:SHOWN]}, which are in no group of "
            "'param_groups'; remove them, or put them into their group's 'params'"
        )
    values = [_group_values(k, groups, group_of, found, saved, state) for k in range(len(groups))]
    return Saved(
        {name: state.get(place.key) or {} for name, place in found.items()}, values, others, found
    )


def _places(saved: Groups) -> list[Place]:
    """Of every saved parameter, in their order."""
    places = [Place(key, k) for k, group in enumerate(saved) for key in group["params"]]
    keys = [place.key for place in places]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1}, key=str)
        raise ValueError(
            f"state_dict: 'params' has {twice[:SHOWN]} more than once; were the groups of several "
            "optimizers put together? Load each optimizer's own state_dict into one of its own"
        )
    return places


def _saved_names(saved: Groups) -> list[str] | None:
    """The saved parameters' names, in their order; ``None`` if they have none.

    Keys that are strings are the names: torch's `get_optimizer_state_dict` writes them. Its
    counterpart puts them into this optimizer's order, and leaves ``param_names`` as they were.
    """
    keys = [key for group in saved for key in group["params"]]
    if keys and all(isinstance(key, str) for key in keys):
        return keys
    filled = [group for group in saved if group["params"]]
    if not all("param_names" in group for group in filled):
        return None
    for k, group in enumerate(saved):
        if len(group.get("param_names", ())) != len(group["params"]):
            raise ValueError(
                f"state_dict: group {k} has {len(group['params'])} parameters and "
                f"{len(group.get('param_names', ()))} names in 'param_names'"
            )
    names = [name for group in filled for name in group["param_names"]]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"state_dict: 'param_names' has {twice[:SHOWN]} more than once; give every parameter "
            "a name of its own, or delete 'param_names' from every group to go by order"
        )
    return names


def _in_order(groups: Groups, saved: Groups, places: list[Place]) -> list[Place]:
    own_sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved))
    if own_sizes != saved_sizes:
        raise ValueError(
            f"state_dict: expected groups of {own_sizes} parameters, got {saved_sizes}, and not "
            "both sides have names by which to find them; make the groups as they were when the "
            "state was saved. Or make this optimizer of a model or of named_parameters(), and "
            "write the names into each saved group k, in the order of its parameters: "
            "state_dict['param_groups'][k]['param_names'] = [...]; groups may differ then"
        )
    return places


# --- groups


def _group_values(
    k: int,
    groups: Groups,
    group_of: Mapping[str, int],
    found: Mapping[str, Place],
    saved: Groups,
    state: Mapping[Any, Any],
) -> dict[str, Any]:
    """The values of the saved groups that have the parameters of group ``k``, checked."""
    own = groups[k]
    firsts: dict[int, str] = {}  # by saved group: the first parameter that comes from it
    for name, place in found.items():
        if group_of[name] == k:
            firsts.setdefault(place.group, name)
    if not firsts:  # a group without parameters, whose values no step reads
        return {}
    sources = {j: values_of(saved[j]) for j in sorted(firsts)}
    if not all(sources.values()):
        raise ValueError(
            f"state_dict: group {k} ({firsts[next(iter(firsts))]!r} and others) has no values. "
            "torch's set_optimizer_state_dict gives those of a saved group to one group alone: "
            "make the groups as they were when the state was saved, or get and set it with "
            "StateDictOptions(flatten_optimizer_state_dict=True)"
        )
    (first, new), *rest = sources.items()
    for j, other in rest:
        keys = dict.fromkeys((*new, *other))
        differing = [key for key in keys if not _alike(new.get(key), other.get(key))]
        if differing:
            key = differing[0]
            raise ValueError(
                f"state_dict: the parameters of group {k} were in several groups, of which {key} "
                f"was {new.get(key)!r} for {firsts[first]!r} and {other.get(key)!r} for "
                f"{firsts[j]!r}; make the groups as they were when the state was saved"
                f"{_one_value(saved, first, j, differing)}"
            )
    if new["algorithm"] != own["algorithm"]:
        raise ValueError(
            f"state_dict: group {k} has algorithm {new['algorithm']!r}, expected "
            f"{own['algorithm']!r}"
        )
    for j in firsts:
        _check_whose_values(k, saved[j], state)
    new = copy.deepcopy(new)
    both = {**own, **new}
    check_hyperparameters(both, f"state_dict: group {k}: ")
    return {key: both[key] for key in new}


def _one_value(saved: Groups, first: int, other: int, differing: Sequence[str]) -> str:
    """The lines that give a saved group the values of another, where that is possible."""
    if "algorithm" in differing:
        return ""
    kept = tuple(key for key in _NOT_VALUES if key in saved[other])
    return (
        f", or load {', '.join(differing)} of group {first} for both:\n"
        f"    groups = state_dict['param_groups']\n"
        f"    groups[{other}] = groups[{first}] | {{key: groups[{other}][key] for key in {kept}}}"
    )


def values_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group's hyperparameters."""
    return {key: value for key, value in group.items() if key not in _NOT_VALUES}


def _check_whose_values(k: int, group: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    """Says so where torch gave a group the values of a saved group that had other parameters.

    `set_optimizer_state_dict` writes the keys of this optimizer's parameters into ``params``, and
    leaves ``param_names`` with the values that it copies.
    """
    keys, names = group["params"], group.get("param_names")
    if names is None or not all(isinstance(key, str) for key in keys):
        return
    known = set(map(unwrapped, names))
    strangers = [key for key in keys if unwrapped(key) not in known and state.get(key)]
    if strangers and len(strangers) < len(keys):
        warn_at_caller(
            f"state_dict: group {k} gets the values that {some(names)} had. What "
            f"{some(strangers)} had is lost: torch's set_optimizer_state_dict keeps the values of "
            "one saved group per group. Make the groups as they were when the state was saved, or "
            "write the group's values after loading"
        )


def _alike(a: Any, b: Any) -> bool:
    a, b = plain(a), plain(b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return type(a) is type(b) and a.shape == b.shape and torch.equal(a, b)
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # of arrays
        return False
