"""An optimizer takes no state that its own options or routes would read as something else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.persistence.meaning import FORM
from tests.optim.saved_state import WAYS, by_name, differing, hand_over

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
Routes = dict[str, nm.Route] | None


def net(seed: int = 0) -> nn.Sequential:
    """Square matrices, of which no shape tells how they are read; and biases, which AdamW steps."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def made(
    model: nn.Module, config: nm.Config | None = None, routes: Routes = None, *, named: bool = True
) -> Any:
    params = [*model.named_parameters()] if named else [*model.parameters()]
    given: Any = {"routes": routes} if named else {"routes": nm.routes_for(model)}
    return nm.NorMuon(params, lr=0.01, config=config, **given)


def trained(config: nm.Config | None = None, routes: Routes = None) -> tuple[nn.Module, Any]:
    model = net()
    optimizer = made(model, config, routes)
    for k in range(2):
        step(model, optimizer, k)
    return model, optimizer


def step(model: nn.Module, optimizer: Any, k: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(k))).square().mean().backward()
    optimizer.step()


OTHER_MEANINGS: list[tuple[Any, Any, Any, Any, str]] = [
    # the config and the routes that it was saved with, those of the optimizer, what is said
    (
        nm.Config(momentum_form="sum"), None, None, None,
        r"Config.momentum_form was 'sum', is 'ema': write Config\(momentum_form='sum'\)",
    ),
    (
        None, None, nm.Config(momentum_form="sum"), None,
        r"Config.momentum_form was 'ema', is 'sum': write Config\(momentum_form='ema'\)",
    ),
    (
        nm.Config(momentum_form="sum", momentum_dtype="int8"), None, nm.Config(), None,
        "Config.momentum_form was 'sum'",
    ),
    (
        None, None, nm.Config(reduction="short"), None,
        r"Config.reduction was 'rows', is 'short': write Config\(reduction='rows'\)",
    ),
    (
        None, None, nm.Config(reduction="entries"), None,
        r"Config.reduction was 'rows', is 'entries': write Config\(reduction='rows'\)",
    ),
    (
        nm.Config(reduction="entries"), None, None, None,
        r"Config.reduction was 'entries', is 'rows': write Config\(reduction='entries'\)",
    ),
    (
        nm.Config(normalize=False), None, None, None,
        r"Config.normalize was False, is True: write Config\(normalize=False\)",
    ),
    (
        None, None, nm.Config(normalize=False), None,
        r"Config.normalize was True, is False: write Config\(normalize=True\)",
    ),
    (
        nm.Config(other="lion"), None, None, None,
        r"Config.other was 'lion', is 'adamw': write Config\(other='lion'\)",
    ),
    (
        None, None, nm.Config(other="lion"), None,
        r"Config.other was 'adamw', is 'lion': write Config\(other='adamw'\)",
    ),
    (
        None, {"0.weight": nm.Route(heads=2)}, None, {"0.weight": nm.Route(heads=4)},
        r"the route of '0.weight' had heads=2, has 4: write Route\(heads=2\)",
    ),
    (
        None, None, None, {"1.weight": nm.Route(heads=4)},
        r"the route of '1.weight' had heads=None, has 4",
    ),
    (
        None, {"1.weight": nm.Route(splits=(2, 6))}, None, {"1.weight": nm.Route(splits=(6, 2))},
        r"the route of '1.weight' had splits=\(2, 6\), has \(6, 2\)",
    ),
    (
        None, {"0.weight": nm.Route(heads=2)}, None, {"0.weight": nm.Route(heads=2, dim=1)},
        "the route of '0.weight' had dim=0, has 1",
    ),
    (
        None, None, None, {"0.weight": nm.Route(transposed=True)},
        "the route of '0.weight' had transposed=False, has True",
    ),
    (
        None, None, None, {"0.weight": nm.Route("adamw")},
        r"for '0.weight', got .*'momentum'.* Then give it the Route\('normuon'\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("how", ["load_state_dict", "load"])
def test_another_width_is_told_by_shapes_and_not_by_the_splits_that_follow_them(
    how: str, tmp_path: Path
) -> None:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_heads, self.qkv = 2, nn.Linear(width, 3 * width)

    wide, narrow = Attention(8), Attention(4)
    assert nm.routes_for(wide)["qkv.weight"].splits == (8, 8, 8)
    first, text = (
        made(wide, routes=nm.routes_for(wide)),
        r"other shapes: .*qkv\.weight.*: expected shape \(12, 4\), got \(24, 8\)",
    )
    for p in wide.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=text) as raised:
        if how == "load_state_dict":
            first.step()
            routes = nm.routes_for(narrow)
            made(narrow, routes=routes).load_state_dict(first.state_dict())
        else:
            plan, params = nm.make_plan(wide), dict(wide.named_parameters())
            nm.save(tmp_path / "run", params, nm.init(params, plan), plan)
            nm.load(tmp_path / "run", nm.make_plan(narrow))
    assert "splits" not in str(raised.value)


@pytest.mark.parametrize("case", range(len(OTHER_MEANINGS)))
def test_a_state_of_another_meaning_is_refused_by_name_and_nothing_is_written(case: int) -> None:
    config, routes, own, own_routes, message = OTHER_MEANINGS[case]
    saved = copy.deepcopy(trained(config, routes)[1].state_dict())
    model = net(1)
    into = made(model, own, own_routes)
    step(model, into, 5)
    before, rates = by_name(model, into), copy.deepcopy(into.state_dict()["param_groups"])
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=message):
        into.load_state_dict(saved)
    assert differing(by_name(model, into), before) == []
    assert into.state_dict()["param_groups"] == rates


