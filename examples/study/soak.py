"""The soak study: a long run keeps its memory, its time and its bits.

Its gradients have faults, and it is restarted on the way.

    # 2000 steps on CUDA or 500 on a CPU, twice; exit code 1 if a claim does not hold
    python -m examples.study.soak
    # the table and the figure again, from soak-<device>.csv and .json
    python -m examples.study.soak --from-csv

The small GPT of train_gpt.py, guard="full". With probability --fault-rate a step finds one entry of
one gradient NaN or inf. The run "resumed" saves itself every quarter, drops everything and goes on
from the file with a new model, plan, compiled step and captured graph; "uninterrupted" does not.
Both must end with the same bits. On CUDA the step is a GraphedStep.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import resource
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read when cuBLAS loads: without it products may differ

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import trange

import normuon_fn as nm
from examples.study.common import (
    FOLDER,
    Row,
    markdown,
    measured_on,
    read_csv,
    write_csv,
    write_section,
)
from examples.train_gpt import CONTEXT, GPT, LR, WIDTH, Text

Tensors = dict[str, Tensor]
STEPS = {"cuda": 2000, "cpu": 500}
BATCHES = {
    "cuda": 256,
    "cpu": 16,
}  # so large that a GPU is never done before the host: its clock is what is read
ROUTES = {
    "*norm*": nm.Route("adamw", wd_mul=0.0),
    "*.qkv.weight": nm.Route(splits=(WIDTH, WIDTH, WIDTH)),
}
SETTLED = 0.1  # of every piece is warm-up: compilation, capture, the allocators' first blocks
MEMORY_BAR, TIME_BAR = (
    1.0,
    5.0,
)  # MB between the least and the most; % of the mean over the whole run
MEMORY = {"cuda": "allocated", "cpu": "rss"}  # what the bar is for
ABOUT = """Does a long run keep its memory and its speed, and is a resumed run the same run? A small
GPT on Shakespeare with `guard="full"` is trained twice, with one seed and the same faults: one
entry of a gradient is NaN or inf. "resumed" is saved, dropped and loaded three times,
"uninterrupted" is not. The first tenth of every piece between two restarts counts as warm-up. RSS
is read after `gc.collect()` and glibc's `malloc_trim(0)`."""
ABOUT_TIME = {
    "cpu": "",
    "cuda": """ The batch is large enough that the GPU, not the host, limits the speed, so
the time of a step is the GPU's. With a batch of 16 it was the host's, which varied by 20 % over a
run.""",
}


def draw_faults(args: argparse.Namespace) -> dict[int, list[float]]:
    """By step: which gradient, which entry of it, NaN or inf; each a number in [0, 1).

    They depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(args.seed + 1)
    steps = (
        (torch.rand(args.steps, generator=generator) < args.fault_rate).nonzero().flatten().tolist()
    )
    return {
        step: torch.rand(3, generator=generator, dtype=torch.float64).tolist() for step in steps
    }


class Clock:
    """The time between marks. On CUDA marks are events, read once per window: no step waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def median_ms_sync(self) -> float:
        marks, self.marks = self.marks, []
        if self.cuda:
            marks[-1].synchronize()
        return statistics.median(
            a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairwise(marks)
        )


def memory_mb(device: torch.device) -> Row:
    """Of the process, and of PyTorch on the device.

    What Python has not collected and what glibc keeps for later is given back first: RSS then holds
    what is in use.
    """
    gc.collect()
    libc, statm = ctypes.CDLL(None), Path("/proc/self/statm")
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if statm.exists():
        rss = int(statm.read_text().split()[1]) * resource.getpagesize()
    else:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and of the peak
    sizes = {"rss": round(rss / 1e6, 3), "allocated": "", "reserved": ""}
    if device.type == "cuda":
        sizes["allocated"] = round(torch.cuda.memory_allocated(device) / 1e6, 3)
        sizes["reserved"] = round(torch.cuda.memory_reserved(device) / 1e6, 3)
    return sizes


