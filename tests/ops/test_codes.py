"""Eight-bit codes against what they should be in float64, and what of them is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normuon_fn.ops import codes

SHAPES = [(5, 64), (3, 200), (7, 1), (2, 3, 130), (4, 63), (1, 65)]


def given(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Entries of very different sizes, rows of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * 2.0 ** torch.randint(-40, 40, (*shape[:-1], 1), generator=generator)
    x[..., :1, : shape[-1] // 2] = 0
    return x


def spread(scales: Tensor, cols: int) -> Tensor:
    """The scale of every entry, float64."""
    power = torch.pow(2.0, scales.double() - 133).where(scales > 0, 0.0)
    return power.repeat_interleave(codes.BLOCK, -1)[..., :cols]


def oracle(x: Tensor) -> tuple[list[int], int]:
    """The codes and the stored number of one block, in Python's own arithmetic."""
    most = max(abs(v) for v in x.tolist())
    if most == 0:
        return [0] * len(x), 0
    number = max(1, math.frexp(most)[1] + 126)  # the exponent as float32 has it
    scale = 2.0 ** (number - 133)
    if most / scale > 127:
        number, scale = number + 1, 2 * scale
    return [round(v / scale) for v in x.tolist()], number  # ties to even


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_oracle(shape: tuple[int, ...]) -> None:
    x = given(shape)
    found, scales = codes.quantized(x)
    assert found.shape == x.shape and scales.shape == (*shape[:-1], -(-shape[-1] // 64))
    for row, of_row, numbers in zip(
        x.flatten(0, -2), found.flatten(0, -2), scales.flatten(0, -2), strict=True
    ):
        for k, number in enumerate(numbers.tolist()):
            block = slice(64 * k, 64 * (k + 1))
            assert (of_row[block].tolist(), number) == oracle(row[block].double())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_restored_is_off_by_half_a_scale_at_most(shape: tuple[int, ...]) -> None:
    x = given(shape, seed=1)
    found, scales = codes.quantized(x)
    exact = found.double() * spread(scales, shape[-1])
    assert torch.equal(codes.restored(found, scales).double(), exact)  # restoring rounds nothing
    assert bool(((exact - x.double()).abs() <= spread(scales, shape[-1]) / 2).all())
    most = torch.stack([part.abs().amax(-1) for part in x.split(64, -1)], -1)
    share = spread(scales, 64 * scales.shape[-1])[..., ::64] * 63.5
    assert bool((most.double() >= share).all())  # no scale is larger than it has to be


def test_quantizing_what_was_restored_changes_nothing() -> None:
    first = codes.quantized(given((4, 200)))
    again = codes.quantized(codes.restored(*first))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("exponent", [-80, -1, 1, 40, 80])
def test_a_power_of_two_changes_scales_alone(exponent: int) -> None:
    x = given((3, 200), seed=2)
    (a, of_a), (b, of_b) = codes.quantized(x), codes.quantized(x * 2.0**exponent)
    assert torch.equal(a, b)
    assert torch.equal(torch.where(of_a > 0, of_a.int() + exponent, 0), of_b.int())
    assert torch.equal(codes.restored(a, of_a) * 2.0**exponent, codes.restored(b, of_b))


def test_the_smallest_and_the_largest_numbers_have_codes() -> None:
    tiny, top = torch.tensor([[2.0**-126, 1e-45, -(2.0**-130)]]), torch.tensor([[3.4e38, -1e38]])
    found, scales = codes.quantized(tiny)
    assert found.tolist() == [[64, 0, -4]] and scales.tolist() == [[1]]
    assert torch.equal(codes.restored(found, scales), torch.tensor([[2.0**-126, 0, -(2.0**-130)]]))
    found, scales = codes.quantized(top)
    assert found.tolist() == [[127, -38]] and scales.tolist() == [[254]]
    restored = codes.restored(found, scales)
    assert bool(((restored - top).abs() <= 2.0**121).all()) and bool(restored.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_what_is_not_finite_is_restored_as_nan_and_no_other(bad: float) -> None:
    x = torch.ones(2, 130)
    x[1, 70] = bad
    found, scales = codes.quantized(x)
    restored = codes.restored(found, scales)
    nan = torch.zeros(2, 130, dtype=torch.bool)
    nan[1, 64:128] = True
    assert torch.equal(restored.isnan(), nan) and bool((restored[~nan] == 1).all())


def test_zeros_are_zeros_and_nothing_is_empty() -> None:
    found, scales = codes.quantized(torch.zeros(2, 70))
    assert not found.any() and not scales.any()
    assert not codes.restored(found, scales).any()
    for shape, blocks in (((0, 70), (0, 2)), ((3, 0), (3, 0))):
        found, scales = codes.quantized(torch.zeros(shape))
        assert found.shape == shape and scales.shape == blocks
        assert codes.restored(found, scales).shape == shape


def test_a_matrix_takes_little_more_than_a_byte_an_entry() -> None:
    found, scales = codes.quantized(torch.randn(64, 2048))
    assert (found.nbytes + scales.nbytes) / found.numel() <= 1.02


@pytest.mark.parametrize(
    ("beta", "noise", "least", "most"),
    [
        (0.95, 1.0, 0.999, 1.0), (0.99, 1.0, 0.997, 1.0), (0.999, 1.0, 0.9, 0.98),
        (0.95, 0.0, 0.99, 1.0), (0.99, 0.0, 0.96, 1.0),
    ],
)  # fmt: skip
def test_an_average_keeps_its_direction_as_the_guide_on_memory_says(
    beta: float, noise: float, least: float, most: float
) -> None:
    """The cosine between a momentum of codes and one of float32; above 0.99 do not use codes."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(16, 128, generator=generator)
    plain, coded = torch.zeros_like(signal), codes.quantized(torch.zeros_like(signal))
    for _ in range(min(int(6 / (1 - beta)), 3000)):
        grad = (1 - beta) * (signal + noise * torch.randn(signal.shape, generator=generator))
        plain = beta * plain + grad
        coded = codes.quantized(beta * codes.restored(*coded) + grad)
    cosine = torch.cosine_similarity(codes.restored(*coded).flatten(), plain.flatten(), dim=0)
    assert least < cosine.item() <= most + 1e-6
