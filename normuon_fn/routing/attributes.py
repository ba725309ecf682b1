"""What can be asked of any module or configuration without an error: attributes, kinds, classes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def get(source: Any, name: str) -> Any:
    """The attribute, or ``None`` where there is none or a property fails."""
    if _only_instances_have(type(source), name):  # type: ignore[arg-type]
        # As `nn.Module` looks it up, without an exception for what is not there: most is not.
        own = source.__dict__
        for found in (own, own["_parameters"], own["_buffers"], own["_modules"]):
            if name in found:
                return found[name]
        return None
    try:
        return getattr(source, name, None)
    except Exception:
        return None


@lru_cache(maxsize=4096)
def _only_instances_have(kind: Hashable, name: str) -> bool:
    """Whether the class is a plain kind of module, and has no such attribute itself."""
    plain = getattr(kind, "__getattr__", None) is nn.Module.__getattr__
    return plain and not hasattr(kind, name)


def first(sources: Iterable[Any], names: Sequence[str]) -> int | None:
    """The first positive int that one of the sources has under one of the names."""
    for source in sources:
        for name in names:
            value = get(source, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def sources_of(owners: Iterable[nn.Module]) -> list[Any]:
    """Every module with its configuration behind it, in the same order."""
    found = []
    for owner in owners:
        for name in ("", "config", "cfg", "args"):
            source = get(owner, name) if name else owner
            if source is not None and not isinstance(source, (int, float, str, tuple, list)):
                found.append(source)
                text = get(source, "text_config") if name else None
                found += [text] if text is not None else []
    return found


def kind_of(module: nn.Module) -> str:
    """The class's name; of a scripted or parametrized module, the name of what it was made from."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return _kind_named((scripted and get(module, "original_name")) or type(module).__name__)


@lru_cache(maxsize=4096)
def _kind_named(name: str) -> str:
    return name.removeprefix("Parametrized").removeprefix("FSDP")


def signature(module: nn.Module) -> tuple[object, ...]:
    """The class of a module and the shapes of its parameters: equal for copies."""
    return kind_of(module), *(tuple(p.shape) for p in module.parameters() if not is_lazy(p))


def is_a(module: nn.Module, *types: type[nn.Module]) -> bool:
    """``isinstance``, also for a TorchScript module whose class is one of torch's."""
    if isinstance(module, torch.jit.ScriptModule):
        own = getattr(nn, kind_of(module), None)
        return isinstance(own, type) and issubclass(own, types)
    return isinstance(module, types)


def says_nothing(module: nn.Module) -> bool:
    """Whether the class is `nn.Module` itself or one that torch.fx, torch.export or TorchScript
    puts in the place of any other."""
    if isinstance(module, torch.jit.ScriptModule):
        return not hasattr(nn, kind_of(module))
    return type(module) in (nn.Module, nn.ParameterDict, nn.ParameterList) or type(
        module
    ).__module__.startswith(("torch.fx.", "torch.export."))


def is_linear(module: nn.Module) -> bool:
    """A layer with a matrix ``weight`` [outputs, inputs], or the Conv1D of GPT-2."""
    kind, weight = kind_of(module), get(module, "weight")
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return False
    return is_a(module, nn.Linear) or "Linear" in kind or is_conv1d_of_gpt2(module)


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    return kind_of(module) == "Conv1D" and hasattr(module, "nf")


def is_layer(module: nn.Module) -> bool:
    """A linear layer or a convolution: what can be an output head."""
    return is_a(module, nn.modules.conv._ConvNd) or is_linear(module)


def outputs_and_inputs(module: nn.Module) -> tuple[int, int]:
    """Of a linear layer, or the channels of a convolution."""
    channels = get(module, "out_channels"), get(module, "in_channels")
    if is_a(module, nn.modules.conv._ConvNd) and all(isinstance(n, int) for n in channels):
        return channels
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    if is_conv1d_of_gpt2(module):
        return shape[1], shape[0]
    return shape[0], shape[1]
