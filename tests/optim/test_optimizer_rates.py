"""Which rate AdamW's parameters get from `NorMuon`, what cannot take effect, what cannot move."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import normuon_fn as nm
from tests.optim.test_optimizer import Net, everything, same, split, states, train, weights

pytestmark = pytest.mark.usefixtures("eager")
RATES = {"lr": 0.5, "adamw_lr": 0.125, "weight_decay": 0.25, "adamw_weight_decay": 0.0625}


def hyper_of(optimizer: nm.NorMuon) -> dict[str, Any]:
    """What the last step was given, by field."""
    hyper: nm.Hyper = optimizer._planner.hyper.hyper
    return {name: x.tolist() for name, x in hyper._asdict().items()}


def rates(optimizer: nm.NorMuon) -> tuple[Any, Any]:
    hyper = hyper_of(optimizer)
    return hyper["lr"], hyper["adamw_lr"]


def stepped(optimizer: nm.NorMuon) -> nm.NorMuon:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


# --- adamw_lr, adamw_weight_decay


def test_adamws_own_rate_and_decay_are_those_of_two_optimizers_side_by_side() -> None:
    """In float64, for the matrices; the rest is torch's AdamW within its own rounding."""
    model, other = Net(dtype=torch.float64), Net(dtype=torch.float64)
    optimizer = nm.NorMuon(everything(model), adamw_betas=(0.9, 0.999), **RATES)
    matrices, rest = split(other)
    alone = nm.NorMuon(matrices, lr=0.5, weight_decay=0.25)
    adamw = torch.optim.AdamW([p for _, p in rest], lr=0.125, weight_decay=0.0625)
    for k in range(4):
        for net in (model, other):
            generator = torch.Generator().manual_seed(k)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for each in (optimizer, alone, adamw):
            each.step()
    names = {name for name, _ in rest}
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name in names:
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-6)  # betas are float32; seen: 3e-7
        else:
            assert torch.equal(p, q)


def test_a_scheduler_moves_adamws_rate_in_proportion_from_zero_and_back() -> None:
    model = Net()
    optimizer = nm.NorMuon(everything(model), **RATES)
    shape = [0.0, 0.5, 1.0, 0.25, 0.0]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: shape[min(k, 4)])
    found = []
    train(model, optimizer, range(5), lambda k: (found.append(rates(optimizer)), scheduler.step()))
    assert found == [(0.5 * factor, 0.125 * factor) for factor in shape]
    assert hyper_of(optimizer)["adamw_weight_decay"] == 0.0625


@pytest.mark.parametrize("how", ["tensor lr", "tensor adamw_lr", "both", "numpy"])
def test_tensors_and_numbers_of_numpy_are_followed_as_floats_are(how: str) -> None:
    given: dict[str, Any] = {"lr": 0.5, "adamw_lr": 0.125}
    for name in ("lr", "adamw_lr"):
        if how == "numpy":
            given[name] = np.float32(given[name])
        elif how in ("both", f"tensor {name}"):
            given[name] = torch.tensor(given[name])
    optimizer = nm.NorMuon(everything(Net()), **given)
    assert rates(stepped(optimizer)) == (0.5, 0.125)
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(0.25)
    else:
        group["lr"] = 0.25
    assert rates(stepped(optimizer)) == (0.25, 0.0625)
    if isinstance(group["adamw_lr"], Tensor):
        group["adamw_lr"].fill_(0.5)
        assert rates(stepped(optimizer)) == (0.25, 0.25)


def test_a_group_has_rates_of_its_own_and_lr_is_adamws_in_a_group_of_adamw() -> None:
    matrices, rest = split(Net())
    groups: list[dict[str, Any]] = [
        {"params": matrices[:1]},
        {"params": matrices[1:], "lr": 0.25, "adamw_lr": 0.0625, "adamw_weight_decay": 0.0},
        {"params": rest[:1], "algorithm": "adamw", "lr": 0.75, "weight_decay": 0.125},
        {"params": rest[1:], "algorithm": "adamw"},
    ]
    optimizer = stepped(nm.NorMuon(groups, **RATES))
    assert rates(optimizer) == ([0.5, 0.25, 0.75, 0.5], [0.125, 0.0625, 0.75, 0.125])
    assert hyper_of(optimizer)["adamw_weight_decay"] == [0.0625, 0.0, 0.125, 0.0625]
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert rates(stepped(optimizer))[1] == [0.0625, 0.03125, 0.375, 0.0625]


