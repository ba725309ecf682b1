"""Out of memory at every line of a step: parameters and state are whole, or the error says that
they are not; and the next step works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.ops import handles
from normuon_fn.runtime import eager, outside
from tests.runtime.lines import Line, failing_at, lines_of

SHAPES = {"a": (8, 16), "b": (6, 4), "bias": (8,)}
# An operator counts before its body reads its arguments, and a graph before it begins.
SAYS_EARLY = ("registration.py", "lists.py", "adamw.py", "adamw_reference.py")
# What torch 2.11 generates has a line between the two (seen on 2.11.0 on a GPU machine).
OLD_GRAPHS = TorchVersion(torch.__version__) < (2, 12)


class Step(NamedTuple):
    """A step, what it writes, and what it returns."""

    written: dict[str, Tensor]
    call: Callable[[], dict[str, Tensor]]


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def functional(function: Callable[..., nm.StepResult]) -> Step:
    params, grads = drawn(0), drawn(1)
    plan = nm.make_plan(params, nm.Config(guard="full"))
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)

    def call() -> dict[str, Tensor]:
        result = function(params, grads, state, hyper, plan)
        return {**result.params, **result.state}

    return Step({**params, **state}, call)


def foreach() -> Step:
    params, grads = ([tensors["a"], tensors["b"]] for tensors in (drawn(0), drawn(1)))
    momentums = [torch.zeros_like(p) for p in params]
    variances = [torch.zeros_like(p[:, :1]) for p in params]
    lists = (params, momentums, variances)
    written = {f"{k}.{i}": x for k, xs in enumerate(lists) for i, x in enumerate(xs)}

    def call() -> dict[str, Tensor]:
        nm.foreach_step_(
            params, grads, momentums, variances, lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0,
            config=nm.Config(guard="full"), compiled=False,
        )  # fmt: skip
        return written

    return Step(written, call)


def optimizer() -> Step:
    params = {name: torch.nn.Parameter(x) for name, x in drawn(0).items()}
    for name, grad in drawn(1).items():
        params[name].grad = grad
    shell = nm.NorMuon(list(params.items()), lr=0.1, config=nm.Config(guard="full"))
    shell.step()
    written = {name: p.data for name, p in params.items()}
    for name, p in params.items():
        written |= {f"{name}.{key}": x for key, x in shell.state[p].items() if torch.is_tensor(x)}

    def call() -> dict[str, Tensor]:
        shell.step()
        return written

    return Step(written, call)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """An error at the line that forgets a graph's lists would leave them to all later tests."""
    yield
    handles._thread.__dict__.clear()


@pytest.fixture
def no_graphs() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, others[name]) for name, x in tensors.items())


def says_half_written(error: BaseException) -> bool:
    notes = [*getattr(error, "__notes__", ()), *map(str, error.args)]
    return any(eager.HALF_WRITTEN in note for note in notes)


def error_at(line: Line, call: Callable[[], object]) -> BaseException | None:
    try:
        with failing_at(line):
            call()
    except torch.OutOfMemoryError as error:
        return error
    return None


def check_every_line(step: Step, stride: int = 1) -> list[Line]:
    """The lines whose errors said that the step had written. It must not be said without cause."""
    written, call = step
    call()  # what is done once
    before = clones(written)

    def restore() -> None:
        for name, x in written.items():
            x.copy_(before[name])

    after = clones(call())
    restore()
    lines = lines_of(call)
    assert not same(after, before) and len(lines) > 50
    said = []
    for line in lines[::stride]:
        restore()
        error = error_at(line, call)
        if error is None:  # an error of the error's own handling was suppressed
            assert line[0].endswith(("registration.py", "eager.py")), line
        elif says_half_written(error):
            said.append(line)
            early = line[0].endswith(SAYS_EARLY) or (OLD_GRAPHS and "inductor" in line[0])
            assert not same(written, before) or early, line
        else:  # the step had not begun to write, or it had ended
            assert same(written, before) or same(written, after), line
        if not same(written, before):
            restore()  # as from a checkpoint
        assert same(call(), after), f"the step after an error at {line}"
    return said


@pytest.mark.parametrize(
    ("make", "stride"),
    [(partial(functional, nm.step_), 3), (foreach, 4), (optimizer, 4)],
    ids=["step_", "foreach_step_", "NorMuon"],
)
def test_a_step_in_place_without_a_graph_is_whole_after_an_error_at_any_line_or_says_so(
    make: Callable[[], Step], stride: int, no_graphs: None
) -> None:
    said = check_every_line(make(), stride)
    assert {Path(file).name for file, _ in said} & {"bucket.py", "tensors.py", "reference.py"}


def test_a_compiled_step_in_place_is_whole_after_an_error_at_any_line_or_says_so() -> None:
    """By Inductor, whose kernels write before the operators that follow them do."""
    said = check_every_line(functional(nm.step_))
    assert "adamw_reference.py" in {Path(file).name for file, _ in said}


@pytest.mark.parametrize("graph", [True, False])
def test_the_pure_step_never_writes(
    graph: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if graph:
        monkeypatch.setattr(outside, "compile_whole", partial(compile_whole, backend="aot_eager"))
    else:
        request.getfixturevalue("no_graphs")
    assert check_every_line(functional(nm.step), 2 if graph else 6) == []


def test_a_step_that_could_not_be_compiled_was_not_written(
    monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    """Out of memory while the graph is made."""
    written, call = functional(nm.step_)
    before = clones(written)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("normuon_fn.algorithm.bucket.MatrixWork.apply", fail)
        with pytest.raises(Exception, match="planted") as raised:  # torch wraps it
            call()
    assert same(written, before) and not says_half_written(raised.value)
    assert not same(call(), before)
