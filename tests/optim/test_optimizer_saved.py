"""A saved state goes to the parameter that has its name, and a saved rate to its group.

Beside torch.optim.AdamW wherever torch's own functions carry the state.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.optim import lr_scheduler

import normuon_fn as nm
from tests.optim.saved_state import WAYS, by_name, differing, hand_over, regrouped

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "NorMuon": nm.NorMuon,
    "AdamW": torch.optim.AdamW,
}
both = pytest.mark.parametrize("kind", OPTIMIZERS)


def net(seed: int = 0, width: int = 6) -> nn.Sequential:
    """Layers of one shape, so that nothing but a name tells their states from each other."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> None:
    for k in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(k))
        model(x).square().mean().backward()
        optimizer.step()


def trained(kind: str = "NorMuon", groups: Any = None) -> tuple[nn.Module, Any]:
    model = net()
    optimizer: Any = OPTIMIZERS[kind](regrouped(model, other=False) if groups is None else groups)
    train(model, optimizer)
    return model, optimizer


def one_group(
    model: nn.Module, rename: Callable[[str], str] = str, order: int = 1, **values: Any
) -> Any:
    named = [(rename(name), p) for name, p in model.named_parameters()]
    return nm.NorMuon(named[::order], **values)


# --- parameters in another order, through torch's own functions


@both
@pytest.mark.parametrize("way", WAYS)
def test_parameters_in_another_order_get_their_own_state_and_rate(
    way: str, kind: str, tmp_path: Path
) -> None:
    model, optimizer = trained(kind)
    other = net(1)
    into = OPTIMIZERS[kind](regrouped(other, other=True, lr=(0.1, 0.1)))
    hand_over(way, tmp_path, model, optimizer, other, into)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


@both
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_without_names_goes_by_the_order_of_torchs_functions(
    way: str, kind: str, tmp_path: Path
) -> None:
    def nameless(model: nn.Module, other: bool) -> Any:
        groups = regrouped(model, other=other)
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
        given: Any = {"routes": nm.routes_for(model)} if kind == "NorMuon" else {}
        return OPTIMIZERS[kind](groups, **given)

    model, other = net(), net(1)
    optimizer, into = nameless(model, False), nameless(other, True)
    train(model, optimizer)
    hand_over(way, tmp_path, model, optimizer, other, into)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


@both
def test_a_group_that_is_flattened_and_set_as_several_gives_each_its_values(kind: str) -> None:
    model = net()
    optimizer: Any = OPTIMIZERS[kind](list(model.named_parameters()), lr=0.25)
    train(model, optimizer)
    other = net(1)
    into: Any = OPTIMIZERS[kind](regrouped(other, other=True))
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer, options=options))
    dsd.set_optimizer_state_dict(other, into, saved, options=options)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_a_group_for_which_torch_keeps_no_values_is_refused() -> None:
    model = net()
    optimizer = nm.NorMuon(list(model.named_parameters()), lr=0.25)
    train(model, optimizer)
    other = net(1)
    into = nm.NorMuon(regrouped(other, other=False))
    before = by_name(other, into)
    with pytest.raises(ValueError, match=r"group 0 .*has no values.*flatten_optimizer_state_dict"):
        dsd.set_optimizer_state_dict(
            other, into, copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer))
        )
    assert differing(by_name(other, into), before) == []


@pytest.mark.parametrize("flat", [False, True])
def test_groups_that_torch_puts_into_one_say_whose_values_are_lost(flat: bool) -> None:
    model, optimizer = trained()
    other = net(1)
    into = nm.NorMuon(list(other.named_parameters()))
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer, options=options))
    with pytest.warns(UserWarning, match=r"group 0 gets the values that .* had. What .* is lost"):
        dsd.set_optimizer_state_dict(other, into, saved, options=options)
    changed = differing(by_name(model, optimizer), by_name(other, into))
    assert changed and all(entry.endswith(".lr") for entry in changed)


