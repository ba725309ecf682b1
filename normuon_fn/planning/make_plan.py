"""`make_plan`: parameters, routes and options in, a `Plan` out; on the host, once.

check the parameters -> a route each -> decide (parameters.py) -> buckets -> the guard's rule
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..algorithm.coefficients import CoefficientSet, resolve
from ..algorithm.normalize import per_row
from ..algorithm.orthogonalize import choose
from ..algorithm.precondition import gathered_wide
from ..algorithm.rounding_safety import absurd, secured
from ..algorithm.stages import Stages, stages_of
from ..algorithm.work import Own
from ..compat import Ranks, is_subclass, overlaps
from ..compat.collection import without_collection
from ..compat.graphs import prepare_inductor
from ..distributed.messages import Exchange
from ..distributed.owners import GroupShards, Ownership, Shared, balance, with_owners
from ..routing.doubts import warn_at_caller
from ..routing.front_door import doubts_of, read_model, refuse_flattened
from ..routing.resolve import Routes, decide_routes
from ..routing.route_table import RouteTable
from ..routing.routes import Decision
from ..types import Config, config_given
from ..types.other_names import F, with_hints
from .before_ranks import asks_for_ranks, is_before_ranks
from .buckets import AdamWBucket, Bucket, Group, SharedBucket
from .checks import check_params
from .common import common_of
from .deciding import Alone, alone_doubt, checked_ranks, guard_rule
from .grouping import added, groups_of, own_of, rate_tensors, stays_apart
from .hyper_of import checked_hyper_of
from .metrics import metrics_rule
from .order import in_order, with_cut
from .parameters import Decided, decide
from .plan import OwnedState, Plan, Spec
from .replicas import with_owned_state
from .sharing import notes_of_hops, with_sharing
from .streaming import check_early, streaming_of


def _with_hints(function: F) -> F:
    options = tuple(field.name for field in fields(Config))
    return with_hints(function, options=options, example="nm.make_plan(model)")


@_with_hints
def make_plan(
    params: Mapping[str, Tensor] | nn.Module,
    config: Config | None = None,
    *,
    routes: Routes | None = None,
    mesh: Ranks | Alone | None = None,
    guard_mesh: Ranks | None = None,
    hyper_of: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a step over ``params``: what each of them gets, and what is done together.

    Args:
        params: a model, which stands for ``dict(model.named_parameters())`` and whose modules tell
            the routes (`routes_for`); or name -> tensor. Shapes, dtypes and the device are read,
            never the values.
        routes: name, glob or predicate ``(name, tensor) -> bool`` -> `Route`; the first entry that
            matches a parameter and decides a rule wins, and entries with multipliers alone that
            come before it apply on top. Without one, the model's modules decide. Where there is no
            model, matrices and stacks of matrices get NorMuon, and embeddings, output heads and
            vectors AdamW, by names and shapes; what these cannot tell for certain is said in one
            warning. Or the table of `routes_for`, which has an entry for every parameter.
        mesh: the ranks that have the same plain tensors (DeviceMesh or ProcessGroup): each of them
            orthogonalizes a share. Replicas on several nodes share in blocks where that is
            predicted to be faster, which ``str(plan)`` says: with them, this is a collective, and
            so it is where the shards of DTensors are 96 ranks or more.
            ``"alone"``: no other rank has them, so that this rank decides alone what its guard
            skips, unless there is a ``guard_mesh``. ``None`` beside a guard is taken for that with
            a warning, where there are other ranks. DTensors bring their own mesh.
        guard_mesh: the ranks that skip a step together, for example the stages of a pipeline, which
            may have other parameters; all of them need the same guard. With it, this is a
            collective. Plain tensors of the same names and shapes on all of them, without
            ``mesh``, are taken for copies, with a warning. ``None``: all ranks that have a part of
            a parameter.
        hyper_of: name or glob -> which entry of `Hyper`'s tensors a parameter takes; these are then
            1-d (`Hyper.stack`). A name comes before the globs, and of these the first that matches.
            For parameter groups whose hyperparameters move apart: one graph, one guard, and one
            stack for matrices of one shape, whatever their entries are.

    Raises:
        TypeError: parameters or options of the wrong kind (integer, complex, sparse, no tensors).
        ValueError: an empty dict, parameters that share memory or are on several devices, that a
            wrapper has flattened or emptied, a route that matches nothing or does not fit its
            parameter. Each names the parameter.
    """
    if isinstance(params, nn.Module):
        params, routes = read_model(params, routes)
    check_params(params)
    decisions = decide_routes(params, {} if routes is None else routes)
    refuse_flattened(params, decisions)
    doubts = doubts_of(params, decisions, routes if isinstance(routes, RouteTable) else None)
    plan = plan_of(params, decisions, config, mesh, guard_mesh, hyper_of)
    for doubt in (doubts, alone_doubt(plan, mesh, guard_mesh)):
        if doubt:
            warn_at_caller(doubt)
    return plan


