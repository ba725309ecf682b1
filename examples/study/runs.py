"""One training run of the studies: a GPT on the corpus, an optimizer, a learning rate, a seed.

Every run is kept as a file.

    Job -> Trainer.run -> Result -> <folder>/<key of the job>.json

`run_all` runs what is not there yet, on as many GPUs as there are. Runs are deterministic: the same
job has the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS is deterministic with it; read when torch loads

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from tqdm import trange

import normuon_fn as nm
from examples.study.common import FOLDER, measured_on
from examples.study.corpus import Corpus
from examples.train_gpt import GPT

Tensors = dict[str, Tensor]
WARMUP = 0.05  # of all steps; from there the learning rate falls linearly to zero
WEIGHT_DECAY = 0.1
TIMED = 100  # steps at the end whose parts are timed on the device


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    evaluations: int  # over a run
    windows: int  # of validation text


FULL = Size(width=512, layers=8, heads=8, context=512, batch=32, evaluations=24, windows=256)
TINY = Size(width=32, layers=1, heads=2, context=16, batch=2, evaluations=2, windows=4)


@dataclass(frozen=True)
class Variant:
    algorithm: str = "normuon"  # of the matrices
    dtype: torch.dtype = torch.float32  # of all parameters
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    clip: float | None = None  # the norm that all gradients together have at most


VARIANTS = {
    "AdamW": Variant("adamw"),
    "AdamW, clipped": Variant("adamw", clip=1.0),
    "Muon": Variant(config={"normalize": False}),
    "NorMuon": Variant(),
    "NorMuon, Gram": Variant(config={"method": "gram"}),
    "NorMuon, standard": Variant(config={"method": "standard"}),
    "NorMuon, guard": Variant(config={"guard": "full"}),
    "NorMuon, bfloat16 + mantissa": Variant(dtype=torch.bfloat16, config={"master": "mantissa"}),
    "NorMuon, bfloat16 alone": Variant(dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Job:
    variant: str
    lr: float
    seed: int
    length: float = 1.0  # of the epoch
    faults: float = 0.0  # the chance of a NaN in a gradient, a step

    @property
    def key(self) -> str:
        name = "".join(c if c.isalnum() else "-" for c in self.variant)
        return f"{name}_lr{self.lr:g}_seed{self.seed}_length{self.length:g}_faults{self.faults:g}"


@dataclass(frozen=True)
class Result:
    job: Job
    parameters: int
    tokens: int  # a step
    steps: int
    val: list[tuple[int, float]]  # step, nats a token
    seconds: float  # of training: neither compiling nor validation
    step_ms: float  # on the device, of the last steps
    optimizer_ms: float
    captured: bool  # the optimizer's step in a CUDA graph
    faults: int
    skipped: int
    digest: str  # SHA-256 of the parameters at the end
    on: str

    @property
    def loss(self) -> float:
        return self.val[-1][1]

    def save(self, folder: Path) -> None:
        partial = folder / f".{self.job.key}"
        partial.write_text(json.dumps(dataclasses.asdict(self)))
        os.replace(partial, folder / f"{self.job.key}.json")

    @staticmethod
    def load(file: Path) -> Result:
        kept = json.loads(file.read_text())
        return Result(
            **{
                **kept,
                "job": Job(**kept["job"]),
                "val": [(step, loss) for step, loss in kept["val"]],
            }
        )


@dataclass(frozen=True)
class Options:
    corpus: Path
    folder: Path  # of the results
    size: Size
    steps: int | None = None  # None: the whole corpus once
    compiled: bool = True


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that studies of such runs have in common."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("runs") / "corpus.npz")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs") / "study",
        help="a file a run; what is there is not run again",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="for CSV, JSON, figure and RESULTS.md: here; with --steps or --tiny: --runs",
    )
    parser.add_argument("--steps", type=int, help="instead of the whole corpus")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of nothing, uncompiled: to try the command"
    )
    parser.add_argument(
        "--from-csv", action="store_true", help="table and figure from what --out holds"
    )
    return parser


def parse(parser: argparse.ArgumentParser, command: str) -> tuple[argparse.Namespace, Options, str]:
    """The arguments, the options that they ask for, and the command that asks for the same."""
    args = parser.parse_args()
    of_all = not (args.tiny or args.steps)
    args.out = args.out or (FOLDER if of_all else args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    command += f" --steps {args.steps}" * bool(args.steps) + " --tiny" * args.tiny
    options = Options(
        args.corpus, args.runs, TINY if args.tiny else FULL, args.steps, compiled=not args.tiny
    )
    if not args.from_csv and not args.corpus.exists():
        parser.error(
            f"--corpus: there is no {args.corpus}; "
            f"python -m examples.study.corpus --out {args.corpus} makes it"
        )
    return args, options, command


def run_all(jobs: Sequence[Job], options: Options) -> dict[Job, Result]:
    options.folder.mkdir(parents=True, exist_ok=True)
    _of_one_study(options)
    missing = [job for job in jobs if not (options.folder / f"{job.key}.json").exists()]
    devices = max(1, min(torch.cuda.device_count(), len(missing)))
    if devices > 1:
        multiprocessing.start_processes(
            _run_some, (missing, devices, options), nprocs=devices, start_method="spawn"
        )
    elif missing:
        _run_some(0, missing, 1, options)
    return {job: Result.load(options.folder / f"{job.key}.json") for job in jobs}


def _of_one_study(options: Options) -> None:
    """The name of a run does not say how large its model is, or what it read: its folder does."""
    file = options.folder / "study.json"
    corpus = Corpus.load(options.corpus).about["sha256"]
    study = {"corpus": corpus, "steps": options.steps, "size": dataclasses.asdict(options.size)}
    if not file.exists():
        file.write_text(json.dumps(study))
    elif json.loads(file.read_text()) != study:
        raise ValueError(
            f"--runs {options.folder}: has runs of another size, length or text (study.json); "
            "choose another folder"
        )


def _run_some(k: int, jobs: Sequence[Job], devices: int, options: Options) -> None:
    """A device's share: neighbours, which have the variant, and so what is compiled, in common."""
    device = torch.device("cuda", k) if torch.cuda.is_available() else torch.device("cpu")
    trainer = Trainer(options, device)
    for job in jobs[len(jobs) * k // devices : len(jobs) * (k + 1) // devices]:
        trainer.run(job).save(options.folder)


class Trainer:
    """The corpus on a device, and the compiled functions that all runs have in common."""

    def __init__(self, options: Options, device: torch.device) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.options, self.device = options, device
        self.corpus = Corpus.load(options.corpus)
        self.train, self.val = self.corpus.train.to(device), self.corpus.val.to(device)
        torch.compiler.set_stance("default" if options.compiled else "force_eager")
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self.template = self.model(0)
        self.loss_and_grad = compiled(torch.func.grad_and_value(self.loss))
        self.loss_only = compiled(self.loss)
        self.plans: dict[str, nm.Plan] = {}  # by variant: what is compiled belongs to a plan

    def model(self, seed: int) -> GPT:
        size = self.options.size
        torch.manual_seed(seed)
        sizes = {
            "width": size.width,
            "layers": size.layers,
            "heads": size.heads,
            "context": size.context,
        }
        return GPT(self.corpus.vocabulary, tie=False, **sizes).to(self.device)

    def loss(
        self,
        params: Tensors,
        tokens: Tensor,  # [batch, time + 1] int64
    ) -> Tensor:  # 0-d float32, nats a token
        params = {
            name: p.float() for name, p in params.items()
        }  # all that bfloat16 parameters change is what they can hold
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        ):
            logits = torch.func.functional_call(self.template, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def windows(self, text: Tensor, starts: Tensor) -> Tensor:  # [batch, context + 1] int64
        return text[
            starts[:, None] + torch.arange(self.options.size.context + 1, device=self.device)
        ].long()

    @torch.no_grad()
    def validation_loss_sync(self, params: Tensors) -> float:
        size = self.options.size
        starts = torch.arange(0, len(self.val) - size.context, size.context, device=self.device)
        starts = starts[: min(size.windows, len(starts)) // size.batch * size.batch]
        return float(
            torch.stack(
                [
                    self.loss_only(params, self.windows(self.val, s))
                    for s in starts.split(size.batch)
                ]
            ).mean()
        )

    def plan(self, name: str, params: Tensors) -> nm.Plan:
        if name in self.plans:
            return self.plans[name]
        variant, width = VARIANTS[name], self.options.size.width
        routes = {"*norm*": nm.Route("adamw", wd_mul=0.0)}
        if variant.algorithm == "adamw":
            routes["*"] = nm.Route("adamw")
        else:  # wte and head go to AdamW by default
            routes["*.qkv.weight"] = nm.Route(splits=(width, width, width))
        return self.plans.setdefault(
            name, nm.make_plan(params, nm.Config(**variant.config), routes=routes)
        )

    def run(self, job: Job) -> Result:
        size, variant = self.options.size, VARIANTS[job.variant]
        params = {
            name: p.detach().to(variant.dtype)
            for name, p in self.model(job.seed).named_parameters()
        }
        plan = self.plan(job.variant, params)
        state = nm.init(params, plan)
        peak = nm.Hyper.of(params, lr=job.lr, weight_decay=WEIGHT_DECAY)
        hyper = peak.scaled(0.0)  # what a captured step reads
        buffers = {
            name: torch.zeros_like(p) for name, p in params.items()
        }  # of gradients: a captured step wants them in place
        captured = (
            nm.GraphedStep(plan) if self.device.type == "cuda" and self.options.compiled else None
        )

        windows = (len(self.train) - 1) // size.context
        epoch = self.options.steps or windows // size.batch
        steps = max(2, round(epoch * job.length))
        order = (
            torch.randperm(windows, generator=torch.Generator().manual_seed(job.seed)).to(
                self.device
            )
            * size.context
        )
        rise = max(1, round(steps * WARMUP))
        shape = [min((i + 1) / rise, (steps - i) / (steps - rise + 1)) for i in range(steps)]
        schedule = torch.tensor(shape, device=self.device)
        broken = (
            torch.rand(steps, generator=torch.Generator().manual_seed(1000 + job.seed)) < job.faults
        )
        names = sorted(params)

        def train_step(
            i: int, params: Tensors, state: Tensors, step: Callable[..., Any]
        ) -> list[Any]:
            marks = [self.mark()]
            grads, _ = self.loss_and_grad(
                params, self.windows(self.train, order[i * size.batch : (i + 1) * size.batch])
            )
            if broken[i]:  # as a flipped bit or a bad kernel leaves it
                victim = grads[names[i % len(names)]].view(-1)
                victim[i % len(victim)] = float("nan")
            if variant.clip is not None:
                norm = torch.nn.utils.get_total_norm(list(grads.values()))
                torch._foreach_mul_(
                    list(grads.values()), (variant.clip / (norm + 1e-6)).clamp(max=1.0)
                )
            marks.append(self.mark())
            torch._foreach_copy_(list(buffers.values()), [grads[name] for name in buffers])
            peak.scaled(schedule[i], out=hyper)
            step(params, buffers, state, hyper)
            return [*marks, self.mark()]

        plain = functools.partial(nm.step_, plan=plan)
        for i in range(2):  # compiles; what it steps is thrown away
            train_step(
                i,
                *({name: x.clone() for name, x in tensors.items()} for tensors in (params, state)),
                plain,
            )
        self.validation_loss_sync(params)

        val, marks, seconds, started = [], [], 0.0, self.now_sync()
        every = max(1, steps // size.evaluations)
        for i in trange(steps, desc=str(job.key), unit="step", mininterval=5):
            marks.append(train_step(i, params, state, captured or plain))
            if (i + 1) % every == 0 or i + 1 == steps:
                seconds += self.now_sync() - started
                val.append((i + 1, self.validation_loss_sync(params)))
                started = self.now_sync()
        step_ms, optimizer_ms = self.milliseconds(marks[-TIMED:])
        if captured:
            captured.release()
        digest = hashlib.sha256()
        for name in names:
            digest.update(params[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return Result(
            job, sum(p.numel() for p in params.values()), size.batch * size.context, steps, val,
            seconds, step_ms, optimizer_ms, captured is not None,
            int(broken.sum()), int(state["guard.skipped"]), digest.hexdigest(),
            measured_on(self.device),
        )  # fmt: skip

    def now_sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: list[list[Any]]) -> tuple[float, float]:
        """The medians of whole steps and of the optimizer's part. The device must be idle."""

        def between(a: Any, b: Any) -> float:
            return 1e3 * (b - a) if self.device.type != "cuda" else a.elapsed_time(b)

        whole, part = (sorted(between(m[a], m[2]) for m in marks) for a in (0, 1))
        return whole[len(whole) // 2], part[len(part) // 2]
