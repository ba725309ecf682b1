"""Momentum in one byte an entry: eight-bit codes, and one scale per block of columns of a row.

    entry = code * scale        code: int8 in [-127, 127]; scale: a power of two, stored as uint8

A block is 64 neighbours of one row of a matrix; the last one of a row may be shorter. Its scale is
the smallest power of two by which all of its codes fit. So restoring is exact, quantizing is one
rounding to the nearest, and a momentum times a power of two has the same codes: nothing depends on
the gradient's scale.

The stored number is an exponent as float32 has it: the scale is 2**(number - 133), from 2**-132 to
2**121. Two numbers stand for something else: 0 for a block of zeros, 255 for a block with an entry
that is not finite, all of which is restored as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reinterpret import reinterpret

BLOCK = 64  # columns with one scale
CODE, SCALE = torch.int8, torch.uint8
LARGEST = 127
_FITS = 0x7E0000  # the mantissa of 127 / 64: a larger one would be rounded to 128
_NOT_FINITE = 255


def blocks_of(cols: int) -> int:
    """How many scales a row has."""
    return -(-cols // BLOCK)


def quantized(
    x: Tensor,  # [..., rows, cols] float32
) -> tuple[Tensor, Tensor]:
    """``(codes, scales)``: int8 in the shape of ``x``, and uint8 [..., rows, blocks].

    |restored - x| is at most half of a block's scale; a whole one from 1.984 * 2**127 on, where
    codes stay at 127.
    """
    cols, blocks = x.shape[-1], blocks_of(x.shape[-1])
    whole = pad(x, (0, blocks * BLOCK - cols)).unflatten(-1, (blocks, BLOCK)) if cols else x
    if not x.numel():
        return x.to(CODE), x.new_zeros((*x.shape[:-1], blocks), dtype=SCALE)
    # As integers, absolute floats keep their order, with inf above them and NaN above inf.
    most = (reinterpret(whole, torch.int32) & 0x7FFFFFFF).amax(-1)
    number = (most >> 23) + ((most & 0x7FFFFF) > _FITS).to(torch.int32)
    number = number.clamp(1, _NOT_FINITE - 1)
    number = torch.where(most == 0, 0, number)
    number = torch.where(most >= 0x7F800000, _NOT_FINITE, number)
    power = reinterpret((_NOT_FINITE - number.clamp(min=1)) << 23, torch.float32)
    codes = ((x * _each(power, cols)) * 32.0).round().clamp(-LARGEST, LARGEST)
    codes = torch.where(_each(number, cols) == _NOT_FINITE, 0.0, codes)
    return codes.to(CODE), number.to(SCALE)


def restored(
    codes: Tensor,  # [..., rows, cols] int8
    scales: Tensor,  # [..., rows, blocks] uint8
) -> Tensor:
    """float32 in the shape of the codes."""
    power = reinterpret(scales.to(torch.int32) << 23, torch.float32)
    return (codes.to(torch.float32) * 0.015625) * _each(power, codes.shape[-1])


def _each(numbers: Tensor, cols: int) -> Tensor:
    """[..., rows, cols]: of every entry the number of its block, from [..., rows, blocks].

    By an index that is computed: of a tensor that is expanded by 64 and cut, Inductor's code for
    CPUs leaves out the columns behind the last whole block (torch 2.13.0).
    """
    block = torch.arange(cols, device=numbers.device) // BLOCK
    return numbers[..., block]