@without_collection
def plan_of(
    params: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    config: Config | None,
    mesh: Ranks | Alone | None = None,
    guard_mesh: Ranks | None = None,
    hyper_of: Mapping[str, int] | None = None,
    alike: bool | None = None,
    owners: dict[str, int] | None = None,
    missed: Collection[str] = (),
) -> Plan:
    """The plan of a step over parameters whose routes are decided. See `make_plan`.

    ``alike``: whether the ranks of ``guard_mesh`` have the same parameters; ``None``: they ask each
    other. ``owners``: with ``replicas="share"`` the owners that parameters have already; new ones
    are added. ``missed``: AdamW's parameters that were not in every step so far.
    """
    config = config_given(config)
    one_storage = check_params(params)
    prepare_inductor()
    hyper_of, hypers = checked_hyper_of(params, hyper_of)
    copies = checked_ranks(mesh, guard_mesh)
    stages, device = stages_of(config), next(iter(params.values())).device

    decided = [
        decide(name, tensor, *decisions[name][:2], config, stages, copies, hyper_of[name])
        for name, tensor in params.items()
    ]
    state = {key: spec for each in decided for key, spec in each.state.items()}
    state |= {f"guard.{name}": Spec((), torch.int32) for name in ("step", "skipped", "consecutive")}
    for name in params.keys() & state.keys():
        raise ValueError(
            f"params[{name!r}]: is the name of a tensor of the state too; give this parameter "
            "another name"
        )
    table: list[Own] = []  # of buckets whose matrices are updated by rates of their own
    chosen = resolve(config.coefficients, config.steps, config.safety_factor)
    if config.replicas == "share":
        decided, owned = with_owned_state(decided, stages, {} if owners is None else owners)
        notes = owned.notes
    else:
        (decided, notes), owned = with_sharing(decided, chosen, config, device), OwnedState()
    buckets = _matrix_buckets(decided, chosen, config, stages, device, table)
    notes = (*notes, *notes_of_hops(buckets))
    adamw = _adamw_buckets(decided, config, table, missed)
    parameters = tuple(each.parameter for each in decided)
    rule = guard_rule(parameters, (*buckets, *adamw), config, device, mesh, guard_mesh, alike)
    streaming = streaming_of([block for bucket in buckets for block in bucket.blocks])
    if streaming is not None:
        check_early(rule)
        notes = (*notes, streaming.note)
    placements = {p.name: p.spec.sharded for p in parameters}
    return Plan(
        config=config,
        stages=stages,
        device=device,
        parameters=parameters,
        buckets=buckets,
        adamw=adamw,
        state={key: spec for key, spec in state.items() if key not in owned.elsewhere},
        whole_state=state,
        owned=owned,
        guard=rule,
        metrics=metrics_rule(parameters, rule, owned, device) if config.metrics else None,
        sharded=any(placement is not None for placement in placements.values()),
        one_storage=one_storage,
        subclasses=any(map(is_subclass, params.values())),
        hypers=hypers,
        own_rates=rate_tensors(table, device),
        missed=tuple(own.missed for own in table) if any(own.missed for own in table) else (),
        common=common_of(placements, copies, rule, guard_mesh),
        hops=max((bucket.hops for bucket in buckets), default=0),
        notes=notes,
        streaming=streaming,
        before_ranks=asks_for_ranks(config) and is_before_ranks(mesh, guard_mesh),
    )


