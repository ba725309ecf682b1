"""A kernel of the products whose warps have different work: one loads, the others multiply.

It is written in Gluon, which is part of Triton (`triton.experimental`) and lets a kernel say what
its warps do. So this module is imported when its kernel is first wanted, and not before: see
`product_launch`. Every result has the bits of `product_kernels.descriptor_kernel`.

    loader      one warp         a and b of every step along k into a ring of stages, c behind them
    consumer    4 or 8 warps     multiply what is there, add c, and store

A program goes from tile to tile. Loads of the next tile run while a tile ends, and its stores leave
while the next one's product runs. With two consumers of 4 warps each, which take turns, one's
product hides the other's end (warp_specialized_ends.py). Where a tile begins is read from a table:
divisions and roots by the one warp that loads would delay the loads.

Every buffer of the ring has two barriers, ``full`` (the loads have arrived) and ``empty`` (its
product is done). A consumer's result has one buffer for each square of BLOCK_M: c is loaded into it
(``c_full``), the result is stored from it, and then it is free for the next c (``c_free``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .warp_specialized_ends import end_of_square, store_mirrored

# Since Triton 3.8 it has a shorter name, and since 3.9 that alone.
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@functools.cache
def layout_of(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a block that a descriptor loads or stores lies in shared memory."""
    named = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(list(block), named)


def descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """What the kernel takes in the place of a tensor."""
    return TensorDescriptor(x, shape, strides, block, layout_of(tuple(block), x.dtype))


@gluon.jit
def _first_entry(first_entries, tile):
    i0 = gl.load(first_entries + 2 * tile)
    j0 = gl.load(first_entries + 2 * tile + 1)
    return i0.to(gl.int32), j0.to(gl.int32)


@gluon.jit
def _after(matrix, tile, tiles):
    """The tile that a program takes after this one, as many further as there are programs."""
    matrix += gl.num_programs(0) // tiles
    tile += gl.num_programs(0) % tiles
    beyond = tile >= tiles
    return gl.where(beyond, matrix + 1, matrix), gl.where(beyond, tile - tiles, tile)


