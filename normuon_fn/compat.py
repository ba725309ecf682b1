"""Every private or version-dependent torch import, in one place. Supported: torch 2.11 to 2.14."""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

try:  # public from torch 2.15 on
    import torch.distributed.functional_collectives as collectives  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import torch.distributed._functional_collectives as collectives

Ranks = DeviceMesh | ProcessGroup


def compile_whole(
    function: Callable[..., Any], backend: str = "inductor", *, overlap: bool = False
) -> Callable[..., Any]:
    """``function`` as one graph, with a compile cache of its own. ``overlap``: it sends to other ranks, and waits as written.

    Dynamo keeps its cache, and its limit of 8 recompilations, per code object. A copy of the code object gives every plan a
    cache of its own, so that a process may hold any number of plans (dion#23).
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    # Without it Inductor times several forms of each reduction on the device and takes the fastest: the same step compiled
    # twice may then add in different orders.
    options: dict[str, Any] = {"guard_filter_fn": not_of_the_plan}
    if backend == "inductor":
        # Sizes are guarded before they are asserted; and only our own operators, which look for themselves, and loads of
        # scalars meet the caller's tensors, so that their alignment is nothing to Inductor. 0.3 ms each for 600 tensors.
        options |= {"deterministic": True, "size_asserts": False, "assume_aligned_inputs": True}
        # Products and sums are rounded as written, and not fused where a kernel's other contents happen to allow it: `step`
        # and `step_` are two graphs, and have the same bits.
        options["emulate_precision_casts"] = True
        if overlap:  # otherwise Inductor, to save memory, sends as late as it can and waits at once
            options["reorder_for_peak_memory"] = False
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False, options=options)


def not_of_the_plan(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep. A plan never changes and has its functions to itself: 0.4 ms a call for 144 matrices.

    A name is ``L['plan'].x``, ``plan.x``, or one of these in calls: ``type(plan.x)``, ``dict(type(plan.x)...``.
    """
    return [re.match(r"(\w+\()*(L\['plan'\]|plan\b)", guard.name) is None for guard in guards]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps the dtypes that were chosen, in a region of the caller's that has others."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
def prepare_inductor() -> None:
    """Tells Inductor that our operators are operators, before it wonders.

    torch 2.11 writes the whole graph into a log message for every operator it has no lowering for, whether it is logged or
    not: 40 of the 65 seconds of a first step of 72 matrices (H100, 2026-11-22). Later versions wait until somebody reads it.
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


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that share a storage, real or fake."""
    return tensor.untyped_storage()._cdata


def has_tangent(tensor: Tensor) -> bool:
    """Whether `torch.func.grad` or the like is to differentiate by it. Not asked for inside a graph."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(tensor)


def apart(tensor: Tensor) -> Tensor:
    """The same memory with a storage of its own, for parameters that are parts of one.

    torch 2.11 compiles a step that writes to several parts of a storage wrongly: some parameters get what happens to lie in
    memory (CPU, 2026-11-23; 2.13 and 2.14 do not).
    """
    return from_dlpack(to_dlpack(tensor.detach())) if tensor.numel() else tensor


def has_bfloat16_matrix_unit(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: CUDA, and CPUs with AMX."""
    return _HAS_AMX if device.type == "cpu" else device.type == "cuda"


_HAS_AMX = bool(
    getattr(torch.cpu, "_is_amx_tile_supported", bool)()
)  # asked here, for dynamo refuses to trace the question


def process_group(ranks: Ranks) -> ProcessGroup:
    """One group of all ranks of a mesh of any number of dimensions."""
    return ranks if isinstance(ranks, ProcessGroup) else process_group_of(ranks, range(ranks.ndim))


def process_group_of(mesh: DeviceMesh, dims: Sequence[int]) -> ProcessGroup:
    """One group of the ranks along some dimensions of a mesh."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(dims) == mesh.ndim and mesh.size() == dist.get_world_size():
        return dist.distributed_c10d._get_default_group()
    if mesh.mesh_dim_names is None:
        raise ValueError(
            "mesh: name its dimensions (mesh_dim_names), so that they can be flattened into one group"
        )
    part = mesh if len(dims) == mesh.ndim else mesh[tuple(mesh.mesh_dim_names[k] for k in dims)]
    return part._flatten().get_group()


def all_reduce_max(tensor: Tensor, group: str) -> Tensor:
    return _all_reduce(tensor, "max", group)


def all_reduce_sum(tensor: Tensor, group: str) -> Tensor:
    return _all_reduce(tensor, "sum", group)


def _all_reduce(tensor: Tensor, operation: str, group: str) -> Tensor:
    reduced = collectives.all_reduce(tensor, operation, group)  # traced, it waits of itself
    return reduced if torch.compiler.is_compiling() else collectives.wait_tensor(reduced)


# The next three are the operators below the functional collectives, which wait at once when traced: what is sent first is then
# waited for last, and the arithmetic in between overlaps it.


def all_to_all(tensor: Tensor, incoming: list[int], outgoing: list[int], group: str) -> Tensor:
    """[sum(incoming)] from [sum(outgoing)]: so many from and to every rank. To be waited for."""
    return torch.ops._c10d_functional.all_to_all_single(
        tensor.contiguous(), incoming, outgoing, group
    )


def all_gather(tensor: Tensor, ranks: int, group: str) -> Tensor:
    """[ranks * n] from [n]. To be waited for."""
    return torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), ranks, group)


def wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)


def is_strided(placement: Any) -> bool:
    """A shard of what another dimension of the mesh has sharded already, as FSDP of tensor-parallel parameters makes it."""
    return isinstance(placement, _StridedShard)


def overlaps(group: str, device: torch.device) -> bool:
    """Whether several collectives of a group may be on their way at once.

    Not on the CPU: with several in flight some runs of 2 and of 4 ranks died of a corrupted heap (gloo, torch 2.11.0 and
    2.13.0, 2026-11-23). It is not ours: plain functional collectives of mixed sizes, up to 7 in flight on 2 ranks, without
    this package, died so too, once in 7 runs of 35 to 60 seconds. None that waited for each at once did. The fake backend
    sends nothing.
    """
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type, unused-ignore]
    return device.type != "cpu" or dist.get_backend(ranks) == "fake"


def gather_objects(value: Any, group: str) -> list[Any]:
    """``value`` of every rank of a group, by rank; on the host. Under the fake backend, which sends nothing, of this one."""
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type, unused-ignore]
    if dist.get_backend(ranks) == "fake":
        return [value]
    found: list[Any] = [None] * ranks.size()
    dist.all_gather_object(found, value, group=ranks)
    return found
