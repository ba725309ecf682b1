"""`save` and `load`: everything comes back, or nothing is touched; and torch's own checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import normuon_fn as nm

Tensors = dict[str, Tensor]
SHAPES = {
    "z.w": (8, 12),
    "qkv": (24, 8),
    "a.embed": (10, 8),
    "experts": (3, 8, 4),
    "bias": (8,),
    "gain": (),
    "half": (8, 8),
}
ROUTES = {"qkv": nm.Route(splits=(8, 8, 8)), "a.embed": nm.Route("adamw")}


def problem(
    config: nm.Config | None = None, steps: int = 2, routes: dict | None = None
) -> tuple[nm.Plan, Tensors, Tensors]:
    """A plan, and a run of it some steps old. Its keys are in no alphabetical order."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    params["half"] = params["half"].bfloat16()
    plan = nm.make_plan(params, config, routes=ROUTES if routes is None else routes)
    state = nm.init(plan, params)
    for _ in range(steps):
        params, state = advance(plan, params, state)
    return plan, params, state


def advance(plan: nm.Plan, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    grads = {name: torch.sin(3 * p + 1) for name, p in params.items()}
    result = nm.update(params, grads, state, nm.Hyper.of(params, lr=0.02, weight_decay=0.1), plan)
    return result.params, result.state


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_run_goes_on_with_the_same_bits_and_the_same_order_of_keys(tmp_path: Path) -> None:
    plan, params, state = problem(nm.Config(guard="full"))
    extra = {
        "step": 2,
        "lr": 0.5,
        "note": "ü",
        "generator": torch.arange(5, dtype=torch.uint8),
        "losses": [1.5, 2.0],
    }
    nm.save(tmp_path / "run.safetensors", params, state, plan=plan, extra=extra)
    found = nm.load(tmp_path / "run.safetensors", plan)
    assert same(found.params, params) and same(found.state, state)
    assert (
        torch.equal(found.extra.pop("generator"), extra.pop("generator")) and found.extra == extra
    )
    for got, want in zip(
        advance(plan, found.params, found.state), advance(plan, params, state), strict=True
    ):
        assert same(got, want)
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize(
    ("master", "key", "dtype"),
    [("mantissa", "mantissa", torch.int16), ("fp32", "master", torch.float32)],
)
def test_masters_are_saved_and_the_run_goes_on_exactly(
    tmp_path: Path, master: Any, key: str, dtype: torch.dtype
) -> None:
    plan, params, state = problem(nm.Config(master=master))
    assert (
        state[f"half.{key}"].dtype == dtype
        and state[f"half.{key}"].any()
        and f"bias.{key}" not in state
    )
    nm.save(tmp_path / "run", params, state, plan=plan)
    found = nm.load(tmp_path / "run", plan)
    assert same(found.params, params) and same(found.state, state)
    for got, want in zip(
        advance(plan, found.params, found.state), advance(plan, params, state), strict=True
    ):
        assert same(got, want)
    into = problem(nm.Config(master=master), steps=0)[1:]
    nm.load(tmp_path / "run", plan, params=into[0], state=into[1])
    assert same(into[0], params) and same(into[1], state)
    before = problem(steps=1)
    kept = copies(before[1]), copies(before[2])
    with (
        pytest.warns(UserWarning, match=f"Config.master was '{master}', is 'none'"),
        pytest.raises(nm.CheckpointError, match=rf"unexpected \['state/half.{key}'\]"),
    ):
        nm.load(tmp_path / "run", before[0], params=before[1], state=before[2])
    assert same(before[1], kept[0]) and same(before[2], kept[1])


def test_without_a_plan_it_comes_as_it_was_saved(tmp_path: Path) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan)
    found = nm.load(tmp_path / "run")
    assert same(found.params, params) and same(found.state, state) and found.extra == {}
    with safe_open(tmp_path / "run", framework="pt") as file:  # anybody's reader reads it
        assert torch.equal(file.get_tensor("params/z.w"), params["z.w"])
        assert json.loads(file.metadata()["normuon_fn"])["format"] == 1


def test_in_place_it_writes_the_tensors_that_are_there(tmp_path: Path) -> None:
    plan, params, state = problem(steps=3)
    nm.save(tmp_path / "run", params, state, plan=plan)
    _, here, there = problem(steps=0)
    module = nn.Parameter(here["z.w"])  # requires a gradient
    here["z.w"] = module
    found = nm.load(tmp_path / "run", plan, params=here, state=there)
    assert same(copies(here), params) and same(there, state) and module.requires_grad
    assert found.params is here and found.state is there


