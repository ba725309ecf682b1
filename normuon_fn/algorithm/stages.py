"""The sockets of the step: which function each stage of a `Config` is, and what state it keeps.

    momentum -> precondition -> orthogonalize -> normalize -> weight decay

Every stage is a pure function on stacks of matrices [n, rows, cols], chosen by a field of `Config`
from the table in the file of its name; each entry of a table names its source. A stage declares the
state that it keeps of every matrix (`State`), and whoever makes, saves, shards or sends state reads
that declaration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..types import Config
from .momentum import MOMENTA, Momentum
from .normalize import NORMALIZERS, Normalizer, normalizer_of
from .precondition import PRECONDITIONERS, Preconditioner
from .state import State
from .weight_decay import WEIGHT_DECAYS, WeightDecay


class Stages(NamedTuple):
    """The stages that a `Config` names, in the order in which a matrix meets them.

    Orthogonalization has no table: it is Newton-Schulz with one of `coefficients.COEFFICIENTS`, or
    `Config.orthogonalizer`.
    """

    momentum: Momentum
    precondition: Preconditioner
    normalize: Normalizer
    weight_decay: WeightDecay

    @property
    def states(self) -> tuple[State, ...]:
        """What the stages keep of every matrix, in the order in which the flat state holds it."""
        return (*self.momentum.states, *self.precondition.states, *self.normalize.states)

    @property
    def line_states(self) -> tuple[State, ...]:
        """Those with one number per row (or column): an owner needs them from all shards."""
        return tuple(state for state in self.states if state.per == "line")


def stages_of(config: Config) -> Stages:
    """The stages that ``config`` names."""
    momentum = MOMENTA[config.momentum_form]
    return Stages(
        momentum.as_codes() if config.momentum_dtype == torch.int8 else momentum,
        PRECONDITIONERS[config.precondition],
        NORMALIZERS[normalizer_of(config)],
        WEIGHT_DECAYS[config.weight_decay_form],
    )