def _matrix_buckets(
    decided: Sequence[Decided],
    chosen: CoefficientSet,
    config: Config,
    stages: Stages,
    device: torch.device,
    table: list[Own],
) -> tuple[Bucket, ...]:
    stacks: dict[tuple[Any, ...], list[Group]] = {}
    for dtype, group in groups_of(decided, config):
        short, long = sorted((group.rows, group.cols))
        form = choose(chosen, config.method, config.orthogonalize_dtype, short, long, device, dtype)
        apart = config.orthogonalizer is not None or dtype == torch.float64
        own = dtype if apart else None  # what a stack may not mix with others
        at = group.ownership
        ranks = None if at is None else (at.group, at.shards, at.replicas)
        momentum = stages.momentum.states[0].dtype_for(config, dtype)
        kernels = ops.kernels_for(device, [dtype, momentum])
        key: tuple[Any, ...] = (short, long, form, own, ranks, kernels, momentum == torch.float64)
        if stays_apart(ranks is not None, config):
            key = (*key, group.own[0].hyper)
        stacks.setdefault(key, []).append(group)

    cut = with_cut(stacks, chosen.rows, config)
    owners = _owners([group for _, groups in cut for group in groups])
    found: list[Bucket] = []
    for (short, long, form, own, ranks, kernels, exact, *_), groups in cut:
        groups = [replace(group, ownership=owners.get(id(group))) for group in groups]
        wide = torch.float64 if own == torch.float64 else torch.float32
        safe = secured(chosen, form.dtype)
        most = float("inf") if config.orthogonalizer is not None else absurd(safe, short)
        common: dict[str, Any] = {
            "rows": short, "cols": long, "form": form,
            "coefficients": safe,
            "wide": wide, "most": most, "groups": tuple(groups), "kernels": kernels,
        }  # fmt: skip
        if ranks is None:
            each = [
                own
                for group in groups
                for block, own in zip(group.blocks, group.own, strict=False)
                for _ in range(block.count)
            ]
            found.append(Bucket(**common, rates_at=added(table, each)))
            continue
        dtype = wide if gathered_wide(config) else form.dtype
        # The powers of two of float64 momentums reach further than those of float32.
        numbers = torch.float64 if exact else wide
        shards = _group_shards(groups, config, stages)
        exchange = Exchange(shards, dtype, numbers, device, overlaps(ranks[0], device))
        found.append(SharedBucket(**common, exchange=exchange))
    return in_order(found)


def _owners(groups: Sequence[Group]) -> dict[int, Ownership]:
    """Who owns which matrices, by the id of each group that ranks share."""
    given = {
        id(group): with_owners(group.ownership, group.owners, [b.count for b in group.blocks])
        for group in groups
        if group.ownership is not None and group.owners
    }
    shared = [
        (id(group), Shared(group.ownership, group.count, group.rows, group.cols))
        for group in groups
        if group.ownership is not None and not group.owners
    ]
    found = balance([group for _, group in shared])
    return given | {key: ownership for (key, _), ownership in zip(shared, found, strict=True)}


def _group_shards(groups: Sequence[Group], config: Config, stages: Stages) -> list[GroupShards]:
    found: list[GroupShards] = []
    start, states = 0, len(stages.line_states)
    for group in groups:
        assert group.ownership is not None
        short, long = sorted((group.rows, group.cols))
        by_row = per_row(config, group.rows, group.cols, group.transposed)
        found.append(GroupShards(group.ownership, short, long, group.tall, by_row, states, start))
        start += found[-1].count
    return found


def _adamw_buckets(
    decided: Sequence[Decided], config: Config, table: list[Own], missed: Collection[str]
) -> tuple[AdamWBucket, ...]:
    alike: dict[tuple[Any, ...], list[Decided]] = {}
    for each in decided:
        p, route = each.parameter, each.parameter.route
        if route.algorithm == "adamw":
            key: tuple[Any, ...] = (each.master, each.chance, p.spec.dtype)
            if stays_apart(False, config):
                key = (*key, own_of(each))
            alike.setdefault(key, []).append(each)
    found = []
    for (master, *_), members in alike.items():
        local = [each for each in members if 0 not in each.parameter.spec.shape]
        late = [each.parameter.name if each.parameter.name in missed else "" for each in local]
        own = tuple(own_of(each)._replace(missed=m) for each, m in zip(local, late, strict=True))
        found.append(
            AdamWBucket(
                master=master, own=own, rates_at=added(table, own),
                columns=[each.parameter.name for each in local],
                names=[each.parameter.name for each in members],
                salts=tuple(salt for each in local for salt in each.salts),
            )
        )  # fmt: skip
    return tuple(found)
