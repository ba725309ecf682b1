"""What a step costs as the number of matrices grows: the first, a warm one, a replayed one.

    python examples/benchmarks/scale.py                       # about 8 minutes on 2 CPU cores
    python examples/benchmarks/scale.py --matrices 72,288,1000,4000 --plot scale_matrices.png
    python examples/benchmarks/scale.py --only optimizer,groups
    python examples/benchmarks/scale.py --json

Every number comes from a process of its own, and a function `x * 2 + 1` is compiled first, so that
what is paid once by whatever is compiled first is not counted. Matrices of 64 x 64; guard "full".

    first       the first `step_`, with an empty compile cache and with the one that this left
    host        a warm `step_`: on CUDA until it returns, 64 x 64; on the CPU, matrices of 2 x 2
    replay      a `GraphedStep` that was captured, until it returns (CUDA)
    groups      the first step of `NorMuon` with one group, and with 24 that have rates of their own
    optimizer   `NorMuon(model)` of so many parameters: routes, plan and state
    small       48 matrices of 256 x 256, `step_` against captured, until the device is done (CUDA)

Seconds are those of a clock; "CPU s" are those of the processors, compilers that were started
included, which other work on the machine disturbs less. On a CPU compare the ratios of one run.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import normuon_fn as nm

GUARD = "full"
GROUPS = 24
PARTS = ("first", "host", "replay", "groups", "optimizer", "small")
ON_CUDA = ("replay", "small")
Found = dict[str, float]


class Problem:
    """So many square matrices with gradients, a plan and its state."""

    def __init__(self, device: torch.device, matrices: int, size: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.params = {
            f"layers.{k}": torch.randn(size, size, device=device) for k in range(matrices)
        }
        self.grads = {name: torch.randn_like(p) for name, p in self.params.items()}
        config, routes = nm.Config(guard=GUARD), {"*": nm.Route("normuon")}
        self.plan = nm.make_plan(self.params, config, routes=routes)
        self.state = nm.init(self.params, self.plan)
        self.hyper = nm.Hyper.of(self.params, lr=0.01)

    def step(self) -> nm.StepResult:
        return nm.step_(self.params, self.grads, self.state, self.hyper, self.plan)

    def graphed(self) -> Callable[[], nm.StepResult]:
        """A captured step."""
        graphed = nm.GraphedStep(self.plan)

        def replay() -> nm.StepResult:
            return graphed(self.params, self.grads, self.state, self.hyper)

        for _ in range(3):
            replay()
        assert graphed.captured
        return replay


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Of this process, its threads, and its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(call: Callable[[], Any], device: torch.device) -> Found:
    wait(device)
    clock, cpu = time.perf_counter(), cpu_seconds()
    call()
    wait(device)
    return {"s": time.perf_counter() - clock, "cpu_s": cpu_seconds() - cpu}


def compile_something(device: torch.device) -> None:
    torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))


def median_ms(call: Callable[[], Any], device: torch.device, calls: int, *, whole: bool) -> float:
    """Of many calls, until the call returns, or until the device is done (``whole``)."""
    times = []
    for k in range(calls + 10):
        start = time.perf_counter()
        call()
        if whole:
            wait(device)
        if k >= 10:
            times.append(time.perf_counter() - start)
        wait(device)  # the host never waits for a full queue
    return 1e3 * statistics.median(times)


# ----------------------------------------------- what a process of its own measures, one by one


def first(device: torch.device, matrices: int, calls: int) -> Found:
    compile_something(device)
    return timed(Problem(device, matrices, 64).step, device)


def host(device: torch.device, matrices: int, calls: int) -> Found:
    problem = Problem(device, matrices, 64 if device.type == "cuda" else 2)
    return {"ms": median_ms(problem.step, device, calls, whole=False)}


def replay(device: torch.device, matrices: int, calls: int) -> Found:
    problem = Problem(device, matrices, 64)
    return {"ms": median_ms(problem.graphed(), device, calls, whole=False)}


def groups(device: torch.device, matrices: int, calls: int, count: int = 1) -> Found:
    """``matrices`` in ``count`` groups, each with a rate of its own."""
    compile_something(device)
    params = list(Problem(device, matrices, 64).params.items())
    parts = [params[k::count] for k in range(count)]
    optimizer = nm.NorMuon(
        [
            {"params": part, "lr": 0.01 * (k + 1), "routes": {"*": nm.Route("normuon")}}
            for k, part in enumerate(parts)
        ],
        config=nm.Config(guard=GUARD),
    )
    for _, p in params:
        p.requires_grad_(True)
        p.grad = torch.randn_like(p)
    return timed(optimizer.step, device)


def optimizer(device: torch.device, matrices: int, calls: int) -> Found:
    """The model is a mixture of experts that are modules. Imports of a first call are not in it."""
    names = ("gate_proj", "up_proj", "down_proj", "o_proj")

    def model(count: int) -> torch.nn.Module:
        experts = [
            torch.nn.ModuleDict({n: torch.nn.Linear(64, 64, bias=False) for n in names})
            for _ in range(max(1, count // len(names)))
        ]
        return torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)}).to(device)

    nm.NorMuon(model(4))
    large = model(matrices)
    return timed(lambda: nm.NorMuon(large), device)


def small(device: torch.device, matrices: int, calls: int) -> Found:
    problem = Problem(device, matrices, 256)
    plain = median_ms(problem.step, device, calls, whole=True)
    return {"ms": plain, "captured_ms": median_ms(problem.graphed(), device, calls, whole=True)}


# ----------------------------------------------------------------------------- the whole benchmark


def in_process(device: str, part: str, matrices: int, calls: int, count: int, cache: str) -> Found:
    command = [sys.executable, __file__, "--part", part, "--device", device]
    command += ["--matrices", str(matrices), "--calls", str(calls), "--groups", str(count)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_of_runs(args: argparse.Namespace) -> list[tuple[str, str, int, int, str]]:
    """Name of the row, part, matrices, groups, and which cache it shares."""
    runs: list[tuple[str, str, int, int, str]] = []
    for part in args.only:
        if part == "first":
            for n, how in itertools.product(args.matrices, ("empty", "warm")):
                runs.append((f"first step, {how} cache", part, n, 1, f"first {n}"))
        elif part == "groups":
            for count in (1, args.groups):
                name = f"first step of NorMuon, groups: {count}"
                runs.append((name, part, args.grouped, count, f"groups {count}"))
        elif part == "optimizer":
            runs.append(("NorMuon(model)", part, args.parameters, 1, ""))
        elif part == "small":
            runs.append(("small model, step_", part, 48, 1, "host"))
        else:
            name = {"host": "host time of a warm step_", "replay": "host time of a replay"}[part]
            runs += [(name, part, n, 1, "host") for n in args.warm]
    return runs


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs = plan_of_runs(args)
    with (
        tempfile.TemporaryDirectory() as caches,
        tqdm(runs, desc="processes", disable=None) as bar,
    ):
        for name, part, matrices, count, cache in bar:
            place = os.path.join(caches, cache.replace(" ", "_") or "none")
            found = in_process(args.device, part, matrices, args.calls, count, place)
            rows.append({"name": name, "part": part, "matrices": matrices, **found})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # kept if this is cut off
    for row in rows:
        kind = "part" if row["part"] == "groups" else "name"  # whose first row is the baseline
        base = next(other for other in rows if other[kind] == row[kind])
        key = "cpu_s" if "cpu_s" in row else "ms"
        row["ratio"] = row[key] / base[key]
        if "captured_ms" in row:
            row["ratio"] = row["ms"] / row["captured_ms"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. The ratio is to the first row of its kind, of CPU seconds; or to captured."""
    lines = ["| | matrices | s | CPU s | ms | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [f"{row[key]:.3g}" if key in row else "" for key in ("s", "cpu_s", "ms", "ratio")]
        lines.append(f"| {row['name']} | {row['matrices']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], header: dict[str, Any], file: str) -> None:
    """First steps and host times over the number of matrices, beside a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [(("first",), "cpu_s", "CPU seconds"), (("host", "replay"), "ms", "ms of host")]
    if header["device"] != "cpu":
        kinds[0] = (("first",), "s", "seconds")
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (parts, key, label) in zip(both, kinds, strict=True):
        shown = [row for row in rows if row["part"] in parts]
        for name in dict.fromkeys(row["name"] for row in shown):
            line = [(row["matrices"], row[key]) for row in shown if row["name"] == name]
            axes.loglog(*zip(*line, strict=True), marker="o", label=name)
        if shown:
            n, y = shown[0]["matrices"], shown[0][key]
            last = max(row["matrices"] for row in shown)
            axes.loglog([n, last], [y, y * last / n], "k:", linewidth=1, label="linear")
            axes.legend(fontsize=8)
        axes.set(xlabel="matrices of 64 x 64", ylabel=label)
    figure.suptitle(f"{header['device']}, torch {header['torch']}")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def names(text: str) -> list[str]:
    found = text.split(",")
    if not set(found) <= {*PARTS}:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--matrices", type=numbers, help="of first steps; default 72,288,1000")
    parser.add_argument("--warm", type=numbers, default=[144, 1000], help="of warm steps")
    parser.add_argument("--grouped", type=int, default=96, help="matrices in groups")
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--parameters", type=int, default=4000, help="of NorMuon(model)")
    parser.add_argument("--calls", type=int, default=100, help="of which the median is taken")
    parser.add_argument("--only", type=names, help=f"default all of {','.join(PARTS)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw a chart")
    parser.add_argument("--tiny", action="store_true", help="a few matrices: does it run at all?")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # one, in this process
    args = parser.parse_args()
    args.matrices = args.matrices or [72, 288, 1000]
    if args.part:
        more = {"count": args.groups} if args.part == "groups" else {}
        found = globals()[args.part](
            torch.device(args.device), args.matrices[0], args.calls, **more
        )
        print(json.dumps(found))
        return
    if args.tiny:
        args.matrices, args.warm, args.grouped, args.groups = [2, 4], [2, 4], 4, 2
        args.parameters, args.calls = 8, 3
    args.only = args.only or [p for p in PARTS if args.device == "cuda" or p not in ON_CUDA]
    header = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "guard": GUARD,
    }
    rows = measure(args)
    if args.plot:
        plot(rows, header, args.plot)
    if args.json:
        print(json.dumps({"machine": header, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print(table(rows))


if __name__ == "__main__":
    main()
