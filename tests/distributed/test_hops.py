"""An all-to-all in several hops: what arrives is what one hop brings, at any grid of ranks."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.distributed as dist

from normuon_fn import ops
from normuon_fn.distributed.cost import NODE, grid_for_hops
from normuon_fn.distributed.hops import Hops, RankGrid
from normuon_fn.distributed.owners import scattered

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
Message = tuple[int, int, int]  # sender, receiver, number of the word


def grids(shape: tuple[int, ...]) -> list[RankGrid]:
    """Of every rank; a group's name says along which line of the grid it is."""
    found = []
    for place in itertools.product(*map(range, shape)):
        lines = [(dim, *place[:dim], "*", *place[dim + 1 :]) for dim in range(len(shape))]
        found.append(RankGrid(shape, place, tuple(map(str, lines))))
    return found


def exchanged(routes: list[Hops], words: list[list[Message]]) -> list[list[Message]]:
    """What every rank has after all hops. A word is the index of a message in ``every``."""
    every = sorted({word for of_rank in words for word in of_rank})
    held = [torch.tensor([every.index(w) for w in of], dtype=torch.int32) for of in words]
    hops = [[route.first, *(hop for _, hop in route.onward)] for route in routes]
    for number in range(len(hops[0])):
        lines: dict[str, list[int]] = {}  # the ranks of every process group, in order
        for rank, own in enumerate(hops):
            lines.setdefault(own[number].group, []).append(rank)
        arrived = []
        for rank, own in enumerate(hops):
            peers = lines[own[number].group]
            parts = []
            for at, peer in enumerate(peers):
                sizes = hops[peer][number].outgoing
                assert len(held[peer]) == sum(sizes) and len(sizes) == len(peers)
                parts.append(held[peer].split(list(sizes))[peers.index(rank)])
                assert len(parts[-1]) == own[number].incoming[at]
            arrived.append(torch.cat(parts))
        held = arrived
        if number + 1 < len(hops[0]):
            held = [
                ops.repack([x], route.onward[number][0])[0]
                for x, route in zip(held, routes, strict=True)
            ]
    return [[every[k] for k in x.tolist()] for x in held]


@pytest.mark.parametrize("inwards", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3), (4, 4), (2, 3, 2), (3, 2, 4)])
def test_every_word_arrives_in_the_order_that_the_route_says(
    shape: tuple[int, ...], inwards: bool
) -> None:
    rng, ranks = random.Random(str(shape)), range(math.prod(shape))
    # Few ranks own matrices, and some pairs have nothing to say.
    sizes = [[rng.choice([0, 0, 1, 2, 5]) for _ in ranks] for _ in ranks]
    device = torch.device("cpu")
    routes = [g.hops(lambda k, j: sizes[k][j], device, inwards) for g in grids(shape)]
    words = [
        [(k, j, n) for j in route.leaving for n in range(sizes[k][j])]
        for k, route in enumerate(routes)
    ]
    for j, (route, found) in enumerate(zip(routes, exchanged(routes, words), strict=True)):
        assert found == [(k, j, n) for k in route.arriving for n in range(sizes[k][j])]
        assert sorted(route.leaving) == sorted(route.arriving) == list(ranks)


def test_one_side_of_a_route_is_in_the_order_of_the_ranks() -> None:
    for grid in grids((2, 3, 2)):
        for inwards in (True, False):
            route = grid.hops(lambda k, j: 1, torch.device("cpu"), inwards)
            assert (route.leaving if inwards else route.arriving) == tuple(range(12))


MATRIX = 2.0 * 2048 * 8192  # bytes


@pytest.mark.parametrize("ranks", [2, NODE, 64, 95])
@pytest.mark.parametrize("owners", [1, 8, 64])
def test_few_ranks_go_in_one_hop(ranks: int, owners: int) -> None:
    assert grid_for_hops((*range(ranks),), 3 * MATRIX, min(owners, ranks)) == (ranks,)


@pytest.mark.parametrize("ranks", [127, 251])
def test_a_prime_number_of_ranks_goes_in_one_hop(ranks: int) -> None:
    assert grid_for_hops((*range(ranks),), MATRIX, 96) == (ranks,)


@pytest.mark.parametrize("ranks", [512, 1000, 4096])
def test_many_ranks_meet_few_others_and_owners_send_by_the_links_of_their_node(ranks: int) -> None:
    grid = grid_for_hops((*range(ranks),), MATRIX, 48)
    assert math.prod(grid) == ranks and sum(grid) < ranks / 5
    assert grid[-1] == NODE


def test_small_messages_are_not_sent_twice_for_nothing() -> None:
    assert grid_for_hops((*range(16),), 1e3, 4) == (16,)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 8, 96, 512])
def test_of_any_beginning_of_the_scattered_ranks_no_node_has_over_twice_its_share(
    ranks: int,
) -> None:
    found = scattered(range(ranks))
    assert sorted(found) == list(range(ranks))
    nodes = -(-ranks // NODE)
    for few in range(1, ranks + 1):
        most = max(sum(rank // NODE == node for rank in found[:few]) for node in range(nodes))
        assert most <= 2 * -(-few // nodes)
