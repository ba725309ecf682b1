"""The Triton code of the products: ``out = beta c + alpha a b`` over stacks of matrices, in tiles.

Two kernels load the operands: `pointer_kernel` from any strides, `descriptor_kernel` by tensor
descriptors (TMA), with one program per tile or with programs that go from tile to tile. They share
the order of the tiles and the stores.

Where the result is symmetric, only the tiles that meet its lower triangle are computed, and each is
stored twice: as it is, and mirrored. Both triangles therefore agree bit for bit.
"""

from __future__ import annotations

from .launch import jit, tl
from .product_ends import end_of_tile


@jit
def _triangle(index):
    """Row and column of entry ``index`` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # float32 may be off by one
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@jit
def _first_entry(
    tile, rows, cols,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row and column of the first entry of tile number ``tile`` of a matrix.

    Tiles are counted GROUP tile rows at a time, column by column, so that they share L2. If
    symmetric, the lower triangle consists of squares of BLOCK_N, each of BLOCK_N / BLOCK_M tiles;
    one tile row may be left over.
    """
    tile_rows = tl.cdiv(rows, BLOCK_M)
    if SYMMETRIC:
        PER_SQUARE: tl.constexpr = BLOCK_N // BLOCK_M
        squares = tile_rows // PER_SQUARE
        whole = PER_SQUARE * (squares * (squares + 1) // 2)
        square_row, square_col = _triangle(tile // PER_SQUARE)
        start = square_row // GROUP * GROUP
        offset = tile // PER_SQUARE - start * (start + 1) // 2
        height = tl.maximum(tl.minimum(squares - start, GROUP), 1)
        # A group is a rectangle and then its own triangle. There are no branches, because Triton
        # cannot fuse loops around them.
        in_rectangle = offset < start * height
        row_below, col_beyond = _triangle(tl.maximum(offset - start * height, 0))
        square_row = start + tl.where(in_rectangle, offset % height, row_below)
        square_col = tl.where(in_rectangle, offset // height, start + col_beyond)
        row = tl.where(tile < whole, square_row * PER_SQUARE + tile % PER_SQUARE, tile_rows - 1)
        col = tl.where(tile < whole, square_col, tile - whole)
    else:
        tile_cols = tl.cdiv(cols, BLOCK_N)
        start = tile // (GROUP * tile_cols) * GROUP
        height = tl.minimum(tile_rows - start, GROUP)
        offset = tile - start * tile_cols
        row = start + offset % height
        col = offset // height
    return row * BLOCK_M, col * BLOCK_N


@jit
def _combine(acc, c, inside, alpha, beta, dtype: tl.constexpr, HAS_C: tl.constexpr):
    acc = acc * alpha
    if HAS_C:
        acc += beta * tl.load(c, mask=inside, other=0.0).to(tl.float32)
    return acc.to(dtype)


@jit
def _store_mirrored(
    acc, c, out, alpha, beta, i0, j0, rows, c_row, c_col,
    HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a square block of a symmetric result and its mirror image.

    On the diagonal, that is the lower half of the block, and the same mirrored. No store is masked
    by ``i >= j``: such a mask would split it into stores of single entries. There are no branches,
    as in `_first_entry`; they cost registers too (182 instead of 126 per thread in tiles of
    128 x 128: one block per SM instead of two).
    """
    i = i0 + tl.arange(0, BLOCK)
    j = j0 + tl.arange(0, BLOCK)
    wide_i = i.to(tl.int64)
    wide_j = j.to(tl.int64)
    inside = (i < tl.where(i0 >= j0, rows, 0))[:, None] & (j < rows)[None, :]
    c_block = c + wide_i[:, None] * c_row + wide_j[None, :] * c_col
    block = _combine(acc, c_block, inside, alpha, beta, out.dtype.element_ty, HAS_C)
    mirrored = tl.trans(block)
    tl.store(
        out + wide_i[:, None] * rows + j[None, :],
        tl.where(i[:, None] >= j[None, :], block, mirrored),
        mask=inside,
    )
    beside = (j < tl.where(i0 > j0, rows, 0))[:, None] & (i < rows)[None, :]
    tl.store(out + wide_j[:, None] * rows + i[None, :], mirrored, mask=beside)


@jit
def _store(
    acc, c, out, alpha, beta, i0, j0, rows, cols, c_row, c_col,
    SYMMETRIC: tl.constexpr, HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the result; ``c`` and ``out`` point to its matrix."""
    if SYMMETRIC:
        if BLOCK_M == BLOCK_N:
            _store_mirrored(acc, c, out, alpha, beta, i0, j0, rows, c_row, c_col, HAS_C, BLOCK_M)
        else:  # BLOCK_N == 2 * BLOCK_M: two squares, whose entries belong to the same threads
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_M)), (0, 2, 1)))
            _store_mirrored(left, c, out, alpha, beta, i0, j0, rows, c_row, c_col, HAS_C, BLOCK_M)
            _store_mirrored(
                right, c, out, alpha, beta, i0, j0 + BLOCK_M, rows, c_row, c_col, HAS_C, BLOCK_M
            )
    else:
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        wide_i = i.to(tl.int64)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        c_tile = c + wide_i[:, None] * c_row + j.to(tl.int64)[None, :] * c_col
        block = _combine(acc, c_tile, inside, alpha, beta, out.dtype.element_ty, HAS_C)
        tl.store(out + wide_i[:, None] * cols + j[None, :], block, mask=inside)


