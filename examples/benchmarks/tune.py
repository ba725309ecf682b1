"""Which configuration of the product kernel is fastest on this CUDA device, beside cuBLAS.

    python examples/benchmarks/tune.py                                  # about 4 minutes
    python examples/benchmarks/tune.py --quick                          # fewer shapes and candidates: 1 minute
    python examples/benchmarks/tune.py --shape 48x768x768 --dtype bfloat16 --json results.json

Three variants: "pointers" is the kernel of ``ops/products.py``; "tma" loads both operands by tensor descriptors, and
"persistent" does so in one program per SM that goes from tile to tile. The last two live here until they pay.

Times are medians over replays of a CUDA graph of several launches, divided by their number: no host time is in them.
"effective" counts 2 rows^2 cols of a symmetric product, as a full one costs, "real" only the tiles that are computed.
"""

# ruff: noqa: N803 -- compile-time constants of kernels are upper case, as everywhere in Triton
import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from normuon_fn.ops import products
from normuon_fn.ops.products import Config, _first_entry, _store

SHAPES = [(48, 768, 768), (12, 768, 3072), (24, 768, 3072), (96, 2048, 2048), (24, 2048, 8192)]
QUICK_SHAPES = [(48, 768, 768), (12, 768, 3072), (96, 2048, 2048)]
OPERATIONS = ("symmetric_matmul", "symmetric_addmm", "addmm")
ALPHA, BETA = 0.5, 2.0


class Candidate(NamedTuple):
    variant: str
    config: Config

    def __str__(self) -> str:
        m, n, k, group, warps, stages = self.config
        return f"{self.variant:10} {m:3}x{n:3}x{k:3}  group {group:2}  warps {warps}  stages {stages}"


POINTERS = [
    Config(64, 64, 64, 8, 4, 4),
    Config(64, 128, 64, 8, 4, 3),
    Config(64, 128, 64, 8, 4, 4),
    Config(128, 128, 32, 8, 8, 4),
    Config(128, 128, 64, 8, 4, 3),
    Config(128, 128, 64, 8, 4, 4),
    Config(128, 128, 64, 8, 8, 3),
    Config(128, 128, 64, 8, 8, 4),
    Config(128, 128, 64, 4, 8, 4),
    Config(128, 128, 64, 8, 8, 5),
    Config(128, 128, 128, 8, 8, 3),
    Config(128, 256, 64, 8, 8, 3),
    Config(128, 256, 64, 8, 8, 4),
    Config(128, 256, 64, 4, 8, 4),
    Config(256, 128, 64, 8, 8, 3),
    Config(256, 128, 64, 8, 8, 4),
]
TMA = [
    Config(128, 128, 64, 8, 4, 3),
    Config(128, 128, 64, 8, 8, 3),
    Config(128, 128, 64, 8, 8, 4),
    Config(128, 256, 64, 8, 8, 3),
    Config(128, 256, 64, 8, 8, 4),
]
PERSISTENT = [
    Config(128, 128, 64, 8, 8, 3),
    Config(128, 128, 64, 8, 8, 4),
    Config(128, 256, 64, 8, 8, 3),
    Config(128, 256, 64, 8, 8, 4),
]
ALL = [Candidate(v, c) for v, configs in (("pointers", POINTERS), ("tma", TMA), ("persistent", PERSISTENT)) for c in configs]
QUICK = [
    *(Candidate("pointers", c) for c in POINTERS if c[:3] in ((128, 128, 64), (128, 256, 64)) and c.group == 8 and c[5] < 5),
    *(Candidate("tma", c) for c in TMA[2:]),
    *(Candidate("persistent", c) for c in PERSISTENT[1:3]),
]


# ------------------------------------------------------------------------------------------------------------------ the variant