@both
def test_a_parameter_that_the_saved_model_did_not_have_starts_anew_if_torch_is_told_so(
    kind: str,
) -> None:
    model = net()
    optimizer: Any = OPTIMIZERS[kind](list(model.named_parameters()), lr=0.25)
    train(model, optimizer)
    other = nn.Sequential(*net(1), nn.Linear(6, 6))
    into: Any = OPTIMIZERS[kind](list(other.named_parameters())[::-1])
    saved = copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer))
    options = dsd.StateDictOptions(strict=False)
    dsd.set_optimizer_state_dict(other, into, saved, options=options)  # and nothing warns
    found = by_name(other, into)
    assert (
        differing(by_name(model, optimizer), {n: found[n] for n in by_name(model, optimizer)}) == []
    )
    assert not any(bool(x.any()) for x in into.state.get(other[3].weight, {}).values() if x.ndim)


@both
def test_a_compiled_and_wrapped_model_is_found_by_the_names_inside(kind: str) -> None:
    model, optimizer = trained(kind)
    other = net(1)
    wrapped = torch.compile(other)
    into: Any = OPTIMIZERS[kind](regrouped(other, other=True, lr=(0.1, 0.1)))
    for group in into.param_groups:
        group["param_names"] = [f"_orig_mod.{name}" for name in group["param_names"]]
    dsd.set_optimizer_state_dict(
        wrapped, into, copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer))
    )
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


# --- names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".", "._checkpoint_wrapped_module.", 1),
        lambda name: name.replace("2.", "2._orig_mod.", 1),
        lambda name: f"model.{name}",
        lambda name: f"module.model.{name}",
    ],
    ids=["DDP", "compiled", "both", "checkpointed", "one layer", "a part", "a part of DDP"],
)
@pytest.mark.parametrize("saved_wrapped", [True, False])
def test_a_prefix_is_no_other_name_whatever_the_order(
    rename: Callable[[str], str], saved_wrapped: bool
) -> None:
    model, other = net(), net(1)
    optimizer = one_group(model, rename if saved_wrapped else str)
    into = one_group(other, str if saved_wrapped else rename, -1)
    train(model, optimizer)
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_are_not_the_same_are_an_error_that_lists_both_sides(order: int) -> None:
    model, other = net(), net(1)
    optimizer, into = one_group(model), one_group(other, lambda n: n.replace("2.", "3."), order)
    train(model, optimizer)
    before = by_name(other, into)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="its parameters have other names") as error:
        into.load_state_dict(saved)
    assert (
        "Only in this optimizer: ['3.bias', '3.weight']. "
        "Only in the state_dict: ['2.bias', '2.weight']" in str(error.value)
    )
    assert differing(by_name(other, into), before) == []
    (group,) = saved["param_groups"]  # what the message says to write
    group["param_names"] = [name.replace("2.", "3.") for name in group["param_names"]]
    into.load_state_dict(saved)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_without_names_on_one_side_the_order_counts_and_shapes_must_fit() -> None:
    model, other = net(), net(1)
    optimizer, into = one_group(model), one_group(other, lambda n: n.replace("2.", "3."))
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["param_names"]  # as the message says
    into.load_state_dict(saved)
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    turned = one_group(net(1), order=-1)
    with pytest.raises(ValueError, match=r"other shapes: .*: expected shape"):
        turned.load_state_dict(saved)


@pytest.mark.parametrize("more", ["in the optimizer", "in the state_dict"])
def test_fewer_or_more_parameters_are_refused_by_name(more: str) -> None:
    large, small = nn.Sequential(*net(), nn.Linear(6, 6)), net()
    saver, loader = (small, large) if more == "in the optimizer" else (large, small)
    optimizer, into = one_group(saver), one_group(loader)
    train(saver, optimizer)
    with pytest.raises(ValueError, match=r"\['3.bias', '3.weight'\]"):
        into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    adam, other = (torch.optim.AdamW(list(m.named_parameters())) for m in (saver, loader))
    with pytest.raises(ValueError, match="the size of optimizer's group"):
        other.load_state_dict(adam.state_dict())


