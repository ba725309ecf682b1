"""A NorMuon training step that is one graph. See README.md."""

from .orthogonalize import orthogonalize
from .plan import Plan, Route, make_plan
from .report import NonFiniteStepError, check
from .step import init, step, step_, update
from .types import Config, Hyper, StepResult

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Hyper",
    "NonFiniteStepError",
    "Plan",
    "Route",
    "StepResult",
    "check",
    "init",
    "make_plan",
    "orthogonalize",
    "step",
    "step_",
    "update",
]
