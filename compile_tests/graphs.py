"""What a compiled function holds, read off its graph.

The one file here that imports PyTorch's private testing interfaces.

record(function, *args) -> Recorded: graphs, breaks, ops in order, syncs, collectives, devices
Recorded.check(...)     -> AssertionError, with what was found, where a promise is broken
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import functorch.compile
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.debugging import ExplainWithBackend
from torch._dynamo.exc import RecompileError
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounter
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.runtime import outside

__all__ = [
    "CompileCounter",
    "Generated",
    "Recorded",
    "captured",
    "fake_cuda",
    "fake_ranks",
    "generated",
    "host_seconds",
    "name_of",
    "no_host_sync",
    "no_recompile",
    "ranks_of",
    "record",
    "recording",
    "registered_ops",
    "sharded",
]

Function = Callable[..., Any]

# Ops whose result the host has to wait for. Shapes that depend on values are found by their symbols
# instead.
HOST_SYNCS = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.equal",
    "aten.is_nonzero",
    "aten.nonzero",
    "aten.masked_select",
}
PRODUCTS = ("bmm", "baddbmm", "mm", "addmm", "matmul")
# What a listing names; everything else is elementwise, a reduction or a view.
NAMED = re.compile(
    rf"^(normuon_fn\.\w+|_c10d_functional\.(?!wait_tensor)\w+|aten\.({'|'.join(PRODUCTS)}|copy_))$"
)


@dataclass(frozen=True)
class Collective:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Recorded:
    graphs: int
    break_reasons: tuple[str, ...]
    nodes: tuple[Node, ...]  # of the AOT graphs: functional ATen, inputs included
    result: Any = None  # what the function returned
    compiled: Function | None = None  # to call again

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.nodes if node.op == "call_function"]

    @property
    def ops(self) -> Counter[str]:
        """How often each op is called; an in-place op of ours under its own name, without its
        overload.
        """
        return Counter(_name(node) for node in self.calls)

    @property
    def host_syncs(self) -> list[str]:
        """Calls that make the host wait: values read, shapes that depend on values, copies from a
        device to the CPU.
        """
        return [str(node.format_node()) for node in self.calls if _waits(node)]

    @property
    def collectives(self) -> list[Collective]:
        found = []
        for node in self.calls:
            namespace, _, name = _name(node).partition(".")
            if (
                namespace in ("_c10d_functional", "c10d", "c10d_functional")
                and name != "wait_tensor"
            ):
                value = _tensors(node.args)[0]
                found.append(Collective(name, tuple(value.shape), value.dtype))
        return found

    @property
    def groups(self) -> list[str]:
        """The names of the process groups that are reduced over."""
        return [
            str(node.args[2]) for node in self.calls if _name(node) == "_c10d_functional.all_reduce"
        ]

    @property
    def devices(self) -> set[str]:
        """Of every tensor in the graph, inputs included."""
        return {value.device.type for node in self.nodes for value in _values(node)}

    def dtypes_of(self, name: str) -> set[torch.dtype]:
        return {
            value.dtype for node in self.calls if _name(node) == name for value in _values(node)
        }

    @property
    def listing(self) -> str:
        """The ops in order, without the elementwise ones; products in a row, and copies in a row,
        are counted.
        """
        lines: list[str] = []
        run: Counter[str] = Counter()

        def close() -> None:
            if run:
                lines.append(
                    ", ".join(f"{name} {run[name]}" for name in (*PRODUCTS, "copy_") if run[name])
                )
                run.clear()

        for node in self.calls:
            name = _name(node)
            if not NAMED.match(name) or name == "normuon_fn.reinterpret":
                continue
            short = name.partition(".")[2]
            if short in PRODUCTS or short == "copy_":
                if (short == "copy_") != (run["copy_"] > 0):
                    close()
                run[short] += 1
                continue
            close()
            if name.startswith("_c10d"):
                value = _tensors(node.args)[0]
                lines.append(f"{node.args[1]} {Collective(short, tuple(value.shape), value.dtype)}")
            else:
                lines.append(f"{short} of {_length(node)}")
        close()
        return "\n".join(lines)

    def check(self, *, reductions: int = 0, largest: int = 0, device: str = "cpu") -> None:
        """The promises of the step.

        Args:
            reductions: how many all_reduce there are; no other collective.
            largest: the most int32 elements that one of them may have.
            device: where every tensor is.

        Raises:
            AssertionError: naming what was found.
        """
        assert self.graphs == 1 and not self.break_reasons, (
            f"{self.graphs} graphs: {self.break_reasons}"
        )
        assert not self.host_syncs, f"the host waits for {self.host_syncs}"
        assert self.devices == {device}, f"tensors on {self.devices}, expected {device}"
        names = [collective.name for collective in self.collectives]
        assert names == ["all_reduce"] * reductions, (
            f"{reductions} all_reduce expected, found {names}"
        )
        for found in self.collectives:
            assert found.dtype == torch.int32 and math.prod(found.shape) <= largest, (
                f"{found}: more than {largest} int32"
            )

    def check_size(self, *, parameters: int, buckets: int) -> None:
        """The graph grows with buckets, hardly with parameters (DESIGN: the form that did not took
        260 s to compile).
        """
        allowed = 6 * parameters + 150 * buckets
        assert len(self.calls) <= allowed, (
            f"{len(self.calls)} nodes, {allowed} allowed: {self.ops.most_common(5)}"
        )


def record(function: Function, *args: Any, **kwargs: Any) -> Recorded:
    """Compiles and runs ``function`` once.

    As ``fullgraph=True`` would see it, but a graph break is counted, not raised.
    """
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    explained = ExplainWithBackend(recorder)
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        compiled = torch.compile(function, backend=explained, dynamic=False)
        result = compiled(*args, **kwargs)
    output = explained.output()
    reasons = tuple(str(reason.reason) for reason in output.break_reasons)
    return Recorded(
        output.graph_count,
        reasons,
        _all_nodes(recorder.fw_graphs + recorder.bw_graphs),
        result,
        compiled,
    )


def captured(function: Function, *args: Any, run: bool = True) -> Recorded:
    """The same without dynamo: ``functorch.compile.aot_function`` runs the Python and records what
    it does.

    It takes tensors and containers of tensors. A plan is neither, and dynamo makes inputs of its
    tensors: so does this. Without ``run`` the graph is recorded and no more: the fake process group
    has no all-to-all for a rank that sends nothing.
    """
    plan = next(value for value in args if isinstance(value, nm.Plan))
    tensors = {"parameter_of": plan.guard.parameter_of, "members": plan.guard.members}
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> Function:
        graphs.append(graph)
        if run:
            return functorch.compile.make_boxed_func(graph.forward)
        outputs = _tensors(graph.graph.output_node().args)
        return functorch.compile.make_boxed_func(
            lambda *_: [torch.empty(x.shape, dtype=x.dtype) for x in outputs]
        )

    moves = [way for bucket in plan.buckets if bucket.shared_by for way in bucket.exchange.moves]
    exchanges = [bucket.exchange for bucket in plan.buckets if bucket.shared_by]
    tables = [way.table for way in moves], [exchange.bands for exchange in exchanges]

    def with_tensors(held: dict[str, Tensor]) -> nm.Plan:
        return dataclasses.replace(plan, guard=dataclasses.replace(plan.guard, **held))

    def put(tables: tuple[list[Any], list[Any]]) -> None:
        for held, field, values in ((moves, "table", tables[0]), (exchanges, "bands", tables[1])):
            for thing, value in zip(held, values, strict=True):
                object.__setattr__(thing, field, value)

    def on_tensors(
        held: dict[str, Tensor], shared: tuple[list[Any], list[Any]], *others: Any
    ) -> Any:
        given = iter(others)
        put(shared)
        try:
            return function(
                *(with_tensors(held) if value is plan else next(given) for value in args)
            )
        finally:
            put(tables)

    with torch.no_grad():
        whole = functorch.compile.aot_function(on_tensors, fw_compiler=keep)
        result = whole(tensors, tables, *(value for value in args if value is not plan))
    return Recorded(len(graphs), (), _all_nodes(graphs), result if run else None)


@contextlib.contextmanager
def no_recompile() -> Iterator[None]:
    """A recompilation inside is an AssertionError with the guard that failed."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        try:
            yield
        except RecompileError as error:
            raise AssertionError(f"recompiled: {error}") from error


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert str(function.overloadpacket) not in HOST_SYNCS, f"the host waits for {function}"
        return function(*args, **(kwargs or {}))


