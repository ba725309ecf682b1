"""One line in the log while a first compilation takes long: nobody waits for a minute without a
word.

It has the level of a warning, which Python prints to stderr where no logging is set up.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

from ..distributed.placements import rank_and_world_size

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("normuon_fn")
AFTER = 5.0  # seconds: where nobody has configured anything, a cached compilation takes 1 to 3
TEXT = (
    "A step is still being compiled after %.0f s. This happens once for every plan in a process, "
    "and once for every set of parameters that have a gradient; other steps do not wait. On a busy "
    "machine it can take a minute or more. %s"
)
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
KEEP = f"Where {_VARIABLE} names a folder that outlives the job, the next start takes seconds"
KEPT = f"What {_VARIABLE} has from an earlier start is used, and the next one takes less"
_said = threading.Event()  # once per process


def saying_so_if_long(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` for one call that compiles: after ``AFTER`` seconds the log says so.

    A thread waits for that meanwhile. Only the first of several ranks says it, once per process.
    """

    @wraps(function, updated=())
    def watched(*args: P.args, **kwargs: P.kwargs) -> T:
        if _said.is_set() or rank_and_world_size()[0]:
            return function(*args, **kwargs)
        timer = threading.Timer(AFTER, _say)
        timer.daemon = True
        with suppress(RuntimeError):  # no thread can be had: the step does without the line
            timer.start()
        try:
            return function(*args, **kwargs)
        finally:
            timer.cancel()

    return watched


def _say() -> None:
    if not _said.is_set():
        _said.set()
        logger.warning(TEXT, AFTER, KEPT if os.environ.get(_VARIABLE) else KEEP)
