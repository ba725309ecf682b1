"""What metrics cost in the graph of a step: no pass over a parameter, gradient or state more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, problem
from normuon_fn.step import local_update_

SHAPES = {"wte": (6, 4), "up": (8, 4), "down": (4, 8), "experts": (2, 4, 4), "bias": (4,)}


def recorded(
    function: Callable, guard: str, device: str, metrics: bool, **options: Any
) -> graphs.Recorded:
    config = nm.Config(guard=guard, metrics=metrics, nesterov=True, **SHORT, **options)
    with graphs.fake_cuda() if device == "cuda" else nullcontext():
        found = graphs.record(function, *problem(SHAPES, config, device=device))
    found.check(device=device)  # one graph, no host sync, no collective, one device
    return found


def entries_read(found: graphs.Recorded) -> int:
    """How many entries of the caller's tensors the operators over lists read."""
    lists = [
        x
        for node in found.calls
        if graphs.name_of(node).startswith("normuon_fn.")
        for x in node.args
        if isinstance(x, (list, tuple))
    ]
    values = [node.meta["val"] for tensors in lists for node in tensors if hasattr(node, "meta")]
    return sum(x.numel() for x in values if isinstance(x, Tensor))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("function", "guard"), [(nm.update, "off"), (local_update_, "full")], ids=["pure", "in place"]
)
def test_metrics_read_nothing_that_the_step_does_not_read(
    function: Callable, guard: str, device: str
) -> None:
    plain = recorded(function, guard, device, metrics=False)
    measured = recorded(function, guard, device, metrics=True)
    assert entries_read(plain) > 0
    assert entries_read(measured) == entries_read(plain)
    lines = measured.listing.replace("_measured", "").splitlines()
    assert [line for line in lines if not line.startswith("copy_")] == [
        line for line in plain.listing.splitlines() if not line.startswith("copy_")
    ]
    assert len(measured.calls) > len(plain.calls)


def test_metrics_of_codes_and_of_lion_are_those_of_the_passes_that_there_are() -> None:
    options: dict[str, Any] = {"momentum_dtype": "int8", "other": "lion"}
    plain, measured = (recorded(local_update_, "full", "cuda", m, **options) for m in (False, True))
    assert entries_read(measured) == entries_read(plain) > 0
    lines = measured.listing.splitlines()
    assert [line.replace("_measured", "") for line in lines if "copy_" not in line] == [
        line for line in plain.listing.splitlines() if "copy_" not in line
    ]
    for name in ("advance_coded_measured_", "lion_measured_", "apply_measured_"):
        assert any(line.startswith(name) for line in lines), name
