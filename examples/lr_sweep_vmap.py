"""Eight learning rates at once: a whole training step under vmap, as one compiled graph.

The step is loss, backward and NorMuon.

    python examples/lr_sweep_vmap.py                 # runs/lr_sweep.png
    # a quick look: 19 s on 2 CPU cores with a warm compile cache
    python examples/lr_sweep_vmap.py --steps 12

The members share the data and the start, and differ in `Hyper`: stacked, every value has a leading
axis of 8. A member whose loss explodes skips its own steps (guard "full") and leaves the others
alone.
"""

import argparse
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

RATES = [2.5e-4 * 2**k for k in range(8)]
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the model")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text = Text(args.data)
    model = GPT(len(text.characters), tie=False, layers=args.layers).to(args.device)
    one = {name: p.detach() for name, p in model.named_parameters()}
    routes = {
        "*norm*": nm.Route("adamw", wd_mul=0.0),
        "*.qkv.weight": nm.Route(splits=(WIDTH, WIDTH, WIDTH)),
    }
    plan = nm.make_plan(one, nm.Config(guard="full"), routes=routes)

    def members(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.expand(len(RATES), *x.shape).clone() for name, x in tensors.items()}

    def loss_fn(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def train_step(
        params, state, hyper, tokens
    ):  # one member: nothing here knows of the other seven
        grads, loss = torch.func.grad_and_value(loss_fn)(params, tokens)
        result = nm.update(params, grads, state, hyper, plan)
        return result.params, result.state, loss

    ensemble = torch.compile(
        torch.vmap(train_step, in_dims=(0, 0, 0, None)),
        backend=args.backend,
        fullgraph=True,
        dynamic=False,
    )
    params, state = members(one), members(nm.init(one, plan))
    stacked = [nm.Hyper.of(one, lr=rate, weight_decay=0.1) for rate in RATES]
    hyper = nm.Hyper.stack(stacked)

    generator, losses = torch.Generator().manual_seed(args.seed), []
    warmup = max(1, args.steps // 10)
    for step in trange(args.steps, unit="step"):
        starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1), generator=generator)
        tokens = text.train[starts + torch.arange(CONTEXT + 1)].to(args.device)
        factor = min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup + 1))
        now = hyper.scaled(factor)
        params, state, loss = ensemble(params, state, now, tokens)
        losses.append(loss)

    last = torch.stack(losses[-20:]).mean(0).tolist()
    skipped = state["guard.skipped"].tolist()
    print("learning rate   final loss   skipped steps")
    for rate, loss, count in zip(RATES, last, skipped, strict=True):
        print(f"{rate:>13.2g} {loss:>12.4f} {count:>15}")
    print(f"best: {RATES[last.index(min(last))]:g}")

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.semilogx(RATES, last, "o-")
    axes.set(
        xlabel="learning rate",
        ylabel="loss, nats a character, last 20 steps",
        title=f"NorMuon, {args.steps} steps, one graph",
    )
    axes.grid(alpha=0.3, which="both")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "lr_sweep.png", dpi=120)
    print(f"plot: {args.out / 'lr_sweep.png'}")


if __name__ == "__main__":
    main()
