"""A NorMuon training step that is one graph. See README.md."""

import importlib
from typing import TYPE_CHECKING, Any

from .foreach import ForeachResult, foreach_step_
from .models import routes_for
from .orthogonalize import orthogonalize
from .plan import Plan
from .planner import make_plan
from .routes import Route, RouteTable
from .step import init, step, step_, update
from .types import Config, Hyper, StepResult

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, CheckpointError, load, save
    from .converters import convert_state
    from .graphed import GraphedStep
    from .optimizer import NorMuon
    from .report import NonFiniteStepError, SkipMonitor, capture, check

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Config",
    "ForeachResult",
    "GraphedStep",
    "Hyper",
    "NonFiniteStepError",
    "NorMuon",
    "Plan",
    "Route",
    "RouteTable",
    "SkipMonitor",
    "StepResult",
    "capture",
    "check",
    "convert_state",
    "foreach_step_",
    "init",
    "load",
    "make_plan",
    "orthogonalize",
    "routes_for",
    "save",
    "step",
    "step_",
    "update",
]


_LATER = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "GraphedStep": "graphed",
    "NonFiniteStepError": "report",
    "SkipMonitor": "report",
    "capture": "report",
    "check": "report",
    "NorMuon": "optimizer",
    "convert_state": "converters",
    "load": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """The host side comes when it is first used: `python -m normuon_fn.report` must find it not yet imported."""
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
