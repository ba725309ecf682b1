"""One bad batch ends a run without the guard and does nothing with it.

The same training twice, with NaNs injected into both:

    # 8 minutes on 2 busy CPU cores; writes examples/nan_survival.png
    python examples/nan_survival.py

Every 40th step (--every) one entry of one gradient is NaN, as a flipped bit or a bad kernel leaves
it. The third run never sees those batches: the guarded one must end with its weights, bit for bit.
"""

import argparse
import math
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange
from train_gpt import CONTEXT, GPT, LAYERS, WIDTH, Text

import normuon_fn as nm

BATCH, LR = 8, 5e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=40, help="inject a NaN every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the model")
    parser.add_argument("--no-compile", action="store_true", help="everything eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "nan_survival.png")
    args = parser.parse_args()

    torch.use_deterministic_algorithms(
        True
    )  # the embedding's backward adds in any order otherwise: no two runs alike
    text = Text(args.data)
    torch.manual_seed(args.seed)
    model = GPT(len(text.characters), tie=False, layers=args.layers).to(args.device)
    start = {name: p.detach() for name, p in model.named_parameters()}
    routes = {
        "*norm*": nm.Route("adamw", wd_mul=0.0),
        "*.qkv.weight": nm.Route(splits=(WIDTH, WIDTH, WIDTH)),
    }

    def loss_fn(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    loss_and_grad = torch.compile(
        torch.func.grad_and_value(loss_fn), fullgraph=True, dynamic=False, disable=args.no_compile
    )
    train_step = nm.update if args.no_compile else nm.step
    names = sorted(start)

    def train(guard: str, *, faults: bool) -> tuple[list[float], dict[str, Tensor], list[int]]:
        plan = nm.make_plan(start, nm.Config(guard=guard), routes=routes)
        params, state = start, nm.init(start, plan)
        hyper = nm.Hyper.of(start, lr=LR, weight_decay=0.1)
        generator, losses, skips = torch.Generator().manual_seed(args.seed), [], []
        for step in trange(
            args.steps, unit="step", desc=f"guard {guard}" + (", faults" if faults else "")
        ):
            starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1), generator=generator)
            bad = step % args.every == args.every - 1
            if bad and not faults:
                continue  # the clean run: this batch never existed
            tokens = text.train[starts + torch.arange(CONTEXT + 1)].to(args.device)
            grads, loss = loss_and_grad(params, tokens)
            if bad:
                grads[names[step % len(names)]].view(-1)[step] = math.nan
            result = train_step(params, grads, state, hyper, plan)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if nm.check(result, plan):
                    skips.append(step)
            params, state = result.params, result.state
            losses.append(float(loss))
        return losses, params, skips

    unguarded, _, _ = train("off", faults=True)
    guarded, survived, skips = train("full", faults=True)
    _, expected, _ = train("full", faults=False)
    same = all(torch.equal(survived[name], expected[name]) for name in start)
    dead = next((k for k, loss in enumerate(unguarded) if math.isnan(loss)), None)
    print(f"guard off:  loss NaN from step {dead} on")
    print(f"guard full: loss {sum(guarded[-10:]) / 10:.4f}, skipped steps {skips}")
    print(f"weights of the run that never saw those batches, bit for bit: {same}")

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(guarded, label='guard="full"', zorder=2)
    axes.plot(unguarded, color="tab:red", linewidth=4, alpha=0.4, label='guard="off"')
    for step in skips:
        axes.axvline(
            step,
            color="gray",
            linestyle=":",
            linewidth=1,
            label="a NaN in one gradient" if step == skips[0] else None,
        )
    if dead is not None:
        axes.plot(
            dead - 1,
            unguarded[dead - 1],
            "x",
            color="tab:red",
            markersize=12,
            markeredgewidth=3,
            label="dead: all weights NaN",
        )
    axes.set(
        xlabel="step",
        ylabel="training loss, nats a character",
        title=f"One NaN in one gradient, every {args.every} steps",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=120)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
