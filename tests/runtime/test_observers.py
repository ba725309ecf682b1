"""A step under observers: it is made once and whole, or it is refused before it writes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor.debug import CommDebugMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import normuon_fn as nm
from normuon_fn.runtime import compiled

Problem = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], nm.Hyper, nm.Plan]


class CountsOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class KeepsFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


OBSERVERS: dict[str, Callable[[], Any]] = {
    "flops": lambda: FlopCounterMode(display=False),
    "memory": MemTracker,
    "collectives": CommDebugMode,
    "own dispatch mode": CountsOperators,
    "own function mode": KeepsFunctions,
    "default device": lambda: torch.device("cpu"),
    "dynamo disabled": lambda: torch._dynamo.config.patch(disable=True),
    "errors suppressed": lambda: torch._dynamo.config.patch(suppress_errors=True),
    "error on recompile": lambda: torch._dynamo.config.patch(error_on_recompile=True),
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "eager_then_compile": lambda: torch.compiler.set_stance("eager_then_compile"),
    "inference": torch.inference_mode,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors": torch.autograd.graph.save_on_cpu,
}


# Products of float32: under vmap those of a CPU with bfloat16 units are rounded otherwise.
EXACT = {"orthogonalize_dtype": torch.float32}


def problem(**options: Any) -> Problem:
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("w", (8, 16)), ("b", (8,)))
    }
    grads = {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}
    plan = nm.make_plan(params, nm.Config(**{"guard": "full", "steps": 2, **EXACT, **options}))
    hyper = nm.Hyper.of(params, lr=0.1, weight_decay=0.1)
    return params, grads, nm.init(plan, params), hyper, plan


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


def check_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Graph and single operations may round differently. Seen with aot_eager: no difference."""
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("observer", "warm"),
    [*((observer, False) for observer in OBSERVERS), ("flops", True), ("own function mode", True)],
)
def test_an_observed_step_is_made_exactly_once(observer: str, warm: bool) -> None:
    torch._dynamo.reset()
    params, grads, state, hyper, plan = problem()
    want = nm.update(params, grads, state, hyper, plan)
    if warm:
        nm.step_(clones(params), grads, clones(state), hyper, plan)
    with OBSERVERS[observer]():
        nm.step_(params, grads, state, hyper, plan)
    check_same(params, want.params)
    check_same(state, want.state)


@pytest.mark.usefixtures("without_inductor")
def test_the_optimizer_and_the_pure_step_run_under_an_observer_too() -> None:
    params, grads, state, hyper, plan = problem()
    want = nm.update(params, grads, state, hyper, plan)
    with CountsOperators():
        check_same(nm.step(params, grads, state, hyper, plan).params, want.params)
        of_optimizer = {name: torch.nn.Parameter(x.clone()) for name, x in params.items()}
        optimizer = nm.NorMuon(
            [{"params": [*of_optimizer.items()], "routes": {"b": nm.Route("adamw")}}],
            lr=0.1, weight_decay=0.1, config=nm.Config(guard="full", steps=2, **EXACT),
        )  # fmt: skip
        for name, p in of_optimizer.items():
            p.grad = grads[name].clone()
        optimizer.step()
    check_same({k: p.detach() for k, p in of_optimizer.items()}, want.params)


def test_an_observer_sees_the_products_of_newton_schulz() -> None:
    params, grads, state, hyper, plan = problem()
    with FlopCounterMode(display=False) as counter:
        nm.step_(params, grads, state, hyper, plan)
    assert counter.get_total_flops() > 2 * 2 * 2 * 8 * 8 * 16  # two steps, two products each


def test_a_step_is_made_once_where_the_environment_disables_the_compiler() -> None:
    code = (
        "import torch, normuon_fn as nm\n"
        "params = {'w': torch.ones(4, 4)}\n"
        "plan = nm.make_plan(params, routes={'w': nm.Route('normuon')})\n"
        "state, grads = nm.init(plan, params), {'w': torch.eye(4)}\n"
        "hyper = nm.Hyper.of(params, lr=0.1)\n"
        "want = nm.update(params, grads, state, hyper, plan)\n"
        "nm.step_(params, grads, state, hyper, plan)\n"
        "assert torch.equal(params['w'], want.params['w'])\n"
        "assert int(state['guard.step']) == 1\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.mark.usefixtures("without_inductor")
def test_a_stance_that_forbids_compiling_is_refused_before_anything_is_written() -> None:
    torch._dynamo.reset()
    params, grads, state, hyper, plan = problem()
    before = clones({**params, **state})
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="fail_on_recompile"),
    ):
        nm.step_(params, grads, state, hyper, plan)
    assert all(torch.equal(x, before[name]) for name, x in {**params, **state}.items())


