"""A CUDA device whose memory runs out in a step: parameters and state are whole, or the error says
that they are not; and the next step works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.runtime import eager

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20
SHAPES = {f"{k}.weight": (768, 1536) for k in range(8)} | {"embed": (4000, 768), "bias": (768,)}
ROUTES = {"embed": nm.Route("adamw"), "bias": nm.Route("adamw"), "*": nm.Route("normuon")}


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device="cuda")
        for name, shape in SHAPES.items()
    }


@contextmanager
def room_for(extra: int) -> Iterator[None]:
    """This many bytes beside what tensors hold now; the allocator refuses what goes beyond."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def says_half_written(error: BaseException) -> bool:
    texts = [*getattr(error, "__notes__", ()), *map(str, error.args)]
    return any(eager.HALF_WRITTEN in text for text in texts)


def whole_after_a_full_device(
    call: Callable[[], dict[str, Tensor]], written: dict[str, Tensor]
) -> int:
    """How many of the steps, each with a little more memory, found too little of it."""
    call()  # compiles

    def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
        return all(torch.equal(x, others[name]) for name, x in tensors.items())

    def restore() -> None:
        for name, x in written.items():
            x.copy_(before[name])

    before = {name: x.clone() for name, x in written.items()}
    after = {name: x.clone() for name, x in call().items()}
    restore()
    for failed, extra in enumerate(range(0, 600, 6)):
        error, result = None, None
        with room_for(extra * MIB):
            try:
                result = call()
            except torch.OutOfMemoryError as raised:
                error = raised
        if error is None:
            assert result is not None and same(result, after)
            return failed
        assert same(written, before) or says_half_written(error), f"{extra} MiB"
        if not same(written, before):
            restore()
    raise AssertionError("600 MiB were not enough")


@pytest.mark.parametrize("graph", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("in_place", [True, False], ids=["step_", "step"])
def test_a_step_on_a_full_device_is_whole_or_says_so(in_place: bool, graph: bool) -> None:
    params, grads = drawn(0), drawn(1)
    plan = nm.make_plan(params, nm.Config(guard="full"), routes=ROUTES)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    function = nm.step_ if in_place else nm.step

    def call() -> dict[str, Tensor]:
        result = function(params, grads, state, hyper, plan)
        return {**result.params, **result.state}

    with torch.compiler.set_stance("default" if graph else "force_eager"):
        assert whole_after_a_full_device(call, {**params, **state}) >= 2


def test_an_optimizer_on_a_full_device_is_whole_or_says_so() -> None:
    params = {name: torch.nn.Parameter(x) for name, x in drawn(0).items()}
    for name, grad in drawn(1).items():
        params[name].grad = grad
    optimizer = nm.NorMuon(
        [{"params": list(params.items()), "routes": ROUTES}], config=nm.Config(guard="full")
    )
    optimizer.step()
    written = {name: p.data for name, p in params.items()}
    for name, p in params.items():
        written |= {f"{name}.{k}": x for k, x in optimizer.state[p].items() if torch.is_tensor(x)}

    def call() -> dict[str, Tensor]:
        optimizer.step()
        return written

    assert whole_after_a_full_device(call, written) >= 2


def test_a_capture_on_a_full_device_is_an_error_and_the_next_one_works() -> None:
    params, grads = drawn(0), drawn(1)
    plan = nm.make_plan(params, nm.Config(guard="full"), routes=ROUTES)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.1)
    expected = nm.step(params, grads, state, hyper, plan)
    before = {name: x.clone() for name, x in {**params, **state}.items()}
    with room_for(8 * MIB), pytest.raises(torch.OutOfMemoryError) as raised:
        graphed = nm.GraphedStep(plan)
        for _ in range(3):
            graphed(params, grads, state, hyper)
    whole = all(torch.equal(x, before[name]) for name, x in {**params, **state}.items())
    assert whole or says_half_written(raised.value)
    for name, x in {**params, **state}.items():
        x.copy_(before[name])
    graphed = nm.GraphedStep(plan)
    graphed(params, grads, state, hyper)
    assert all(torch.equal(x, expected.params[name]) for name, x in params.items())
    for _ in range(3):
        graphed(params, grads, state, hyper)
    assert graphed.captured
