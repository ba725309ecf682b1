"""An exception at any line of the package that runs, as an allocator may raise one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import normuon_fn as nm

OURS = str(Path(nm.__file__).parent)
Line = tuple[str, int]


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """The lines of the package that run in a call, in the order in which they are reached."""
    found: dict[Line, None] = {}
    with _traced(lambda line: found.setdefault(line)):
        call()
    return list(found)


@contextmanager
def failing_at(line: Line) -> Iterator[None]:
    """The first time that this line is reached, torch.OutOfMemoryError is raised in its place."""

    def fail(reached: Line) -> None:
        if reached == line:
            raise torch.OutOfMemoryError(f"planted at {line[0]}:{line[1]}")

    with _traced(fail):  # Python itself ends the tracing when it has raised
        yield


@contextmanager
def _traced(reach: Callable[[Line], Any]) -> Iterator[None]:
    def of_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            reach((frame.f_code.co_filename, frame.f_lineno))
        return of_line

    def of_call(frame: FrameType, _: str, __: Any) -> Any:
        name = frame.f_code.co_filename
        return of_line if name.startswith(OURS) or "torchinductor" in name else None

    before = sys.gettrace()
    gc.disable()  # finalizers of what earlier tests left would be traced too
    sys.settrace(of_call)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()
