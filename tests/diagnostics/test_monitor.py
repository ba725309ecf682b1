"""Skips are heard: from the optimizer itself, and from a monitor of an optimizer in any wrapper."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.diagnostics import monitor as monitor_module

pytestmark = pytest.mark.usefixtures("eager")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAN = float("nan")


def made(device: str = "cpu", **options: Any) -> tuple[nn.Module, nm.NorMuon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(device)
    routes = {"1.weight": nm.Route()}
    return model, nm.NorMuon(model, lr=0.02, routes=routes, **{"guard": "full", **options})


def step(model: nn.Module, optimizer: Any, bad: bool = False) -> None:
    optimizer.zero_grad()
    x = torch.randn(3, 6, device=next(model.parameters()).device)
    (model(x).square().sum() * (NAN if bad else 1.0)).backward()
    optimizer.step()


def heard(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        action()
    assert {w.filename for w in seen} <= {__file__}  # at the caller's line
    return [str(w.message).partition(":")[0] for w in seen]


def test_a_guarded_optimizer_tells_of_every_skip_once() -> None:
    model, optimizer = made()
    own = nm.SkipMonitor(optimizer)

    def run() -> None:
        for k in range(6):
            step(model, optimizer, bad=k in (1, 2, 4))
            assert own() == (k in (1, 2, 4)) and own() == 0
            assert nm.check(optimizer.result, optimizer.plan) == (k in (1, 2, 4))  # type: ignore[arg-type]

    texts = [(2, 1), (3, 2), (5, 1)]
    assert heard(run) == [f"step {k} skipped, {n} in a row" for k, n in texts]
    assert own.wait() == 0


def test_without_a_guard_a_grad_scaler_is_not_told_about_its_own_skips() -> None:
    """As torch.optim.AdamW; who writes on_skip hears of them."""
    for options, expected in (({}, 0), ({"on_skip": "warn"}, 1), ({"guard": "full"}, 1)):
        model, optimizer = made(**{"guard": "off", **options})
        optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
        before = [p.detach().clone() for p in model.parameters()]
        assert heard(lambda m=model, o=optimizer: step(m, o)) == (
            ["step 1 skipped, 1 in a row"] * expected
        )
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_on_skip_raises_after_a_step_that_kept_every_bit() -> None:
    model, optimizer = made(on_skip="raise")
    step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(nm.NonFiniteStepError, match=r"step 2 skipped, 1 in a row: 0\.weight"):
        step(model, optimizer, bad=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    step(model, optimizer)  # and the run goes on
    assert not torch.equal(next(model.parameters()), before[0])


def test_a_function_hears_what_a_warning_says() -> None:
    got: list[nm.Skip] = []
    model, optimizer = made(on_skip=got.append, max_consecutive=3)
    for bad in (False, True, False, True, True):
        step(model, optimizer, bad)
    assert [(s.step, s.consecutive, s.skipped) for s in got] == [(2, 1, 1), (4, 1, 2), (5, 2, 3)]
    assert got[0].names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert got[0].message.startswith("step 2 skipped, 1 in a row: 0.weight (non-finite gradient")
    with pytest.raises(nm.NonFiniteStepError, match="3 steps in a row were skipped"):
        step(model, optimizer, bad=True)
    assert len(got) == 4 and got[-1].consecutive == 3


def test_many_names_are_cut_short() -> None:
    got: list[nm.Skip] = []
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))
    optimizer = nm.NorMuon(model, guard="full", on_skip=got.append, routes={"1.weight": nm.Route()})
    for p in model.parameters():
        p.grad = torch.full_like(p, NAN)
    optimizer.step()
    assert len(got[0].names) == 40 and "; and 28 more parameters. All gr" in got[0].message


@pytest.mark.parametrize("bad", [["0.weight"], ["0.weight", "0.bias", "1.weight", "1.bias"]])
def test_a_fault_of_all_gradients_is_said_to_come_from_the_loss_or_a_clip(bad: list[str]) -> None:
    model, optimizer = made(on_skip=(got := []).append)
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, NAN if name in bad else 1.0)
    optimizer.step()
    assert ("a clip by norm" in got[0].message) == (len(bad) == 4)


def ensemble(bad: dict[int, str], **options: Any) -> tuple[Any, Any]:
    """The plan of one of three members, and a step of all in which some have a NaN."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)) for _ in range(3)]
    params = {n: p.detach() for n, p in torch.func.stack_module_state(models)[0].items()}
    one = dict(models[0].named_parameters())
    config = nm.Config(guard="full", **options)
    plan = nm.make_plan(one, config, routes={"1.weight": nm.Route()})
    hyper = nm.Hyper.of(one, lr=0.01)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    for member, name in bad.items():
        grads[name][member].view(-1)[0] = NAN
    state = torch.func.vmap(lambda p: nm.init(p, plan))(params)
    stepped = torch.func.vmap(lambda p, g, s: nm.update(p, g, s, hyper, plan))(params, grads, state)
    return plan, stepped


