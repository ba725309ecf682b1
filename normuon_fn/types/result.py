"""What a step gives back: `StepResult`."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor


class StepResult(NamedTuple):
    """``params`` and ``state`` have the keys of what was given, in the same order.

    What a step does not update (frozen, or without a gradient) comes back as the tensor that was
    given, which a later `step_` writes: clone() what is to stay. Others have the strides of theirs.
    """

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    # [2, n_params] int32, in the order of plan.names: non-finite update, non-finite gradient
    flags: Tensor
    skipped: Tensor  # 0-d bool: something kept its bits

    @property
    def metrics(self) -> Tensor | None:
        """None: a step with ``Config(metrics=True)`` gives a `MeasuredResult`."""
        return None


class MeasuredResult(NamedTuple):
    """The `StepResult` of a step with ``Config(metrics=True)``, which has one field more."""

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    flags: Tensor
    skipped: Tensor
    metrics: Tensor  # [6, n_params] float32, in the order of plan.names: see `report_metrics`


def result_of(
    params: dict[str, Tensor],
    state: dict[str, Tensor],
    flags: Tensor,
    skipped: Tensor,
    metrics: Tensor | None,
) -> StepResult:
    """With metrics it is a `MeasuredResult`, so that who unpacks four goes on without them."""
    if metrics is None:
        return StepResult(params, state, flags, skipped)
    return cast(StepResult, MeasuredResult(params, state, flags, skipped, metrics))
