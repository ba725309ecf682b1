"""A first compilation that takes long says so in the log, once, from the first rank."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.runtime import long_compilation, outside
from tests import guides, scripts

SLOW, SHORT = 0.3, 0.02  # seconds that compiling takes here; from when on it is long


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_compilation, "_said", threading.Event())
    monkeypatch.setattr(long_compilation, "AFTER", SHORT)
    monkeypatch.setattr(outside, "compile_whole", slowly)


def slowly(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """As the fixture ``without_inductor``, with a compiler that takes its time."""

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        time.sleep(SLOW)
        return graph.forward

    return compile_whole(function, backend=backend, **options)  # type: ignore[arg-type]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, "normuon_fn"):
        yield lambda: [text for _, _, text in caplog.record_tuples if "compiled" in text]


def new(name: str = "w") -> tuple[Any, ...]:
    params = {name: torch.randn(4, 6), "b": torch.randn(4)}
    plan = nm.make_plan(params, nm.Config(method="standard", steps=1))
    grads = {key: torch.randn_like(p) for key, p in params.items()}
    return params, grads, nm.init(params, plan), nm.Hyper.of(params, lr=0.01), plan


def waiting() -> list[threading.Thread]:
    """Timers that still wait. One that was cancelled ends as soon as its thread runs."""
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    for timer in timers:
        timer.join(10)
    return [t for t in timers if t.is_alive()]


def test_a_long_first_compilation_says_so_once(lines: Callable[[], list[str]]) -> None:
    step = new()
    nm.step_(*step)
    (said,) = lines()
    assert "TORCHINDUCTOR_CACHE_DIR" in said and "\n" not in said
    nm.step_(*step)
    nm.step(*step)  # another graph of the same plan
    nm.step_(*new("other"))  # another plan
    assert lines() == [said]


@pytest.mark.parametrize("folder", ["", "/a/folder"])
def test_who_has_set_the_folder_is_not_told_to(
    folder: str, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    long_compilation._say()
    (said,) = lines()
    assert said.endswith(long_compilation.KEPT if folder else long_compilation.KEEP)


def test_every_way_to_a_compiled_step_says_it(lines: Callable[[], list[str]]) -> None:
    model = torch.nn.Linear(4, 6)
    optimizer = nm.NorMuon(model, lr=0.01, routes={"weight": nm.Route()})
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert len(lines()) == 1
    long_compilation._said.clear()
    w, g, m, v = (torch.ones(*shape) for shape in ((5, 7), (5, 7), (5, 7), (5, 1)))
    nm.foreach_step_([w], [g], [m], [v], lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0)
    assert len(lines()) == 2
    long_compilation._said.clear()
    params, grads, _, hyper, _ = new()
    own = nm.make_plan(params, nm.Config(orthogonalizer=lambda x: x * 2.0))
    nm.step(params, grads, nm.init(params, own), hyper, own)
    assert len(lines()) == 3


def test_a_short_one_says_nothing_and_leaves_no_thread(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_compilation, "AFTER", 600.0)
    nm.step_(*new())
    assert lines() == [] and waiting() == []


def test_a_compilation_that_fails_leaves_no_thread(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_compilation, "AFTER", 600.0)

    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(
        outside, "compile_whole", lambda f, **o: compile_whole(f, backend=refuse, **o)
    )
    with pytest.raises(Exception, match="no compiler"):
        nm.step_(*new())
    assert lines() == [] and waiting() == []


def test_a_warm_step_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    step = new()
    nm.step_(*step)
    long_compilation._said.clear()
    monkeypatch.setattr(threading, "Timer", None)
    nm.step_(*step)


def test_where_no_thread_can_be_had_the_step_is_made_all_the_same(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    params, *others = new()
    before = params["w"].clone()
    nm.step_(params, *others)
    assert lines() == [] and not torch.equal(params["w"], before)


def test_of_several_ranks_the_first_one_says_it(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, said in ((3, 0), (0, 1)):
        monkeypatch.setattr(long_compilation, "rank_and_world_size", lambda rank=rank: (rank, 4))
        nm.step_(*new())
        assert len(lines()) == said


def test_nothing_has_to_be_configured_to_read_it_and_one_line_silences_it(tmp_path: Path) -> None:
    said = """
import logging, warnings
from normuon_fn.runtime import long_compilation

warnings.simplefilter("error")  # it is none of Python's warnings
{line}
long_compilation._say()
long_compilation._say()
"""
    silence = 'logging.getLogger("normuon_fn").setLevel(logging.ERROR)'  # of the guide
    assert silence in guides.text("troubleshooting.md")
    for line, count in (("", 1), (silence, 0)):
        file = tmp_path / f"lines{count}.py"
        file.write_text(said.format(line=line))
        done = scripts.run(file)
        assert done.stderr.count("TORCHINDUCTOR_CACHE_DIR") == count
        assert len(done.stderr.splitlines()) == count and done.stdout == ""
