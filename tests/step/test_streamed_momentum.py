"""``Config(state_device="cpu")``: momentums in host memory, with the bits of those on the device.

A CPU stands in for the device: its ring has memory of its own, through which all momentums pass.
The streams of a GPU are in test_streams_of_a_ring.py and tests/test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import normuon_fn as nm
from normuon_fn.planning import streaming
from normuon_fn.step import local_update_
from tests.optim.test_optimizer import Net, states, three, train, weights
from tests.runtime.test_graphed import Rehearsed

pytestmark = pytest.mark.usefixtures("without_inductor")
SHAPES = {
    "wide": (8, 16), "tall": (16, 8), "also_wide": (8, 16), "experts": (4, 8, 16),
    "square": (24, 24), "other": (24, 24), "qkv": (24, 8), "bias": (7,),
}  # fmt: skip
ROUTES = {"qkv": nm.Route(splits=(16, 8)), "bias": nm.Route("adamw"), "*": nm.Route()}
Step = Callable[..., nm.StepResult]
Tensors = dict[str, Tensor]


def random(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def run(
    step: Step, *, faults: bool = False, lacks: bool = False, **config: Any
) -> tuple[Tensors, Tensors]:
    """Parameters and state after three steps, of which one may be skipped or lack a gradient."""
    params = random(0)
    if config.get("master"):
        params = {name: x.bfloat16() for name, x in params.items()}
    plan = nm.make_plan(params, nm.Config(steps=1, **config), routes=ROUTES)
    state = nm.init(params, plan)
    hyper = nm.Hyper.of(params, lr=0.1, weight_decay=0.1)
    for k in range(3):
        grads: dict[str, Any] = {
            name: x.to(params[name].dtype) for name, x in random(9 + k).items()
        }
        if k == 1 and faults:
            grads["tall"][0, 0] = float("nan")
        if k == 2 and lacks:
            grads["also_wide"] = None
        result = step(params, grads, state, hyper, plan)
        params, state = result.params, result.state
    return params, state


def assert_same(found: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "guard": "output", "momentum_form": "sum"},
    "int8": {"momentum_dtype": "int8", "guard": "full"},
    "bfloat16": {"momentum_dtype": torch.bfloat16, "precondition": "rows"},
    "bucket": {"guard": "full", "guard_scope": "bucket"},
    "master": {"master": "mantissa", "guard": "full"},
    "metrics": {"metrics": True, "guard": "output", "cautious_update": True},
    "muon": {"normalize": False, "scale": "muon"},
}


@pytest.mark.parametrize(
    ("form", "step"),
    [*((form, nm.step_) for form in FORMS), ("int8", nm.step), ("plain", nm.update)],
)
def test_a_step_has_the_bits_of_one_with_its_momentum_on_the_device(form: str, step: Step) -> None:
    config = FORMS[form]
    given = {"faults": "guard" in config, "lacks": form == "plain", **config}
    assert_same(run(step, state_device="cpu", **given), run(local_update_, **given))


@pytest.mark.parametrize("slots", [2, 3])
def test_few_slots_serve_many_pieces(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(local_update_)
    size = 24 * 24 * 4  # of the largest: every other block fits
    monkeypatch.setattr(streaming, "PIECE", size)
    monkeypatch.setattr(streaming, "RING", slots * size)
    monkeypatch.setattr(streaming, "_SHARE", 1)
    plan = nm.make_plan(random(0), nm.Config(state_device="cpu"), routes=ROUTES)
    assert plan.streaming is not None and plan.streaming[:2] == (size, slots)
    assert_same(run(nm.step_, state_device="cpu"), expected)


def test_a_skipped_step_leaves_the_momentum_in_host_memory_as_it_was() -> None:
    params, hyper = random(0), nm.Hyper.of(random(0), lr=0.1)
    plan = nm.make_plan(params, nm.Config(guard="full", state_device="cpu"), routes=ROUTES)
    state = nm.init(params, plan)
    nm.step_(params, random(1), state, hyper, plan)
    before = {key: x.clone() for key, x in state.items() if not key.startswith("guard.")}
    bad = random(2)
    bad["square"][3, 3] = float("inf")
    for each in ({"found_inf": torch.ones(())}, {}):
        grads = random(2) if each else bad
        assert nm.step_(params, grads, state, hyper, plan, **each).skipped
        assert all(torch.equal(state[key], x) for key, x in before.items())


@pytest.mark.parametrize("step", [nm.step, nm.update])
def test_a_pure_step_writes_nothing_that_it_was_given(step: Step) -> None:
    params, hyper = random(0), nm.Hyper.of(random(0), lr=0.1)
    plan = nm.make_plan(params, nm.Config(state_device="cpu"), routes=ROUTES)
    state = nm.init(params, plan)
    state = step(params, random(1), state, hyper, plan).state
    before = {key: x.clone() for key, x in state.items()}
    new = step(params, random(2), state, hyper, plan).state
    assert all(torch.equal(state[key], x) for key, x in before.items())
    momentums = [key for key in new if key.endswith(".momentum")]
    assert momentums and not any(torch.equal(new[key], before[key]) for key in momentums)


def test_a_ring_is_small_and_its_slots_are_aligned() -> None:
    """A GPT with 1.3B parameters, a small model, and one of many parameters of odd sizes."""
    large = [(96, 2048, 2048), (24, 8192, 2048), (24, 2048, 8192)]
    for shapes, ring, most in (
        (large, 2**30, 2**20),
        ([(48, 64, 64)], 48 * 64 * 64, 64),
        ([(5000, 1111, 77)], 2**30 + 2**27, 300),
    ):
        with torch.device("meta"):
            sizes = [(rows, cols) for count, rows, cols in shapes for _ in range(count)]
            params = {f"w{k}": torch.empty(size) for k, size in enumerate(sizes)}
        plan = nm.make_plan(params, nm.Config(state_device="cpu"), routes={"*": nm.Route()})
        found = plan.streaming
        assert found is not None and found.size % 256 == 0 and found.slots >= 2
        assert found.slots * found.size <= ring and found.total // found.size <= most


def test_momentum_is_in_host_memory_and_variance_and_moments_are_not() -> None:
    with torch.device("meta"):
        params = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    config = nm.Config(state_device="cpu", momentum_dtype="int8")
    plan = nm.make_plan(params, config, routes=ROUTES)
    state = nm.init(params, plan)
    kinds = {key: x.device.type for key, x in state.items()}
    host = {key for key, device in kinds.items() if device == "cpu"}
    assert host == {key for key in kinds if ".momentum" in key} and len(host) == 14
    assert "state_device='cpu'" in str(plan) and "slots" in str(plan)
    with pytest.raises(ValueError, match=r"state\['wide.momentum'\]: expected device cpu"):
        wrong = {**state, "wide.momentum": state["wide.momentum"].to("meta")}
        nm.update(params, params, wrong, nm.Hyper.of(params, lr=0.1), plan)


def test_a_momentum_whose_splits_cut_its_columns_stays_on_the_device() -> None:
    params = {"qkv": torch.randn(8, 24), "square": torch.randn(8, 8)}
    routes = {"qkv": nm.Route(splits=(8, 8, 8), dim=1), "*": nm.Route()}
    found = []
    for state_device in (None, "cpu"):
        own = {name: x.clone() for name, x in params.items()}
        plan = nm.make_plan(own, nm.Config(state_device=state_device), routes=routes)  # type: ignore[arg-type]
        state = nm.init(own, plan)
        nm.step_(own, params, state, nm.Hyper.of(own, lr=0.1), plan)
        found.append((own, state))
    assert not plan.state["qkv.momentum"].host and plan.state["square.momentum"].host
    assert_same(*found)


# --- who else meets such a state


def test_a_checkpoint_is_that_of_a_state_on_the_device(tmp_path: Path) -> None:
    params, state = run(nm.step_, state_device="cpu")
    plans = {
        where: nm.make_plan(params, nm.Config(steps=1, state_device=where), routes=ROUTES)  # type: ignore[arg-type]
        for where in (None, "cpu")
    }
    nm.save(tmp_path / "run", params, state, plans["cpu"])
    for plan in plans.values():  # without a warning
        assert_same(nm.load(tmp_path / "run", plan)[:2], (params, state))
    zeros = nm.init(params, plans["cpu"])
    places = {key: x.data_ptr() for key, x in zeros.items()}
    nm.load(tmp_path / "run", plans["cpu"], params=params, state=zeros)
    assert_same((zeros, zeros), (state, state))
    assert places == {key: x.data_ptr() for key, x in zeros.items()}


def test_an_optimizer_has_the_bits_and_the_state_dict_of_one_on_the_device() -> None:
    models = Net(), Net()
    config = nm.Config(state_device="cpu", guard="full")
    here = nm.NorMuon(three(models[0]), config=config)
    there = nm.NorMuon(three(models[1]), config=nm.Config(guard="full"))
    for steps in (range(2), range(2, 4)):
        train(models[0], here, steps)
        train(models[1], there, steps)
        assert_same((weights(models[0]), states(here)), (weights(models[1]), states(there)))
        saved = here.state_dict()  # each goes on with what the other had
        here.load_state_dict(there.state_dict())
        there.load_state_dict(saved)


def test_an_optimizer_that_was_offloaded_and_came_back_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from normuon_fn.runtime import offloading

    monkeypatch.setattr(offloading, "is_elsewhere", lambda x, device: x.ndim > 0)
    model = Net()
    optimizer = nm.NorMuon(three(model), config=nm.Config(state_device="cpu"))
    train(model, optimizer, range(2))
    momentum = optimizer.state[model.square.weight]["momentum"]
    optimizer.offload_()
    where = momentum.data_ptr()
    optimizer.reload_()
    assert momentum.data_ptr() == where  # it stays in the memory of the host
    train(model, optimizer, range(2, 3))


def test_lists_have_the_bits_of_momentums_on_the_device() -> None:
    found = []
    for state_device in (None, "cpu"):
        params = [x for x in random(0).values() if x.ndim > 1]
        momentums = [torch.zeros_like(x) for x in params]
        variances = [torch.zeros_like(x[..., :1]) for x in params]
        grads = [x for x in random(1).values() if x.ndim > 1]
        rates = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.1}
        config = nm.Config(steps=1, state_device=state_device)  # type: ignore[arg-type]
        nm.foreach_step_(params, grads, momentums, variances, config=config, **rates)
        found.append([*params, *momentums, *variances])
    assert all(map(torch.equal, *found))


def test_a_captured_step_replays_with_the_same_bits() -> None:
    params, hyper = random(0), nm.Hyper.of(random(0), lr=0.1)
    plan = nm.make_plan(params, nm.Config(state_device="cpu", guard="full"), routes=ROUTES)
    expected, grads = {name: x.clone() for name, x in params.items()}, random(1)
    state, kept = nm.init(params, plan), nm.init(params, plan)
    graphed = Rehearsed(plan)
    for _ in range(3):
        graphed(params, grads, state, hyper)
        nm.step_(expected, grads, kept, hyper, plan)
    assert graphed.did() == "plain capture replay replay"
    assert_same((params, state), (expected, kept))


@pytest.mark.parametrize("step", [nm.update, nm.step_])
def test_a_graph_of_the_callers_has_the_bits_of_momentums_on_the_device(step: Step) -> None:
    found = []
    for state_device in (None, "cpu"):
        params = {name: random(0)[name] for name in ("wide", "qkv")}
        hyper = nm.Hyper.of(params, lr=0.1)
        config = nm.Config(state_device=state_device, steps=1)  # type: ignore[arg-type]
        plan = nm.make_plan(params, config, routes={"qkv": ROUTES["qkv"], "*": nm.Route()})
        state = nm.init(params, plan)

        def own(params: Tensors, grads: Tensors, state: Tensors, plan: nm.Plan = plan) -> Any:
            found = step(params, grads, state, hyper, plan)  # noqa: B023
            return found.params, found.state

        compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
        for k in range(2):
            grads = {name: random(1 + k)[name] for name in params}
            params, state = map(dict, compiled(params, grads, state))
        found.append((params, state))
    assert_same(*found)


def test_an_own_orthogonalizer_gets_the_stacks_that_it_would_get() -> None:
    seen: list[list[torch.Size]] = []

    def own(x: Tensor) -> Tensor:
        seen[-1].append(x.shape)
        return x / x.norm(dim=(-2, -1), keepdim=True)

    found = []
    for state_device in (None, "cpu"):
        seen.append([])
        params, hyper = random(0), nm.Hyper.of(random(0), lr=0.1)
        config = nm.Config(state_device=state_device, orthogonalizer=own)  # type: ignore[arg-type]
        plan = nm.make_plan(params, config, routes=ROUTES)
        state = nm.init(params, plan)
        local_update_(params, random(1), state, hyper, plan)
        found.append((params, state))
    assert_same(*found)
    assert seen[0] == seen[1]


# --- what is refused


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Config.state_device: expected None or 'cpu', got 'gpu'"):
        nm.Config(state_device="gpu")  # type: ignore[arg-type]


def test_what_ranks_share_is_refused_by_name() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        params, config = {"w": torch.zeros(4, 4)}, nm.Config(state_device="cpu")
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(
            ValueError, match=r"params\['w'\]: .*state_device.*one that ranks share"
        ):
            nm.make_plan(params, config, mesh=mesh, routes={"*": nm.Route()})
        alone: Any = {"mesh": "alone", "guard_mesh": mesh, "routes": {"*": nm.Route()}}
        with pytest.raises(ValueError, match=r"guard_mesh: Config\(state_device='cpu'\)"):
            guarded = nm.Config(state_device="cpu", guard="full")
            nm.make_plan(params, guarded, **alone)
        sharded = {"w": distribute_tensor(params["w"], mesh, [Shard(0)])}
        with pytest.raises(ValueError, match=r"params\['w'\]: .*state_device.*a DTensor"):
            nm.make_plan(sharded, config, routes={"*": nm.Route()})
    finally:
        dist.destroy_process_group()


def test_a_strided_momentum_and_what_vmap_maps_over_are_refused_by_name() -> None:
    params, hyper = {"w": torch.randn(4, 6)}, nm.Hyper.of({"w": torch.randn(4, 6)}, lr=0.1)
    plan = nm.make_plan(params, nm.Config(state_device="cpu"), routes={"*": nm.Route()})
    state = nm.init(params, plan)
    strided = {**state, "w.momentum": torch.zeros(6, 4).mT}
    with pytest.raises(ValueError, match=r"state\['w.momentum'\]: expected a contiguous tensor"):
        nm.update(params, params, strided, hyper, plan)

    def new(grad: Tensor) -> Tensor:
        return nm.update(params, {"w": grad}, state, hyper, plan).params["w"]

    with pytest.raises(
        ValueError, match=r"grads\['w'\]: expected one tensor for all that torch.vm"
    ):
        torch.vmap(new)(torch.randn(2, 4, 6))


def test_rates_may_be_mapped_over_and_differentiated_by() -> None:
    params, grads, found = random(0), random(1), []
    hyper = nm.Hyper.of(params, lr=0.1)
    for state_device in (None, "cpu"):
        plan = nm.make_plan(params, nm.Config(state_device=state_device), routes=ROUTES)  # type: ignore[arg-type]
        state = nm.init(params, plan)

        def new(lr: Tensor, plan: nm.Plan = plan, state: Tensors = state) -> Tensor:
            own = hyper._replace(lr=lr)
            return nm.update(params, grads, state, own, plan).params["square"]

        rate = torch.tensor(0.1, requires_grad=True)
        new(rate).sum().backward()
        found.append([torch.vmap(new)(torch.tensor([0.1, 0.2])), rate.grad])
    assert all(map(torch.equal, *found))
