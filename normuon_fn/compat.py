"""Every private or version-dependent torch import. Supported: torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import functools
import sys
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

VERSION = "0.2.0"  # of this package, where every wing may read it
Ranks = DeviceMesh | ProcessGroup


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


def read_by_grad_scaler() -> bool:
    """Whether a method of a GradScaler reads the property which calls this function.

    GradScaler and Lightning read the same attribute, ``_step_supports_amp_scaling``: GradScaler
    waits for the device unless it is True, Lightning refuses to clip gradients unless it is False.
    A property is not told who reads it, so only the reader's frame can tell the two apart.
    """
    return isinstance(sys._getframe(2).f_locals.get("self"), torch.amp.GradScaler)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns autocast off, where the caller's region has it on: the step has chosen its dtypes."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
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


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that share a storage, real or fake."""
    return tensor.untyped_storage()._cdata


def has_tangent(tensor: Tensor) -> bool:
    """Whether ``torch.func.grad`` or the like differentiates by it. Always False in a graph."""
    in_graph = torch.compiler.is_dynamo_compiling()
    return not in_graph and torch._C._functorch.is_gradtrackingtensor(tensor)


def apart(tensor: Tensor) -> Tensor:
    """The same memory with a storage of its own, for parameters that are parts of one storage.

    torch 2.11 compiles a step that writes to several parts of one storage wrongly: some parameters
    get whatever is in memory (CPU, 2026-11-23; not with 2.13 and 2.14).
    """
    return from_dlpack(to_dlpack(tensor.detach())) if tensor.numel() else tensor


def has_bfloat16_matrix_unit(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: CUDA, and CPUs with AMX."""
    return _HAS_AMX if device.type == "cpu" else device.type == "cuda"


# At import, because dynamo refuses to trace the question.
_HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def process_group(ranks: Ranks) -> ProcessGroup:
    """The process group of all ranks of a mesh, which may have several dimensions."""
    return ranks if isinstance(ranks, ProcessGroup) else process_group_of(ranks, range(ranks.ndim))


def process_group_of(mesh: DeviceMesh, dims: Sequence[int]) -> ProcessGroup:
    """The process group of the ranks along some dimensions of a mesh.

    Raises:
        ValueError: there are several dimensions, and they have no names.
    """
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(dims) == mesh.ndim and mesh.size() == dist.get_world_size():
        return dist.distributed_c10d._get_default_group()
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"mesh: expected names of its {mesh.ndim} dimensions, which become one group, got none;"
            " pass mesh_dim_names to init_device_mesh"
        )
    part = mesh if len(dims) == mesh.ndim else mesh[tuple(mesh.mesh_dim_names[k] for k in dims)]
    return part._flatten().get_group()


def all_reduce_max(tensor: Tensor, group: str) -> Tensor:
    return _all_reduce(tensor, "max", group)


def all_reduce_sum(tensor: Tensor, group: str) -> Tensor:
    return _all_reduce(tensor, "sum", group)


def _all_reduce(tensor: Tensor, operation: str, group: str) -> Tensor:
    reduced = collectives.all_reduce(tensor, operation, group)  # waits by itself when traced
    return reduced if torch.compiler.is_dynamo_compiling() else collectives.wait_tensor(reduced)


# When traced, functional collectives wait at once. The next three functions are the operators below
# them: what is sent first is waited for last, and the arithmetic in between overlaps it.


def all_to_all(tensor: Tensor, incoming: list[int], outgoing: list[int], group: str) -> Tensor:
    """[sum(incoming)] from [sum(outgoing)], which are the numbers of entries per rank.

    The caller must `wait` for the result.
    """
    return torch.ops._c10d_functional.all_to_all_single(
        tensor.contiguous(), incoming, outgoing, group
    )


def all_gather(tensor: Tensor, ranks: int, group: str) -> Tensor:
    """[ranks * n] from [n]. The caller must `wait` for the result."""
    return torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), ranks, group)


def wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)


def is_strided(placement: Any) -> bool:
    """Whether it shards a dimension that another dimension of the mesh has sharded already.

    FSDP makes such placements of tensor-parallel parameters.
    """
    return isinstance(placement, _StridedShard)


def overlaps(group: str, device: torch.device) -> bool:
    """Whether several collectives of a group may be in flight at once.

    Not on the CPU: with several in flight some runs of 2 and of 4 ranks died of a corrupted heap
    (gloo, torch 2.11.0 and 2.13.0, 2026-11-23). The cause is not in this package: plain functional
    collectives of mixed sizes, up to 7 in flight on 2 ranks, died without it too, once in 7 runs of
    35 to 60 seconds. No run died that waited for each collective at once. The fake backend sends
    nothing.
    """
    return device.type != "cpu" or dist.get_backend(_group_named(group)) == "fake"


def gather_objects(value: Any, group: str) -> list[Any]:
    """The ``value`` of every rank of a group, by rank, on the host.

    Under the fake backend, which sends nothing, only this rank's.
    """
    ranks = _group_named(group)
    if dist.get_backend(ranks) == "fake":
        return [value]
    found: list[Any] = [None] * ranks.size()
    dist.all_gather_object(found, value, group=ranks)
    return found


def _group_named(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]
