"""What one parameter brings into a plan: its state, and its blocks of matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..algorithm.lion import OTHERS
from ..algorithm.normalize import per_row
from ..algorithm.stages import Stages
from ..algorithm.state import MASTERS, State
from ..compat import Ranks
from ..distributed.owners import Ownership
from ..distributed.placements import (
    ShardedLayout,
    block_layout,
    per_row_layout,
    sharded_layout,
)
from ..distributed.shards import Rect
from ..ops.codes import BLOCK
from ..routing.routes import Route
from ..types import Config
from .layout import Block, View, part_of
from .plan import Parameter, Spec
from .reading import line_views, read_as_matrices, scale_views
from .streaming import check_alone, in_host_memory

Read = tuple[
    View, int, int, int
]  # a block: how it is read, as how many matrices of how many rows and columns


class SizedBlock(NamedTuple):
    """One block of a parameter, the size of its matrices, and who computes them."""

    name: str
    block: Block
    rows: int
    cols: int
    ownership: Ownership | None
    owner: int | None = None  # the replica that owns all of its parameter: see replicas.py


@dataclass(frozen=True)
class Decided:
    """Everything that `make_plan` needs of one parameter."""

    parameter: Parameter
    state: dict[str, Spec]
    master: str  # the state that makes a float32 master of it, or none
    chance: bool  # it is rounded by chance instead
    sized_blocks: tuple[SizedBlock, ...] = ()
    salts: tuple[int, ...] = ()  # of a parameter of AdamW's


def decide(
    name: str,
    tensor: Tensor,
    route: Route,
    reason: str,
    config: Config,
    stages: Stages,
    mesh: Ranks | None,
    hyper: int,
) -> Decided:
    """What a parameter brings into a plan.

    Raises:
        ValueError: the route does not fit the parameter, or its placements cut through what is one
        matrix.
    """
    if route.unfrozen is not None and tensor.requires_grad:
        route, reason = route.unfrozen, "requires a gradient by now"
    if route.unfrozen is not None:
        route = replace(route, unfrozen=None)
    placed = sharded_layout(name, tensor)
    shape = tuple(tensor.shape) if placed is None else tuple(n for _, n in placed.local_part)
    parameter = Parameter(name, Spec(shape, tensor.dtype, placed), route, reason, hyper=hyper)
    if route.algorithm == "frozen":
        return Decided(parameter, {}, "", False)
    master, chance = _master(name, tensor.dtype, config)
    states = [MASTERS[config.master]] if master else []
    if route.algorithm == "adamw":
        found = _entry_states(parameter, [*states, *OTHERS[config.other].states], config)
        salts = _salts(config.seed, name, () if placed is None else placed.local_part, int(chance))
        return Decided(parameter, found, master, chance, salts=salts)
    _check_forms(name, tensor.dtype, route, config, master)
    entries = [state for state in stages.states if state.per == "entry"]
    found = _entry_states(parameter, [*states, *entries], config)
    sized_blocks, specs = _matrices(parameter, tensor, config, mesh, chance, stages)
    for state, spec in specs:
        found[f"{name}.{state.name}"] = replace(spec, dtype=state.dtype_for(config, tensor.dtype))
    if config.state_device == "cpu":
        check_alone(name, placed, [sized.ownership for sized in sized_blocks])
        own, found = in_host_memory(name, [sized.block for sized in sized_blocks], found)
        sized_blocks = tuple(
            x._replace(block=block) for x, block in zip(sized_blocks, own, strict=True)
        )
    blocks = tuple(sized.block for sized in sized_blocks if sized.block.count)
    return Decided(replace(parameter, blocks=blocks), found, master, chance, sized_blocks)


def _check_forms(name: str, dtype: torch.dtype, route: Route, config: Config, master: str) -> None:
    """That the weight decay form of matrices, and cautious updates, go with everything else."""
    decay, cautious = route.of_matrices(config)
    if cautious and config.replicas == "share":
        raise ValueError(
            f"params[{name!r}]: Route(cautious_update=True) looks at gradients on every rank, of "
            "which replicas='share' reads those of owned matrices alone; write replicas='each'"
        )
    if decay != "hyperball":
        return
    _check_hyperball(name, dtype, config, master)
    if route.wd_mul not in (0.0, 1.0):
        raise ValueError(
            f"params[{name!r}]: Route(wd_mul={route.wd_mul:g}) has no effect: nothing decays with "
            "weight_decay_form='hyperball'; leave it out"
        )


def _entry_states(parameter: Parameter, states: Sequence[State], config: Config) -> dict[str, Spec]:
    """The specs of states that are shaped and placed as their parameter is."""
    spec = parameter.spec
    return {
        f"{parameter.name}.{state.name}": Spec(
            spec.shape,
            state.dtype_for(config, spec.dtype),
            spec.sharded,
            state.starts_as == "parameter",
        )
        for state in states
    }


def _master(name: str, dtype: torch.dtype, config: Config) -> tuple[str, bool]:
    """The state that makes a float32 master of a parameter; whether chance rounds it instead."""
    if config.master == "none" or dtype.itemsize > 2:
        return "", False
    if config.master == "fp32":
        return MASTERS["fp32"].name, False
    if dtype != torch.bfloat16:
        raise ValueError(
            f"params[{name!r}]: Config.master={config.master!r} is for bfloat16, got {dtype}: 16 "
            "more bits do not "
            "make it a float32, whose exponents reach further; use 'fp32'"
        )
    return ("", True) if config.master == "stochastic" else (MASTERS["mantissa"].name, False)


def _check_hyperball(name: str, dtype: torch.dtype, config: Config, master: str) -> None:
    if config.update_floor > 0:
        raise ValueError(
            f"params[{name!r}]: Config.update_floor is for matrices that are not kept on a "
            "hyperball, whose updates are as long as they are; write update_floor=0, or "
            "Route(weight_decay_form='decoupled')"
        )
    if dtype.itemsize < 4 and not master:
        raise ValueError(
            f"params[{name!r}]: weight_decay_form='hyperball' keeps the norm of float32 numbers, "
            f"and rounding to {dtype} makes it grow from step to step; write "
            f"Config(master={'mantissa' if dtype == torch.bfloat16 else 'fp32'!r})"
        )


def _matrices(
    parameter: Parameter,
    tensor: Tensor,
    config: Config,
    mesh: Ranks | None,
    chance: bool,
    stages: Stages,
) -> tuple[tuple[SizedBlock, ...], list[tuple[State, Spec]]]:
    """The blocks of a parameter; states with a number per row, column or block, and their specs."""
    name, route, placed = parameter.name, parameter.route, parameter.spec.sharded
    read = read_as_matrices(name, tensor, route)
    by_row = [per_row(config, rows, cols, route.transposed) for _, _, rows, cols in read]
    local, ownerships = _local(name, read, placed, mesh)
    shape, views = line_views(local, by_row)
    of_scales, scale_of = scale_views(local)
    where = () if placed is None else placed.local_part
    sized_blocks = []
    for (_, _, rows, cols), (view, n, _, _), line, scale, ownership in zip(
        read, local, views, scale_of, ownerships, strict=True
    ):
        salts = _salts(config.seed, name, (where, view.start), n if chance else 0)
        sized_blocks.append(
            SizedBlock(name, Block(name, n, view, line, scale, salts), rows, cols, ownership)
        )
    specs = []
    for state in stages.states:
        if state.per == "line":
            placement = _line_placement(name, line_views(read, by_row)[0], shape, placed, by_row)
            specs.append((state, Spec(shape, torch.float32, placement)))
        elif state.per == "block":
            placement = _scale_placement(name, read, of_scales, placed)
            specs.append((state, Spec(of_scales, torch.uint8, placement)))
    return tuple(sized_blocks), specs


def _local(
    name: str, read: Sequence[Read], placed: ShardedLayout | None, mesh: Ranks | None
) -> tuple[list[Read], list[Ownership | None]]:
    """What this rank has of the blocks, and how the matrices of each are spread over ranks."""
    if placed is None:
        return list(read), [Ownership.of((), rows, cols, mesh) for _, _, rows, cols in read]
    local: list[Read] = []
    ownerships: list[Ownership | None] = []
    for view, count, rows, cols in read:
        try:
            parts = [part_of(view, count, rows, cols, part) for part in placed.parts]
        except ValueError as error:
            raise ValueError(f"params[{name!r}]: {placed.placements}: {error}") from None
        rects = [rect for _, _, rect in parts]
        whole, same = (
            all(rect == (0, rows, 0, cols) for rect in rects),
            all(n == count for _, n, _ in parts),
        )
        if not whole and not same:
            raise ValueError(
                f"params[{name!r}]: {placed.placements} shards the matrices and the stack of "
                "them; shard only "
                "one of the two"
            )
        own, n, rect = parts[placed.rank]
        local.append((own, n, rect.rows, rect.cols))
        ownerships.append(Ownership.of(rects, rows, cols, placed) if same else None)
    return local, ownerships


def _line_placement(
    name: str,
    shape: tuple[int, ...],
    local: tuple[int, ...],
    placed: ShardedLayout | None,
    by_row: Sequence[bool],
) -> ShardedLayout | None:
    """How a state with one number per row (or column) is placed on the mesh of its parameter."""
    reduced = (-1 if by_row[0] else -2) if len(set(by_row)) == 1 and len(shape) > 1 else None
    try:
        found = per_row_layout(placed, shape, reduced)
    except ValueError as error:
        raise ValueError(f"params[{name!r}]: {error}") from None
    if found is not None and tuple(length for _, length in found.local_part) != local:
        raise ValueError(
            f"params[{name!r}]: {found.placements} has no counterpart for a state of shape "
            f"{shape}, one number "
            "per row or column of every matrix; shard by whole heads"
        )
    return found


def _scale_placement(
    name: str, read: Sequence[Read], local: tuple[int, ...], placed: ShardedLayout | None
) -> ShardedLayout | None:
    """How the scales of a momentum in one byte an entry are placed: as their parameter is.

    Raises:
        ValueError: a shard has a part of a block of columns.
    """
    if placed is None:
        return None
    found = block_layout(placed, scale_views(read)[0])
    for part, own in zip(placed.parts, found.parts, strict=True):
        views = [part_of(view, count, rows, cols, part) for view, count, rows, cols in read]
        shape = scale_views([(view, n, *_extent(rect)) for view, n, rect in views])[0]
        whole = all(
            rect.col % BLOCK == 0 and (rect.cols % BLOCK == 0 or rect.col + rect.cols == cols)
            for (_, n, rect), (_, _, _, cols) in zip(views, read, strict=True)
            if n * rect.size
        )
        if not whole or tuple(length for _, length in own) != shape:
            raise ValueError(
                f"params[{name!r}]: {placed.placements}: Config.momentum_dtype='int8' has a scale "
                f"for {BLOCK} columns of a row, which this sharding cuts; shard by rows, by whole "
                f"heads or by multiples of {BLOCK} columns, or write momentum_dtype=torch.bfloat16"
            )
    assert tuple(length for _, length in found.local_part) == local
    return found


def _extent(rect: Rect) -> tuple[int, int]:
    return rect.rows, rect.cols


def _salts(seed: int, name: str, where: object, count: int) -> tuple[int, ...]:
    """Numbers in [0, 2**31), one per matrix: they tell its chances from those of others.

    Replicas have the same.
    """
    digests = (
        hashlib.blake2s(repr((seed, name, where, k)).encode(), digest_size=4).digest()
        for k in range(count)
    )
    return tuple(int.from_bytes(digest, "little") >> 1 for digest in digests)
