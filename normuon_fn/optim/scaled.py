"""What a ``torch.amp.GradScaler`` leaves for the step: the scale of gradients, and found_inf."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..distributed import placements


@contextlib.contextmanager
def unscaled(
    optimizer: torch.optim.Optimizer, grads: Mapping[str, Tensor | None], into: Tensor
) -> Iterator[Tensor | None]:
    """Unscales gradients in place. The context is ``found_inf``, in ``into``, or None without one.

    A step that raises leaves them scaled again, because a GradScaler does not know that they were
    unscaled, and a second try would do it twice. By a power of two, as its scales are, they then
    have their old bits, except for numbers that unscaling has made too small for their dtype.
    """
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    local = [placements.local(grad) for grad in grads.values() if grad is not None]
    if scale is not None:
        torch._foreach_mul_(local, scale.double().reciprocal().float().reshape(()))
    try:
        if found_inf is not None:
            into.copy_(found_inf.reshape(()), non_blocking=True)
        yield None if found_inf is None else into
    except BaseException:
        if scale is not None:
            torch._foreach_mul_(local, scale.float().reshape(()))
        raise


def forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """Drops what a GradScaler left for a step that failed.

    It would multiply the scale of the next try by the one that it finds here.
    """
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)
