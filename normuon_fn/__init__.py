"""A NorMuon training step that is one graph. See README.md."""

from typing import TYPE_CHECKING, Any

from .orthogonalize import orthogonalize
from .plan import Plan, make_plan
from .routes import Route
from .step import init, step, step_, update
from .types import Config, Hyper, StepResult

if TYPE_CHECKING:
    from .graphed import GraphedStep
    from .optimizer import NorMuon
    from .report import NonFiniteStepError, SkipMonitor, capture, check

__version__ = "0.1.0"
__all__ = [
    "Config",
    "GraphedStep",
    "Hyper",
    "NonFiniteStepError",
    "NorMuon",
    "Plan",
    "Route",
    "SkipMonitor",
    "StepResult",
    "capture",
    "check",
    "init",
    "make_plan",
    "orthogonalize",
    "step",
    "step_",
    "update",
]


def __getattr__(name: str) -> Any:
    """The host side comes when it is first used: `python -m normuon_fn.report` must find it not yet imported."""
    if name == "GraphedStep":
        from .graphed import GraphedStep

        return GraphedStep
    if name == "NorMuon":
        from .optimizer import NorMuon

        return NorMuon
    if name in ("NonFiniteStepError", "SkipMonitor", "capture", "check"):
        from . import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
