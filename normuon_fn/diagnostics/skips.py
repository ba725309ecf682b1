"""Says which steps were skipped, and which parameters caused it.

Only `check` and `SkipMonitor.wait` wait for the device.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.placements import is_first_of
from ..planning.plan import Plan
from ..routing.table import render
from ..types import Grads, Hyper, StepResult
from .capture import can_gather, capture

logger = logging.getLogger("normuon_fn")


class NonFiniteStepError(RuntimeError):
    """Too many steps in a row were skipped. The message has a table of the parameters at fault."""


def check(
    result: StepResult,
    plan: Plan,
    *,
    max_consecutive: int | None = None,
    grads: Grads | None = None,
    hyper: Hyper | None = None,
) -> bool:
    """Whether the step was skipped. Waits for the device (one copy of the flags).

    Of ranks that have the same flags the first one warns with the names of the parameters at fault,
    and the others write to the log. A rank that decides alone warns for itself, and so does one
    whose parameters the others do not have (the stages of a pipeline).

    Args:
        max_consecutive: raise once that many steps in a row were skipped.
        grads, hyper: those of this step. With them, and with the environment variable
            ``NORMUON_CAPTURE_DIR`` set to a folder, a non-finite step is captured there.

    Raises:
        NonFiniteStepError: ``max_consecutive`` steps in a row were skipped. All ranks that
            decide together raise, for they have the same counters.
        TypeError: ``result`` is not a StepResult, or ``plan`` is not a Plan.
        ValueError: ``max_consecutive`` < 1, or ``result`` belongs to another plan.
    """
    _check_arguments(result, plan, max_consecutive)
    outcome = _Outcome.of(plan, _packed(result).tolist())
    folder = os.environ.get("NORMUON_CAPTURE_DIR")
    if outcome.failed and folder:
        _capture_into(folder, result, grads, plan, hyper)
    return _report(outcome, plan, max_consecutive, depth=2)


def _capture_into(
    folder: str, result: StepResult, grads: Grads | None, plan: Plan, hyper: Hyper | None
) -> None:
    if grads is None or hyper is None:
        logger.warning(
            "NORMUON_CAPTURE_DIR is set, but check() captures nothing without grads= and hyper="
        )
    elif plan.sharded and not can_gather(plan):
        logger.warning(
            "NORMUON_CAPTURE_DIR is set, but a step of DTensors is captured only with a guard over "
            "all ranks that share them: Config(guard='output' or 'full')"
        )
    else:
        logger.warning("captured %s", capture(result, grads, plan, folder, hyper=hyper))


class SkipMonitor:
    """`check` without the wait for the device.

    The flags are copied to pinned memory by a non-blocking copy and read once they have arrived.
    On CUDA the first call after that reports the step, usually one step later; on the CPU the step
    is reported at once. Call it after every step, and `wait` at the end.

    Args:
        max_consecutive: as in `check`.
    """

    def __init__(self, plan: Plan, *, max_consecutive: int | None = None) -> None:
        _check_plan(plan)
        self.plan, self.max_consecutive = plan, max_consecutive
        self._pending: deque[tuple[Plan, Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, result: StepResult, plan: Plan | None = None) -> int:
        """The number of skipped steps among those whose flags have arrived since the last call.

        Args:
            plan: the plan from this step on, where it has changed:
                ``monitor(optimizer.result, optimizer.plan)``.

        Raises:
            NonFiniteStepError, TypeError, ValueError: as in `check`.
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
        """The same for all steps whose flags have not been read yet. Waits for the device."""
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
    bad: tuple[tuple[str, str], ...]  # (parameter, "gradient", "update" or both)

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
    """All counters and flags in one tensor, so that one copy brings them to the host."""
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
            f"result: expected a StepResult, got {type(result).__name__}; an optimizer has it as "
            ".result after its first step"
        )
    if result.params.keys() != set(plan.names):
        other = sorted(result.params.keys() ^ set(plan.names))[:8]
        raise ValueError(
            f"result: expected a result of this plan, got one whose parameters differ in {other}; "
            "NorMuon has the plan of its last step as .plan"
        )


def _check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected a Plan, got {type(plan).__name__}; an optimizer has it as .plan after "
            "its first step"
        )


def _report(outcome: _Outcome, plan: Plan, max_consecutive: int | None, *, depth: int) -> bool:
    if not outcome.failed:
        return False
    named = "; ".join(f"{name} (non-finite {kind})" for name, kind in outcome.bad)
    what = named or _without_names(plan)
    fate = (
        f"skipped, {outcome.consecutive} in a row"
        if outcome.skipped
        else f"not skipped (guard={plan.config.guard!r})"
    )
    message = f"step {outcome.step} {fate}: {what}"
    if _speaks(outcome, plan):
        logger.warning(message)
        # Without a registry the caller's filters apply, and Python shows the second skip at the
        # same place too.
        frame = sys._getframe(depth)
        warnings.warn_explicit(message, RuntimeWarning, frame.f_code.co_filename, frame.f_lineno)
    else:
        logger.info(message)
    if max_consecutive is not None and outcome.consecutive >= max_consecutive:
        raise NonFiniteStepError(
            f"{outcome.consecutive} steps in a row were skipped (max_consecutive="
            f"{max_consecutive}), the last at step {outcome.step}:\n{_offenders(outcome, plan)}"
        )
    return outcome.skipped


def _speaks(outcome: _Outcome, plan: Plan) -> bool:
    """Whether this rank warns of a step; the others write to the log.

    A rank that decides alone does. Of ranks that decide together, the first one does, and any that
    knows a name which the first one cannot know.
    """
    knows_more = bool(outcome.bad) and not plan.guard.shares_flags
    return is_first_of(plan.guard.group) or knows_more


def _without_names(plan: Plan) -> str:
    """Why a step can be skipped although this rank knows of no parameter at fault."""
    if plan.guard.group is None:
        return "found_inf was set"
    if plan.guard.alike or plan.guard.mode == "off":
        return "found_inf was set on a rank"
    return "found_inf was set, or a rank with other parameters had a fault, which it names itself"


def _offenders(outcome: _Outcome, plan: Plan) -> str:
    if not outcome.bad:
        return f"in each of them {_without_names(plan)}"
    parameters = {p.name: p for p in plan.parameters}
    rows = [("parameter", "shape", "route", "non-finite")]
    for name, what in outcome.bad:
        shape = "x".join(map(str, parameters[name].spec.shape)) or "scalar"
        rows.append((name, shape, parameters[name].route.algorithm, what))
    return render(rows)
