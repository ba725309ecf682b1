"""rounding.py in Triton, with the same bits.

That holds in Triton's interpreter too, although its casts of subnormal bfloat16 numbers lose bits.
"""

from __future__ import annotations

from .launch import jit, tl


@jit
def joined_with(old, rest, MANTISSA: tl.constexpr):
    if MANTISSA:
        bits = old.to(tl.int16, bitcast=True).to(tl.int32) << 16
        low = rest.to(tl.int32)
        low = tl.where((bits & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
        master = (bits + low).to(tl.float32, bitcast=True)
    else:
        master = rest
    return master


@jit
def parted(master, P: tl.constexpr, MANTISSA: tl.constexpr):
    if MANTISSA:
        bits = tl.where(master == master, master, float("nan")).to(tl.int32, bitcast=True)
        high = (bits + 0x8000) & -0x10000
        param = _high_half(high, P)
        rest = (bits - high).to(tl.int16)
    else:
        param = master.to(P)
        rest = master
    return param, rest


@jit
def rounded_by_chance(master, P: tl.constexpr, salt, index, step):
    """``salt``, ``index`` and ``step`` are unsigned."""
    noise = mixed(mixed(index + salt) + mixed(salt ^ mixed(step))) >> 16
    bits = tl.where(master == master, master, float("nan")).to(tl.int32, bitcast=True)
    return _high_half(bits + noise.to(tl.int32), P)


@jit
def mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@jit
def _high_half(bits, P: tl.constexpr):
    return (bits >> 16).to(tl.int16).to(P, bitcast=True)
