"""Who watches, transforms, traces or differentiates single operations: private torch.

A graph is one operation to them all. See runtime/eager.py for what follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.utils._device import DeviceContext


def is_observed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something sees every single operation, which a graph would hide.

    That is a TorchDispatchMode (FlopCounterMode, MemTracker, FakeTensorMode, ``make_fx``), a
    TorchFunctionMode of the user's, a transform of torch.func, or one of ``tensors`` that is fake.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or any(isinstance(x, FakeTensor) for x in tensors)
        or any(
            not isinstance(torch._C._get_function_stack_at(k), DeviceContext)
            for k in range(torch._C._len_torch_function_stack())
        )
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, functionalize) runs the caller."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor stands for several, of which `torch.vmap` has made one."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_batchedtensor(x)


def value_tracer() -> str | None:
    """The tracer that records the caller as it runs with values, and cannot record a step."""
    if torch._C._is_tracing():
        return "torch.jit.trace"
    symbolic = is_fx_symbolic_tracing() and torch._C._len_torch_dispatch_stack() == 0  # not make_fx
    return "torch.fx.symbolic_trace" if symbolic else None


@contextlib.contextmanager
def fake_beside_real(tensor: Tensor | None) -> Iterator[None]:
    """Where ``tensor`` is fake, a step may use what a plan keeps in real tensors."""
    if not isinstance(tensor, FakeTensor):
        yield
        return
    mode = tensor.fake_mode
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode:
            yield
    finally:
        mode.allow_non_fake_inputs = allowed


def may_differentiate() -> bool:
    """Whether anything is differentiated at all here: whether `is_differentiated` may be true."""
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0


def any_differentiated(params: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether `is_differentiated` may be true of any of these; params may be leaves of autograd.

    For code that no transform of torch.func runs; no Python code of ours runs per tensor.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    inner = [x for x in params if x.requires_grad and not x.is_leaf]
    return bool(inner or [x for x in others if x.requires_grad])


def is_differentiated(x: Tensor, *, leaves: bool = True) -> bool:
    """Whether autograd, forward-mode AD or a transform of torch.func is to differentiate by ``x``.

    Without ``leaves``, what merely has ``requires_grad`` set, as a model's parameters, does not
    count.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.is_grad_enabled() and x.requires_grad and (leaves or not x.is_leaf)
    while True:
        transformed = torch._C._functorch.is_functorch_wrapped_tensor(x)
        recorded = torch.is_grad_enabled() and x.requires_grad
        if recorded and (leaves or transformed or not x.is_leaf):
            return True
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not transformed:
            return False
        x = torch._C._functorch.get_unwrapped(x)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device``, not of the current device, is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
