"""What compiling the step costs, and what a warm call of it costs the host.

72 matrices in 3 buckets, and 144 in 6.

    python examples/benchmarks/compile_time.py                # about 4 minutes on 2 CPU cores
    python examples/benchmarks/compile_time.py --json         # the same as JSON
    python examples/benchmarks/compile_time.py --case 72x3    # one of the two

Compiling: each number comes from a process of its own. "Cold" starts from an empty cache directory,
"warm" from the one that the cold process left. A function `x * 2 + 1` is compiled first and timed
apart: what it costs (probing the CPU, building headers, imports) is paid once by whatever is
compiled first, and is not in the numbers of the step. Matrices of 64 to 384.

The host: matrices of 2 x 2 and a little more, so that there is next to nothing to compute; medians
over many calls of `step_`.

    call        all of it
    operators   the part of it inside the package's operators, which lead from the parameters to
                stacks and back
    dynamo      the in-place step with its graph replaced by a function that keeps its first result:
                guards, arguments, results
    guards      what of that disappears without guards (torch.compiler.skip_all_guards_unsafe)

set_stance(skip_guard_eval_unsafe=True) does not serve to measure the guards: with one compiled
version it still evaluates them, and took longer (144 matrices: 0.98 ms against 0.69; torch 2.13.0,
2026-11-22).
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from tqdm import tqdm

import normuon_fn as nm
from normuon_fn.compat.graphs import not_of_the_plan

SHAPES = [(64, 64), (128, 384), (256, 256), (64, 256), (128, 128), (256, 384)]  # a bucket each
GUARD = "full"

Arguments = tuple[
    dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], nm.Hyper, nm.Plan
]


def problem(shapes: list[tuple[int, int]]) -> Arguments:
    torch.manual_seed(0)
    params = {f"layers.{k}": torch.randn(shape) for k, shape in enumerate(shapes)}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    plan = nm.make_plan(params, nm.Config(guard=GUARD), routes={"*": nm.Route("normuon")})
    return params, grads, nm.init(params, plan), nm.Hyper.of(params, lr=0.01), plan


def seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def compiling(matrices: int, buckets: int) -> dict[str, float]:
    """Seconds of the first compilation of this process, and of the step's after it."""
    shapes = [SHAPES[k % buckets] for k in range(matrices)]
    shapes = [
        shape[::-1] if k // buckets % 2 else shape for k, shape in enumerate(shapes)
    ]  # every other one tall
    fixed = seconds(torch.compile(lambda x: x * 2 + 1), torch.ones(8))
    arguments = problem(shapes)
    assert len(arguments[-1].buckets) == buckets
    first = seconds(nm.step_, *arguments)
    return {"fixed": fixed, "step": first - min(seconds(nm.step_, *arguments) for _ in range(2))}


def host(matrices: int, buckets: int) -> dict[str, float]:
    """Microseconds of a warm call of `step_`, by part, and the graph's nodes."""
    arguments = problem([(2, 2 + k % buckets) for k in range(matrices)])
    found = {"call": median_us(nm.step_, arguments), "operators": operators_us(arguments)}
    nodes = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal nodes
        nodes = sum(node.op == "call_function" for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled(aot_autograd(fw_compiler=count, keep_inference_input_mutations=True))(*arguments)
    found["dynamo"] = median_us(compiled(constant, guard_filter_fn=not_of_the_plan), arguments)
    unguarded = median_us(
        compiled(constant, guard_filter_fn=torch.compiler.skip_all_guards_unsafe), arguments
    )
    return {**found, "guards": found["dynamo"] - unguarded, "nodes": nodes}


def compiled(backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    in_place = importlib.import_module(
        "normuon_fn.step"
    ).local_update_  # the package names the function the same
    return torch.compile(
        in_place, backend=backend, fullgraph=True, dynamic=False, options=options or None
    )


def operators_us(arguments: Arguments, calls: int = 100) -> float:
    """What a call of `step_`, compiled before, spends inside ``torch.ops.normuon_fn``."""
    spent = 0.0

    def timed(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = operator(*args)
            spent += time.perf_counter() - start
            return result

        return run

    packets = [getattr(torch.ops.normuon_fn, name) for name in dir(torch.ops.normuon_fn)]
    kept = {
        packet: packet.default
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
    }
    for packet, operator in kept.items():
        packet.default = timed(operator)  # Inductor's code looks it up at every call
    for _ in range(calls):
        nm.step_(*arguments)
    for packet, operator in kept.items():
        packet.default = operator
    return 1e6 * spent / calls


def constant(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
    """A backend that computes once and returns the same from then on."""
    kept: list[Any] = []

    def call(*inputs: torch.Tensor) -> Any:
        if not kept:
            kept.append(graph(*inputs))
        return kept[0]

    return call


def median_us(function: Callable[..., Any], arguments: Arguments, calls: int = 300) -> float:
    for _ in range(50):
        function(*arguments)
    return 1e6 * statistics.median(seconds(function, *arguments) for _ in range(calls))


def in_process(what: str, case: str, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", what, "--case", case]
    done = subprocess.run(
        command,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, advance: Callable[[], Any]) -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, what in (("cold", "compiling"), ("warm", "compiling"), ("host", "host")):
            found[name] = in_process(what, case, cache)
            advance()
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    parts = ("call", "operators", "dynamo", "guards")
    rows = [
        (
            "matrices",
            "cold s",
            "(fixed)",
            "warm s",
            "(fixed)",
            *(f"{part} us" for part in parts),
            "nodes",
        )
    ]
    for case, r in results.items():
        times = (f"{r[name][key]:.1f}" for name in ("cold", "warm") for key in ("step", "fixed"))
        rows.append((case, *times, *(f"{r['host'][part]:.0f}" for part in (*parts, "nodes"))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case",
        action="append",
        help="MATRICESxBUCKETS, at most 6 buckets; default 72x3 and 144x6",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--part", choices=["compiling", "host"], help=argparse.SUPPRESS
    )  # one measurement, in this process
    args = parser.parse_args()
    cases = args.case or ["72x3", "144x6"]
    if args.part:
        part = {"compiling": compiling, "host": host}[args.part]
        print(json.dumps(part(*map(int, cases[0].split("x")))))
        return

    machine = {
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "guard": GUARD,
    }
    with tqdm(total=3 * len(cases), desc="processes", disable=None) as bar:
        results = {case: measure(case, functools.partial(bar.update, 1)) for case in cases}
    if args.json:
        print(json.dumps({"machine": machine, "results": results}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(table(results))


if __name__ == "__main__":
    main()
