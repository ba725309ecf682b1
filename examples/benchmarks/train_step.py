"""What a whole training step of a GPT costs with NorMuon, and with fused AdamW.

    python examples/benchmarks/train_step.py                     # 1.3B parameters, one GPU
    python examples/benchmarks/train_step.py --tokens 524288,65536 --plot train_step.png
    torchrun --nproc-per-node 4 examples/benchmarks/train_step.py --tokens 524288    # FSDP2
    python examples/benchmarks/train_step.py --tiny --json       # seconds on a CPU

One model is trained by both optimizers in turn, on random tokens: forward, backward and optimizer
are timed by CUDA events (on a CPU by the clock), and drift of clocks and temperature meets both
alike. Parameters are float32, the arithmetic of the model is bfloat16, every block is compiled. A
step of ``--tokens`` is as many micro-batches as it takes, on all ranks together.

    forward, backward, optimizer, whole    ms a step, medians; on several ranks those of rank 0
    TFLOP/s                                6 x parameters x tokens a GPU and second
    over AdamW                             the whole step against that of AdamW: the median over
                                           pairs of steps, and half the distance of its quartiles
    optimizers' difference                 the same from the time of the two optimizers alone,
                                           which the noise of forward and backward does not touch
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import normuon_fn as nm

sys.path.append(str(Path(__file__).parents[1]))
from train_gpt import GPT

ADAMW, OURS = "torch AdamW fused", "normuon_fn"
PHASES = ("forward", "backward", "optimizer")


class Size(NamedTuple):
    """Of the model, and of one micro-batch of one rank."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    sequences: int


SIZES = {
    "1.3b": Size(50304, 2048, 24, 16, 2048, 8),
    "gpt2": Size(50304, 768, 12, 12, 1024, 32),
    "tiny": Size(64, 32, 2, 2, 16, 2),
}


class Times(NamedTuple):
    """ms of one training step; ``whole`` is more than its phases by what lies between them."""

    forward: float
    backward: float
    optimizer: float
    whole: float


class Clock:
    """Marks on the device's own time line."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Training:
    """A model, both optimizers, and the tokens of a micro-batch."""

    def __init__(self, size: Size, device: torch.device, *, compiled: bool, guard: str) -> None:
        self.size, self.device, self.clock = size, device, Clock(device)
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(
                size.vocabulary, tie=False, width=size.width, layers=size.layers,
                heads=size.heads, context=size.context,
            )  # fmt: skip
        self.parameters = sum(p.numel() for p in model.parameters())
        self.loss: Callable[[Tensor, Tensor], Tensor] = loss_of
        if compiled:
            for block in model.blocks:
                block.compile()
            self.loss = torch.compile(loss_of)
        if self.ranks > 1:
            mesh = init_device_mesh(device.type, (self.ranks,))
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for block in model.blocks:
                fully_shard(block, mesh=mesh, mp_policy=precision)
            fully_shard(model, mesh=mesh, mp_policy=precision)
        self.model: nn.Module = model
        rates = {"lr": 1e-5, "weight_decay": 0.0}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            ADAMW: torch.optim.AdamW(model.parameters(), fused=True, **rates),
            OURS: nm.NorMuon(model, guard=guard, **rates),  # type: ignore[arg-type]
        }

    def micro_batches(self, tokens: int) -> int:
        """How many micro-batches of every rank make a step of so many tokens."""
        each = self.size.sequences * self.size.context * self.ranks
        if tokens % each:
            raise ValueError(
                f"--tokens: expected a multiple of {each} (sequences x context x ranks), got "
                f"{tokens}; see --sequences"
            )
        return tokens // each

    def batch(self) -> tuple[Tensor, Tensor]:
        size = (self.size.sequences, self.size.context + 1)
        tokens = torch.randint(self.size.vocabulary, size, device=self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def step(self, name: str, micro_batches: int) -> Times:
        """One training step with the optimizer of this name."""
        clock, marks = self.clock, []
        batches = [self.batch() for _ in range(micro_batches)]
        clock.wait()
        start = clock.mark()
        for k, (inputs, targets) in enumerate(batches):
            if isinstance(self.model, FSDPModule):  # gradients are reduced once a step
                self.model.set_requires_gradient_sync(k + 1 == micro_batches)
            before = clock.mark()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.ranks == 1):
                loss = self.loss(self.model(inputs), targets)
            between = clock.mark()
            (loss / micro_batches).backward()
            marks.append((before, between, clock.mark()))
        before = clock.mark()
        self.optimizers[name].step()
        after = clock.mark()
        self.model.zero_grad()
        end = clock.mark()
        clock.wait()
        return Times(
            sum(clock.ms(a, b) for a, b, _ in marks), sum(clock.ms(b, c) for _, b, c in marks),
            clock.ms(before, after), clock.ms(start, end),
        )  # fmt: skip


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Row(NamedTuple):
    """One optimizer at one number of tokens."""

    tokens: int
    name: str
    steps: list[Times]
    teraflops: float

    def median(self, phase: str) -> float:
        return statistics.median(getattr(times, phase) for times in self.steps)

    def as_json(self) -> dict[str, Any]:
        phases = {f"{phase}_ms": self.median(phase) for phase in Times._fields}
        return {"tokens": self.tokens, "name": self.name, "teraflops": self.teraflops, **phases}


class Overhead(NamedTuple):
    """Of NorMuon over AdamW, in percent of AdamW's whole step."""

    tokens: int
    percent: float
    spread: float  # half the distance of the quartiles
    by_optimizers: float  # from the time of the optimizers alone


