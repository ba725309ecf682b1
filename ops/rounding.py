"""How bfloat16 parameters keep updates that are smaller than their last bit.

Either a float32 master is kept as the parameter and a *rest*, or the parameter is rounded by
chance. There are two kinds of rests:

    int16 (mantissa)   The master's bits are the parameter's bits, as float32, plus the rest. The
                       parameter is the master rounded to nearest (ties away from zero), so the rest
                       is a signed correction, and the sum is exact.
    float32 (master)   The rest is the master itself, and the parameter is its rounding (ties to
                       even).

Special values: every NaN becomes the same NaN with rest 0, because others could round to the bits
of inf or zero. A parameter that rounds to inf keeps its finite master. Zeros keep their signs. A
parameter that was set to zero by hand stays next to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reinterpret import reinterpret

_HIGH = -0x10000  # those bits of a float32 that a bfloat16 has
_WORD = 0xFFFFFFFF


def joined_with(
    param: Tensor,  # bfloat16; with a float32 rest, of any floating dtype
    rest: Tensor,  # int16 or float32, in the shape of the parameter
) -> Tensor:
    """The float32 master."""
    if rest.dtype == torch.float32:
        return rest
    bits, low = reinterpret(param.float(), torch.int32), rest.to(torch.int32)
    # No master rounds to zero with a negative rest, and the bits below those of zero are NaNs.
    low = torch.where(bits & 0x7FFFFFFF == 0, low.clamp(min=0), low)
    return reinterpret(bits + low, torch.float32)


def parted(
    master: Tensor,  # float32
    dtype: torch.dtype,  # of the parameter
    rest: torch.dtype,  # int16 or float32
) -> tuple[Tensor, Tensor]:
    """``(param, rest)``, from which `joined_with` makes the float32 master."""
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
    """One of the two neighbours of ``master``, chosen so that the mean is ``master``."""
    return reinterpret((_bits(master) + noise) & _HIGH, torch.float32).to(dtype)


def _bits(x: Tensor) -> Tensor:
    return reinterpret(torch.where(x.isnan(), float("nan"), x), torch.int32)


def noise(
    salts: Tensor,  # int64 in [0, 2**31): one per matrix, to be broadcast
    index: Tensor,  # int64: the entry's place in its matrix
    step: Tensor,  # 0-d integer
) -> Tensor:
    """16 random bits (int32) for every entry.

    They depend on salt, place and step alone, and are the same on every device.
    """
    place = _mixed(index + salts & _WORD)
    time = _mixed(salts ^ _mixed(step.to(torch.int64) & _WORD))
    return (_mixed(place + time & _WORD) >> 16).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit hash, in int64; the constants are below 2**31, so that no product overflows.

    Source: skeeto/hash-prospector#19, where a bias of 0.107 is the best known with two rounds.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def places(shape: torch.Size, device: torch.device) -> Tensor:
    """int64 in this shape: the place of every entry in a tensor."""
    return torch.arange(shape.numel(), device=device).view(shape)
