"""What a step does, decided once: what each parameter gets, how it is read as matrices, what is done together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..algorithm.coefficients import CoefficientSet
from ..algorithm.orthogonalize import Form
from ..distributed.messages import Exchange
from ..distributed.owners import Ownership
from ..distributed.placements import ShardedLayout
from ..routing.routes import Route
from ..routing.table import render
from ..types import Config
from .layout import Block


@dataclass(frozen=True)
class Spec:
    """What a tensor must look like at every step; of a DTensor, the part that lies here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: ShardedLayout | None = None


@dataclass(frozen=True)
class Parameter:
    """One parameter: what it gets and why. ``columns``: its matrices' places in the flags by matrix."""

    name: str
    spec: Spec
    route: Route
    reason: str
    blocks: tuple[Block, ...] = ()
    columns: tuple[int, ...] = ()
    hyper: int = 0


@dataclass(frozen=True)
class Group:
    """Blocks of one shape, dtype and rate: one stack for everything but the orthogonalization."""

    blocks: tuple[Block, ...]
    rows: int
    cols: int
    lr_mul: float
    wd_mul: float
    names: tuple[
        str, ...
    ]  # of all parameters that belong to it, those included of which nothing lies here
    spread: Ownership | None = None
    rest: str = (
        ""  # the state that makes float32 masters of the parameters: ".mantissa" or ".master"
    )
    transposed: bool = False  # the outputs are the columns
    hyper: int = 0

    @property
    def held(self) -> bool:
        """Whether anything of it lies here."""
        return self.spread is None or self.spread.local_rect.size > 0

    @property
    def count(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def tall(self) -> bool:
        return self.rows > self.cols


@dataclass(frozen=True)
class Bucket:
    """Groups whose matrices, tall ones transposed, are orthogonalized as one stack [n, rows <= cols]."""

    groups: tuple[Group, ...]
    rows: int
    cols: int
    form: Form
    coefficients: CoefficientSet
    exchange: Exchange | None = None  # with the ranks that hold parts of the matrices, or copies
    hyper: int = 0

    @property
    def blocks(self) -> list[Block]:
        return [block for group in self.groups for block in group.blocks]

    def with_grad(self, grads: Mapping[str, Tensor | None]) -> list[Group]:
        """The groups without the blocks that have no gradient, and without the groups that have none left."""
        if self.exchange is not None:
            return list(self.groups)
        kept = [
            replace(g, blocks=tuple(b for b in g.blocks if grads[b.name] is not None))
            for g in self.groups
        ]
        return [group for group in kept if group.blocks]


@dataclass(frozen=True)
class AdamWBucket:
    """Parameters updated by AdamW at the same rate. ``members``: those included of which nothing lies here."""

    names: tuple[str, ...]
    lr_mul: float
    wd_mul: float
    members: tuple[str, ...]
    rest: str = ""  # as of a Group
    salts: tuple[int, ...] = ()  # one a name, where they are rounded by chance
    hyper: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The static half of a step. ``str(plan)`` is a table; ``plan.names`` is the order of ``StepResult.flags``."""

    config: Config
    device: torch.device
    parameters: tuple[Parameter, ...]
    buckets: tuple[Bucket, ...]
    adamw: tuple[AdamWBucket, ...]
    state: dict[str, Spec]
    matrix_of: Tensor  # [n_params, most] int64 on the device: see guard.flags
    bucket_has: (
        Tensor  # [n_buckets, n_params] bool on the device, AdamW's buckets last: see guard.decide
    )
    guard_group: str | None = None  # the process group whose ranks decide together
    guard_alike: bool = True  # all of them have these parameters
    sharded: bool = False  # any parameter is a DTensor
    one_storage: bool = False  # some parameters are parts of one storage
    hypers: int = (
        0  # sets of hyperparameters: Hyper's tensors are [hypers]; 0: one set, and they are 0-d
    )

    @property
    def shared_by(self) -> list[str]:
        """The process groups whose ranks must have the same plan."""
        groups = [b.exchange.group for b in self.buckets if b.exchange]
        return list(
            dict.fromkeys(
                [*groups, *([self.guard_group] if self.guard_group and self.guard_alike else [])]
            )
        )

    @property
    def summary(self) -> list[str]:
        """What must be the same on all ranks, in lines."""
        lines = []
        for p in self.parameters:
            lies = p.spec.sharded
            shape, placed = (
                (p.spec.shape, "") if lies is None else (lies.shape, f" {lies.placements}")
            )
            lines.append(
                f"{p.name}: {shape} {_short(p.spec.dtype)}{placed} {p.route}{f' hyper {p.hyper}' if self.hypers else ''}"
            )
        return [
            *lines,
            *(
                f"Config.{f.name}: {getattr(self.config, f.name)!r}"
                for f in fields(self.config)
                if f.name != "orthogonalizer"
            ),
        ]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    def __str__(self) -> str:
        how: dict[str, list[str]] = {}
        for bucket in self.buckets:
            form = "own orthogonalizer" if self.config.orthogonalizer else _describe(bucket.form)
            form += (
                f", shared by {bucket.exchange.shards.size * bucket.exchange.replicas.size} ranks"
                if bucket.exchange
                else ""
            )
            for group in bucket.groups:
                for block in group.blocks:
                    how.setdefault(block.name, []).append(
                        f"{block.count} x {group.rows}x{group.cols}{'T' * group.transposed} {form}"
                    )
        rows = [("parameter", "shape", "dtype", "route", "matrices", "why")]
        for p in self.parameters:
            rate = "".join(
                f" {k}={v:g}"
                for k, v in (("lr*", p.route.lr_mul), ("wd*", p.route.wd_mul))
                if v != 1.0
            )
            shape = "x".join(map(str, p.spec.shape)) or "scalar"
            rows.append(
                (
                    p.name,
                    shape,
                    _short(p.spec.dtype),
                    p.route.algorithm + rate,
                    "; ".join(how.get(p.name, ["-"])),
                    p.reason,
                )
            )
        total = (
            f"{len(self.parameters)} parameters, {sum(g.count for b in self.buckets for g in b.groups)} matrices in "
            f"{len(self.buckets)} buckets; guard={self.config.guard!r} per {self.config.guard_scope}"
        )
        return f"{render(rows)}\n{total}"


def _describe(form: Form) -> str:
    kernels = ", symmetric kernels" if form.products == "symmetric" else ""
    return f"{form.method} {_short(form.dtype)}{kernels}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
