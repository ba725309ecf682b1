"""A NorMuon training step that is one graph. See README.md."""

import importlib
from typing import TYPE_CHECKING, Any

from .distributed.orthogonalize import orthogonalize
from .optim.foreach import ForeachResult, foreach_step_
from .planning.make_plan import make_plan
from .planning.plan import Plan
from .routing.modules import routes_for
from .routing.routes import Route, RouteTable
from .runtime.compiled import step, step_
from .step import init, update
from .types import Config, Hyper, StepResult

if TYPE_CHECKING:
    from .diagnostics.report import NonFiniteStepError, SkipMonitor, capture, check
    from .optim.normuon import NorMuon
    from .persistence.checkpoint import Checkpoint, CheckpointError, load, save
    from .persistence.converters import convert_state
    from .runtime.graphed import GraphedStep

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
    "Checkpoint": "persistence.checkpoint",
    "CheckpointError": "persistence.checkpoint",
    "GraphedStep": "runtime.graphed",
    "NonFiniteStepError": "diagnostics.report",
    "SkipMonitor": "diagnostics.report",
    "capture": "diagnostics.report",
    "check": "diagnostics.report",
    "NorMuon": "optim.normuon",
    "convert_state": "persistence.converters",
    "load": "persistence.checkpoint",
    "save": "persistence.checkpoint",
}


def __getattr__(name: str) -> Any:
    """The host side comes when it is first used: `python -m normuon_fn.diagnostics.report` must find it not yet imported."""
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
