"""`SkipMonitor`: hears of skipped steps without waiting for the device.

    a step -> flags and counters on their way to the host -> once they are there: on_skip, an error

An optimizer has reports of its own; a monitor of the user's takes an optimizer, in any wrapper.
"""

from __future__ import annotations

import atexit
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from ..planning.plan import Plan
from ..types import StepResult
from ..types.other_names import with_hints
from .skips import (
    NonFiniteStepError,
    Outcome,
    check_max_consecutive,
    check_plan,
    check_result,
    check_skips,
    message_of,
    offenders,
    outcomes_of,
    packed,
    raise_if_too_many,
    tell,
)


class Skip(NamedTuple):
    """What a function that is given as ``on_skip`` is called with."""

    step: int  # the number of the skipped step; the first step is 1
    consecutive: int  # skipped steps in a row, this one included
    skipped: int  # skipped steps so far, this one included
    names: tuple[str, ...]  # parameters at fault; empty if found_inf or another rank was the cause
    message: str  # what the warning says
    member: int | None = None  # of an ensemble


OnSkip = Literal["warn", "raise"] | Callable[[Skip], Any] | None
# Where wrappers keep what they wrap: Accelerate, Lightning, Fabric, DeepSpeed and the Trainer
# ("optimizer"), ZeroRedundancyOptimizer ("optim"), Lookahead and its like ("base_optimizer").
_INNER = ("optimizer", "_optimizer", "optim", "base_optimizer", "_base_optimizer")
_alive: WeakSet[SkipReports] = WeakSet()


class _Sent(NamedTuple):
    """A step on its way to the host."""

    plan: Plan
    flags: Tensor  # on the device; who has told about the step is kept by them
    arriving: Tensor  # [1 or members, 3 + 2 * n_params] int32 on the host
    arrived: torch.cuda.Event | None
    again: bool  # the same flags as before: a captured step's, or the same step a second time


