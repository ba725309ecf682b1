"""What is given as ``params``, and one route for every parameter, decided when it is added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..planning.checks import check_kind
from ..planning.plan import Plan
from ..routing.doubts import is_called_by, is_left_whole, warn_at_caller
from ..routing.front_door import doubts_of, read_model, refuse_flattened
from ..routing.resolve import Routes, asked, asked_of_group, decide_routes, is_written
from ..routing.route_table import RouteTable
from ..routing.routes import Decision, Route
from .groups import AddedGroup, check_params, names_of, refuse_models
from .table_names import with_names_of_table

Params = (
    nn.Module
    | Mapping[str, Tensor]
    | Iterable[Tensor]
    | Iterable[dict[str, Any]]
    | Iterable[tuple[str, Tensor]]
)
_NAMELESS = "matrix without a name"
_OF_TRAINER = ". For a Trainer: optimizer_cls_and_kwargs=nm.for_trainer(model, lr=...)"


def of_model(params: Params, routes: Routes | None) -> tuple[Any, Routes | None]:
    """Parameters and routes as an optimizer takes them; a model's are read from its modules.

    Raises:
        TypeError: models in a list, a dict or a group, with the line to write; or something else
            that holds no parameters.
    """
    if isinstance(params, nn.Module):
        named, table = read_model(params, routes)
        return list(named.items()), table
    if isinstance(params, Mapping):
        items = dict(params)
        refuse_models(items)
        if not items or not all(isinstance(p, Tensor) for p in items.values()):
            raise TypeError(
                "params: expected a model, or a dict of name -> tensor; got a dict of "
                f"{ {key: type(value).__name__ for key, value in [*items.items()][:8]} }; a single "
                "group goes into a list: [{'params': ...}]"
            )
        if not any(p.requires_grad for p in items.values()):
            raise TypeError(
                "params: expected parameters, got a dict of tensors that require no gradient; of a "
                "state_dict() nothing is trained: write nm.NorMuon(model, ...)"
            )
        return list(items.items()), routes
    given: Any = params
    if isinstance(given, type) or not isinstance(given, Iterable) or isinstance(given, str):
        shown = repr(getattr(given, "__name__", given)) if callable(given) else f"{given!r:.80}"
        kind, call = type(given).__name__, " (call it)" if callable(given) else ""
        if isinstance(given, Plan):
            shown, call = "", "; write nm.NorMuon(model, config=plan.config), which plans by itself"
        raise TypeError(
            "params: expected a model, its parameters, named parameters or groups of them; got "
            f"{kind} {shown}".rstrip()
            + call
        )
    if isinstance(given, Tensor):
        return given, routes  # which torch refuses in its words
    listed = list(given)
    refuse_models(given if isinstance(given, tuple) else listed)
    for group in listed:
        if isinstance(group, Mapping):
            check_params(group)
    return listed, routes


def decide_new(added: Sequence[AddedGroup], routes: Routes | None) -> list[AddedGroup]:
    """The groups with a decision for every parameter, and with a table's names for theirs.

    What was decided before stays. A group's routes go before its algorithm, and that goes before
    the optimizer's ``routes``. One warning says what could not be told.

    Raises:
        TypeError, ValueError: as `decide_routes`, `refuse_flattened` and `check_kind`.
    """
    if isinstance(routes, RouteTable):
        routes = routes.grown({name: p for group in added for name, p in group.params})
    added = with_names_of_table(added, routes)
    named, _ = names_of(added)
    if all(group.decisions is not None for group in added):
        return added
    routes = {} if routes is None else routes
    for name, p in named.items():
        if p.requires_grad or is_lazy(p):
            check_kind(name, p)
    first = all(group.decisions is None for group in added)
    found = _trained(decide_routes(named, routes, say=first))
    written = {} if isinstance(routes, RouteTable) else asked(named, routes)
    by_table = isinstance(routes, RouteTable)
    is_split = any(group.has_algorithm for group in added)  # then somebody told the rules apart
    for group in added:
        found |= _of_group(group, found, written, by_table=by_table, is_split=is_split)
    fresh = {name: p for group in added if group.decisions is None for name, p in group.params}
    decisions = {name: found[name] for name in fresh}
    refuse_flattened(fresh, decisions)
    _warn(fresh, decisions, routes if isinstance(routes, RouteTable) else None)
    _warn_of_mixed_rates(added, found)
    return [
        group
        if group.decisions is not None
        else group._replace(decisions={name: found[name] for name, _ in group.params})
        for group in added
    ]


def _of_group(
    group: AddedGroup,
    found: Mapping[str, Decision],
    written: Mapping[str, Decision],  # by the optimizer's routes
    *,
    by_table: bool,
    is_split: bool,
) -> dict[str, Decision]:
    """What a group itself says, by its algorithm and its routes, or by having no names."""
    of_group = {}
    for name, _ in group.params:
        decision = found[name]
        if group.algorithm == "adamw":  # a route to AdamW that is there keeps its multipliers
            if not (is_written(decision) or by_table) or decision.route.algorithm != "adamw":
                decision = Decision(Route("adamw"), "algorithm='adamw' of the group")
                if name in written and not written[name].route.decides:
                    decision = written[name].over(decision)
            of_group[name] = decision
        elif decision.route.algorithm == "normuon" and not (is_written(decision) or by_table):
            if is_split and not decision.route.flatten and not is_left_whole(decision):
                of_group[name] = decision._replace(certainty="certain")
            elif not (is_split or group.has_names or decision.route.flatten):
                of_group[name] = Decision(decision.route, _NAMELESS, "untold")
    if isinstance(group.routes, RouteTable):
        return of_group | _trained(decide_routes(dict(group.params), group.routes))
    say = group.decisions is None
    own, check_options = asked_of_group(dict(group.params), group.routes or {}, say=say)
    over = {name: d.over(of_group.get(name, found[name])) for name, d in own.items()}
    check_options({name: d.route for name, d in over.items()})
    return of_group | _trained(over)


def _warn_of_mixed_rates(added: Sequence[AddedGroup], found: Mapping[str, Decision]) -> None:
    """Says once where groups have different ``lr``, and their AdamW one and the same rate."""
    first: float | None = None
    for k, group in enumerate(added):
        names = [name for name, _ in group.params if found[name].route.algorithm == "adamw"]
        if group.rates is None or not names:
            continue
        lr, adamw_lr = group.rates
        first = lr if first is None else first
        if lr != first and group.decisions is None:
            warn_at_caller(
                f"param_groups[{k}]: has lr={lr:g}, another group {first:g}, and the parameters of "
                f"AdamW in both ({names[0]!r} here) the constructor's adamw_lr={adamw_lr:g}, which "
                "does not follow a group's lr; write 'adamw_lr' into the groups, the same if that "
                "is meant"
            )
            return


def _trained(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Only parameters with gradients are planned for, whether or not they were unfrozen since."""
    return {
        name: found
        if found.route.unfrozen is None
        else Decision(found.route.unfrozen, "requires a gradient by now", found.certainty)
        for name, found in decisions.items()
    }


def _warn(
    params: Mapping[str, Tensor], decisions: Mapping[str, Decision], table: RouteTable | None
) -> None:
    nameless = [name for name, found in decisions.items() if found.reason == _NAMELESS]
    others = {
        name: found
        for name, found in decisions.items()
        if found.reason != _NAMELESS and (params[name].requires_grad or table is None)
    }
    texts = [doubts_of(params, others, table)]
    if nameless:
        shapes = Counter("x".join(map(str, params[name].shape)) for name in nameless)
        many = [f"{n} of {shape}" for shape, n in shapes.most_common(8)]
        more = f" and {len(shapes) - 8} more shapes" if len(shapes) > 8 else ""
        texts.append(
            f"The parameters have no names, so embeddings and output heads cannot be told from "
            f"other matrices. NorMuon is the rule of {', '.join(many)}{more}. Write "
            "nm.NorMuon(model, ...), or routes=nm.routes_for(model) beside the groups, or "
            "algorithm='normuon' into a group whose matrices are all meant"
            + (_OF_TRAINER if is_called_by("transformers") else "")
        )
    text = "\n".join(text for text in texts if text)
    if text:
        warn_at_caller(text)
