"""Matrices whose rows are no whole cache lines are iterated on with zeros around them.

On CUDA the plan chooses that; here the form is said.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

import normuon_fn as nm
from normuon_fn import ops
from normuon_fn.algorithm.coefficients import gram_restarts, resolve
from normuon_fn.algorithm.orthogonalize import LINE, Form, in_whole_lines, iterate
from normuon_fn.distributed import orthogonalize as sharded
from normuon_fn.planning import buckets, make_plan
from tests.inputs import METHODS, gaussian

SHAPES = [(64, 128), (72, 128), (64, 130), (70, 133), (1, 65), (127, 128)]


def iterated(x: Tensor, name: str, method: Any, products: Any, steps: int = 5) -> Tensor:
    chosen = resolve(name, steps, None)
    restarts = gram_restarts(chosen.rows) if method == "gram" else ()
    return iterate(x, chosen, Form(method, x.dtype, restarts, products))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_are_added_up_to_whole_lines_and_only_there(shape: tuple[int, int]) -> None:
    x = gaussian(2, *shape)
    got = in_whole_lines(x)
    assert all(size % LINE == 0 for size in got.shape[1:])
    assert all(0 <= a - b < LINE for a, b in zip(got.shape[1:], shape, strict=True))
    assert torch.equal(got[:, : shape[0], : shape[1]], x)
    assert got.square().sum() == pytest.approx(x.square().sum())
    assert (got is x) == all(size % LINE == 0 for size in shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["polar_express", "quintic", "aol", "cans"])
def test_they_change_no_result(name: str, method: str, shape: tuple[int, int]) -> None:
    x = gaussian(3, *shape).double()
    x = x / x.norm(dim=(-2, -1), keepdim=True) / 1.02
    steps = 4 if name == "aol" else 5
    want = iterated(x, name, method, "library", steps)
    got = iterated(x, name, method, "symmetric", steps)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # observed: 3e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_stays_in_its_matrix_and_is_seen_in_all_of_it(bad: float, method: str) -> None:
    x = gaussian(3, 70, 133) / 100
    x[1, 69, 132] = bad
    got = iterated(x, "polar_express", method, "symmetric")
    assert not got[1].isfinite().any()
    assert got[::2].isfinite().all()


@pytest.mark.parametrize("where", ["here", "in a graph"])
@pytest.mark.parametrize("master", ["none", "fp32"])
def test_a_step_is_the_same(
    where: str, master: Literal["none", "fp32"], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make_plan.choose

    def symmetric(*given: Any) -> Form:
        return real(*given)._replace(products="symmetric")

    shapes = {"wide": (72, 133), "tall": (133, 72), "square": (70, 70), "stack": (3, 66, 80)}
    params = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    if master != "none":
        params = {name: p.bfloat16() for name, p in params.items()}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    config = nm.Config(guard="full", metrics=True, master=master)
    run = nm.update if where == "here" else nm.step

    def after_two_steps() -> nm.StepResult:
        plan = nm.make_plan(params, config, routes={"*": nm.Route("normuon")})
        hyper = nm.Hyper.of(params, lr=0.1)
        first = run(params, grads, nm.init(params, plan), hyper, plan)
        return run(first.params, grads, first.state, hyper, plan)

    want = after_two_steps()
    monkeypatch.setattr(make_plan, "choose", symmetric)
    got = after_two_steps()
    assert not got.skipped
    for name, x in {**want.params, **want.state}.items():
        found = {**got.params, **got.state}[name]
        close = 1e-2 if x.dtype == torch.bfloat16 else 1e-5  # observed: 0
        torch.testing.assert_close(found, x, rtol=close, atol=close, msg=name)


# --- orthogonalize by itself


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sharded.choose
    monkeypatch.setattr(
        sharded, "choose", lambda *given: real(*given)._replace(products="symmetric")
    )


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("shape", [(70, 133), (70, 128), (133, 70), (64, 128), (2, 70, 128)])
def test_a_result_keeps_no_memory_beyond_its_own(shape: tuple[int, ...]) -> None:
    x = gaussian(*shape).bfloat16()
    got = nm.orthogonalize(x, dtype=torch.bfloat16)
    assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
    assert (got if shape[-2] <= shape[-1] else got.mT).is_contiguous()


class Orthogonalize(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nm.orthogonalize(x, dtype=torch.float32)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fixed", ["none", "rows", "cols"])
def test_an_exported_graph_is_for_all_sizes(fixed: str, strict: bool) -> None:
    sizes = {0: Dim("rows", min=322, max=500), 1: Dim("cols", min=802, max=4000)}
    sizes = {k: size for k, size in sizes.items() if size.__name__ != fixed}
    x = torch.randn(330, 820)
    made = export(Orthogonalize(), (x,), dynamic_shapes={"x": sizes}, strict=strict).module()
    for rows, cols in ((330, 820), (385, 901), (384, 832)):
        x = torch.randn(330 if fixed == "rows" else rows, 820 if fixed == "cols" else cols)
        torch.testing.assert_close(made(x), Orthogonalize()(x), rtol=0, atol=1e-5)  # 8e-7


@pytest.mark.usefixtures("by_kernels")
def test_a_graph_with_symbolic_sizes_is_compiled_no_more_often_than_without() -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(Orthogonalize(), fullgraph=True, dynamic=True, backend=backend)
    for shape in ((70, 133), (66, 130), (70, 128), (64, 128), (72, 140), (80, 150)):
        run(torch.randn(shape))
    assert len(graphs) <= 2
    graphs.clear()
    torch._dynamo.reset()
    run = torch.compile(Orthogonalize(), fullgraph=True, backend=backend)
    for cols in (820, 901, 832, 1000):
        x = torch.randn(330, cols)
        torch._dynamo.mark_dynamic(x, 1)
        run(x)
    assert len(graphs) == 1


def test_a_distributed_sum_sends_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def reduced(x: Tensor, group: str) -> Tensor:
        sent.append(x.numel())
        return 2 * x

    monkeypatch.setattr(sharded, "all_reduce_sum", reduced)
    x = in_whole_lines(gaussian(2, 70, 133))
    got = sharded._summed(x, ops.LIBRARY, ("of two",), 70)
    assert sent == [2 * 35 * 71]
    torch.testing.assert_close(got, 2 * x @ x.mT)
    assert got.shape == (2, 128, 128) and not got[:, 70:].any()


def test_a_stack_with_its_zeros_fits_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {str(k): torch.zeros(65, 129) for k in range(8)}
    monkeypatch.setattr(make_plan, "choose", lambda *given: Form("standard", torch.bfloat16))
    plan = nm.make_plan(params, routes={"*": nm.Route("normuon")})
    (bucket,) = plan.buckets
    small = dataclasses.replace(bucket, form=bucket.form._replace(products="symmetric"))
    monkeypatch.setattr(buckets, "CHUNK", 4 * 128 * 192 * 2)
    assert bucket._at_a_time(plan.config) == 11
    assert small._at_a_time(plan.config) == 4
