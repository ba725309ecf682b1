"""`orthogonalize` of a DTensor: every rank comes to its own part of the polar factors, in one of three ways.

    local         whole matrices on every rank (experts, layers): as on one device, nothing is sent
    distributed   the long side is cut, and the Gram form is taken: x stays where it is, its parts' x x^T are summed
    duplicated    anything else: whole matrices are gathered, every rank orthogonalizes them and keeps its own part

The long side of x appears in x x^T as the index that is summed over, so it does not matter which columns lie where.

Source: the modes ``distributed`` and ``duplicated`` of NVIDIA-NeMo/Emerging-Optimizers `newton_schulz_tp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import pad

from . import ops
from .coefficients import CoefficientSet
from .compat import all_reduce_max, all_reduce_sum, is_strided, process_group
from .orthogonalize import Form, carry, iterate, orthogonalize_whole, times_transpose, to_norm


def orthogonalize_sharded(
    x: DTensor,  # [..., rows, cols]
    chosen: CoefficientSet,
    form: Form,
) -> Tensor:
    """The approximate polar factor of every matrix of ``x``, as a DTensor of its shape, dtype, mesh and placements.

    Collectives: none for ``local``; an all-gather (one a mesh dimension) for ``duplicated``; for ``distributed`` one all-reduce
    of a number a matrix for the largest entry, one for the norm, and one of half of x x^T whenever that is computed anew: it is
    taken where that moves fewer bytes than x itself. Uneven and empty shards are allowed.

    ``distributed`` adds in another order than one device does; `orthogonalize` says which bits stay the same, and they do here.

    Raises:
        ValueError: placements other than Shard and Replicate, as Partial is.
    """
    mesh = x.device_mesh
    placements: tuple[Any, ...] = x.placements
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard() or is_strided(placement)):
            raise ValueError(
                f"x: expected Shard and Replicate placements, got {placements}; what is Partial is not known before it is "
                "reduced: x.redistribute(placements=...) to Shard or Replicate first"
            )
    sides = [x.ndim - 1, x.ndim - 2]
    cut = [k for k, p in enumerate(placements) if not p.is_replicate() and mesh.size(k) > 1 and p.dim in sides]
    if x.numel() == 0:
        return x.clone()
    if not cut:
        return _whole(orthogonalize_whole(x.to_local(), chosen, form), x, placements)

    tall = x.shape[-2] > x.shape[-1]
    long = sides[1] if tall else sides[0]
    if all(placements[k].dim == long for k in cut) and _sends_less(x, chosen, form):
        groups = _groups(mesh, tuple(cut))
        return _whole(_distributed(x.to_local(), tall, chosen, form, groups), x, placements)

    gathered = [Replicate() if k in cut else p for k, p in enumerate(placements)]
    out = orthogonalize_whole(x.redistribute(placements=gathered).to_local(), chosen, form)
    return _whole(out, x, gathered).redistribute(placements=placements)


def _whole(local: Tensor, like: DTensor, placements: Sequence[Any]) -> DTensor:
    """The contiguous DTensor of the shape of ``like`` of which ``local`` lies here."""
    shape = like.shape
    stride = tuple(shape[k + 1 :].numel() for k in range(len(shape)))
    return DTensor.from_local(local.contiguous(), like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _sends_less(x: Tensor, chosen: CoefficientSet, form: Form) -> bool:
    """Whether ``distributed`` moves fewer bytes than ``duplicated``. All-reducing moves every number twice."""
    if form.method != "gram":
        return False
    short, long = sorted(x.shape[-2:])
    times = 1 + len(form.restarts) + (chosen.rescale == "aol")
    width = torch.promote_types(form.dtype, torch.float32).itemsize
    return times * short * (short + 1) * width < short * long * x.dtype.itemsize


@torch.compiler.assume_constant_result
def _groups(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[str, ...]:
    """The process group of these dimensions of a mesh, flattened; one each where they have no names to flatten them by."""
    names = mesh.mesh_dim_names
    if len(dims) == mesh.ndim and (names is not None or mesh.ndim == 1 or mesh.size() == torch.distributed.get_world_size()):
        return (process_group(mesh).group_name,)
    if len(dims) == 1 or names is None:
        return tuple(mesh.get_group(k).group_name for k in dims)
    return (process_group(mesh[tuple(names[k] for k in dims)]).group_name,)


# -------------------------------------------------------------------------------------------------------------- distributed


def _distributed(
    x: Tensor,  # [..., rows, cols], the part of the long side that lies here
    tall: bool,
    chosen: CoefficientSet,
    form: Form,
    groups: tuple[str, ...],
) -> Tensor:
    stack = x.reshape(torch.Size(x.shape[:-2]).numel(), *x.shape[-2:])
    if stack.shape[0] == 0:  # then for all of these ranks
        return x.clone()
    if x.numel() == 0:  # takes part in the sums with zeros
        side = stack.shape[-1] if tall else stack.shape[-2]
        stack = stack.new_zeros(stack.shape[0], *((1, side) if tall else (side, 1)))
    # The power of the largest entry of all is the least, and 0 where an entry is not finite; a NaN may be lost in a max.
    _, own, squares = ops.measure([stack], [1])
    power = -_reduced(all_reduce_max, -own, groups)
    shift = power / own  # <= 1: what underflows is nothing to the sum, which is at least 4
    squares = _reduced(all_reduce_sum, squares * shift * shift, groups)
    inverse = to_norm(squares, chosen, form.dtype)
    stack = ops.gather([stack], [stack], power, power, inverse, [1], "", False, False, form.dtype, [tall])
    out = iterate(stack, chosen, form, partial(_summed, groups=groups))
    one = torch.ones_like(inverse)
    out = ops.gather([out], [out], one, one, one / carry(form.dtype), [1], "", False, False, x.dtype, [tall])
    return out[:, : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def _reduced(reduce: Callable[[Tensor, str], Tensor], x: Tensor, groups: tuple[str, ...]) -> Tensor:
    for group in groups:
        x = reduce(x, group)
    return x


def _summed(x: Tensor, products: ops.Products, groups: tuple[str, ...]) -> Tensor:
    """``x x^T`` of columns that lie on several ranks: added in float32 at least, then rounded as on one device."""
    part = times_transpose(x, products)
    packed = _packed(part.to(torch.promote_types(x.dtype, torch.float32)))
    return _unpacked(_reduced(all_reduce_sum, packed, groups), x.shape[1]).to(x.dtype)


def _packed(x: Tensor) -> Tensor:
    """The lower triangle of [n, size, size], symmetric, as [n, h, 2 h + 1] for size = 2 h; odd sizes are filled up by one.

    The lower triangle of the first quarter and the upper one of the last, side by side, and the quarter below the diagonal.
    """
    if x.shape[-1] % 2:
        x = pad(x, (0, 1, 0, 1))
    h = x.shape[-1] // 2
    triangles = pad(x[:, :h, :h].tril(), (0, 1)) + pad(x[:, h:, h:].triu(), (1, 0))
    return torch.cat([triangles, x[:, h:, :h]], -1)


def _unpacked(x: Tensor, size: int) -> Tensor:
    h = x.shape[1]
    triangles, below = x[..., : h + 1], x[..., h + 1 :]
    first, last = triangles[..., :h].tril(), triangles[..., 1:].triu()
    first, last = first + first.tril(-1).mT, last + last.triu(1).mT
    whole = torch.cat([torch.cat([first, below.mT], -1), torch.cat([below, last], -1)], -2)
    return whole[:, :size, :size].contiguous()
