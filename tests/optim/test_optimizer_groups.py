"""Groups of `NorMuon`: parameters keep their names, a wrong group is refused without effect."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import normuon_fn as nm
from tests.optim.test_optimizer import Net, everything, same, split, states, three, train, weights

pytestmark = pytest.mark.usefixtures("eager")


def named(optimizer: nm.NorMuon) -> dict[str, Tensor]:
    return dict(optimizer._settled().named)


# --- names


@pytest.mark.parametrize("with_names", [True, False])
def test_a_parameter_that_is_removed_takes_no_other_ones_name_with_it(with_names: bool) -> None:
    model, other = Net(), Net()
    results = []
    for net, removed in ((model, True), (other, False)):
        params: Any = everything(net) if with_names else [p for _, p in everything(net)]
        up = "up.weight" if with_names else "groups.0.0"
        square = "square.weight" if with_names else "groups.0.2"
        embedding = "embed.weight" if with_names else "groups.0.3"
        slower = {square: nm.Route("normuon", lr_mul=0.1), up: nm.Route("normuon", lr_mul=0.5)}
        others = {} if with_names else {"groups.0.1": nm.Route(), embedding: nm.Route("adamw")}
        optimizer = nm.NorMuon(params, lr=0.02, routes=slower | others)
        train(net, optimizer, range(2))
        optimizer._routes = {
            square: nm.Route(lr_mul=0.1)
        }  # a route of the one that is gone would match nothing
        net.up.weight.requires_grad_(False)
        net.up.weight.grad = None
        if removed:
            group = optimizer.param_groups[0]
            group["params"].pop(0)
            names = named(optimizer)
            assert names[square] is net.square.weight and up not in names
            assert group.get("param_names") == (list(names) if with_names else None)
            train(net, optimizer, range(2, 4))
            assert optimizer.plan is not None
            assert {p.name: p.route.lr_mul for p in optimizer.plan.parameters}[square] == 0.1
        else:
            train(net, optimizer, range(2, 4))
        results.append(weights(net))
    assert same(*results)


def test_a_parameter_that_moves_to_another_group_keeps_its_name_and_takes_its_values() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(1))
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].insert(0, moved)
    train(model, optimizer, range(1, 2))
    assert (
        named(optimizer)["up.weight"] is model.up.weight
        and optimizer._planner.group_of["up.weight"] == 1
    )
    assert int(optimizer.state[model.up.weight]["step"]) == 2


def test_a_parameter_put_in_by_hand_is_refused_and_one_that_replaces_another_takes_its_name() -> (
    None
):
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(1))
    new = nn.Parameter(torch.ones(5, 6))
    params = optimizer.param_groups[1]["params"]
    for broken in ([*params, new], [*params[1:], new]):
        optimizer.param_groups[1]["params"] = broken
        with pytest.raises(
            ValueError, match=r"param_groups\[1\]: parameter \d, of shape \(5, 6\).*add_param_group"
        ):
            optimizer.step()
    optimizer.param_groups[1]["params"] = [params[0], new]
    assert named(optimizer)["square.weight"] is new
    optimizer.param_groups[1]["params"] = [
        nn.Parameter(torch.ones(6, 12)),
        nn.Parameter(torch.ones(6, 6)),
    ]
    assert named(optimizer)["square.weight"] is optimizer.param_groups[1]["params"][1]
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match="param_groups: 3 were added, 2 are there"):
        optimizer.step()


def test_names_stay_with_their_parameters_in_a_copy() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    optimizer.param_groups[1]["params"].pop(0)
    net, twin = copy.deepcopy((model, optimizer))
    assert named(twin)["square.weight"] is net.square.weight and "down.weight" not in named(twin)


# --- values


def test_a_key_that_asks_for_what_a_group_cannot_give_is_refused() -> None:
    model = Net()
    cases: list[tuple[str, Any, str]] = [
        ("maximize", True, "negate the loss"),
        ("amsgrad", True, "there is none"),
        ("beta1", 0.9, "adamw_betas"),
        ("epsilon", 1e-8, "adamw_eps"),
        ("adjust_lr", "rms_norm", r"Config\(scale="),
        ("adjust_lr_fn", "original", r"Config\(scale="),
        ("ns_steps", 5, r"Config\(steps="),
        ("ns_coefficients", (1.0, 2.0, 3.0), r"Config\(coefficients="),
        ("cautious_wd", True, "'cautious'"),
        ("flatten", True, r"Route\(flatten=True\)"),
    ]
    for key, value, message in cases:
        with pytest.raises(TypeError, match=f"param_group: {key}=.*{message}"):
            nm.NorMuon([{"params": list(model.named_parameters()), key: value}])
    matrices, rest = split(model)
    for key, value in (("beta2", 0.999), ("momentum", 0.9)):
        with pytest.raises(
            TypeError, match=f"'{key}' is for matrices; with algorithm='adamw' write adamw_betas"
        ):
            nm.NorMuon([{"params": matrices}, {"params": rest, "algorithm": "adamw", key: value}])


def test_keys_that_ask_for_nothing_and_those_that_come_later_are_left_alone() -> None:
    model = Net()
    nothing = {
        "maximize": False,
        "foreach": None,
        "fused": None,
        "capturable": False,
        "differentiable": False,
    }
    extra = {
        "amsgrad": False,
        "initial_lr": 0.1,
        "swa_lr": 0.05,
        "adjust_lr_fn": None,
        "cautious_wd": False,
    }
    groups = [{**group, **nothing, **extra} for group in three(model)]
    optimizer = nm.NorMuon(groups)
    lr_scheduler.OneCycleLR(optimizer, 0.1, 20)  # which cycles the momentum of all groups
    train(model, optimizer, range(1))
    again = nm.NorMuon(three(Net()))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[2]["momentum"] == optimizer.param_groups[2]["momentum"]
    other = Net()  # all keys of another NorMuon's groups, with the defaults
    given = [
        {**group, "params": rest}
        for group, rest in zip(nm.NorMuon(three(model)).param_groups, split(other), strict=False)
    ]
    assert (
        len(
            nm.NorMuon(
                [{k: v for k, v in group.items() if k != "param_names"} for group in given]
            ).param_groups
        )
        == 2
    )


def test_numbers_of_numpy_are_taken_as_floats_and_what_float32_cannot_hold_is_refused() -> None:
    model, other = Net(), Net()
    betas: Any = (np.float32(0.5), np.float64(0.75))
    optimizer = nm.NorMuon(model.named_parameters(), lr=np.float32(0.25), adamw_betas=betas)  # type: ignore[arg-type]
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0][
        "adamw_betas"
    ] == (0.5, 0.75)
    train(model, optimizer, range(2))
    train(other, nm.NorMuon(other.named_parameters(), lr=0.25, adamw_betas=(0.5, 0.75)), range(2))
    assert same(weights(model), weights(other))
    for bad in (1e39, float("nan"), np.float32("inf")):
        with pytest.raises(ValueError, match="lr: expected a finite number >= 0"):
            nm.NorMuon(model.named_parameters(), lr=bad)
    with pytest.raises(TypeError, match="lr: expected a Python number"):
        nm.NorMuon(model.named_parameters(), lr=True)


def test_an_algorithm_that_is_changed_after_the_construction_is_refused_by_group() -> None:
    model = Net()
    optimizer = nm.NorMuon(three(model))
    train(model, optimizer, range(1))
    optimizer.param_groups[1]["algorithm"] = "adamw"
    before = weights(model)
    with pytest.raises(
        ValueError,
        match=r"param_groups\[1\]: algorithm was 'normuon' when it was added, is 'adamw'",
    ):
        train(model, optimizer, range(1, 2))
    assert same(weights(model), before)
    optimizer.param_groups[1]["algorithm"] = "normuon"
    train(model, optimizer, range(1, 2))
    assert int(states(optimizer)["0.step"]) == 2


def test_a_group_that_fails_in_any_way_leaves_the_optimizer_as_it_was() -> None:
    def predicate(name: str, p: Tensor) -> bool:
        return p.nothing  # type: ignore[attr-defined,no-any-return]

    model, other = Net(), Net()
    optimizer = nm.NorMuon(split(model)[0], lr=0.02)
    train(model, optimizer, range(2))
    with pytest.raises(AttributeError):
        optimizer.add_param_group(
            {"params": split(model)[1], "routes": {predicate: nm.Route("adamw")}}
        )
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2, 4))
    train(other, nm.NorMuon(split(other)[0], lr=0.02), range(4))
    assert same(weights(model), weights(other))


# --- routes


def routes_of(optimizer: nm.NorMuon) -> dict[str, nm.Route]:
    (stage,) = optimizer._planner.steps.values()
    return {p.name: p.route for p in stage.plan.parameters}


def test_a_group_with_adamw_keeps_the_multipliers_of_what_the_routes_give_adamw_too() -> None:
    model = Net()
    matrices, rest = split(model)
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw", "weight_decay": 0.1}]
    found = routes_of(nm.NorMuon(groups, routes=nm.routes_for(model, decay_vectors=False)))
    assert found["up.bias"] == nm.Route("adamw", wd_mul=0.0) and found["embed.weight"] == nm.Route(
        "adamw"
    )
    found = routes_of(
        nm.NorMuon(
            groups,
            routes={
                "*.bias": nm.Route("adamw", lr_mul=0.5),
                "embed*": nm.Route("normuon", lr_mul=0.5),
            },
        )
    )
    assert found["up.bias"] == nm.Route("adamw", lr_mul=0.5) and found["embed.weight"] == nm.Route(
        "adamw"
    )


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
@pytest.mark.parametrize("before_construction", [False, True])
def test_a_parameter_that_was_frozen_when_its_model_was_read_is_trained_once_it_is_unfrozen(
    algorithm: str, before_construction: bool
) -> None:
    model, other = Net(), Net()
    model.down.requires_grad_(False)
    table = nm.routes_for(model, decay_vectors=False)
    if before_construction:
        model.down.requires_grad_(True)
    group = {"params": list(model.named_parameters()), "algorithm": algorithm, "weight_decay": 0.5}
    optimizer = nm.NorMuon([group], lr=0.02, routes=table)
    model.down.requires_grad_(True)
    train(model, optimizer, range(3))
    whole = nm.routes_for(other, decay_vectors=False)
    group["params"] = list(other.named_parameters())
    train(other, nm.NorMuon([group], lr=0.02, routes=whole), range(3))
    assert same(weights(model), weights(other)) and not torch.equal(
        model.down.weight, Net().down.weight
    )


def test_a_key_that_no_step_reads_is_said_once_when_it_is_written_by_hand() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = nm.NorMuon(
        [{"params": m.parameters(), "algorithm": "adamw", "name": "own"} for m in (first, second)]
    )
    lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False)

    def step() -> list[str]:
        for p in (*first.parameters(), *second.parameters()):
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        assert {w.filename for w in seen} <= {__file__}
        return [str(w.message) for w in seen]

    assert step() == []
    optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    optimizer.param_groups[1]["weight_decy"] = 0.1
    optimizer.param_groups[1]["maximize"] = False  # asks for nothing
    (text,) = step()
    assert "param_groups[0]: 'betas' is called 'adamw_betas' here" in text
    assert "param_groups[1]: there is no key 'weight_decy'; did you mean 'weight_decay'?" in text
    assert "maximize" not in text and step() == []
    optimizer.param_groups[0]["guard"] = "full"
    (text,) = step()
    assert "'guard' is the same for all groups" in text and "betas" not in text
