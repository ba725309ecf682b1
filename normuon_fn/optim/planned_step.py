"""`PlannedStep`: everything that a step of one set of parameters needs except their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..planning.plan import Plan
from ..runtime.graphed import GraphedStep
from .state import States


@dataclass
class PlannedStep:
    """Everything that a step needs except the values of gradients, for one set of parameters."""

    plan: Plan
    places: list[int]  # of its parameters among all parameters of the optimizer
    params: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)  # flat, as `init` makes it
    collected: list[tuple[Tensor, list[tuple[str, Tensor]]]] = field(default_factory=list)
    stepped: bool = False
    counted: bool = False  # among the sets of gradients
    graphed: GraphedStep | None = None
    missed: frozenset[str] = frozenset()  # whose missed steps its plan counts

    @property
    def accepted(self) -> Tensor:
        """0-d int32: how many steps the bias correction of AdamW has counted; a new tensor."""
        if self.plan.config.guard_scope == "bucket":
            return self.state["guard.step"].clone()
        return self.state["guard.step"] - self.state["guard.skipped"]

    def release(self) -> None:
        """Frees the graph that was captured."""
        if self.graphed is not None:
            self.graphed.release()

    def is_current(self, states: States) -> bool:
        """Whether ``optimizer.state`` still has the tensors that were collected."""
        pairs = [(states[p], kinds) for p, kinds in self.collected]
        return all([now.get(kind) is x for now, kinds in pairs for kind, x in kinds])  # noqa: C419 - a list is faster
