"""A tensor under each of its names, and names and modules seen through whatever wraps them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .attributes import kind_of

# Parts of a path that only wrap: DDP and AveragedModel, torch.compile, activation checkpoints,
# FSDP, DeepSpeed, parametrizations, and the layers that PEFT puts around others.
_WRAPPERS = re.compile(
    r"^(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|_module"
    r"|parametrizations|base_layer|original_module|original\d*|weight(_v|_orig|_bar)?)$"
)
_WINDOWS = (1, 3, 5, 7)
_SAVED = ("modules_to_save",)  # and the adapter's name behind it
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.original\d*$")
_REPARAMETRIZED = re.compile(r"^(.+)_(v|orig|bar)$")  # the older weight_norm and spectral_norm


def unwrapped(path: str) -> list[str]:
    """The parts of a path without those that only wrap."""
    parts, found = path.split(".") if path else [], []
    skip = False
    for part in parts:
        if skip:
            skip = False
        elif part in _SAVED:
            skip = True
        elif not _WRAPPERS.match(part):
            found.append(part)
    return found


def is_window(shape: tuple[int, ...]) -> bool:
    """Whether the last dimensions are a convolution's window and not a matrix."""
    high, wide = shape[-2:]
    if len(shape) >= 4:  # an image has one channel or three, and patches of 14 or 16
        return high == wide <= (32 if shape[-3] in (1, 3) else 11) or min(high, wide) == 1
    return wide in _WINDOWS


@dataclass(frozen=True)
class Use:
    """A tensor under one of its names."""

    name: str
    tensor: Tensor
    owners: tuple[nn.Module, ...]  # the modules around the tensor, the nearest first
    buffer: bool = False

    @cached_property
    def module(self) -> nn.Module:
        """The nearest module that is more than a container of tensors."""
        return next(
            (m for m in self.owners if kind_of(m) not in ("ParametrizationList", "ModuleDict")),
            self.owners[0],
        )

    @cached_property
    def around(self) -> tuple[nn.Module, ...]:
        """`module` and the modules around it, the nearest first, without those that only wrap."""
        start = next(k for k, owner in enumerate(self.owners) if owner is self.module)
        parts = self.name.split(".")[:-1]
        found = [self.module]
        for k in range(start + 1, len(self.owners)):
            part, before = parts[-k], parts[-k - 1 : -k]
            is_saved = part in _SAVED or (before and before[0] in _SAVED)
            if not (is_saved or _WRAPPERS.match(part)):
                found.append(self.owners[k])
        return tuple(found)

    @cached_property
    def leaf(self) -> str:
        """What its module calls the tensor."""
        found = _PARAMETRIZED.search(self.name)
        leaf = found[1] if found else self.name.rpartition(".")[2]
        older = _REPARAMETRIZED.match(leaf)
        return older[1] if older and hasattr(self.module, f"{older[1]}_g") else leaf

    @cached_property
    def own(self) -> str:
        """The projection's name: its module's, where the tensor is the module's ``weight``."""
        parts = unwrapped(self.name)
        return parts[-1].removesuffix("_weight") if parts else self.leaf

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def uses(model: nn.Module) -> Iterator[Use]:
    """Every parameter and buffer under every one of its names.

    Raises:
        ValueError: a tensor that has no shape yet.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        parts = path.split(".") if path else []
        owners = tuple(modules[".".join(parts[:k])] for k in range(len(parts), -1, -1))
        tensors = [(name, p, False) for name, p in module._parameters.items()]
        tensors += [(name, b, True) for name, b in module._buffers.items()]
        for name, tensor, buffer in tensors:
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            if is_lazy(tensor):
                raise ValueError(
                    f"{full}: has no shape yet (a lazy module); run the model once before "
                    "routes_for()"
                )
            yield Use(full, tensor, owners, buffer)