def warned(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in said]


@pytest.mark.parametrize("given", [{"adamw_lr": 0.125}, {}])
def test_a_rate_of_adamw_that_is_written_while_lr_has_moved_is_said_once_with_the_line_to_write(
    given: dict[str, Any],
) -> None:
    optimizer = nm.NorMuon(everything(Net()), lr=0.5, **given)

    def own_schedule(factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["adamw_lr"] = 0.5 * factor, 0.125 * factor
        stepped(optimizer)

    assert warned(lambda: own_schedule(1.0)) == []
    (text,) = warned(lambda: own_schedule(0.5))
    assert text.startswith("param_groups[0]: adamw_lr was written as 0.0625 while lr is 0.25, 0.5")
    assert "AdamW's rate is now 0.03125" in text and "write lr alone" in text
    assert rates(optimizer) == (0.25, 0.03125)
    assert warned(lambda: own_schedule(0.25)) == []


def test_a_rate_of_adamw_that_is_written_before_the_first_step_is_looked_at_too() -> None:
    optimizer = nm.NorMuon(everything(Net()), **RATES)
    optimizer.param_groups[0].update(lr=0.05, adamw_lr=0.0125)  # a warm-up of one's own
    (text,) = warned(lambda: stepped(optimizer))
    assert "adamw_lr was written as 0.0125 while lr is 0.05, 0.1 of" in text


def test_rates_that_nobody_wrote_twice_are_moved_and_loaded_without_a_word() -> None:
    def scheduled() -> None:
        optimizer = nm.NorMuon(everything(Net()), **RATES)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
        for _ in range(3):
            stepped(optimizer)
            scheduler.step()
        other = stepped(nm.NorMuon(everything(Net()), lr=0.5, adamw_lr=0.25))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert rates(stepped(other)) == (0.125, 0.03125)
        stepped(copy.deepcopy(optimizer))
        optimizer.param_groups[0].update(lr=0.5)
        optimizer.param_groups[0].update(adamw_lr=0.25)  # lr is what it was: nothing is doubled
        assert rates(stepped(optimizer)) == (0.5, 0.25)

    assert warned(scheduled) == []


@pytest.mark.parametrize("dtype", [float, torch.tensor])
def test_a_resumed_run_has_the_saved_rates_whatever_it_was_constructed_with(dtype: Any) -> None:
    def made(model: Net, lr: float, adamw_lr: float) -> Any:
        optimizer = nm.NorMuon(everything(model), lr=dtype(lr), adamw_lr=adamw_lr)
        return optimizer, lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))

    model, other = Net(), Net()
    optimizer, scheduler = made(model, 0.5, 0.125)
    train(model, optimizer, range(3), lambda k: scheduler.step())
    resumed, again = made(other, 0.25, 0.5)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(scheduler.state_dict())
    for net, each, schedule in ((model, optimizer, scheduler), (other, resumed, again)):
        train(net, each, range(3, 6), lambda k, schedule=schedule: schedule.step())
    assert rates(resumed) == rates(optimizer)
    assert same(weights(model), weights(other)) and same(states(resumed), states(optimizer))


def test_a_state_saved_without_adamws_rates_loads_and_keeps_those_of_the_constructor() -> None:
    model = Net()
    optimizer = nm.NorMuon(everything(model), **RATES)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("adamw_lr", "adamw_lr_base", "adamw_weight_decay"):
        del saved["param_groups"][0][key]
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    assert rates(stepped(optimizer)) == (0.25, 0.0625)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_keeps_adamws_rates(how: Any) -> None:
    optimizer = nm.NorMuon(everything(Net()), **RATES)
    optimizer.param_groups[0]["lr"] = 0.25
    assert rates(stepped(how(optimizer))) == (0.25, 0.0625)