# --- fake tensors


@pytest.mark.parametrize("function", [nm.step, nm.step_])
@pytest.mark.parametrize("where", ["all of it", "only the step", "no mode"])
def test_fake_tensors_give_shapes(function: Any, where: str) -> None:
    """With Inductor: its code would read the memory that fake tensors do not have."""
    mode = FakeTensorMode()
    if where == "all of it":
        with mode:
            result = function(*problem())
    else:
        params, grads, state, hyper, plan = problem()
        dicts = [{k: mode.from_tensor(x) for k, x in d.items()} for d in (params, grads, state)]
        fake_hyper = nm.Hyper(*map(mode.from_tensor, hyper))
        with mode if where == "only the step" else contextlib.nullcontext():
            result = function(*dicts, fake_hyper, plan)
        assert not mode.allow_non_fake_inputs
    for name, x in {**result.params, **result.state}.items():
        assert isinstance(x, FakeTensor), name
    assert result.params["w"].shape == (8, 16) and result.state["w.variance"].shape == (8, 1)


# --- tracers and transforms


def of_two(function: Any, given: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    params, grads, state, hyper, plan = given

    def run(w: Tensor, grad: Tensor) -> Tensor:
        into, kept = clones(params), clones(state)
        result = function({**into, "w": w}, {**grads, "w": grad}, kept, hyper, plan)
        return result.params["w"]

    return run


class Module(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, w: Tensor, grad: Tensor) -> Tensor:
        return self.function(w, grad)


@pytest.mark.parametrize(
    ("function", "tracer"),
    [(nm.step, "make_fx"), (nm.step_, "make_fx"), (nm.step, "export"), (nm.step_, "export"),
     (nm.step, "strict export"), (nm.step_, "compile")],
)  # fmt: skip
def test_a_step_is_part_of_a_trace(function: Any, tracer: str) -> None:
    given = problem()
    run = of_two(function, given)
    w, grad = given[0]["w"].clone(), given[1]["w"].clone()
    traced: Any
    if tracer == "make_fx":
        traced = make_fx(run)(w.clone(), grad)
    elif tracer == "compile":
        traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    else:
        strict = tracer == "strict export"
        traced = torch.export.export(Module(run), (w.clone(), grad), strict=strict).module()
    want = nm.update(*given).params["w"]
    torch.testing.assert_close(traced(w.clone(), grad), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [nm.step, nm.step_])
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "torch.fx.symbolic_trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_tracer_that_cannot_record_a_step_is_refused(function: Any, tracer: str) -> None:
    given = problem()
    run, example = of_two(function, given), (given[0]["w"], given[1]["w"])
    before = clones(given[0])
    with pytest.raises(RuntimeError, match=f"{tracer} cannot record it; use torch.export"):
        if tracer == "torch.jit.trace":
            torch.jit.trace(run, example)
        else:
            torch.fx.symbolic_trace(run)
    assert all(torch.equal(x, before[name]) for name, x in given[0].items())


@pytest.mark.parametrize("transform", ["vmap", "functionalize"])
def test_torch_func_runs_the_pure_step_and_refuses_the_one_in_place(transform: str) -> None:
    given = problem()
    w, grad = (given[k]["w"].expand(2, 8, 16).clone() for k in (0, 1))
    if transform == "functionalize":
        w, grad = w[0], grad[0]
    apply = getattr(torch.func, transform)
    want = nm.update(*given).params["w"].expand(w.shape)
    got = apply(of_two(nm.step, given))(w, grad)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    before = w.clone()
    with pytest.raises(RuntimeError, match="step_: it writes in place"):
        apply(of_two(nm.step_, given))(w, grad)
    assert torch.equal(w, before)


# --- another thread


@pytest.mark.usefixtures("without_inductor")
def test_a_step_is_its_graph_while_another_thread_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, grads, state, hyper, plan = problem()
    nm.step_(params, grads, state, hyper, plan)
    ran: list[Any] = []

    def spy(*arguments: Any) -> nm.StepResult:
        ran.append(arguments[0])
        return run_compiled(*arguments)

    run_compiled = compiled._run_compiled
    monkeypatch.setattr(compiled, "_run_compiled", spy)
    compiling, done = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        compiling.set()
        done.wait(20)
        return graph

    thread = threading.Thread(
        target=lambda: torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3))
    )
    thread.start()
    try:
        assert compiling.wait(20)
        if torch.__version__ >= (2, 13):
            assert torch.compiler.is_compiling()  # of the whole process, since torch 2.13
        nm.step_(params, grads, state, hyper, plan)
    finally:
        done.set()
        thread.join()
    assert len(ran) == 1 and int(state["guard.step"]) == 2
