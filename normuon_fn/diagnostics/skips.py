"""Says which steps were skipped, and which parameters caused it.

flags and counters -> `packed`, one tensor -> `Outcome` on the host -> `tell`, one message per skip

`check` waits for the device; `SkipMonitor` in monitor.py does the same without the wait.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import group_named
from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..routing.table import render
from ..types import Grads, Guard, Hyper, MeasuredResult, StepResult
from .capture import can_gather, capture

logger = logging.getLogger("normuon_fn")
_NOT_COUNTED = (
    "; it is in the weights now, and max_consecutive counts skipped steps alone: write "
    "Config(guard='full') into make_plan"
)
_EVERY_GRADIENT = (
    "the loss or the backward pass behind it is not finite, or a clip by norm has spread one of "
    "them over all"
)
_SHOWN = 12  # parameters in a message; the table of an error has all of them
# By the flags of a step: its number, and who has told about it. Weakly, because who tells keeps the
# flags, and both would stay for good.
_told: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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

    Of an ensemble's step (`torch.func.vmap` over `update`): whether that of any member was. Each of
    them is told of, with its number.

    Of ranks that have the same flags the first one warns with the names of the parameters at fault,
    and the others write to the log. A rank that decides alone warns for itself, and so does one
    whose parameters the others do not have (the stages of a pipeline).
    A skip that the optimizer or a `SkipMonitor` has told about is not told again.

    Args:
        max_consecutive: raise once that many steps in a row were skipped, which takes a guard.
        grads, hyper: those of this step. With them, and with the environment variable
            ``NORMUON_CAPTURE_DIR`` set to a folder, a non-finite step is captured there.

    Raises:
        NonFiniteStepError: ``max_consecutive`` steps in a row were skipped. All ranks that
            decide together raise, for they have the same counters.
        TypeError: ``result`` is not a StepResult, or ``plan`` is not a Plan.
        ValueError: ``max_consecutive`` < 1, or ``result`` belongs to another plan.
    """
    check_max_consecutive(max_consecutive)
    check_result(result, plan)
    outcomes = outcomes_of(plan, packed(result).tolist())
    failed = [outcome for outcome in outcomes if outcome.failed]
    folder = os.environ.get("NORMUON_CAPTURE_DIR")
    if failed and folder:
        _capture_into(folder, result, grads, plan, hyper)
    for outcome in failed:
        note = "" if max_consecutive is None or outcome.skipped else _NOT_COUNTED
        tell(outcome, plan, result.flags, by=check, note=note)
    for outcome in outcomes:
        raise_if_too_many(outcome, plan, max_consecutive)
    return any(outcome.skipped for outcome in outcomes)


def _capture_into(
    folder: str, result: StepResult, grads: Grads | None, plan: Plan, hyper: Hyper | None
) -> None:
    if grads is None or hyper is None:
        logger.warning(
            "NORMUON_CAPTURE_DIR is set, but check() captures nothing without grads= and hyper="
        )
    elif result.flags.ndim > 2:
        logger.warning("NORMUON_CAPTURE_DIR is set, but check() captures no step of an ensemble")
    elif plan.sharded and not can_gather(plan):
        logger.warning(
            "NORMUON_CAPTURE_DIR is set, but a step of DTensors is captured only with a guard over "
            "all ranks that share them: Config(guard='output' or 'full')"
        )
    else:
        logger.warning("captured %s", capture(result, grads, plan, folder, hyper=hyper))


class Outcome(NamedTuple):
    """One step as the host sees it: of a model, or of one member of an ensemble."""

    step: int
    consecutive: int
    total: int  # skipped steps so far
    bad: tuple[tuple[str, str], ...]  # (parameter, "gradient", "update" or both)
    member: int | None = None  # of an ensemble

    @property
    def whose(self) -> str:
        """What a message about it begins with."""
        return "" if self.member is None else f"member {self.member}: "

    @property
    def skipped(self) -> bool:
        return self.consecutive > 0

    @property
    def failed(self) -> bool:
        return bool(self.skipped or self.bad)

    @staticmethod
    def of(plan: Plan, packed: list[int], member: int | None = None) -> Outcome:
        step, consecutive, total, *flags = packed
        updates, grads = flags[: len(plan.names)], flags[len(plan.names) :]
        bad = []
        for name, update, grad in zip(plan.names, updates, grads, strict=True):
            what = " and ".join(
                word for flag, word in ((grad, "gradient"), (update, "update")) if flag
            )
            if what:
                bad.append((name, what))
        return Outcome(step, consecutive, total, tuple(bad), member)


def packed(result: StepResult) -> Tensor:
    """[1 or members, 3 + 2 * n_params] int32: counters and flags, for one copy to the host."""
    counters = [
        result.state[f"guard.{kind}"].view(-1, 1) for kind in ("step", "consecutive", "skipped")
    ]
    return torch.cat([*counters, result.flags.reshape(len(counters[0]), -1)], dim=1)


