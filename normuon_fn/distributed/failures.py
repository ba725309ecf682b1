"""Which collective of a compiled step has failed.

A graph waits for its collectives itself, and the backend's error does not say for which. The code
that ran does: the line at which the error left it waits for a tensor, and a line before made it.

    buf29 = torch.ops._c10d_functional.all_to_all_single.default(buf28, [46, 36], [46, 0], '0')
    torch.ops._c10d_functional.wait_tensor.default(buf29)
"""

from __future__ import annotations

import linecache
import re
import traceback
from typing import NamedTuple

from ..compat import collective_error
from .messages import GATHER, RELAY, SCATTER

GUARD = "the guard's all_reduce"
_CALL = re.compile(r"(?:(\w+) = )?torch\.ops\._c10d_functional\.(\w+)\.default\((\w+)")


class _Call(NamedTuple):
    """One that starts or waits for a collective in generated code."""

    line: int
    result: str | None
    operator: str
    argument: str


def named(error: BaseException) -> Exception | None:
    """The error to raise in its place, as a step without a graph would raise it.

    None if it did not come from a collective in generated code.
    """
    if not isinstance(error, RuntimeError):
        return None
    for frame, line in traceback.walk_tb(error.__traceback__):
        lines = linecache.getlines(frame.f_code.co_filename)
        if 0 < line <= len(lines) and _CALL.search(lines[line - 1]):
            first = frame.f_code.co_firstlineno  # a file may hold the code of several graphs
            return collective_error(_name_at(line, first, lines), error)
    return None


def _name_at(line: int, first: int, lines: list[str]) -> str:
    calls = [
        _Call(number, *found.groups())
        for number, text in enumerate(lines[first - 1 :], first)
        for found in _CALL.finditer(text)
    ]
    failed = next(call for call in calls if call.line == line)
    if failed.operator == "wait_tensor":
        started = [
            call
            for call in calls
            if call.line <= line and call.operator != "wait_tensor"
            and failed.argument in (call.result, call.argument)
        ]  # fmt: skip
        if not started:
            return "a collective"
        failed = started[-1]
    if failed.operator.startswith("all_reduce"):  # there is one in a step
        return GUARD
    if failed.operator.startswith("all_gather"):
        return RELAY
    # Every bucket gathers before the first one scatters, and each does both.
    exchanges = [call for call in calls if call.operator.startswith("all_to_all")]
    if failed in exchanges and len(exchanges) % 2 == 0:
        return GATHER if exchanges.index(failed) < len(exchanges) // 2 else SCATTER
    return f"a collective ({failed.operator})"
