"""Every check that this folder relies on goes red when its promise is broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, TINY, Tensors, copies, many, problem
from normuon_fn import compat
from normuon_fn.step import local_update_


def reads_a_value(params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan):
    result = nm.update(params, grads, state, hyper, plan)
    return result, result.skipped.item()


def branches_on_a_value(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    result = nm.update(params, grads, state, hyper, plan)
    return result.params if result.skipped else params


def has_a_shape_that_depends_on_values(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    result = nm.update(params, grads, state, hyper, plan)
    return result, params["w"][params["w"] > 0].sum()


def compares_tensors(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    result = nm.update(params, grads, state, hyper, plan)
    return result, torch.ops.aten.equal(result.params["w"], params["w"])


def breaks_the_graph(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    result = nm.update(params, grads, state, hyper, plan)
    torch._dynamo.graph_break()
    return result.flags + 1


def copies_to_the_cpu(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    result = nm.update(params, grads, state, hyper, plan)
    return result, result.flags.cpu()


def has_a_learning_rate_on_the_cpu(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    return nm.update(params, grads, state, hyper._replace(lr=torch.full((), 0.1)), plan)


def reduces_twice(params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan):
    result = nm.update(params, grads, state, hyper, plan)
    return result, compat.all_reduce_max(result.skipped.int(), plan.guard.group)


def without_group(plan: nm.Plan) -> nm.Plan:
    return dataclasses.replace(plan, guard=dataclasses.replace(plan.guard, group=None))


def reduces_parameters(
    params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
):
    reduced = {**grads, "w": compat.all_reduce_max(grads["w"], plan.guard.group)}
    return nm.update(params, reduced, state, hyper, without_group(plan))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (reads_a_value, "the host waits for .*_local_scalar_dense"),
        (branches_on_a_value, r"1 graphs: .*jump"),
        (has_a_shape_that_depends_on_values, "the host waits for .*(nonzero|index)"),
        (compares_tensors, "the host waits for .*equal|graphs: "),
        (breaks_the_graph, "2 graphs: .*graph_break"),
    ],
)
def test_a_host_branch_goes_red(function: Callable, found: str) -> None:
    recorded = graphs.record(function, *problem(TINY, nm.Config(guard="full", **SHORT)))
    with pytest.raises(AssertionError, match=found):
        recorded.check()


def test_a_value_that_is_read_and_not_used_goes_red_in_eager() -> None:
    given = problem(TINY, nm.Config(guard="full", **SHORT))
    with (
        pytest.raises(AssertionError, match=r"the host waits for aten\._local_scalar_dense"),
        graphs.no_host_sync(),
    ):
        reads_a_value(*given)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (copies_to_the_cpu, "the host waits for .*_to_copy"),
        (has_a_learning_rate_on_the_cpu, "tensors on .*cpu"),
    ],
)
def test_a_copy_between_devices_goes_red(function: Callable, found: str) -> None:
    with graphs.fake_cuda():
        recorded = graphs.record(
            function, *problem(TINY, nm.Config(guard="full", **SHORT), device="cuda")
        )
    with pytest.raises(AssertionError, match=found):
        recorded.check(device="cuda")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (reduces_twice, r"1 all_reduce expected, found \['all_reduce', 'all_reduce'\]"),
        (reduces_parameters, "more than 4 int32"),
    ],
)
def test_a_second_or_a_large_collective_goes_red(function: Callable, found: str) -> None:
    with graphs.fake_ranks(2) as ranks:
        recorded = graphs.record(
            function, *problem(TINY, nm.Config(guard="full", **SHORT), ranks=ranks)
        )
    with pytest.raises(AssertionError, match=found):
        recorded.check(reductions=1, largest=2 * len(TINY))


def test_work_a_parameter_goes_red() -> None:
    def with_norms(params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan):
        norms = {name: (grad * grad).sum().sqrt().clamp(min=1e-8) for name, grad in grads.items()}
        return nm.update(
            params, {name: grad / norms[name] for name, grad in grads.items()}, state, hyper, plan
        )

    recorded = graphs.captured(with_norms, *problem(many(72, 3), nm.Config(guard="full")))
    with pytest.raises(AssertionError, match="nodes, 882 allowed"):
        recorded.check_size(parameters=72, buckets=3)


def test_a_learning_rate_that_is_a_python_float_goes_red() -> None:
    def with_float(
        params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan, lr: float
    ):
        return nm.update(params, grads, state, hyper._replace(lr=torch.full((), lr)), plan)

    given = problem(TINY, nm.Config(guard="full", **SHORT))
    with pytest.raises(TypeError, match="lr: expected a 0-d tensor"):  # the package takes none
        nm.update(*given._replace(hyper=given.hyper._replace(lr=0.02)))
    compiled = torch.compile(with_float, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    compiled(*given, 0.02)
    with pytest.raises(AssertionError, match=r"recompiled: [\s\S]*lr"), graphs.no_recompile():
        compiled(*given, 0.01)


@pytest.mark.parametrize("which", ["params", "grads", "state"])
def test_a_reordered_dict_goes_red(which: str) -> None:
    given = problem(TINY, nm.Config(guard="full", **SHORT))
    torch._dynamo.reset()
    compiled = torch.compile(nm.update, backend="eager", fullgraph=True, dynamic=False)
    compiled(*given)
    tensors = getattr(given, which)
    reordered = {name: tensors[name] for name in reversed(tensors)}
    with pytest.raises(AssertionError, match="recompiled: "), graphs.no_recompile():
        compiled(*given._replace(**{which: reordered}))


def test_a_copy_of_the_parameters_in_the_generated_code_goes_red() -> None:
    def with_copies(
        params: Tensors, grads: Tensors, state: Tensors, hyper: nm.Hyper, plan: nm.Plan
    ) -> nm.StepResult:
        return local_update_(copies(params), grads, state, hyper, plan)

    code = graphs.generated(with_copies, *problem(TINY, nm.Config(**SHORT)))
    with pytest.raises(AssertionError, match=r"written in the place of inputs: \['buf"):
        code.check_in_place(16)
