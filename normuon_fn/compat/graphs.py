"""How `torch.compile` makes a graph of a step, and whether one is being made."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def compile_whole(
    function: Callable[..., Any], backend: str = "inductor", *, overlap: bool = False
) -> Callable[..., Any]:
    """``function`` as one graph, with a compile cache of its own.

    ``function`` may have an argument named ``plan``, which must be the same at every call.
    ``overlap``: the graph has collectives; they start and are waited for in the order written.
    """
    options: dict[str, Any] = {"guard_filter_fn": not_of_the_plan}
    if backend == "inductor":
        # Without it Inductor times several forms of each reduction on the device and takes the
        # fastest: the same step compiled twice might add in different orders.
        options["deterministic"] = True
        # Guards check sizes before the asserts would. Only our own operators, which check for
        # themselves, and loads of scalars read the caller's tensors, so Inductor need not know
        # their alignment. Each saves 0.3 ms per call for 600 tensors.
        options |= {"size_asserts": False, "assume_aligned_inputs": True}
        # Products and sums are rounded as written, and never fused depending on what else is in a
        # kernel: `step` and `step_` are two graphs with the same bits.
        options["emulate_precision_casts"] = True
        if overlap:  # otherwise Inductor sends as late as it can, to save memory, and waits at once
            options["reorder_for_peak_memory"] = False
    own = _with_own_code(function)
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False, options=options)


def constant_in_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.assume_constant_result`: Dynamo calls ``function`` and does not trace it.

    torch's own decorator imports Dynamo, which takes a second, to set this one attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(reason: str | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`torch.compiler.disable`, without importing Dynamo before the function is first called.

    Dynamo leaves its graph where it meets the two attributes, and where there may be no break it
    raises with the reason.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        disabled: list[Callable[P, T]] = []  # once it has been called

        @functools.wraps(function)
        def outside(*args: P.args, **kwargs: P.kwargs) -> T:
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        outside._torchdynamo_disable = True  # type: ignore[attr-defined]
        outside._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return outside

    return decorate


def free_graph(compiled: Callable[..., Any]) -> None:
    """Frees the graphs of what `compile_whole` returned.

    Dynamo's table of codes refers to the code that it traced, whose cache refers to the key in that
    table: without this they would stay for ever (torch 2.13.0, 2026-11-28).
    """
    function = getattr(compiled, "_torchdynamo_orig_callable", None)
    if function is not None:
        torch._dynamo.eval_frame.remove_from_cache(function)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo has one cache, and one limit of 8 recompilations, per code object. With a code object per
    plan a process may have any number of plans (dion#23). Closures and partials would share one
    code object; ``torch.compile(isolate_recompiles=True)`` exists only later (2.13 has it).
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def not_of_the_plan(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but those on what is read from the argument ``plan``.

    A plan never changes, and every plan has its own cache, so these guards cannot fail. Without
    them a call is 0.4 ms faster for 144 matrices. The plan could leave the arguments, but dynamo
    guards a closure in the same way, and a plan in the function's globals would never be freed.

    What a user's own orthogonalizer reads may change: its closure, its attributes.
    """
    return [_may_change(guard.orig_guard.originating_source) for guard in guards]


def _may_change(source: Any) -> bool:
    """Whether dynamo reads something from elsewhere than a plan, or inside its orthogonalizer."""
    while hasattr(source, "base"):
        source = source.base
        if getattr(source, "member", None) == "orthogonalizer":
            return True
    return getattr(source, "local_name", None) != "plan"


def alike(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A test ``(*others) -> bool`` whether others look like these, one by one.

    Of the same type, dtype, device, shape, strides and ``requires_grad``, and no tensor twice. It
    takes 70 ns per tensor, a comparison in Python 1.1 us (one core of a 2-core CPU machine, torch
    2.13.0, 2026-11-28).
    """
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [[*x.size()] for x in tensors]
    strides: Any = [[*x.stride()] for x in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def is_traced() -> bool:
    """Whether this thread makes a graph of what it runs. What other threads do does not matter."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch._guards.TracingContext.try_get() is not None


def is_functionalized() -> bool:
    """Whether AOTAutograd runs the caller to make a graph of it, on tensors of its own."""
    if torch.compiler.is_dynamo_compiling():
        return False
    functional = torch._C._TorchDispatchModeKey.FUNCTIONAL
    return torch._C._get_dispatch_mode(functional) is not None


def certainly(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes holds. What is not known of symbolic ones is not asked."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def import_inductor() -> None:
    """Imports Inductor as its first compilation would, without torch's warnings about itself.

    Where warnings are errors, torch 2.13 would not compile anything.
    """
    if "torch._inductor.compile_fx" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._inductor.compile_fx")


def prepare_inductor() -> None:
    """Registers our operators as fallbacks with Inductor, before it finds that it has no lowering.

    For every operator without a lowering torch 2.11 writes the whole graph into a log message, even
    if nothing is logged: 40 of the 65 seconds of a first step of 72 matrices (H100, 2026-11-22).
    Later versions write it only when somebody reads it.
    """
    if torch.__version__ >= (2, 13):  # type: ignore[operator]
        return
    from torch._inductor import lowering

    constraint = lowering.tag_to_layout_constraint(torch.Tag.needs_exact_strides)
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace == "normuon_fn":
            packet, _, overload = operator.partition(".")
            found = getattr(getattr(torch.ops.normuon_fn, packet), overload or "default")
            if found not in lowering.lowerings:
                lowering.make_fallback(found, layout_constraint=constraint, warn=False)