def test_groups_of_another_optimizer_are_taken_with_their_rates() -> None:
    matrices, rest = split(Net())
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
    before = nm.NorMuon(groups, **RATES)
    before.param_groups[0]["lr"] = before.param_groups[1]["lr"] = 0.25
    after = nm.NorMuon([dict(group) for group in before.param_groups])
    assert rates(stepped(after)) == ([0.25, 0.25], [0.0625, 0.0625])


def test_wrong_rates_of_adamw_are_refused_by_name_and_leave_the_groups_as_they_were() -> None:
    matrices, rest = split(Net())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"adamw_lr": -1.0}, ValueError, "adamw_lr: expected a finite number >= 0"),
        ({"adamw_lr": "slow"}, TypeError, "adamw_lr: expected a Python number"),
        ({"adamw_lr": torch.ones(2)}, ValueError, "adamw_lr: expected a number or a tensor"),
        ({"adamw_weight_decay": -1.0}, ValueError, "adamw_weight_decay: expected a finite"),
        ({"adamw_lr": 0.1, "lr": 0.0}, ValueError, "adamw_lr:.*an lr > 0.*got 0.0"),
        ({"adamw_lr": 0.1, "lr": torch.tensor(0.0)}, ValueError, "adamw_lr:.*an lr > 0"),
        ({"adamw_lr": 0.1, "lr": torch.tensor(1.0, device="meta")}, RuntimeError, "meta"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            nm.NorMuon(matrices, **given)
        optimizer = nm.NorMuon(matrices)
        with pytest.raises(kind, match=message):
            optimizer.add_param_group({"params": rest, **given})
        assert len(optimizer.param_groups) == 1
        stepped(optimizer)
    with pytest.raises(TypeError, match=r"lr=0.1 and adamw_lr=0.2 contradict.*write lr alone"):
        nm.NorMuon([{"params": rest, "algorithm": "adamw", "lr": 0.1, "adamw_lr": 0.2}])
    optimizer = stepped(nm.NorMuon(matrices + rest, lr=0.5, adamw_lr=0.125))
    optimizer.param_groups[0]["adamw_lr"] = float("nan")
    with pytest.raises(ValueError, match=r"param_groups\[0\]: adamw_lr: expected a finite"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_change_no_hyperparameter(dtype: torch.dtype) -> None:
    model = Net()
    given: dict[str, Any] = {**RATES, "lr": torch.tensor(0.1), "momentum": 0.9}
    expected = hyper_of(stepped(nm.NorMuon(everything(Net()), **given)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            optimizer = nm.NorMuon(everything(model), **given)
            hyper = optimizer._planner.hyper
            hyper.follow(optimizer.param_groups)
    finally:
        torch.set_default_dtype(before)
    assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in hyper.hyper)
    assert hyper_of(optimizer) == expected


# --- arguments of other optimizers, and those that cannot take effect


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"betas": (0.9, 0.95)}, "'betas' is called 'adamw_betas' here"),
        ({"eps": 1e-8}, "'eps' is called 'adamw_eps' here"),
        ({"mu": 0.9}, "'mu' is called 'momentum' here"),
        ({"muon_beta2": 0.9}, "'muon_beta2' is called 'beta2' here"),
        ({"adam_lr": 0.1}, "'adam_lr' is called 'adamw_lr' here"),
        ({"muon_lr": 0.1}, "'muon_lr' is called 'lr' here"),
        ({"learning_rate": 0.1}, "'learning_rate' is called 'lr' here"),
        ({"distributed_mesh": None}, "'distributed_mesh' is called 'mesh' here"),
        ({"nesterov": True}, r"a field of Config; write config=Config\(nesterov=...\)"),
        ({"ns_steps": 5}, r"config=Config\(steps=...\)"),
        ({"ns_coefficients": (1, 2, 3)}, r"config=Config\(coefficients=...\)"),
        ({"adjust_lr_fn": "original"}, r"config=Config\(scale=...\)"),
        ({"cautious_wd": True}, r"weight_decay_form='cautious'"),
        ({"newton_schulz_func": None}, r"config=Config\(orthogonalizer=...\)"),
        ({"maximize": True}, "negate the loss"),
        ({"foreach": True}, "leave it out"),
        ({"fused": True}, "leave it out"),
        ({"capturable": True}, "lr may be a tensor in any case"),
        ({"lr_mul": 0.5}, r"routes=\{...: Route\(lr_mul=...\)\}"),
        ({"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        ({"colour": 1}, "there is no argument 'colour'; expected one of"),
    ],
)
def test_an_argument_of_another_optimizer_is_answered_with_the_line_to_write(
    given: dict[str, Any], message: str
) -> None:
    model = Net()
    for make in (nm.NorMuon, nm.for_trainer):
        with pytest.raises(TypeError, match=f"NorMuon: .*{message}"):
            make(model, **given)


def test_all_arguments_of_a_line_for_another_optimizer_are_answered_in_one_error() -> None:
    with pytest.raises(TypeError) as error:
        nm.NorMuon(Net(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)  # type: ignore[call-arg]
    lines = str(error.value).splitlines()
    assert lines[:2] == [
        "NorMuon: 'betas' is called 'adamw_betas' here",
        "NorMuon: 'eps' is called 'adamw_eps' here",
    ]
    assert len(lines) == 3 and "'fused'; leave it out" in lines[2]
    group = {"params": everything(Net()), "betas": (0.9, 0.95), "fused": True, "use_muon": False}
    with pytest.raises(TypeError) as error:
        nm.NorMuon([group])
    assert [line.partition(" ")[2][:12] for line in str(error.value).splitlines()] == [
        "'betas' is c", "fused=True c", "'use_muon' i",
    ]  # fmt: skip
    assert "write 'normuon' for True, 'adamw' for False" in str(error.value)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("muon", "nm.Config.preset('muon')"),
        ({"guard": "full", "nesterov": True}, "nm.Config(guard='full', nesterov=True)"),
        (3, "nm.Config(...)"),
    ],
)
def test_a_config_of_another_kind_is_answered_with_the_line_to_write(
    config: Any, line: str
) -> None:
    model = Net()
    for make in (nm.NorMuon, lambda m, config: nm.make_plan(m, config)):
        with pytest.raises(TypeError, match="config: expected a Config, got") as error:
            make(model, config=config)
        assert str(error.value).endswith(f"; write {line}")