class Trainer:
    """What all pieces of all runs share: text, faults, the compiled gradients of the model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        text = Text(args.data)
        self.train, self.characters = text.train.to(self.device), len(text.characters)
        self.faults = draw_faults(args)
        self.template = self.model()
        self.loss_and_grad = torch.compile(
            torch.func.grad_and_value(self.loss), fullgraph=True, dynamic=False
        )

    def model(self) -> GPT:
        torch.manual_seed(self.args.seed)
        return GPT(self.characters, tie=False).to(self.device)

    def loss(self, params: Tensors, tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(self.template, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def tokens(self, generator: torch.Generator) -> Tensor:  # [batch, context + 1] int64
        starts = torch.randint(
            len(self.train) - CONTEXT, (self.args.batch, 1), generator=generator
        ).to(self.device)
        return self.train[starts + torch.arange(CONTEXT + 1, device=self.device)]

    def warm_up(self) -> None:
        params = {name: p.detach() for name, p in self.model().named_parameters()}
        self.loss_and_grad(params, self.tokens(torch.Generator()))

    def piece(self, run: str, first: int, last: int, checkpoint: Path) -> tuple[list[Row], Tensors]:
        """Steps ``first`` to ``last`` of a run, everything made afresh.

        Where the run was is read from the checkpoint.

        Returns a row for every window of steps, and parameters and state at the end, on the CPU.
        """
        args, device = self.args, self.device
        params = {name: p.detach() for name, p in self.model().named_parameters()}
        grads = {
            name: torch.zeros_like(p) for name, p in params.items()
        }  # where a captured step looks for them
        plan = nm.make_plan(params, nm.Config(guard="full"), routes=ROUTES)
        state, peak = (
            nm.init(params, plan),
            nm.Hyper.of(params, lr=LR["normuon"], weight_decay=0.1),
        )
        hyper = peak.scaled(0.0)  # what a captured step reads
        generator = torch.Generator().manual_seed(args.seed)
        if first:
            saved = nm.load(checkpoint, plan, params=params, state=state)
            generator.set_state(saved.extra["generator"])
        graphed = nm.GraphedStep(plan) if device.type == "cuda" and not args.no_compile else None
        step_ = graphed or functools.partial(nm.step_, plan=plan)

        rows, warm_up, clock = [], max(1, args.steps // 10), Clock(device)
        losses, seen = torch.zeros(args.log_every, device=device), 0  # of this window
        clock.mark()
        for step in trange(first, last, desc=run, unit="step"):
            found, loss = self.loss_and_grad(params, self.tokens(generator))
            torch._foreach_copy_(list(grads.values()), [found[name] for name in grads])
            if step in self.faults:
                which, entry, kind = self.faults[step]
                grad = list(grads.values())[int(which * len(grads))].view(-1)
                grad[int(entry * len(grad))].fill_(math.nan if kind < 0.5 else math.inf)
            factor = min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1))
            peak.scaled(factor, out=hyper)
            step_(params, grads, state, hyper)
            losses[seen].copy_(loss)
            clock.mark()
            seen += 1
            if seen == args.log_every or step + 1 == last:
                row = {
                    "run": run,
                    "step": step + 1,
                    "ms": round(clock.median_ms_sync(), 4),
                    **memory_mb(device),
                }
                row |= {
                    "graphs": counters["stats"]["unique_graphs"],
                    "skipped": int(state["guard.skipped"]),
                }
                rows.append(row | {"loss": round(float(losses[:seen].mean()), 5)})
                seen = 0
                clock.mark()
        if last < args.steps:
            nm.save(
                checkpoint, params, state, plan=plan, extra={"generator": generator.get_state()}
            )
        if graphed:
            graphed.release()
        tensors = {f"params/{k}": v for k, v in params.items()} | {
            f"state/{k}": v for k, v in state.items()
        }
        return rows, {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def same_bits(a: Tensors, b: Tensors) -> bool:
    x, y = (
        {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
        for tensors in (a, b)
    )
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def soak(args: argparse.Namespace) -> tuple[list[Row], Row]:
    """All rows, and what else the table needs."""
    trainer, rows, ends = Trainer(args), [], {}
    trainer.warm_up()  # compiled once, and not a plan's
    cuts = {"resumed": [args.steps * k // 4 for k in range(5)], "uninterrupted": [0, args.steps]}
    for run in cuts:
        counters.clear()
        with tempfile.TemporaryDirectory() as folder:
            for first, last in pairwise(cuts[run]):
                more, ends[run] = trainer.piece(run, first, last, Path(folder) / "run.safetensors")
                rows += more
    shown = ("device", "steps", "batch", "fault_rate", "seed", "log_every")
    command = [
        "python -m examples.study.soak",
        *(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in shown),
    ]
    facts = {
        "command": " ".join(command + ["--no-compile"] * args.no_compile),
        "measured_on": measured_on(torch.device(args.device)),
        "cuts": cuts,  # where the pieces of a run begin and end
        "faults": len(trainer.faults),
        "compiled": not args.no_compile,
        "bit_exact": same_bits(ends["resumed"], ends["uninterrupted"]),
    }
    return rows, facts


def claims(rows: list[Row], facts: Row, device: str) -> list[Row]:
    """Rows: what was measured, its bar, whether it holds; None where it is only reported."""
    found: list[tuple[str, object, object, bool | None]] = []
    for run, cuts in facts["cuts"].items():
        mine = [row for row in rows if row["run"] == run]
        pieces = [
            [row for row in mine if a + SETTLED * (b - a) < int(row["step"]) <= b]
            for a, b in pairwise(cuts)
        ]
        whole = [row for piece in pieces for row in piece]

        for kind in ("allocated", "rss") if device == "cuda" else ("rss",):
            sizes = [[float(row[kind]) for row in piece] for piece in pieces]
            most = max(max(piece) - min(piece) for piece in sizes)
            holds = most <= MEMORY_BAR if kind == MEMORY[device] else None
            found.append(
                (
                    f"{run}: {kind} memory, most - least in a piece",
                    f"{most:.2f} MB",
                    f"{MEMORY_BAR:g} MB",
                    holds,
                )
            )
            if len(pieces) > 1:
                over_all = max(map(max, sizes)) - min(map(min, sizes))
                holds = (
                    over_all <= MEMORY_BAR if kind == MEMORY["cuda"] else None
                )  # compilers keep some of a process's memory
                bar = f"{MEMORY_BAR:g} MB"
                found.append(
                    (
                        f"{run}: {kind} memory, most - least over all pieces",
                        f"{over_all:.2f} MB",
                        bar,
                        holds,
                    )
                )
        steps, times = [int(row["step"]) for row in whole], [float(row["ms"]) for row in whole]
        mean = statistics.mean(times)
        drift = 100 * statistics.linear_regression(steps, times).slope * cuts[-1] / mean
        holds = abs(drift) <= TIME_BAR if device == "cuda" else None  # a CPU is rarely ours alone
        found.append(
            (
                f"{run}: time a step, slope over the run",
                f"{drift:+.1f} % of {mean:.2f} ms",
                f"± {TIME_BAR:g} %",
                holds,
            )
        )
        graphs, plans = int(mine[-1]["graphs"]), len(pieces) * facts["compiled"]
        found.append((f"{run}: one compilation for every plan", graphs, plans, graphs == plans))
        skipped = int(mine[-1]["skipped"])
        found.append(
            (f"{run}: skipped steps, faults", skipped, facts["faults"], skipped == facts["faults"])
        )
        before, after = float(mine[0]["loss"]), float(mine[-1]["loss"])
        found.append(
            (f"{run}: loss went down", f"{before:.3f} to {after:.3f}", "lower", after < before)
        )
    found.append(("resume bit-exact", facts["bit_exact"], True, facts["bit_exact"]))
    verdicts = {None: "reported", True: "yes", False: "no"}
    return [
        {
            "claim": claim,
            "measured": measured,
            "bar": "" if holds is None else bar,
            "holds": verdicts[holds],
        }
        for claim, measured, bar, holds in found
    ]


def plot(rows: list[Row], facts: Row, device: str, file: Path) -> None:
    kinds = {
        MEMORY[device]: f"{MEMORY[device]}, MB",
        "ms": "ms a step",
        "loss": "loss, nats a character",
    }
    figure, axes = plt.subplots(len(kinds), figsize=(8, 8), sharex=True, layout="constrained")
    for axis, (kind, label) in zip(axes, kinds.items(), strict=True):
        for run, style in (("uninterrupted", "o-"), ("resumed", ".--")):
            mine = [row for row in rows if row["run"] == run]
            axis.plot(
                [int(row["step"]) for row in mine],
                [float(row[kind]) for row in mine],
                style,
                label=run,
                markersize=4,
            )
        for step in facts["cuts"]["resumed"][1:-1]:
            axis.axvline(step, color="gray", linestyle=":", linewidth=1)
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_title(f"{facts['faults']} faults; dotted: saved, dropped, loaded")
    axes[0].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(file, dpi=120)


def publish(folder: Path, device: str) -> bool:
    """The table, the figure and the section, from what was written; whether all claims hold."""
    rows, facts = (
        read_csv(folder / f"soak-{device}.csv"),
        json.loads((folder / f"soak-{device}.json").read_text()),
    )
    table = claims(rows, facts, device)
    plot(rows, facts, device, folder / f"soak-{device}.png")
    parts = [
        f"## Soak, {device}",
        f"`{facts['command']}`",
        facts["measured_on"],
        ABOUT + ABOUT_TIME[device],
        markdown(table),
    ]
    parts.append(f"![Memory, ms a step and loss](soak-{device}.png)")
    write_section(folder / "RESULTS.md", f"soak {device}", "\n\n".join(parts))
    print(f"resume bit-exact: {facts['bit_exact']}\n\n{markdown(table)}")
    return not any(row["holds"] == "no" for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help=f"of each of the two runs (default: {STEPS})")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--fault-rate", type=float, default=0.02, help="probability of a fault in a step"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log-every",
        type=int,
        help="steps a row (default: about steps / 20, a divisor of a piece)",
    )
    parser.add_argument("--batch", type=int, help=f"default: {BATCHES}")
    parser.add_argument(
        "--no-compile", action="store_true", help="everything eager, no captured graph"
    )
    parser.add_argument("--data", type=Path, default=FOLDER.parent / "data" / "shakespeare.txt")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--from-csv", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.device]
    args.batch = args.batch or BATCHES[args.device]
    args.log_every = args.log_every or math.gcd(args.steps // 4, max(1, args.steps // 20))
    if args.steps < 8:
        parser.error("--steps must be at least 8: two in every quarter")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.from_csv:
        torch.use_deterministic_algorithms(True)
        if args.no_compile:
            torch.compiler.set_stance("force_eager")
        warnings.filterwarnings(
            "error", message="GraphedStep"
        )  # a tensor moved: the graph would be captured again
        with torch._dynamo.config.patch(error_on_recompile=True):
            rows, facts = soak(args)
        write_csv(args.out / f"soak-{args.device}.csv", rows)
        (args.out / f"soak-{args.device}.json").write_text(json.dumps(facts, indent=1) + "\n")
    raise SystemExit(0 if publish(args.out, args.device) else 1)


if __name__ == "__main__":
    main()
