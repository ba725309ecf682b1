"""Which replicas share which matrices: decided by what it is predicted to cost, and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..algorithm.coefficients import CoefficientSet
from ..algorithm.orthogonalize import Form, choose
from ..distributed.cost import Load
from ..distributed.owners import Ownership
from ..distributed.placements import check_alike
from ..distributed.sharing import global_ranks, is_open, narrowed, replicas_to_share
from ..types import Config, Row
from .buckets import Bucket, SharedBucket
from .parameters import Decided, SizedBlock

# How much longer a product of float32 or float64 takes than one of 16 bits: H200 data sheet,
# 67 TFLOP/s against the 544 that were measured.
_WIDE = 8


def with_sharing(
    decided: Sequence[Decided], chosen: CoefficientSet, config: Config, device: torch.device
) -> tuple[list[Decided], tuple[str, ...]]:
    """The same parameters, whose matrices as many replicas share as is predicted to be fastest.

    And a line for every shape of matrices that not all replicas share. What an orthogonalizer of
    the caller's own costs nobody knows: there all share. A collective where replicas are on several
    nodes.

    Raises:
        ValueError: another rank decides otherwise, because its matrices or options are others.
    """
    if config.orthogonalizer is not None:
        return list(decided), ()
    alike: dict[Any, list[SizedBlock]] = {}
    for each in decided:
        for sized in each.sized_blocks:
            if sized.ownership is not None and sized.ownership.replicas.size > 1:
                alike.setdefault(_key(each, sized), []).append(sized)
    found: dict[Any, int] = {}
    lines: list[str] = []
    said: dict[str, list[str]] = {}  # by process group
    for key, sized_blocks in alike.items():
        (short, long), dtype, *_ = key
        form = choose(chosen, config.method, config.orthogonalize_dtype, short, long, device, dtype)
        ownership, matrices = (
            sized_blocks[0].ownership,
            sum(sized.block.count for sized in sized_blocks),
        )
        assert ownership is not None
        load = load_of(form, chosen.rows, short, long, matrices, ownership)
        found[key], every = replicas_to_share(load), len(load.ranks)
        if is_open(load):
            what = f"{matrices} matrices {short}x{long}: {found[key]} of {every} replicas share"
            said.setdefault(ownership.group, []).append(what)
        if found[key] < every:
            lines.append(_line(load, found[key]))
    for group, texts in said.items():  # before any rank waits for others to make a group
        check_alike(texts, group)
    if not lines:
        return list(decided), ()

    def settled(each: Decided, sized: SizedBlock) -> SizedBlock:
        if sized.ownership is None or (key := _key(each, sized)) not in found:
            return sized
        return sized._replace(ownership=narrowed(sized.ownership, found[key]))

    return [
        replace(each, sized_blocks=tuple([settled(each, sized) for sized in each.sized_blocks]))
        for each in decided
    ], tuple(lines)


def notes_of_hops(buckets: Sequence[Bucket]) -> tuple[str, ...]:
    """A line for every bucket whose messages go in several hops."""
    found = []
    for bucket in buckets:
        shape = bucket.exchange.grid.shape if isinstance(bucket, SharedBucket) else ()
        if len(shape) > 1:
            over = " x ".join(map(str, shape))
            found.append(f"{bucket.rows}x{bucket.cols}: messages go over a grid of {over} ranks")
    return tuple(found)


def load_of(
    form: Form,
    coefficients: Sequence[Row],
    rows: int,
    cols: int,
    matrices: int,
    ownership: Ownership,
) -> Load:
    """What matrices of one shape, rows <= cols, are to the ranks that store them."""
    flop = flop_of(form, coefficients, rows, cols) * (1 if form.dtype.itemsize == 2 else _WIDE)
    return Load(matrices, rows, cols, flop, form.dtype.itemsize, global_ranks(ownership))


def flop_of(form: Form, coefficients: Sequence[Row], rows: int, cols: int) -> float:
    """Of the products of one matrix rows <= cols, with symmetric ones computed by half."""
    steps, squares = len(coefficients), sum(1 for row in coefficients if row[2])
    whole, small = 3.0 * rows * rows * cols, float(rows) ** 3
    if form.method == "standard":
        return steps * whole + squares * small
    starts = 1 + len(form.restarts)
    return starts * whole + (squares + 3 * (steps - starts)) * small


def _key(each: Decided, sized: SizedBlock) -> tuple[Any, ...]:
    """Which matrices are decided about together: about those of a bucket."""
    ownership: Ownership | None = sized.ownership
    assert ownership is not None
    size = tuple(sorted((sized.rows, sized.cols)))
    dtype = each.parameter.spec.dtype
    return size, dtype, ownership.group, ownership.shards, ownership.replicas


def _line(load: Load, replicas: int) -> str:
    every = len(load.ranks)
    ms, of_all = (1e3 * load.step(k) for k in (replicas, every))
    who = (
        f"{replicas} of {every} replicas share the work"
        if replicas > 1
        else f"each of {every} replicas does all the work"
    )
    return f"{load.rows}x{load.cols}: {who}, predicted {ms:.3g} ms; if all shared, {of_all:.3g} ms"