def test_a_config_answers_names_of_other_optimizers_and_stays_a_dataclass() -> None:
    for key, message in (("ns_steps", "steps=..."), ("use_nesterov", "nesterov=...")):
        with pytest.raises(TypeError, match=f"Config: there is no argument '{key}'.*{message}"):
            nm.Config(**{key: 5})
    with pytest.raises(TypeError, match=r"Config: .*'nesterof'; did you mean 'nesterov'"):
        nm.Config(nesterof=True)  # type: ignore[call-arg]
    config = nm.Config(nesterov=True)
    assert pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
    assert "nesterov" in inspect.signature(nm.Config).parameters


def test_lists_are_answered_too_and_signatures_stay_visible() -> None:
    lists = [[torch.ones(2, 2)] for _ in range(3)] + [[torch.ones(2, 1)]]
    given: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    for key, message in (("nesterov", r"Config\(nesterov"), ("muon_beta2", "called 'beta2'")):
        with pytest.raises(TypeError, match=f"foreach_step_: .*{message}"):
            nm.foreach_step_(*lists, **given, **{key: 0.9})
    for function, name in ((nm.NorMuon, "adamw_lr"), (nm.foreach_step_, "masters")):
        assert name in inspect.signature(function).parameters
    assert inspect.signature(nm.NorMuon).parameters["lr"].default == 1e-3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weigth_decay", 0.1, "did you mean 'weight_decay'"),
        ("graphed", True, r"write NorMuon\(graphed=...\)"),
        ("mesh", object(), r"write NorMuon\(mesh=...\)"),
        ("nan_guard_fallback", True, r"write NorMuon\(nan_guard_fallback=...\)"),
        ("lr_mul", 0.5, r"Route\(lr_mul=...\)"),
        ("foreach", True, "leave it out"),
        ("adam_lr", 0.1, "called 'adamw_lr'"),
    ],
)
def test_a_key_that_no_group_can_have_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"param_group: .*{message}"):
        nm.NorMuon([{"params": everything(Net()), key: value}])


