"""Fused projections that are convolutions: they step as the linear layer of the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.planning.layout import part_of
from normuon_fn.planning.reading import read_as_matrices
from normuon_fn.step import local_update_ as step_

# One shape of a convolution, the route of its matrix [rows, cols], and that route for the tensor.
CASES = {
    "one place": ((96, 32, 1, 1), nm.Route(splits=(32, 32, 32))),
    "one place of Conv1d": ((96, 32, 1), nm.Route(splits=(32, 48, 16))),
    "window": ((24, 4, 3, 3), nm.Route(splits=(12, 6, 6))),
    "heads": ((24, 4, 3, 3), nm.Route(heads=4)),
    "splits and heads": ((24, 4, 3), nm.Route(splits=(12, 6, 6), heads=(4, 2, 1))),
    "columns": ((32, 96, 1, 1), nm.Route(splits=(32, 64), dim=1, transposed=True)),
    "heads of columns": ((16, 24, 1), nm.Route(heads=3, dim=1)),
    "splits and heads of columns": ((8, 24, 1), nm.Route(splits=(16, 8), heads=(2, 1), dim=1)),
}
CONFIGS = {
    "default": nm.Config(),
    "short": nm.Config(reduction="short", guard="full"),
    "int8": nm.Config(momentum_dtype="int8"),
    "hyperball": nm.Config(weight_decay_form="hyperball"),
    "adamuon": nm.Config.preset("adamuon"),
}


def ran(shape: tuple[int, ...], route: nm.Route, config: nm.Config, steps: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    draw: Callable[[], dict[str, Tensor]] = lambda: {  # noqa: E731
        "w": torch.randn(shape, generator=generator)
    }
    params = draw()
    plan = nm.make_plan(params, config, routes={"w": route})
    state = nm.init(params, plan)
    hyper = nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        step_(params, draw(), state, hyper, plan)
    return params["w"], state


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_a_split_convolution_has_the_bits_of_the_linear_layer(case: str, form: str) -> None:
    shape, route = CASES[case]
    flat = (shape[0], torch.Size(shape[1:]).numel())
    expected, of_linear = ran(flat, route, CONFIGS[form])
    found, state = ran(shape, replace(route, flatten=True), CONFIGS[form])
    assert torch.equal(found.reshape(flat), expected)
    assert state.keys() == of_linear.keys()
    for name, x in state.items():
        same = x.shape == of_linear[name].shape or x.shape == shape
        assert same and torch.equal(x.reshape(of_linear[name].shape), of_linear[name]), name


def test_columns_of_a_window_are_counted_in_channels() -> None:
    """As of a transposed convolution, whose outputs are its second dimension."""
    shape, route = (8, 12, 2, 2), nm.Route(flatten=True, splits=(4, 8), dim=1, transposed=True)
    flat = nm.Route(splits=(16, 32), dim=1, transposed=True)
    expected, of_linear = ran((8, 48), flat, nm.Config())
    found, state = ran(shape, route, nm.Config())
    assert torch.equal(found.reshape(8, 48), expected)
    assert torch.equal(state["w.variance"], of_linear["w.variance"])


def test_sizes_that_do_not_fit_a_convolution_are_refused_by_name() -> None:
    params = {"w": torch.randn(96, 32, 1, 1)}
    with pytest.raises(ValueError, match=r"params\['w'\]: splits .* add up to 64, dimension 0 is"):
        nm.make_plan(params, routes={"w": nm.Route(flatten=True, splits=(32, 32))})
    with pytest.raises(ValueError, match=r"'w'.*96 along dimension 0 cannot be cut into 7 equal"):
        nm.make_plan(params, routes={"w": nm.Route(flatten=True, heads=7)})


@pytest.mark.parametrize("route", [nm.Route(splits=(32, 32, 32)), nm.Route(heads=3)])
def test_splits_of_a_window_without_flatten_name_the_route_to_write(route: nm.Route) -> None:
    with pytest.raises(ValueError, match=r"'w'.*write Route\(flatten=True, (splits|heads)="):
        nm.make_plan({"w": torch.randn(96, 32, 1, 1)}, routes={"w": route})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("along", [0, 1])
def test_shards_of_a_split_convolution_are_those_of_the_matrix(case: str, along: int) -> None:
    """Every rank's parts of the blocks, put where they say they lie, are the whole."""
    shape, route = CASES[case]
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    ranks = 2 if route.heads is None else 1
    for view, count, rows, cols in read_as_matrices("w", whole, replace(route, flatten=True)):
        found = torch.full((count, rows, cols), float("nan"))
        start = 0
        for piece in whole.tensor_split(ranks, along):
            spans = [(0, size) for size in piece.shape]
            spans[along] = (start, piece.shape[along])
            start += piece.shape[along]
            here, n, rect = part_of(view, count, rows, cols, spans)
            if n * rect.size:
                place = found[:, rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols]
                place.copy_(here.read(piece.contiguous()))
                assert torch.equal(here.restore(here.read(piece)), here._slice(piece))
        assert torch.equal(found, view.read(whole).reshape(found.shape))


