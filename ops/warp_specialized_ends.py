"""The end of a tile of the warp-specialized kernel: c is added, and the result leaves by TMA.

What product_ends.py is to the other kernel. Nothing waits here for a store to arrive: whoever
writes to a square's buffer again waits until it was read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Since Triton 3.8 it has a shorter name, and since 3.9 that alone.
store_block = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def end_of_square(
    acc, out, square, alpha, beta, matrix, i0, j0,
    SYMMETRIC: gl.constexpr, HAS_C: gl.constexpr, MIRROR: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Finishes a square of the result and stores it. Returns what its mirror image is made of.

    ``square``: its buffer, in which c is, where there is one.
    """
    layout: gl.constexpr = acc.type.layout
    flat = square.reshape((BLOCK, BLOCK))
    acc = acc * alpha
    if HAS_C:
        acc += beta * flat.load(layout).to(gl.float32)
    block = acc.to(out.dtype)
    if SYMMETRIC:
        if MIRROR:
            if i0 == j0:
                flat.permute((1, 0)).store(block)
                mirrored = flat.load(layout)
                i = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
                j = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
                block = gl.where(gl.expand_dims(i, 1) >= gl.expand_dims(j, 0), block, mirrored)
        if i0 >= j0:
            flat.store(block)
            fence_async_shared()
            store_block(out, [matrix, i0, j0], square)
    else:
        flat.store(block)
        fence_async_shared()
        store_block(out, [matrix, i0, j0], square)
    return block


@gluon.jit
def store_mirrored(block, out, square, matrix, i0, j0, BLOCK: gl.constexpr):
    """Stores a square's mirror image, if it is not on the diagonal."""
    if i0 > j0:
        square.reshape((BLOCK, BLOCK)).permute((1, 0)).store(block)
        fence_async_shared()
        store_block(out, [matrix, j0, i0], square)
