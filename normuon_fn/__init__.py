"""A NorMuon training step that is one graph. See README.md."""

import importlib
from typing import TYPE_CHECKING, Any

from .algorithm.coefficients import COEFFICIENTS
from .compat import VERSION
from .distributed.orthogonalize import orthogonalize
from .optim.foreach import ForeachResult, foreach_step_
from .optim.qk_clip import qk_clip, qk_clip_
from .planning.make_plan import make_plan
from .planning.plan import Plan
from .routing.modules import routes_for
from .routing.route_table import RouteTable
from .routing.routes import Route
from .step import init, update
from .types import Config, Hyper, MeasuredResult, Schedule, StepResult

# isort: split
# Last, so that ``step`` is the function and not the module: pyright takes what comes last.
from .runtime.compiled import step, step_

if TYPE_CHECKING:
    from .diagnostics.capture import capture
    from .diagnostics.metrics import report_metrics
    from .diagnostics.monitor import Skip, SkipMonitor
    from .diagnostics.own_stage import check_stage
    from .diagnostics.skips import NonFiniteStepError, check
    from .optim.callbacks import lightning_callback, trainer_callback
    from .optim.normuon import NorMuon
    from .optim.put_state import put_state_
    from .optim.trainer import for_trainer
    from .persistence.checkpoint import Checkpoint, load, save
    from .persistence.converters import convert_state
    from .persistence.description import CheckpointError
    from .persistence.gathered import gather_state
    from .persistence.names import names_in
    from .runtime.graphed import GraphedStep
    from .runtime.offloading import offload_, reload_

__version__ = VERSION
__all__ = [
    "COEFFICIENTS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "ForeachResult",
    "GraphedStep",
    "Hyper",
    "MeasuredResult",
    "NonFiniteStepError",
    "NorMuon",
    "Plan",
    "Route",
    "RouteTable",
    "Schedule",
    "Skip",
    "SkipMonitor",
    "StepResult",
    "capture",
    "check",
    "check_stage",
    "convert_state",
    "for_trainer",
    "foreach_step_",
    "gather_state",
    "init",
    "lightning_callback",
    "load",
    "make_plan",
    "names_in",
    "offload_",
    "orthogonalize",
    "put_state_",
    "qk_clip",
    "qk_clip_",
    "reload_",
    "report_metrics",
    "routes_for",
    "save",
    "step",
    "step_",
    "trainer_callback",
    "update",
]


_LATER = {
    "Checkpoint": "persistence.checkpoint",
    "CheckpointError": "persistence.description",
    "GraphedStep": "runtime.graphed",
    "NonFiniteStepError": "diagnostics.skips",
    "Skip": "diagnostics.monitor",
    "SkipMonitor": "diagnostics.monitor",
    "capture": "diagnostics.capture",
    "check": "diagnostics.skips",
    "check_stage": "diagnostics.own_stage",
    "NorMuon": "optim.normuon",
    "convert_state": "persistence.converters",
    "for_trainer": "optim.trainer",
    "gather_state": "persistence.gathered",
    "lightning_callback": "optim.callbacks",
    "load": "persistence.checkpoint",
    "names_in": "persistence.names",
    "offload_": "runtime.offloading",
    "put_state_": "optim.put_state",
    "reload_": "runtime.offloading",
    "report_metrics": "diagnostics.metrics",
    "save": "persistence.checkpoint",
    "trainer_callback": "optim.callbacks",
}


_INSTEAD = {
    "muon": "; Muon is nm.NorMuon(model, config=nm.Config(normalize=False))",
    "normuon": "; write nm.NorMuon",
    "adamw": "; parameters get AdamW by nm.Route('adamw'), or use torch.optim.AdamW",
}


def __getattr__(name: str) -> Any:
    """Imports a name of the host side when it is first used: a step alone does not need them."""
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    write = _INSTEAD.get(name.lower(), "")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{write}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
