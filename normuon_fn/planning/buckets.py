"""What is done together in a step: groups of matrices in buckets, and AdamW's parameters in theirs.

A bucket knows how its work is done (`Bucket.work`): on one device, shared between ranks, or by
AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm.bucket import MatrixWork
from ..algorithm.lion import OTHERS
from ..algorithm.orthogonalize import lines_of
from ..algorithm.streamed import Piece, StreamedWork
from ..algorithm.work import Kind, MatrixKind, Members, Own, Stack, Work
from ..distributed.messages import Exchange
from ..distributed.owned import OwnedWork
from ..distributed.owners import Ownership
from ..distributed.shared import SharedWork
from ..types import Config
from .chunks import CHUNK, chunks
from .layout import Block
from .tensors import StepTensors


@dataclass(frozen=True, kw_only=True)
class Group(MatrixKind):
    """Blocks of one shape, dtype and rate: one stack for everything but the orthogonalization."""

    blocks: tuple[Block, ...]
    # Of all parameters that belong to it, also those of which nothing is on this rank.
    names: tuple[str, ...]
    ownership: Ownership | None = None  # where ranks share the matrices: who owns which
    # Where replicas share the state too: by block, in their order, the replica that owns it.
    owners: tuple[int, ...] = ()
    # one for every block; groups that ranks share, or that stay apart and have none here, one
    own: tuple[Own, ...]

    @property
    def local(self) -> bool:
        """Whether any entry of it is on this rank."""
        return self.ownership is None or self.ownership.local_rect.size > 0

    @property
    def count(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def owned(self) -> tuple[Block, ...]:
        """The blocks whose state this rank keeps, where replicas share it."""
        assert self.ownership is not None
        here = self.ownership.replicas.number
        pairs = zip(self.blocks, self.owners, strict=True)
        return tuple(block for block, owner in pairs if owner == here)


@dataclass(frozen=True, kw_only=True)
class Bucket(Stack):
    """Groups whose matrices are orthogonalized as one stack [n, rows <= cols], on one device."""

    groups: tuple[Group, ...]
    # where the rates of its matrices begin in the plan's table; None: all have the same
    rates_at: int | None = None

    @property
    def blocks(self) -> list[Block]:
        return [block for group in self.groups for block in group.blocks]

    @property
    def names(self) -> list[str]:
        """Of all parameters whose matrices are in it."""
        return [name for group in self.groups for name in group.names]

    @property
    def columns(self) -> list[str]:
        """The parameter of each of its matrices on this rank, in the order of the flags."""
        return [block.name for block in self.blocks for _ in range(block.count)]

    @property
    def shared_by(self) -> str | None:
        """The process group of the ranks that share its work."""
        return None

    @property
    def heard_by(self) -> str | None:
        """The process group whose ranks all hear of its updates in its messages."""
        return None

    @property
    def hops(self) -> int:
        """How many hops its messages take beyond the first."""
        return 0

    def how(self, config: Config) -> str:
        """How its matrices are orthogonalized, for the table of the plan."""
        if config.orthogonalizer is not None:
            return "own orthogonalizer"
        kernels = ", symmetric kernels" if self.form.products == "symmetric" else ""
        return f"{self.form.method} {short_name(self.form.dtype)}{kernels}"

    def work(self, tensors: StepTensors) -> Work:
        runs = [(tensors.has_gradient(block.name), block.count) for block in self.blocks]
        # None of them is on this rank: then it does not matter by which.
        own = next((own for group in self.groups for own in group.own), Own())
        at = self.rates_at
        rates = tensors.rates(own) if at is None else tensors.own_rates(at, runs)
        graded = [
            [block for block in group.blocks if tensors.has_gradient(block.name)]
            for group in self.groups
        ]
        parts = chunks(graded, self._at_a_time(tensors.config))
        groups: list[Members[MatrixKind]] = []
        pieces: list[list[Piece]] = []
        start = 0
        for k, blocks in (part for chunk in parts for part in chunk):
            end = start + sum(block.count for block in blocks)
            groups.append(tensors.members(self.groups[k], blocks, rates.part(slice(start, end))))
            if tensors.conveyor is not None:
                pieces.append([*tensors.pieces(self.groups[k], blocks, rates, start)])
            start = end
        context, counts = tensors.context(rates.hyper, self.kernels), [*map(len, parts)]
        if tensors.conveyor is not None:
            return StreamedWork(self, groups, runs, context, counts, pieces, tensors.conveyor)
        return MatrixWork(self, groups, runs, context, counts)

    def _at_a_time(self, config: Config) -> int:
        """How many matrices; a caller's own orthogonalizer gets all of them as one stack."""
        if config.orthogonalizer is not None:
            return sum(group.count for group in self.groups) or 1
        rows, cols = lines_of(self.rows, self.cols, self.form)
        return max(1, CHUNK // (rows * cols * self.form.dtype.itemsize or 1))


@dataclass(frozen=True, kw_only=True)
class SharedBucket(Bucket):
    """The same where ranks have parts or replicas: each of them orthogonalizes a share."""

    exchange: Exchange

    @property
    def shared_by(self) -> str | None:
        return self.exchange.group

    @property
    def hops(self) -> int:
        return len(self.exchange.back.hops.onward)

    @property
    def heard_by(self) -> str | None:
        ownerships = [group.ownership for group in self.groups]
        narrowed = any(ownership is None or ownership.narrowed for ownership in ownerships)
        return None if narrowed else self.exchange.group

    def how(self, config: Config) -> str:
        ranks = self.exchange.shards.size * self.exchange.replicas.size
        return f"{super().how(config)}, shared by {ranks} ranks"

    def work(self, tensors: StepTensors) -> Work:
        groups: list[Members[MatrixKind]] = [
            tensors.members(group, group.blocks, tensors.rates(group.own[0]), group.local)
            for group in self.groups
        ]
        runs = [(group.local, group.count) for group in self.groups]
        context = tensors.context(groups[0].rates.hyper, self.kernels)
        if self.groups[0].owners:
            owned: list[Members[MatrixKind]] = [
                tensors.members(group, group.owned, tensors.rates(group.own[0]))
                for group in self.groups
            ]
            return OwnedWork(self, groups, owned, context, self.exchange)
        return SharedWork(self, groups, runs, context, self.exchange)


@dataclass(frozen=True, kw_only=True)
class AdamWBucket(Kind):
    """Parameters that AdamW updates."""

    columns: list[str]  # the parameters of which anything is on this rank
    names: list[str]  # all of them
    salts: tuple[int, ...] = ()  # one per column, where they are rounded by chance
    own: tuple[Own, ...]  # one per column
    rates_at: int | None = None  # as in Bucket

    shared_by = None

    def work(self, tensors: StepTensors) -> Work:
        runs = [(tensors.has_gradient(name), 1) for name in self.columns]
        at, own = self.rates_at, self.own[0] if self.own else Own()
        rates = tensors.rates(own) if at is None else tensors.own_rates(at, runs)
        members = tensors.whole_members(self, self.columns, self.salts, rates)
        return OTHERS[tensors.config.other].work(members, runs, tensors.context(rates.hyper))


AnyBucket = Bucket | AdamWBucket


def parameter_of(
    buckets: Sequence[AnyBucket], names: Sequence[str], device: torch.device
) -> Tensor:
    """[n_matrices] int64: the place in ``names`` of the parameter of every local matrix."""
    place = {name: k for k, name in enumerate(names)}
    found = [place[name] for bucket in buckets for name in bucket.columns]
    return torch.tensor(found, dtype=torch.int64, device=device)


def members_of(buckets: Sequence[AnyBucket], names: Sequence[str], device: torch.device) -> Tensor:
    """[n_buckets, n_params] bool: which parameters each bucket decides about. See `guard.Rule`."""
    rows = [[name in own for name in names] for own in (set(bucket.names) for bucket in buckets)]
    return torch.tensor(rows, dtype=torch.bool, device=device).reshape(len(rows), len(names))


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
