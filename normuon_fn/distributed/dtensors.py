"""DTensors, without the second that it takes to import them where there are none.

A tensor can only be a DTensor if ``torch.distributed.tensor`` has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")
    # Another thread may be importing it just now, as a first step on CUDA does.
    return isinstance(tensor, getattr(module, "DTensor", ()))


def from_local(
    local: Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Any],
    shape: Sequence[int],  # of the whole tensor
) -> DTensor:
    """The contiguous DTensor of a shape whose part on this rank is ``local``."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size(shape)
    stride = tuple(torch.Size(shape[k + 1 :]).numel() for k in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def replicate() -> Any:
    """A placement: every rank along a dimension of a mesh has the same part."""
    from torch.distributed.tensor import Replicate

    return Replicate()
