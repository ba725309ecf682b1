"""The end of a tile by tensor descriptors: c is loaded, and both stores leave, through TMA.

Registers hold no addresses then, and the copies run while the next tile's product does.
"""

from __future__ import annotations

from .launch import jit, tl


@jit
def _end_of_block(
    acc, c, out, alpha, beta, matrix, i0, j0, n,
    SYMMETRIC: tl.constexpr, HAS_C: tl.constexpr, MIRROR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Finishes a block of the result and stores it; if symmetric, its mirror image too.

    A store to matrix ``n``, which is beyond the last one, is dropped. So there are no branches: see
    `product_kernels._store_mirrored`.
    """
    acc = acc * alpha
    if HAS_C:
        acc += beta * tl.reshape(c.load([matrix, i0, j0]), (ROWS, COLS)).to(tl.float32)
    block = acc.to(out.dtype)
    if SYMMETRIC:
        mirrored = tl.trans(block)
        if MIRROR:
            i = i0 + tl.arange(0, ROWS)
            j = j0 + tl.arange(0, COLS)
            block = tl.where(i[:, None] >= j[None, :], block, mirrored)
        out.store([tl.where(i0 >= j0, matrix, n), i0, j0], tl.reshape(block, (1, ROWS, COLS)))
        out.store([tl.where(i0 > j0, matrix, n), j0, i0], tl.reshape(mirrored, (1, COLS, ROWS)))
    else:
        out.store([matrix, i0, j0], tl.reshape(block, (1, ROWS, COLS)))


@jit
def end_of_tile(
    acc, c, out, alpha, beta, matrix, i0, j0, n,
    SYMMETRIC: tl.constexpr, HAS_C: tl.constexpr, MIRROR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the result; ``c`` and ``out`` are descriptors of all matrices.

    ``MIRROR``: on the diagonal, the upper half is a copy of the lower one. Where a product is x x^T
    both are equal anyway.
    """
    if BLOCK_N == 2 * BLOCK_M:  # two squares, whose entries belong to the same threads
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_M)), (0, 2, 1)))
        _end_of_block(
            left, c, out, alpha, beta, matrix, i0, j0, n,
            SYMMETRIC, HAS_C, MIRROR, BLOCK_M, BLOCK_M,
        )  # fmt: skip
        _end_of_block(
            right, c, out, alpha, beta, matrix, i0, j0 + BLOCK_M, n,
            SYMMETRIC, HAS_C, MIRROR, BLOCK_M, BLOCK_M,
        )  # fmt: skip
    else:
        _end_of_block(
            acc, c, out, alpha, beta, matrix, i0, j0, n,
            SYMMETRIC, HAS_C, MIRROR, BLOCK_M, BLOCK_N,
        )  # fmt: skip