def test_channels_last_filters_with_heads_step_as_contiguous_ones() -> None:
    route, runs = nm.Route(flatten=True, splits=(12, 12), heads=(3, 2)), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        params = {"w": torch.randn(24, 4, 3, 3).contiguous(memory_format=memory_format)}
        plan = nm.make_plan(params, routes={"w": route})
        state = nm.init(params, plan)
        grads = {"w": torch.randn(24, 4, 3, 3).contiguous(memory_format=memory_format)}
        step_(params, grads, state, nm.Hyper.of(params, lr=0.02), plan)
        runs.append(params["w"])
    assert torch.equal(*runs)


@pytest.mark.usefixtures("eager")
def test_the_optimizer_goes_on_from_a_checkpoint_of_a_split_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 24, 1)
    routes = {"weight": nm.Route(flatten=True, splits=(8, 8, 8))}
    first = nm.NorMuon(model, lr=0.02, routes=routes)
    grads = [torch.randn_like(model.weight) for _ in range(3)]

    def go(optimizer: Any, model: nn.Module, grads: list[Tensor]) -> None:
        for grad in grads:
            model.weight.grad = grad.clone()  # type: ignore[assignment]
            model.bias.grad = torch.ones(24)  # type: ignore[assignment]
            optimizer.step()

    go(first, model, grads[:1])
    other = copy.deepcopy(model)
    second = nm.NorMuon(other, lr=0.02, routes=routes)
    second.load_state_dict(first.state_dict())
    go(first, model, grads[1:])
    go(second, other, grads[1:])
    assert torch.equal(model.weight, other.weight)


@pytest.mark.usefixtures("without_inductor")
def test_a_graph_of_a_split_convolution_has_the_bits_of_the_eager_step() -> None:
    shape, route = CASES["splits and heads"]
    route = replace(route, flatten=True)
    expected, _ = ran(shape, route, nm.Config())
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(shape, generator=generator)}
    plan = nm.make_plan(params, routes={"w": route})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for _ in range(2):
        nm.step_(params, {"w": torch.randn(shape, generator=generator)}, state, hyper, plan)
    assert torch.equal(params["w"], expected)


def test_foreach_steps_a_split_convolution_as_the_step_does() -> None:
    shape, route = CASES["one place"]
    route = replace(route, flatten=True)
    expected, _ = ran(shape, route, nm.Config(), steps=1)
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(shape, generator=generator)}
    state = nm.init(params, nm.make_plan(params, routes={"w": route}))
    nm.foreach_step_(
        [params["w"]],
        [torch.randn(shape, generator=generator)],
        [state["w.momentum"]],
        [state["w.variance"]],
        lr=0.02,
        momentum=0.95,
        beta2=0.95,
        compiled=False,
        weight_decay=0.1,
        config=nm.Config(),
        routes=[route],
    )
    assert torch.equal(params["w"], expected)
