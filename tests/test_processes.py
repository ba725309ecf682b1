"""A process that hangs is found and ended with all its children; one that is slow is left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def test_a_process_that_hangs_is_ended_with_its_children() -> None:
    before = children_named("sleep")
    with pytest.raises(processes.StalledError, match="used no processor time in 2 s"):
        processes.run(["sh", "-c", "sleep 6543 & wait"], patience=2)
    assert children_named("sleep") <= before


def children_named(name: str) -> set[str]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_text().startswith(f"{name}\0006543"):
                found.add(file.parent.name)
        except OSError:  # it has ended meanwhile
            pass
    return found


def looks(monkeypatch: pytest.MonkeyPatch, used: Iterator[float], patience: int) -> list[bool]:
    monkeypatch.setattr(processes, "processor_seconds", lambda pids: next(used))
    progress = processes.Progress([os.getpid()], patience)
    return [progress.stalled() for _ in range(20)]


def test_a_process_that_gets_little_of_the_processor_is_slow_and_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = (1 + 0.3 * k for k in range(20))  # LEAST in every fourth look
    assert not any(looks(monkeypatch, slow, patience=5))
    waits = (1 + 0.01 * k for k in range(20))  # a thread that looks now and then
    assert looks(monkeypatch, waits, patience=5) == [k >= 5 for k in range(20)]


def test_an_exit_code_that_is_not_expected_shows_what_was_printed() -> None:
    with pytest.raises(AssertionError, match="ended with 3\nout\n\nerr"):
        processes.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert processes.run(["sh", "-c", "exit 3"], code=3).returncode == 3