def test_a_state_dict_that_does_not_tell_its_parameters_apart_is_refused() -> None:
    model, optimizer = trained()
    good, before = copy.deepcopy(optimizer.state_dict()), by_name(model, optimizer)
    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda d: d["param_groups"][1].update(params=[0, 1]), r"\[0, 1\] more than once"),
        (
            lambda d: d["param_groups"][1].update(param_names=["0.weight", "2.bias"]),
            r"'param_names' has \['0.weight'\] more than once",
        ),
        (lambda d: d["param_groups"][1]["param_names"].pop(), "2 parameters and 1 names"),
        (lambda d: d["state"].update({9: {}}), r"entries for \[9\], which are in no group"),
        (lambda d: d["state"][1]["step"].add_(1), "step is 3 for '0.weight' and 4 for '0.bias'"),
    ]
    for change, message in cases:
        given = copy.deepcopy(good)
        for kept in given["state"].values():
            kept["skipped"].fill_(7)
        change(given)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(given)
        assert differing(by_name(model, optimizer), before) == [], message


# --- groups


def test_groups_in_another_order_keep_their_own_values() -> None:
    model, optimizer = trained()
    other = net(1)
    into = nm.NorMuon(regrouped(other, other=True, lr=(0.1, 0.1)))
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in into.param_groups] == [0.01, 0.5]
    assert into.param_groups[0]["param_names"] == ["2.bias", "2.weight"]
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_a_group_that_was_split_gives_its_values_to_both_parts() -> None:
    model, other = net(), net(1)
    optimizer = one_group(model, lr=0.25)
    train(model, optimizer)
    into = nm.NorMuon(regrouped(other, other=True))
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_groups_that_became_one_are_taken_if_their_values_are_equal() -> None:
    model = net()
    optimizer = nm.NorMuon(regrouped(model, other=False, lr=(0.25, 0.25)))
    train(model, optimizer)
    other = net(1)
    into = one_group(other)
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    optimizer.param_groups[1]["lr"] = 0.5
    state_dict = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=r"lr was 0.25 for '0.weight' and 0.5 for '2.weight'"
    ) as said:
        into.load_state_dict(state_dict)
    lines = str(said.value).partition(":\n")[2]
    exec("\n".join(line.strip() for line in lines.splitlines()), {"state_dict": state_dict})
    into.load_state_dict(state_dict)
    assert into.param_groups[0]["lr"] == 0.25


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")
@pytest.mark.parametrize("kind", ["CosineAnnealingLR", "LambdaLR", "StepLR"])
def test_a_scheduler_made_anew_for_other_groups_goes_on_as_the_guide_says(kind: str) -> None:
    def schedule(optimizer: Any) -> Any:
        if kind == "LambdaLR":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
        numbers = {"CosineAnnealingLR": {"T_max": 20}, "StepLR": {"step_size": 2}}[kind]
        return getattr(torch.optim.lr_scheduler, kind)(optimizer, **numbers)

    model, other = net(), net(1)
    optimizer = nm.NorMuon(regrouped(model, other=False, lr=(0.25, 0.25)))
    old = schedule(optimizer)
    for _ in range(5):
        train(model, optimizer, range(1))
        old.step()
    into = one_group(other)
    into.param_groups[0]["lr"] = 0.25  # the old peak
    new = schedule(into)
    for _ in range(5):
        new.step()
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert into.param_groups[0]["lr"] == pytest.approx(
            old.get_last_lr()[0], rel=1e-12
        )  # 0 seen
        train(model, optimizer, range(1))
        old.step()
        new.step()