def test_a_guard_beside_a_config_with_another_one_is_refused() -> None:
    params = everything(Net())
    for given in ("full", "off"):
        with pytest.raises(
            ValueError, match=f"guard: '{given}' contradicts config.guard.*'output'"
        ):
            nm.NorMuon(params, config=nm.Config(guard="output"), guard=given)  # type: ignore[arg-type]
    same_guard = nm.NorMuon(params, config=nm.Config(guard="output"), guard="output")
    alone = nm.NorMuon(params, config=nm.Config(nesterov=True), guard="full")
    assert (same_guard.config.guard, alone.config.guard) == ("output", "full")
    for config, guard in ((nm.Config(guard="full"), None), (None, "full")):
        with pytest.raises(ValueError, match="nan_guard_fallback"):
            nm.NorMuon(params, config=config, guard=guard, nan_guard_fallback=True)  # type: ignore[arg-type]


def test_arguments_for_matrices_are_refused_where_adamw_leaves_none() -> None:
    matrices, rest = split(Net())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"beta2": 0.999}, r"beta2: 0.999 is for matrices.*write adamw_betas"),
        ({"momentum": 0.9}, r"momentum: 0.9 is for matrices.*write adamw_betas"),
        ({"lr": 0.5, "adamw_lr": 0.1}, r"lr: 0.5 is for matrices.*place of adamw_lr"),
        (
            {"weight_decay": 0.5, "adamw_weight_decay": 0.1},
            r"weight_decay: 0.5 is for matrices.*place of adamw_weight_decay",
        ),
    ]
    for given, message in cases:
        with pytest.raises(TypeError, match=message):
            nm.NorMuon(rest, algorithm="adamw", **given)
        groups = [{"params": rest}, {"params": matrices, "algorithm": "normuon"}]
        nm.NorMuon(groups, algorithm="adamw", **given)  # a default that the matrices share
    by_route = {name: nm.Route() for name, _ in matrices}
    group = {"params": everything(Net()), "routes": by_route}
    nm.NorMuon([group], algorithm="adamw", beta2=0.999)
    nm.NorMuon(matrices, adamw_betas=(0.9, 0.999), adamw_lr=0.1)  # for what may be added
    nm.NorMuon(rest, algorithm="adamw", lr=0.5, weight_decay=0.1, momentum=0.95)


# --- 16-bit parameters that their rates cannot move


class Narrow(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, dtype=dtype)
        for p in self.parameters():
            nn.init.normal_(p, std=std)


def texts_of(optimizer: nm.NorMuon, steps: int, then: Any = lambda k: None) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for k in range(steps):
            stepped(optimizer)
            then(k)
    assert all(each.filename == __file__ for each in seen)
    return [str(each.message) for each in seen]


def test_a_rate_that_moves_few_entries_is_said_once_and_the_share_is_what_moves() -> None:
    model = Narrow()
    optimizer = nm.NorMuon(model, lr=2e-5)
    (text,) = texts_of(optimizer, 3)
    assert "lr=2e-05 with bfloat16 parameters" in text and "Config(master='mantissa')" in text
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = torch.cat(
        [(p != q).flatten().float() for p, q in zip(model.parameters(), before, strict=True)]
    )
    said = float(text.split("only about ")[1].split("%")[0]) / 100
    assert 0.01 < float(moved.mean()) < 0.1 and abs(said - float(moved.mean())) < 0.03


@pytest.mark.parametrize(
    ("dtype", "lr", "config"),
    [
        (torch.bfloat16, 1e-3, {}),
        (torch.bfloat16, 2e-5, {"master": "mantissa"}),
        (torch.bfloat16, 2e-5, {"master": "stochastic"}),
        (torch.float16, 2e-5, {}),  # 8 times as fine
        (torch.float16, 1e-6, {"master": "fp32"}),
        (torch.float32, 1e-6, {}),
        (torch.bfloat16, 2e-5, {"rms": 20.0}),
        (torch.bfloat16, 5e-4, {"scale": "spectral", "renormalize": False}),
    ],
)
def test_nothing_is_said_where_entries_move_or_a_master_keeps_the_updates(
    dtype: torch.dtype, lr: float, config: dict[str, Any]
) -> None:
    assert texts_of(nm.NorMuon(Narrow(dtype), lr=lr, config=nm.Config(**config)), 3) == []


