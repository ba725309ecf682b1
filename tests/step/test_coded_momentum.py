"""A momentum of one byte an entry: the step of what its codes stand for, kept, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.ops.codes import quantized, restored
from normuon_fn.planning import buckets
from normuon_fn.step import local_update_ as step_
from tests.optim.test_optimizer import Net, states, three, train, weights
from tests.runtime.test_graphed import Rehearsed

SHAPES = {
    "wide": (6, 130), "tall": (130, 6), "qkv": (24, 70), "in_proj": (5, 140), "conv": (8, 9, 3, 3),
    "experts": (3, 4, 66), "odd": (3, 7), "bias": (5,),
}  # fmt: skip
ROUTES = {
    "qkv": nm.Route(splits=(8, 8, 8), heads=(2, 1, 1)),
    "in_proj": nm.Route(dim=1, heads=2),
    "conv": nm.Route(flatten=True),
    **dict.fromkeys(("wide", "tall", "experts", "odd"), nm.Route()),
}
MATRICES = [name for name in SHAPES if name != "bias"]


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator) * scale for k, shape in SHAPES.items()}


def plan_of(dtype: Any = "int8", **options: Any) -> nm.Plan:
    return nm.make_plan(tensors(0), nm.Config(momentum_dtype=dtype, **options), routes=ROUTES)


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.clone() for k, x in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


def run(plan: nm.Plan, steps: int = 3, scale: float = 1.0, **hyper: float) -> Any:
    params = tensors(0)
    state = nm.init(params, plan)
    of = nm.Hyper.of(params, lr=0.02, weight_decay=0.1, **hyper)
    for k in range(steps):
        step_(params, tensors(1 + k, scale), state, of, plan)
    return params, state, of


def momentum_of(plan: nm.Plan, state: dict[str, Tensor], name: str) -> Tensor:
    """What the codes of a parameter stand for, in its shape."""
    codes, scales = state[f"{name}.momentum"], state[f"{name}.momentum_scale"]
    out = torch.zeros(codes.shape)
    for block in next(p.blocks for p in plan.parameters if p.name == name):
        block.param.write(out, restored(block.param.read(codes), block.scale.read(scales)))
    return out


# --- the step


@pytest.mark.parametrize("form", ["ema", "sum"])
def test_a_step_is_that_of_what_the_new_codes_stand_for(form: Any) -> None:
    plan = plan_of(momentum_form=form)
    params, state, hyper = run(plan)
    before, kept, grads = clones(params), clones(state), tensors(9)
    step_(params, grads, state, hyper, plan)
    exact, now = plan_of(None, momentum_form="sum"), {}
    for name in MATRICES:
        old, now[name] = (momentum_of(plan, x, name) for x in (kept, state))
        share = grads[name] * (1 - hyper.momentum) if form == "ema" else grads[name]
        off = (now[name] - (old * hyper.momentum + share)).abs()
        assert float(off.max()) <= float(now[name].abs().max()) / 127
    plain = {k: x for k, x in kept.items() if not k.endswith("_scale")}
    for name in MATRICES:  # M <- 0 M + G: the gradient is what is orthogonalized
        plain[f"{name}.momentum"] = torch.zeros(SHAPES[name])
    of_zero = hyper._replace(momentum=torch.zeros(()))
    step_(before, {**grads, **now}, plain, of_zero, exact)
    assert same(before, params)
    for key in plain:
        assert key.endswith(".momentum") or torch.equal(plain[key], state[key]), key


def test_heads_splits_and_filters_have_the_codes_of_matrices_of_their_own() -> None:
    params, grads = tensors(0), tensors(1)
    plan = plan_of()
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    step_(params, grads, state, hyper, plan)
    apart = {
        "qkv": [x for part in grads["qkv"].split(8) for x in part.split(8)],
        "in_proj": list(grads["in_proj"].split(70, 1)),
        "conv": [grads["conv"].flatten(1)],
        "experts": list(grads["experts"]),
    }
    apart["qkv"] = [*grads["qkv"][:8].split(4), *grads["qkv"][8:].split(8)]
    for name, parts in apart.items():
        new = [quantized(part * (1 - hyper.momentum)) for part in parts]
        codes, scales = state[f"{name}.momentum"], state[f"{name}.momentum_scale"]
        dim = 1 if name == "in_proj" else 0
        whole = torch.stack if name == "experts" else lambda x, dim=dim: torch.cat(x, dim)
        assert torch.equal(
            codes.reshape(whole([x for x, _ in new]).shape), whole([x for x, _ in new])
        )
        assert torch.equal(scales, whole([x for _, x in new]))


@pytest.mark.parametrize("exponent", [-60, -1, 60])
def test_gradients_times_a_power_of_two_change_scales_alone(exponent: int) -> None:
    plan = plan_of(nesterov=True)
    params, state, _ = run(plan)
    other, scaled, _ = run(plan, scale=2.0**exponent)
    for name in MATRICES:
        assert torch.equal(params[name], other[name])
        assert torch.equal(state[f"{name}.momentum"], scaled[f"{name}.momentum"])
        a, b = (x[f"{name}.momentum_scale"].int() for x in (state, scaled))
        assert torch.equal(torch.where(a > 0, a + exponent, 0), b)


@pytest.mark.parametrize("how", ["gradient", "found_inf", "bucket"])
def test_a_skipped_step_keeps_codes_and_scales(how: str) -> None:
    plan = plan_of(guard="full", guard_scope="bucket" if how == "bucket" else "step")
    params, state, hyper = run(plan)
    before, kept, grads = clones(params), clones(state), tensors(9)
    found_inf = torch.ones(()) if how == "found_inf" else None
    if how != "found_inf":
        grads["wide"][0, 0] = float("nan")
    result = step_(params, grads, state, hyper, plan, found_inf=found_inf)
    assert bool(result.skipped)
    names = ["wide", "tall"] if how == "bucket" else MATRICES  # one stack
    for name in names:
        assert torch.equal(params[name], before[name])
        for kind in ("momentum", "momentum_scale", "variance"):
            assert torch.equal(state[f"{name}.{kind}"], kept[f"{name}.{kind}"])
    if how == "bucket":
        assert not torch.equal(state["odd.momentum"], kept["odd.momentum"])


@pytest.mark.parametrize("guard", ["off", "output", "full"])
def test_graphs_have_the_bits_of_the_step_as_it_is_written(
    guard: Any, without_inductor: None
) -> None:
    plan = plan_of(guard=guard, nesterov=True)
    params, state, hyper = run(plan)
    pure = nm.step(params, tensors(9), state, hyper, plan)
    written = clones(params), clones(state)
    nm.step_(written[0], tensors(9), written[1], hyper, plan)
    step_(params, tensors(9), state, hyper, plan)
    for found in ((pure.params, pure.state), written):
        assert same(dict(found[0]), params) and same(dict(found[1]), state)


def test_inductor_has_the_bits_of_the_step_as_it_is_written() -> None:
    plan = plan_of(guard="full")
    params, state, hyper = run(plan)
    result = nm.step(params, tensors(9), state, hyper, plan)
    step_(params, tensors(9), state, hyper, plan)
    for name in MATRICES:
        assert torch.equal(result.state[f"{name}.momentum"], state[f"{name}.momentum"])
        scale = f"{name}.momentum_scale"
        assert torch.equal(result.state[scale], state[scale])
        assert float((result.params[name] - params[name]).abs().max()) < 1e-6


def test_members_of_a_vmap_have_codes_of_their_own() -> None:
    plan = plan_of(nesterov=True)
    hyper, each = nm.Hyper.of(tensors(0), lr=0.02), [run(plan, scale=s)[:2] for s in (1.0, 3.0)]
    many = [{k: torch.stack([a[k], b[k]]) for k in a} for a, b in zip(*each, strict=True)]
    grads = {k: torch.stack([x, 2 * x]) for k, x in tensors(9).items()}
    both = torch.func.vmap(lambda p, g, s: nm.update(p, g, s, hyper, plan))(many[0], grads, many[1])
    for k, (params, state) in enumerate(each):
        own = nm.update(params, {key: x[k] for key, x in grads.items()}, state, hyper, plan)
        for name in MATRICES:
            codes = both.state[f"{name}.momentum"][k].int() - own.state[f"{name}.momentum"].int()
            assert int(codes.abs().max()) <= 1
            assert float((both.params[name][k] - own.params[name]).abs().max()) < 2e-3


def test_a_captured_step_writes_the_same_codes_again_and_again(eager: None) -> None:
    plan = plan_of(guard="full")
    params, state, hyper = run(plan)
    expected, kept, grads = clones(params), clones(state), tensors(9)
    graphed = Rehearsed(plan)
    for _ in range(4):
        graphed(params, grads, state, hyper)
        step_(expected, grads, kept, hyper, plan)
    assert graphed.did() == "plain capture replay replay replay"
    assert same(params, expected) and same(state, kept)


def test_all_state_of_a_large_matrix_takes_no_more_than_2_1_bytes_an_entry() -> None:
    params = {"w": torch.zeros(256, 1024, dtype=torch.bfloat16)}
    plan = nm.make_plan(params, nm.Config(momentum_dtype="int8"), routes={"w": nm.Route()})
    state = nm.init(params, plan)
    assert sum(x.nbytes for k, x in state.items() if k.startswith("w.")) / (256 * 1024) <= 1.05


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_a_bucket_in_chunks_has_the_same_codes(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {f"w{k}": x for k, x in enumerate(torch.randn(5, 6, 70, generator=torch.Generator()))}
    config, routes = nm.Config(momentum_dtype="int8", nesterov=True), {"*": nm.Route()}
    found = []
    for size in (1000, at_a_time):
        monkeypatch.setattr(buckets, "CHUNK", size * 6 * 70 * 4)
        plan, own = nm.make_plan(params, config, routes=routes), clones(params)
        state, hyper = nm.init(own, plan), nm.Hyper.of(own, lr=0.02)
        for held in (0.0, 1.0, 0.0):  # with found_inf, momentums are written late
            result = step_(own, params, state, hyper, plan, found_inf=torch.tensor(held))
            assert bool(result.skipped) == bool(held)
        step_(own, params, state, hyper, plan)
        # Not the parameters: the library may round the products of a chunk in another way.
        found.append({key: x for key, x in state.items() if "momentum" in key})
        assert len(found[-1]) == 10
    assert same(*found)


# --- saved and loaded


@pytest.mark.parametrize("ways", [("int8", "int8"), (None, "int8"), ("int8", None)])
def test_a_file_is_loaded_into_codes_and_into_floats(tmp_path: Path, ways: Any) -> None:
    source, target = map(plan_of, ways)
    params, state, _ = run(source)
    nm.save(tmp_path / "run", params, state, source)
    plan_changed = pytest.warns(UserWarning, match="momentum_dtype") if ways[0] != ways[1] else None
    into = nm.init(tensors(5), target)
    if plan_changed is None:
        found = nm.load(tmp_path / "run", target, state=into).state
    else:
        with plan_changed:
            found = nm.load(tmp_path / "run", target, state=into).state
    assert list(found) == list(nm.init(tensors(0), target))
    _converted(source, state, target, found)


def _converted(
    source: nm.Plan, state: dict[str, Tensor], target: nm.Plan, found: dict[str, Tensor]
) -> None:
    for name in MATRICES:
        old, new = (
            momentum_of(plan, x, name) if f"{name}.momentum_scale" in x else x[f"{name}.momentum"]
            for plan, x in ((source, state), (target, found))
        )
        if "wide.momentum_scale" in state:
            assert torch.equal(old, new)
        else:
            assert float((old - new).abs().max()) <= float(old.abs().max()) / 127
            assert not torch.equal(old, torch.zeros_like(old))
        assert torch.equal(found[f"{name}.variance"], state[f"{name}.variance"])


def test_a_file_without_a_warning_in_its_order_is_what_was_saved(tmp_path: Path) -> None:
    plan = plan_of()
    params, state, _ = run(plan)
    nm.save(tmp_path / "run", params, state, plan)
    found = nm.load(tmp_path / "run")
    assert same(found.state, state) and list(found.state) == list(state)


@pytest.mark.parametrize("ways", [("int8", "int8"), (None, "int8"), ("int8", None)])
def test_an_optimizer_loads_codes_and_floats(eager: None, ways: Any) -> None:
    def made(dtype: Any) -> tuple[Net, nm.NorMuon]:
        model = Net()
        return model, nm.NorMuon(three(model), config=nm.Config(momentum_dtype=dtype))

    (model, source), (other, target) = map(made, ways)
    train(model, source, range(3))
    other_dtype = pytest.warns(UserWarning, match="Config.momentum_dtype was")
    with contextlib.nullcontext() if ways[0] == ways[1] else other_dtype:
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    other.load_state_dict(model.state_dict())
    for p, q in ((model.up.weight, other.up.weight), (model.square.weight, other.square.weight)):
        a, b = (
            restored(kept["momentum"], kept["momentum_scale"])
            if "momentum_scale" in kept
            else kept["momentum"]
            for kept in (source.state[p], target.state[q])
        )
        assert float((a - b).abs().max()) <= float(a.abs().max()) / 127 and bool(a.any())
        assert torch.equal(a, b) or ways[0] is None
    before = weights(model)
    train(model, source, range(3, 5))
    train(other, target, range(3, 5))
    now, of = weights(model), weights(other)
    off = max(
        float((now[name] - of[name]).norm() / (now[name] - x).norm())
        for name, x in before.items()
        if x.ndim > 1
    )
    assert off == 0 if ways[0] == ways[1] else 0 < off < 0.1, off


def test_a_load_of_scales_that_do_not_fit_writes_nothing(eager: None) -> None:
    model = Net()
    source = nm.NorMuon(three(model), config=nm.Config(momentum_dtype="int8"))
    train(model, source, range(2))
    saved = copy.deepcopy(source.state_dict())
    for kinds in saved["state"].values():
        if "momentum_scale" in kinds:
            kinds["momentum_scale"] = kinds["momentum_scale"][:1]
    target = nm.NorMuon(three(Net()))
    before = {k: x.clone() for k, x in states(target).items()}
    with (
        pytest.warns(UserWarning, match="Config.momentum_dtype was torch.int8, is None"),
        pytest.raises(ValueError, match=r"expected a momentum_scale of shape"),
    ):
        target.load_state_dict(saved)
    assert same(states(target), before)


def test_another_optimizers_momentum_becomes_codes() -> None:
    weight = nn.Parameter(torch.randn(6, 70, generator=torch.Generator().manual_seed(0)))
    muon = {"state": {0: {"momentum_buffer": weight.detach() * 3}}, "param_groups": [
        {"params": [0], "lr": 0.02, "momentum": 0.95, "nesterov": True}
    ]}  # fmt: skip
    plan = nm.make_plan(
        {"w": weight.detach()}, nm.Config(momentum_dtype="int8"), routes={"w": nm.Route()}
    )
    state = nm.convert_state(muon, plan, ["w"], source_momentum="ema", step=3)
    codes, scales = quantized(weight.detach() * 3)
    assert torch.equal(state["w.momentum"], codes) and torch.equal(
        state["w.momentum_scale"], scales
    )


def test_a_capture_has_what_the_codes_stand_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plan = plan_of(guard="output")
    params, state, hyper = run(plan)
    grads = tensors(9)
    grads["wide"][0, 0] = float("inf")
    result = step_(params, grads, state, hyper, plan)
    path = nm.capture(result, plan, grads, tmp_path, hyper=hyper)
    found = load_file(path.with_suffix(".safetensors"))
    assert bool(found["wide.input"].isnan().any()) and found["wide.input"].dtype == torch.float32


# --- what is refused


def test_lists_have_no_place_for_scales_and_say_so() -> None:
    p = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"momentum_dtype='int8', whose scales .* write"):
        nm.foreach_step_(
            [p], [p], [torch.zeros_like(p, dtype=torch.int8)], [torch.zeros(4, 1)],
            lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0,
            config=nm.Config(momentum_dtype="int8"),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["int4", torch.uint8, "bfloat16", torch.float16])
def test_no_other_dtype_is_taken_for_a_momentum(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"Config.momentum_dtype"):
        nm.Config(momentum_dtype=dtype)
    assert nm.Config(momentum_dtype="int8") == nm.Config(momentum_dtype=torch.int8)


@pytest.mark.parametrize("guard", ["off", "full"])
def test_metrics_are_of_what_codes_stand_for_and_change_no_bit(guard: Any) -> None:
    plan, plain = plan_of(metrics=True, guard=guard), run(plan_of(guard=guard), 2)
    params, state, hyper = run(plan, 2)
    assert same(params, plain[0]) and same(state, plain[1])
    result: Any = nm.update(params, tensors(9), state, hyper, plan)
    numbers = nm.report_metrics(result, plan)
    for name in MATRICES:
        now = momentum_of(plan, result.state, name).double()
        assert numbers[f"momentum_rms/{name}"] == pytest.approx(now.square().mean().sqrt().item())
        grad = tensors(9)[name].double()
        assert numbers[f"grad_rms/{name}"] == pytest.approx(grad.square().mean().sqrt().item())
        assert numbers[f"update_rms/{name}"] == pytest.approx(0.2 * 0.02, rel=1e-5)
    bad = {**tensors(9), "wide": tensors(9)["wide"] * float("nan")}
    result = nm.update(params, bad, state, hyper, plan)
    if guard == "full":  # codes and scales keep their bits, and the number is theirs
        kept = momentum_of(plan, state, "odd").double().square().mean().sqrt().item()
        assert nm.report_metrics(result, plan)["momentum_rms/odd"] == pytest.approx(kept)


def test_a_step_refuses_a_momentum_of_floats() -> None:
    plan = plan_of()
    params, state, hyper = run(plan)
    state["wide.momentum"] = state["wide.momentum"].float()
    with pytest.raises(ValueError, match=r"wide.momentum.*expected dense torch.int8"):
        step_(params, tensors(9), state, hyper, plan)
