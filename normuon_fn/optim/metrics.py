"""The metrics of an optimizer's last step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..diagnostics.metrics import report_metrics

if TYPE_CHECKING:
    from .normuon import NorMuon


def metrics_of(optimizer: NorMuon) -> dict[str, float]:
    """`report_metrics` of the last step, with ``config=Config(metrics=True)``.

    Waits for the device, once. Empty before the first step, and after a step in which no parameter
    had a gradient: nothing was measured then (``result`` is of the last step that had one).

    Raises:
        ValueError: the optimizer's metrics are off.
    """
    if not optimizer.config.metrics:
        raise ValueError(
            "NorMuon.metrics: they are off; write NorMuon(..., config=Config(metrics=True))"
        )
    if optimizer.result is None or optimizer.plan is None or optimizer.without_gradients:
        return {}
    return report_metrics(optimizer.result, optimizer.plan)
