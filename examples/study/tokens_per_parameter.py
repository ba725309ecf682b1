"""AdamW, Muon, NorMuon and variants at 3, 10 and 20 tokens per parameter: what is gained where.

    # 2048 tokens, so that embedding and head are a small part of a small model
    python -m examples.study.corpus --vocabulary 2048 --out runs/corpus2048.npz
    # one GPU; what --runs has is not run again; ends by --seconds with what it has
    python -m examples.study.tokens_per_parameter --seconds 400
    # some of it, for instance on a GPU of its own
    python -m examples.study.tokens_per_parameter --only "NorMuon@3,AdaMuon@20"
    # table and figure once more, without training
    python -m examples.study.tokens_per_parameter --from-csv

Three sizes of one model see about as much of the same text, once. Every optimizer has, at every
size, rates a factor of 2 apart until the best is no end of them, then two a factor of 1.41 beside
it, and then two more seeds. AdamW has rates of its own for embedding and head, tuned one after the
other; the others have not. What the best rate is, one part of the validation text says, and what
the loss is, another.

A process has a size and an optimizer, and what is compiled for them. All compile at the same time;
then one after the other trains, several runs at once, each a CUDA graph on a stream of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tarfile
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # of each process; read by torch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing

import normuon_fn as nm
from examples.study.common import (
    FOLDER,
    markdown,
    measured_on,
    read_csv,
    write_csv,
    write_section,
)
from examples.study.corpus import Corpus
from examples.study.training import step_of
from examples.train_gpt import GPT

OPTIMIZERS = ("AdamW", "Muon", "NorMuon")
CONFIGS = {
    "AdamW": nm.Config(),
    "Muon": nm.Config(normalize=False),
    "NorMuon": nm.Config(),
    "AdaMuon": nm.Config.preset("adamuon"),
    "MuonEq": nm.Config.preset("muoneq"),
    "Hyperball": nm.Config(weight_decay_form="hyperball"),
    "Cautious": nm.Config(cautious_update=True),
    "Int8": nm.Config(momentum_dtype="int8"),
}
VARIANTS = tuple(name for name in CONFIGS if name not in OPTIMIZERS)
STARTS = dict.fromkeys(VARIANTS, (0.004, 0.008, 0.016, 0.032)) | {
    "AdamW": (1e-3, 2e-3, 4e-3, 8e-3),
    "Muon": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "NorMuon": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
SEEDS = (0, 1, 2)
OWN = 3.0  # the factor between two rates of embedding or head
WARMUP = 0.05  # of all steps; from there the learning rate falls linearly to zero
WEIGHT_DECAY = 0.1
RUNS = Path("runs") / "tokens_per_parameter"
REPLAYS = 20  # of a graph, for one time


@dataclass(frozen=True)
class Size:
    ratio: int  # tokens per parameter
    width: int
    layers: int
    heads: int
    context: int = 512
    batch: int = 32
    choose: int = 128  # windows of validation text that tell the best rate
    report: int = 384  # and that tell the loss
    evaluations: int = 20  # over a run


# The smallest model comes first: where time runs out, it is the largest that is missing.
SIZES = (Size(20, 128, 5, 2), Size(10, 192, 5, 3), Size(3, 320, 7, 5))
TINY = tuple(
    Size(ratio, width, 1, 2, 16, 2, choose=4, report=4, evaluations=2)
    for ratio, width in ((20, 16), (10, 24), (3, 32))
)


@dataclass(frozen=True)
class Job:
    ratio: int
    optimizer: str
    lr: float
    embed: float = 1.0  # the embedding's rate, in lr
    head: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        own = f"_embed{self.embed:g}_head{self.head:g}"
        return f"{self.optimizer}_ratio{self.ratio}_lr{self.lr:g}{own}_seed{self.seed}"


@dataclass(frozen=True)
class Result:
    job: Job
    parameters: int
    tokens: int  # a step
    steps: int
    curve: list[tuple[int, float, float]]  # step; nats a token to choose by, and to report
    seconds: float  # of all runs at once
    at_once: int
    captured: bool  # the whole step in a CUDA graph
    on: str

    @property
    def choose(self) -> float:
        return self.curve[-1][1] if math.isfinite(self.curve[-1][1]) else math.inf

    @property
    def loss(self) -> float:
        return self.curve[-1][2]


@dataclass(frozen=True)
class Options:
    corpus: Path
    runs: Path
    sizes: tuple[Size, ...]
    at_once: int
    steps: int | None  # None: as many as the ratio asks for
    compiled: bool
    only: tuple[str, ...] = ()  # OPTIMIZER@RATIO

    def file(self, job: Job) -> Path:
        return self.runs / f"{job.key}.json"

    def load(self, job: Job) -> Result:
        kept = json.loads(self.file(job).read_text())
        return Result(**{**kept, "job": Job(**kept["job"]), "curve": [*map(tuple, kept["curve"])]})

    def save(self, name: str, what: dict[str, Any]) -> None:
        partial = self.runs / f".{name}"
        partial.write_text(json.dumps(what))
        os.replace(partial, self.runs / f"{name}.json")


# --- What to run ----------------------------------------------------------------------------------

Search = Generator[list[Job], dict[Job, Result], None]


def search(ratio: int, optimizer: str) -> Search:
    """The runs of an optimizer at a size: yields jobs, gets all results so far."""

    def best(results: dict[Job, Result], *, seed: int = 0) -> Job:
        return min((j for j in results if j.seed == seed), key=lambda j: results[j].choose)

    results = yield [Job(ratio, optimizer, lr) for lr in STARTS[optimizer]]
    while True:  # until the minimum is inside
        rates, found = sorted({j.lr for j in results}), best(results).lr
        if found == rates[0] and len(rates) < 8:
            results = yield [Job(ratio, optimizer, found / 2)]
        elif found == rates[-1] and len(rates) < 8:
            results = yield [Job(ratio, optimizer, found * 2)]
        else:
            break
    if optimizer == "AdamW":
        at = best(results)
        for which in ("embed", "head"):
            tried = [1 / OWN, OWN]
            results = yield [dataclasses.replace(at, **{which: x}) for x in tried]
            while (now := best(results)) != at and len(tried) < 4:
                beyond = getattr(now, which) * (OWN if getattr(now, which) > 1 else 1 / OWN)
                at = now
                tried.append(beyond)
                results = yield [dataclasses.replace(at, **{which: beyond})]
            at = best(results)
    at = best(results)
    results = yield [dataclasses.replace(at, lr=float(f"{at.lr * x:.3g}")) for x in (0.71, 1.41)]
    while True:  # AdamW's own rates may have moved the minimum
        at = best(results)
        rates = sorted(j.lr for j in results if (j.embed, j.head) == (at.embed, at.head))
        if at.lr not in (rates[0], rates[-1]) or len(rates) > 8:
            break
        beyond = at.lr * (0.71 if at.lr == rates[0] else 1.41)
        results = yield [dataclasses.replace(at, lr=float(f"{beyond:.3g}"))]
    yield [dataclasses.replace(best(results), seed=seed) for seed in SEEDS[1:]]


# --- A run ----------------------------------------------------------------------------------------


class Bench:
    """A size and an optimizer on a device: the text, what is compiled, and the lanes."""

    def __init__(self, size: Size, optimizer: str, options: Options) -> None:
        self.size, self.optimizer, self.options = size, optimizer, options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        corpus = Corpus.load(options.corpus)
        self.vocabulary = corpus.vocabulary
        self.train, self.val = corpus.train.to(self.device), corpus.val.to(self.device)
        self.ticks = torch.arange(size.context + 1, device=self.device)
        self.template = self.model(0)
        self.parameters = sum(p.numel() for p in self.template.parameters())
        windows = (len(self.train) - 1) // size.context
        wanted = round(size.ratio * self.parameters / (size.batch * size.context))
        self.steps = options.steps or wanted
        if self.steps * size.batch > windows:
            raise ValueError(
                f"{size.ratio} tokens per parameter: {self.steps * size.batch} windows are wanted, "
                f"the text has {windows}; make a larger corpus or a smaller model"
            )
        self.windows = windows
        torch.compiler.set_stance("default" if options.compiled else "force_eager")
        compiled = {"fullgraph": True, "dynamic": False}
        self.loss_and_grad = torch.compile(torch.func.grad_and_value(self.loss), **compiled)
        self.loss_only = torch.compile(self.loss, **compiled)
        params = {name: p.detach() for name, p in self.template.named_parameters()}
        self.plan = nm.make_plan(
            params,
            CONFIGS[optimizer],
            routes=self.routes(),
            hyper_of={"wte.weight": 1, "head.weight": 2, "*": 0},
        )
        self.lanes = [Lane(self) for _ in range(options.at_once)]

    def model(self, seed: int) -> GPT:
        size = self.size
        torch.manual_seed(seed)
        shape = {"width": size.width, "layers": size.layers, "heads": size.heads}
        return GPT(self.vocabulary, tie=False, context=size.context, **shape).to(self.device)

    def routes(self) -> dict[str, nm.Route]:
        norms = {"*norm*": nm.Route("adamw", wd_mul=0.0)}
        if self.optimizer == "AdamW":
            return {**norms, "*": nm.Route("adamw")}
        width = self.size.width  # the embedding and the head go to AdamW by default
        return {**norms, "*.qkv.weight": nm.Route(splits=(width, width, width))}

    def loss(
        self,
        params: dict[str, Tensor],
        tokens: Tensor,  # [batch, time + 1] int64
    ) -> Tensor:  # 0-d float32, nats a token
        cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cuda):
            logits = torch.func.functional_call(self.template, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def schedule(self) -> Tensor:
        rise = max(1, round(self.steps * WARMUP))
        shape = [
            min((i + 1) / rise, (self.steps - i) / (self.steps - rise + 1))
            for i in range(self.steps)
        ]
        return torch.tensor(shape, device=self.device)

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """All at once, a lane each."""
        lanes = self.lanes[: len(jobs)]
        for lane, job in zip(lanes, jobs, strict=True):
            lane.load(job)
        started, looks = self.now_sync(), []
        every = max(1, self.steps // self.size.evaluations)
        for i in range(self.steps):
            for lane in lanes:
                lane.step()
            if (i + 1) % every == 0 or i + 1 == self.steps:
                looks.append(i + 1)
                for lane in lanes:
                    lane.look()
        seconds = self.now_sync() - started
        return [
            Result(
                job, self.parameters, self.size.batch * self.size.context, self.steps,
                [(step, *pair) for step, pair in zip(looks, lane.seen(len(looks)), strict=True)],
                seconds, len(jobs), lane.graph is not None, measured_on(self.device),
            )
            for lane, job in zip(lanes, jobs, strict=True)
        ]  # fmt: skip

    def step_ms(self) -> float:
        """Of one run alone: the median time of a step."""
        lane, times = self.lanes[0], []
        lane.load(Job(self.size.ratio, self.optimizer, 1e-4))
        for _ in range(12):
            started = self.now_sync()
            for _ in range(min(REPLAYS, self.steps // 13 or 1)):
                lane.step()
            took = 1e3 * (self.now_sync() - started)
            times.append(took / min(REPLAYS, self.steps // 13 or 1))
        return sorted(times[2:])[5]

    def now_sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Lane:
    """The tensors of a run, which one run after the other is written to, and its graphs."""

    def __init__(self, bench: Bench) -> None:
        self.bench, size, device = bench, bench.size, bench.device
        self.params = {n: p.detach().clone() for n, p in bench.template.named_parameters()}
        self.state = nm.init(self.params, bench.plan)
        one = nm.Hyper.of(self.params, lr=1.0, weight_decay=WEIGHT_DECAY)
        self.peak = nm.Hyper.stack([one, one, one])  # of matrices and norms, embedding, head
        self.hyper = self.peak.scaled(0.0)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.looked = torch.zeros((), dtype=torch.int64, device=device)
        self.order = torch.zeros(bench.steps, size.batch, dtype=torch.int64, device=device)
        self.losses = torch.zeros(size.evaluations * 2 + 2, 2, device=device)
        self.shape = bench.schedule()
        self.graph: Any = None
        self.eval_graph: Any = None
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.load(Job(size.ratio, bench.optimizer, 1e-4))
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # compiles, and takes the stream's workspace
                self._step()
                self._look()
        if self.stream is not None and bench.options.compiled:
            self._capture()

    def load(self, job: Job) -> None:
        """Starts that run anew. The device is idle then."""
        bench, size = self.bench, self.bench.size
        for name, p in bench.model(job.seed).named_parameters():
            self.params[name].copy_(p.detach())
        for name, x in nm.init(self.params, bench.plan).items():
            self.state[name].copy_(x)
        rates = [job.lr * x for x in (1.0, job.embed, job.head)]
        for held in (self.peak.lr, self.peak.adamw_lr):
            held.copy_(torch.tensor(rates))
        order = torch.randperm(bench.windows, generator=torch.Generator().manual_seed(job.seed))
        order = order[: bench.steps * size.batch].view(bench.steps, size.batch) * size.context
        self.order.copy_(order)
        for counter in (self.count, self.looked, self.losses):
            counter.zero_()
        bench.now_sync()

    def _step(self) -> None:
        """One step, whose number is on the device: a graph of it trains when it is replayed."""
        bench, at = self.bench, self.count.clamp(max=self.bench.steps - 1)
        starts = self.order.index_select(0, at.view(1)).view(-1, 1)
        tokens = bench.train[starts + bench.ticks].long()
        grads, _ = bench.loss_and_grad(self.params, tokens)
        self.peak.scaled(self.shape.index_select(0, at.view(1)).view(()), out=self.hyper)
        nm.step_(self.params, grads, self.state, self.hyper, bench.plan)
        self.count.add_(1)

    @torch.no_grad()
    def _look(self) -> None:
        size, means = self.bench.size, []
        first = 0
        for count in (size.choose, size.report):
            starts = torch.arange(first, first + count, device=self.bench.device) * size.context
            losses = [
                self.bench.loss_only(
                    self.params, self.bench.val[s[:, None] + self.bench.ticks].long()
                )
                for s in starts.split(size.batch)
            ]
            means.append(torch.stack(losses).mean())
            first += count
        at = self.looked.clamp(max=len(self.losses) - 1).view(1)
        self.losses.index_copy_(0, at, torch.stack(means).view(1, 2))
        self.looked.add_(1)

    def _capture(self) -> None:
        """Both as CUDA graphs; where that fails, it is said, and kernels are launched singly."""
        torch.cuda.synchronize()
        try:
            graphs, pool = [], torch.cuda.graph_pool_handle()  # one pool: they never run together
            for what in (self._step, self._look):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    what()
                graphs.append(graph)
            self.graph, self.eval_graph = graphs
        except Exception:
            traceback.print_exc()
            print(f"{self.bench.size.ratio} {self.bench.optimizer}: not captured", flush=True)
            torch.cuda.synchronize()

    def step(self) -> None:
        with torch.cuda.stream(self.stream):
            self._step() if self.graph is None else self.graph.replay()

    def look(self) -> None:
        with torch.cuda.stream(self.stream):
            self._look() if self.eval_graph is None else self.eval_graph.replay()

    def seen(self, looks: int) -> list[list[float]]:
        return self.losses[:looks].tolist()


# --- Processes ------------------------------------------------------------------------------------


def work(
    end: Any,  # multiprocessing's Connection
    size: Size,
    optimizer: str,
    options: Options,
) -> None:
    """Compiles, says so, and then does what it is told: jobs, "time", or None, which ends it."""
    try:
        started = time.perf_counter()
        bench = Bench(size, optimizer, options)
        end.send(("ready", time.perf_counter() - started))
        while (told := end.recv()) is not None:
            if told == "time":
                name = f"time_{optimizer}_ratio{size.ratio}"
                about = {
                    "ratio": size.ratio,
                    "optimizer": optimizer,
                    "step_ms": bench.step_ms(),
                    "on": measured_on(bench.device),
                }
                options.save(name, about)
            else:
                for result in bench.run(told):
                    options.save(result.job.key, dataclasses.asdict(result))
            end.send(("done", None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        end.send(("failed", traceback.format_exc()))


class Pair:
    """A size and an optimizer: the search, and the process that runs its jobs."""

    def __init__(self, size: Size, optimizer: str, options: Options) -> None:
        self.size, self.optimizer, self.options = size, optimizer, options
        self.search = search(size.ratio, optimizer)
        self.results: dict[Job, Result] = {}
        self.wanted = next(self.search)
        self.state: Literal["compiling", "idle", "busy", "over"] = "compiling"
        self.timed = (options.runs / f"time_{optimizer}_ratio{size.ratio}.json").exists()
        self.seconds = 0.0  # of the last jobs, and with how many lanes they were
        self.process: Any = None
        self.end: Any = None

    def __str__(self) -> str:
        return f"{self.size.ratio} tokens per parameter, {self.optimizer}"

    def next_jobs(self) -> list[Job]:
        """What is wanted and not there yet; empty: the search is over."""
        while True:
            missing = [job for job in self.wanted if not self.options.file(job).exists()]
            if missing:
                return missing[: self.options.at_once]
            self.results |= {job: self.options.load(job) for job in self.wanted}
            try:
                self.wanted = self.search.send(self.results)
            except StopIteration:
                self.wanted = []
                return []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.end, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, self.size, self.optimizer, self.options), daemon=True
        )
        self.process.start()
        theirs.close()


def run_all(options: Options, seconds: float) -> None:
    """Everything that is missing, until it is there or the time is over."""
    started = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - started

    pairs = [
        Pair(size, optimizer, options)
        for size in options.sizes
        for optimizer in CONFIGS
        if f"{optimizer}@{size.ratio}" in options.only
    ]
    pairs = [pair for pair in pairs if pair.next_jobs() or not pair.timed]
    for pair in pairs:
        pair.start()
    busy: Pair | None = None
    sent = 0.0
    try:
        while any(pair.state != "over" for pair in pairs) and now() < seconds:
            if busy is None:
                idle = [pair for pair in pairs if pair.state == "idle"]
                for pair in idle:
                    jobs: list[Job] | str = pair.next_jobs()
                    if not jobs and pair.timed:
                        pair.end.send(None)
                        pair.state = "over"
                        continue
                    if now() + pair.seconds > seconds:
                        pair.state = "over"  # too late for its like
                        continue
                    if not jobs:
                        jobs, pair.timed = "time", True
                    pair.end.send(jobs)
                    pair.state, busy, sent = "busy", pair, now()
                    break
            waiting = [pair for pair in pairs if pair.state in ("compiling", "busy")]
            if not waiting:
                continue
            left = None if math.isinf(seconds) else max(0.0, seconds - now())
            ready = connection.wait([pair.end for pair in waiting], left)
            for pair in waiting:
                if pair.end not in ready:
                    continue
                what, said = _heard(pair)
                if what == "failed":
                    print(f"{pair}: {said}", flush=True)
                    pair.state = "over"
                elif what == "ready":
                    print(f"{now():6.1f} s  {pair}: compiled in {said:.1f} s", flush=True)
                    pair.state = "idle"
                else:
                    pair.seconds, pair.state = now() - sent, "idle"
                    print(f"{now():6.1f} s  {pair}: {pair.seconds:.2f} s", flush=True)
                if pair is busy:
                    busy = None
    finally:
        for pair in pairs:
            if pair.process is not None and pair.process.is_alive():
                pair.process.terminate()
        for pair in pairs:
            pair.process.join()
    missing = [str(pair) for pair in pairs if pair.next_jobs()]
    print(f"{now():6.1f} s  not finished: {', '.join(missing) or 'none'}", flush=True)


def _heard(pair: Pair) -> tuple[str, Any]:
    try:
        return pair.end.recv()
    except (EOFError, ConnectionResetError):
        return "failed", "its process ended"


# --- What came out --------------------------------------------------------------------------------


def collect(options: Options, corpus: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of all files in ``options.runs``: what is the same for many runs, and the curves."""
    files = sorted(options.runs.glob("*_seed?.json"))
    results = [options.load(Job(**json.loads(file.read_text())["job"])) for file in files]
    about = {
        "corpus": corpus,
        "on": "; ".join(sorted({r.on for r in results})),
        "sizes": {r.job.ratio: {"parameters": r.parameters, "steps": r.steps} for r in results},
        "tokens a step": results[0].tokens,
        "shapes": [*map(dataclasses.asdict, options.sizes)],
        "captured": all(r.captured for r in results),
        "ms": {
            f"{kept['optimizer']}, {kept['ratio']}": round(kept["step_ms"], 3)
            for kept in (json.loads(f.read_text()) for f in sorted(options.runs.glob("time_*")))
        },
    }
    curves = [
        {**dataclasses.asdict(r.job), "step": step, "choose": f"{x:.5f}", "report": f"{y:.5f}"}
        for r in results
        for step, x, y in r.curve
    ]
    return about, curves


