"""Whether Newton-Schulz keeps its bits when several processes share one GPU.

    python examples/benchmarks/shared_device.py                    # about 40 s on a GPU
    python examples/benchmarks/shared_device.py --processes 1,8 --rows 320 --matrices 28

Each process multiplies the same stack by itself again and again: the five steps of Newton-Schulz in
bfloat16, in a CUDA graph, on four streams. Every result is compared with the first, which was made
while the stream was idle. The products are those of cuBLAS (`torch.baddbmm`) or the kernels of
this package. It exits with 0 whatever it finds: it measures the device and its libraries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, multiprocessing

from normuon_fn import ops
from normuon_fn.algorithm.coefficients import resolve
from normuon_fn.algorithm.orthogonalize import Form, iterate, to_unit_norm

STREAMS, AT_ONCE = 4, 4  # evaluations in one graph
SET = resolve("polar_express", 5, None)
PRODUCTS = {"library": "cuBLAS", "symmetric": "ours"}


class Lane:
    """A stack, its result when nothing else ran on the stream, and a graph that compares."""

    def __init__(self, x: Tensor, form: Form) -> None:
        self.x, self.form = x, form
        self.stream = torch.cuda.Stream() if x.is_cuda else None
        self.wrong = torch.zeros((), dtype=torch.int64, device=x.device)
        self.graph: Any = None
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self.expected = iterate(x, SET, form)
            synchronize(x.device)
            if self.stream is not None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.compare()

    def compare(self) -> None:
        for _ in range(AT_ONCE):
            self.wrong.add_((iterate(self.x, SET, self.form) != self.expected).any())

    def run(self) -> None:
        with torch.cuda.stream(self.stream):
            self.compare() if self.graph is None else self.graph.replay()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def work(args: argparse.Namespace, products: Any, seed: int, ready: Any, queue: Any) -> None:
    """Puts how often it compared, and how often the bits differed."""
    device = torch.device(args.device)
    torch.manual_seed(seed)
    lanes = []
    for _ in range(STREAMS):
        x = torch.randn(args.matrices, args.rows, args.rows, device=device)
        form = Form("standard", torch.bfloat16, (), products)
        lanes.append(Lane(to_unit_norm(x, SET, torch.bfloat16, ops.orientation(x)), form))
    ready.wait()
    end, rounds = time.monotonic() + args.seconds, 0
    while time.monotonic() < end:
        for _ in range(10):
            for lane in lanes:
                lane.run()
        synchronize(device)
        rounds += 10
    queue.put((rounds * STREAMS * AT_ONCE, sum(int(lane.wrong) for lane in lanes)))


def together(
    args: argparse.Namespace, count: int, target: Callable[..., None], products: str
) -> tuple[int, int]:
    """The sums over ``count`` processes that began at the same time."""
    spawn = multiprocessing.get_context("spawn")
    ready, queue = spawn.Barrier(count), spawn.Queue()
    some = [
        spawn.Process(target=target, args=(args, products, k, ready, queue)) for k in range(count)
    ]
    for each in some:
        each.start()
    found = [queue.get(timeout=120) for _ in some]
    for each in some:
        each.join()
    return sum(n for n, _ in found), sum(wrong for _, wrong in found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--processes", default="1,8", help="how many at once, N,...")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--matrices", type=int, default=28)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {args.matrices} matrices {args.rows}x{args.rows}")
    print("| processes | products | evaluations | with other bits |\n| --- | --- | --- | --- |")
    for count in map(int, args.processes.split(",")):
        for products, label in PRODUCTS.items():
            made, wrong = together(args, count, work, products)
            print(f"| {count} | {label} | {made} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
