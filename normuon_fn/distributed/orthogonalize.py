"""`orthogonalize`, of a plain tensor or of a DTensor.

For a DTensor, every rank computes its own part of the polar factors, in one of three modes:

    local         every rank stores whole matrices (experts, layers): nothing is sent
    distributed   the long side is sharded and the Gram form is chosen: x stays where it is, and
                  the products x x^T of the parts are summed
    duplicated    otherwise: every rank gathers the whole matrices, orthogonalizes them and keeps
                  its own part

In x x^T the long side of x is the index of the sum, so the order of its shards does not matter.

Source: the modes ``distributed`` and ``duplicated`` of NVIDIA-NeMo/Emerging-Optimizers
`newton_schulz_tp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from .. import ops
from ..algorithm.coefficients import CoefficientSet, resolve
from ..algorithm.orthogonalize import (
    FEW,
    SYMMETRIC_FROM,
    WIDE,
    Form,
    carry,
    choose,
    iterate,
    orthogonalize_whole,
    times_transpose,
    to_norm,
)
from ..algorithm.rounding_safety import secured
from ..compat import (
    all_reduce_max,
    all_reduce_sum,
    has_tangent,
    is_strided,
    process_group,
    without_autocast,
)
from ..compat.graphs import constant_in_graphs
from ..types import Coefficients, Method
from .dtensors import from_local, is_dtensor, replicate

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def orthogonalize(
    x: Tensor,  # [..., rows, cols]
    *,
    method: Method = "auto",
    coefficients: Coefficients = "polar_express",
    steps: int = 5,
    safety_factor: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The approximate polar factor of every matrix of ``x``, in its shape and dtype.

    Bit for bit, ``orthogonalize(2**k * x) == orthogonalize(x)`` as long as all non-zero entries
    stay normal numbers, and ``orthogonalize(x.mT) == orthogonalize(x).mT`` (tested on the CPU; on
    CUDA the norm is summed in float64 in another order). A non-finite entry makes its whole matrix
    non-finite. The function has no derivative: its result does not require one. For a DTensor the
    result is a DTensor with the same placements; see `orthogonalize_sharded`.

    Args:
        method: ``"standard"`` iterates on x, ``"gram"`` on the smaller x x^T; ``"auto"`` decides
            by the aspect ratio, and takes the standard form, which is up to 3 times as exact, where
            ``dtype`` is float32 or float64.
        dtype: of the products; ``None``: see `Config.orthogonalize_dtype`.

    Raises:
        TypeError: ``x`` is not a real floating-point tensor.
        ValueError: ``x`` has fewer than two dimensions, `torch.func` differentiates by it, or the
            method, dtype, coefficients or number of steps are unknown.

    Source: Keller Jordan, Muon (2024); arXiv 2505.16932 (Polar Express); Gram
    Newton-Schulz (Dao-AILab).
    """
    if (
        not isinstance(x, Tensor)
        or not x.dtype.is_floating_point
        or x.dtype.itemsize < 2
        or x.layout != torch.strided
    ):
        what = f"{x.dtype} {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a dense real floating-point tensor, got {what}")
    if x.ndim < 2:
        raise ValueError(f"x: expected [..., rows, cols], got shape {tuple(x.shape)}")
    if has_tangent(x):
        raise ValueError(
            "x: torch.func is to differentiate by it, and orthogonalize has no derivative; "
            "give x.detach()"
        )
    rows, cols = (
        (x.shape[-2], x.shape[-1]) if x.shape[-2] <= x.shape[-1] else (x.shape[-1], x.shape[-2])
    )
    # Of the shape only what decides anything: a graph with symbolic sizes has as many guards.
    short = SYMMETRIC_FROM if rows >= SYMMETRIC_FROM else FEW if rows >= FEW else 1
    long = 2 * short if cols >= WIDE * rows else short
    chosen, form = _decide(
        coefficients, steps, safety_factor, method, dtype, short, long, x.device.type, x.dtype
    )
    with without_autocast(x.device), torch.no_grad():
        if is_dtensor(x):
            return orthogonalize_sharded(x, chosen, form)
        return orthogonalize_whole(x, chosen, form)


@constant_in_graphs
def _decide(
    coefficients: Coefficients,
    steps: int,
    safety_factor: float | None,
    method: Method,
    dtype: torch.dtype | None,
    rows: int,
    cols: int,
    device: str,
    of: torch.dtype,
) -> tuple[CoefficientSet, Form]:
    """All that is static; dynamo does not trace it."""
    chosen = resolve(coefficients, steps, safety_factor)
    form = choose(chosen, method, dtype, rows, cols, torch.device(device), of)
    return secured(chosen, form.dtype), form


