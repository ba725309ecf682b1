"""A trial of other epilogues and loops for the products, beside the kernels that ship and cuBLAS.

    python examples/benchmarks/trial_products.py

Every variant is checked against the present kernel and timed; what fails is printed, and the rest
goes on.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from normuon_fn.ops.product_configs import TileConfig, tile_count
from normuon_fn.ops.product_kernels import _first_entry
from normuon_fn.ops.product_launch import product


@triton.jit
def _square(
    acc, c_value, c, c_desc, out, alpha, beta, matrix, i0, j0, rows, cols, c_row, n,
    SYMMETRIC: tl.constexpr, SAME: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Finishes BM x BN entries and stores them, and their mirror image, by descriptor."""
    acc = acc * alpha
    if C == "late":
        i = (i0 + tl.arange(0, BM)) % rows
        j = (j0 + tl.arange(0, BN)) % cols
        acc += beta * tl.load(c + i[:, None] * c_row + j[None, :]).to(tl.float32)
    elif C == "late_tma":
        acc += beta * tl.reshape(c_desc.load([matrix, i0, j0]), (BM, BN)).to(tl.float32)
    elif C == "early":
        acc += beta * c_value.to(tl.float32)
    block = acc.to(out.dtype)
    if SYMMETRIC:
        mirrored = tl.trans(block)
        if SAME == "where":
            i = i0 + tl.arange(0, BM)
            j = j0 + tl.arange(0, BN)
            block = tl.where(i[:, None] >= j[None, :], block, mirrored)
        if SAME == "branch":
            if i0 == j0:
                i = i0 + tl.arange(0, BM)
                j = j0 + tl.arange(0, BN)
                block = tl.where(i[:, None] >= j[None, :], block, mirrored)
        # A store beyond the last matrix is dropped: above the diagonal there is nothing to store.
        out.store([tl.where(i0 >= j0, matrix, n), i0, j0], tl.reshape(block, (1, BM, BN)))
        out.store([tl.where(i0 > j0, matrix, n), j0, i0], tl.reshape(mirrored, (1, BN, BM)))
    else:
        out.store([matrix, i0, j0], tl.reshape(block, (1, BM, BN)))


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _tile(
    program, a, b, c, c_desc, out, alpha, beta, rows, cols, depth, tiles, n, c_matrix, c_row,
    SYMMETRIC: tl.constexpr, SAME: tl.constexpr, C: tl.constexpr, EPILOGUE: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    matrix = program // tiles
    i0, j0 = _first_entry(program % tiles, rows, cols, SYMMETRIC, BM, BN, GROUP)
    c += matrix.to(tl.int64) * c_matrix
    c_value = 0
    if C == "early" or C == "init":
        i = (i0 + tl.arange(0, BM)) % rows
        j = (j0 + tl.arange(0, BN)) % cols
        c_value = tl.load(c + i[:, None] * c_row + j[None, :])
    if C == "init":
        acc = c_value.to(tl.float32) * (beta / alpha)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, depth, BK):
        left = tl.reshape(a.load([matrix, i0, k]), (BM, BK))
        if B_TRANSPOSED:
            right = tl.trans(tl.reshape(b.load([matrix, j0, k]), (BN, BK)))
        else:
            right = tl.reshape(b.load([matrix, k, j0]), (BK, BN))
        acc = tl.dot(left, right, acc)
    if EPILOGUE == "none":  # what the loop alone takes
        if alpha == 12345.0:
            out.store([matrix, i0, j0], tl.reshape(_first(acc, BM, BN, SN), (1, BM, SN)))
    elif BN == SN:
        _square(
            acc, c_value, c, c_desc, out, alpha, beta, matrix, i0, j0, rows, cols, c_row, n,
            SYMMETRIC, SAME, C, BM, SN,
        )  # fmt: skip
    else:
        left, right = _halves(acc, BM, BN)
        c_left, c_right = c_value, c_value
        if C == "early":
            c_left, c_right = _halves(c_value, BM, BN)
        _square(
            left, c_left, c, c_desc, out, alpha, beta, matrix, i0, j0, rows, cols, c_row, n,
            SYMMETRIC, SAME, C, BM, SN,
        )  # fmt: skip
        _square(
            right, c_right, c, c_desc, out, alpha, beta, matrix, i0, j0 + SN, rows, cols, c_row, n,
            SYMMETRIC, SAME, C, BM, SN,
        )  # fmt: skip