@triton.jit
def _descriptor_tile(
    program,
    a,
    b,
    c,
    out,
    alpha,
    beta,
    rows,
    cols,
    depth,
    tiles,
    c_matrix,
    c_row,
    c_col,
    SYMMETRIC: tl.constexpr,
    HAS_C: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    matrix = program // tiles
    i0, j0 = _first_entry(program % tiles, rows, cols, SYMMETRIC, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = tl.reshape(a.load([matrix, i0, k]), (BLOCK_M, BLOCK_K))
        if B_TRANSPOSED:
            right = tl.trans(tl.reshape(b.load([matrix, j0, k]), (BLOCK_N, BLOCK_K)))
        else:
            right = tl.reshape(b.load([matrix, k, j0]), (BLOCK_K, BLOCK_N))
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    wide = matrix.to(tl.int64)
    c_of = c + wide * c_matrix
    out_of = out + wide * rows * cols
    _store(acc, c_of, out_of, alpha, beta, i0, j0, rows, cols, c_row, c_col, SYMMETRIC, HAS_C, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["total"])
def descriptor_kernel(
    a,  # descriptor of [n, rows, depth]
    b,  # of [n, depth, cols], or of [n, cols, depth] when B_TRANSPOSED
    c,
    out,
    alpha,
    beta,
    rows,
    cols,
    depth,
    tiles,
    total,
    c_matrix,
    c_row,
    c_col,
    SYMMETRIC: tl.constexpr,
    HAS_C: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    if PERSISTENT:
        for program in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
            _descriptor_tile(
                program, a, b, c, out, alpha, beta, rows, cols, depth, tiles, c_matrix, c_row, c_col,
                SYMMETRIC, HAS_C, B_TRANSPOSED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        _descriptor_tile(
            tl.program_id(0), a, b, c, out, alpha, beta, rows, cols, depth, tiles, c_matrix, c_row, c_col,
            SYMMETRIC, HAS_C, B_TRANSPOSED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip


def launch_descriptors(
    kernel: Any,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    symmetric: bool,
    config: Config,
    programs: int | None = None,
) -> Tensor:
    """As `products._launch`. A symmetric ``b`` of a symmetric result is read as its transpose, as x^T is."""
    n, rows, depth = a.shape
    cols = b.shape[2]
    out = a.new_empty(n, rows, cols)
    tiles = products.tile_count(symmetric, rows, cols, config)
    of_b = b if not symmetric else b.mT if c is None else b
    b_block = [1, config.block_n, config.block_k] if symmetric else [1, config.block_k, config.block_n]
    given = a if c is None else c
    kernel[(min(n * tiles, programs or n * tiles),)](
        TensorDescriptor.from_tensor(a, [1, config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(of_b, b_block),
        given,
        out,
        alpha,
        beta,
        rows,
        cols,
        depth,
        tiles,
        n * tiles,
        *given.stride(),
        SYMMETRIC=symmetric,
        HAS_C=c is not None,
        B_TRANSPOSED=symmetric,
        PERSISTENT=programs is not None,
        UPCAST=products.INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


# ------------------------------------------------------------------------------------------------------------------------ runs


class Warm:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.kernel.warmup, grid=grid)


def inputs(n: int, rows: int, cols: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The arguments of each operation after the kernel: a, b, c, alpha, beta, symmetric."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(n, rows, cols, generator=generator, device="cuda") / cols**0.5).to(dtype)
    r = torch.bmm(x, x.mT)
    r = (r.tril() + r.tril(-1).mT).contiguous()  # r commutes with itself: r r is symmetric
    return {
        "symmetric_matmul": (x, x.mT, None, ALPHA, 0.0, True),
        "symmetric_addmm": (r, r, r, ALPHA, BETA, True),
        "addmm": (r, x, x, 1.0, BETA, False),
    }


def run(candidate: Candidate, given: tuple[Any, ...], wrap: Callable[[Any], Any] = lambda kernel: kernel) -> Tensor:
    if candidate.variant == "pointers":
        return products._launch(wrap(products._product_kernel), *given, candidate.config)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    programs = sms if candidate.variant == "persistent" else None
    return launch_descriptors(wrap(descriptor_kernel), *given, candidate.config, programs)


def cublas(given: tuple[Any, ...]) -> Tensor:
    a, b, c, alpha, beta, _ = given
    return torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def possible(candidate: Candidate, symmetric: bool) -> bool:
    return not symmetric or candidate.config.block_n in (candidate.config.block_m, 2 * candidate.config.block_m)


def compile_all(candidates: list[Candidate], problems: list[dict[str, tuple[Any, ...]]], threads: int) -> dict[str, str]:
    """Compiles every kernel that will be launched, in parallel; what failed, by candidate."""
    failed: dict[str, str] = {}

    def one(job: tuple[Candidate, tuple[Any, ...]]) -> None:
        candidate, given = job
        small = tuple(v[:1] if isinstance(v, Tensor) else v for v in given)
        torch.cuda.set_device(0)
        try:
            run(candidate, small, Warm)
        except Exception as error:
            failed[str(candidate)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    jobs = [(c, given) for problem in problems for c in candidates for given in problem.values() if possible(c, given[-1])]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, jobs))
    return failed


def milliseconds(function: Callable[[], Any], replays: int) -> float:
    """Median time of a call, without the host's part."""
    function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    calls = max(2, min(20, int(5.0 / max(start.elapsed_time(end), 0.01))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def difference(out: Tensor, reference: Tensor) -> float:
    return ((out.float() - reference.float()).norm() / reference.float().norm()).item()


def measure(candidates: list[Candidate], given: tuple[Any, ...], tolerance: float, replays: int) -> dict[str, Any]:
    """cuBLAS and every candidate on one product."""
    a, b, _, alpha, _, symmetric = given
    n, rows, depth = a.shape
    cols = b.shape[2]
    reference = cublas(given) * (alpha if given[2] is None else 1.0)
    flop = 2 * n * rows * cols * depth
    found: dict[str, Any] = {"cublas_ms": milliseconds(lambda: cublas(given), replays), "candidates": [], "failed": {}}
    found["cublas_tflops"] = flop / found["cublas_ms"] / 1e9
    for candidate in candidates:
        if not possible(candidate, symmetric):
            continue
        config = candidate.config
        try:
            out = run(candidate, given)
            error = difference(out, reference)
            if not error <= tolerance:
                raise ArithmeticError(f"wrong result: relative difference {error:.2e}")
            if symmetric and not torch.equal(out, out.mT):
                raise ArithmeticError("the result is not symmetric")
            del out
            ms = milliseconds(functools.partial(run, candidate, given), replays)
        except Exception as error:  # out of resources: the sweep goes on
            found["failed"][str(candidate)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        real = 2 * n * depth * config.block_m * config.block_n * products.tile_count(symmetric, rows, cols, config)
        found["candidates"].append(
            {
                "variant": candidate.variant,
                "config": config._asdict(),
                "name": str(candidate),
                "ms": ms,
                "effective_tflops": flop / ms / 1e9,
                "real_tflops": real / ms / 1e9,
                "difference": error,
            }
        )
    found["candidates"].sort(key=lambda row: row["ms"])
    return found


def table(title: str, results: dict[str, dict[str, Any]]) -> str:
    lines = [title]
    for operation, found in results.items():
        lines.append(f"  {operation:17} cuBLAS {found['cublas_ms']:8.4f} ms  {found['cublas_tflops']:6.0f} TFLOP/s")
        for row in found["candidates"][:3]:
            ratio = found["cublas_ms"] / row["ms"]
            rates = f"{row['effective_tflops']:6.0f} effective  {row['real_tflops']:6.0f} real"
            lines.append(f"    {row['name']}  {row['ms']:8.4f} ms  {rates}  {ratio:5.2f}x cuBLAS")
        if found["failed"]:
            kinds = sorted({reason[:100] for reason in found["failed"].values()})
            lines.append(f"    failed: {len(found['failed'])} ({'; '.join(kinds)})")
    return "\n".join(lines)


def default_dtype(rows: int, cols: int) -> torch.dtype:
    """Of the products on CUDA: for wide matrices `normuon_fn.orthogonalize` takes the Gram form, in float16."""
    return torch.float16 if cols >= 1.5 * rows else torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="NxROWSxCOLS, rows <= cols; default: five of GPT-2 124M and 1.3B")
    parser.add_argument(
        "--dtype", action="append", choices=["float16", "bfloat16"], help="default: the package's for the shape"
    )
    parser.add_argument("--variant", action="append", choices=["pointers", "tma", "persistent"])
    parser.add_argument("--quick", action="store_true", help="three shapes, and the candidates most likely to win")
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--json", metavar="FILE", help="all numbers, written after every shape")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")

    shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else QUICK_SHAPES if args.quick else SHAPES
    candidates = [c for c in (QUICK if args.quick else ALL) if not args.variant or c.variant in args.variant]
    cases = [(s, getattr(torch, d)) for s in shapes for d in args.dtype or [str(default_dtype(*s[1:])).removeprefix("torch.")]]
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(machine.values()), f"{len(candidates)} candidates", sep=", ", flush=True)

    start = time.perf_counter()
    small = [inputs(1, rows, cols, dtype) for _, rows, cols, dtype in {(1, *s[1:], d) for s, d in cases}]
    failed = compile_all(candidates, small, args.threads)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for name, reason in failed.items():
        print(f"  {name}: {reason}")
    del small

    results = []
    for (n, rows, cols), dtype in cases:
        start = time.perf_counter()
        tolerance = 2e-3 if dtype == torch.float16 else 1e-2
        given = inputs(n, rows, cols, dtype)
        found = {operation: measure(candidates, given[operation], tolerance, args.replays) for operation in OPERATIONS}
        title = f"\n{n} x {rows} x {cols}, {str(dtype).removeprefix('torch.')} ({time.perf_counter() - start:.0f} s)"
        print(table(title, found), flush=True)
        results.append({"n": n, "rows": rows, "cols": cols, "dtype": str(dtype), "operations": found})
        del given
        torch.cuda.empty_cache()
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
