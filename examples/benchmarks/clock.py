"""How much slower products are once the GPU has reached its power limit, and at which clock.

    python examples/benchmarks/clock.py                     # about 40 seconds, on an idle GPU
    python examples/benchmarks/clock.py --seconds 5         # longer for each

    first     median of the first 40 ms, after a second of rest
    held      median of the second half of ``--seconds``, with clock and power of that time
    TFLOP/s   of the tiles that a symmetric product computes

nvidia-smi tells clock and power, every 30 ms.
"""

import argparse
import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

import normuon_fn as nm
from normuon_fn import ops

REST, FIRST = 1.0, 40.0  # seconds, milliseconds
QUERY = "clocks.sm,power.draw"


class Sample(NamedTuple):
    at: float  # of time.perf_counter()
    clock: float  # MHz
    power: float  # W


def watch(found: list[Sample]) -> subprocess.Popen[str]:
    """Appends samples until the process that it returns is terminated."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            clock, power = line.split(",")
            found.append(Sample(time.perf_counter(), float(clock), float(power)))

    threading.Thread(target=read, daemon=True).start()
    return process


def times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call, one after another for so long."""
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    marks, began = [mark], time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if len(marks) > 8:  # the host is not far ahead
            marks[-8].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cases() -> dict[str, tuple[Callable[[], Any], float]]:
    """By name: what is called, and its FLOP. 96 matrices of 2048 rows, as of a 1.3B model."""
    make = torch.compile(nm.orthogonalize, fullgraph=True, dynamic=False)
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    zeros, x = torch.zeros_like(big), torch.randn(96, 2048, 2048, device="cuda").bfloat16() / 45
    wide, r = torch.randn(48, 2048, 8192, device="cuda").bfloat16(), torch.bmm(x, x.mT)
    r = (r.tril() + r.tril(-1).mT).contiguous()
    one, full, own = 2.0 * 8192**3, 96 * 2.0 * 2048**3, ops.SYMMETRIC
    return {
        "cuBLAS 8192^3": (lambda: big @ big, one),
        "the same, of zeros": (lambda: zeros @ zeros, one),
        "cuBLAS, 96x2048x2048": (lambda: torch.bmm(x, r), full),
        "x x^T": (lambda: own.symmetric_matmul(x, 1.0), full * 9 / 16),
        "symmetric addmm": (lambda: own.symmetric_addmm(r, r, r, -4.0, 2.0), full * 17 / 32),
        "addmm": (lambda: own.addmm(x, r, x, 3.0), full),
        "cuBLAS, baddbmm": (lambda: torch.baddbmm(x, r, x, beta=3.0), full),
        "orthogonalize 96x2048x2048": (captured(lambda: make(x)), 10 * full),
        "orthogonalize 48x2048x8192": (captured(lambda: make(wide)), 19 * full / 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="for each")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    found: list[Sample] = []
    process = watch(found)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, sep=", ")
    print("| | first ms | TFLOP/s | held ms | TFLOP/s | clock MHz | W |\n|" + " --- |" * 7)
    try:
        for name, (call, flop) in cases().items():
            times(call, 0.01)
            time.sleep(REST)
            began = time.perf_counter()
            each = times(call, args.seconds)
            middle = (began + time.perf_counter()) / 2
            ends = itertools.accumulate(each)
            early = [t for t, end in zip(each, ends, strict=True) if end < FIRST] or each[:1]
            first, held = statistics.median(early), statistics.median(each[len(each) // 2 :])
            then = [sample for sample in found if sample.at > middle]
            clock, power = (
                statistics.median(values) if values else float("nan")
                for values in ([s.clock for s in then], [s.power for s in then])
            )
            rates = [flop / ms * 1e-9 for ms in (first, held)]
            print(
                f"| {name} | {first:.3f} | {rates[0]:.0f} | {held:.3f} | {rates[1]:.0f} "
                f"| {clock:.0f} | {power:.0f} |",
                flush=True,
            )
    finally:
        process.terminate()


if __name__ == "__main__":
    main()
