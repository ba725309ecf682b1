"""How bfloat16 parameters keep updates smaller than their last bit: with the rest of a float32 master, or by chance.

A *rest* is what a parameter lacks of its master. int16, the mantissa: the master's bits are those of the parameter, as float32,
plus the rest. The parameter is the master rounded to nearest (ties away from zero), so the rest is a signed correction, and the
sum is exact. float32: the master itself, and the parameter is its rounding (ties to even).

Special values: every NaN becomes the same NaN, with rest 0; others could round to the bits of inf or zero. What rounds to inf
keeps its finite master. Zeros keep their signs. A parameter that was set to zero by hand stays next to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reinterpret import reinterpret

_HIGH, _LOW = -0x10000, 0xFFFF  # of the bits of a float32, those that a bfloat16 has, and the rest
_WORD = 0xFFFFFFFF


def joined_with(param: Tensor, rest: Tensor) -> Tensor:
    """The float32 master."""
    if rest.dtype == torch.float32:
        return rest
    bits, low = reinterpret(param.float(), torch.int32), rest.to(torch.int32)
    # Below zero there are the NaNs: a zero that was rounded to has no negative rest.
    low = torch.where(bits & 0x7FFFFFFF == 0, low.clamp(min=0), low)
    return reinterpret(bits + low, torch.float32)


def parted(master: Tensor, dtype: torch.dtype, rest: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(param, rest)`` of a float32 master."""
    if rest == torch.float32:
        return master.to(dtype), master
    bits = _bits(master)
    high = (bits + 0x8000) & _HIGH
    return reinterpret(high, torch.float32).to(dtype), (bits - high).to(rest)


def rounded_by_chance(
    master: Tensor,  # float32
    dtype: torch.dtype,  # bfloat16
    noise: Tensor,  # int32, 16 random bits: see `noise`
) -> Tensor:
    """One of the two neighbours, so that the mean is ``master``: up with the share of the way there as its probability."""
    return reinterpret((_bits(master) + noise) & _HIGH, torch.float32).to(dtype)


def _bits(x: Tensor) -> Tensor:
    return reinterpret(torch.where(x.isnan(), float("nan"), x), torch.int32)


def noise(
    salts: Tensor,  # int64 in [0, 2**31): one a matrix, to be broadcast
    index: Tensor,  # int64: the entry's place in its matrix
    step: Tensor,  # 0-d integer
) -> Tensor:
    """16 random bits (int32) for every entry: a function of salt, place and step alone, the same on every device."""
    return (
        _mixed(
            _mixed(index + salts & _WORD) + _mixed(salts ^ _mixed(step.to(torch.int64) & _WORD))
            & _WORD
        )
        >> 16
    ).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit hash in int64: the constants are below 2**31, so that no product overflows.

    Constants: skeeto/hash-prospector#19, a bias of 0.107 (the best of two rounds known there).
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def places(shape: torch.Size, device: torch.device) -> Tensor:
    """int64: the place of every entry of a tensor."""
    return torch.arange(shape.numel(), device=device).view(shape)