def orthogonalize_sharded(
    x: DTensor,  # [..., rows, cols]
    chosen: CoefficientSet,
    form: Form,
) -> Tensor:
    """The approximate polar factor of every matrix of ``x``, as a DTensor like ``x``.

    Shape, dtype, mesh and placements are those of ``x``. Uneven and empty shards are allowed.

    Collectives: none for ``local``; one all-gather per mesh dimension for ``duplicated``; for
    ``distributed`` one all-reduce of one number per matrix for the largest entry, one for the norm,
    and one of half of x x^T whenever it is computed anew. ``distributed`` is chosen where that
    moves fewer bytes than x itself. It adds in another order than one device does, but the
    equalities of bits that `orthogonalize` states hold for it too.

    Raises:
        ValueError: placements other than Shard and Replicate, as Partial is.
    """
    mesh = x.device_mesh
    placements: tuple[Any, ...] = x.placements
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard() or is_strided(placement)):
            raise ValueError(
                f"x: expected Shard and Replicate placements, got {placements}; what is Partial "
                "is not known before it is reduced: x.redistribute(placements=...) to Shard or "
                "Replicate first"
            )
    sides = [x.ndim - 1, x.ndim - 2]
    cut = [
        k
        for k, p in enumerate(placements)
        if not p.is_replicate() and mesh.size(k) > 1 and p.dim in sides
    ]
    if x.numel() == 0:
        return x.clone()
    if not cut:
        return _as_dtensor(orthogonalize_whole(x.to_local(), chosen, form), x, placements)

    tall = x.shape[-2] > x.shape[-1]
    long = sides[1] if tall else sides[0]
    if all(placements[k].dim == long for k in cut) and _sends_less(x, chosen, form):
        groups = _groups(mesh, tuple(cut))
        return _as_dtensor(_distributed(x.to_local(), tall, chosen, form, groups), x, placements)

    gathered = [replicate() if k in cut else p for k, p in enumerate(placements)]
    out = orthogonalize_whole(x.redistribute(placements=gathered).to_local(), chosen, form)
    return _as_dtensor(out, x, gathered).redistribute(placements=placements)


def _as_dtensor(local: Tensor, like: DTensor, placements: Sequence[Any]) -> DTensor:
    """The contiguous DTensor of the shape of ``like`` whose local part is ``local``."""
    return from_local(local.contiguous(), like.device_mesh, placements, like.shape)


def _sends_less(x: Tensor, chosen: CoefficientSet, form: Form) -> bool:
    """Whether ``distributed`` moves fewer bytes; an all-reduce moves every number twice."""
    if form.method != "gram":
        return False
    short, long = sorted(x.shape[-2:])
    times = 1 + len(form.restarts) + (chosen.rescale == "aol")
    width = torch.promote_types(form.dtype, torch.float32).itemsize
    return times * short * (short + 1) * width < short * long * x.dtype.itemsize


@constant_in_graphs
def _groups(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[str, ...]:
    """The process group of these mesh dimensions as one; without names, one group per dimension."""
    names = mesh.mesh_dim_names
    if len(dims) == mesh.ndim and (
        names is not None or mesh.ndim == 1 or mesh.size() == torch.distributed.get_world_size()
    ):
        return (process_group(mesh).group_name,)
    if len(dims) == 1 or names is None:
        return tuple(mesh.get_group(k).group_name for k in dims)
    return (process_group(mesh[tuple(names[k] for k in dims)]).group_name,)


# ------------------------------------------------------------------------------- distributed


def _distributed(
    x: Tensor,  # [..., rows, cols], the local part of the long side
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
    # The power of the largest entry is the least, and 0 where an entry is not finite; a maximum
    # may lose a NaN.
    _, own, squares = ops.measure(stack)
    power = -_reduced(all_reduce_max, -own, groups)
    shift = power / own  # <= 1: what underflows is nothing to the sum, which is at least 4
    squares = _reduced(all_reduce_sum, squares * shift * shift, groups)
    inverse = to_norm(squares, chosen, form.dtype)
    stack = ops.scale_and_cast(stack, power, inverse, form.dtype, transpose=tall)
    summed = partial(_summed, groups=groups, rows=stack.shape[1])
    out = iterate(stack, chosen, form, summed)
    one = torch.ones_like(inverse)
    out = ops.scale_and_cast(out, one, one / carry(form.dtype), x.dtype, transpose=tall)
    return out[:, : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def _reduced(reduce: Callable[[Tensor, str], Tensor], x: Tensor, groups: tuple[str, ...]) -> Tensor:
    for group in groups:
        x = reduce(x, group)
    return x


def _summed(x: Tensor, products: ops.Products, groups: tuple[str, ...], rows: int) -> Tensor:
    """``x x^T`` of columns on several ranks: added in float32 at least, then rounded.

    Rows beyond ``rows`` are zeros (`in_whole_lines`), and are not sent.
    """
    part = times_transpose(x, products)[:, :rows, :rows]
    packed = pack_triangles(part.to(torch.promote_types(x.dtype, torch.float32)))
    whole = unpack_triangles(_reduced(all_reduce_sum, packed, groups), rows).to(x.dtype)
    beyond = x.shape[1] - rows
    return pad(whole, (0, beyond, 0, beyond)) if beyond else whole


def pack_triangles(x: Tensor) -> Tensor:
    """The lower triangle of symmetric [n, size, size] as [n, h, 2 h + 1], with size = 2 h.

    An odd size is padded by one. The result is the lower triangle of the first quarter and the
    upper triangle of the last, side by side, then the quarter below the diagonal.
    """
    if x.shape[-1] % 2:
        x = pad(x, (0, 1, 0, 1))
    h = x.shape[-1] // 2
    triangles = pad(x[:, :h, :h].tril(), (0, 1)) + pad(x[:, h:, h:].triu(), (1, 0))
    return torch.cat([triangles, x[:, h:, :h]], -1)


def unpack_triangles(x: Tensor, size: int) -> Tensor:
    h = x.shape[1]
    triangles, below = x[..., : h + 1], x[..., h + 1 :]
    first, last = triangles[..., :h].tril(), triangles[..., 1:].triu()
    first, last = first + first.tril(-1).mT, last + last.triu(1).mT
    whole = torch.cat([torch.cat([first, below.mT], -1), torch.cat([below, last], -1)], -2)
    return whole[:, :size, :size].contiguous()
