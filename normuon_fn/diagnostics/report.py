"""The host side of the guard: what was skipped and why. Only `check` and `SkipMonitor.wait` wait for the device.

``python -m normuon_fn.report FILE`` prints what `capture` saved and replays it through every method and dtype.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..planning.plan import Plan
from ..routing.table import render
from ..types import Hyper, StepResult
from .replay import capture, gathers, main

__all__ = ["NonFiniteStepError", "SkipMonitor", "capture", "check"]

logger = logging.getLogger("normuon_fn")


class NonFiniteStepError(RuntimeError):
    """Too many steps in a row were skipped. The message holds the table of the parameters at fault."""


def check(
    result: StepResult,
    plan: Plan,
    *,
    max_consecutive: int | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
    hyper: Hyper | None = None,
) -> bool:
    """Waits for the device (one copy). Whether the step was skipped; on rank 0 warns with the parameters at fault.

    Args:
        max_consecutive: raise once that many steps in a row were skipped.
        grads, hyper: of this step; with them, and ``NORMUON_CAPTURE_DIR`` set to a folder, a non-finite step is captured there.

    Raises:
        NonFiniteStepError: ``max_consecutive`` steps in a row were skipped. Every rank raises: all have the same flags.
        TypeError: no StepResult, or no Plan.
        ValueError: ``max_consecutive`` < 1, or a result of another plan.
    """
    _check_arguments(result, plan, max_consecutive)
    outcome = _Outcome.of(plan, _packed(result).tolist())
    folder = os.environ.get("NORMUON_CAPTURE_DIR")
    if outcome.failed and folder:
        if grads is None or hyper is None:
            logger.warning(
                "NORMUON_CAPTURE_DIR is set, but check() was not given grads= and hyper=: nothing captured"
            )
        elif plan.sharded and not gathers(plan):
            logger.warning(
                "NORMUON_CAPTURE_DIR is set, but of DTensors nothing is captured without a guard of all their ranks"
            )
        else:
            logger.warning("captured %s", capture(result, plan, grads, folder, hyper=hyper))
    return _report(outcome, plan, max_consecutive, depth=2)


class SkipMonitor:
    """`check` without the wait: the flags go to pinned memory by a non-blocking copy and are looked at once they are there.

    On CUDA a step is reported by the first call after its copy arrived, usually one step later; on CPU at once. Call it after
    every step, and `wait` at the end. ``max_consecutive`` as in `check`.
    """

    def __init__(self, plan: Plan, *, max_consecutive: int | None = None) -> None:
        _check_plan(plan)
        self.plan, self.max_consecutive = plan, max_consecutive
        self._pending: deque[tuple[Plan, Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, result: StepResult, plan: Plan | None = None) -> int:
        """How many of the steps that became known now were skipped.

        Args:
            plan: from this step on, where it is another: ``monitor(optimizer.result, optimizer.plan)``.

        Raises:
            NonFiniteStepError, TypeError, ValueError: as `check`.
        """
        if plan is not None:
            _check_plan(plan)
            self.plan = plan
        _check_arguments(result, self.plan, self.max_consecutive)
        packed = _packed(result)
        if packed.device.type == "cuda":
            pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            pinned.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending.append((self.plan, pinned, arrived))
        else:
            self._pending.append((self.plan, packed, None))
        return self._look(wait=False)

    def wait(self) -> int:
        """Waits for the device. As the call, for all steps that are still on their way."""
        return self._look(wait=True)

    def _look(self, *, wait: bool) -> int:
        skips = 0
        while self._pending:
            plan, packed, arrived = self._pending[0]
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():
                    break
            self._pending.popleft()
            skips += _report(
                _Outcome.of(plan, packed.tolist()), plan, self.max_consecutive, depth=3
            )
        return skips


class _Outcome(NamedTuple):
    """One step as the host sees it."""

    step: int
    consecutive: int
    skipped: bool
    bad: tuple[tuple[str, str], ...]  # (parameter, what of it was not finite)

    @property
    def failed(self) -> bool:
        return bool(self.skipped or self.bad)

    @staticmethod
    def of(plan: Plan, packed: list[int]) -> _Outcome:
        step, consecutive, skipped, *flags = packed
        updates, grads = flags[: len(plan.names)], flags[len(plan.names) :]
        bad = []
        for name, update, grad in zip(plan.names, updates, grads, strict=True):
            what = " and ".join(
                word for flag, word in ((grad, "gradient"), (update, "update")) if flag
            )
            if what:
                bad.append((name, what))
        return _Outcome(step, consecutive, bool(skipped), tuple(bad))


def _packed(result: StepResult) -> Tensor:
    """Everything that is looked at, in one tensor: one copy to the host."""
    counters = [
        result.state["guard.step"],
        result.state["guard.consecutive"],
        result.skipped.to(torch.int32),
    ]
    return torch.cat([torch.stack(counters), result.flags.flatten()])


def _check_arguments(result: StepResult, plan: Plan, max_consecutive: int | None) -> None:
    if max_consecutive is not None and (
        not isinstance(max_consecutive, int) or max_consecutive < 1
    ):
        raise ValueError(f"max_consecutive: expected None or an int >= 1, got {max_consecutive!r}")
    _check_plan(plan)
    if not isinstance(result, StepResult):
        raise TypeError(
            f"result: expected a StepResult, got {type(result).__name__}; an optimizer has one after its first step"
        )
    if result.params.keys() != set(plan.names):
        other = sorted(result.params.keys() ^ set(plan.names))[:8]
        raise ValueError(
            f"result: of another plan, which differs in {other}; NorMuon has the one of its last step as .plan"
        )


def _check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected a Plan, got {type(plan).__name__}; an optimizer has one after its first step"
        )


def _report(outcome: _Outcome, plan: Plan, max_consecutive: int | None, *, depth: int) -> bool:
    if not outcome.failed:
        return False
    what = (
        "; ".join(f"{name} (non-finite {kind})" for name, kind in outcome.bad)
        or "found_inf, or a rank of guard_mesh"
    )
    fate = (
        f"skipped, {outcome.consecutive} in a row"
        if outcome.skipped
        else f"not skipped (guard={plan.config.guard!r})"
    )
    message = f"step {outcome.step} {fate}: {what}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(message)
        # Without a registry: the caller's filters hold, but Python's "once per place" does not swallow the second skip.
        frame = sys._getframe(depth)
        warnings.warn_explicit(message, RuntimeWarning, frame.f_code.co_filename, frame.f_lineno)
    else:
        logger.info(message)
    if max_consecutive is not None and outcome.consecutive >= max_consecutive:
        raise NonFiniteStepError(
            f"{outcome.consecutive} steps in a row were skipped (max_consecutive={max_consecutive}), the last at step "
            f"{outcome.step}:\n{_offenders(outcome, plan)}"
        )
    return outcome.skipped


def _offenders(outcome: _Outcome, plan: Plan) -> str:
    of = {p.name: p for p in plan.parameters}
    rows = [("parameter", "shape", "route", "non-finite")]
    for name, what in outcome.bad:
        rows.append(
            (
                name,
                "x".join(map(str, of[name].spec.shape)) or "scalar",
                of[name].route.algorithm,
                what,
            )
        )
    return (
        render(rows)
        if outcome.bad
        else "found_inf was set by the caller in each of them, or a rank of guard_mesh with other parameters had a fault"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