@triton.jit
def _first(acc, BM: tl.constexpr, BN: tl.constexpr, SN: tl.constexpr):
    if BN == SN:
        found = acc
    else:
        left, right = _halves(acc, BM, BN)
        found = left + right
    return found.to(tl.bfloat16)


@triton.jit
def trial_kernel(
    a, b, c, c_desc, out, alpha, beta, rows, cols, depth, tiles, total, n, c_matrix, c_row,
    SYMMETRIC: tl.constexpr, SAME: tl.constexpr, C: tl.constexpr, EPILOGUE: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, LOOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if LOOP == "one":
        _tile(
            tl.program_id(0), a, b, c, c_desc, out, alpha, beta, rows, cols, depth, tiles, n,
            c_matrix, c_row, SYMMETRIC, SAME, C, EPILOGUE, B_TRANSPOSED, BM, BN, BK, SN, GROUP,
        )  # fmt: skip
    else:
        for program in tl.range(
            tl.program_id(0), total, tl.num_programs(0), flatten=LOOP == "flat"
        ):
            _tile(
                program, a, b, c, c_desc, out, alpha, beta, rows, cols, depth, tiles, n,
                c_matrix, c_row, SYMMETRIC, SAME, C, EPILOGUE, B_TRANSPOSED, BM, BN, BK, SN, GROUP,
            )  # fmt: skip


class Variant(NamedTuple):
    kind: str  # "xxt", "symmetric_addmm", "addmm"
    block_m: int
    block_n: int
    warps: int
    stages: int
    loop: str = "one"  # "one", "flat", "nested"
    c: str = "late"  # "late", "late_tma", "early", "init"
    same: str = "same"  # a b is symmetric bit for bit; or its diagonal needs "where" or "branch"
    epilogue: str = "tma"
    group: int = 8
    block_k: int = 64
    store: int = 128  # columns of a stored block

    @property
    def name(self) -> str:
        same = "" if self.same == "same" or self.kind != S else f" {self.same}"
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return (
            f"{size} w{self.warps} s{self.stages} {self.loop:6} c {self.c:8} {self.epilogue}"
            f" g{self.group}{same}"
        )


def V(*fields: Any, **named: Any) -> Variant:
    return Variant(*fields, **named)


S, X, A = "symmetric_addmm", "xxt", "addmm"


def T(n: int, warps: int, stages: int, group: int, variant: str = "tma") -> TileConfig:
    return TileConfig(128, n, 64, group, warps, stages, variant)  # type: ignore[arg-type]


SMALL_TILES = [T(128, 4, 3, 8), T(128, 4, 3, 16), T(128, 4, 3, 32), T(128, 8, 3, 16)]
PRESENT = {
    X: [T(256, 8, 3, 8), *SMALL_TILES, T(256, 8, 3, 8, "persistent")],
    S: [T(128, 8, 4, 8, "persistent"), *SMALL_TILES, T(128, 4, 2, 16)],
    A: [
        T(256, 8, 3, 8, "persistent"), T(256, 8, 4, 8, "persistent"),
        T(256, 8, 3, 16, "persistent"), T(256, 8, 3, 4), T(256, 8, 3, 8), T(256, 8, 3, 16),
        T(256, 8, 3, 32), T(128, 4, 3, 16),
    ],
}  # fmt: skip
VARIANTS = [
    V(X, 128, 256, 8, 3, "flat"),
    V(X, 128, 256, 8, 3, "flat", group=16),
    V(X, 128, 256, 8, 3, "nested", group=16),
    V(X, 128, 128, 4, 3, "one", group=16),
    V(S, 128, 128, 4, 3, "one", "late_tma", group=16),
    V(S, 128, 256, 8, 3, "nested", "late_tma"),
    V(S, 128, 256, 8, 3, "nested", "late_tma", group=16),
    V(S, 128, 256, 8, 3, "flat", "late_tma", group=16),
    V(A, 128, 256, 8, 3, "nested", "late_tma", same="where", group=8),
    V(A, 128, 256, 8, 3, "flat", "late_tma", same="where", group=16),
    V(A, 128, 256, 8, 3, "one", "late_tma", same="where", group=16),
]
SHAPES = [
    (96, 2048, 2048, torch.bfloat16),
    (48, 2048, 8192, torch.float16),
    (48, 768, 768, torch.bfloat16),
    (12, 768, 3072, torch.float16),
]


def constants_of(v: Variant) -> dict[str, Any]:
    return {
        "SYMMETRIC": v.kind != A,
        "SAME": v.same,
        "C": "none" if v.kind == X else v.c,
        "EPILOGUE": v.epilogue,
        "B_TRANSPOSED": v.kind != A,
        "LOOP": v.loop,
        "BM": v.block_m,
        "BN": v.block_n,
        "BK": v.block_k,
        "SN": v.store,
        "GROUP": v.group,
    }


def blocks_of(v: Variant) -> dict[str, list[int]]:
    m, n, k = v.block_m, v.block_n, v.block_k
    return {
        "a": [1, m, k],
        "b": [1, k, n] if v.kind == A else [1, n, k],
        "c_desc": [1, m, v.store],
        "out": [1, m, v.store],
    }


def arguments(v: Variant, given: tuple[Any, ...], out: torch.Tensor) -> tuple[int, list[Any]]:
    a, b, c, alpha, beta, symmetric = given
    n, rows, depth = a.shape
    cols = b.shape[2]
    config = TileConfig(v.block_m, v.block_n, v.block_k, v.group, v.warps, v.stages)
    if v.block_m > v.block_n:  # for the loop alone
        config = config._replace(block_n=v.block_m)
    tiles = tile_count(symmetric, rows, cols, config)
    block = blocks_of(v)
    right = b if v.kind == A else b.mT
    wide = a if c is None else c
    descriptors = [TensorDescriptor.from_tensor(a, block["a"])]
    descriptors.append(TensorDescriptor.from_tensor(right, block["b"]))
    c_desc = TensorDescriptor.from_tensor(wide, block["c_desc"])
    out_desc = TensorDescriptor.from_tensor(out, block["out"])
    total = n * tiles
    programs = total
    if v.loop != "one":
        programs = min(total, torch.cuda.get_device_properties(0).multi_processor_count)
    return programs, [
        *descriptors, wide, c_desc, out_desc, alpha, beta, rows, cols, depth, tiles, total, n,
        wide.stride(0), wide.stride(1),
    ]  # fmt: skip


def call(v: Variant, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    programs, values = arguments(v, given, out)
    found = trial_kernel[(programs,)](
        *values, **constants_of(v), num_warps=v.warps, num_stages=v.stages, enable_fp_fusion=True
    )
    call.last = found  # type: ignore[attr-defined]
    return out


def milliseconds(function: Any, blocks: int = 5, calls: int = 3) -> float:
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(blocks):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def inputs(n: int, rows: int, cols: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(n, rows, cols, generator=generator, device="cuda") / cols**0.5).to(dtype)
    r = torch.bmm(x, x.mT)
    r = (r.tril() + r.tril(-1).mT).contiguous()
    return {X: (x, x.mT, None, 0.5, 0.0, True), S: (r, r.mT, r, 0.5, 2.0, True),
            A: (r, x, x, 1.0, 2.0, False)}  # fmt: skip


def compile_one(v: Variant) -> str:
    """Ahead of time for sm_90, which needs no GPU: what it takes, or why not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants_of(v)}
    names = trial_kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(names, "i32")
    signature |= {k: f"tensordesc<bf16{b}>".replace(" ", "") for k, b in blocks_of(v).items()}
    signature |= {"c": "*bf16", "alpha": "fp32", "beta": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in ("c", "rows", "cols", "depth", "c_matrix", "c_row")
    }
    source = ASTSource(trial_kernel, signature, constants, divisible)
    options = {"num_warps": v.warps, "num_stages": v.stages, "enable_fp_fusion": True}
    try:
        start = time.perf_counter()
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        return f"FAILED {type(error).__name__}: {str(error).splitlines()[:1]}"
    ptx = found.asm["ptx"]
    return (
        f"shared {found.metadata.shared // 1024} KB, regs/spill {resources(found)}, "
        f"tma loads {ptx.count('cp.async.bulk.tensor.3d.shared')}, "
        f"stores {ptx.count('cp.async.bulk.tensor.3d.global')}, "
        f"wgmma {ptx.count('wgmma.mma_async')}, {time.perf_counter() - start:.1f} s"
    )


def resources(found: Any) -> str:
    import re
    import subprocess
    import tempfile

    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return "/".join(match.groups()) if match else text[-200:]


def rate(v: Any, symmetric: bool, n: int, rows: int, cols: int, depth: int, ms: float) -> float:
    config = TileConfig(v.block_m, v.block_n, v.block_k, v.group, 8, 3)
    if v.block_m > v.block_n:
        config = config._replace(block_n=v.block_m)
    area = v.block_m * max(v.block_n, v.block_m if symmetric else 0)
    return 2 * n * depth * area * tile_count(symmetric, rows, cols, config) / ms / 1e9


def main() -> None:
    if "--compile" in sys.argv:
        for v in VARIANTS:
            print(f"{v.kind:15} {v.name}: {compile_one(v)}", flush=True)
        return
    began = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    for shape in SHAPES:
        trial(*shape)
        print(f"{time.perf_counter() - began:.0f} s so far", flush=True)
        torch.cuda.empty_cache()
    for shape in ((96, 2048, 2048), (48, 2048, 8192)):
        try:
            profile(shape)
        except Exception as error:
            print(f"profile {shape}: {type(error).__name__} {error!s:.200}")
        torch.cuda.empty_cache()
    for n in (48, 24, 16, 12):  # do chunks that stay in L2 pay?
        import normuon_fn as nm

        xs = [torch.randn(n, 768, 768, device="cuda") for _ in range(48 // n)]
        graph = torch.cuda.CUDAGraph()
        compiled = torch.compile(nm.orthogonalize, fullgraph=True, dynamic=False)
        for _ in range(3):
            for x in xs:
                compiled(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for x in xs:
                compiled(x)
        print(f"orthogonalize 48x768x768 as {len(xs)} x {n}: {milliseconds(graph.replay):.3f} ms")
        del graph
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


def trial(n: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    given = inputs(n, rows, cols, dtype)
    small = inputs(1, rows, cols, dtype)

    def prepare(job: tuple[str, Any]) -> None:
        torch.cuda.set_device(0)
        kind, v = job
        try:
            arg = small[kind]
            if isinstance(v, TileConfig):
                product(*arg, v)
                return
            out = torch.empty(1, rows, arg[1].shape[2], device="cuda", dtype=dtype)
            _, values = arguments(v, arg, out)
            trial_kernel.warmup(
                *values, **constants_of(v), grid=(1,), num_warps=v.warps, num_stages=v.stages,
                enable_fp_fusion=True,
            )  # fmt: skip
        except Exception as error:
            print(f"  {v}: {type(error).__name__}: {str(error)[:150]!r}", flush=True)

    jobs = [(v.kind, v) for v in VARIANTS]
    jobs += [(kind, config) for kind, configs in PRESENT.items() for config in configs]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(prepare, jobs))
    torch.cuda.synchronize()
    for kind in (S, X, A):
        a, b, c, alpha, beta, symmetric = given[kind]
        depth, width = a.shape[2], b.shape[2]
        title = f"{n}x{rows}x{cols} {str(dtype)[6:]} {kind:15}"
        reference = product(*given[kind])
        for config in PRESENT[kind]:
            text = " ".join(map(str, config))
            try:
                ms = milliseconds(functools.partial(product, *given[kind], config))
                real = rate(config, symmetric, n, rows, width, depth, ms)
                print(f"{title} present {text:46} {ms:7.4f} ms {real:5.0f}", flush=True)
            except Exception as error:
                print(f"{title} present {text:46} {type(error).__name__} {error!s:.80}")
        for v in (v for v in VARIANTS if v.kind == kind):
            try:
                out = torch.full_like(reference, torch.nan)
                call(v, given[kind], out)
                wrong = (out.float() - reference.float()).norm() / reference.float().norm()
                mirrored = not symmetric or torch.equal(out, out.mT)
                note = f" error {wrong.item():.1e}{'' if mirrored else ' NOT SYMMETRIC'}"
                ms = milliseconds(functools.partial(call, v, given[kind], out))
                real = rate(v, symmetric, n, rows, width, depth, ms)
                print(f"{title} {v.name:54} {ms:7.4f} ms {real:5.0f}  {note}", flush=True)
            except Exception as error:
                print(f"{title} {v.name:54} {type(error).__name__} {error!s:.100}")


def profile(shape: tuple[int, int, int]) -> None:
    """What one call of `orthogonalize` spends in each kernel, and what it takes in all."""
    import normuon_fn as nm

    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    ms = milliseconds(lambda: nm.orthogonalize(x), 5, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(3):
            nm.orthogonalize(x)
        torch.cuda.synchronize()
    print(f"orthogonalize {shape} bf16: {ms:.2f} ms a call; of that by kernel:")
    rest = ms
    for event in sorted(run.key_averages(), key=lambda e: -e.device_time_total):
        if event.device_time_total > 10:
            each = event.device_time_total / 3e3
            rest -= each
            print(f"  {each:8.3f} ms  {event.count / 3:5.1f} x  {event.key[:90]}")
    print(f"  {rest:8.3f} ms  between them")


if __name__ == "__main__":
    main()
