"""What holds bit for bit: powers of two, stacks, transposes, memory layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import normuon_fn as nm
from tests import oracle
from tests.inputs import (
    DTYPES,
    EVERY_WAY,
    METHODS,
    exact,
    gaussian,
    row_errors,
    same_bits,
    small_integers,
    times_power_of_two,
)

bounded = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# --- exact invariants ---


@EVERY_WAY
@bounded
@given(k=st.integers(-126, 120), wide=st.booleans())
@example(k=-126, wide=True)
@example(k=120, wide=True)
@example(k=-126, wide=False)
@example(k=120, wide=False)
def test_a_power_of_two_changes_no_bit(method: str, dtype: torch.dtype, k: int, wide: bool) -> None:
    x = small_integers(16, 40 if wide else 16)
    plain = nm.orthogonalize(x, method=method, dtype=dtype)
    assert plain.abs().max() > 0.1
    assert same_bits(nm.orthogonalize(times_power_of_two(x, k), method=method, dtype=dtype), plain)


@pytest.mark.parametrize(
    ("held", "low", "high"),
    [(torch.float16, -14, 12), (torch.bfloat16, -126, 120), (torch.float64, -1022, 1020)],
    ids=["float16", "bfloat16", "float64"],
)
@EVERY_WAY
def test_a_power_of_two_changes_no_bit_of_other_input_dtypes(
    method: str, dtype: torch.dtype, held: torch.dtype, low: int, high: int
) -> None:
    x = small_integers(16, 40).to(held)
    plain = nm.orthogonalize(x, method=method, dtype=dtype)
    assert plain.dtype == held
    for k in (low, -7, 1, high):
        assert same_bits(
            nm.orthogonalize(times_power_of_two(x, k), method=method, dtype=dtype), plain
        ), k


@EVERY_WAY
def test_each_matrix_of_a_stack_has_its_own_power_of_two(method: str, dtype: torch.dtype) -> None:
    x = small_integers(4, 16, 40)
    x[3] = 0
    scaled = torch.stack(
        [times_power_of_two(m, k) for m, k in zip(x, [-126, 120, 3, 0], strict=True)]
    )
    got = nm.orthogonalize(scaled, method=method, dtype=dtype)
    assert same_bits(got, nm.orthogonalize(x, method=method, dtype=dtype))
    assert torch.count_nonzero(got[3]) == 0
    assert got[:3].abs().amax((-2, -1)).min() > 0.1


@EVERY_WAY
def test_tiny_huge_and_zero_matrices_in_one_stack_get_what_each_gets_alone(
    method: str, dtype: torch.dtype
) -> None:
    x = gaussian(3, 24, 48) * torch.tensor([1e-30, 1e30, 0.0]).view(3, 1, 1)
    together = nm.orthogonalize(x, method=method, dtype=dtype)
    for i in range(3):
        assert same_bits(together[i], nm.orthogonalize(x[i], method=method, dtype=dtype)), i


@pytest.mark.parametrize("held", DTYPES)
@EVERY_WAY
def test_zero_in_zero_out(method: str, dtype: torch.dtype, held: torch.dtype) -> None:
    for shape in [(8, 8), (8, 20), (2, 20, 8)]:
        got = nm.orthogonalize(torch.zeros(shape, dtype=held), method=method, dtype=dtype)
        assert same_bits(got, torch.zeros(shape, dtype=held))


@pytest.mark.parametrize("k", [-149, -140, -130])
@pytest.mark.parametrize("method", METHODS)
def test_subnormal_input_is_as_orthogonal_as_its_values_are(method: str, k: int) -> None:
    x = times_power_of_two(small_integers(16, 40), k)
    assert x.abs().max() < 2.0**-120
    want = exact(x, oracle.QUINTIC)
    got = nm.orthogonalize(x, method=method, coefficients="quintic", dtype=torch.float32)
    assert row_errors(got, want).max() <= 1e-5
    mixed = torch.cat([gaussian(8, 40), x[:8] * 2.0**10])  # rows that vanish beside the others
    assert nm.orthogonalize(mixed, method=method).isfinite().all()


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16])
@EVERY_WAY
def test_half_precision_input_equals_its_float32_copy(
    method: str, dtype: torch.dtype, held: torch.dtype
) -> None:
    x = gaussian(16, 40).to(held)
    got = nm.orthogonalize(x, method=method, dtype=dtype)
    assert same_bits(got, nm.orthogonalize(x.float(), method=method, dtype=dtype).to(held))


@pytest.mark.parametrize("method", METHODS)
def test_quintic_at_every_scale_is_the_unit_norm_result(method: str) -> None:
    """Emerging-Optimizers' test of #230, with two scales more."""
    x = gaussian(256, 256)
    x /= x.norm()
    options = {"method": method, "coefficients": "quintic", "steps": 5, "dtype": torch.float32}
    unit = nm.orthogonalize(x, **options)
    assert unit.norm() == pytest.approx(16, abs=0.5)
    for scale in (1e-2, 1e-6, 1e-9, 1e-12, 1e-30, 1e30):
        torch.testing.assert_close(
            nm.orthogonalize(x * scale, **options), unit, atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize(
    "shape", [(16, 40), (40, 16), (24, 24), (3, 16, 24), (3, 24, 16), (2, 17, 17), (1, 9), (33, 64)]
)
@EVERY_WAY
def test_the_transpose_has_the_same_bits_transposed(
    method: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = gaussian(*shape)
    straight = nm.orthogonalize(x, method=method, dtype=dtype)
    assert same_bits(nm.orthogonalize(x.mT, method=method, dtype=dtype), straight.mT)
    assert same_bits(nm.orthogonalize(x.mT.contiguous(), method=method, dtype=dtype), straight.mT)


@EVERY_WAY
def test_a_symmetric_input_gives_a_symmetric_output(method: str, dtype: torch.dtype) -> None:
    x = gaussian(24, 24)
    got = nm.orthogonalize(x + x.mT, method=method, dtype=dtype)
    assert same_bits(got, got.mT)


@EVERY_WAY
def test_memory_layout_and_leading_dimensions_change_no_bit(
    method: str, dtype: torch.dtype
) -> None:
    x = gaussian(2, 3, 16, 40)
    before = x.clone()
    got = nm.orthogonalize(x, method=method, dtype=dtype)
    assert same_bits(x, before)
    assert same_bits(
        got.reshape(6, 16, 40), nm.orthogonalize(x.reshape(6, 16, 40), method=method, dtype=dtype)
    )
    strided = torch.empty(2, 3, 16, 80)[..., ::2]
    strided.copy_(x)
    assert same_bits(nm.orthogonalize(strided, method=method, dtype=dtype), got)


def test_auto_is_gram_from_an_aspect_ratio_of_one_and_a_half() -> None:
    for rows, cols, method in [
        (16, 24, "gram"),
        (24, 16, "gram"),
        (16, 128, "gram"),
        (16, 16, "standard"),
        (16, 23, "standard"),
        (23, 16, "standard"),
    ]:
        x = gaussian(rows, cols)
        auto = nm.orthogonalize(x, dtype=torch.float16)
        assert same_bits(auto, nm.orthogonalize(x, method=method, dtype=torch.float16)), (
            rows,
            cols,
        )
        other = METHODS[method == "standard"]
        assert not same_bits(auto, nm.orthogonalize(x, method=other, dtype=torch.float16)), (
            rows,
            cols,
        )
