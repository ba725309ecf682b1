"""GraphedStep: every call is exactly one step, whatever moves. The graph itself needs CUDA."""

from __future__ import annotations

import gc
import importlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.compat import observers
from normuon_fn.runtime import streams
from normuon_fn.runtime.graphed import GraphedStep

graphed_module = importlib.import_module("normuon_fn.runtime.graphed")
step_module = importlib.import_module("normuon_fn.step")  # the package names the function the same

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = {"square": (16, 16), "tall": (32, 16), "wide": (16, 32), "embed": (10, 16), "bias": (16,)}
Dicts = tuple[dict[str, Tensor], dict[str, Tensor]]


def random(device: str = "cpu", seed: int = 0, scale: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(scale * n for n in shape) for name, shape in SHAPES.items()}
    return {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()
    }


def clones(*given: dict[str, Tensor]) -> Any:
    return tuple({name: tensor.clone() for name, tensor in one.items()} for one in given)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refill(grads: dict[str, Tensor], seed: int) -> None:
    for name, grad in random(seed=seed, scale=grads["bias"].shape[0] // SHAPES["bias"][0]).items():
        grads[name].copy_(grad)


class Take:
    """Stands in for a captured graph: the call itself, into the tensors of the first result."""

    def __init__(self, call: Callable[[], nm.StepResult], log: list[str]) -> None:
        self.call, self.log = call, log
        self.result: Any = None

    def replay(self) -> None:
        self.log.append("replay")
        result = self.call()
        if self.result is None:
            self.result = result
        self.result.flags.copy_(result.flags)
        self.result.skipped.copy_(result.skipped)

    def free(self) -> None:
        self.log.append("free")


class Rehearsed(GraphedStep):
    """GraphedStep with a stand-in for CUDA. ``log``: what it did."""

    _device_type = "cpu"

    def __init__(self, plan: nm.Plan) -> None:
        super().__init__(plan)
        self.log: list[str] = []

    def _plain(self, call: Callable[[], nm.StepResult]) -> nm.StepResult:
        self.log.append("plain")
        return call()

    def _capture(self, call: Callable[[], nm.StepResult]) -> Take:
        self.log.append("capture")
        return Take(call, self.log)

    def did(self) -> str:
        done = " ".join(self.log)
        self.log.clear()
        return done


class Case:
    """A problem and its shadow: `agrees` says whether plain in-place steps led to the same bits."""

    def __init__(
        self,
        guard: Any = "off",
        device: str = "cpu",
        scale: int = 1,
        master: Any = "none",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params, self.grads = (
            {name: x.to(dtype) for name, x in random(device, seed, scale).items()}
            for seed in (0, 1)
        )
        self.plan = nm.make_plan(self.params, nm.Config(guard=guard, master=master))
        self.state = nm.init(self.plan, self.params)
        self.hyper = nm.Hyper.of(self.params, lr=0.02, weight_decay=0.1)
        self.expected: Dicts = clones(self.params, self.state)

    def shadow(
        self, grads: dict[str, Tensor | None] | None = None, found_inf: Tensor | None = None
    ) -> nm.StepResult:
        params, state = self.expected
        given = self.grads if grads is None else grads
        return graphed_module.step_(
            params, given, state, self.hyper, self.plan, found_inf=found_inf
        )

    def agrees(self) -> bool:
        return same(self.params, self.expected[0]) and same(self.state, self.expected[1])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic does not depend on what a step does: uncompiled, a test takes milliseconds."""
    monkeypatch.setattr(graphed_module, "step_", step_module.local_update_)


@pytest.fixture
def rehearsal(eager: None) -> tuple[Case, Rehearsed]:
    case = Case()
    return case, Rehearsed(case.plan)


def settle(case: Case, graphed: GraphedStep, calls: int = 2) -> None:
    for _ in range(calls):
        graphed(case.params, case.grads, case.state, case.hyper)
        case.shadow()


# --- the order of things


@pytest.mark.parametrize(
    ("master", "key"), [("mantissa", "mantissa"), ("fp32", "master"), ("stochastic", None)]
)
def test_masters_of_bfloat16_parameters_are_watched_as_all_state_is(
    eager: None, master: str, key: str | None
) -> None:
    case = Case("full", master=master, dtype=torch.bfloat16)
    graphed = Rehearsed(case.plan)
    before = clones(case.params)[0]
    settle(case, graphed, 3)
    assert (
        graphed.did() == "plain capture replay replay"
        and case.agrees()
        and not same(case.params, before)
    )
    case.grads["tall"][0, 0] = math.nan
    settle(case, graphed, 1)
    refill(case.grads, 5)
    settle(case, graphed, 1)
    assert case.agrees() and int(case.state["guard.skipped"]) == 1
    if key is not None:
        name = f"tall.{key}"
        case.state[name] = case.state[name].clone()
        with pytest.warns(RuntimeWarning, match=rf"state\['{name}'\] moved to another address"):
            settle(case, graphed, 1)
        settle(case, graphed, 1)
        assert graphed.did() == "replay replay free plain capture replay" and case.agrees()


def test_the_first_call_is_plain_the_second_captures_later_ones_replay(
    rehearsal: tuple[Case, Rehearsed],
) -> None:
    case, graphed = rehearsal
    for expected in ("plain", "capture replay", "replay", "replay"):
        graphed(case.params, case.grads, case.state, case.hyper)
        case.shadow()
        assert graphed.did() == expected
        assert case.agrees()
    assert int(case.state["guard.step"]) == 4


def test_values_live_through_their_tensors(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    for k in range(5):
        case.hyper.lr.fill_(0.1 / (k + 1))
        case.hyper.weight_decay.fill_(0.01 * k)
        refill(case.grads, k)
        graphed(case.params, case.grads, case.state, case.hyper)
        case.shadow()
    assert case.agrees() and graphed.did() == "plain capture replay replay replay replay"


def test_new_objects_for_the_same_tensors_are_the_same_tensors(
    rehearsal: tuple[Case, Rehearsed],
) -> None:
    case, graphed = rehearsal
    for _ in range(4):
        fresh = [
            {name: x.detach() for name, x in given.items()}
            for given in (case.params, case.grads, case.state)
        ]
        graphed(*fresh, nm.Hyper(*(x.detach() for x in case.hyper)))
        case.shadow()
    assert case.agrees() and graphed.did() == "plain capture replay replay replay"


def test_the_result_is_static(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    settle(case, graphed)
    first = graphed(case.params, case.grads, case.state, case.hyper)
    case.grads["tall"][0, 0] = math.nan
    assert graphed(case.params, case.grads, case.state, case.hyper) is first
    assert first.flags[1, case.plan.names.index("tall")] == 1


# --- what moves


MOVES = {
    "grads": (
        lambda c: c.grads.update(wide=c.grads["wide"].clone()),
        r"grads\['wide'\] moved.*set_to_none=False",
    ),
    "params": (
        lambda c: c.params.update(bias=c.params["bias"].clone()),
        r"params\['bias'\] moved.*copy_",
    ),
    "data": (
        lambda c: setattr(c.params["tall"], "data", c.params["tall"].clone()),
        r"params\['tall'\] moved",
    ),
    "state": (
        lambda c: c.state.update({"tall.momentum": c.state["tall.momentum"].clone()}),
        r"state\['tall.momentum'\] moved",
    ),
    "hyper": (
        lambda c: setattr(c, "hyper", c.hyper._replace(lr=torch.tensor(0.5))),
        r"hyper\.lr moved.*hyper\.lr\.fill_\(x\)",
    ),
    "strides": (
        lambda c: c.grads.update(square=c.grads["square"].mT),
        r"grads\['square'\] has other strides",
    ),
    "order": (
        lambda c: setattr(c, "grads", dict(reversed(c.grads.items()))),
        r"keys .* in another order",
    ),
    "none": (
        lambda c: c.grads.update(embed=None),
        r"grads\['embed'\] was a tensor and is None now",
    ),
}


@pytest.mark.parametrize("what", list(MOVES))
def test_a_change_warns_once_steps_right_and_captures_again(
    rehearsal: tuple[Case, Rehearsed], what: str
) -> None:
    case, graphed = rehearsal
    settle(case, graphed, 3)
    graphed.did()
    change, message = MOVES[what]
    change(case)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        graphed(case.params, case.grads, case.state, case.hyper)
    assert len(caught) == 1 and caught[0].filename == __file__
    case.shadow()
    assert case.agrees() and graphed.did() == "free plain"
    settle(case, graphed, 2)
    assert case.agrees() and graphed.did() == "capture replay replay"


def test_a_warning_that_is_an_error_comes_before_the_step_and_leaves_no_old_graph(
    rehearsal: tuple[Case, Rehearsed],
) -> None:
    case, graphed = rehearsal
    settle(case, graphed, 3)
    case.grads["wide"] = case.grads["wide"].clone()
    with pytest.raises(RuntimeWarning, match="moved"), warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed(case.params, case.grads, case.state, case.hyper)
    assert case.agrees() and not graphed.captured
    graphed.did()
    settle(case, graphed, 3)
    assert case.agrees() and graphed.did() == "plain capture replay replay"


def test_every_call_inside_another_capture_is_refused(
    rehearsal: tuple[Case, Rehearsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, graphed = rehearsal
    for calls in range(4):
        with (
            monkeypatch.context() as patched,
            pytest.raises(RuntimeError, match="put step_ itself into that graph"),
        ):
            patched.setattr(observers, "is_capturing", lambda device: True)
            graphed(case.params, case.grads, case.state, case.hyper)
        assert case.agrees() and graphed.captured == (calls >= 2)
        settle(case, graphed, 1)


def test_a_gradient_that_comes_is_a_change(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    without = case.grads | {"embed": None}
    for _ in range(2):
        graphed(case.params, without, case.state, case.hyper)
        case.shadow(without)
    with pytest.warns(RuntimeWarning, match=r"grads\['embed'\] was None and is a tensor now"):
        settle(case, graphed, 1)
    assert case.agrees()


def test_found_inf_skips_and_its_coming_is_a_change(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    found = torch.zeros(1)
    for value in (0.0, 1.0, 0.0, 1.0):
        found.fill_(value)
        skipped = graphed(case.params, case.grads, case.state, case.hyper, found_inf=found).skipped
        case.shadow(found_inf=found)
        assert bool(skipped) == bool(value) and case.agrees()
    assert graphed.did() == "plain capture replay replay replay"
    with pytest.warns(
        RuntimeWarning, match=r"found_inf was a tensor and is None now; .*found_inf\.fill_"
    ):
        settle(case, graphed, 1)


def move(case: Case, graphed: GraphedStep) -> None:
    case.kept = [*getattr(case, "kept", []), case.grads]  # type: ignore[attr-defined] - no address may be used again
    (case.grads,) = clones(case.grads)
    settle(case, graphed, 1)


def test_after_three_changes_in_a_row_it_stays_plain_until_release(
    rehearsal: tuple[Case, Rehearsed],
) -> None:
    case, graphed = rehearsal
    settle(case, graphed, 2)
    for last in (False, False, True):
        with pytest.warns(
            RuntimeWarning, match=r"until release\(\)" if last else "the next one captures again"
        ):
            move(case, graphed)
    graphed.did()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            move(case, graphed)
    assert graphed.did() == "" and not graphed.captured and case.agrees()
    graphed.release()
    settle(case, graphed, 2)
    assert graphed.did() == "plain capture replay" and case.agrees()


def test_changes_that_lie_far_apart_are_no_reason_to_stop(
    rehearsal: tuple[Case, Rehearsed],
) -> None:
    case, graphed = rehearsal
    settle(case, graphed, 12)
    for _ in range(5):
        with pytest.warns(RuntimeWarning, match="the next one captures again"):
            move(case, graphed)
        settle(case, graphed, 12)
    assert graphed.captured and case.agrees()


def test_gradients_are_not_kept_alive(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    graphed(case.params, case.grads, case.state, case.hyper)
    seen = weakref.ref(case.grads.pop("wide"))
    gc.collect()
    assert seen() is None


# --- release, errors


def test_release_frees_and_the_next_call_starts_afresh(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    with graphed as entered:
        settle(case, entered, 3)
        assert graphed.captured
    assert not graphed.captured and graphed.did().endswith("free")
    graphed.release()  # twice is no harm
    settle(case, graphed, 3)
    assert graphed.did() == "plain capture replay replay" and case.agrees()


def test_reports_read_the_static_result(eager: None) -> None:
    case = Case("full")
    graphed, monitor = Rehearsed(case.plan), nm.SkipMonitor(case.plan)
    for k in range(5):
        refill(case.grads, k)
        if k == 3:
            case.grads["tall"][1, 1] = math.inf
            with pytest.warns(RuntimeWarning, match="tall"):
                result = graphed(case.params, case.grads, case.state, case.hyper)
                assert monitor(result) + monitor.wait() == 1 and nm.check(result, case.plan)
        else:
            result = graphed(case.params, case.grads, case.state, case.hyper)
            assert not nm.check(result, case.plan) and monitor(result) == 0
        case.shadow()
    assert case.agrees() and int(case.state["guard.skipped"]) == 1


def test_wrong_arguments_are_refused_and_leave_the_graph(rehearsal: tuple[Case, Rehearsed]) -> None:
    case, graphed = rehearsal
    settle(case, graphed, 2)
    good: dict[str, Any] = {
        "params": case.params,
        "grads": case.grads,
        "state": case.state,
        "hyper": case.hyper,
    }
    wrong = {
        "grads must be a dict": (
            {"grads": list(case.grads.values())},
            TypeError,
            "grads: expected a dict",
        ),
        "a name is missing": (
            {"grads": {k: v for k, v in case.grads.items() if k != "tall"}},
            ValueError,
            "missing.*tall",
        ),
        "other names": (
            {"grads": {f"{k}2": v for k, v in case.grads.items()}},
            ValueError,
            "not in the plan",
        ),
        "another shape": (
            {"grads": case.grads | {"tall": torch.zeros(3, 3)}},
            ValueError,
            r"grads\['tall'\]: expected shape",
        ),
        "no tensor": (
            {"grads": case.grads | {"tall": 1.0}},
            TypeError,
            r"grads\['tall'\]: expected a Tensor",
        ),
        "a float": (
            {"hyper": case.hyper._replace(lr=0.1)},
            TypeError,
            r"hyper\.lr: expected a 0-d tensor",
        ),
        "on the host": (
            {"hyper": case.hyper._replace(lr=torch.tensor(0.1, device="meta"))},
            ValueError,
            r"hyper\.lr: .*graph",
        ),
        "found_inf": ({"found_inf": torch.zeros(2)}, TypeError, "found_inf"),
    }
    for changed, error, message in wrong.values():
        with pytest.raises(error, match=message):
            graphed(**(good | changed))
    assert graphed.captured and case.agrees()


def test_a_step_that_fails_is_not_captured_next(
    rehearsal: tuple[Case, Rehearsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, graphed = rehearsal

    def fails(*_: object, **__: object) -> nm.StepResult:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(graphed_module, "step_", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            graphed(case.params, case.grads, case.state, case.hyper)
    settle(case, graphed, 2)
    assert graphed.did() == "plain plain capture replay" and case.agrees()


def test_a_capture_that_fails_raises_and_loses_nothing(
    rehearsal: tuple[Case, Rehearsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, graphed = rehearsal

    def fails(_: object) -> Take:
        raise RuntimeError("capture")

    settle(case, graphed, 1)
    with monkeypatch.context() as patched:
        patched.setattr(graphed, "_capture", fails)
        with pytest.raises(RuntimeError, match="capture"):
            graphed(case.params, case.grads, case.state, case.hyper)
    assert case.agrees() and not graphed.captured
    settle(case, graphed, 2)
    assert graphed.did() == "plain capture replay replay" and case.agrees()


def test_only_plans_on_cuda_are_taken() -> None:
    with pytest.raises(TypeError, match="plan: expected a Plan"):
        GraphedStep(nm.Config())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CUDA device, got cpu; use step_"):
        GraphedStep(Case().plan)


# --- on CUDA


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield Case(getattr(request, "param", "off"), "cuda", scale=4)
    gc.collect()
    torch.cuda.empty_cache()


@needs_cuda
@pytest.mark.parametrize("case", ["off", "output", "full"], indirect=True)
def test_replays_have_the_bits_of_step_(case: Case) -> None:
    graphed = GraphedStep(case.plan)
    for k in range(12):
        case.hyper.lr.fill_(0.05 / (k + 1))
        refill(case.grads, k)
        graphed(case.params, case.grads, case.state, case.hyper)
        case.shadow()
        assert case.agrees()
        assert graphed.captured == (k >= 1)
    assert int(case.state["guard.step"]) == 12


@needs_cuda
@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_a_replay_skips_a_nan_batch_and_reports_it(case: Case) -> None:
    graphed, monitor = GraphedStep(case.plan), nm.SkipMonitor(case.plan)
    skips = 0
    for k in range(8):
        refill(case.grads, k)
        before: Dicts = clones(case.params, case.state)
        if k in (3, 6):
            case.grads["wide"][2, 3] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = graphed(case.params, case.grads, case.state, case.hyper)
            assert nm.check(result, case.plan) == (k in (3, 6))
            skips += monitor(result)
        case.shadow()
        assert case.agrees()
        assert same(case.params, before[0]) == (k in (3, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert skips + monitor.wait() == 2


@needs_cuda
def test_found_inf_lives_through_its_tensor(case: Case) -> None:
    graphed, found = GraphedStep(case.plan), torch.zeros(1, device="cuda")
    for k in range(6):
        found.fill_(float(k in (2, 4)))
        skipped = graphed(case.params, case.grads, case.state, case.hyper, found_inf=found).skipped
        assert bool(skipped) == (k in (2, 4))
        case.shadow(found_inf=found)
        assert case.agrees()


@needs_cuda
@pytest.mark.parametrize("what", ["grads", "params", "state", "none", "order"])
def test_on_cuda_a_change_warns_and_the_steps_stay_right(case: Case, what: str) -> None:
    graphed = GraphedStep(case.plan)
    settle(case, graphed, 3)
    change, message = MOVES[what]
    change(case)
    with pytest.warns(RuntimeWarning, match=message):
        settle(case, graphed, 1)
    for k in range(3):
        for name, grad in case.grads.items():
            if grad is not None:
                grad.copy_(
                    torch.randn(grad.shape, generator=torch.Generator().manual_seed(k + len(name)))
                )
        settle(case, graphed, 1)
        assert case.agrees()
    assert graphed.captured


@needs_cuda
def test_a_new_gradient_where_the_old_one_lay_is_replayed_rightly(case: Case) -> None:
    graphed = GraphedStep(case.plan)
    settle(case, graphed, 2)
    address, shape = case.grads["wide"].data_ptr(), case.grads["wide"].shape
    del case.grads["wide"]
    new = torch.randn(
        shape, device="cuda"
    )  # the allocator gives the freed block again, as it does from step to step
    case.grads = {name: new if name == "wide" else case.grads[name] for name in SHAPES}
    if new.data_ptr() != address:
        pytest.skip("the allocator gave another block")
    settle(case, graphed, 2)
    assert case.agrees() and graphed.captured


MUCH = (
    1 << 20
)  # bytes: a workspace of cuBLAS has 32 MiB on an H100; 2 KiB a plan and 0 a graph were seen


def allocated_by_us_sync() -> int:
    """Bytes that are left when all is done and gone."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@needs_cuda
def test_one_after_another_they_take_no_more_memory(case: Case) -> None:
    left = []
    for _ in range(4):
        graphed = GraphedStep(case.plan)
        settle(case, graphed, 3)
        graphed.release()
        left.append(allocated_by_us_sync())
    assert max(left[1:]) - left[0] < MUCH


@needs_cuda
def test_new_plans_take_no_more_memory() -> None:
    """What compiles their kernels ahead multiplies too, in a thread of its own."""
    left = []
    for _ in range(4):
        case = Case("full", "cuda", scale=4)
        graphed = GraphedStep(case.plan)
        settle(case, graphed, 3)
        graphed.release()
        del case, graphed
        left.append(allocated_by_us_sync())
    assert max(left[2:]) - left[1] < MUCH  # the first also leaves what a process has once


def lent(graphed: GraphedStep) -> streams.CaptureStream:
    assert isinstance(graphed._graph, graphed_module._Graph)
    return graphed._graph.lent


@needs_cuda
@pytest.mark.parametrize("ends", ["released", "moved", "collected"])
def test_a_stream_is_lent_again_when_its_graph_is_gone_and_not_before(ends: str) -> None:
    cases = [Case("off", "cuda"), Case("off", "cuda")]
    one, two = (GraphedStep(case.plan) for case in cases)
    settle(cases[0], one)
    settle(cases[1], two)
    first, second = lent(one), lent(two)
    assert first is not second and first.stream != second.stream
    if ends == "released":
        one.release()
    elif ends == "moved":
        cases[0].grads["wide"] = cases[0].grads["wide"].clone()
        with pytest.warns(RuntimeWarning, match="moved"):
            settle(cases[0], one, 1)
    else:
        del one
        gc.collect()
    idle = streams._idle[cases[0].plan.device]
    assert idle[-1] is first and not any(known is second for known in idle)
    third = GraphedStep(cases[0].plan)
    settle(cases[0], third)
    assert lent(third) is first


def long_sums() -> Case:
    """cuBLAS computes the parts of a sum of 16384 at once, and adds them up in its workspace."""
    case = Case("off", "cuda")
    case.params, case.grads = ({"long": torch.randn(64, 16384, device="cuda")} for _ in range(2))
    case.plan = nm.make_plan(case.params, nm.Config(orthogonalize_dtype=torch.float32))
    case.state, case.hyper = nm.init(case.plan, case.params), nm.Hyper.of(case.params, lr=0.02)
    case.expected = clones(case.params, case.state)
    return case


@needs_cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # as exact as float32 is
@pytest.mark.parametrize("lent_before", [False, True])
def test_a_graph_outlives_another_and_who_clears_the_workspaces(lent_before: bool) -> None:
    """Replays write to what is theirs, the workspaces of cuBLAS too."""
    case = long_sums()
    other, graphed = GraphedStep(case.plan), GraphedStep(case.plan)
    for k in range(1 + lent_before):
        settle(case, other)
        settle(case, graphed)
        if k < lent_before:
            graphed.release()
            other.release()
    pool = lent(graphed).memory.id
    stream = lent(graphed).stream.cuda_stream
    lie = [
        tuple(segment["segment_pool_id"])
        for segment in torch.cuda.memory_snapshot()
        if segment["stream"] == stream
        and segment["active_size"] >= MUCH
        and tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    assert tuple(pool) in lie
    other.release()
    torch._C._cuda_clearCublasWorkspaces()  # as Inductor does when it records a graph
    torch.cuda.empty_cache()
    others = [torch.full((32 << 20,), 7, dtype=torch.uint8, device="cuda") for _ in range(6)]
    for _ in range(3):
        graphed(case.params, case.grads, case.state, case.hyper)
    torch.cuda.synchronize()
    assert all(bool((x == 7).all()) for x in others)
    for _ in range(3):
        case.shadow()
    assert case.agrees()


@needs_cuda
def test_release_gives_the_memory_back_and_the_object_can_be_used_again(case: Case) -> None:
    graphed = GraphedStep(case.plan)
    settle(case, graphed, 2)  # what is allocated once, is now
    graphed.release()
    allocated_by_us_sync()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        settle(case, graphed, 2)
        assert graphed.captured and torch.cuda.memory_reserved() > before
        graphed.release()
        assert not graphed.captured and torch.cuda.memory_reserved() <= before
    settle(case, graphed, 3)
    assert case.agrees()


@needs_cuda
def test_hyperparameters_on_the_host_are_refused(case: Case) -> None:
    hyper = case.hyper._replace(lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"hyper\.lr: expected a tensor on cuda"):
        GraphedStep(case.plan)(case.params, case.grads, case.state, hyper)


@needs_cuda
@pytest.mark.parametrize("calls", [0, 3])
def test_inside_another_capture_it_says_what_to_use(case: Case, calls: int) -> None:
    graphed = GraphedStep(case.plan)
    settle(case, graphed, calls)
    with (
        pytest.raises(RuntimeError, match="put step_ itself into that graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.zeros(1, device="cuda").add_(1)  # an empty graph would warn
        graphed(case.params, case.grads, case.state, case.hyper)
    settle(case, graphed, 3)
    assert case.agrees()


@needs_cuda
def test_a_training_loop_with_a_module_learns_as_with_step_() -> None:
    def train(graph: bool) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)
        ).cuda()
        x = torch.randn(256, 16, device="cuda")
        params = {name: p.detach() for name, p in model.named_parameters()}
        plan = nm.make_plan(params, nm.Config(guard="full"))
        state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02)
        graphed, losses = GraphedStep(plan), []
        for k in range(30):
            loss = (model(x) - x).square().mean()
            loss.backward()
            hyper.lr.fill_(0.02 * (1 - k / 30))
            grads = {name: p.grad for name, p in model.named_parameters()}
            if graph:
                graphed(params, grads, state, hyper)
            else:
                nm.step_(params, grads, state, hyper, plan)
            model.zero_grad(set_to_none=False)
            losses.append(float(loss.detach()))
        assert graphed.captured == graph
        return losses, params

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses, params = train(True)
    expected_losses, expected = train(False)
    assert losses == expected_losses and same(params, expected)
    assert losses[-1] < 0.5 * losses[0]
