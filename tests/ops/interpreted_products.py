"""The kernels of the products on the CPU, in Triton's interpreter.

It truncates where it casts float32 to bfloat16, and a device rounds to nearest even: nothing here
vouches for how the kernels round to bfloat16.

TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_products.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from normuon_fn.ops import lazy, product_launch
from normuon_fn.ops.launch import INTERPRETED
from normuon_fn.ops.product_configs import CONFIGS, TileConfig
from normuon_fn.ops.product_kernels import descriptor_kernel
from normuon_fn.ops.product_launch import PRODUCT_DTYPES, product
from normuon_fn.ops.products import addmm, symmetric_addmm, symmetric_matmul
from tests.ops import masks

# In tiles of 16: three rows of them, five, of which the last group has two, and less than one.
SHAPES = [(2, 38, 21), (2, 70, 33), (1, 1, 1), (2, 1, 20), (2, 20, 0), (1, 64, 32)]
SMALL = [TileConfig(16, 16, 16, 2, 4, 2), TileConfig(16, 32, 32, 3, 4, 2)]
DESCRIPTORS = [config._replace(variant=v) for config in SMALL for v in ("tma", "persistent")]
ALIGNED = [
    (2, 40, 24),
    (2, 72, 40),
    (1, 64, 32),
    (2, 24, 8),
]  # rows are multiples of 16 bytes: descriptors take them
REAL = sorted(
    {
        config._replace(num_warps=4, num_stages=2)
        for table in CONFIGS.values()
        for config in table.values()
    }
)


def integers(*shape: int, largest: int = 1) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).double()


def close(out: Tensor, exact: Tensor) -> bool:
    """Whether both are equal; in bfloat16 to 1 ulp.

    There the interpreter truncates, and the device rounds to nearest even.
    """
    if out.dtype == torch.bfloat16:
        return bool(((out.double() - exact).abs() <= exact.abs() * 2.0**-7).all())
    return torch.equal(out, exact.to(out.dtype))


def check(
    n: int, rows: int, cols: int, dtype: torch.dtype, config: TileConfig, transposed: bool
) -> None:
    """The three products are exact.

    ``transposed``: all operands are; for a kernel that takes descriptors, only those operands that
    need not have contiguous rows.
    """

    def view(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x.mT.contiguous().mT if transposed else x

    def rows_of(x: Tensor) -> Tensor:
        return x if config.variant == "pointers" else x.contiguous()

    x = view(integers(n, rows, cols))
    c = view(integers(n, rows, cols, largest=4))
    a = rows_of(view(integers(n, rows, rows)))
    wide_a, wide_x, wide_c = a.double(), x.double(), c.double()
    out = product(rows_of(x), rows_of(x).mT, None, 0.5, 0.0, True, config)
    assert close(out, 0.5 * wide_x @ wide_x.mT)
    assert torch.equal(out, out.mT)
    assert close(product(a, x, c, -1.0, 2.0, False, config), 2.0 * wide_c - wide_a @ wide_x)
    # a b is not symmetric here: whole rows of a, whole columns of b and the lower triangle of c
    # decide.
    b = view(integers(n, rows, rows))
    if (
        config.variant != "pointers" and not transposed
    ):  # a descriptor may read the rows of b in place of its columns
        b = (b + b.mT).contiguous()
    lower = (3.0 * b.double() + 0.5 * wide_a @ b.double()).tril()
    out = product(a, b, b, 0.5, 3.0, True, config)
    assert close(out, lower + lower.tril(-1).mT)


def check_gaussian_is_symmetric(config: TileConfig) -> None:
    x = torch.randn(2, 75, 40).half()  # rows of 80 bytes
    out = product(x, x.mT, None, 1.0, 0.0, True, config)
    assert torch.equal(out, out.mT)
    assert (
        (out.double() - x.double() @ x.double().mT).abs() <= 2.0**-10 * out.double().abs() + 1e-4
    ).all()


def check_non_finite(dtype: torch.dtype, config: TileConfig) -> None:
    wide = torch.full((2, 90, 64), torch.nan, dtype=dtype)
    wide[:, 10:80, 8:56] = integers(2, 70, 48, largest=3).to(dtype)
    x = wide[:, 10:80, 8:56]
    assert torch.equal(
        product(x, x.mT, None, 1.0, 0.0, True, config),
        product(x.clone(), x.clone().mT, None, 1.0, 0.0, True, config),
    )
    for bad in (torch.nan, torch.inf):
        y = x.clone()
        y[1, 3, 5] = bad
        out = product(y, y.mT, None, 1.0, 0.0, True, config)
        hit = torch.zeros(2, 70, 70, dtype=torch.bool)
        hit[1, 3] = hit[1, :, 3] = y[1, :, 5] != 0 if bad == torch.inf else True
        # 0 x inf is NaN, finite x inf is inf: the whole row and column
        assert not out[1, 3].isfinite().any() and not out[1, :, 3].isfinite().any()
        hit[1, 3] = hit[1, :, 3] = True
        assert out[~hit].isfinite().all()
        c = torch.zeros_like(y)
        c[0, 2, 4] = bad
        unit = torch.eye(70, 72, dtype=dtype).repeat(2, 1, 1)[:, :, :70]
        out = product(unit, x, c, 1.0, 0.0, False, config)
        assert out[0, 2, 4].isnan() and int((~out.isfinite()).sum()) == 1  # 0 x bad


def check_choice() -> None:
    """Descriptors are taken where the operands fit them, and the pointer kernel elsewhere.

    A caller who asks for descriptors never gets the pointer kernel.
    """

    def variant(a: Tensor, b: Tensor) -> str:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        kernel, *_ = product_launch.prepare(a, b, a, out, 1.0, 1.0, True, None)
        is_one = lazy.loaded(kernel) is lazy.loaded(descriptor_kernel)
        return "descriptors" if is_one else "pointers"

    r = torch.zeros(2, 24, 24, dtype=torch.float16)
    odd = torch.zeros(2 * 24 * 24 + 1, dtype=torch.float16)[1:].view(2, 24, 24)
    wide = torch.zeros(2, 24, 40, dtype=torch.float16)[:, :, 8:32]
    ragged = torch.zeros(2, 25, 25, dtype=torch.float16)
    assert (
        variant(r, r) == variant(r, r.mT) == variant(wide, r) == variant(r, wide) == "descriptors"
    )
    for a, b in (
        (r.mT, r),
        (odd, r),
        (r, odd),
        (ragged, ragged),
        (r[:1].expand_as(r), r),
        (r, r[:1].expand_as(r)),
    ):
        assert variant(a, b) == "pointers"
    with pytest.raises(ValueError, match="descriptor"):
        product(odd, r, r, 1.0, 1.0, True, DESCRIPTORS[0])

    def ends(rows: int, misaligned: bool = False) -> bool:
        """Whether a symmetric result of so many rows is stored by descriptors."""
        x = torch.zeros(1, rows, 16, dtype=torch.float16)
        c = torch.zeros(rows * rows + 1, dtype=torch.float16)[misaligned:][: rows * rows]
        c = c.view(1, rows, rows)
        given = x, x.mT, c, torch.empty_like(c, memory_format=torch.contiguous_format)
        return hasattr(product_launch.prepare(*given, 1.0, 1.0, True, None).pointers[3], "base")

    assert ends(1032) and ends(64) and not (ends(1030) or ends(1032, misaligned=True))
    with pytest.raises(ValueError, match="result"):
        product(*(torch.zeros(1, 20, 24).half(), torch.zeros(1, 24, 20).half(), None), 1.0, 0.0,
                True, DESCRIPTORS[0]._replace(ends=True))  # fmt: skip


def check_operators() -> None:
    """The public functions take the interpreter, traced and under vmap too."""
    x, c = integers(2, 20, 9).half(), integers(2, 20, 9).half()
    r = symmetric_matmul(x, 0.5)
    assert torch.equal(r, (0.5 * x.double() @ x.double().mT).half())
    assert torch.equal(
        symmetric_addmm(r, r, r, 2.0, 0.125),
        (2 * r.double() + 0.125 * r.double() @ r.double()).half(),
    )
    assert torch.equal(addmm(c, r, x, 2.0), (2 * c.double() + r.double() @ x.double()).half())
    assert torch.equal(torch.vmap(symmetric_matmul)(x[:, None])[:, 0], symmetric_matmul(x))
    compiled = torch.compile(
        lambda x: symmetric_matmul(x, 0.5), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), r)
    for name, given in (
        ("symmetric_matmul", (x, 0.5)),
        ("symmetric_addmm", (r, r, r, 2.0, 1.0)),
        ("addmm", (c, r, x, 2.0)),
    ):
        outcome = torch.library.opcheck(getattr(torch.ops.normuon_fn, name).default, given)
        assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_the_interpreted_kernels_hold_the_same_claims() -> None:
    assert INTERPRETED
    masks.must_be_bool()
    torch.manual_seed(0)
    for k, (dtype, shape) in enumerate(itertools.product(PRODUCT_DTYPES, SHAPES)):
        check(*shape, dtype, SMALL[shape[1] > 64], transposed=(k + k // len(SHAPES)) % 2 == 0)
    for k, v in itertools.product(range(len(ALIGNED)), (0, 1)):  # dtypes and transposed in turn
        config = DESCRIPTORS[2 * (ALIGNED[k][1] > 40) + v]
        check(*ALIGNED[k], PRODUCT_DTYPES[(k + v) % 2], config, (k // 2 + v) % 2 == 0)
        check(*ALIGNED[k], PRODUCT_DTYPES[(k + v) % 2], config._replace(ends=True), False)
    for k, config in enumerate(REAL):
        transposed = k % 3 == 0 and not config.ends
        check(1, 208 - 48 * (k % 2), 72, PRODUCT_DTYPES[k % 2], config, transposed)
    check_choice()
    for k, config in enumerate((SMALL[1], *DESCRIPTORS[2:])):  # one of every variant
        check_gaussian_is_symmetric(config)
        check_non_finite((torch.float16, torch.bfloat16)[k % 2], config)
    check_operators()
