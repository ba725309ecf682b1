"""`step_` as a CUDA graph: a step costs the host one launch and a comparison of addresses.

    first call -> plain step_ -> second call -> capture, replay -> later calls -> replay
                      ^------------- a tensor moved ---------------------|

A replay only starts when this very call was given tensors at the captured addresses, so nothing needs to be kept alive for it:
inputs are remembered by weak reference. Holding on to the gradients would cost their memory a second time and drive new ones to
other addresses.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..distributed import placements as mesh
from ..planning.checks import check_step
from ..planning.plan import Plan
from ..types import Grads, Hyper, StepResult, Tensors
from . import streams
from .compiled import step_

# Choices, not measurements. A capture costs about a plain call, a wait for the device and the allocator's cache: a graph that
# did not serve ten steps was not worth it, and after three of those the next one will not be either.
_SETTLED = 10
_PATIENCE = 3


class GraphedStep:
    """`step_` captured in a CUDA graph and replayed; called as `step_`, without the plan.

    >>> graphed = nm.GraphedStep(plan)
    >>> for batch in data:
    ...     loss(batch).backward()
    ...     result = graphed(params, {name: p.grad for name, p in model.named_parameters()}, state, hyper)
    ...     hyper.lr.fill_(schedule(...))
    ...     model.zero_grad(set_to_none=False)

    The first call is a plain `step_`: it compiles. The second captures, which executes nothing, and replays; from then on a
    call compares addresses and replays. Every call is exactly one step, with the bits of `step_`.

    All tensors are given to every call, not once at construction, as to `step_`: so a gradient that was replaced is noticed,
    where a graph alone would go on reading the old one. What may change is what the tensors hold: ``hyper.lr.fill_(x)``,
    ``found_inf.fill_(x)``, ``params[name].copy_(x)``. When a tensor was replaced (``zero_grad()`` sets gradients to None, and
    the next ones are new), when other gradients are None or the keys come in another order, the call warns, naming the first
    such tensor, frees the graph and is a plain `step_`; the next call captures again. The step is right in any case. After
    three such changes in a row, none of them ten replays after the one before, it stays with plain `step_` and says so: a
    training run should not end over its speed. `release` gives it a new start. Another plan is another GraphedStep.

    The result is the same object at every replay. ``result.params`` and ``result.state`` hold the tensors of the capture; the
    next replay overwrites ``flags`` and ``skipped``: look at them before (`check`, `SkipMonitor` do), or clone.

    `release` frees the graph and its memory: call it before ``torch.distributed.destroy_process_group()``, which waits for
    captured collectives, or use the object as a context manager.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: the plan's parameters are not on a CUDA device.
    """

    _device_type: ClassVar[str] = "cuda"

    def __init__(self, plan: Plan) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
        if plan.device.type != self._device_type:
            raise ValueError(
                f"plan: expected parameters on a CUDA device, got {plan.device}; use step_, which runs anywhere"
            )
        self.plan = plan
        self._graph: _Replayable | None = None
        self._inputs: _Inputs | None = (
            None  # of the last plain call, which the next one may capture
        )
        self._replays = 0
        self._short_lived = 0  # changes in a row, each before the graph had settled
        self._stays_plain = False

    @property
    def captured(self) -> bool:
        """Whether the next call with the same tensors is a mere replay."""
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
        """One step, in place. The result is overwritten by the next call: see the class.

        Raises (nothing was written then, and a graph that was there still is):
            TypeError, ValueError: as `step_`; also for a tensor of ``hyper`` or a ``found_inf`` on another device, whose value
                a graph would not see change.
            RuntimeError: the current stream is capturing already.
        """
        if self._stays_plain:
            return step_(params, grads, state, hyper, self.plan, found_inf=found_inf)
        if streams.is_capturing(self.plan.device):
            raise RuntimeError(
                "GraphedStep inside another capture: put step_ itself into that graph"
            )
        try:
            keys = [*params, *grads, *state]
            values = [*params.values(), *grads.values(), *state.values(), *hyper, found_inf]
            if self.plan.sharded:
                values = [x if x is None else mesh.local(x) for x in values]
            same = self._inputs is not None and self._inputs.same(keys, values)
        except (AttributeError, TypeError):
            check_step(self.plan, params, grads, state, hyper, found_inf)  # says it in plain words
            raise
        if same and self._graph is not None:
            self._graph.replay()
            self._replays += 1
            return self._graph.result

        check_step(self.plan, params, grads, state, hyper, found_inf)
        self._check_scalars(hyper, found_inf)
        call = functools.partial(step_, params, grads, state, hyper, self.plan, found_inf=found_inf)
        if same:
            self._graph = self._capture(call)
            self._graph.replay()
            self._replays = 1
            return self._graph.result
        given = _Inputs(
            keys, values, [f"{kind}[{name!r}]" for kind, name in _names(params, grads, state)]
        )
        moved = self._inputs and self._inputs.difference(given)
        self._drop()
        if moved:
            self._moved(moved)
        result = self._plain(call)
        self._inputs = given
        return result

    def release(self) -> None:
        """Waits for the device; frees the graph and its memory pool. The next call starts afresh, as the first did.

        The stream that it was captured on stays for another, on older torch with its cuBLAS workspace (32 MiB on an H100).
        """
        self._drop()
        self._replays = self._short_lived = 0
        self._stays_plain = False
        torch.cuda.empty_cache()  # a private pool's memory serves nobody else before it went back to the device

    def __enter__(self) -> GraphedStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _drop(self) -> None:
        graph, self._graph, self._inputs = self._graph, None, None
        if graph is not None:
            graph.free()

    def _moved(self, what: str) -> None:
        """Warns; after one change too many it stays with plain steps."""
        self._short_lived = 1 if self._replays >= _SETTLED else self._short_lived + 1
        self._replays = 0
        self._stays_plain = self._short_lived >= _PATIENCE
        if self._stays_plain:
            fate = (
                f"That is {_PATIENCE} changes in a row, none of them {_SETTLED} steps after the one before: from here on every "
                "call is a plain step_, until release()"
            )
        else:
            fate = "This call is a plain step_, the next one captures again"
        # Without a registry: the caller's filters hold, but Python's "once per place" does not swallow the second change.
        frame = sys._getframe(2)
        warnings.warn_explicit(
            f"{what}. {fate}", RuntimeWarning, frame.f_code.co_filename, frame.f_lineno
        )

    def _check_scalars(self, hyper: Hyper, found_inf: Tensor | None) -> None:
        """A 0-d tensor on the host goes into a kernel's arguments, and a graph would repeat the value that it had."""
        named = [(f"hyper.{name}", value) for name, value in zip(Hyper._fields, hyper, strict=True)]
        for name, value in [*named, ("found_inf", found_inf)]:
            if value is not None and value.device != self.plan.device:
                raise ValueError(
                    f"{name}: expected a tensor on {self.plan.device}, got {value.device}: a graph would not see it change"
                )

    def _plain(self, call: Callable[[], StepResult]) -> StepResult:
        return call()

    def _capture(self, call: Callable[[], StepResult]) -> _Replayable:
        """`call` as a graph, without executing it."""
        device, graph = self.plan.device, torch.cuda.CUDAGraph()
        lent = streams.borrow(device)
        try:
            # The outer context brings the current stream back when a capture fails, which torch.cuda.graph does not.
            # "thread_local": a data loader's thread that pins memory meanwhile must not end the capture.
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
    result: StepResult  # overwritten by every replay

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
        self._end = weakref.finalize(self, _end, graph, device, lent)  # also when nobody frees it
        self._end.atexit = False

    def replay(self) -> None:
        self.graph.replay()

    def free(self) -> None:
        torch.cuda.synchronize(self.device)  # it may still run
        self._end()


