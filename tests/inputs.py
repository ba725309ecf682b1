"""Matrices for the tests: Gaussian, exact small integers, given spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle

METHODS = ["standard", "gram"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_WAY = pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(m, d, id=f"{m}-{str(d).removeprefix('torch.')}")
        for m in METHODS
        for d in DTYPES
    ],
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_integers(*shape: int, seed: int = 0) -> Tensor:
    """Entries 0 and ±1..±8: any power of two that keeps ±1 and ±8 normal is exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def with_spectrum(sigma: Tensor, cols: int, seed: int = 0) -> Tensor:
    u = torch.linalg.qr(gaussian(len(sigma), len(sigma), seed=seed).double()).Q
    v = torch.linalg.qr(gaussian(cols, len(sigma), seed=seed + 1).double()).Q
    return (u * sigma.double()) @ v.mT


def times_power_of_two(x: Tensor, k: int) -> Tensor:
    return torch.ldexp(x.double(), torch.tensor(k, device=x.device)).to(x.dtype)


def exact(x: Tensor, rows: list[oracle.Row], norm_factor: float = 1.0, aol: bool = False) -> Tensor:
    """The oracle's Newton-Schulz of each matrix of a stack, on exactly the values that x holds."""
    flat = x.double().reshape(-1, *x.shape[-2:]).numpy()
    out = np.stack([oracle.newton_schulz(matrix, rows, norm_factor, aol) for matrix in flat])
    return torch.from_numpy(out).reshape(x.shape)


def exact_set(x: Tensor, name: str, steps: int, safety_factor: float) -> Tensor:
    rows = oracle.schedule(name, steps, safety_factor)
    return exact(x, rows, oracle.NORM_FACTOR.get(name, 1.0), aol=name == "aol")


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    assert got.shape == want.shape
    return (got.double() - want).norm(dim=-1) / want.norm(dim=-1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