def no_host_sync() -> TorchDispatchMode:
    """A context in which every op runs eagerly, and one that the host has to wait for is an
    AssertionError.

    A graph does not show what nobody uses, nor what goes on inside an operator of our own.
    """
    return _NoHostSync()


@contextlib.contextmanager
def fake_ranks(
    world: int, kind: str = "group", rank: int = 0
) -> Iterator[dist.ProcessGroup | DeviceMesh | None]:
    """``world`` ranks in one process, which is ``rank``: collectives trace, their values mean
    nothing. Nothing at all for 1.
    """
    if world == 1:
        yield None
        return
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        if kind == "group":
            yield dist.group.WORLD
        elif kind == "1-D mesh":
            yield init_device_mesh("cpu", (world,))
        else:
            yield init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def sharded(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Any], strided: int | None = None
) -> DTensor:
    """A parameter as it lies on ``mesh``, of random values.

    ``strided``: a first placement Shard(0) is one of what so many ranks have sharded already, as
    FSDP2 makes it.
    """
    placements = list(placements)
    if strided is not None:
        placements[0] = _StridedShard(placements[0].dim, split_factor=strided)
    part, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.randn(part), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def name_of(node: Node) -> str:
    """``aten.bmm``"""
    return _name(node)


def ranks_of(group: str) -> int:
    """How many ranks the process group of that name has."""
    return dist.distributed_c10d._resolve_process_group(group).size()


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors on ``cuda`` have shapes and no values: CUDA graphs can be looked at without a GPU.

    PyTorch sees to the device guard where it was built for CUDA. In a CPU build there is none, and
    indexing or ``~`` on a fake CUDA tensor raises (pytorch#160532, which was to lift that, came
    back as #163187 without the CPU build). The guard of the meta device does nothing, which is what
    is wanted.
    """
    with FakeTensorMode() if torch.backends.cuda.is_built() else _cuda_guarded_as_meta():
        yield


@contextlib.contextmanager
def _cuda_guarded_as_meta() -> Iterator[None]:
    cuda, meta = 1, 14  # c10::DeviceType
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    registry = (ctypes.c_void_p * (meta + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    registry[cuda] = registry[meta]
    try:
        with FakeTensorMode():
            yield
    finally:
        registry[cuda] = None


def host_seconds(function: Function, *args: Any) -> float:
    """What a warm call costs around its graph: guards, arguments, results. The least of 300 calls.

    The graph itself is replaced by a function that keeps its first result.
    """

    def constant(graph: GraphModule, _: Any) -> Function:
        kept: list[Any] = []

        def call(*inputs: Tensor) -> Any:
            if not kept:
                kept.append(graph(*inputs))
            return kept[0]

        return call

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=constant, fullgraph=True, dynamic=False)
    compiled(*args)
    least = math.inf
    for _ in range(300):
        start = time.perf_counter()
        compiled(*args)
        least = min(least, time.perf_counter() - start)
    return least


@dataclass(frozen=True)
class Generated:
    """Inductor's wrapper: which buffers it makes, and what is done with the inputs."""

    wrapper: ast.FunctionDef
    inputs: tuple[tuple[int, ...], ...]  # the shape of each

    @property
    def buffers(self) -> list[tuple[int, ...]]:
        """The shapes of the buffers that are allocated, in order."""
        made = [
            call
            for call in self._calls()
            if re.match(r"empty_strided_(cpu|cuda)$", ast.unparse(call.func))
        ]
        return [ast.literal_eval(call.args[0]) for call in made]

    @property
    def copies(self) -> list[str]:
        """Calls that do nothing but copy."""
        return [
            ast.unparse(call)
            for call in self._calls()
            if re.search(r"\b(copy_|clone|copy)\b", ast.unparse(call.func))
        ]

    @property
    def written(self) -> list[str]:
        """What our in-place ops write: names of inputs, or of buffers, in order."""
        names = []
        for call in self._calls():
            match = re.match(r"torch\.ops\.normuon_fn\.(\w+_)\.default$", ast.unparse(call.func))
            if match:
                schema = getattr(torch.ops.normuon_fn, match[1]).default._schema
                for argument, value in zip(schema.arguments, call.args, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        names += [_base(element) for element in value.elts]  # type: ignore[attr-defined]
        return names

    @property
    def in_kernels(self) -> set[str]:
        """Names of inputs and buffers that Inductor's own kernels read or write."""
        calls = [
            call
            for call in self._calls()
            if re.match(r"(cpp|triton)_\w+(\.run)?$", ast.unparse(call.func))
        ]
        return {_base(argument) for call in calls for argument in call.args}

    def check_in_place(self, least: int) -> None:
        """Inputs of ``least`` elements and more are written by the ops themselves, and copied
        nowhere.

        Raises:
            AssertionError: naming the copy.
        """
        large = {f"arg{k}_1" for k, shape in enumerate(self.inputs) if math.prod(shape) >= least}
        assert self.written, "no op writes in place"
        buffers = [name for name in self.written if not name.startswith("arg")]
        assert not buffers, f"written in the place of inputs: {buffers}"
        assert not self.copies, f"copied: {self.copies}"
        assert not large & self.in_kernels, (
            f"Inductor's own kernels touch {large & self.in_kernels}"
        )

    def _calls(self) -> list[ast.Call]:
        found = [node for node in ast.walk(self.wrapper) if isinstance(node, ast.Call)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def generated(function: Function, *args: Any, **kwargs: Any) -> Generated:
    """Inductor's code for ``function``. Its kernels are written and not compiled, nothing runs."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    sources: list[str] = []

    def written(graph: GraphLowering) -> None:
        sources.append(graph.codegen()[0].value)
        raise NotImplementedError("nobody compiles it")

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "compile_to_module", written)
        with pytest.raises(Exception, match="nobody compiles it"):
            compiled(*args, **kwargs)
    assert len(sources) == 1, f"{len(sources)} graphs"
    tree = ast.parse(sources[0])
    wrapper = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    shapes = {}
    for node in ast.walk(wrapper):
        checks = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if checks not in (
            "assert_size_stride",
            "assert_size_stride_grouped",
        ):  # torch 2.14 asks for several at once
            continue
        given, sizes = node.args[:2]
        several = isinstance(given, ast.Tuple)
        for x, size in zip(given.elts, sizes.elts, strict=True) if several else [(given, sizes)]:
            if re.match(r"arg\d+_1$", name := ast.unparse(x)):
                shapes[int(name[3:-2])] = ast.literal_eval(size)
    return Generated(wrapper, tuple(shapes[k] for k in range(len(shapes))))


def registered_ops() -> set[str]:
    """Every operator of the package, whether used or not."""
    names = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("normuon_fn::")
    }
    return {name.partition(".")[0] for name in names} - {
        "reinterpret"
    }  # compat's, on torch 2.11 alone


def _all_nodes(graphs: list[GraphModule]) -> tuple[Node, ...]:
    inner = [
        module for graph in graphs for module in graph.modules() if isinstance(module, GraphModule)
    ]
    return tuple(node for module in inner for node in module.graph.nodes)


def _name(node: Node) -> str:
    """``aten.bmm``; ``normuon_fn.apply_`` where functionalization has wrapped it."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name().startswith(
        "auto_functionalized"
    ):
        target = node.args[0]
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def _length(node: Node) -> int:
    """How many tensors the op's first list has."""
    lengths = [value for key, value in node.kwargs.items() if re.match(r"_\w+_length$", key)]
    if lengths:
        return lengths[0]
    arguments = [
        value for value in (*node.args, *node.kwargs.values()) if isinstance(value, (list, tuple))
    ]
    return len(arguments[0])


def _values(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def _tensors(arguments: Any) -> list[Tensor]:
    found: list[Tensor] = []
    torch.fx.map_arg(arguments, lambda node: found.extend(_values(node)))
    return found


def _waits(node: Node) -> bool:
    if _name(node) in HOST_SYNCS:
        return True
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    value = node.meta.get("val")
    if isinstance(value, symbolic) or any(
        isinstance(n, symbolic) for x in _values(node) for n in x.shape
    ):
        return True
    to_cpu = any(x.device.type == "cpu" for x in _values(node))
    return to_cpu and any(x.device.type != "cpu" for x in _tensors((node.args, node.kwargs)))


def _base(expression: ast.expr) -> str:
    """``arg3_1`` of ``reinterpret_tensor(arg3_1, ...)``."""
    while isinstance(expression, ast.Call) and expression.args:
        expression = expression.args[0]
    return ast.unparse(expression)


def counting(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts what `step` and `step_` compile; dynamo and its guards as ever, the graph run as it
    is.
    """
    found = CompileCounter()
    monkeypatch.setattr(
        outside, "compile_whole", lambda function, **_: compile_whole(function, found)
    )
    return found


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """The AOT graphs that `step` and `step_` are compiled to meanwhile."""
    backend = AotEagerAndRecordGraphs()
    with monkeypatch.context() as patch:
        patch.setattr(
            outside, "compile_whole", lambda function, **_: compile_whole(function, backend)
        )
        yield backend.fw_graphs
