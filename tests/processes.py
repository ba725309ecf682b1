"""Processes that tests start.

None of them has a deadline: one that hangs is found because it makes no progress.

A busy machine makes a process slow, and a slow one still uses the processor. One that waits for
what never comes does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = (
    180  # seconds in which a tree of processes may use less than LEAST seconds of processor time
)
LEAST = 1.0  # one of twenty busy processes on two cores gets 18 in that time
TICK = 1.0  # seconds between two looks
MEASURED = Path("/proc/self/stat").exists()


class StalledError(Exception):
    """A process and its children did not use the processor for a long time."""


class Progress:
    """Whether some processes or any of their descendants still use the processor.

    Looks are counted rather than seconds, so that the pause of a machine that sleeps is one look.
    """

    def __init__(self, pids: Iterable[int], patience: float = PATIENCE) -> None:
        self.pids, self.looks, self.idle, self.used = tuple(pids), patience / TICK, 0, 0.0

    def stalled(self) -> bool:
        """To be called once every TICK. False where there is no /proc: nothing is known there."""
        used = processor_seconds(self.pids)
        if abs(used - self.used) >= LEAST or not MEASURED:
            self.used, self.idle = used, 0
        self.idle += 1
        return self.idle > self.looks


def processor_seconds(pids: Iterable[int]) -> float:
    """What these processes, their descendants and those descendants that have ended have used."""
    table = _processes()
    return sum(table[pid][1] for pid in _trees(pids, table)) / os.sysconf("SC_CLK_TCK")


def end(pids: Iterable[int]) -> None:
    """Kills these processes and all their descendants, of whatever group and session they are."""
    pids = tuple(pids)
    for pid in pids:
        _send(pid, signal.SIGSTOP)  # so that it starts no more of them
    for pid in {*_trees(pids, _processes()), *pids}:
        _send(pid, signal.SIGKILL)


def run(
    command: Sequence[object],
    *,
    code: int | None = 0,  # the expected exit code; None: any
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,  # beside the environment of this process
    patience: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """What a command printed; the repository is importable there.

    AssertionError for another exit code.

    Raises:
        StalledError: the command hung. All its processes are killed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    arguments = [str(argument) for argument in command]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | own,
        start_new_session=True,
    )
    progress = Progress([process.pid], patience)
    try:
        while True:
            try:
                printed, errors = process.communicate(timeout=TICK)
                break
            except subprocess.TimeoutExpired:
                if progress.stalled():
                    raise StalledError(
                        f"{arguments} used no processor time in {patience} s"
                    ) from None
    finally:
        if process.poll() is None:
            end([process.pid])
            process.communicate()
    assert code in (None, process.returncode), (
        f"{arguments} ended with {process.returncode}\n{printed[-4000:]}\n{errors[-4000:]}"
    )
    return subprocess.CompletedProcess(arguments, process.returncode, printed, errors)


def _processes() -> dict[int, tuple[int, int]]:
    """By process: its parent, and the ticks that it and its children that have ended have used."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()
            found[int(file.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    return found


def _trees(pids: Iterable[int], table: Mapping[int, tuple[int, int]]) -> set[int]:
    found = set(pids) & table.keys()
    while more := {pid for pid, (parent, _) in table.items() if parent in found} - found:
        found |= more
    return found


def _send(pid: int, what: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, what)