def _end(graph: torch.cuda.CUDAGraph, device: torch.device, lent: streams.CaptureStream) -> None:
    graph.reset()
    streams.give_back(device, lent)


class _Inputs:
    """What a call was given, without keeping it alive: keys, addresses, and what each tensor looked like.

    `same` is all that a replayed call costs the host besides the launch: 88 us for 144 matrices (586 tensors; one core of a
    2-core CPU machine, torch 2.13.0, 2026-11-22), half of it `data_ptr`, which also sees ``p.data = x``.
    """

    def __init__(self, keys: list[str], values: list[Tensor | None], names: list[str]) -> None:
        self.keys = keys
        self.addresses = _addresses(values)
        self.layouts = [_layout(x) for x in values]
        self.objects: list[Callable[[], Tensor | None]] = [
            _nothing if x is None else weakref.ref(x) for x in values
        ]
        self.names = [*names, *(f"hyper.{name}" for name in Hyper._fields), "found_inf"]

    def same(self, keys: list[str], values: list[Tensor | None]) -> bool:
        if keys != self.keys or _addresses(values) != self.addresses:
            return False
        # The same object at the same address looks as it did; another one there (a new detach(), say) is looked at.
        if all([known() is x for known, x in zip(self.objects, values, strict=True)]):  # noqa: C419 - a list is twice as fast
            return True
        compared = zip(self.objects, values, self.layouts, strict=True)
        return all(known() is x or _layout(x) == layout for known, x, layout in compared)

    def difference(self, given: _Inputs) -> str:
        """The first tensor that is not what it was, and what to do about it."""
        if given.keys != self.keys:
            return "GraphedStep: the keys of params, grads or state came in another order; build the dicts alike at every step"
        for name, old, new, old_layout, new_layout in zip(
            self.names, self.addresses, given.addresses, self.layouts, given.layouts, strict=True
        ):
            if old == new and old_layout == new_layout:
                continue
            if old is None:
                what = "was None and is a tensor now"
            elif new is None:
                what = "was a tensor and is None now"
            else:
                what = "moved to another address" if old != new else "has other strides"
            return f"GraphedStep: {name} {what}; {_advice(name)}"
        return "GraphedStep: a tensor was replaced"


def _addresses(values: list[Tensor | None]) -> list[int | None]:
    address = Tensor.data_ptr
    return [None if x is None else address(x) for x in values]


def _layout(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _nothing() -> None:
    return None


def _names(params: Tensors, grads: Grads, state: Tensors) -> Iterator[tuple[str, str]]:
    for kind, given in (("params", params), ("grads", grads), ("state", state)):
        for name in given:
            yield kind, name


def _advice(name: str) -> str:
    if name.startswith("grads"):
        return "keep the gradients allocated: zero_grad(set_to_none=False)"
    if name.startswith(("hyper", "found_inf")):
        return f"keep the tensor and change what it holds: {name}.fill_(x)"
    return "keep the tensor and change what it holds: copy_"