def test_views_strides_and_shared_storage_are_saved_by_value(tmp_path: Path) -> None:
    plan, params, state = problem()
    buffer = torch.stack([state["qkv.momentum"], state["qkv.momentum"]])
    state["qkv.momentum"] = buffer[1]
    params["z.w"] = params["z.w"].t().contiguous().t()
    nm.save(tmp_path / "run", params, state, plan=plan, extra={"alias": params["bias"]})
    found = nm.load(tmp_path / "run", plan)
    assert (
        same(found.params, params)
        and same(found.state, state)
        and torch.equal(found.extra["alias"], params["bias"])
    )


def test_a_link_keeps_leading_to_the_file_and_the_file_keeps_its_mode(tmp_path: Path) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    (tmp_path / "run").chmod(0o640)
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    nm.save(tmp_path / "latest", params, state, plan=plan, extra={"step": 7})
    assert (tmp_path / "latest").is_symlink() and nm.load(tmp_path / "run").extra == {"step": 7}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o640


# ------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, s: (p | {"new": torch.zeros(4, 4)}, s),
            r"missing \['params/new', 'state/new.momentum', 'state/new.variance'\]",
        ),
        (
            lambda p, s: ({k: v for k, v in p.items() if k != "bias"}, s),
            r"unexpected \['params/bias', 'state/bias.exp_avg'",
        ),
        (
            lambda p, s: (p | {"z.w": torch.zeros(8, 13)}, s),
            r"other shapes: params/z.w: expected shape \(8, 13\), .*\(8, 12\)",
        ),
        (
            lambda p, s: (p | {"half": torch.zeros(8, 8)}, s),
            r"params/half: expected torch.float32 .* the file has torch.bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(
    tmp_path: Path, change: Any, message: str
) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    others, _ = change(params, state)
    other = nm.make_plan(others, routes=ROUTES)
    running = nm.init(other, others)
    before = copies(others), copies(running)
    with pytest.raises(nm.CheckpointError, match=message):
        nm.load(tmp_path / "run", other, params=others, state=running)
    assert same(others, before[0]) and same(running, before[1])


@pytest.mark.parametrize(
    ("config", "routes", "message"),
    [
        (nm.Config(momentum_form="sum"), None, "Config.momentum_form was 'ema', is 'sum'"),
        (nm.Config(reduction="short"), None, "Config.reduction was 'rows', is 'short'"),
        (
            None,
            ROUTES | {"qkv": nm.Route(splits=(16, 4, 4))},
            r"route of 'qkv' had splits=\(8, 8, 8\), has \(16, 4, 4\)",
        ),
        (
            None,
            ROUTES | {"half": nm.Route(transposed=True)},
            "the route of 'half' had transposed=False, has True",
        ),
    ],
)
def test_a_state_of_another_meaning_is_refused(
    tmp_path: Path, config: nm.Config | None, routes: Any, message: str
) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    other, *_ = problem(config, 0, routes)
    with pytest.raises(nm.CheckpointError, match=message):
        nm.load(tmp_path / "run", other)


def test_a_configuration_that_differs_elsewhere_is_warned_of(tmp_path: Path) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    other, *_ = problem(nm.Config(guard="full", steps=6), 0)
    with pytest.warns(
        UserWarning,
        match="another configuration: Config.steps was 5, is 6; Config.guard was 'off', is 'full'",
    ):
        assert same(nm.load(tmp_path / "run", other).state, state)


