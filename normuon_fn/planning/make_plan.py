"""`make_plan`: parameters, routes and options in, a `Plan` out. Everything here happens on the host, once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..algorithm.coefficients import resolve
from ..algorithm.normalize import per_row
from ..algorithm.orthogonalize import choose
from ..compat import Ranks, gather_objects, overlaps, prepare_inductor, process_group, storage_key
from ..distributed.messages import Exchange
from ..distributed.owners import Lane, Spread, balance
from ..distributed.placements import Sharded, covering, local, reduced, sharded
from ..routing.resolve import Routes, resolve_routes
from ..types import Config
from .layout import Block, View, part_of
from .plan import AdamWBucket, Bucket, Group, Parameter, Plan, Spec
from .reading import read_as_matrices, variances

Read = tuple[
    View, int, int, int
]  # of a block: how it is read, as how many matrices of how many rows and columns


def make_plan(
    params: Mapping[str, Tensor],
    config: Config | None = None,
    *,
    routes: Routes | None = None,
    mesh: Ranks | None = None,
    guard_mesh: Ranks | None = None,
    hyper_of: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a step over ``params``: routes, validates, buckets. Everything here happens on the host, once.

    Args:
        params: name -> tensor; shapes, dtypes and the device are read, never the values.
        routes: name, glob or predicate ``(name, tensor) -> bool`` -> `Route`; the first entry that matches a parameter decides.
            Without one: matrices and stacks of matrices get NorMuon, but embeddings and output heads (by name) and everything
            else AdamW. Or the table of `routes_for`, which has them all.
        mesh: the ranks that hold the same plain tensors (DeviceMesh or ProcessGroup): each orthogonalizes its share. DTensors
            bring their own.
        guard_mesh: the ranks that skip a step together, for example the stages of a pipeline: they may have other parameters.
            With it, this is a collective. ``None``: all that hold a part of a parameter.
        hyper_of: name -> which entry of `Hyper`'s tensors a parameter takes; these are then 1-d (`Hyper.stack`). For parameter
            groups whose hyperparameters move apart: one graph and one guard. Matrices of different entries are not stacked.

    Raises:
        TypeError: parameters or options of the wrong kind (integer, complex, sparse, not tensors).
        ValueError: an empty dict, parameters that share memory or lie on several devices, a route that matches nothing or
            does not fit its parameter. Each names the parameter.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    one_storage = _check_params(params)
    prepare_inductor()
    routed = resolve_routes(params, {} if routes is None else routes)

    parameters: list[Parameter] = []
    state: dict[str, Spec] = {}
    hyper_of, hypers = _hyper_of(params, hyper_of)
    groups: dict[tuple, tuple[list[Block], list[str]]] = {}
    adamw: dict[tuple, tuple[list[str], list[str]]] = {}
    for name, tensor in params.items():
        route, reason = routed[name]
        if route.unfrozen is not None and tensor.requires_grad:
            route, reason = route.unfrozen, "requires a gradient by now"
        route = replace(route, unfrozen=None)
        lies = sharded(name, tensor)
        spec = Spec(
            tuple(tensor.shape) if lies is None else tuple(n for _, n in lies.here),
            tensor.dtype,
            lies,
        )
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        blocks: tuple[Block, ...] = ()
        rest, chance = (
            ("", False) if route.algorithm == "frozen" else _master(name, tensor.dtype, config)
        )
        if rest:
            state[name + rest] = Spec(
                spec.shape, torch.int16 if rest == ".mantissa" else torch.float32, lies
            )
        here_at = () if lies is None else lies.here
        if route.algorithm == "normuon":
            read = read_as_matrices(name, tensor, route)
            by_row = [per_row(config, rows, cols, route.transposed) for _, _, rows, cols in read]
            here, spreads = _here(name, read, lies, mesh)
            variance, views = variances(here, by_row)
            salts = [
                _salts(config.seed, name, (here_at, view.start), n if chance else 0)
                for view, n, _, _ in here
            ]
            own = [
                Block(name, n, view, own, of)
                for (view, n, _, _), own, of in zip(here, views, salts, strict=True)
            ]
            state[f"{name}.momentum"] = Spec(spec.shape, config.momentum_dtype or wide, lies)
            if config.normalize:
                state[f"{name}.variance"] = Spec(
                    variance, wide, _variance_lies(name, variances(read, by_row)[0], variance, lies)
                )
            for block, (_, _, rows, cols), spread in zip(own, read, spreads, strict=True):
                others = rest, route.transposed, hyper_of[name]
                key = (rows, cols, tensor.dtype, route.lr_mul, route.wd_mul, spread, *others)
                held, names = groups.setdefault(key, ([], []))
                held += [block] if block.count else []
                names.append(name)
            blocks = tuple(block for block in own if block.count)
        elif route.algorithm == "adamw":
            state[f"{name}.exp_avg"] = state[f"{name}.exp_avg_sq"] = Spec(spec.shape, wide, lies)
            adamw_key = (rest, chance, tensor.dtype, route.lr_mul, route.wd_mul, hyper_of[name])
            held_names, names = adamw.setdefault(adamw_key, ([], []))
            held_names += [] if 0 in spec.shape else [name]
            names.append(name)
        parameters.append(Parameter(name, spec, route, reason, blocks, hyper=hyper_of[name]))
    for counter in ("step", "skipped", "consecutive"):
        state[f"guard.{counter}"] = Spec((), torch.int32)
    for name in params.keys() & state.keys():
        raise ValueError(
            f"params[{name!r}]: is the name of a tensor of the state too; give this parameter another one"
        )

    device = next(iter(params.values())).device
    buckets = _bucket(groups, config, device)
    of = {p.name: () if p.spec.sharded is None else p.spec.sharded.here for p in parameters}
    adamw_buckets = tuple(
        AdamWBucket(
            tuple(held), lr, wd, tuple(names), rest,
            tuple(salt for name in held for salt in _salts(config.seed, name, of[name], int(chance))), hyper,
        )
        for (rest, chance, _, lr, wd, hyper), (held, names) in adamw.items()
    )  # fmt: skip
    columns, total = _columns(buckets, adamw_buckets)
    parameters = [replace(p, columns=tuple(columns.get(p.name, ()))) for p in parameters]
    most = max(1, *(len(p.columns) for p in parameters)) if parameters else 1
    table = [(list(p.columns) or [total]) for p in parameters]
    index = torch.tensor(
        [(row + row[:1] * most)[:most] for row in table], dtype=torch.int64, device=device
    )
    members = [{name for group in bucket.groups for name in group.names} for bucket in buckets]
    members += [set(bucket.members) for bucket in adamw_buckets]
    has = torch.tensor(
        [[p.name in names for p in parameters] for names in members],
        dtype=torch.bool,
        device=device,
    )
    has = has.reshape(len(members), len(parameters))
    lie = [p.spec.sharded for p in parameters]
    group = _guard_group(config, lie, mesh, guard_mesh)
    alike = (
        group is None
        or guard_mesh is None
        or len({tuple(names) for names in gather_objects(list(params), group)}) == 1
    )
    if not alike and config.guard_scope == "bucket":
        raise ValueError(
            "guard_mesh: its ranks have other parameters, so that buckets mean nothing to them; guard_scope='step'"
        )
    sharded_at_all = any(of is not None for of in lie)
    return Plan(
        config, device, tuple(parameters), buckets, adamw_buckets, state, index, has, group, alike, sharded_at_all,
        one_storage, hypers,
    )  # fmt: skip


def _hyper_of(
    params: Mapping[str, Tensor], given: Mapping[str, int] | None
) -> tuple[Mapping[str, int], int]:
    if given is None:
        return dict.fromkeys(params, 0), 0
    if not isinstance(given, Mapping):
        raise TypeError(
            f"hyper_of: expected a dict of parameter name -> int, got {type(given).__name__}"
        )
    for name in params:
        index = given.get(name)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(
                f"hyper_of[{name!r}]: expected an int >= 0 for every parameter, got {index!r}"
            )
    return given, 1 + max(given.values())


def _master(name: str, dtype: torch.dtype, config: Config) -> tuple[str, bool]:
    """The suffix of the state that makes a float32 master of a parameter, and whether it is rounded by chance instead."""
    if config.master == "none" or dtype.itemsize > 2:
        return "", False
    if config.master == "fp32":
        return ".master", False
    if dtype != torch.bfloat16:
        raise ValueError(
            f"params[{name!r}]: Config.master={config.master!r} is for bfloat16, got {dtype}: 16 more bits do not make it a "
            "float32, whose exponents reach further; use 'fp32'"
        )
    return (".mantissa", False) if config.master == "mantissa" else ("", True)


def _salts(seed: int, name: str, where: object, count: int) -> tuple[int, ...]:
    """Numbers in [0, 2**31), one a matrix: what tells its chances from those of others. Copies on other ranks have the same."""
    digests = (
        hashlib.blake2s(repr((seed, name, where, k)).encode(), digest_size=4).digest()
        for k in range(count)
    )
    return tuple(int.from_bytes(digest, "little") >> 1 for digest in digests)


def _here(
    name: str, read: Sequence[Read], lies: Sharded | None, mesh: Ranks | None
) -> tuple[list[Read], list[Spread | None]]:
    """What of a parameter's blocks lies on this rank, and how each one's matrices lie on all of them."""
    if lies is None:
        return list(read), [Spread.of((), rows, cols, mesh) for _, _, rows, cols in read]
    here: list[Read] = []
    spreads: list[Spread | None] = []
    for view, count, rows, cols in read:
        try:
            parts = [part_of(view, count, rows, cols, part) for part in lies.parts]
        except ValueError as error:
            raise ValueError(f"params[{name!r}]: {lies.placements}: {error}") from None
        rects = [rect for _, _, rect in parts]
        whole = all(rect == (0, rows, 0, cols) for rect in rects)
        if not whole and any(n != count for _, n, _ in parts):
            raise ValueError(
                f"params[{name!r}]: {lies.placements} shards the matrices and the stack of them; shard only one of the two"
            )
        own, n, rect = parts[lies.rank]
        here.append((own, n, rect.rows, rect.cols))
        spreads.append(
            None if any(n != count for _, n, _ in parts) else Spread.of(rects, rows, cols, lies)
        )
    return here, spreads


def _variance_lies(
    name: str, shape: tuple[int, ...], here: tuple[int, ...], lies: Sharded | None
) -> Sharded | None:
    try:
        found = reduced(lies, shape)
    except ValueError as error:
        raise ValueError(f"params[{name!r}]: {error}") from None
    if found is not None and tuple(length for _, length in found.here) != here:
        raise ValueError(
            f"params[{name!r}]: {found.placements} has no equal for a variance of shape {shape}; shard by whole heads"
        )
    return found


def _guard_group(
    config: Config, lie: Sequence[Sharded | None], mesh: Ranks | None, guard_mesh: Ranks | None
) -> str | None:
    for name, given in (("mesh", mesh), ("guard_mesh", guard_mesh)):
        if given is not None and not isinstance(given, Ranks):
            raise TypeError(
                f"{name}: expected a DeviceMesh or a ProcessGroup, got {type(given).__name__}"
            )
    if config.guard == "off":
        return None
    ranks = mesh if guard_mesh is None else guard_mesh
    if ranks is not None:
        group = process_group(ranks)
        return group.group_name if group.size() > 1 else None
    return covering(lie)


def _check_params(params: Mapping[str, Tensor]) -> bool:
    """Whether some are parts of one storage."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a dict of name -> tensor, got {type(params).__name__}")
    if not params:
        raise ValueError("params: expected at least one parameter, got an empty dict")
    held: dict[object, list[tuple[int, int, str]]] = {}
    device, first = None, ""
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"params[{name!r}]: expected str -> Tensor, got {type(tensor).__name__}"
            )
        if (
            tensor.layout != torch.strided
            or not tensor.dtype.is_floating_point
            or tensor.dtype.itemsize < 2
        ):
            raise TypeError(
                f"params[{name!r}]: expected a dense float64, float32, bfloat16 or float16 tensor, got {tensor.dtype} "
                f"{tensor.layout}; leave it out of params"
            )
        tensor = local(tensor)
        if device is not None and tensor.device != device:
            raise ValueError(
                f"params[{name!r}]: on {tensor.device}, but {first!r} is on {device}; make one plan a device"
            )
        device, first = tensor.device, first or name
        if tensor.numel():
            reach = 1 + sum(
                (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start, end = (int(tensor.storage_offset() + at) * tensor.itemsize for at in (0, reach))
            held.setdefault(storage_key(tensor), []).append((start, end, name))
    for views in held.values():  # of one storage, as cuDNN keeps the weights of an LSTM
        views.sort(key=lambda view: view[0])
        for (_, end, name), (start, _, other) in pairwise(views):
            if start < end:
                raise ValueError(
                    f"params[{other!r}]: shares memory with {name!r}; pass tied weights once, clone() slices"
                )
    return any(len(views) > 1 for views in held.values())


def _bucket(
    groups: dict[tuple, tuple[list[Block], list[str]]], config: Config, device: torch.device
) -> tuple[Bucket, ...]:
    chosen = resolve(config.coefficients, config.steps, config.safety_factor)
    buckets: dict[tuple, list[Group]] = {}
    for (rows, cols, of, lr_mul, wd_mul, spread, *others), (blocks, names) in groups.items():
        short, long = sorted((rows, cols))
        form = choose(chosen, config.method, config.orthogonalize_dtype, short, long, device, of)
        own = (
            of if config.orthogonalizer is not None or of == torch.float64 else None
        )  # what a stack may not mix
        ranks = None if spread is None else (spread.group, spread.shards, spread.copies)
        group = Group(tuple(blocks), rows, cols, lr_mul, wd_mul, tuple(names), spread, *others)
        buckets.setdefault((short, long, form, own, ranks, group.hyper), []).append(group)

    shared = balance([group for parts in buckets.values() for group in parts])
    found = []
    for (short, long, form, own, _, hyper), parts in buckets.items():
        parts = [replace(group, spread=shared.get(id(group))) for group in parts]
        exchange = None
        if parts[0].spread is not None:
            wide = torch.float64 if own == torch.float64 else torch.float32
            dtype = wide if config.orthogonalizer else form.dtype
            exchange = Exchange(
                _lanes(parts, config), dtype, wide, device, overlaps(parts[0].spread.group, device)
            )
        found.append(Bucket(tuple(parts), short, long, form, chosen, exchange, hyper))
    return tuple(
        sorted(found, key=lambda bucket: bucket.exchange is not None)
    )  # what is here, while the rest is on its way


def _lanes(groups: Sequence[Group], config: Config) -> list[Lane]:
    lanes, start = [], 0
    for group in groups:
        assert group.spread is not None
        short, long = sorted((group.rows, group.cols))
        by_row = per_row(config, group.rows, group.cols, group.transposed)
        lanes.append(Lane(group.spread, short, long, group.tall, by_row, config.normalize, start))
        start += lanes[-1].count
    return lanes


def _columns(
    buckets: tuple[Bucket, ...], adamw: tuple[AdamWBucket, ...]
) -> tuple[dict[str, list[int]], int]:
    columns: dict[str, list[int]] = {}
    at = 0
    for bucket in buckets:
        for group in bucket.groups:
            for block in group.blocks:
                columns.setdefault(block.name, []).extend(range(at, at + block.count))
                at += block.count
    for names in adamw:
        for name in names.names:
            columns[name] = [at]
            at += 1
    return columns, at
