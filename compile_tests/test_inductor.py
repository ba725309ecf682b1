"""What Inductor makes of the step: the same numbers, and in place where it is said to be."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import ROUTES, SHORT, SMALL, copies, problem
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.step import local_update_

# Read as views: three projections, heads cut along either axis, a convolution, a stack of stacks.
VIEWS = {
    "wte": (20, 16),
    "qkv": (48, 16),
    "q": (16, 16),
    "o": (16, 16),
    "conv": (16, 4, 3, 3),
    "deep": (2, 2, 16, 16),
    "bias": (16,),
}
VIEW_ROUTES = {
    "qkv": nm.Route(splits=(32, 8, 8)),
    "q": nm.Route(heads=2),
    "o": nm.Route(heads=2, dim=1),
    "conv": nm.Route(flatten=True),
}


def test_step_equals_step_in_place_bit_for_bit_and_eager_closely() -> None:
    shapes = {name: SMALL[name] for name in ("qkv", "bias")}
    given = problem(shapes, nm.Config(guard="full", steps=2), routes=ROUTES)
    given = given._replace(hyper=nm.Hyper.of(given.params, lr=0.02, weight_decay=0.1))
    eager = nm.update(*given)
    pure = nm.step(*given)
    aot = compile_whole(nm.update, "aot_eager")(*given)
    here, there = copies(given.params), copies(given.state)
    nm.step_(here, given.grads, there, given.hyper, given.plan)
    for old, new, in_place, traced in (
        (eager.params, pure.params, here, aot.params),
        (eager.state, pure.state, there, aot.state),
    ):
        assert all(torch.equal(new[name], in_place[name]) for name in new)
        assert all(torch.equal(traced[name], old[name]) for name in old)
        torch.testing.assert_close(new, old, rtol=0, atol=2e-6)  # seen 2.4e-7


def test_update_works_in_the_users_own_graph_with_loss_and_backward() -> None:
    params, _, state, hyper, plan = problem(
        {"up": (32, 8), "down": (8, 32)}, nm.Config(guard="full", **SHORT)
    )
    x = torch.randn(16, 8)

    def loss_fn(p: dict[str, Tensor]) -> Tensor:
        return (torch.relu(x @ p["up"].mT) @ p["down"].mT - x).square().mean()

    def train_step(p, s, h):
        grads, loss = torch.func.grad_and_value(loss_fn)(p)
        return nm.update(p, grads, s, h, plan), loss

    whole = torch.compile(train_step, fullgraph=True, dynamic=False)
    losses = []
    for _ in range(8):
        result, loss = whole(params, state, hyper)
        eager, _ = train_step(params, state, hyper)
        torch.testing.assert_close(result.params, eager.params, rtol=0, atol=2e-6)  # seen 1.2e-7
        params, state = result.params, result.state
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_generated_code_writes_parameters_and_state_in_place_and_copies_none() -> None:
    given = problem(VIEWS, nm.Config(guard="full", **SHORT), routes=VIEW_ROUTES)
    code = graphs.generated(local_update_, *given)
    code.check_in_place(least=16 * 16)
    lists = (
        3 if given.plan.config.normalize else 2
    )  # parameter, momentum and variance of every block
    blocks = sum(len(group.blocks) for bucket in given.plan.buckets for group in bucket.groups)
    assert len(code.written) == lists * blocks + 3 * 2  # AdamW writes the parameter and two moments
    large = [shape for shape in code.buffers if math.prod(shape) >= 16 * 16]
    allowed: Counter[tuple[int, ...]] = Counter()
    for (
        bucket
    ) in given.plan.buckets:  # in and out of the one Newton-Schulz step, and its two products x x^T
        n = sum(group.count for group in bucket.groups)
        allowed.update(2 * [(n, bucket.rows, bucket.cols), (n, bucket.rows, bucket.rows)])
        for group in bucket.groups:  # new momentums and parameters, before they are written
            allowed.update(2 * [(group.count, group.rows, group.cols)])
    assert Counter(large) <= allowed, f"{large}"  # seen 12, of 24 allowed