def test_check_tells_of_each_member_of_an_ensemble_by_its_number() -> None:
    plan, result = ensemble({0: "1.bias", 2: "0.weight"})
    skipped: list[bool] = []
    with pytest.warns(RuntimeWarning) as said:
        skipped.append(nm.check(result, plan))
    assert skipped == [True]
    assert [str(each.message).partition(" (")[0] for each in said] == [
        "member 0: step 1 skipped, 1 in a row: 1.bias",
        "member 2: step 1 skipped, 1 in a row: 0.weight",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(nm.NonFiniteStepError, match="member 0: 1 steps in a row"):
            nm.check(result, plan, max_consecutive=1)
    plan, result = ensemble({})
    assert heard(lambda: skipped.append(nm.check(result, plan))) == [] and skipped[-1] is False


def test_a_monitor_counts_and_tells_of_the_members_of_an_ensemble() -> None:
    plan, result = ensemble({1: "0.bias", 2: "0.weight"})
    got: list[nm.Skip] = []
    assert nm.SkipMonitor(plan, on_skip=got.append)(result) == 2
    assert [(skip.names, skip.member, skip.message[:9]) for skip in got] == [
        (("0.bias",), 1, "member 1:"),
        (("0.weight",), 2, "member 2:"),
    ]
    with (
        warnings.catch_warnings(record=True) as seen,
        pytest.raises(nm.NonFiniteStepError, match="member 1: 1 steps in a row"),
    ):
        warnings.simplefilter("always")
        nm.SkipMonitor(plan, max_consecutive=1)(result)
    assert len(seen) == 2  # both are told of, and then it raises
    plan, result = ensemble({1: "0.bias", 2: "0.weight"})
    monitor = nm.SkipMonitor(plan)
    assert len(heard(lambda: monitor(result))) == 2
    assert heard(lambda: nm.check(result, plan)) == []  # the monitor has told
    assert nm.SkipMonitor(plan)(ensemble({})[1]) == 0


def test_metrics_of_an_ensemble_are_refused_with_the_line_that_takes_one_member() -> None:
    plan, result = ensemble({1: "0.bias"}, metrics=True)
    with pytest.raises(ValueError, match="those of 3 members of an ensemble") as said:
        nm.report_metrics(result, plan)
    line = str(said.value).partition("one of them: ")[2].replace("each[0]", "each[1]")
    one = eval(line, {"torch": torch, "result": result})
    assert nm.report_metrics(one, plan)["nonfinite_gradient/0.bias"] == 1.0


def test_nobody_is_told_on_demand_and_the_counters_count() -> None:
    model, optimizer = made(on_skip=None)
    step(model, optimizer, bad=True)
    assert int(optimizer.state[model[0].weight]["skipped"]) == 1
    with pytest.raises(nm.NonFiniteStepError):
        silent = made(on_skip=None, max_consecutive=1)
        step(*silent, bad=True)


WRAPPED = {
    "alone": lambda o: o,
    "Accelerate": lambda o: SimpleNamespace(optimizer=o),
    "Lightning": lambda o: SimpleNamespace(_optimizer=o),
    "ZeroRedundancyOptimizer": lambda o: SimpleNamespace(optim=o),
    "a Trainer": lambda o: SimpleNamespace(optimizer=SimpleNamespace(optimizer=o)),
    "Lookahead": lambda o: SimpleNamespace(base_optimizer=o),
}


@pytest.mark.parametrize("how", list(WRAPPED))
def test_a_monitor_takes_an_optimizer_in_any_wrapper_before_its_first_step(how: str) -> None:
    model, optimizer = made(on_skip=None)
    monitor = nm.SkipMonitor(WRAPPED[how](optimizer), max_consecutive=2)
    assert monitor() == 0
    step(model, optimizer)
    assert monitor() == 0
    step(model, optimizer, bad=True)
    with pytest.warns(RuntimeWarning, match="step 2 skipped"):
        assert monitor() == 1
    step(model, optimizer, bad=True)
    with pytest.warns(RuntimeWarning, match="step 3"), pytest.raises(nm.NonFiniteStepError):
        monitor()


@pytest.mark.parametrize("wrong", [None, 3, [], "AdamW", "AdamW in a wrapper"])
def test_a_monitor_of_anything_else_is_refused(wrong: Any) -> None:
    if str(wrong).startswith("AdamW"):
        adamw = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
        wrong = adamw if wrong == "AdamW" else SimpleNamespace(optimizer=adamw)
    with pytest.raises(TypeError, match=f"expected a Plan, got {type(wrong).__name__}; an optimiz"):
        nm.SkipMonitor(wrong)


@pytest.mark.parametrize(
    "options", [{"on_skip": "raise"}, {"on_skip": print}, {"max_consecutive": 2}], ids=str
)
def test_what_waits_for_skips_is_refused_where_no_guard_skips_any(options: Any) -> None:
    model, optimizer = made(guard="off")
    bare = nm.make_plan(model, routes={"1.weight": nm.Route()})
    for make in (
        lambda: made(guard="off", **options),
        lambda: nm.SkipMonitor(optimizer, **options),
        lambda: nm.SkipMonitor(SimpleNamespace(optimizer=optimizer), **options),
        lambda: nm.SkipMonitor(bare, **options),
    ):
        with pytest.raises(ValueError, match=r"goes into the weights\. Write guard='full'"):
            make()
    routes = {"1.weight": nm.Route()}
    nm.SkipMonitor(nm.make_plan(model, nm.Config(guard="output"), routes=routes), **options)
    made(**options)


def test_check_says_that_max_consecutive_does_not_count_what_no_guard_skips() -> None:
    model, optimizer = made(guard="off")
    step(model, optimizer, bad=True)
    with pytest.warns(RuntimeWarning, match="in the weights now, and max_consecutive counts skip"):
        nm.check(optimizer.result, optimizer.plan, max_consecutive=1)  # type: ignore[arg-type]


def test_what_on_skip_takes_is_checked_at_construction() -> None:
    for of in (nm.SkipMonitor, nm.NorMuon):
        given = made()[int(of is nm.SkipMonitor)]
        for options, text in (
            ({"on_skip": "error"}, "on_skip: expected 'warn', 'raise', None or a function"),
            ({"on_skip": "raise", "max_consecutive": 2}, "write on_skip='warn' beside max_conse"),
            ({"max_consecutive": 0}, "max_consecutive: expected None or an int >= 1, got 0"),
        ):
            with pytest.raises(ValueError, match=text):
                of(given, **options)  # type: ignore[arg-type]


def test_a_copy_and_a_pickle_are_heard_too() -> None:
    for how in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model, optimizer = how(made(on_skip="raise"))
        with pytest.raises(nm.NonFiniteStepError):
            step(model, optimizer, bad=True)


def test_a_monitor_keeps_no_optimizer_alive_at_the_end() -> None:
    model, optimizer = made()
    before = len(monitor_module._alive)
    del model, optimizer
    gc.collect()
    assert len(monitor_module._alive) < before
    monitor_module.report_what_arrived()  # what runs when the process ends


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("graphed", [False, True])
def test_on_cuda_a_skip_is_heard_a_step_later_without_a_wait(graphed: bool) -> None:
    got: list[nm.Skip] = []
    model, optimizer = made("cuda", on_skip=got.append, graphed=graphed)
    for _ in range(3):
        step(model, optimizer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(4_000_000_000)  # seconds: the host may be slow
        step(model, optimizer, bad=True)
        assert not got  # the device sleeps, and nobody waited for it
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    step(model, optimizer)
    assert [(s.step, s.consecutive, s.skipped) for s in got] == [(4, 1, 1)] and got[0].names
    torch.cuda._sleep(4_000_000_000)  # or a slow host hears of it in the same call
    step(model, optimizer, bad=True)
    torch.cuda.synchronize()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer._reports.skips.on_skip = "raise"  # type: ignore[union-attr]
    with pytest.raises(nm.NonFiniteStepError, match="step 6 skipped"):
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.release()


@needs_cuda
def test_on_cuda_the_monitor_works_whatever_the_default_device() -> None:
    with torch.device("cuda"):
        model, optimizer = made("cuda", on_skip=None)
        monitor = nm.SkipMonitor(optimizer)
        step(model, optimizer, bad=True)
        with pytest.warns(RuntimeWarning, match="step 1 skipped"):
            assert monitor.wait() + monitor() + monitor.wait() == 1
            torch.cuda.synchronize()
            step(model, optimizer)