def measure(training: Training, tokens: int, steps: int) -> list[Row]:
    """Both optimizers, in turn, forwards and backwards."""
    micro_batches = training.micro_batches(tokens)
    names = list(training.optimizers)
    times: dict[str, list[Times]] = {name: [] for name in names}
    for name in names:  # compiles what is not compiled yet
        training.step(name, 1)
    for k in tqdm(range(steps), desc=f"{tokens} tokens", disable=None):
        for name in names[:: 1 if k % 2 == 0 else -1]:
            times[name].append(training.step(name, micro_batches))
    rows = []
    for name in names:
        seconds = statistics.median(each.whole for each in times[name]) / 1e3
        rate = 6 * training.parameters * tokens / training.ranks / seconds * 1e-12
        rows.append(Row(tokens, name, times[name], rate))
    return rows


def overhead(rows: list[Row]) -> Overhead:
    """From the rows of one number of tokens."""
    adamw, ours = (next(row for row in rows if row.name == name) for name in (ADAMW, OURS))
    each = sorted(
        100 * (b.whole / a.whole - 1) for a, b in zip(adamw.steps, ours.steps, strict=True)
    )
    spread = (each[(3 * len(each)) // 4] - each[len(each) // 4]) / 2
    alone = ours.median("optimizer") - adamw.median("optimizer")
    return Overhead(
        adamw.tokens, statistics.median(each), spread, 100 * alone / adamw.median("whole")
    )


# --- what is printed


def table(rows: list[Row]) -> str:
    lines = [
        f"{'tokens':>8}  {'optimizer':18} {'forward':>9} {'backward':>9} {'optimizer':>9} "
        f"{'whole ms':>10} {'TFLOP/s':>8}"
    ]
    for row in rows:
        phases = " ".join(f"{row.median(phase):9.2f}" for phase in PHASES)
        lines.append(
            f"{row.tokens:8}  {row.name:18} {phases} {row.median('whole'):10.2f} "
            f"{row.teraflops:8.1f}"
        )
    return "\n".join(lines)


def sentence(found: Overhead) -> str:
    return (
        f"{found.tokens} tokens a step: NorMuon takes {found.percent:+.2f} % (± {found.spread:.2f})"
        f" of AdamW's whole step; optimizers' difference {found.by_optimizers:+.2f} %"
    )


def environment(training: Training, model: str) -> dict[str, Any]:
    cuda = training.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        "device": name,
        "ranks": training.ranks,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "normuon_fn": nm.__version__,
        "torch": torch.__version__,
        "model": f"{model}, {training.parameters / 1e6:.1f} M parameters",
        "micro-batch": f"{training.size.sequences} x {training.size.context}",
    }


def plot(rows: list[Row], header: dict[str, Any], file: str) -> None:
    """A stacked bar a row: forward, backward, optimizer; as shares of AdamW's whole step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row.tokens} tokens\n{row.name}" for row in rows]
    whole = {row.tokens: row.median("whole") for row in rows if row.name == ADAMW}
    left = [0.0] * len(rows)
    for phase, color in zip(PHASES, ("tab:gray", "silver", "tab:blue"), strict=True):
        widths = [100 * row.median(phase) / whole[row.tokens] for row in rows]
        axes.barh(names, widths, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for k, row in enumerate(rows):
        axes.text(left[k], k, f"  {row.median('whole'):.4g} ms", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="% of a whole step with AdamW", title=header["model"])
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(
        f"{header['ranks']} x {header['device']}, torch {header['torch']}, {header['date']}"
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


# --- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", choices=list(SIZES), default="1.3b")
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest model, 64 tokens a step, as a test"
    )
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        help="a step, of all ranks together; several numbers with commas (default: 524288,65536)",
    )
    parser.add_argument("--sequences", type=int, help="of a micro-batch of one rank")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each optimizer")
    parser.add_argument("--guard", choices=["off", "output", "full"], default="off")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="stacked bars")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps: expected at least 1")
    if args.tiny:
        args.model = "tiny"
    return args


def default_tokens(args: argparse.Namespace, ranks: int) -> list[int]:
    if args.tokens:
        return args.tokens
    return [64 * ranks] if args.model == "tiny" else [524288, 65536]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    size = SIZES[args.model]
    if args.sequences:
        size = size._replace(sequences=args.sequences)
    training = Training(size, device, compiled=args.compile, guard=args.guard)
    rows: list[Row] = []
    found: list[Overhead] = []
    for tokens in default_tokens(args, training.ranks):
        rows += measure(training, tokens, args.steps)
        found.append(overhead(rows[-2:]))
        if not rank and not args.json:
            print(sentence(found[-1]), flush=True)
    header = environment(training, args.model)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    if args.json:
        listed = {
            "environment": header,
            "rows": [row.as_json() for row in rows],
            "overhead": [each._asdict() for each in found],
        }
        print(json.dumps(listed, indent=2))
    else:
        print(", ".join(f"{name} {text}" for name, text in header.items()))
        print(table(rows))
    if args.plot:
        plot(rows, header, args.plot)


if __name__ == "__main__":
    main()
