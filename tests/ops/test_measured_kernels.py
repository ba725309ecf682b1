"""The passes that measure norms: the bits of those that do not, and norms as in float64.

On a CUDA device or in Triton's interpreter by kernels, as test_list_kernels.py; elsewhere the
operators run their twins.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normuon_fn.ops import codes, lists, reference
from tests.ops.test_list_kernels import (
    DEVICE,
    DTYPES,
    KINDS,
    as_codes,
    flag,
    rests,
    scalar,
    tensors,
    turns,
)

OPS = torch.ops.normuon_fn


def norms(tensors_: list[Tensor]) -> Tensor:
    """[n], by another path: every matrix on its own, in float64."""
    matrices = [m for x in tensors_ for m in (x if x.ndim == 3 else x.unsqueeze(0))]
    return torch.stack([torch.linalg.vector_norm(m.double()) for m in matrices])


def both(name: str, writes: int, *arguments: Any) -> Tensor:
    """What the measured operator measures. It writes what the other one does, also in place."""
    plain = getattr(OPS, name)(*arguments)
    *found, measured = getattr(OPS, f"{name}_measured")(*arguments)
    expected = [plain] if isinstance(plain[0], Tensor) else list(plain)
    for a, b in zip(found[:writes], expected, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    copies = [[torch.empty_like(x).copy_(x) for x in given] for given in arguments[:writes]]
    again = getattr(OPS, f"{name}_measured_")(*copies, *arguments[writes:])
    for a, b in zip(copies, expected, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(again, measured, rtol=1e-6, atol=0, equal_nan=True)
    return measured


def near(found: Tensor, expected: Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_advance_measures_gradients_and_new_momentums(kind: str) -> None:
    dtype = DTYPES[list(KINDS).index(kind) % 2]
    momentums, grads = tensors(kind, torch.float32, 0), tensors(kind, dtype, 1)
    sizes = [1, len(grads) - 1]
    forms = (("ema", False, None), ("sum", True, False), ("ema", True, True))
    for form, nesterov, keep in turns(kind, forms):
        given = (momentums, grads, scalar(0.9), flag(keep), sizes, form, nesterov)
        found = both("advance", 1, *given)
        new, measures = OPS.advance(*given)
        assert torch.equal(found[:3], measures)
        near(found[3], norms(grads))
        near(found[4], norms(new))


@pytest.mark.parametrize("kind", KINDS)
def test_advance_measures_what_codes_stand_for(kind: str) -> None:
    lie, grads = KINDS[kind][2], tensors(kind, torch.bfloat16, 1)
    of_codes, scales = as_codes(tensors(kind, torch.float32, 0), lie)
    sizes = [1, len(grads) - 1]
    for keep in turns(kind, (None, False, True)):
        given = (of_codes, scales, grads, scalar(0.9), flag(keep), sizes, "ema", True)
        found = both("advance_coded", 2, *given)
        new, of_new, measures = OPS.advance_coded(*given)
        assert torch.equal(found[:3], measures)
        near(found[3], norms(grads))
        near(found[4], norms([codes.restored(*each) for each in zip(new, of_new, strict=True)]))


@pytest.mark.parametrize("master", [None, torch.int16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["ragged", "views", "stacks", "column"])
def test_apply_measures_old_parameters_and_updates_of_skipped_steps_too(
    kind: str, master: torch.dtype | None
) -> None:
    rows, cols, _ = KINDS[kind]
    params = tensors(kind, torch.bfloat16 if master else torch.float32, 0)
    n = sum(map(lists.count, params))
    generator = torch.Generator().manual_seed(2)
    update = torch.randn(n, rows, cols, generator=generator).to(DEVICE, torch.float16)
    for by_row, skip in turns(kind, ((True, None), (False, False), (True, True))):
        factor = torch.rand(n, *((rows, 1) if by_row else (1, cols)), generator=generator)
        factor = factor.to(DEVICE)
        how = (update, factor, scalar(0.01), flag(skip), False)
        if master is None:
            found, wide = both("apply", 1, params, *how), params
        else:
            lacked = rests(params, master, 1)
            found = both("apply_wide", 2, params, lacked, *how)
            pairs = zip(params, lacked, strict=True)
            wide = [reference.joined_with(p, rest) for p, rest in pairs]
        near(found[0], norms(wide))
        near(found[1], norms([update.float() * factor]))


@pytest.mark.parametrize(
    ("skip", "master"), [(True, None), (False, torch.int16), (None, torch.float32)], ids=str
)
def test_adamw_measures_all_four_of_skipped_steps_too(
    skip: bool | None, master: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    shapes = ((5,), (70, 133), (20000,), ())  # (20000,): more than one chunk

    def make(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]

    params, first, grads = make(torch.bfloat16 if master else torch.float32), make(), make()
    second = [x.square() for x in make()]
    rates = [scalar(x) for x in (0.9, 0.95, 1e-8, 0.1, 0.05)]
    how = (first, second, grads, scalar(0.02), scalar(0.01), *rates, flag(skip))
    if master is None:
        found, wide = both("adamw", 3, params, *how), params
    else:
        lacked = rests(params, master, 1)
        found = both("adamw_wide", 4, params, lacked, *how)
        wide = [reference.joined_with(p, rest) for p, rest in zip(params, lacked, strict=True)]
    new = [(x * 0.9 + g * (1 - 0.9)).double() for x, g in zip(first, grads, strict=True)]
    seconds = [
        x.double() * 0.95 + g.double() ** 2 * 0.05 for x, g in zip(second, grads, strict=True)
    ]
    pairs = zip(new, seconds, strict=True)
    updates = [0.02 * (x / 0.1) / ((s / 0.05).sqrt() + 1e-8) for x, s in pairs]
    for row, expected in zip(found, (grads, new, wide, updates), strict=True):
        near(row, torch.stack([torch.linalg.vector_norm(x.double()) for x in expected]), 1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_norms_of_what_is_not_finite_or_huge_say_so() -> None:
    for value, finite in ((float("nan"), False), (float("inf"), False), (1e30, True)):
        params = [torch.ones(4, 6, device=DEVICE), torch.ones(4, 6, device=DEVICE)]
        params[1][2, 3] = value
        update, one = torch.ones(2, 4, 6, device=DEVICE), torch.ones(2, 4, 1, device=DEVICE)
        skip = flag(True)
        found = both("apply", 0, params, update, one, scalar(0.0), skip, False)[0]
        assert found.isfinite().tolist() == [True, finite]
