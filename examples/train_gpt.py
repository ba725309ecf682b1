"""Train a small character-level GPT on Shakespeare with NorMuon, as a loop of pure functions.

    # NorMuon and AdamW, each at its best learning rate
    python examples/train_gpt.py
    python examples/train_gpt.py --optimizer normuon      # one of the two
    # each at three learning rates; says which was best
    python examples/train_gpt.py --lr-grid
    python examples/train_gpt.py --data my.txt --steps 2000 --guard full

It compares. What trains, and goes on from a checkpoint, is pretrain.py. The AdamW baseline goes
through the same `nm.step`, with every parameter routed to AdamW. Loss curves land in --out.
"""

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

# Read when torch loads. GNU OpenMP's threads spin for long while they wait, which costs a quiet
# machine nothing (this: 3 %), but 2 cores with two more busy processes 5-17x (400 small matmuls,
# torch 2.13, 2026-11-22).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import normuon_fn as nm

CONTEXT, BATCH, WIDTH, LAYERS, HEADS = 128, 16, 128, 4, 4
STEPS, EVAL_EVERY, LOG_EVERY, MAX_SKIPS = 400, 100, 10, 20
PIECE = 32 * CONTEXT  # 4096 characters: one or two pages of every play are held out at a time

# Validation loss after the default 400 steps, seed 0, 2 CPU cores, torch 2.13, 2026-11-22 (another
# seed: +-0.01):
#   normuon  5e-3 1.660   1e-2 1.625   2e-2 1.638
#   adamw  2.5e-3 1.713   5e-3 1.709   1e-2 1.806
LR_GRID = {"normuon": (5e-3, 1e-2, 2e-2), "adamw": (2.5e-3, 5e-3, 1e-2)}
LR = {"normuon": 1e-2, "adamw": 5e-3}

Tensors = dict[str, Tensor]


def angles(time: int, features: int) -> Tensor:  # [2, time, features / 2]: cosines and sines
    """By how far a position turns each pair of features. Source: arXiv 2104.09864, eq. 15."""
    turns = torch.arange(time)[:, None] * 10000.0 ** (
        -torch.arange(features // 2) / (features // 2)
    )
    return torch.stack([turns.cos(), turns.sin()])


def rotary(
    x: Tensor,  # [batch, heads, time, features]
    turns: Tensor,  # of `angles`
) -> Tensor:
    """x with each pair of features turned by an angle that grows with its position.

    Source: arXiv 2104.09864, eq. 34.
    """
    cos, sin = turns[:, : x.shape[-2]].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self,
        x: Tensor,  # [batch, time, width]
        turns: Tensor,
    ) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm_attention(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(
            rotary(q, turns), rotary(k, turns), v, is_causal=True
        )
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        *,
        tie: bool,
        width: int = WIDTH,
        layers: int = LAYERS,
        heads: int = HEADS,
        context: int = CONTEXT,
    ) -> None:
        super().__init__()
        self.register_buffer(
            "turns", angles(context, width // heads), persistent=False
        )  # in the graph: anew an entry
        self.wte = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # What writes to the residual stream starts at zero: blocks start as the identity.
                nn.init.normal_(
                    p,
                    std=0.0
                    if name.endswith(("proj.weight", "down.weight"))
                    else p.shape[1] ** -0.5,
                )
        if tie:
            self.head.weight = self.wte.weight

    def forward(
        self,
        tokens: Tensor,  # [batch, time] int64
    ) -> Tensor:  # [batch, time, vocabulary]
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x, self.turns)
        return self.head(self.norm(x))


