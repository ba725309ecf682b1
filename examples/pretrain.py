"""Pretrain a GPT on a text file with NorMuon: one file to copy and to change.

    python examples/pretrain.py                          # a GPU, or a CPU in minutes
    python examples/pretrain.py --data my.txt --width 768 --layers 12 --heads 12 --context 1024
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --batch 256      # FSDP2
    python examples/pretrain.py --resume                 # from the newest checkpoint in --out

A resumed run goes on bit for bit on as many ranks, and closely on another number of them. ``--out``
gets metrics.csv, loss.png, checkpoints and, if TensorBoard is installed, its events. Any file will
do, read as bytes; for tokens change `Text`. train_ddp.py is the same with DistributedDataParallel.
"""

import csv
import os
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import normuon_fn as nm

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # metrics.csv has the same numbers
    SummaryWriter = None
COLUMNS = ("step", "loss", "validation", "lr", "tokens_per_second", "skipped")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = (nn.Linear(width, k * width, bias=False) for k in (3, 1))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # blocks start as the identity
                at_zero = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.0 if at_zero else p.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocabulary]
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text:
    """A file as bytes; its last twentieth is for validation."""

    def __init__(self, file: Path, context: int) -> None:  # a file of 20 contexts at the least
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        self.train, self.val = data[: -(len(data) // 20)], data[-(len(data) // 20) :]
        self.window = torch.arange(context + 1)

    def batch(self, size: int, seed: int) -> Tensor:  # [size, context + 1] int64
        draw = torch.Generator().manual_seed(seed)  # by step: a resumed run draws the same
        starts = torch.randint(len(self.train) - len(self.window), (size, 1), generator=draw)
        return self.train[starts + self.window].long()

    def validation(self, size: int) -> Tensor:  # the same windows every time
        starts = torch.linspace(0, len(self.val) - len(self.window), size).long()
        return self.val[starts[:, None] + self.window].long()


class Trainer:
    def __init__(self, args: Namespace) -> None:
        self.args, cuda, several = args, torch.cuda.is_available(), dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if args.batch % self.ranks:
            raise ValueError(f"--batch: {args.batch} is not a multiple of {self.ranks} ranks")
        self.text = Text(args.data, args.context)
        torch.manual_seed(args.seed)  # every rank makes the same model, and keeps its part of it
        self.device = torch.device("cuda" if cuda else "cpu")
        self.model = GPT(256, args.width, args.layers, args.heads, args.context).to(self.device)
        for block in self.model.blocks:
            block.compile()  # one graph for all of them
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=cuda)
        self.forward, self.mesh = self.autocast(self.model.__call__), None
        if several:
            self.spread()
        # Detached parameters share the model's memory: step_ writes what the model reads.
        self.params = {name: p.detach() for name, p in self.model.named_parameters()}
        # Written out for you to change. `nm.routes_for(self.model, decay_vectors=False)` reads the
        # same from the modules, and is the better start for a model of your own.
        routes = {"*norm*": nm.Route("adamw", wd_mul=0.0), "place.weight": nm.Route("adamw")}
        routes["*.qkv.weight"] = nm.Route(splits=(args.width,) * 3)  # three matrices, not one
        config = nm.Config(guard="full", metrics=True)  # a NaN or inf anywhere: no rank steps
        self.plan = nm.make_plan(self.params, config, routes=routes, mesh=self.mesh)
        self.state = nm.init(self.params, self.plan)
        self.peak = nm.Hyper.of(self.params, lr=args.lr, weight_decay=args.weight_decay)
        self.schedule = nm.Schedule(args.steps, warmup=max(1, args.steps // 10), shape="linear")
        self.monitor, self.result = nm.SkipMonitor(self.plan, max_consecutive=20), None
        self.step, self.saved = 0, {"params": self.params, "state": self.state}

    def spread(self) -> None:  # over the ranks: each keeps its shards of all parameters
        dtype = torch.bfloat16 if self.device.type == "cuda" else None
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
        self.forward = self.model  # FSDP2 casts

    def loss(self, batch: Tensor) -> Tensor:  # this rank's part of the batch; nats a byte
        tokens = batch.chunk(self.ranks)[self.rank].to(self.device)
        logits = self.forward(tokens[:, :-1].contiguous())
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def mean(self, losses: list[Tensor]) -> float:  # over all ranks; waits for the device
        loss = torch.stack(losses).mean() / self.ranks
        if self.ranks > 1:
            dist.all_reduce(loss)
        return float(loss)

    def train_step(self) -> Tensor:
        self.step += 1
        loss = self.loss(self.text.batch(self.args.batch, 10**9 * self.args.seed + self.step))
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        hyper = self.peak.scaled(self.schedule(self.state["guard.step"]))  # tensors: no recompile
        self.result = nm.step_(self.params, grads, self.state, hyper, self.plan)
        self.monitor(self.result)
        self.model.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def validation_loss(self) -> float:
        parts = self.text.validation(8 * self.args.batch).split(self.args.batch)
        return self.mean([self.loss(part) for part in parts])

    @torch.no_grad()
    def samples(self, length: int) -> list[str]:  # under FSDP2 on all ranks together
        seen, context = torch.full((self.args.batch // self.ranks, 1), 10), self.args.context
        draw = torch.Generator().manual_seed(self.args.seed)
        for _ in range(length):
            window = seen[:, -context:]
            padded = F.pad(window, (0, context - window.shape[1])).to(self.device)  # one shape
            logits = self.forward(padded)[:, window.shape[1] - 1].float().cpu()
            drawn = (logits / 0.8).softmax(-1).multinomial(1, generator=draw)
            seen = torch.cat([seen, drawn], 1)
        return [bytes(row.tolist()).decode(errors="replace").strip() for row in seen]


def picture(folder: Path) -> None:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}  # a step's last row counts
    axes = Figure().subplots()
    for name in ("loss", "validation"):
        axes.plot(sorted(rows), [float(rows[k][name]) for k in sorted(rows)], label=name)
    axes.set(xlabel="step", ylabel="nats a byte")
    axes.legend()
    axes.figure.savefig(folder / "loss.png", dpi=120)


def train(trainer: Trainer) -> None:
    args, board, metrics = trainer.args, None, trainer.args.out / "metrics.csv"
    if args.resume:  # from the newest checkpoint that was written to its end, which is .metadata
        trainer.step = max(int(f.parent.name[5:]) for f in args.out.glob("step-*/.metadata"))
        dcp.load(trainer.saved, checkpoint_id=args.out / f"step-{trainer.step}")
    if trainer.rank == 0:
        print(trainer.plan)
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            metrics.write_text(",".join(COLUMNS) + "\n")
        board = SummaryWriter and SummaryWriter(args.out, purge_step=trainer.step + 1)
    losses, started = [], time.perf_counter()
    bar = tqdm(range(trainer.step + 1, (args.stop_at or args.steps) + 1), disable=trainer.rank > 0)
    for step in bar:
        losses.append(trainer.train_step())
        if step % args.log_every == 0 or step == args.steps:
            loss = trainer.mean(losses)  # the one wait for the device
            rate = len(losses) * args.batch * args.context / (time.perf_counter() - started)
            skipped, lr = int(trainer.state["guard.skipped"]), args.lr * trainer.schedule(step - 1)
            row = step, loss, trainer.validation_loss(), lr, round(rate), skipped
            if trainer.rank == 0:
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{row[2]:.3f}")
                with metrics.open("a") as file:
                    file.write(",".join(map(str, row)) + "\n")
            numbers = nm.report_metrics(trainer.result, trainer.plan) if board else {}
            numbers |= zip(COLUMNS[1:], row[1:], strict=True)
            for name, value in numbers.items() if board else ():
                board.add_scalar(name, value, step)
            losses, started = [], time.perf_counter()
        if step % args.save_every == 0 or step in (args.steps, args.stop_at):
            dcp.save(trainer.saved, checkpoint_id=args.out / f"step-{step}")
    trainer.monitor.wait()  # for the flags of the last steps
    texts = trainer.samples(args.sample)
    if board:
        board.close()
    if trainer.rank == 0:
        picture(args.out)
        print("", *texts[:2], f"{args.out}: metrics.csv, loss.png, checkpoints", sep="\n\n")


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data/shakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--resume", action="store_true", help="the run whose folder is --out")
    numbers = {"steps": 400, "batch": 16, "context": 128, "width": 128, "layers": 4, "heads": 4}
    numbers |= {"log-every": 20, "save-every": 200, "sample": 200, "seed": 0}
    for name, number in {**numbers, "lr": 0.01, "weight-decay": 0.1}.items():
        parser.add_argument(f"--{name}", type=type(number), default=number, help=f"({number})")
    parser.add_argument("--stop-at", type=int, help="end after this step of the schedule")
    args = parser.parse_args()
    if args.save_every % args.log_every or (args.stop_at or 0) % args.log_every:
        parser.error("--save-every, --stop-at: expected multiples of --log-every")
    if args.resume != any(args.out.glob("step-*/.metadata")):
        parser.error(f"--out: {args.out} has a checkpoint exactly when it is one to --resume")
    return args


def main(kind: type[Trainer] = Trainer) -> None:
    args, cuda = parse(), torch.cuda.is_available()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one rank
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    train(kind(args))
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # a thread of gloo may abort an interpreter that shuts down (pytorch#190489)


if __name__ == "__main__":
    main()
