"""codes.py in Triton, with the same bits.

A tile [BR, BC] has whole blocks: BC is a multiple of B columns, of which those behind the last one
of the matrix are zeros.
"""

from __future__ import annotations

from .launch import jit, tl


@jit
def quantized(x, BR: tl.constexpr, BC: tl.constexpr, B: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(tl.reshape(bits, [BR, BC // B, B]), 2)
    number = (most >> 23) + ((most & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    number = tl.minimum(tl.maximum(number, 1), 254)
    number = tl.where(most == 0, 0, number)
    number = tl.where(most >= 0x7F800000, 255, number)
    power = ((255 - tl.maximum(number, 1)) << 23).to(tl.float32, bitcast=True)
    codes = (tl.reshape(x, [BR, BC // B, B]) * power[:, :, None]) * 32.0
    codes = tl.where(number[:, :, None] == 255, 0.0, codes)
    codes = (codes + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to the nearest, ties to even
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.reshape(codes.to(tl.int8), [BR, BC]), number.to(tl.uint8)


@jit
def restored(codes, scales, BR: tl.constexpr, BC: tl.constexpr, B: tl.constexpr):
    power = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    parts = tl.reshape(codes.to(tl.float32) * 0.015625, [BR, BC // B, B])
    return tl.reshape(parts * power[:, :, None], [BR, BC])