@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"weight_decay_form": "hyperball"}, "had weight_decay_form=None, has 'hyperball'"),
        ({"weight_decay_form": "hyperball"}, {}, "had weight_decay_form='hyperball', has None"),
        ({}, {"weight_decay_form": "cautious"}, "had weight_decay_form=None, has 'cautious'"),
        ({}, {"cautious_update": True}, "had cautious_update=None, has True"),
        ({"lr_mul": 0.5}, {"lr_mul": 0.25}, "had lr_mul=0.5, has 0.25"),
        ({"wd_mul": 0}, {}, r"had wd_mul=0(\.0)?, has 1.0"),
        ({"lr_mul": 1}, {"lr_mul": 1.0}, None),
    ],
)
def test_a_form_or_multiplier_of_a_route_that_changed_has_no_state_and_is_said(
    tmp_path: Path, before: Any, after: Any, said: str | None, shell: bool, eager: None
) -> None:
    """A decay form keeps nothing from step to step: on a hyperball the norm is that of the weights
    that are loaded, of which none may be zero (tests/step/test_zero_matrices.py)."""
    w = torch.randn(6, 8)
    old, new = ({"w": nm.Route("normuon", **fields)} for fields in (before, after))
    expects = (
        contextlib.nullcontext()
        if said is None
        else pytest.warns(UserWarning, match=f"another configuration: the route of 'w' {said}")
    )
    if shell:
        saved = nm.NorMuon([("w", nn.Parameter(w))], routes=old).state_dict()
        with expects:
            nm.NorMuon([("w", nn.Parameter(w.clone()))], routes=new).load_state_dict(saved)
        return
    plan = nm.make_plan({"w": w}, routes=old)
    nm.save(tmp_path / "run", {"w": w}, nm.init(plan, {"w": w}), plan)
    with expects:
        found = nm.load(tmp_path / "run", nm.make_plan({"w": w}, routes=new))
    assert torch.equal(found.params["w"], w)


def test_variances_that_are_left_out_or_added_are_told_by_their_option(tmp_path: Path) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    message = r"Config.normalize was True, is False: write Config\(normalize=True\)"
    with pytest.raises(nm.CheckpointError, match=message):
        nm.load(tmp_path / "run", problem(nm.Config(normalize=False), 0)[0])
    message = r"Config.reduction was 'rows', is 'entries': write Config\(reduction='rows'\)"
    with pytest.raises(nm.CheckpointError, match=message):
        nm.load(tmp_path / "run", problem(nm.Config(reduction="entries"), 0)[0])
    with (
        pytest.warns(UserWarning, match="Config.master was 'none', is 'mantissa'"),
        pytest.raises(nm.CheckpointError, match=r"write Config\(master='none'\)"),
    ):
        nm.load(tmp_path / "run", problem(nm.Config(master="mantissa"), 0)[0])
    with (
        pytest.warns(UserWarning, match="Config.momentum_dtype was None"),
        pytest.raises(nm.CheckpointError, match=r"float32 .*write Config\(momentum_dtype=torch.fl"),
    ):
        nm.load(tmp_path / "run", problem(nm.Config(momentum_dtype=torch.bfloat16), 0)[0])


def test_arguments_that_make_no_sense_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    plan, params, state = problem()
    for broken, error, message in (
        (({"z.w": params["z.w"]}, state, {}), ValueError, "params: missing"),
        ((params, {}, {}), ValueError, "state: missing"),
        (
            (params, state, {"model": object()}),
            TypeError,
            r"extra\['model'\]: expected a tensor or a JSON value, got object",
        ),
        (
            (params, state, [1]),
            TypeError,
            "extra: expected a dict of tensors and JSON values, got list",
        ),
        ((params, state, {1: torch.zeros(2)}), TypeError, "extra: expected strings as keys, got 1"),
    ):
        with pytest.raises(error, match=message):
            nm.save(tmp_path / "run", broken[0], broken[1], plan=plan, extra=broken[2])
    with pytest.raises(FileNotFoundError):
        nm.save(tmp_path / "no" / "run", params, state, plan=plan)
    with pytest.raises(FileNotFoundError, match="no such file"):
        nm.load(tmp_path / "run")
    with pytest.raises(ValueError, match="they need plan="):
        nm.load(tmp_path / "run", params=params)
    assert os.listdir(tmp_path) == []


def test_tensors_on_another_device_than_the_plans_are_saved_and_loaded_into(tmp_path: Path) -> None:
    plan, params, state = problem()
    elsewhere = dataclasses.replace(plan, device=torch.device("cuda", 7))
    nm.save(tmp_path / "run", params, state, plan=elsewhere)
    _, here, there = problem(steps=0)
    nm.load(tmp_path / "run", elsewhere, params=here, state=there)
    assert same(here, params) and same(there, state)


KEPT = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
]  # fmt: skip


def test_tensors_of_every_dtype_that_is_taken_come_back_as_they_were(tmp_path: Path) -> None:
    plan, params, state = problem()
    extra = {str(dtype): torch.arange(4).to(dtype) for dtype in KEPT}
    extra |= {"conjugate": torch.tensor([1 + 2j]).conj(), "empty": torch.empty(0, 3)}
    nm.save(tmp_path / "run", params, state, plan=plan, extra=extra)
    assert same(nm.load(tmp_path / "run").extra, extra)