def outcomes_of(plan: Plan, packed: list[list[int]]) -> list[Outcome]:
    """That of a model, or those of an ensemble's members."""
    if len(packed) == 1:
        return [Outcome.of(plan, packed[0])]
    return [Outcome.of(plan, row, k) for k, row in enumerate(packed)]


def check_max_consecutive(max_consecutive: int | None) -> None:
    is_count = isinstance(max_consecutive, int) and max_consecutive >= 1
    if max_consecutive is not None and not is_count:
        raise ValueError(f"max_consecutive: expected None or an int >= 1, got {max_consecutive!r}")


def check_skips(guard: Guard, on_skip: object, max_consecutive: int | None) -> None:
    """Refuses what waits for skipped steps where no guard skips any.

    Raises:
        ValueError: with what to write.
    """
    if guard != "off" or (on_skip in ("warn", None) and max_consecutive is None):
        return
    what = "max_consecutive" if max_consecutive is not None else "on_skip"
    value = max_consecutive if max_consecutive is not None else on_skip
    raise ValueError(
        f"{what}: {value!r} waits for skipped steps, and without a guard a step that is not finite "
        "is not skipped: it goes into the weights. Write guard='full' into NorMuon, or "
        "Config(guard='full') into make_plan; a GradScaler's skips are counted with a guard too"
    )


def check_result(result: StepResult, plan: Plan) -> None:
    check_plan(plan)
    if not isinstance(result, (StepResult, MeasuredResult)):
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


def check_plan(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected a Plan, got {type(plan).__name__}; an optimizer has it as .plan after "
            "its first step"
        )


def message_of(outcome: Outcome, plan: Plan) -> str:
    """One sentence: which step, whether it was skipped, and which parameters were at fault."""
    named = "; ".join(f"{name} (non-finite {kind})" for name, kind in outcome.bad[:_SHOWN])
    if len(outcome.bad) > _SHOWN:
        named += f"; and {len(outcome.bad) - _SHOWN} more parameters"
    if len(outcome.bad) == len(plan.names) > 1 and all("grad" in kind for _, kind in outcome.bad):
        named += f". All gradients: {_EVERY_GRADIENT}"
    what = named or _without_names(plan)
    fate = (
        f"skipped, {outcome.consecutive} in a row"
        if outcome.skipped
        else f"not skipped (guard={plan.config.guard!r})"
    )
    return f"{outcome.whose}step {outcome.step} {fate}: {what}"


def tell(outcome: Outcome, plan: Plan, flags: Tensor, *, by: object, note: str = "") -> None:
    """One message: a warning at the caller's line, or a line of the log on other ranks.

    Nothing if somebody else has told about this step.
    """
    step, who = _told.get(flags, (None, None))
    if step == outcome.step and who is not None and who() is not by:
        return
    _told[flags] = outcome.step, weakref.ref(by)
    if warns_here(outcome, plan):
        warn_at_caller(
            message_of(outcome, plan) + note, RuntimeWarning
        )  # each time, not once per line
    else:
        logger.info(message_of(outcome, plan))


def raise_if_too_many(outcome: Outcome, plan: Plan, max_consecutive: int | None) -> None:
    """Raises NonFiniteStepError from ``max_consecutive`` skipped steps in a row on."""
    if max_consecutive is not None and outcome.consecutive >= max_consecutive:
        raise NonFiniteStepError(
            f"{outcome.whose}{outcome.consecutive} steps in a row were skipped (max_consecutive="
            f"{max_consecutive}), the last at step {outcome.step}:\n{offenders(outcome, plan)}"
        )


def warns_here(outcome: Outcome, plan: Plan) -> bool:
    """Whether this rank warns of a step; the others write to the log.

    A rank that decides alone does. Of ranks that decide together, the first one does, and any that
    knows a name which the first one cannot know.
    """
    knows_more = bool(outcome.bad) and not plan.guard.shares_flags
    group = plan.guard.group
    return group is None or group_named(group).rank() == 0 or knows_more


def _without_names(plan: Plan) -> str:
    """Why a step can be skipped although this rank knows of no parameter at fault."""
    if plan.guard.group is None:
        return "found_inf was set"
    if plan.guard.alike or plan.guard.mode == "off":
        return "found_inf was set on a rank"
    return "found_inf was set, or a rank with other parameters had a fault, which it names itself"


def offenders(outcome: Outcome, plan: Plan) -> str:
    """The parameters at fault as a table."""
    if not outcome.bad:
        return f"in each of them {_without_names(plan)}"
    parameters = {p.name: p for p in plan.parameters}
    rows = [("parameter", "shape", "route", "non-finite")]
    for name, what in outcome.bad:
        shape = "x".join(map(str, parameters[name].spec.shape)) or "scalar"
        rows.append((name, shape, parameters[name].route.algorithm, what))
    return render(rows)
