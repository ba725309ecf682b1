"""Fixtures of several wings, and the order in which files of tests are handed to two workers."""

from __future__ import annotations

import gc
from functools import partial

import pytest

from normuon_fn.compat.graphs import compile_whole
from normuon_fn.optim import normuon
from normuon_fn.runtime import graphed, outside
from normuon_fn.step import local_update_

# Files that take long, the longest first: whoever is free takes the next file, so that all workers
# end at about the same time.
LONGEST_FIRST = (
    "test_layouts.py",
    "test_inductor.py",
    "test_interpreted.py",
    "test_low_precision.py",
    "test_collectives.py",
    "test_step_graph.py",
    "test_examples.py",
    "test_study.py",
    "test_examples_distributed.py",
    "test_guides.py",
    "test_dying_ranks.py",
    "test_optimizer.py",
    "test_study_soak.py",
    "test_transforms.py",
    "test_planted_breaks.py",
    "test_guard_ranks.py",
    "test_orthogonalize_sharded.py",
    "test_main.py",
    "test_listing.py",
    "test_operators.py",
    "test_benchmarks.py",
    "test_fault_matrix.py",
    "test_wrappers.py",
    "test_step.py",
    "test_own_orthogonalizer.py",
    "test_foreach.py",
    "test_plan.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: k for k, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collections of garbage pass over what lives as long as the process, and come less often.

    Modules and five thousand tests are a million objects: with them one `gc.collect` takes 0.6 s,
    and some tests call it at every step.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`step`, `step_` and `NorMuon` trace their graphs and run them operation by operation: a
    fraction of the time.
    """
    monkeypatch.setattr(outside, "compile_whole", partial(compile_whole, backend="aot_eager"))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """`NorMuon` and `GraphedStep` run the step operation by operation, without a graph."""
    for module in (normuon, graphed):
        monkeypatch.setattr(module, "step_", local_update_)
