"""The bits of a float tensor as integers, and back.

This is an operator where ``view(dtype)`` has no vmap rule (torch 2.11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _view_has_vmap_rule() -> bool:
    try:
        torch.vmap(lambda x: x.view(torch.int32))(torch.zeros(1, 1, device="cpu"))
    except RuntimeError:
        return False
    return True


_VIEW_HAS_VMAP_RULE = _view_has_vmap_rule()
if not _VIEW_HAS_VMAP_RULE:

    @torch.library.custom_op("normuon_fn::reinterpret", mutates_args=())
    def _reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype).clone()

    @_reinterpret.register_fake
    def _(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(x, dtype=dtype)

    @_reinterpret.register_vmap
    def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        return _reinterpret(x, dtype), in_dims[0]


def reinterpret(
    x: Tensor,  # of any shape and dtype
    dtype: torch.dtype,  # of the same size
) -> Tensor:
    """The bits of ``x``, read as another dtype."""
    return x.view(dtype) if _VIEW_HAS_VMAP_RULE else _reinterpret(x, dtype)
