"""Whether a saved state means the same to this optimizer: see persistence/meaning.py.

Every group has what its state was made with under one key, which goes through `state_dict` and
torch's own functions beside the group's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..distributed.dtensors import is_dtensor
from ..persistence.meaning import (
    BEGIN_ANEW,
    FORM,
    MISSED,
    Meaning,
    differences,
    form_of,
    listed,
    misfits,
    read_form,
)
from ..routing.doubts import warn_at_caller
from ..routing.routes import Route
from ..types import Config
from .groups import AddedGroup
from .hyper import Groups
from .matching import by_any_name, some
from .saved import Saved


def routes_of(added: Sequence[AddedGroup]) -> dict[str, Route]:
    """By name, how every parameter of an optimizer is read."""
    return {name: d.route for group in added for name, d in (group.decisions or {}).items()}


def write_forms(
    groups: Sequence[dict[str, Any]],
    added: Sequence[AddedGroup],
    config: Config,
    missed: Mapping[str, int] | None = None,  # steps, by AdamW's parameters that missed some
) -> None:
    """Writes into each group what its state is made with."""
    routes, missed = routes_of(added), missed or {}
    for group, own in zip(groups, added, strict=True):
        names = [name for name, _ in own.params]
        steps = [missed.get(name, 0) for name in names]
        group[FORM] = form_of(config, [routes[name] for name in names], steps)


def check_shapes(saved: Saved, named: Mapping[str, Tensor]) -> None:
    """Refuses the state of a model with other shapes, before routes are compared that follow them.

    Raises:
        ValueError: naming the parameters and both shapes.
    """
    values = [
        (f"{name!r} {kind}", p, saved.states[name].get(kind))
        for name, p in named.items()
        for kind in ("momentum", "exp_avg")
    ]
    said = misfits(
        (what, p.shape, value.shape)
        for what, p, value in values
        if isinstance(value, Tensor) and is_dtensor(value) == is_dtensor(p)
    )
    if said:
        raise ValueError(f"state_dict: {said}")


def check_meaning(
    saved: Saved, groups: Groups, config: Config, routes: Mapping[str, Route]
) -> None:
    """Refuses a state that was made with options or routes which give it another meaning.

    Args:
        groups: of the ``state_dict``.
        routes: of this optimizer's parameters, by name.

    Raises:
        ValueError: naming the options or the parameters, and what to write.
    """
    stepped = {
        name: route
        for name, route in routes.items()
        # Of another rule there is other state, which is said where it is copied.
        if saved.states[name]
        and ("exp_avg" if route.is_of_matrices else "momentum") not in saved.states[name]
    }
    forms = _forms(groups)
    used = {saved.places[name].group for name in stepped}
    if not used:
        return
    if not used <= forms.keys():
        warn_at_caller(
            "state_dict: does not tell with which options and routes its state was made; it is "
            "taken for made with those of this optimizer"
        )
    found = _routes_of(saved, groups, forms, stepped)
    fatal: list[str] = []
    harmless: dict[str, None] = {}
    for k in sorted(used & forms.keys()):
        of_group = {n: route for n, route in stepped.items() if saved.places[n].group == k}
        each = differences(Meaning(forms[k].config, found), config, of_group, rules_too=False)
        fatal += each.fatal
        harmless |= dict.fromkeys(each.harmless)
    if fatal:
        lines = listed([*dict.fromkeys(fatal)])
        raise ValueError(f"state_dict: its state has another meaning: {lines}. {BEGIN_ANEW}")
    if harmless:
        warn_at_caller(f"state_dict was saved with another configuration: {listed([*harmless])}")


def missed_steps_of(saved: Saved, groups: Groups, routes: Mapping[str, Route]) -> dict[str, int]:
    """By name, how many steps AdamW's parameters had missed when this was saved.

    Raises:
        ValueError: it is no number.
    """
    forms = _forms(groups)
    stepped = {name: route for name, route in routes.items() if saved.states[name]}
    if not any(MISSED in route for form in forms.values() for route in form.routes.values()):
        return {}
    known = _routes_of(saved, groups, forms, stepped)
    texts = {n: r[MISSED] for n, r in known.items() if MISSED in r}
    if stepped and not known:
        warn_at_caller(
            "state_dict: it does not tell which parameters have missed steps, so that AdamW's bias "
            "correction takes all steps for theirs; save it with names, from nm.NorMuon(model)"
        )
    strange = [text for text in texts.values() if not text.isdecimal()]
    if strange:
        raise ValueError(f"state_dict: {FORM}: {MISSED} is {strange[0]!r}, expected a number")
    return {name: int(text) for name, text in texts.items()}


def _forms(groups: Groups) -> dict[int, Meaning]:
    """By group of a ``state_dict``, what its state was made with."""
    return {
        k: read_form(group[FORM], f"state_dict: group {k}: ")
        for k, group in enumerate(groups)
        if FORM in group and group["params"]
    }


def _routes_of(
    saved: Saved, groups: Groups, forms: Mapping[int, Meaning], stepped: Mapping[str, Route]
) -> dict[str, Mapping[str, str]]:
    """By own name, the route that a parameter was saved with, where that is known."""
    named = {
        name: form.routes.get(str(i), {})
        for k, form in forms.items()
        for i, name in enumerate(groups[k].get("param_names", ()))
    }
    keys = {name: saved.places[name].key for name in stepped}
    if named and all(isinstance(key, str) for key in keys.values()):
        # torch's functions put the parameters into another order, and leave the names as they were
        of_key = by_any_name([*keys.values()], [*named])
        return {n: named[of_key[key]] for n, key in keys.items() if key in of_key}
    if any(isinstance(key, str) for key in keys.values()):
        _check_as_many(forms, stepped)
        return {}
    return {
        name: forms[place.group].routes.get(str(groups[place.group]["params"].index(place.key)), {})
        for name in stepped
        if (place := saved.places[name]).group in forms
    }


def _check_as_many(forms: Mapping[int, Meaning], stepped: Mapping[str, Route]) -> None:
    """Where nothing tells whose route is whose: that as many parameters have each of them."""
    own = read_form(form_of(Config(), stepped.values()), "").routes
    each = (route for form in forms.values() for route in form.routes.values())
    before = [{k: x for k, x in route.items() if k != MISSED} for route in each]
    before = [route for route in before if route]
    mine, theirs = (sorted(map(str, each)) for each in (own.values(), before))
    if mine != theirs:
        raise ValueError(
            "state_dict: its state has another meaning: other routes than "
            f"{some(sorted(set(mine) - set(theirs)))} of this optimizer, namely "
            f"{some(sorted(set(theirs) - set(mine)))}; write the routes as they were"
        )
