"""Long lists are unstacked in parts: Inductor's time per operator grows with the list's square."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from normuon_fn.ops import lists

LISTS = {
    "matrices": [(4, 6)] * 7,
    "stacks": [(2, 4, 6)] * 5,
    "both": [(4, 6), (3, 4, 6), (4, 6), (2, 4, 6), (1, 4, 6)],
}


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_MOST", 2)


def a_list(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], Tensor]:
    """Zeros, and a stack of as many matrices as they are."""
    tensors = [torch.zeros(shape) for shape in shapes]
    return tensors, torch.randn(sum(map(lists.count, tensors)), 4, 6)


def test_no_operator_of_a_graph_returns_more_tensors_than_parts_have() -> None:
    tensors, stacked = a_list([(4, 6)] * (2 * lists._MOST + 1))
    graph = make_fx(lists.unstack)(tensors, stacked).graph
    parts = [node.args[0] for node in graph.nodes if "unstack" in str(node.target)]
    assert [len(part) for part in parts] == [lists._MOST, lists._MOST, 1]


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
def test_parts_are_the_whole(shapes: list[tuple[int, ...]], two_at_a_time) -> None:
    tensors, stacked = a_list(shapes)
    assert torch.equal(lists.stack(lists.unstack(tensors, stacked)), stacked)
    assert not any(x.any() for x in tensors)
    assert all(a is b for a, b in zip(lists.unstack_(tensors, stacked), tensors, strict=True))
    assert torch.equal(lists.stack(tensors), stacked)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_stack_of_another_length_is_refused_before_anything_is_written(
    more: int, two_at_a_time
) -> None:
    tensors, _ = a_list(LISTS["matrices"])
    with pytest.raises(ValueError, match="unstack: expected stacked to be a stack"):
        lists.unstack_(tensors, torch.ones(len(tensors) + more, 4, 6))
    assert not any(x.any() for x in tensors)


@pytest.mark.parametrize("start", [-1, 6])
def test_a_part_that_the_stack_does_not_have_is_refused(start: int) -> None:
    tensors, stacked = a_list(LISTS["matrices"])
    with pytest.raises(ValueError, match="unstack: expected 2 matrices from"):
        torch.ops.normuon_fn.unstack_(tensors[:2], stacked, start)


def test_the_operator_of_a_part_is_registered_as_torch_asks() -> None:
    tensors, stacked = a_list(LISTS["both"])
    for name in ("unstack", "unstack_"):
        torch.library.opcheck(
            getattr(torch.ops.normuon_fn, name).default, (tensors[:2], stacked, 1)
        )


def test_vmap_unstacks_in_parts(two_at_a_time) -> None:
    tensors, _ = a_list(LISTS["matrices"])
    stacked = torch.randn(3, len(tensors), 4, 6)
    found = torch.vmap(lambda x: lists.unstack(tensors, x))(stacked)
    assert torch.equal(torch.stack(found, 1), stacked)


def test_dynamo_traces_the_parts(two_at_a_time) -> None:
    tensors, stacked = a_list(LISTS["both"])
    traced = torch.compile(lists.unstack, backend="eager", fullgraph=True)
    assert torch.equal(lists.stack(traced(tensors, stacked)), stacked)