class Text:
    """The characters of a file as integers, to train on and to validate.

    Of every ten pieces in a row nine are for training, the tenth for validation.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.characters = "".join(sorted(set(text)))
        index = {c: i for i, c in enumerate(self.characters)}
        if len(text) < 10 * PIECE:
            raise ValueError(f"{path}: expected at least {10 * PIECE} characters, got {len(text)}")
        pieces = torch.tensor([index[c] for c in text]).split(PIECE)
        self.train = torch.cat([piece for i, piece in enumerate(pieces) if i % 10 != 9])
        self.val = torch.cat(pieces[9::10])

    def batch(self, generator: torch.Generator) -> Tensor:  # [batch, context + 1]
        starts = torch.randint(len(self.train) - CONTEXT, (BATCH, 1), generator=generator)
        return self.train[starts + torch.arange(CONTEXT + 1)]


@dataclass
class Run:
    """Everything that changes while one optimizer trains."""

    optimizer: str
    lr: float
    guard: str
    params: Tensors
    state: Tensors
    generator: torch.Generator
    step: int = 0
    losses: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    compile_seconds: float = 0.0
    train_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.optimizer} lr {self.lr:g}"


class Trainer:
    """The model, the text and the compiled functions: what all runs have in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.text = Text(args.data)
        torch.manual_seed(args.seed)
        self.model = GPT(len(self.text.characters), tie=args.tie).to(self.device)
        loss_and_grad = torch.func.grad_and_value(self.loss)
        self.loss_and_grad = torch.compile(
            loss_and_grad, fullgraph=True, dynamic=False, disable=args.no_compile
        )
        self.step = nm.update if args.no_compile else nm.step

    def loss(
        self,
        params: Tensors,
        tokens: Tensor,  # [batch, time + 1] int64
    ) -> Tensor:  # 0-d float32, nats a character
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        ):
            logits = torch.func.functional_call(self.model, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def validation_loss_sync(self, params: Tensors) -> float:
        """The mean over the whole validation text, in windows that do not overlap."""
        starts = torch.arange(0, len(self.text.val) - CONTEXT, CONTEXT)
        windows = self.text.val[starts[:, None] + torch.arange(CONTEXT + 1)].to(self.device)
        return float(
            torch.stack([self.loss(params, w) * len(w) for w in windows.split(64)]).sum()
        ) / len(windows)

    @torch.no_grad()
    def sample(self, params: Tensors, length: int = 400) -> str:
        generator = torch.Generator().manual_seed(self.args.seed)
        tokens = self.text.val[:1]
        for _ in range(length):
            window = tokens[None, -CONTEXT:].to(self.device)
            logits = torch.func.functional_call(self.model, params, (window,))[0, -1].float().cpu()
            tokens = torch.cat(
                [tokens, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)]
            )
        return "".join(self.text.characters[i] for i in tokens.tolist())

    def begin(self, optimizer: str, lr: float) -> tuple[Run, nm.Plan]:
        args = self.args
        params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        routes = {"*norm*": nm.Route("adamw", wd_mul=0.0)}
        if optimizer == "adamw":
            routes["*"] = nm.Route("adamw")
        else:
            # wte and head go to AdamW by default; a fused qkv is three matrices.
            routes["*.qkv.weight"] = nm.Route("normuon", splits=(WIDTH, WIDTH, WIDTH))
        plan = nm.make_plan(
            params,
            nm.Config(guard=args.guard, momentum_dtype=getattr(torch, args.momentum_dtype)),
            routes=routes,
        )
        state, generator = nm.init(params, plan), torch.Generator().manual_seed(args.seed)
        return Run(optimizer, lr, args.guard, params, state, generator), plan

    def train(self, optimizer: str, lr: float) -> Run:
        args = self.args
        run, plan = self.begin(optimizer, lr)
        hyper = nm.Hyper.of(run.params, lr=lr, weight_decay=0.1)
        warmup = max(1, args.steps // 10)
        shape = [
            min((i + 1) / warmup, (args.steps - i) / (args.steps - warmup + 1))
            for i in range(args.steps)
        ]
        schedule = torch.tensor(
            shape, device=self.device
        )  # all of it at once: no copy to the device in the loop
        pending: list[Tensor] = []  # losses not read yet: reading one waits for the device
        bar = tqdm(total=args.steps, desc=str(run), unit="step")
        started = time.perf_counter()
        while run.step < args.steps:
            tokens = self.text.batch(run.generator).to(self.device)
            grads, loss = self.loss_and_grad(run.params, tokens)
            now = hyper.scaled(schedule[run.step])  # tensors: never a recompile
            result = self.step(run.params, grads, run.state, now, plan)
            run.params, run.state, run.step = result.params, result.state, run.step + 1
            pending.append(loss)
            if run.step % LOG_EVERY == 0 or run.step in (1, args.steps):
                run.losses += torch.stack(pending).tolist()
                nm.check(result, plan, max_consecutive=MAX_SKIPS)
                seconds = time.perf_counter() - started
                run.compile_seconds += seconds if run.step == 1 else 0.0
                run.train_seconds += seconds if run.step > 1 else 0.0
                shown = {
                    "loss": f"{run.losses[-1]:.3f}",
                    "val": f"{run.val[-1][1]:.3f}" if run.val else "-",
                }
                bar.set_postfix(
                    shown | {"tokens/s": f"{len(pending) * BATCH * CONTEXT / seconds:,.0f}"},
                    refresh=False,
                )
                bar.update(run.step - bar.n)
                pending.clear()
                started = time.perf_counter()
            if run.step % EVAL_EVERY == 0 or run.step == args.steps:
                run.val.append((run.step, self.validation_loss_sync(run.params)))
                started = time.perf_counter()
        bar.close()
        return run


def plot(runs: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        mean = (
            torch.tensor(run.losses).unfold(0, min(20, len(run.losses)), 1).mean(-1)
        )  # of the last 20 batches
        steps = range(len(run.losses) - len(mean) + 1, len(run.losses) + 1)
        (line,) = axes.plot(steps, mean, alpha=0.5, label=f"{run}, training")
        axes.plot(
            *zip(*run.val, strict=True), "o-", color=line.get_color(), label=f"{run}, validation"
        )
    axes.set(xlabel="step", ylabel="loss, nats a character", title="A small GPT on Shakespeare")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"loss curves: {path}")


def report(runs: list[Run]) -> None:
    print("                    training loss  validation loss  compile s  train s  skipped steps")
    for run in runs:
        loss, skipped = (
            sum(run.losses[-20:]) / len(run.losses[-20:]),
            f"{int(run.state['guard.skipped'])} of {run.step}",
        )
        times = f"{run.compile_seconds:>10.1f} {run.train_seconds:>8.1f}"
        print(
            f"{run!s:<18} {loss:>14.4f} {run.val[-1][1]:>16.4f} {times} {skipped:>14} "
            f"(guard {run.guard})"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=("normuon", "adamw"), help="train with this one only")
    which.add_argument(
        "--compare", action="store_true", help="train with both (the default without --optimizer)"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--lr", type=float, help="peak learning rate (default: the best of the grid, per optimizer)"
    )
    rate.add_argument(
        "--lr-grid",
        action="store_true",
        help="three learning rates per optimizer, and which was best",
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--guard", choices=("off", "output", "full"), default="off")
    parser.add_argument(
        "--momentum-dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="of NorMuon's momentum",
    )
    parser.add_argument(
        "--tie", action="store_true", help="one matrix for the embedding and the head"
    )
    parser.add_argument("--no-compile", action="store_true", help="everything eager")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the loss curves")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def main() -> None:
    args = parse()
    trainer = Trainer(args)
    runs, best = [], []
    for optimizer in [args.optimizer] if args.optimizer else ["normuon", "adamw"]:
        rates = (
            LR_GRID[optimizer] if args.lr_grid else [LR[optimizer] if args.lr is None else args.lr]
        )
        tried = [trainer.train(optimizer, lr) for lr in rates]
        best.append(min(tried, key=lambda run: run.val[-1][1]))
        runs += tried
    print(f"\n{trainer.sample(best[0].params)}\n")
    report(runs)
    if args.lr_grid:
        print(f"best: {', '.join(map(str, best))}")
    if len(best) == 2:
        losses = [run.val[-1][1] for run in best]
        print(
            f"validation loss: {losses[0]:.4f} {best[0]}, {losses[1]:.4f} {best[1]}: "
            f"{losses[1] - losses[0]:+.4f}"
        )
    plot(runs, args.out / "loss.png")


if __name__ == "__main__":
    main()
