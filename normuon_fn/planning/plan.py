"""`Plan`: what a step does, decided once: which rule each parameter gets, what is done together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..algorithm.guard import Rule
from ..algorithm.metrics import MetricsRule
from ..algorithm.stages import Stages
from ..algorithm.work import OwnRates
from ..distributed.placements import ShardedLayout
from ..routing.routes import Route
from ..routing.table import render
from ..types import Config
from .buckets import AdamWBucket, AnyBucket, Bucket, SharedBucket, short_name
from .layout import Block
from .streaming import Streaming

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Spec:
    """What a tensor must look like at every step; of a DTensor, its local part."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: ShardedLayout | None = None
    # a state that `init` copies from its parameter; others begin as zeros
    starts_as_parameter: bool = False
    host: bool = False  # a state in host memory, pinned where the plan is on a GPU

    def on(self, device: torch.device) -> torch.device:
        """Where it is in a plan on ``device``."""
        return HOST if self.host else device

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A new tensor, of a DTensor the local part, for a plan on ``device``."""
        pinned = self.host and device.type == "cuda"
        return torch.zeros(self.shape, dtype=self.dtype, device=self.on(device), pin_memory=pinned)


@dataclass(frozen=True)
class OwnedState:
    """Which rank keeps the state of which parameter, where replicas share it: see replicas.py."""

    group: str | None = None  # the process group of the replicas; None: nobody shares
    owners: dict[str, int] = field(default_factory=dict)  # by parameter, in the group
    kinds: tuple[str, ...] = ()  # of state that only owners keep
    elsewhere: frozenset[str] = frozenset()  # the state that this rank lacks
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One parameter: what it gets and why."""

    name: str
    spec: Spec
    route: Route
    reason: str
    blocks: tuple[Block, ...] = ()  # those with a matrix on this rank
    hyper: int = 0

    @property
    def looks(self) -> str:
        """Shape, dtype and placements, which are the same on all ranks that have a part of it."""
        sharded = self.spec.sharded
        shape = self.spec.shape if sharded is None else sharded.shape
        placed = "" if sharded is None else f" {sharded.placements}"
        return f"{shape} {short_name(self.spec.dtype)}{placed}"


@dataclass(frozen=True, eq=False)
class Plan:
    """The static half of a step. ``str(plan)`` is a table; ``plan.names`` orders the flags."""

    config: Config
    stages: Stages
    device: torch.device
    parameters: tuple[Parameter, ...]
    buckets: tuple[Bucket, ...]  # of matrices; those that ranks share come last
    adamw: tuple[AdamWBucket, ...]
    state: dict[str, Spec]
    guard: Rule
    metrics: MetricsRule | None = None
    sharded: bool = False  # any parameter is a DTensor
    one_storage: bool = False  # some parameters are parts of one storage
    subclasses: bool = False  # some parameters are of a subclass of Tensor
    # sets of hyperparameters: Hyper's tensors are [hypers]; 0: one set, and they are 0-d
    hypers: int = 0
    # of all buckets whose matrices differ in them, one after the other
    own_rates: OwnRates | None = None
    # of these, by row: the parameter whose missed steps are counted, or ""; empty if there is none
    missed: tuple[str, ...] = ()
    # By process group: the parameters that its ranks have parts or copies of. See common.py.
    common: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole_state: dict[str, Spec] = field(default_factory=dict)  # of all ranks that share a state
    owned: OwnedState = field(default_factory=OwnedState)  # who keeps which of it
    hops: int = 0  # that a message takes beyond the first, at most
    notes: tuple[str, ...] = ()  # what was decided beyond the parameters, in lines
    streaming: Streaming | None = None  # of momentums in host memory
    before_ranks: bool = False  # it would ask for other ranks, and there was no process group yet

    @property
    def all_buckets(self) -> tuple[AnyBucket, ...]:
        """Everything that a step does, in the order in which it does it."""
        return (*self.buckets, *self.adamw)

    @property
    def sends(self) -> bool:
        """Whether ranks send matrices to each other."""
        return any(bucket.shared_by for bucket in self.buckets)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it keeps on the device, and a graph takes as inputs."""
        shared = [bucket for bucket in self.buckets if isinstance(bucket, SharedBucket)]
        return [
            self.guard.parameter_of,
            self.guard.members,
            *(x for x in self.own_rates or () if x is not None),
            *(self.metrics.tensors if self.metrics else ()),
            *(tensor for bucket in shared for tensor in bucket.exchange.tensors),
        ]

    @property
    def shared_by(self) -> list[str]:
        """The process groups whose ranks must have the same plan."""
        groups = [bucket.shared_by for bucket in self.buckets]
        if self.guard.mode != "off" and self.guard.alike:
            groups.append(self.guard.group)
        return list(dict.fromkeys(group for group in groups if group is not None))

    def summary(self, group: str | None = None) -> list[str]:
        """What must be the same on all ranks of a process group, in lines."""
        lines = []
        for p in self.parameters:
            hyper = f" hyper {p.hyper}" if self.hypers else ""
            lines.append(f"{p.name}: {p.looks} {p.route}{hyper}")
        options = (option.name for option in fields(self.config) if option.name != "orthogonalizer")
        lines += [f"Config.{name}: {getattr(self.config, name)!r}" for name in options]
        shared = [x for x in self.buckets if group is not None and x.shared_by == group]
        return lines + [
            f"bucket {k}: {x.rows}x{x.cols}, {len(x.names)} parameters from {x.names[0]}"
            for k, x in enumerate(shared)
        ]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Plan is not saved, because it has functions in it: make it again with the same "
            "nm.make_plan(model, config, routes=...); nm.save(path, params, state, plan) writes "
            "its config and routes beside the state, and nm.load compares them"
        )

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    def __str__(self) -> str:
        how: dict[str, list[str]] = {}
        for bucket in self.buckets:
            for group in bucket.groups:
                size = (
                    f"{group.rows}x{group.cols}{'T' * group.transposed} {bucket.how(self.config)}"
                )
                for block in group.blocks:
                    how.setdefault(block.name, []).append(f"{block.count} x {size}")
        rows = [("parameter", "shape", "dtype", "route", "matrices", "why")]
        for p in self.parameters:
            rates = (("lr*", p.route.lr_mul), ("wd*", p.route.wd_mul))
            rule = self.config.other if p.route.algorithm == "adamw" else p.route.algorithm
            route = rule + "".join(f" {k}={v:g}" for k, v in rates if v != 1.0)
            route = " ".join([route, *p.route.own_forms, *[f"hyper {p.hyper}"] * bool(self.hypers)])
            shape = "x".join(map(str, p.spec.shape)) or "scalar"
            read = "; ".join(how.get(p.name, ["-"]))
            rows.append((p.name, shape, short_name(p.spec.dtype), route, read, p.reason))
        matrices = sum(group.count for bucket in self.buckets for group in bucket.groups)
        guard = f"guard={self.config.guard!r} per {self.config.guard_scope}"
        about = (
            f"{len(self.parameters)} parameters, {matrices} matrices in "
            f"{len(self.buckets)} buckets; {guard}"
        )
        return "\n".join([render(rows), about, *self.notes])


def check_plan(plan: object) -> None:
    """Raises TypeError, with the line to write, for what is no Plan."""
    if not isinstance(plan, Plan):
        write = "; write nm.make_plan(model)" if isinstance(plan, torch.nn.Module) else ""
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}{write}")