REFUSED: dict[str, tuple[Any, str]] = {
    "complex128": (
        torch.zeros(2, dtype=torch.complex128),
        r"extra\['x'\]: expected a dense tensor .* torch.complex128",
    ),
    "sparse": (
        torch.eye(2).to_sparse(),
        r"extra\['x'\]: expected a dense tensor .* torch.sparse_coo",
    ),
    "meta": (torch.empty(2, device="meta"), r"extra\['x'\]: expected a dense tensor .* on meta"),
    "tuple": ((1.5, 2.5), r"extra\['x'\]: a tuple would come back as a list"),
    "a tuple inside": (
        {"betas": [(0.9, 0.95)]},
        r"extra\['x'\]\['betas'\]\[0\]: a tuple would come back as a list",
    ),
    "numbers as keys": ({1: "a"}, r"extra\['x'\]: expected strings as keys, got 1"),
    "a tensor inside": ([torch.zeros(2)], r"extra\['x'\]\[0\]: a tensor inside of something"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_extra_that_would_not_come_back_as_it_is_is_refused(tmp_path: Path, case: str) -> None:
    plan, params, state = problem()
    value, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        nm.save(tmp_path / "run", params, state, plan=plan, extra={"x": value})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ torch's own checkpoints

SINGLE = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def test_torch_save_and_a_load_of_weights_only_round_trip(tmp_path: Path) -> None:
    plan, params, state = problem()
    torch.save({"params": params, "state": state}, tmp_path / "run.pt")
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    assert same(found["params"], params) and same(found["state"], state)
    nm.update(found["params"], found["params"], found["state"], nm.Hyper.of(params, lr=0.02), plan)


@pytest.mark.parametrize("asynchronous", [False, True])
@SINGLE
def test_distributed_checkpoints_round_trip_in_place(tmp_path: Path, asynchronous: bool) -> None:
    _, params, state = problem()
    run = {"params": params, "state": state, "step": 2}
    if asynchronous:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            pending = dcp.async_save(run, checkpoint_id=tmp_path / "run")
            expected = copies(params), copies(state)
            for tensor in (*params.values(), *state.values()):
                tensor.zero_()  # the run goes on in place meanwhile
            pending.result()
        finally:
            torch.distributed.destroy_process_group()
        params, state = expected
    else:
        dcp.save(run, checkpoint_id=tmp_path / "run", no_dist=True)
    _, here, there = problem(steps=0)
    into = {"params": here, "state": there, "step": 0}
    dcp.load(into, checkpoint_id=tmp_path / "run", no_dist=True)
    assert same(here, params) and same(there, state) and into["step"] == 2


@SINGLE
def test_a_model_and_the_state_go_through_dcps_state_dict_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = nm.make_plan(params, routes=nm.routes_for(model, {"1.weight": nm.Route()}))
    params, state = advance(plan, params, nm.init(plan, params))
    set_model_state_dict(model, params)
    dcp.save(
        {"model": get_model_state_dict(model), "normuon": state},
        checkpoint_id=tmp_path / "run",
        no_dist=True,
    )

    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    fresh = nm.init(plan, {name: p.detach() for name, p in other.named_parameters()})
    of_model = get_model_state_dict(other)
    dcp.load({"model": of_model, "normuon": fresh}, checkpoint_id=tmp_path / "run", no_dist=True)
    set_model_state_dict(other, of_model)
    assert same(fresh, state) and all(
        torch.equal(p, params[name]) for name, p in other.named_parameters()
    )


@pytest.mark.parametrize(("saved", "other"), [("mantissa", "none"), ("mantissa", "fp32")])
@pytest.mark.filterwarnings("ignore:.*was saved with another configuration")
def test_the_line_to_write_for_masters_is_what_the_file_was_saved_with(
    saved: Any, other: Any, tmp_path: Path
) -> None:
    plan, params, state = problem(nm.Config(master=saved))
    nm.save(tmp_path / "run", params, state, plan=plan)
    with pytest.raises(nm.CheckpointError, match=rf"write Config\(master='{saved}'\)"):
        nm.load(tmp_path / "run", problem(nm.Config(master=other), 0)[0])
    nm.load(tmp_path / "run", problem(nm.Config(master=saved), 0)[0])