Runs = dict[Job, list[tuple[int, float, float]]]  # step; losses to choose by, and to report


def runs_of(curves: Sequence[dict[str, str]]) -> Runs:
    runs: Runs = {}
    for row in curves:
        numbers = (float(row[key]) for key in ("lr", "embed", "head"))
        job = Job(int(row["ratio"]), row["optimizer"], *numbers, int(row["seed"]))
        runs.setdefault(job, []).append(
            (int(row["step"]), float(row["choose"]), float(row["report"]))
        )
    return runs


def by_seed(runs: Runs, ratio: int, optimizer: str) -> list[Job]:
    """The runs that have every seed; empty where the study did not get that far."""
    last = [j for j in runs if (j.ratio, j.optimizer, j.seed) == (ratio, optimizer, SEEDS[-1])]
    found = [dataclasses.replace(last[0], seed=seed) for seed in SEEDS] if last else []
    return found if all(job in runs for job in found) else []


def rows_of(about: dict[str, Any], runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for ratio in sorted({job.ratio for job in runs}, reverse=True):
        base = by_seed(runs, ratio, "AdamW")
        for optimizer in CONFIGS:
            jobs = by_seed(runs, ratio, optimizer)
            if not jobs or not base:
                continue
            losses, theirs = ([runs[j][-1][2] for j in some] for some in (jobs, base))
            goal, mean = statistics.mean(theirs), statistics.mean(losses)
            finite = all(map(math.isfinite, losses))
            is_apart = finite and (max(losses) < min(theirs) or min(losses) > max(theirs))
            steps = runs[jobs[0]][-1][0]
            reached = [step_of(goal, [(s, loss) for s, _, loss in runs[j]]) for j in jobs]
            tokens = [s / steps for s in reached if s is not None]
            all_reach = len(tokens) == len(jobs) and optimizer != "AdamW"
            took, whole = (about["ms"].get(f"{name}, {ratio}") for name in (optimizer, "AdamW"))
            rows.append({
                "tokens per parameter": ratio, "run": optimizer, "lr": f"{jobs[0].lr:g}",
                "embedding": f"{jobs[0].embed:.3g}", "head": f"{jobs[0].head:.3g}",
                "loss": f"{mean:.4f}", "seeds": " ".join(f"{x:.4f}" for x in losses),
                "spread": f"{max(losses) - min(losses):.4f}" if finite else "-",
                "to AdamW": f"{mean - goal:+.4f}" if finite else "-",
                "apart from AdamW": "-" if optimizer == "AdamW" else "yes" if is_apart else "no",
                "tokens to AdamW's loss": f"{statistics.mean(tokens):.1%}" if all_reach else "-",
                "by seed": " ".join(f"{t:.1%}" for t in tokens) if all_reach else "-",
                "time to AdamW's loss":
                    f"{statistics.mean(tokens) * took / whole:.1%}"
                    if all_reach and took and whole else "-",
                "ms a step": f"{took:.2f}" if took else "-",
            })  # fmt: skip
    return rows


def grid_of(runs: Runs, ratio: int) -> list[dict[str, Any]]:
    """Every run with seed 0, by rate: the loss to choose by."""
    own = [j for j in runs if j.ratio == ratio and j.seed == 0]
    columns = sorted({(j.optimizer, j.embed, j.head) for j in own})
    names = {c: c[0] if c[1:] == (1.0, 1.0) else f"{c[0]}, {c[1]:.3g}, {c[2]:.3g}" for c in columns}
    rows = []
    for lr in sorted({j.lr for j in own}):
        found = {(j.optimizer, j.embed, j.head): runs[j][-1][1] for j in own if j.lr == lr}
        rows.append({"lr": f"{lr:g}"} | {
            names[c]: f"{found[c]:.4f}" if c in found else "" for c in columns
        })  # fmt: skip
    return rows


def variants() -> str:
    fields = [f for f in dataclasses.fields(nm.Config) if f.init]
    plain = nm.Config()
    said = []
    for name in VARIANTS:
        own = [(f.name, getattr(CONFIGS[name], f.name)) for f in fields]
        changed = [f"{key}={value!r}" for key, value in own if value != getattr(plain, key)]
        said.append(f"{name} is `Config({', '.join(changed)})`")
    return "; ".join(said)


def section(about: dict[str, Any], runs: Runs) -> str:
    ratios, rows = sorted({job.ratio for job in runs}, reverse=True), rows_of(about, runs)
    whole = [r for r in ratios if all(by_seed(runs, r, name) for name in OPTIMIZERS)]
    missing = [f"{r} (of which {sum(j.ratio == r for j in runs)} runs were made)" for r in ratios]
    missing = [said for said, r in zip(missing, ratios, strict=True) if r not in whole]
    unfinished = ""
    if missing:
        unfinished = f"""- Not finished in the device time that there was, in tokens per parameter:
  {", ".join(missing)}.
"""
    models = [
        {
            "tokens per parameter": shape["ratio"],
            "parameters": f"{about['sizes'][str(shape['ratio'])]['parameters']:,}",
            "width": shape["width"], "blocks": shape["layers"],
            "steps": about["sizes"][str(shape["ratio"])]["steps"],
        }
        for shape in about["shapes"]
        if shape["ratio"] in ratios
    ]  # fmt: skip
    seen = []
    for ratio in whole:
        normuon, muon = (
            [runs[j][-1][2] for j in by_seed(runs, ratio, name)] for name in ("NorMuon", "Muon")
        )
        if not all(map(math.isfinite, (*normuon, *muon))):
            continue
        apart = max(normuon) < min(muon) or min(normuon) > max(muon)
        words = "do not overlap" if apart else "differ by no more than their seeds do"
        mean = statistics.mean(normuon) - statistics.mean(muon)
        seen.append(f"- {ratio} tokens per parameter: NorMuon and Muon {words} ({mean:+.4f}).")
        others = {o: [runs[j][-1][2] for j in by_seed(runs, ratio, o)] for o in VARIANTS}
        means = {o: statistics.mean(found) for o, found in others.items() if found}
        if means:
            best = min(means, key=lambda o: means[o])
            far = max(others[best]) < min(normuon) or min(others[best]) > max(normuon)
            words = "do not overlap" if far else "overlap"
            seen.append(
                f"- {ratio} tokens per parameter: the lowest variant is {best}; its losses and "
                f"NorMuon's {words}\n  ({means[best] - statistics.mean(normuon):+.4f}). One rate "
                "was chosen for each, with one seed."
            )
    lost = [j for j in runs if not math.isfinite(runs[j][-1][2])]
    for ratio in ratios:
        names = sorted(
            f"{j.optimizer} at {j.lr:g}, seed {j.seed}" for j in lost if j.ratio == ratio
        )
        if names:
            total = sum(j.ratio == ratio for j in runs)
            seen.append(
                f"- {ratio} tokens per parameter: {len(names)} of {total} runs were lost to "
                f"NaN, with the guard\n  off: {'; '.join(names)}.\n"
                "  Where several processes share a GPU, cuBLAS's products are wrong at times: see\n"
                "  examples/benchmarks/RESULTS.md, several processes on one GPU."
            )
    for ratio in whole:
        for optimizer in CONFIGS:
            jobs = by_seed(runs, ratio, optimizer)
            if not jobs:
                continue
            at = jobs[0]
            same = [j.lr for j in runs if dataclasses.replace(j, lr=at.lr) == at]
            if at.lr in (min(same), max(same)):
                seen.append(
                    f"- {ratio} tokens per parameter: {optimizer}'s best rate is the lowest or the "
                    "highest of those\n  that were tried with these rates for embedding and head; "
                    "one beyond it may be better."
                )
    grids = "\n\n".join(
        f"{r} tokens per parameter:\n\n{markdown(grid_of(runs, r))}" for r in ratios
    )
    return f"""## Tokens per parameter

`python -m examples.study.tokens_per_parameter --seconds 385`

{about["on"]}.

{about["corpus"]}.

Does the gain change with tokens per parameter? The GPT of the training study in three sizes: each
reads about the same amount of the same text, once, in steps of {about["tokens a step"]:,} tokens
with bfloat16 autocast. Schedule, weight decay and AdamW's betas are those of the training study.
Losses are nats per token. The rates were chosen with seed 0 on one part of the validation text
(65,536 tokens), and the losses in the table are those of another part (196,608).

{markdown(models)}

Each optimizer is at its best rate. AdamW has tuned rates of its own for embedding and head, given
as multiples of `lr`. Muon (`Config(normalize=False)`), NorMuon (`Config()`) and the variants step
these two with AdamW at `lr`, untuned. Variants: {variants()}.

![loss by tokens per parameter, and the grids](tokens_per_parameter.png)

{markdown(rows) if rows else "No size has all seeds of AdamW."}

- The columns are those of the training study. `ms a step` is the time of a run alone, its whole
  step in one CUDA graph.
{chr(10).join(seen)}
- Run nothing else on the GPU: where processes share one, cuBLAS's products are wrong at times (see
  examples/benchmarks/RESULTS.md, several processes on one GPU). 16 earlier runs at 3 tokens per
  parameter shared their GPUs with tests, and 7 of them went to NaN; Muon, NorMuon and the variants
  were then run with a GPU to themselves. AdamW at 3, and the runs at 10 and 20, shared theirs with
  tests at times and were not repeated; none went to NaN. AdamW's time at 3 is left out for that.
- What it does not show: here a model with more tokens per parameter is also a smaller model, so a
  change of the gain may come from either. The models are far smaller than those that people train.
{unfinished}
The losses by which the rates were chosen, with seed 0. The numbers behind AdamW's name are its
rates for embedding and head, as multiples of `lr`:

{grids}
"""


def plot(runs: Runs, file: Path) -> None:
    ratios = [
        r for r in sorted({j.ratio for j in runs}) if all(by_seed(runs, r, o) for o in OPTIMIZERS)
    ]
    figure, axes = plt.subplots(
        1, 1 + len(ratios), figsize=(4.5 + 4 * len(ratios), 4.5), layout="constrained"
    )
    for k, optimizer in enumerate(CONFIGS):
        gains = {}
        for ratio in ratios:
            jobs = by_seed(runs, ratio, optimizer)
            goal = statistics.mean(runs[j][-1][2] for j in by_seed(runs, ratio, "AdamW"))
            if jobs:
                gains[ratio] = [runs[j][-1][2] - goal for j in jobs]
        if not gains:
            continue
        means = [*map(statistics.mean, gains.values())]
        axes[0].plot([*gains], means, "o-", color=f"C{k}", label=optimizer)
        for ratio, some in gains.items():
            axes[0].plot([ratio] * len(some), some, "_", color=f"C{k}", markersize=14)
        for axis, ratio in zip(axes[1:], ratios, strict=True):
            own = [j for j in runs if (j.ratio, j.optimizer, j.seed) == (ratio, optimizer, 0)]
            shared = sorted((j for j in own if (j.embed, j.head) == (1, 1)), key=lambda j: j.lr)
            rates = [j.lr for j in shared], [runs[j][-1][1] for j in shared]
            axis.semilogx(*rates, "o-", color=f"C{k}", label=optimizer)
            tuned = [j for j in own if (j.embed, j.head) != (1, 1)]
            if tuned:
                points = [j.lr for j in tuned], [runs[j][-1][1] for j in tuned]
                axis.semilogx(*points, "x", color=f"C{k}", label=f"{optimizer}, own rates")
    axes[0].set(
        xlabel="tokens per parameter", ylabel="loss, less AdamW's mean", title="Three seeds each"
    )
    for axis, ratio in zip(axes[1:], ratios, strict=True):
        low = min(runs[j][-1][1] for j in runs if j.ratio == ratio)
        axis.set(xlabel="peak learning rate", title=f"{ratio} tokens per parameter, seed 0")
        axis.set_ylim(0.99 * low, 1.09 * low)
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, names = axes[-1].get_legend_handles_labels()  # of all that have all sizes
    figure.legend(handles, names, loc="outside lower center", ncol=len(names))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def parse() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("runs") / "corpus2048.npz")
    parser.add_argument("--runs", type=Path, default=RUNS, help="a file a run")
    parser.add_argument("--out", type=Path, help="for figure and RESULTS.md (default: see --tiny)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="to end by")
    parser.add_argument("--at-once", type=int, default=4, help="runs on the device")
    parser.add_argument(
        "--only",
        default=",".join(f"{name}@{size.ratio}" for size in SIZES for name in OPTIMIZERS),
        help=f"OPTIMIZER@RATIO,...; beside the default there are {', '.join(VARIANTS)}",
    )
    parser.add_argument("--steps", type=int, help="of every run, to try the command")
    parser.add_argument("--tiny", action="store_true", help="models of nothing, uncompiled")
    parser.add_argument("--from-runs", action="store_true", help="train nothing")
    parser.add_argument("--from-csv", action="store_true", help="from the CSV and JSON in --out")
    parser.add_argument("--pack", type=Path, help="also write all files of runs to this .tar.gz")
    args = parser.parse_args()
    args.out = args.out or (args.runs if args.tiny or args.steps else FOLDER)
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = TINY if args.tiny else SIZES
    return args, Options(
        args.corpus, args.runs, sizes, args.at_once, args.steps,
        compiled=not args.tiny, only=tuple(args.only.split(",")),
    )  # fmt: skip


def main() -> None:
    args, options = parse()
    name = "tokens_per_parameter"
    if not (args.from_runs or args.from_csv):
        try:
            run_all(options, args.seconds)
        finally:
            if args.pack:
                with tarfile.open(args.pack, "w:gz") as packed:
                    for file in sorted(args.runs.glob("*.json")):
                        packed.add(file, file.name)
    if not args.from_csv:
        about, curves = collect(options, str(Corpus.load(args.corpus)))
        write_csv(args.out / f"{name}.csv", curves)
        (args.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    about = json.loads((args.out / f"{name}.json").read_text())
    runs = runs_of(read_csv(args.out / f"{name}.csv"))
    if any(all(by_seed(runs, r, o) for o in OPTIMIZERS) for r in {job.ratio for job in runs}):
        plot(runs, args.out / f"{name}.png")
    write_section(args.out / "RESULTS.md", "tokens per parameter", section(about, runs))
    print(section(about, runs))


if __name__ == "__main__":
    main()
