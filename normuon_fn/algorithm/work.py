"""What a bucket is made of, and the stages that it goes through.

`MatrixWork` (bucket.py), `SharedWork` (distributed/shared.py) and `AdamWWork` (adamw.py) implement
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..types import Config, DecayForm, Hyper
from .coefficients import CoefficientSet
from .guard import Decision
from .orthogonalize import Form
from .stages import Stages


class Own(NamedTuple):
    """By which hyperparameters the matrices of a bucket, or AdamW's parameters, are updated."""

    hyper: int = 0  # which entry of Hyper's tensors
    lr_mul: float = 1.0
    wd_mul: float = 1.0
    missed: str = ""  # AdamW's parameter, where the steps that it missed are counted


class OwnRates(NamedTuple):
    """The same of many that differ, as tensors on the device."""

    hyper: Tensor  # [n] int64
    lr_mul: Tensor  # [n] float64
    wd_mul: Tensor  # [n] float64
    missed: Tensor | None = None  # [n] int32, if any has missed steps: see optim/missed_steps.py


class Rates(NamedTuple):
    """The hyperparameters of a work: of all its matrices alike, or each has its own."""

    hyper: Hyper  # each field 0-d or [n]
    lr_mul: float | Tensor  # a number or [n]
    wd_mul: float | Tensor
    missed: Tensor | None = None  # [n] steps, for AdamW's bias correction

    def part(self, matrices: slice) -> Rates:
        """Those of one group."""
        lr_mul, wd_mul = self.lr_mul, self.wd_mul
        return Rates(
            Hyper(*(ops.part_of(x, matrices) for x in self.hyper)),
            lr_mul[matrices] if isinstance(lr_mul, Tensor) else lr_mul,
            wd_mul[matrices] if isinstance(wd_mul, Tensor) else wd_mul,
        )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the parameters of one group have in common."""

    master: str = ""  # the state that makes float32 masters of them: "mantissa", "master" or none


@dataclass(frozen=True, kw_only=True)
class MatrixKind(Kind):
    """The same of matrices, which are one stack for everything but the orthogonalization."""

    rows: int
    cols: int
    transposed: bool = False  # the outputs are the columns
    decay: DecayForm = "decoupled"
    cautious_update: bool = False  # entries against the sign of the gradient do not move

    @property
    def tall(self) -> bool:
        return self.rows > self.cols


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What the groups of one bucket share: tall ones transposed, one stack [n, rows, cols]."""

    rows: int  # rows <= cols
    cols: int
    form: Form
    coefficients: CoefficientSet
    # of everything but the products: float64 for float64 parameters, otherwise float32
    wide: torch.dtype
    most: float  # Frobenius norm of an update: the guard takes a longer one for a fault
    # whether operators over lists have kernels for its tensors: see `ops.kernels_for`
    kernels: bool


K = TypeVar("K", bound=Kind, covariant=True)


@dataclass(frozen=True)
class Members(Generic[K]):
    """The tensors of one group in this step. Whose they are, only ``read`` and ``put`` know."""

    kind: K
    count: int  # of matrices
    # that these are in: each is one matrix [rows, cols] or several [count, rows, cols]
    tensors: int
    read: Callable[[str], list[Tensor]]  # "param", "grad", or the name of a state
    put: Callable[[str, list[Tensor]], None]  # new ones in their place
    # where new ones of a state in host memory are to be written, in the place of ``put``
    places: Callable[[str], list[Tensor]]
    salts: list[int]  # one per matrix, where parameters are rounded by chance
    rates: Rates
    local: bool = True  # False: none of their entries is on this rank


class Context(NamedTuple):
    """What all works of a step share."""

    config: Config
    stages: Stages
    hyper: Hyper  # each field 0-d, or [n] where the matrices of the bucket have their own
    operators: ops.Operators
    step: Tensor  # 0-d int32, of steps so far (see below): rounding by chance depends on it
    # 0-d int32, the number of this step for the bias correction of AdamW. Both count accepted
    # steps only, but with the guard's scope a bucket all.
    adamw_step: Tensor
    early: bool  # the guard agrees about gradients before anything is written
    holds_late: bool  # only the agreement at the end of the step tells if momentums keep their bits
    at_once: bool  # what the updates are decides nothing: each may enter as soon as it is there


# Of the matrices of a bucket, in order: whether they take part in this step here, and how many.
Runs = Sequence[tuple[bool, int]]


def complete(
    flags: Tensor | None,  # [..., n], of the matrices that take part; None: none does
    runs: Runs,
    context: Context,
) -> Tensor:
    """[..., n_matrices]: False, or 0, for matrices that take no part in this step on this rank."""
    if flags is not None and all(here for here, _ in runs):
        return flags
    lead, device = () if flags is None else flags.shape[:-1], context.step.device
    dtype = torch.bool if flags is None else flags.dtype
    found, at = [torch.zeros((*lead, 0), dtype=dtype, device=device)], 0
    neighbors: list[tuple[bool, int]] = []
    for here, count in runs:
        if neighbors and neighbors[-1][0] == here:
            count += neighbors.pop()[1]
        neighbors.append((here, count))
    for here, count in neighbors:
        if here and flags is not None:
            found.append(flags[..., at : at + count])
            at += count
        else:
            found.append(torch.zeros((*lead, count), dtype=dtype, device=device))
    return torch.cat(found, -1)


class Work:
    """The stages of the step; a bucket may leave any out. `guard.Agreement` sets the decisions."""

    hold: Decision = None
    skip: Decision = None

    def bad_gradients(self) -> Tensor:
        """See `guard.Guarded`."""
        raise NotImplementedError

    def bad_updates(self) -> Tensor:
        """See `guard.Guarded`."""
        raise NotImplementedError

    def advance(self) -> None:
        """The new momentum, and messages that can set out by then."""

    def pass_on(self) -> None:
        """The next hop of a message that takes several: see distributed/hops.py."""

    def orthogonalize(self) -> None:
        """The update of every matrix that this rank orthogonalizes."""

    def relay(self) -> None:
        """Updates to other replicas."""

    def receive(self) -> None:
        """Updates from other ranks."""

    def apply(self) -> None:
        """New parameters, or the old ones."""

    def sums(self) -> Tensor:
        """See `metrics.Measured`: with ``Config(metrics=True)``, after `apply`."""
        raise NotImplementedError
