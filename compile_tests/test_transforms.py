"""`update` under torch.func: an ensemble under `vmap` is its members one by one, in eager and as
one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import ROUTES, SHORT, SMALL, Shapes, problem, tensors

MEMBERS = 4
BAD = 2


class Ensemble(NamedTuple):
    stacked: tuple  # arguments of `update`, members first
    each: list[tuple]  # those of each member: own parameters, gradients, state and learning rate
    plan: nm.Plan
    over_members: Callable[..., nm.StepResult]


def ensemble(shapes: Shapes = SMALL) -> Ensemble:
    each, routes = [], {name: route for name, route in ROUTES.items() if name in shapes}
    for k in range(MEMBERS):
        given = problem(shapes, nm.Config(guard="full", **SHORT), routes=routes)
        params = tensors(shapes, 10 + k)
        hyper = nm.Hyper.of(params, lr=0.01 * (k + 1), momentum=0.9 - 0.1 * k, weight_decay=0.1)
        state = nm.update(
            params, tensors(shapes, 20 + k), given.state, hyper, given.plan
        ).state  # so that none is zero
        each.append((params, tensors(shapes, 30 + k), state, hyper))
    stacked = [
        {name: torch.stack([part[i][name] for part in each]) for name in each[0][i]}
        for i in range(3)
    ]
    hypers = nm.Hyper(
        *(torch.stack(values) for values in zip(*(part[3] for part in each), strict=True))
    )
    plan = given.plan
    over_members = torch.vmap(
        lambda params, grads, state, hyper: nm.update(params, grads, state, hyper, plan)
    )
    return Ensemble((*stacked, hypers), each, plan, over_members)


def test_an_ensemble_is_its_members_one_by_one_and_a_nan_skips_that_member_alone() -> None:
    given = ensemble()
    check_members(given, given.over_members(*given.stacked), given.over_members)


def test_compiled_the_members_share_one_graph_and_every_node_of_it() -> None:
    given = ensemble()
    whole, one = (
        graphs.record(given.over_members, *given.stacked),
        graphs.captured(nm.update, *given.each[0], given.plan),
    )
    whole.check()
    ours = [
        name for name in one.ops if name.startswith("normuon_fn.") and "reinterpret" not in name
    ]
    assert ours and all(whole.ops[f"{name}_members"] == one.ops[name] for name in ours)
    products = ("aten.bmm", "aten.baddbmm")  # batched, baddbmm is a bmm and a sum
    assert sum(whole.ops[name] for name in products) == sum(one.ops[name] for name in products)
    with graphs.no_recompile():
        check_members(given, whole.result, whole.compiled)


def test_inductor_compiles_the_members_and_a_nan_skips_that_member_alone() -> None:
    given = ensemble({"w": (8, 6), "bias": (4,)})
    compiled = torch.compile(given.over_members, fullgraph=True, dynamic=False)
    check_members(given, compiled(*given.stacked), compiled)


def test_an_ensemble_of_ensembles_is_one_larger_ensemble() -> None:
    given = ensemble()
    inner, outer = MEMBERS // 2, 2
    of_each = tree_map_only(Tensor, lambda x: x.unflatten(0, (outer, inner)), given.stacked)
    nested = torch.vmap(given.over_members)(*of_each)
    flat = given.over_members(*given.stacked)
    for got, expected in ((nested.params, flat.params), (nested.state, flat.state)):
        for name, tensor in expected.items():
            assert torch.equal(got[name].flatten(0, 1), tensor)


def check_members(
    given: Ensemble, clean: nm.StepResult, function: Callable[..., nm.StepResult]
) -> None:
    stacked, each, plan, _ = given
    assert not clean.skipped.any()
    for k, member in enumerate(each):
        expected = nm.update(*member, plan)
        for got, want in ((clean.params, expected.params), (clean.state, expected.state)):
            assert list(got) == list(want)
            for name, tensor in want.items():
                torch.testing.assert_close(
                    got[name][k], tensor, rtol=0, atol=1e-6
                )  # seen 1.2e-7: products in larger stacks

    grads = {name: grad.clone() for name, grad in stacked[1].items()}
    name = "up" if "up" in grads else next(iter(grads))
    grads[name][BAD, 3, 5] = float("nan")
    result = function(stacked[0], grads, *stacked[2:])
    assert result.skipped.tolist() == [k == BAD for k in range(MEMBERS)]
    assert result.flags.any(1).nonzero().tolist() == [[BAD, list(grads).index(name)]]
    assert result.state["guard.skipped"].tolist() == [int(k == BAD) for k in range(MEMBERS)]
    for before, after, expected in (
        (stacked[0], result.params, clean.params),
        (stacked[2], result.state, clean.state),
    ):
        for name in before:
            for k in range(MEMBERS):
                if not name.startswith("guard."):
                    assert torch.equal(
                        after[name][k], before[name][k] if k == BAD else expected[name][k]
                    )


def test_training_an_ensemble_with_its_own_losses_is_one_graph() -> None:
    stacked, each, plan, _ = ensemble()
    x = torch.randn(5, 8)

    def loss_fn(params: dict[str, Tensor]) -> Tensor:
        hidden = (
            torch.relu(x @ params["up"].mT) @ params["down"].mT @ params["qkv"].mT @ params["qkv"]
        )
        return (hidden @ params["experts"] @ params["wte"].mT).square().mean() + params[
            "bias"
        ].square().sum()

    def train_step(params, state, hyper):
        grads, loss = torch.func.grad_and_value(loss_fn)(params)
        return nm.update(params, grads, state, hyper, plan), loss

    recorded = graphs.record(torch.vmap(train_step), stacked[0], stacked[2], stacked[3])
    recorded.check()
    result, losses = recorded.result
    for k, (params, _, state, hyper) in enumerate(each):
        expected, loss = train_step(params, state, hyper)
        torch.testing.assert_close(losses[k], loss, rtol=1e-5, atol=0)  # seen 0
        for name in params:
            torch.testing.assert_close(
                result.params[name][k], expected.params[name], rtol=0, atol=2e-6
            )  # seen 2.4e-7
