"""A schedule of learning rates as a pure function of the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from .hyper import check_number
from .other_names import with_hints

Shape = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """``schedule(state["guard.step"])`` is what the peak rates are multiplied by at this step.

    It has no state of its own: the number of steps is in the state of the step, so whoever saves
    and loads that goes on where the schedule was. The result is a tensor on the device of the
    number, nothing waits for it, and it may be part of a graph of your own or of a CUDA-graph
    capture.

    >>> schedule = nm.Schedule(total=10_000, warmup=500)
    >>> peak = nm.Hyper.of(params, lr=0.01)
    >>> hyper = peak.scaled(schedule(state["guard.step"]))

    A skipped step counts, as it does for ``"guard.step"``. In a tensor, whose values nothing waits
    for, a negative number is taken for that of the first step. A Python int gives a float, for
    ``torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)``.

    With k = 0 for the first step: (k + 1) / warmup while k < warmup; then 1, until the decay
    begins; then from 1 to ``final``, which it is from k = total on.

    Args:
        total: steps from the first one to the end of the decay.
        warmup: steps in which the rates rise.
        decay: steps in which they fall, the last ones. ``None``: all after the warmup; fewer make
            the schedule warmup-stable-decay (arXiv 2404.06395).
        final: the multiplier at the end.
        shape: of the decay, ``"cosine"`` (arXiv 1608.03983) or ``"linear"``.

    Shapes: of a tensor of integers, float32 in the same shape.

    Units: a share of the peak rate, in [0, 1].

    Raises:
        TypeError, ValueError: numbers that are no such schedule, at construction; or a call with
            a negative int, or something else than an int or a tensor of integers.
    """

    total: int
    warmup: int = 0
    decay: int | None = None
    final: float = 0.0
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        for name in ("total", "warmup", "decay"):
            value = getattr(self, name)
            if name == "decay" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Schedule.{name}: expected a number of steps, got {value!r}")
            if value < (name == "total"):
                raise ValueError(f"Schedule.{name}: expected a number of steps, got {value}")
        if self.warmup + (self.decay or 0) > self.total:
            raise ValueError(
                f"Schedule: warmup {self.warmup} and decay {self.decay} are longer than the total "
                f"of {self.total}"
            )
        check_number("Schedule.final", self.final)
        if self.final > 1.0:
            raise ValueError(f"Schedule.final: expected a share of the peak, got {self.final}")
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"Schedule.shape: expected one of {get_args(Shape)}, got {self.shape!r}"
            )

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        if isinstance(step, Tensor):
            if not (step.dtype.is_floating_point or step.is_complex() or step.dtype == torch.bool):
                return self._of(step)
        elif hasattr(step, "__index__") and not isinstance(step, bool):  # numpy's integers too
            if step < 0:
                raise ValueError(f"step: expected an int >= 0, got {step}; the first step is 0")
            return float(self._of(torch.tensor(index(step), device="cpu")))
        raise TypeError(
            f"step: expected an int or a tensor of integers, state['guard.step'], got {step!r}"
        )

    def _of(self, step: Tensor) -> Tensor:
        k = step.detach().double().clamp(min=0.0)
        decay = self.total - self.warmup if self.decay is None else self.decay
        begin = self.total - decay
        done = ((k - begin) / max(decay, 1)).clamp(0.0, 1.0)  # the share of the decay
        if decay == 0:
            done = (k >= self.total).double()
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + (done * math.pi).cos())
        rate = self.final + (1.0 - self.final) * left
        if self.warmup:
            rate = torch.where(k < self.warmup, (k + 1) / self.warmup, rate)
        return rate.float()


Schedule.__init__ = with_hints(Schedule.__init__)  # type: ignore[method-assign]
