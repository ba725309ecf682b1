"""`step_` as a CUDA graph: a step costs the host one launch and a comparison of addresses.

    first call -> plain step_ -> second call -> capture, replay -> later calls -> replay
                      ^---------------- a tensor moved -------------------|

Which tensors a graph was captured with, and what changed, is in inputs.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..compat import observers
from ..planning.before_ranks import check_ranks
from ..planning.checks import check_step
from ..planning.plan import Plan, check_plan
from ..routing.doubts import warn_at_caller
from ..types import Grads, Hyper, StepResult, Tensors
from . import streams
from .compiled import step_
from .inputs import Inputs

# Choices, not measurements. A capture costs about as much as a plain call, a wait for the device
# and the allocator's cache: a graph that did not serve ten steps was not worth it, and after three
# such graphs the next one will not be worth it either.
_SETTLED = 10
_PATIENCE = 3


class GraphedStep:
    """`step_` captured in a CUDA graph and replayed. Call it like `step_`, without the plan.

    >>> graphed = nm.GraphedStep(plan)
    >>> peak = nm.Hyper.of(params, lr=0.01)
    >>> hyper = peak.scaled(0.0)
    >>> for k, batch in enumerate(data):
    ...     peak.scaled(schedule(k), out=hyper)
    ...     loss(batch).backward()
    ...     grads = {name: p.grad for name, p in model.named_parameters()}
    ...     result = graphed(params, grads, state, hyper)
    ...     model.zero_grad(set_to_none=False)

    The first call is a plain `step_`, which compiles. The second call captures, which executes
    nothing, and replays. Later calls compare addresses and replay. Every call is exactly one step,
    with the bits of `step_`.

    Every call gets all tensors, as `step_` does, and not only the construction. So a gradient that
    was replaced is noticed; a graph alone would go on reading the old one. Values may change
    freely: ``peak.scaled(x, out=hyper)``, which moves all learning rates, ``found_inf.fill_(x)``,
    ``params[name].copy_(x)``; ``hyper.lr.fill_(x)`` leaves AdamW's rate as it is. When a tensor was
    replaced (``zero_grad()`` sets gradients to None, and the next ones are new), when other
    gradients are None, or when keys come in another order, the call warns, names the first such
    tensor, frees the graph and is a plain `step_`; the next call captures again. The step is right
    in all these cases. After three such changes in a row, none of them ten replays after the one
    before, all further calls are plain `step_`, and a warning says so: a training run should not
    end over its speed. `release` starts anew. Another plan needs another GraphedStep.

    The state is not for others to move. Write new values into its tensors: ``state[key].copy_(x)``.
    Another tensor in its place, and what `offload_` and `reload_` move, are noticed at the next
    call as above. Other memory for the same tensor (``state[key].data = x``, ``set_``) is noticed
    within 13 calls, because each asks a part of the state for its address: the steps until then
    have gone on in the old memory, whatever it was used for by then, and the warning says so.

    The result is the same object at every replay. ``result.params`` and ``result.state`` are the
    tensors of the capture. The next replay overwrites ``flags`` and ``skipped``: read them before
    (`check` and `SkipMonitor` do), or clone them.

    `release` frees the graph and its memory. Call it before
    ``torch.distributed.destroy_process_group()``, which waits for captured collectives, or use the
    object as a context manager.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: the plan's parameters are not on a CUDA device.
    """

    _device_type: ClassVar[str] = "cuda"

    def __init__(self, plan: Plan) -> None:
        check_plan(plan)
        if plan.device.type != self._device_type:
            raise ValueError(
                f"plan: expected parameters on a CUDA device, got {plan.device}; use step_, which "
                "runs on every device"
            )
        self.plan = plan
        self._graph: _Replayable | None = None
        self._inputs: Inputs | None = None  # of the last plain call, which the next may capture
        self._replays = 0
        self._short_lived = 0  # changes in a row, each before the graph had settled
        self._stays_plain = False

    @property
    def captured(self) -> bool:
        """Whether the next call with the same tensors only replays."""
        return self._graph is not None

    def __call__(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        *,
        found_inf: Tensor | None = None,
    ) -> StepResult:
        """The result of one step in place, which the next call overwrites: see the class.

        Raises (nothing was written then, and an existing graph stays):
            TypeError, ValueError: as `step_`; also for ``found_inf`` or a tensor of ``hyper`` on
                another device, because a graph would not see its value change.
            RuntimeError: the current stream is capturing already.
        """
        check_ranks(self.plan)
        if self._stays_plain:
            return step_(params, grads, state, hyper, self.plan, found_inf=found_inf)
        if observers.is_capturing(self.plan.device):
            raise RuntimeError(
                "GraphedStep: expected a call outside of any capture, got one inside; put step_ "
                "itself into that graph"
            )
        try:
            known = self._inputs
            same = known is not None and known.same(params, grads, state, hyper, found_inf)
        except (AttributeError, TypeError):
            check_step(self.plan, params, grads, state, hyper, found_inf)  # raises in plain words
            raise
        if same and self._graph is not None:
            self._graph.replay()
            self._replays += 1
            return self._graph.result

        check_step(self.plan, params, grads, state, hyper, found_inf)
        self._check_scalars(hyper, found_inf)
        call = functools.partial(step_, params, grads, state, hyper, self.plan, found_inf=found_inf)
        if same and known is not None:
            self._graph = self._capture(call)
            known.keep(params, state)
            self._graph.replay()
            self._replays = 1
            return self._graph.result
        inputs = Inputs(params, grads, state, hyper, found_inf, sharded=self.plan.sharded)
        difference = known and (known.unnoticed() or known.difference(inputs))
        self._drop()
        if difference:
            self._warn(difference)
        result = self._plain(call)
        self._inputs = inputs
        return result

    def release(self) -> None:
        """Waits for the device, and frees the graph and its memory pool. The next call starts anew.

        The stream that it was captured on stays for other graphs, on older torch with its cuBLAS
        workspace (32 MiB on an H100).
        """
        unnoticed = self._inputs and self._inputs.unnoticed()
        self._drop()
        self._replays = self._short_lived = 0
        self._stays_plain = False
        # Only memory that went back to the device can leave a private pool.
        torch.cuda.empty_cache()
        if unnoticed:
            warn_at_caller(unnoticed, RuntimeWarning)

    def __enter__(self) -> GraphedStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _drop(self) -> None:
        graph, self._graph, self._inputs = self._graph, None, None
        if graph is not None:
            graph.free()

    def _warn(self, difference: str) -> None:
        """Warns. After too many changes all further calls are plain."""
        self._short_lived = 1 if self._replays >= _SETTLED else self._short_lived + 1
        self._replays = 0
        self._stays_plain = self._short_lived >= _PATIENCE
        if self._stays_plain:
            fate = (
                f"These are {_PATIENCE} changes in a row, none of them {_SETTLED} steps after the "
                "one before: from now on every call is a plain step_, until release()"
            )
        else:
            fate = "This call is a plain step_, the next one captures again"
        warn_at_caller(f"{difference}. {fate}", RuntimeWarning)

    def _check_scalars(self, hyper: Hyper, found_inf: Tensor | None) -> None:
        """Refuses 0-d tensors on the host: their present value would become part of the graph."""
        named = [(f"hyper.{name}", value) for name, value in zip(Hyper._fields, hyper, strict=True)]
        for name, value in [*named, ("found_inf", found_inf)]:
            if value is not None and value.device != self.plan.device:
                raise ValueError(
                    f"{name}: expected a tensor on {self.plan.device}, got one on {value.device}; "
                    "move it there, because a graph would not see the value change"
                )

    def _plain(self, call: Callable[[], StepResult]) -> StepResult:
        return call()

    def _capture(self, call: Callable[[], StepResult]) -> _Replayable:
        """``call`` as a graph, without executing it."""
        device, graph = self.plan.device, torch.cuda.CUDAGraph()
        lent = streams.borrow(device)
        try:
            # The outer context restores the current stream when a capture fails, which
            # torch.cuda.graph does not. "thread_local": a data loader's thread that pins memory
            # at the same time must not end the capture.
            with (
                torch.cuda.stream(lent.stream),
                torch.cuda.graph(
                    graph,
                    pool=torch.cuda.graph_pool_handle(),
                    stream=lent.stream,
                    capture_error_mode="thread_local",
                ),
            ):
                result = call()
        except BaseException:
            streams.give_back(device, lent)
            raise
        return _Graph(graph, result, device, lent)


class _Replayable(Protocol):
    result: StepResult  # every replay overwrites it

    def replay(self) -> None: ...

    def free(self) -> None: ...


class _Graph:
    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        result: StepResult,
        device: torch.device,
        lent: streams.CaptureStream,
    ) -> None:
        self.graph, self.result, self.device, self.lent = graph, result, device, lent
        # Also called when the object goes without `free`.
        self._end = weakref.finalize(self, _free, graph, device, lent)
        self._end.atexit = False

    def replay(self) -> None:
        self.graph.replay()

    def free(self) -> None:
        torch.cuda.synchronize(self.device)  # the graph may still run
        self._end()


def _free(graph: torch.cuda.CUDAGraph, device: torch.device, lent: streams.CaptureStream) -> None:
    graph.reset()
    streams.give_back(device, lent)