def test_names_that_are_written_into_a_saved_state_let_groups_differ() -> None:
    model = net()
    parts = [{"params": [p for p in model.parameters() if (p.ndim > 1) == on]} for on in (1, 0)]
    optimizer = nm.NorMuon(parts, routes=nm.routes_for(model))
    train(model, optimizer)
    other = net(1)
    into, state_dict = one_group(other), optimizer.state_dict()
    with pytest.raises(ValueError, match=r"write the names into each saved group k"):
        into.load_state_dict(state_dict)
    for k, on in enumerate((1, 0)):
        names = [name for name, p in model.named_parameters() if (p.ndim > 1) == on]
        state_dict["param_groups"][k]["param_names"] = names
    into.load_state_dict(state_dict)
    for one, p in zip(model.parameters(), other.parameters(), strict=True):
        saved, loaded = optimizer.state[one], into.state[p]
        assert all(torch.equal(saved[kind], loaded[kind]) for kind in saved)


def test_a_group_that_is_added_and_then_loaded_is_found_by_name() -> None:
    model, optimizer = trained()
    other = net(1)
    last, first = regrouped(other, other=False)
    into = nm.NorMuon([first])
    into.add_param_group(last)
    into.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    train(model, optimizer, range(3, 5))
    other.load_state_dict(trained()[0].state_dict())
    train(other, into, range(3, 5))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_optimizer_saves_and_loads_by_name(how: Callable[[Any], Any]) -> None:
    model, optimizer = trained()
    again, twin = how((model, optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    assert differing(by_name(model, optimizer), by_name(again, twin)) == []
    train(again, twin, range(3, 5))
    for _ in range(2):  # loading twice is loading once
        twin.load_state_dict(saved)
        assert differing(by_name(model, optimizer), by_name(again, twin)) == []


# --- values that change after construction


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adamw_betas": (0.9,)}, r"\[1\]: adamw_betas: expected two numbers, got \(0.9,\)"),
        ({"adamw_betas": (0.9, 0.95, 0.99)}, r"\[1\]: adamw_betas: expected two numbers"),
        ({"adamw_betas": 0.9}, r"\[1\]: adamw_betas: expected two numbers"),
        ({"adamw_betas": (0.9, 1.5)}, r"\[1\]: adamw_betas: expected a number in"),
        ({"lr": torch.ones(2)}, r"\[1\]: lr: expected a number or a tensor of one element"),
        ({"lr": None}, r"\[1\]: lr: expected a Python number, got NoneType"),
        ("momentum", r"\[1\]: has no 'momentum' any more"),
    ],
)
def test_a_value_that_no_step_can_take_is_refused_by_name(change: Any, message: str) -> None:
    model, optimizer = trained()
    before = by_name(model, optimizer), copy.deepcopy(model.state_dict())
    group = optimizer.param_groups[1]
    good = dict(group)
    if isinstance(change, str):
        del group[change]
    else:
        group.update(change)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"param_groups" + message):
            train(model, optimizer, range(3, 4))
    group.update(good)
    assert differing(by_name(model, optimizer), before[0]) == []
    assert all(torch.equal(x, before[1][name]) for name, x in model.state_dict().items())
    train(model, optimizer, range(3, 4))
    other, plain = trained()
    train(other, plain, range(3, 4))
    assert differing(by_name(model, optimizer), by_name(other, plain)) == []


@both
def test_a_learning_rate_tensor_that_groups_share_drives_all_of_them(kind: str) -> None:
    """As with AdamW; ``foreach`` would refuse a tensor there."""
    moved = []
    for first, second in ((0.25, 0.25), (0.5, 0.125)):
        lr, model = torch.tensor(first), net()
        groups = regrouped(model, other=False)
        for group in groups:
            group["lr"] = lr
        given: Any = {"foreach": False} if kind == "AdamW" else {}
        optimizer = OPTIMIZERS[kind](groups, **given)
        lr.fill_(second)
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer, range(1))
        moved.append({name: x - before[name] for name, x in model.state_dict().items()})
    for name, first in moved[0].items():
        assert torch.allclose(first, 2 * moved[1][name], rtol=1e-5, atol=1e-7), name


