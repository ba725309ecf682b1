"""Which configuration of the product kernel is fastest on this CUDA device, beside cuBLAS.

    python examples/benchmarks/tune.py                                  # about 4 minutes
    python examples/benchmarks/tune.py --quick              # fewer shapes and candidates
    python examples/benchmarks/tune.py --shape 48x768x768 --dtype bfloat16 --json results.json

Three variants are in ``ops/product_kernels.py``: "pointers" takes any strides; "tma" loads both
operands by tensor descriptors, and "persistent" does so in one program per SM. "specialized" is in
``ops/warp_specialized.py``. What wins goes into ``ops/product_configs.py``: of the three into
`CONFIGS`, and of the last into `WARP_SPECIALIZED`.

Times are medians over replays of a CUDA graph of several launches, divided by their number: no host
time is in them. Replays follow one another for ``--seconds``, and the second half counts: a GPU
that has multiplied for a while is held at its power limit, where the clock is a quarter lower
(H200), and what takes less energy may win there. "effective" counts 2 rows^2 cols of a symmetric
product, as a full one costs, "real" only the tiles that are computed.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from normuon_fn.ops.product_configs import TileConfig, tile_count
from normuon_fn.ops.product_launch import prepare, product

SHAPES = [(48, 768, 768), (12, 768, 3072), (24, 768, 3072), (96, 2048, 2048), (24, 2048, 8192)]
QUICK_SHAPES = [(48, 768, 768), (12, 768, 3072), (96, 2048, 2048)]
OPERATIONS = ("symmetric_matmul", "symmetric_addmm", "addmm")
ALPHA, BETA = 0.5, 2.0


def name_of(config: TileConfig) -> str:
    m, n, k, group, warps, stages, variant, ends = config
    variant += " ends" if ends else ""
    return f"{variant:15} {m:3}x{n:3}x{k:3}  group {group:2}  warps {warps}  stages {stages}"


POINTERS = [
    TileConfig(64, 64, 64, 8, 4, 4),
    TileConfig(64, 128, 64, 8, 4, 3),
    TileConfig(64, 128, 64, 8, 4, 4),
    TileConfig(128, 128, 32, 8, 8, 4),
    TileConfig(128, 128, 64, 8, 4, 3),
    TileConfig(128, 128, 64, 8, 4, 4),
    TileConfig(128, 128, 64, 8, 8, 3),
    TileConfig(128, 128, 64, 8, 8, 4),
    TileConfig(128, 128, 64, 4, 8, 4),
    TileConfig(128, 128, 64, 8, 8, 5),
    TileConfig(128, 128, 128, 8, 8, 3),
    TileConfig(128, 256, 64, 8, 8, 3),
    TileConfig(128, 256, 64, 8, 8, 4),
    TileConfig(128, 256, 64, 4, 8, 4),
    TileConfig(256, 128, 64, 8, 8, 3),
    TileConfig(256, 128, 64, 8, 8, 4),
]
TMA = [
    TileConfig(64, 64, 64, 8, 4, 4, "tma"),
    TileConfig(64, 128, 64, 8, 4, 4, "tma"),
    TileConfig(128, 64, 64, 8, 4, 4, "tma"),
    TileConfig(64, 256, 64, 8, 4, 3, "tma"),
    TileConfig(128, 128, 64, 8, 4, 3, "tma"),
    TileConfig(128, 128, 64, 8, 8, 3, "tma"),
    TileConfig(128, 128, 64, 8, 8, 4, "tma"),
    TileConfig(128, 256, 64, 8, 8, 3, "tma"),
    TileConfig(128, 256, 64, 8, 8, 4, "tma"),
]
PERSISTENT = [
    TileConfig(128, 128, 64, 8, 8, 3, "persistent"),
    TileConfig(128, 128, 64, 8, 8, 4, "persistent"),
    TileConfig(128, 256, 64, 8, 8, 3, "persistent"),
    TileConfig(128, 256, 64, 8, 8, 4, "persistent"),
    TileConfig(256, 128, 64, 8, 8, 3, "persistent"),
]
# c loaded and the result stored by descriptors, too
ENDS = [
    TileConfig(64, 64, 64, 8, 4, 4, "tma", ends=True),
    TileConfig(64, 128, 64, 8, 4, 4, "tma", ends=True),
    TileConfig(128, 64, 64, 8, 4, 4, "tma", ends=True),
    TileConfig(64, 256, 64, 8, 4, 3, "tma", ends=True),
    TileConfig(128, 128, 64, 4, 4, 3, "tma", ends=True),
    TileConfig(128, 128, 64, 8, 4, 3, "tma", ends=True),
    TileConfig(128, 128, 64, 8, 8, 4, "persistent", ends=True),
    TileConfig(128, 128, 128, 8, 8, 2, "persistent", ends=True),
    TileConfig(128, 256, 64, 4, 8, 3, "persistent", ends=True),
    TileConfig(128, 128, 64, 16, 4, 3, "tma", ends=True),
    TileConfig(128, 256, 64, 8, 8, 3, "tma", ends=True),
    TileConfig(128, 256, 64, 8, 8, 3, "persistent", ends=True),
    TileConfig(128, 256, 64, 16, 8, 3, "persistent", ends=True),
]
# one consumer of 8 warps, or two of 4
SPECIALIZED = [
    TileConfig(128, 256, 64, 4, 8, 3, "specialized", ends=True),
    TileConfig(128, 256, 64, 8, 8, 3, "specialized", ends=True),
    TileConfig(128, 256, 64, 16, 8, 3, "specialized", ends=True),
    TileConfig(128, 128, 64, 8, 8, 5, "specialized", ends=True),
    TileConfig(128, 128, 64, 8, 4, 4, "specialized", ends=True),
    TileConfig(128, 128, 64, 4, 4, 5, "specialized", ends=True),
    TileConfig(128, 128, 64, 8, 4, 5, "specialized", ends=True),
    TileConfig(128, 128, 64, 16, 4, 5, "specialized", ends=True),
]
ALL = POINTERS + TMA + PERSISTENT + ENDS + SPECIALIZED
QUICK = [
    *(c for c in TMA + PERSISTENT if c.num_stages == 3 and c.block_m == 128 <= c.block_n),
    *ENDS,
    *SPECIALIZED,
]


# -------------------------------------------------------------------------------------- runs


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


def run(config: TileConfig, given: tuple[Any, ...]) -> Tensor:
    return product(*given, config)


def compile_for(config: TileConfig, given: tuple[Any, ...]) -> None:
    """Compiles the kernel where it would be launched."""
    a, b, *_ = given
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    kernel, programs, pointers, constants, options = prepare(*given[:3], out, *given[3:], config)
    kernel.warmup(*pointers, *constants, grid=(programs,), **options)


def cublas(given: tuple[Any, ...]) -> Tensor:
    a, b, c, alpha, beta, _ = given
    return torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def possible(candidate: TileConfig, symmetric: bool) -> bool:
    return not symmetric or candidate.block_n in (candidate.block_m, 2 * candidate.block_m)


def compile_all(
    candidates: list[TileConfig], problems: list[dict[str, tuple[Any, ...]]], threads: int
) -> dict[str, str]:
    """Compiles every kernel that will be launched, in parallel; what failed, by candidate."""
    failed: dict[str, str] = {}

    def one(job: tuple[TileConfig, tuple[Any, ...]]) -> None:
        candidate, given = job
        small = tuple(v[:1] if isinstance(v, Tensor) else v for v in given)
        torch.cuda.set_device(0)
        try:
            compile_for(candidate, small)
        except Exception as error:
            failed[name_of(candidate)] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )

    jobs = [
        (c, given)
        for problem in problems
        for c in candidates
        for given in problem.values()
        if possible(c, given[-1])
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, jobs))
    return failed


def milliseconds(function: Callable[[], Any], span: float) -> float:
    """Median time of a call, without the host's part, in the second half of ``span`` seconds."""
    function()
    torch.cuda.synchronize()
    mark = functools.partial(torch.cuda.Event, enable_timing=True)
    start, end = mark(), mark()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    calls = max(2, min(20, int(5.0 / max(start.elapsed_time(end), 0.01))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    marks = [mark()]
    marks[0].record()
    began = time.perf_counter()
    while time.perf_counter() - began < span or len(marks) < 6:
        graph.replay()
        marks.append(mark())
        marks[-1].record()
        if len(marks) > 4:  # the device is never without work, and the host is not far ahead
            marks[-4].synchronize()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / calls for a, b in itertools.pairwise(marks)]
    return statistics.median(times[len(times) // 2 :])


def difference(out: Tensor, reference: Tensor) -> float:
    return ((out.float() - reference.float()).norm() / reference.float().norm()).item()


def measure(
    candidates: list[TileConfig], given: tuple[Any, ...], tolerance: float, span: float
) -> dict[str, Any]:
    """cuBLAS and every candidate on one product."""
    a, b, _, alpha, _, symmetric = given
    n, rows, depth = a.shape
    cols = b.shape[2]
    reference = cublas(given) * (alpha if given[2] is None else 1.0)
    flop = 2 * n * rows * cols * depth
    found: dict[str, Any] = {
        "cublas_ms": milliseconds(lambda: cublas(given), span),
        "candidates": [],
        "failed": {},
    }
    found["cublas_tflops"] = flop / found["cublas_ms"] / 1e9
    for candidate in candidates:
        if not possible(candidate, symmetric):
            continue
        try:
            out = run(candidate, given)
            error = difference(out, reference)
            if not error <= tolerance:
                raise ArithmeticError(f"wrong result: relative difference {error:.2e}")
            if symmetric and not torch.equal(out, out.mT):
                raise ArithmeticError("the result is not symmetric")
            del out
            ms = milliseconds(functools.partial(run, candidate, given), span)
        except Exception as error:  # out of resources: the sweep goes on
            found["failed"][name_of(candidate)] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        real = (
            2
            * n
            * depth
            * candidate.block_m
            * candidate.block_n
            * tile_count(symmetric, rows, cols, candidate)
        )
        found["candidates"].append(
            {
                "variant": candidate.variant,
                "config": candidate._asdict(),
                "name": name_of(candidate),
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
        lines.append(
            f"  {operation:17} cuBLAS {found['cublas_ms']:8.4f} ms  "
            f"{found['cublas_tflops']:6.0f} TFLOP/s"
        )
        for row in found["candidates"][:3]:
            ratio = found["cublas_ms"] / row["ms"]
            rates = f"{row['effective_tflops']:6.0f} effective  {row['real_tflops']:6.0f} real"
            lines.append(f"    {row['name']}  {row['ms']:8.4f} ms  {rates}  {ratio:5.2f}x cuBLAS")
        if found["failed"]:
            kinds = sorted({reason[:100] for reason in found["failed"].values()})
            lines.append(f"    failed: {len(found['failed'])} ({'; '.join(kinds)})")
    return "\n".join(lines)


def default_dtype(rows: int, cols: int) -> torch.dtype:
    """The products' dtype on CUDA: `orthogonalize` takes the Gram form in float16 for wide ones."""
    return torch.float16 if cols >= 1.5 * rows else torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        action="append",
        help="NxROWSxCOLS, rows <= cols; default: five of GPT-2 124M and 1.3B",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=["float16", "bfloat16"],
        help="default: the package's for the shape",
    )
    parser.add_argument("--operation", action="append", choices=OPERATIONS, help="default: all")
    parser.add_argument(
        "--variant", action="append", choices=["pointers", "tma", "persistent", "specialized"]
    )
    parser.add_argument(
        "--quick", action="store_true", help="three shapes, and the candidates most likely to win"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="for each; the first half does not count"
    )
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache")
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--json", metavar="FILE", help="all numbers, written after every shape")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")

    shapes = (
        [tuple(map(int, s.split("x"))) for s in args.shape]
        if args.shape
        else QUICK_SHAPES
        if args.quick
        else SHAPES
    )
    candidates = [
        c for c in (QUICK if args.quick else ALL) if not args.variant or c.variant in args.variant
    ]
    cases = [
        (s, getattr(torch, d))
        for s in shapes
        for d in args.dtype or [str(default_dtype(*s[1:])).removeprefix("torch.")]
    ]
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(", ".join(machine.values()), f"{len(candidates)} candidates", sep=", ", flush=True)

    start = time.perf_counter()
    small = [
        inputs(1, rows, cols, dtype) for _, rows, cols, dtype in {(1, *s[1:], d) for s, d in cases}
    ]
    failed = compile_all(candidates, small, args.threads)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for name, reason in failed.items():
        print(f"  {name}: {reason}")
    del small
    if args.compile_only:
        return

    heat = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    milliseconds(functools.partial(torch.mm, heat, heat), 5 * args.seconds)  # none begins cool
    results = []
    for (n, rows, cols), dtype in cases:
        start = time.perf_counter()
        tolerance = 2e-3 if dtype == torch.float16 else 1e-2
        given = inputs(n, rows, cols, dtype)
        found = {
            operation: measure(candidates, given[operation], tolerance, args.seconds)
            for operation in args.operation or OPERATIONS
        }
        shape, name = f"{n} x {rows} x {cols}", str(dtype).removeprefix("torch.")
        title = f"\n{shape}, {name} ({time.perf_counter() - start:.0f} s)"
        print(table(title, found), flush=True)
        results.append(
            {"n": n, "rows": rows, "cols": cols, "dtype": str(dtype), "operations": found}
        )
        del given
        torch.cuda.empty_cache()
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
