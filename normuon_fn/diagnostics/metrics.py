"""The metrics of a step as numbers with names, for any logger."""

from __future__ import annotations

import math

import torch

from ..algorithm.metrics import METRICS
from ..planning.plan import Plan
from ..types import StepResult
from .skips import check_result

FLAGS = ("nonfinite_update", "nonfinite_gradient")


def report_metrics(result: StepResult, plan: Plan) -> dict[str, float]:
    """``"<metric>/<parameter>"`` -> its number, of a step with ``Config(metrics=True)``.

    Waits for the device, once: one copy of all numbers. With U what the step subtracts besides
    weight decay, and W the parameter before the step:

    - ``update_rms``: RMS of U; with the scale ``"paper"`` it is ``rms`` times ``lr`` (0.2 lr).
    - ``grad_rms``, ``momentum_rms``: RMS of the gradient as it was given, and of the momentum after
      the step (of AdamW's first moment).
    - ``weight_norm``: Frobenius norm of W, of its float32 master if it has one.
    - ``update_ratio``: the norm of U over that of W.
    - ``variance_spread``: standard deviation of the variances of a parameter's neurons, over their
      mean. 0: all neurons are alike. Not for parameters without such a variance.
    - ``nonfinite_update``, ``nonfinite_gradient``: 1 where the flags are set, otherwise 0.

    A parameter that the step left alone (frozen, or without a gradient) has no entry. A step that
    was skipped subtracts nothing, so its updates are 0 (AdamW's first moment is the one that was
    not written). DTensors have the numbers of the whole parameter, on every rank.

    >>> if step % 100 == 0:
    ...     for key, number in nm.report_metrics(result, plan).items():
    ...         writer.add_scalar(key, number, step)

    Shapes: ``result.metrics`` has the first six as a [6, n_params] float32 tensor on the device, in
    the order of ``plan.names``, for who wants to keep them there; NaN where there is no number.

    Units: of the parameters and gradients; ratios and spreads have none.

    Raises:
        TypeError, ValueError: as `check`; or the plan was made without metrics.
    """
    check_result(result, plan)
    if result.metrics is None:
        raise ValueError(
            "result: it has no metrics, because they are off; write Config(metrics=True)"
        )
    if result.metrics.ndim > 2:
        raise ValueError(
            f"result: expected that of one model, got those of {result.metrics.shape[0]} members "
            "of an ensemble; give one of them: "
            "torch.utils._pytree.tree_map(lambda each: each[0], result)"
        )
    together = torch.cat([result.metrics.double(), result.flags.double()])
    rows = together.T.tolist()
    neurons = any(state.name == "variance" for state in plan.stages.line_states)
    found: dict[str, float] = {}
    for (name, row), parameter in zip(
        zip(plan.names, rows, strict=True), plan.parameters, strict=True
    ):
        numbers, flags = row[: len(METRICS)], row[len(METRICS) :]
        if all(map(math.isnan, numbers)) and not any(flags):
            continue
        has_variance = neurons and f"{parameter.name}.variance" in plan.whole_state
        for metric, number in zip((*METRICS, *FLAGS), row, strict=True):
            if metric != "variance_spread" or has_variance:
                found[f"{metric}/{name}"] = number
    return found