class SkipReports:
    """Sends what a step reports to the host, and says it once it is there.

    On CUDA a step costs the host 67 us, three launches and no wait (144 matrices, H200, torch
    2.11.0, 2026-11-28).
    """

    def __init__(self, on_skip: OnSkip, max_consecutive: int | None) -> None:
        check_on_skip(on_skip, max_consecutive)
        self.on_skip, self.max_consecutive = on_skip, max_consecutive
        self._way: deque[_Sent] = deque()
        self._free: list[tuple[Tensor, torch.cuda.Event]] = []
        self._flags: Tensor | None = None  # of the last step that was sent
        self._step = 0  # the last one that arrived
        _alive.add(self)

    def send(self, result: StepResult, plan: Plan, *, once: bool = False) -> None:
        """Starts the copy to the host. It is complete at once where there is no CUDA device.

        ``once``: a step that was sent before is not reported again.
        """
        consecutive = result.state["guard.consecutive"]
        if type(consecutive) is not Tensor or consecutive.device.type == "meta":
            return  # a fake tensor, or one without values
        again, self._flags = once and result.flags is self._flags, result.flags
        if consecutive.device.type != "cuda":
            if bool(consecutive.any()) or bool(result.flags.any()):
                self._way.append(_Sent(plan, result.flags, packed(result), None, again))
        elif not torch.cuda.is_current_stream_capturing():
            values = packed(result)
            host, event = self._buffer(tuple(values.shape))
            host.copy_(values, non_blocking=True)
            event.record()
            self._way.append(_Sent(plan, result.flags, host, event, again))

    def look(self, *, wait: bool = False) -> int:
        """The number of skipped steps that have arrived since the last call; each is reported.

        Raises:
            NonFiniteStepError: as ``on_skip`` and ``max_consecutive`` ask for.
        """
        skips = 0
        while self._way:
            sent = self._way[0]
            if sent.arrived is not None:
                if wait:
                    sent.arrived.synchronize()
                elif not sent.arrived.query():
                    break
            self._way.popleft()
            outcomes = _read(sent)
            if sent.arrived is not None:
                self._free.append((sent.arriving, sent.arrived))
            known = self._step if sent.again else None
            errors = []
            for outcome in outcomes:
                if outcome.step != known:
                    skips += outcome.skipped
                    self._step = outcome.step
                    try:
                        self._report(outcome, sent)
                    except Exception as error:  # the other members of an ensemble are told of too
                        errors.append(error)
            if errors:
                raise errors[0]
        return skips

    def _report(self, outcome: Outcome, sent: _Sent) -> None:
        if self.on_skip == "warn":
            tell(outcome, sent.plan, sent.flags, by=self)
        elif self.on_skip == "raise":
            if outcome.skipped:
                raise NonFiniteStepError(
                    f"{message_of(outcome, sent.plan)} (on_skip='raise')\n"
                    f"{offenders(outcome, sent.plan)}"
                )
        elif self.on_skip is not None and outcome.skipped:
            names = tuple(name for name, _ in outcome.bad)
            counts = outcome.step, outcome.consecutive, outcome.total
            self.on_skip(Skip(*counts, names, message_of(outcome, sent.plan), outcome.member))
        raise_if_too_many(outcome, sent.plan, self.max_consecutive)

    def _buffer(self, shape: tuple[int, ...]) -> tuple[Tensor, torch.cuda.Event]:
        """Pinned memory and an event, used again where their shape fits."""
        while self._free:
            host, event = self._free.pop()
            if host.shape == shape:
                return host, event
        # On the host whatever the default device is.
        host = torch.empty(shape, dtype=torch.int32, device="cpu", pin_memory=True)
        return host, torch.cuda.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {"on_skip": self.on_skip, "max_consecutive": self.max_consecutive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _read(sent: _Sent) -> list[Outcome]:
    """The faults among what has arrived: at most one, or one for each member of an ensemble."""
    if not bool(sent.arriving[:, 1].any()) and not bool(sent.arriving[:, 3:].any()):
        return []
    return [o for o in outcomes_of(sent.plan, sent.arriving.tolist()) if o.failed]


class SkipMonitor:
    """`check` without the wait for the device.

    >>> monitor = nm.SkipMonitor(optimizer)  # or a plan, and then monitor(result)
    >>> for batch in data:
    ...     loss(batch).backward()
    ...     optimizer.step()
    ...     monitor()

    The flags are copied to pinned memory by a non-blocking copy and read once they have arrived.
    On CUDA the first call after that reports the step, usually one step later; on the CPU the step
    is reported at once. Call it after every step, and `wait` at the end. What has arrived when the
    process ends, and was not read, is reported then.

    `NorMuon` has such a monitor inside (its ``on_skip``). A skip that one of the two has told about
    is not told again.

    Args:
        of: an optimizer, before or after its first step, as it is or wrapped (by Accelerate or
            Lightning, in a ZeroRedundancyOptimizer, in anything with an attribute ``optimizer``);
            or the plan of a functional step.
        on_skip: ``"warn"``: one warning per skip with the names of the parameters at fault, on
            rank 0; other ranks write to the log. ``"raise"``: NonFiniteStepError at every skip. A
            function: it is called with a `Skip`, on every rank. ``None``: nothing is said.
        max_consecutive: as in `check`; not beside ``"raise"``.

    Raises:
        TypeError: ``of`` is not a Plan, and no NorMuon is in it.
        ValueError: another ``on_skip`` or ``max_consecutive``, or one that waits for skipped steps
            (``"raise"``, a function, ``max_consecutive``) where no guard skips any.
    """

    @partial(with_hints, example="nm.SkipMonitor(optimizer), or nm.SkipMonitor(plan)")
    def __init__(
        self, of: Any, *, on_skip: OnSkip = "warn", max_consecutive: int | None = None
    ) -> None:
        self.plan: Plan | None = of if isinstance(of, Plan) else None
        self._optimizer: Any = None
        if self.plan is None:
            self._optimizer = of
        config = innermost(of).config if self.plan is None else self.plan.config
        self._reports = SkipReports(on_skip, max_consecutive)
        check_skips(config.guard, on_skip, max_consecutive)

    def __call__(self, result: StepResult | None = None, plan: Plan | None = None) -> int:
        """The number of skipped steps among those whose flags have arrived since the last call.

        Args:
            result: of the step. Leave it out with an optimizer, whose step is counted once however
                often this is called.
            plan: the plan from this step on, where it has changed; an optimizer's is known.

        Raises:
            NonFiniteStepError, TypeError, ValueError: as in `check`.
        """
        if result is None and self._optimizer is not None:
            optimizer = innermost(self._optimizer)
            if optimizer.result is not None:  # otherwise it has not stepped yet
                self._reports.send(optimizer.result, optimizer.plan, once=True)
            return self._reports.look()
        if plan is not None:
            check_plan(plan)
            reports = self._reports
            check_skips(plan.config.guard, reports.on_skip, reports.max_consecutive)
            self.plan = plan
        given: Any = result
        of: Any = self.plan
        check_result(given, of)
        self._reports.send(given, of)
        return self._reports.look()

    def wait(self) -> int:
        """The same for all steps whose flags have not been read yet. Waits for the device."""
        return self._reports.look(wait=True)


def innermost(optimizer: Any) -> Any:
    """The NorMuon in an optimizer that may be wrapped, in any number of wrappers.

    Wrappers pretend to be what they wrap, so whoever has something inside is a wrapper.

    Raises:
        TypeError: there is none.
    """
    found = find_inside(optimizer)
    if found is None:
        raise TypeError(
            f"plan: expected a Plan, got {type(optimizer).__name__}; an optimizer has it as .plan "
            "after its first step, and is taken itself if it is a NorMuon or wraps one"
        )
    return found


def find_inside(optimizer: Any, depth: int = 8) -> Any:
    """`innermost`, or None."""
    for key in _INNER if depth else ():
        inner = getattr(optimizer, key, None)
        if inner is not None and inner is not optimizer:
            found = find_inside(inner, depth - 1)
            if found is not None:
                return found
    is_own = isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "late_gradients")
    return optimizer if is_own else None


def check_on_skip(on_skip: OnSkip, max_consecutive: int | None) -> None:
    """Raises ValueError for what `SkipMonitor` and `NorMuon` do not take."""
    check_max_consecutive(max_consecutive)
    if not (on_skip is None or on_skip in ("warn", "raise") or callable(on_skip)):
        raise ValueError(f"on_skip: expected 'warn', 'raise', None or a function, got {on_skip!r}")
    if on_skip == "raise" and max_consecutive is not None:
        raise ValueError(
            "on_skip: 'raise' raises at the first skip, so max_consecutive has no meaning; for an "
            "error after some in a row write on_skip='warn' beside max_consecutive"
        )


@atexit.register
def report_what_arrived() -> None:
    """Says at the end of the process what nobody asked for any more. Waits for nothing."""
    for reports in list(_alive):
        reports.max_consecutive = None
        if reports.on_skip == "raise":  # there is nobody left to catch it
            reports.on_skip = "warn"
        with contextlib.suppress(Exception):
            reports.look()