@pytest.mark.parametrize("way", WAYS)
def test_torchs_own_functions_carry_the_meaning(way: str, tmp_path: Path) -> None:
    model, optimizer = trained(nm.Config(momentum_form="sum"), {"0.weight": nm.Route(heads=2)})
    other = net(1)
    for k, (config, routes, message) in enumerate(
        (
            (nm.Config(), {"0.weight": nm.Route(heads=2)}, "Config.momentum_form was 'sum'"),
            (
                optimizer.config,
                {"0.weight": nm.Route(heads=4)},
                "the route of '0.weight' had heads=2",
            ),
        )
    ):
        into = made(other, config, routes)
        with pytest.raises(ValueError, match=message):
            hand_over(way, tmp_path / str(k), model, optimizer, other, into)
    into = made(other, optimizer.config, {"0.weight": nm.Route(heads=2)})
    hand_over(way, tmp_path, model, optimizer, other, into)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_routes_are_told_by_place_where_there_are_no_names_and_behind_prefixes() -> None:
    model, optimizer = trained(None, {"1.weight": nm.Route(heads=2)})
    saved = copy.deepcopy(optimizer.state_dict())
    wrapped = nn.ModuleDict({"inner": net(1)})
    same = made(wrapped, None, {"inner.1.weight": nm.Route(heads=2)})
    same.load_state_dict(saved)
    assert torch.equal(
        same.state[wrapped["inner"][1].weight]["variance"],
        optimizer.state[model[1].weight]["variance"],
    )
    with pytest.raises(ValueError, match=r"route of 'inner.1.weight' had heads=2, has None"):
        made(nn.ModuleDict({"inner": net(1)})).load_state_dict(saved)
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match=r"route of '1.weight' had heads=2, has None"):
        made(net(1), named=False).load_state_dict(saved)


def test_what_does_not_touch_the_state_is_said_once_and_loaded() -> None:
    model, optimizer = trained(nm.Config(nesterov=True))
    other = net(1)
    into = made(other, nm.Config(guard="full"))
    with pytest.warns(UserWarning, match="was saved with another configuration") as seen:
        into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(seen) == 1 and seen[0].filename == __file__
    for part in ("Config.nesterov was True, is False", "Config.guard was 'off', is 'full'"):
        assert part in str(seen[0].message)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_options_of_a_rule_that_no_parameter_has_change_no_meaning() -> None:
    def only(rule: str, **options: Any) -> Any:
        routes = {"*": nm.Route(rule)}  # type: ignore[arg-type]
        return nm.NorMuon(
            [("w", nn.Parameter(torch.ones(4, 4)))], config=nm.Config(**options), routes=routes
        )

    for rule, options in (("normuon", {"other": "lion"}), ("adamw", {"momentum_form": "sum"})):
        with pytest.warns(UserWarning, match="was saved with another configuration"):
            only(rule).load_state_dict(only(rule, **options).state_dict())


def test_a_saved_state_that_does_not_tell_its_meaning_is_taken_with_one_warning() -> None:
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[FORM]
    other = net(1)
    into = made(other)
    with pytest.warns(UserWarning, match="does not tell with which options") as seen:
        into.load_state_dict(saved)
    assert len(seen) == 1
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    # What the tensors tell is still refused by the name of the option.
    for config, message in (
        (nm.Config(reduction="entries"), r"Config\(reduction='rows'\)"),
        (nm.Config(normalize=False), r"Config\(normalize=True\)"),
        (nm.Config(other="lion"), r"Config\(other='adamw'\)"),
    ):
        with (
            pytest.warns(UserWarning, match="does not tell with which options"),
            pytest.raises(ValueError, match=message),
        ):
            made(net(1), config).load_state_dict(saved)


@pytest.mark.parametrize("text", ["", "[]", '{"config": 1, "routes": {}}', "{", 7])
def test_a_damaged_description_is_refused(text: Any) -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][FORM] = text
    with pytest.raises(ValueError, match=f"group 0: {FORM}"):
        made(net(1)).load_state_dict(saved)


def test_the_description_has_what_is_not_the_default_alone_and_survives_loading() -> None:
    _, optimizer = trained(nm.Config(momentum_form="sum"), {"0.weight": nm.Route(heads=2)})
    (group,) = optimizer.param_groups
    assert json.loads(group[FORM]) == {
        "config": {"momentum_form": "'sum'"},
        "routes": {"0": {"heads": "2"}},
    }
    into = made(net(1), nm.Config(momentum_form="sum", steps=6), {"0.weight": nm.Route(heads=2)})
    with pytest.warns(UserWarning, match="Config.steps was 5, is 6"):
        into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert json.loads(into.param_groups[0][FORM])["config"] == {
        "momentum_form": "'sum'", "steps": "6",
    }  # fmt: skip