@jit(do_not_specialize=["tiles"])
def pointer_kernel(
    a,  # [n, rows, depth]
    b,  # [n, depth, cols]
    c,  # [n, rows, cols], not read without HAS_C
    out,  # [n, rows, cols], contiguous
    alpha,
    beta,
    rows,
    cols,
    depth,
    tiles,  # of one matrix
    a_matrix,  # strides
    a_row,
    a_depth,
    b_matrix,
    b_depth,
    b_col,
    c_matrix,
    c_row,
    c_col,
    SYMMETRIC: tl.constexpr,
    HAS_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's tl.dot multiplies the bit patterns of bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)  # a stack may hold more than 2^31 entries
    i0, j0 = _first_entry(program % tiles, rows, cols, SYMMETRIC, BLOCK_M, BLOCK_N, GROUP)

    # Rows and columns beyond the end wrap round: their results are not stored, and their loads need
    # no mask.
    i = ((i0 + tl.arange(0, BLOCK_M)) % rows).to(tl.int64)
    j = ((j0 + tl.arange(0, BLOCK_N)) % cols).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + matrix * a_matrix + i[:, None] * a_row + k.to(tl.int64)[None, :] * a_depth
    b_tile = b + matrix * b_matrix + k.to(tl.int64)[:, None] * b_depth + j[None, :] * b_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        if EVEN_K:
            left = tl.load(a_tile)
            right = tl.load(b_tile)
        else:  # 0 on both sides, so that no NaN comes from beyond the end
            left = tl.load(a_tile, mask=(k < depth - k0)[None, :], other=0.0)
            right = tl.load(b_tile, mask=(k < depth - k0)[:, None], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc)
        a_tile += BLOCK_K * a_depth
        b_tile += BLOCK_K * b_depth

    c += matrix * c_matrix
    out += matrix * rows * cols
    _store(
        acc, c, out, alpha, beta, i0, j0, rows, cols, c_row, c_col,
        SYMMETRIC, HAS_C, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@jit
def _descriptor_tile(
    program, a, b, c, out, alpha, beta, rows, cols, depth, tiles, total, c_matrix, c_row, c_col,
    SYMMETRIC: tl.constexpr, HAS_C: tl.constexpr, B_TRANSPOSED: tl.constexpr, ENDS: tl.constexpr,
    MIRROR: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result, whose operands are loaded by tensor descriptors."""
    matrix = program // tiles
    i0, j0 = _first_entry(program % tiles, rows, cols, SYMMETRIC, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = tl.reshape(a.load([matrix, i0, k]), (BLOCK_M, BLOCK_K))
        if B_TRANSPOSED:
            right = tl.trans(tl.reshape(b.load([matrix, j0, k]), (BLOCK_N, BLOCK_K)))
        else:
            right = tl.reshape(b.load([matrix, k, j0]), (BLOCK_K, BLOCK_N))
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    if ENDS:
        end_of_tile(
            acc, c, out, alpha, beta, matrix, i0, j0, total // tiles,
            SYMMETRIC, HAS_C, MIRROR, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        wide = matrix.to(tl.int64)
        c += wide * c_matrix
        out += wide * rows * cols
        _store(
            acc, c, out, alpha, beta, i0, j0, rows, cols, c_row, c_col,
            SYMMETRIC, HAS_C, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@jit(do_not_specialize=["tiles", "total"])
def descriptor_kernel(
    a,  # descriptor of [n, rows, depth]
    b,  # of [n, depth, cols], or of [n, cols, depth] when B_TRANSPOSED
    c,  # [n, rows, cols], not read without HAS_C: with ENDS a descriptor, otherwise a pointer
    out,  # [n, rows, cols], contiguous: the same
    alpha,
    beta,
    rows,
    cols,
    depth,
    tiles,  # of one matrix
    total,  # of all
    c_matrix,
    c_row,
    c_col,
    SYMMETRIC: tl.constexpr,
    HAS_C: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ENDS: tl.constexpr,
    MIRROR: tl.constexpr,  # with ENDS: see `end_of_tile`
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    if PERSISTENT:
        for program in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
            _descriptor_tile(
                program, a, b, c, out, alpha, beta, rows, cols, depth, tiles, total,
                c_matrix, c_row, c_col, SYMMETRIC, HAS_C, B_TRANSPOSED, ENDS, MIRROR, UPCAST,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        _descriptor_tile(
            tl.program_id(0), a, b, c, out, alpha, beta, rows, cols, depth, tiles, total,
            c_matrix, c_row, c_col, SYMMETRIC, HAS_C, B_TRANSPOSED, ENDS, MIRROR, UPCAST,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip
