"""The host side of the guard. Everything here waits for the device; nothing in the step does."""

from __future__ import annotations

import logging
import warnings

from .plan import Plan
from .types import StepResult

logger = logging.getLogger("normuon_fn")


class NonFiniteStepError(RuntimeError):
    """Too many steps in a row were skipped."""


def check(result: StepResult, plan: Plan, *, max_consecutive: int | None = None) -> bool:
    """Host sync. Whether the step was skipped; warns with the names of the parameters at fault.

    Args:
        max_consecutive: raise once so many steps in a row were skipped.

    Raises:
        NonFiniteStepError: ``max_consecutive`` steps in a row were skipped.
        ValueError: ``max_consecutive`` < 1, or flags of another plan.
    """
    if max_consecutive is not None and (not isinstance(max_consecutive, int) or max_consecutive < 1):
        raise ValueError(f"max_consecutive: expected None or an int >= 1, got {max_consecutive!r}")
    if result.flags.shape[-1] != len(plan.names):
        raise ValueError(f"result: flags for {result.flags.shape[-1]} parameters, the plan has {len(plan.names)}")
    updates, grads = result.flags.tolist()
    skipped = bool(result.skipped.item())
    if not skipped and not any(updates) and not any(grads):
        return False

    bad = [name for name, update, grad in zip(plan.names, updates, grads, strict=True) if update or grad]
    step = result.state["guard.step"].item()
    consecutive = result.state["guard.consecutive"].item()
    what = "; ".join(_cause(name, u, g) for name, u, g in zip(plan.names, updates, grads, strict=True) if u or g)
    outcome = f"skipped, {consecutive} in a row" if skipped else "not skipped (guard='off')"
    message = f"step {step} {outcome}: {what or 'found_inf'}"
    logger.warning(message, extra={"parameters": bad})
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if max_consecutive is not None and consecutive >= max_consecutive:
        raise NonFiniteStepError(
            f"{consecutive} steps in a row were skipped (max_consecutive={max_consecutive}): {what or 'found_inf'}"
        )
    return skipped


def _cause(name: str, update: int, grad: int) -> str:
    found = [what for flag, what in ((grad, "gradient"), (update, "update")) if flag]
    return f"{name} (non-finite {' and '.join(found)})"
