"""The same claims on a CUDA device, in the dtypes that are the default there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normuon_fn as nm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = {
    "square": (64, 64),
    "tall": (256, 64),
    "wide": (64, 256),
    "experts": (3, 64, 96),
    "embed": (50, 64),
    "bias": (64,),
}


def problem(device: str = "cuda", seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()
    }
    return params, {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_plan_takes_16_bits_for_the_products() -> None:
    plan = nm.make_plan(problem()[0])
    forms = {(b.rows, b.cols): b.form[:2] for b in plan.buckets}
    gram, standard = ("gram", torch.float16), ("standard", torch.bfloat16)
    assert forms == {(64, 64): standard, (64, 256): gram, (64, 96): gram}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_orthogonalize_has_the_same_bits_for_every_power_of_two(
    method: str, dtype: torch.dtype
) -> None:
    x = torch.randint(1, 9, (3, 48, 80), generator=torch.Generator().manual_seed(0)).float().cuda()
    x[:, ::2] *= -1
    expected = nm.orthogonalize(x, method=method, dtype=dtype)  # type: ignore[arg-type]
    for k in (-126, -100, -30, -1, 1, 60, 120):
        assert torch.equal(nm.orthogonalize(x * 2.0**k, method=method, dtype=dtype), expected)  # type: ignore[arg-type]
    assert not nm.orthogonalize(torch.zeros_like(x), method=method, dtype=dtype).any()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "dtype", "median", "most"),
    [
        ("standard", torch.bfloat16, 1e-2, 5e-2),
        ("gram", torch.float16, 5e-3, 3e-2),
        ("standard", torch.float32, 1e-5, 3e-5),
    ],
)
def test_rows_are_as_exact_as_the_dtype_allows(
    method, dtype: torch.dtype, median: float, most: float
) -> None:
    x = torch.randn(2, 256, 1024, generator=torch.Generator().manual_seed(1)).cuda()
    exact = nm.orthogonalize(x.double(), method="standard", dtype=torch.float64)
    error = (nm.orthogonalize(x, method=method, dtype=dtype).double() - exact).norm(
        dim=-1
    ) / exact.norm(dim=-1)
    assert error.median() <= median
    assert error.max() <= most


def test_a_step_in_float32_agrees_with_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        params, grads = problem(device)
        plan = nm.make_plan(params, nm.Config(orthogonalize_dtype=torch.float32))
        hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
        results.append(nm.update(params, grads, nm.init(plan, params), hyper, plan).params)
    for name in SHAPES:
        torch.testing.assert_close(results[1][name].cpu(), results[0][name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("guard", ["off", "output", "full"])
def test_compiled_steps_agree_and_the_guard_keeps_every_bit(guard: str) -> None:
    params, grads = problem()
    plan = nm.make_plan(params, nm.Config(guard=guard))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    pure = nm.step(params, grads, state, hyper, plan)
    here, there = ({k: v.clone() for k, v in given.items()} for given in (params, state))
    nm.step_(here, grads, there, hyper, plan)
    assert same(here, pure.params) and same(there, pure.state)
    grads["wide"][3, 5] = float("inf")
    result = nm.step(pure.params, grads, pure.state, hyper, plan)
    assert same(pure.params, result.params) == (guard != "off")
    assert result.flags[1].tolist() == [int(name == "wide") for name in plan.names]


def test_a_captured_step_follows_its_hyperparameters_and_skips_on_the_device() -> None:
    params, grads = problem()
    plan = nm.make_plan(params, nm.Config(guard="full"))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
    expected_params, expected_state = (
        {k: v.clone() for k, v in given.items()} for given in (params, state)
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and warm up on copies
        copies = (
            {k: v.clone() for k, v in params.items()},
            {k: v.clone() for k, v in state.items()},
        )
        for _ in range(2):
            nm.step_(copies[0], grads, copies[1], hyper, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = nm.step_(params, grads, state, hyper, plan)
    for lr, bad in ((0.02, False), (0.01, True), (0.005, False)):
        hyper.lr.fill_(lr)
        for name, grad in problem(seed=int(lr * 1000))[1].items():
            grads[name].copy_(grad)
        if bad:
            grads["tall"][0, 0] = float("nan")
        graph.replay()
        assert bool(result.skipped) == bad
        nm.step_(expected_params, grads, expected_state, hyper, plan)
        assert same(params, expected_params) and same(state, expected_state)
