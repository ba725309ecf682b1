"""Every private or version-dependent torch import. Supported: torch 2.11 to 2.15.

In the order of reading: here what is small; `graphs`, how a step becomes one; `observers`, who
watches or differentiates the caller. It must not know of anything of this package.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

try:  # public from torch 2.15 on
    import torch.distributed.functional_collectives as collectives  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import torch.distributed._functional_collectives as collectives

VERSION = "0.2.0"  # of this package, where every wing may read it
Ranks = DeviceMesh | ProcessGroup
P = ParamSpec("P")
T = TypeVar("T")


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


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose tensors can be written anywhere, also where it is called under
    ``torch.inference_mode()``.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that share a storage, real or fake."""
    return tensor.untyped_storage()._cdata


def address(tensor: Tensor) -> int | None:
    """Where its first entry lies; ``None`` if nowhere: fake, meta, or its memory is given back."""
    if tensor.is_meta or isinstance(tensor, (FakeTensor, FunctionalTensor)):
        return None
    return tensor.data_ptr() or None


def is_subclass(tensor: Tensor) -> bool:
    """Whether it is of a subclass that torch.compile does not take for a plain tensor.

    Parameters and buffers it does, and those of torch's own that it knows.
    """
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter or kind.__module__.startswith(_KNOWN):
        return False
    return kind.__torch_function__ is not torch.nn.Parameter.__torch_function__


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether its subclass may have no memory of its own: it decides what every operation does."""
    kind = type(tensor)
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not kind.__module__.startswith(_KNOWN)


def is_plain_type(kind: type[Tensor]) -> bool:
    """Whether tensors of this type behave as `torch.Tensor`: operations see their memory alone."""
    if kind is Tensor:
        return True
    behaves = kind.__torch_function__ is torch.nn.Parameter.__torch_function__
    return behaves and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


_KNOWN = ("torch._subclasses", "torch.distributed")  # fake and functional tensors, DTensors


def plain(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor, whatever subclass it is of."""
    if not is_subclass(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


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


def all_reduce_max(tensor: Tensor, group: str, name: str = "an all_reduce") -> Tensor:
    return _all_reduce(tensor, "max", group, name)


def all_reduce_sum(tensor: Tensor, group: str, name: str = "an all_reduce") -> Tensor:
    return _all_reduce(tensor, "sum", group, name)


def _all_reduce(tensor: Tensor, operation: str, group: str, name: str) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return collectives.all_reduce(tensor, operation, group)  # waits by itself
    with failing_as(name):
        return collectives.wait_tensor(collectives.all_reduce(tensor, operation, group))


@contextlib.contextmanager
def failing_as(name: str) -> Iterator[None]:
    """An error of a collective says which one it was. Not for graphs, which run without it."""
    try:
        yield
    except RuntimeError as error:
        raise collective_error(name, error) from error


def collective_error(name: str, error: RuntimeError) -> RuntimeError:
    kind = type(error) if isinstance(error, dist.DistError) else RuntimeError
    return kind(
        f"{name} failed on rank {dist.get_rank()}. Most probably another rank has ended, or "
        "did not answer within the timeout of the process group: end all ranks, and start them "
        f"again from the last checkpoint. The backend says: {error}"
    )


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


def wait(tensor: Tensor, name: str = "a collective") -> Tensor:
    """The result of a collective. ``name`` says which one failed, outside of graphs."""
    if torch.compiler.is_dynamo_compiling():
        return torch.ops._c10d_functional.wait_tensor(tensor)
    with failing_as(name):
        return torch.ops._c10d_functional.wait_tensor(tensor)


def is_strided(placement: Any) -> bool:
    """Whether it shards a dimension that another dimension of the mesh has sharded already.

    FSDP makes such placements of tensor-parallel parameters.
    """
    from torch.distributed.tensor.placement_types import _StridedShard  # as there is a placement

    return isinstance(placement, _StridedShard)


def overlaps(group: str, device: torch.device) -> bool:
    """Whether several collectives of a group may be in flight at once.

    Not on the CPU: with several in flight some runs of 2 and of 4 ranks died of a corrupted heap
    (gloo, torch 2.11.0 and 2.13.0, 2026-11-23). The cause is not in this package: plain functional
    collectives of mixed sizes, up to 7 in flight on 2 ranks, died without it too, once in 7 runs of
    35 to 60 seconds. No run died that waited for each collective at once. The fake backend sends
    nothing.
    """
    return device.type != "cpu" or dist.get_backend(group_named(group)) == "fake"


def gather_objects(value: Any, group: str) -> list[Any]:
    """The ``value`` of every rank of a group, by rank, on the host.

    Under the fake backend, which sends nothing, only this rank's.
    """
    ranks = group_named(group)
    if dist.get_backend(ranks) == "fake":
        return [value]
    found: list[Any] = [None] * ranks.size()
    with failing_as("the all_gather of what all ranks must have alike"):
        dist.all_gather_object(found, value, group=ranks)
    return found


def group_named(name: str) -> ProcessGroup:
    """The process group of this name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]


def host_store() -> Any:
    """The store (c10d) by which the ranks found each other; ``None`` where there is none (MPI)."""
    return dist.distributed_c10d._get_default_store()
