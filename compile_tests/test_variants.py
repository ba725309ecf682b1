"""The graph of a variant keeps the promises of the step: one graph, no wait, one guard."""

from __future__ import annotations

from typing import Any

import pytest

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, problem
from compile_tests.test_listing import SHAPES
from normuon_fn.step import local_update_


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "adamuon", "cautious_update": True, "weight_decay_form": "hyperball"},
        {"name": "nanochat", "update_floor": 0.3},
        {"name": "paper", "other": "lion"},
    ],
    ids=["entries", "rows", "lion"],
)
def test_a_variant_on_cuda_is_one_graph_with_the_kernels_of_the_step(
    fields: dict[str, Any],
) -> None:
    with graphs.fake_cuda():
        config = nm.Config.preset(**{**SHORT, "guard": "full", **fields})
        recorded = graphs.record(local_update_, *problem(SHAPES, config, device="cuda"))
        recorded.check(device="cuda")
    lines = recorded.listing.split("\n")
    assert sum(line.startswith("apply_ of") for line in lines) == 3
    assert ("lion_ of 2" in lines) == (fields.get("other") == "lion")
