"""Who plans a step chooses kernels or twins, by device and dtypes alone."""

from __future__ import annotations

import pytest
import torch

from normuon_fn import ops
from normuon_fn.ops import launch

CUDA, CPU = torch.device("cuda"), torch.device("cpu")  # no tensor is made: needs no device
HALF = [torch.float32, torch.bfloat16, torch.float16, torch.int16]


def test_floats_of_16_and_32_bits_on_cuda_take_kernels() -> None:
    pytest.importorskip("triton")
    assert ops.kernels_for(CUDA, HALF)
    assert not ops.kernels_for(CUDA, [*HALF, torch.float64])
    assert ops.kernels_for(CPU, HALF) == launch.INTERPRETED


def test_cuda_without_triton_is_an_error_and_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"needs triton: pip install 'normuon_fn\[cuda\]'"):
        ops.kernels_for(CUDA, HALF)
    assert not ops.kernels_for(CUDA, [torch.float64])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_advance_of_every_choice_has_the_same_bits(kernels: bool, in_place: bool) -> None:
    """On the CPU the operator runs the twin inside, unless the kernels are interpreted."""
    if launch.INTERPRETED:
        pytest.skip("kernels sum in another order")
    generator = torch.Generator().manual_seed(0)
    momentums, grads = ([torch.randn(4, 6, generator=generator) for _ in "ab"] for _ in "mg")
    rule, beta = ops.MomentumRule("ema", nesterov=True), torch.tensor(0.9)
    expected = ops.Operators(kernels=False).advance(momentums, grads, beta, None, [2], rule)
    copies = [x.clone() for x in momentums]
    found = ops.Operators(kernels, in_place).advance(copies, grads, beta, None, [2], rule)
    assert all(map(torch.equal, found.momentums, expected.momentums))
    assert all(map(torch.equal, found.measures, expected.measures))
    assert all(map(torch.equal, copies, expected.momentums if in_place else momentums))
    assert (found.stacks is None) == kernels