def test_a_schedule_of_a_shared_learning_rate_tensor_moves_all_groups() -> None:
    lr, model = torch.tensor(0.5), net()
    groups = regrouped(model, other=False)
    optimizer = nm.NorMuon([{**group, "lr": lr} for group in groups])
    schedule = lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    train(model, optimizer, range(1))
    schedule.step()
    train(model, optimizer, range(1, 2))
    assert optimizer._planner is not None
    assert optimizer._planner.hyper.hyper.lr.tolist() == [0.25, 0.25]
    assert all(group["lr"] is lr for group in optimizer.param_groups)


def test_a_shared_tensor_is_filled_once_or_parted_with_a_warning_when_it_is_loaded() -> None:
    lr, model = torch.tensor(0.5), net()
    optimizer = nm.NorMuon([{**g, "lr": lr} for g in regrouped(model, other=False)])
    optimizer.param_groups[0]["adamw_betas"] = (torch.tensor(0.5), torch.tensor(0.25))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.125
    saved["param_groups"][0]["adamw_betas"] = (0.75, 0.875)
    beta = optimizer.param_groups[0]["adamw_betas"][0]
    optimizer.load_state_dict(saved)
    assert all(group["lr"] is lr for group in optimizer.param_groups) and float(lr) == 0.125
    assert optimizer.param_groups[0]["adamw_betas"][0] is beta and float(beta) == 0.75
    saved["param_groups"][1]["lr"] = 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="shares a tensor"):
            optimizer.load_state_dict(saved)
    assert float(lr) == 0.125  # nothing was written
    with pytest.warns(UserWarning, match=r"param_groups\[1\]\['lr'\] shares a tensor") as seen:
        optimizer.load_state_dict(saved)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.25]
    assert optimizer.param_groups[0]["lr"] is lr


# --- what others add to the state


class Lookahead:
    """What timm's wrapper does: slow weights in the state of the optimizer inside."""

    def __init__(self, inside: torch.optim.Optimizer, k: int = 2) -> None:
        self.inside, self.k, self.count = inside, k, 0
        self.param_groups, self.state = inside.param_groups, inside.state

    def zero_grad(self) -> None:
        self.inside.zero_grad()

    def step(self) -> None:
        self.inside.step()
        self.count += 1
        if self.count % self.k:
            return
        with torch.no_grad():
            for group in self.inside.param_groups:
                for p in group["params"]:
                    own = self.inside.state[p]
                    slow = own.setdefault("lookahead_slow_buff", p.detach().clone())
                    slow.add_(p - slow, alpha=0.5)
                    p.copy_(slow)


@both
def test_slow_weights_that_a_wrapper_keeps_in_the_state_are_saved_and_loaded(kind: str) -> None:
    runs = []
    for stops in (False, True):
        model = net()
        outer: Any = Lookahead(OPTIMIZERS[kind](regrouped(model, other=False)))
        train(model, outer, range(4))
        if stops:
            saved = copy.deepcopy((model.state_dict(), outer.inside.state_dict()))
            model = net(1)
            outer = Lookahead(OPTIMIZERS[kind](regrouped(model, other=False)))
            model.load_state_dict(saved[0])
            outer.inside.load_state_dict(saved[1])
        train(model, outer, range(4, 8))
        runs.append((model, outer.inside))
    (model, optimizer), (other, into) = runs
    assert "lookahead_slow_buff" in optimizer.state[next(model.parameters())]
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


