"""Callbacks for transformers' Trainer and for Lightning: skipped steps and rates in their logs.

Their classes are made when they are first asked for: neither package is needed here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..diagnostics.monitor import find_inside, innermost


def trainer_callback(*, prefix: str = "") -> Any:
    """A ``transformers.TrainerCallback`` that adds to what the Trainer logs.

        trainer = transformers.Trainer(..., callbacks=[nm.trainer_callback()])

    Whenever the Trainer logs, its entry in ``state.log_history`` and what it hands to the callbacks
    after this one have also: ``skipped`` (steps so far), ``consecutive`` (in a row, up to now),
    ``lr`` and ``adamw_lr`` that the step used (with several groups ``lr/0``, ``lr/1``, ...), and
    with ``Config(metrics=True)`` the numbers of `report_metrics`. It reads two counters, and the
    metrics in one copy, from the device then, as the Trainer reads its loss.

    The Trainer asks those of ``report_to`` before its own callbacks. To have the numbers there too,
    put this callback first: ``trainer.callback_handler.callbacks.insert(0, callback)``.

    Args:
        prefix: stands before every key.

    Raises:
        ImportError: transformers is not installed.
    """
    return _class_of("TrainerCallback")(prefix)


def lightning_callback(*, prefix: str = "") -> Any:
    """A ``lightning.pytorch.Callback`` that logs for every optimizer that is a NorMuon.

        trainer = lightning.Trainer(..., callbacks=[nm.lightning_callback()])

    Every ``log_every_n_steps`` the logger gets what `trainer_callback` adds; with several
    optimizers the keys of the second one begin with ``1/``. It also works where only
    ``pytorch_lightning`` is installed.

    Raises:
        ImportError: neither package is installed.
    """
    return _class_of("LightningCallback")(prefix)


def numbers_of(optimizer: Any, prefix: str = "") -> dict[str, float]:
    """What the callbacks log of an optimizer. Waits for the device."""
    own = innermost(optimizer)
    state: Mapping[str, Tensor] = {} if own.result is None else own.result.state
    found: dict[str, float] = {
        f"{prefix}{kind}": int(state.get(f"guard.{kind}", 0)) for kind in ("skipped", "consecutive")
    }
    several, planner = len(own.param_groups) > 1, own._planner or own._settled()
    for k, group in enumerate(own.param_groups):
        place = f"/{k}" if several else ""
        rates = planner.hyper.rates(group, k)
        found[f"{prefix}lr{place}"], found[f"{prefix}adamw_lr{place}"] = rates
    if own.config.metrics:
        found |= {f"{prefix}{key}": number for key, number in own.metrics().items()}
    return found


@functools.cache
def _class_of(name: str) -> Any:
    """The class by that name, which a pickle finds in this module."""
    made = {"TrainerCallback": _of_transformers, "LightningCallback": _of_lightning}[name]()
    made.__module__, made.__name__, made.__qualname__ = __name__, name, name
    return made


def __getattr__(name: str) -> Any:
    if name in ("TrainerCallback", "LightningCallback"):
        return _class_of(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _of_transformers() -> Any:
    transformers = importlib.import_module("transformers")

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined]
        def __init__(self, prefix: str = "") -> None:
            self.prefix = prefix

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, Any] | None = None,
            optimizer: Any = None,
            **_: Any,
        ) -> None:
            if optimizer is None or logs is None:  # an evaluation without training
                return
            numbers = numbers_of(optimizer, self.prefix)
            logs |= numbers
            if state.log_history:  # the entry was written before the callbacks are asked
                state.log_history[-1] |= numbers

    return Callback


def _of_lightning() -> Any:
    try:
        module = importlib.import_module("lightning.pytorch")
    except ImportError:
        module = importlib.import_module("pytorch_lightning")

    class Callback(module.Callback):  # type: ignore[name-defined]
        def __init__(self, prefix: str = "") -> None:
            self.prefix, self.logged = prefix, 0

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            step, every = trainer.global_step, trainer.log_every_n_steps
            if not (trainer.loggers and every) or step % every or step == self.logged:
                return
            self.logged = step  # the next batches may belong to the same step
            numbers: dict[str, float] = {}
            own = [optimizer for optimizer in trainer.optimizers if find_inside(optimizer)]
            for k, optimizer in enumerate(own):
                numbers |= numbers_of(optimizer, f"{self.prefix}{k}/" if k else self.prefix)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)

    return Callback