@gluon.jit
def _load(
    a, b, c, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free,
    depth, tiles, total,
    HAS_C: gl.constexpr, B_TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """The loader: everything that the consumers of this program multiply, in their order."""
    SQUARES: gl.constexpr = BLOCK_N // BLOCK_M
    steps = gl.cdiv(depth, BLOCK_K)
    c_step = gl.minimum(STAGES, steps) - 1  # later the loads of a tile would wait for the last one
    count = 0  # of steps
    turn = 0  # of tiles
    matrix, tile = gl.program_id(0) // tiles, gl.program_id(0) % tiles
    i0, j0 = _first_entry(first_entries, tile)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        # The next tile's place is read while this one is loaded, so that no load waits for it.
        next_matrix, next_tile = _after(matrix, tile, tiles)
        next_i0, next_j0 = _first_entry(first_entries, next_tile)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, a.block_type.nbytes + b.block_type.nbytes)
            k = step * BLOCK_K
            load_block(a, [matrix, i0, k], arrived, a_ring.index(stage))
            if B_TRANSPOSED:
                load_block(b, [matrix, j0, k], arrived, b_ring.index(stage))
            else:
                load_block(b, [matrix, k, j0], arrived, b_ring.index(stage))
            if HAS_C:
                if step == c_step:
                    consumer = turn % CONSUMERS
                    mbarrier.wait(c_free.index(consumer), ((turn // CONSUMERS) & 1) ^ 1)
                    c_arrived = c_full.index(consumer)
                    mbarrier.expect(c_arrived, SQUARES * c.block_type.nbytes)
                    for s in gl.static_range(SQUARES):
                        square = squares.index(consumer * SQUARES + s)
                        load_block(c, [matrix, i0, j0 + s * BLOCK_M], c_arrived, square)
            count += 1
        turn += 1
        matrix, tile, i0, j0 = next_matrix, next_tile, next_i0, next_j0


@gluon.jit
def _multiply(acc, a_ring, b_ring, full, count, B_TRANSPOSED: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of step number ``count``, once it has arrived."""
    stage = count % STAGES
    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
    left, right = a_ring.index(stage), b_ring.index(stage)
    left = left.reshape((left.shape[1], left.shape[2]))
    right = right.reshape((right.shape[1], right.shape[2]))
    if B_TRANSPOSED:
        right = right.permute((1, 0))
    return warpgroup_mma(left, right, acc, is_async=True)


@gluon.jit
def _consume(
    out, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free, in_turn,
    alpha, beta, depth, tiles, total,
    SYMMETRIC: gl.constexpr, HAS_C: gl.constexpr, B_TRANSPOSED: gl.constexpr, MIRROR: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, WARPS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Consumer number CONSUMER: every CONSUMERS-th tile of this program."""
    SQUARES: gl.constexpr = BLOCK_N // BLOCK_M
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    steps = gl.cdiv(depth, BLOCK_K)
    count = CONSUMER * steps
    turn = 0
    for program in range(
        gl.program_id(0) + CONSUMER * gl.num_programs(0), total, CONSUMERS * gl.num_programs(0)
    ):
        matrix = program // tiles
        i0, j0 = _first_entry(first_entries, program % tiles)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        if CONSUMERS > 1:  # a barrier knows its last phase alone, so no consumer may run ahead
            mbarrier.wait(in_turn.index(CONSUMER), (turn & 1) ^ (CONSUMER == 0))
        acc = _multiply(acc, a_ring, b_ring, full, count, B_TRANSPOSED, STAGES)
        tma.store_wait(0)  # of the tile before, under the first product of this one
        if HAS_C:
            mbarrier.arrive(c_free.index(CONSUMER), count=1, pred=turn > 0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        for _ in range(1, steps):
            acc = _multiply(acc, a_ring, b_ring, full, count + 1, B_TRANSPOSED, STAGES)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(count % STAGES), count=1)
            count += 1
        if CONSUMERS > 1:
            mbarrier.arrive(in_turn.index((CONSUMER + 1) % CONSUMERS), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(count % STAGES), count=1)
        count += 1 + (CONSUMERS - 1) * steps  # and what the others multiply

        if HAS_C:
            mbarrier.wait(c_full.index(CONSUMER), turn & 1)
        first = squares.index(CONSUMER * SQUARES)
        if SQUARES == 1:
            block = end_of_square(
                acc, out, first, alpha, beta, matrix, i0, j0, SYMMETRIC, HAS_C, MIRROR, BLOCK_M
            )
            if SYMMETRIC:
                tma.store_wait(0)
                store_mirrored(block, out, first, matrix, i0, j0, BLOCK_M)
        else:  # two squares, whose entries belong to the same threads
            second = squares.index(CONSUMER * SQUARES + 1)
            j1 = j0 + BLOCK_M
            left, right = gl.split(gl.permute(gl.reshape(acc, (BLOCK_M, 2, BLOCK_M)), (0, 2, 1)))
            left = end_of_square(
                left, out, first, alpha, beta, matrix, i0, j0, SYMMETRIC, HAS_C, MIRROR, BLOCK_M
            )
            right = end_of_square(
                right, out, second, alpha, beta, matrix, i0, j1, SYMMETRIC, HAS_C, MIRROR, BLOCK_M
            )
            if SYMMETRIC:
                tma.store_wait(1)
                store_mirrored(left, out, first, matrix, i0, j0, BLOCK_M)
                tma.store_wait(1)
                store_mirrored(right, out, second, matrix, i0, j1, BLOCK_M)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "total"])
def warp_specialized_kernel(
    a,  # descriptor of [n, rows, depth]
    b,  # of [n, depth, cols], or of [n, cols, depth] when B_TRANSPOSED
    c,  # of [n, rows, cols], not read without HAS_C
    out,  # of the same, contiguous
    first_entries,  # [tiles, 2]: row and column of the first entry of each tile, in their order
    alpha,
    beta,
    depth,
    tiles,  # of one matrix
    total,  # of all
    SYMMETRIC: gl.constexpr,
    HAS_C: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    MIRROR: gl.constexpr,  # see `product_ends.end_of_tile`
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WARPS: gl.constexpr,  # of a consumer
):
    dtype: gl.constexpr = a.dtype
    SQUARES: gl.constexpr = CONSUMERS * (BLOCK_N // BLOCK_M)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES] + a.block_type.shape, a.layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES] + b.block_type.shape, b.layout)
    squares = gl.allocate_shared_memory(dtype, [SQUARES] + out.block_type.shape, out.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    c_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    c_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    in_turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(empty.index(k), count=1)
    for k in gl.static_range(CONSUMERS):
        mbarrier.init(c_full.index(k), count=1)
        mbarrier.init(c_free.index(k), count=1)
        mbarrier.init(in_turn.index(k), count=1)
    fence_async_shared()

    # The arguments stand here each time: what is constant would not be in a variable.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (
                out, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free, in_turn,
                alpha, beta, depth, tiles, total, SYMMETRIC, HAS_C, B_TRANSPOSED, MIRROR,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, CONSUMERS, WARPS, 0,
            )),
            (_load, (
                a, b, c, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free,
                depth, tiles, total, HAS_C, B_TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
                STAGES, CONSUMERS,
            )),
        ], [1], [40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                out, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free, in_turn,
                alpha, beta, depth, tiles, total, SYMMETRIC, HAS_C, B_TRANSPOSED, MIRROR,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, CONSUMERS, WARPS, 0,
            )),
            (_consume, (
                out, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free, in_turn,
                alpha, beta, depth, tiles, total, SYMMETRIC, HAS_C, B_TRANSPOSED, MIRROR,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, CONSUMERS, WARPS, 1,
            )),
            (_load, (
                a, b, c, first_entries, a_ring, b_ring, squares, full, empty, c_full, c_free,
                depth, tiles, total, HAS_C, B_TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
                STAGES, CONSUMERS,
            )),
        ], [WARPS, 1], [208, 40])  # fmt: skip