def test_float16_is_told_of_its_own_master_and_large_entries_are_coarser() -> None:
    (text,) = texts_of(nm.NorMuon(Narrow(torch.float16), lr=1e-6), 2)
    assert "float16" in text and "Config(master='fp32')" in text
    assert len(texts_of(nm.NorMuon(Narrow(std=1.0), lr=1e-3), 2)) == 1
    (text,) = texts_of(nm.NorMuon(Narrow(), lr=2e-4, config=nm.Config(scale="none")), 2)
    assert "lr=0.0002" in text  # the entries of an orthogonal matrix of 96 rows have RMS 0.1
    assert texts_of(nm.NorMuon(Narrow(), lr=2e-4), 2) == []


@pytest.mark.parametrize("peak", [1e-3, 2e-5])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda k: min(k / 4, (12 - k) / 8)),
        lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 4),
        lambda o: lr_scheduler.ConstantLR(o, 0.01, 4),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], 12, cycle_momentum=False),
    ],
)
def test_a_schedule_is_judged_by_its_peak_alone(schedule: Any, peak: float) -> None:
    optimizer = nm.NorMuon(Narrow(), lr=peak)
    scheduler = schedule(optimizer)
    assert len(texts_of(optimizer, 10, lambda k: scheduler.step())) == (peak == 2e-5)


@pytest.mark.parametrize("peak", [1e-3, 2e-5])
def test_a_schedule_by_hand_is_judged_when_it_no_longer_rises(peak: float) -> None:
    optimizer = nm.NorMuon(Narrow(), lr=1e-3)
    (group,) = optimizer.param_groups
    group["lr"] = 0.0

    def then(k: int) -> None:
        group["lr"] = peak * min(k + 1, 4) / 4

    assert texts_of(optimizer, 4, then) == []
    assert len(texts_of(optimizer, 4, then)) == (peak == 2e-5)


def test_every_group_is_judged_by_its_own_rate_and_a_tensor_is_read() -> None:
    model = Narrow()
    groups = [
        {"params": [("a", model.a.weight)], "lr": torch.tensor(1e-3)},
        {"params": [("b", model.b.weight)], "lr": torch.tensor(2e-5)},
    ]
    (text,) = texts_of(nm.NorMuon(groups, routes={"*": nm.Route()}), 3)
    assert text.startswith("param_groups[1]: lr=2e-05")
    assert len(texts_of(nm.NorMuon(Narrow(), lr=1e-3, adamw_lr=1e-6), 2)) == 0  # biases are few
    rest = [("a.bias", nn.Parameter(torch.full((512,), 1.0, dtype=torch.bfloat16)))]
    assert len(texts_of(nm.NorMuon(rest, lr=1e-3, adamw_lr=1e-3), 2)) == 1


def test_a_warning_that_is_an_error_comes_before_anything_is_written() -> None:
    model = Narrow()
    optimizer, before = nm.NorMuon(model, lr=2e-5), weights(model)
    with pytest.raises(UserWarning, match="lr=2e-05"):
        stepped(optimizer)
    assert same(weights(model), before) and int(optimizer.state[model.a.weight]["step"]) == 0
    stepped(optimizer)
    assert int(optimizer.state[model.a.weight]["step"]) == 1


@pytest.mark.usefixtures("eager")
def test_parameters_that_become_bfloat16_in_a_run_are_looked_at_again() -> None:
    model = nn.Linear(16, 16, bias=False)
    optimizer = nm.NorMuon(model, lr=1e-6)

    def step() -> None:
        model(torch.ones(2, 16, dtype=model.weight.dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model.bfloat16()
    with pytest.warns(UserWarning, match="mantissa"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