@both
def test_anything_that_is_added_to_the_state_comes_back_as_a_copy(kind: str) -> None:
    model, optimizer = trained(kind)
    first, second = list(model.parameters())[:2]
    optimizer.state[first].update(count=3, nested={"x": [torch.ones(2), None]})
    if kind == "NorMuon":  # AdamW makes a generator of a string
        optimizer.state[first]["name"] = "a"
    optimizer.state["of nobody"] = {"calls": 5}
    saved = optimizer.state_dict()
    other = net(1)
    into: Any = OPTIMIZERS[kind](regrouped(other, other=False))
    train(other, into, range(1))
    into.state[list(other.parameters())[1]]["mine"] = torch.ones(1)
    into.load_state_dict(saved)
    kept = into.state[next(other.parameters())]
    assert kept["count"] == 3 and kept["nested"]["x"][1] is None
    assert kind == "AdamW" or kept["name"] == "a"
    assert torch.equal(kept["nested"]["x"][0], torch.ones(2))
    if kind == "NorMuon":
        assert kept["nested"]["x"][0] is not optimizer.state[first]["nested"]["x"][0]
    assert into.state["of nobody"] == {"calls": 5}
    assert into.state[list(other.parameters())[1]].keys() == optimizer.state[second].keys()
    train(other, into, range(3, 4))


def test_a_state_of_another_config_is_still_refused() -> None:
    _, optimizer = trained()
    model = net().bfloat16()
    masters = nm.NorMuon(list(model.named_parameters()), config=nm.Config(master="fp32"))
    saved = copy.deepcopy(masters.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    into = one_group(net())
    with (
        pytest.warns(UserWarning, match="Config.master was 'fp32', is 'none'"),
        pytest.raises(
            ValueError, match=r"'master'.*another config\? Then write Config\(master='fp32"
        ),
    ):
        into.load_state_dict(saved)
    assert all(
        torch.equal(x, optimizer.state_dict()["state"][k][kind])
        for k, kinds in before["state"].items()
        for kind, x in kinds.items()
    )


# --- counters, and files that take a tensor once


def test_the_state_goes_through_safetensors(tmp_path: Path) -> None:
    model, optimizer = trained()
    saved = optimizer.state_dict()
    flat = {f"{k}/{kind}": x for k, kinds in saved["state"].items() for kind, x in kinds.items()}
    save_file(flat, tmp_path / "state.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in load_file(tmp_path / "state.safetensors").items():
        k, kind = key.split("/")
        state.setdefault(int(k), {})[kind] = x
    other = net(1)
    into = nm.NorMuon(regrouped(other, other=False))
    into.load_state_dict({**saved, "state": state})
    assert differing(by_name(model, optimizer), by_name(other, into)) == []


def test_what_is_written_into_a_saved_state_in_place_is_what_the_next_step_uses() -> None:
    """As `torch.distributed.checkpoint.load` writes, also where nobody calls `load_state_dict`."""
    model, optimizer = trained()
    other = net(1)
    into = nm.NorMuon(regrouped(other, other=False))
    for k, kinds in into.state_dict()["state"].items():
        for kind, x in kinds.items():
            x.copy_(optimizer.state_dict()["state"][k][kind])
    assert differing(by_name(model, optimizer), by_name(other, into)) == []
    assert len({id(kinds["step"]) for kinds in into.state.values()}) == 1


def test_a_hook_gets_the_state_with_every_tensor_once_and_may_replace_it() -> None:
    _, optimizer = trained()
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, d: seen.append(d))
    saved = optimizer.state_dict()
    tensors = [x for kinds in seen[0]["state"].values() for x in kinds.values()]
    assert seen[0] is saved and len({x.data_ptr() for x in tensors}) == len(tensors)
    assert all(type(group["lr"]) is float for group in saved["param_groups"])


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_the_state_of_another_optimizer_is_refused_with_the_line_that_converts_it(
    other: Callable[..., torch.optim.Optimizer],
) -> None:
    model = net()
    saved = other(model.parameters(), lr=0.1)
    train(model, saved)
    own = nm.NorMuon(model)
    before = [x.clone() for state in own.state.values() for x in state.values()]
    with pytest.raises(ValueError, match=r"(?s)was saved by another .*nm\.convert_state\("):
        own.load_state_dict(saved.state_dict())
    after = [x for state in own.state.values() for x in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
