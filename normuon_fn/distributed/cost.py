"""What a bucket of matrices costs a rank, predicted: for decisions at plan time, not for clocks.

All ranks of a process group compute the same numbers, from what the plans of all of them have, and
so decide alike. Where the
machine is another one, a decision may be less than the best, and never wrong.

Sources of the rates: one H200, 1.3B parameters in float32, torch 2.11, 2026-11-22: 69.6 ms a step,
60 ms of them products, the rest passes over parameters; two H200 with FSDP2, 44.3 ms, NCCL 5.4 ms
for 1.2 GB, packing 5 ms. The network is an assumption: 400 Gbit/s per GPU at 80 %, 8 GPUs per node,
1 us per message, 20 us per hop. examples/benchmarks/scale_model.py has the same rates (but for
hops), and counts the bytes that the plan really sends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

NODE = 8  # ranks
PRODUCT = 544e12  # FLOP/s, of Newton-Schulz
BANDWIDTH = 4.3e12  # B/s
PARAMETER = 34.2  # B moved per parameter that lies on the rank
PACKING = 4.45  # B moved per byte of a buffer that is sent or received
NVLINK = 224e9  # B/s each way, within a node
NETWORK = 40e9  # B/s each way of a GPU, to other nodes
MESSAGE = 1e-6  # s, for every rank that is met
HOP = 20e-6  # s, to start one more all-to-all, and to sort what it sends
HOPS_FROM = 96  # ranks

# A prediction is not more exact than this. What is predicted to be faster by less is not done.
RELATIVE, SECONDS = 1.02, 50e-6


@dataclass(frozen=True)
class Load:
    """The matrices of one bucket, tall ones transposed, and the ranks that store them."""

    matrices: int
    rows: int  # rows <= cols
    cols: int
    flop: float  # of the products of one matrix
    entry: int  # bytes of an entry in a message
    # [replicas, shards]: the number of each rank in the whole process group
    ranks: tuple[tuple[int, ...], ...]

    @property
    def shards(self) -> int:
        return len(self.ranks[0])

    def passes(self) -> float:
        """Seconds of the passes over parameters, gradients and state, whoever orthogonalizes."""
        entries = self.matrices * self.rows * self.cols / self.shards
        return entries * PARAMETER / BANDWIDTH

    def products(self, replicas: int) -> float:
        """Seconds of the products of the busiest rank, if so many replicas share the matrices."""
        return -(-self.matrices // (replicas * self.shards)) * self.flop / PRODUCT

    def exchange(self, replicas: int) -> float:
        """Seconds of one all-to-all between the shards of a replica: parts in, or updates back."""
        if self.shards == 1:
            return 0.0
        owners = min(self.shards, -(-self.matrices // replicas))
        size = self._part(replicas) * self.shards / owners
        grid = grid_for_hops(self.ranks[0], size, owners)
        if len(grid) > 1:
            return _over_grid(grid, self.ranks[0], size, owners)
        sent = self._part(replicas) * (self.shards - 1) / self.shards
        return _transfer(self.ranks[0], sent)

    def relay(self, replicas: int) -> float:
        """Seconds of the all-gather that brings the updates to the other replicas."""
        if replicas == 1:
            return 0.0
        peers = [of_replica[0] for of_replica in self.ranks[:replicas]]
        return _transfer(peers, (replicas - 1) * self._gathered(replicas))

    def packing(self, replicas: int) -> float:
        """Seconds of packing and unpacking all messages."""
        # Both ways, each packed and unpacked.
        moved = 4 * self._part(replicas) if self.shards > 1 else 0.0
        if replicas > 1:
            moved += (replicas + 1) * self._gathered(replicas)
        return moved * PACKING / BANDWIDTH

    def step(self, replicas: int) -> float:
        """Seconds of the bucket: arithmetic lies under transfers, or transfers under arithmetic."""
        busy = self.passes() + self.products(replicas) + self.packing(replicas)
        return max(busy, 2 * self.exchange(replicas) + self.relay(replicas))

    def _part(self, replicas: int) -> float:
        """Bytes of a rank's part of the matrices that its replica orthogonalizes."""
        share = -(-self.matrices // replicas)
        return share * self.rows * self.cols * self.entry / self.shards

    def _gathered(self, replicas: int) -> float:
        """The same with the flags of all matrices, of which every owner sends its own."""
        return self._part(replicas) + 4 * self.matrices * self.shards


@functools.lru_cache(1024)
def grid_for_hops(ranks: tuple[int, ...], size: float, owners: int) -> tuple[int, ...]:
    """The grid over which an all-to-all goes in a hop along each dimension; of one, in one hop.

    Several hops are fewer messages, and what an owner sends to other nodes leaves by the links of
    its whole block. For that, all bytes are sent several times.

    ``ranks``: of one replica, as the whole process group numbers them. ``size``: bytes that an
    owner sends to all of them or receives. ``owners``: how many of them own matrices.
    """
    every = len(ranks)
    if every < HOPS_FROM:
        return (every,)

    def seconds(grid: tuple[int, ...]) -> float:
        return _over_grid(grid, ranks, size, owners)

    sizes = [n for n in range(2, every + 1) if every % n == 0]
    inner = [(n,) for n in sizes] + [(m, n) for m in sizes for n in sizes if every % (m * n) == 0]
    grids = [(every // math.prod(dims), *dims) for dims in inner if math.prod(dims) < every]
    best = min(grids, key=seconds, default=(every,))
    return best if RELATIVE * seconds(best) + SECONDS < seconds((every,)) else (every,)


def _over_grid(grid: tuple[int, ...], ranks: Sequence[int], size: float, owners: int) -> float:
    """Seconds of all hops of an all-to-all."""
    total, block = HOP * (len(grid) - 1), 1  # over a block of ranks an owner's bytes are spread
    for n in reversed(grid):
        through = size * max(1.0, owners * block / len(ranks)) / block  # bytes of each rank
        total += _transfer(ranks[::block][:n], through)
        block *= n
    return total


def _transfer(ranks: Sequence[int], size: float) -> float:
    """Seconds in which the first of these ranks sends so many bytes to the others, evenly."""
    peers = len(ranks) - 1
    away = sum(rank // NODE != ranks[0] // NODE for rank in ranks)
    within, off = size * (peers - away) / peers, size * away / peers
    return max(within / NVLINK, off / NETWORK) + peers * MESSAGE
