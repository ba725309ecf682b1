"""What ranks send each other is packed without a bit changed: `ops.repack` against a loop over
bytes.

The kernel runs on a CUDA device, or in Triton's interpreter (see test_interpreted.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normuon_fn import ops
from normuon_fn.ops.repack import Boxes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Case = tuple[int, int, int]  # matrices, rows, columns of a part
CASES = {  # the whole matrix, and where in it the part lies
    "rows of even matrices": ((3, 8, 16), (2, 4, 0, 16)),
    "columns of even matrices": ((3, 8, 16), (0, 8, 4, 8)),
    "a corner of odd matrices": ((2, 7, 9), (3, 4, 2, 5)),
    "one matrix": ((1, 5, 6), (0, 5, 0, 6)),
    "nothing": ((2, 5, 6), (5, 0, 0, 6)),
    "more than a tile": ((2, 70, 300), (1, 69, 100, 200)),
    "rows longer than a tile": ((1, 2, 40000), (0, 2, 8, 39992)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def whole(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: NaNs of every payload among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    words = torch.randint(
        0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return words.view(dtype).view(shape).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_part_of_matrices_goes_into_a_message_and_out_of_it_again(
    case: str, dtype: torch.dtype
) -> None:
    (n, rows, cols), (row, high, col, wide) = CASES[case]
    x, size = whole((n, rows, cols), dtype, 0), dtype.itemsize
    part = x[:, row : row + high, col : col + wide]
    at, length, first = (
        (row * cols + col) * size,
        wide * size,
        8,
    )  # behind 8 bytes of something else
    in_matrix, in_part = (rows * cols * size, cols * size), (high * length, length)
    total = -(-(first + n * high * length) // 8) * 8

    pack = Boxes()
    pack.row(1, 0, 0, 0, 8)
    pack.add(0, 0, at, first, (n, high, length), in_matrix, in_part)
    head = whole((1, 1, 8 // size), dtype, 1)
    (words,) = ops.repack([x, head], pack.moves(DEVICE, [total // 4], torch.int32))
    assert torch.equal(bits(words)[:8], bits(head))
    assert torch.equal(bits(words)[8 : 8 + n * high * length], bits(part))

    unpack = Boxes()
    unpack.add(0, 1, first, at, (n, high, length), in_part, in_matrix)
    unpack.row(0, 0, 0, 0, 8)
    sizes = [8 // size, n * rows * cols]
    front, found = ops.repack([words], unpack.moves(DEVICE, sizes, dtype))
    assert torch.equal(bits(front), bits(head))
    assert torch.equal(bits(found.view(x.shape)[:, row : row + high, col : col + wide]), bits(part))


def test_results_of_two_dtypes_come_in_order() -> None:
    x = whole((1, 4, 4), torch.bfloat16, 2)
    boxes = Boxes()
    boxes.row(0, 1, 0, 0, 16)
    boxes.row(0, 0, 16, 0, 16)
    narrow, wide = ops.repack([x], boxes.moves(DEVICE, [8], torch.bfloat16, [4], torch.float32))
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(bits(wide), bits(x)[:16]) and torch.equal(bits(narrow), bits(x)[16:])


def test_a_source_that_lies_at_an_odd_place_is_read_where_it_lies() -> None:
    x = whole((1, 1, 33), torch.bfloat16, 3).view(-1)[
        1:
    ]  # 8 bytes a unit, and 2 bytes from a multiple of them
    boxes = Boxes()
    boxes.row(0, 0, 0, 0, 64)
    assert boxes.moves(DEVICE, [16], torch.int32).parts[2] == 8
    (words,) = ops.repack([x], boxes.moves(DEVICE, [16], torch.int32))
    assert torch.equal(bits(words), bits(x))
