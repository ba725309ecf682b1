"""The small-gradient study: what is left of a Muon update when gradients are tiny.

    python -m examples.study.small_gradients                # 3 minutes on 2 CPU cores
    # table and figure once more, without training
    python -m examples.study.small_gradients --from-csv

In NVIDIA/Megatron-LM#5394 a few layers have huge gradients, and the global clip multiplies
everybody's by 2e-8; a small loss scale does the same. Newton-Schulz brings a matrix to norm 1
first, by norm + eps or max(norm, eps) with eps = 1e-7 in many implementations. Far below eps it is
linear, O = c M: not orthogonal, as small as M, and nothing says so.

A small GPT trains on Shakespeare with every matrix gradient multiplied by 1, 2^-26 (1.5e-8) and
2^-66 (1.4e-20). Powers of two, because they multiply without rounding: without an eps all bits
stay, and what differs is the eps. Every arm has the same start, batches, learning rate and
momentum, no Nesterov, no weight decay, and q, k, v as one matrix.

    NorMuon                 normuon_fn, Config(): Polar Express coefficients
    Muon                    the same without normalization, at the scale "rms"
    torch.optim.Muon        at that scale (match_rms_adamw); other coefficients (Keller Jordan's),
                            products in bfloat16
    Muon, norm + 1e-7       Muon with a textbook Newton-Schulz: float32, the same coefficients
    NorMuon, norm + 1e-7    NorMuon with it

Embedding, head and norms get AdamW and their plain gradients in every arm: AdamW's own eps (1e-8)
and the underflow of its squares are another matter.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from textwrap import fill

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read when cuBLAS loads: without it products may differ

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
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
from examples.train_gpt import CONTEXT, GPT, Text
from normuon_fn.algorithm.coefficients import resolve

Tensors = dict[str, Tensor]
Step = Callable[[Tensors, Tensors], Tensors]  # (params, grads) -> params
EXPONENTS = (0, -26, -66)
EPS = 1e-7  # torch.optim.Muon, KellerJordan/Muon, Emerging-Optimizers up to 0.3
MOMENTUM, ADAMW_BETAS, ADAMW_EPS = 0.95, (0.9, 0.95), 1e-8
LAST = 20  # steps whose mean is the final training loss


def newton_schulz_with_eps(
    x: Tensor,  # [n, rows, cols] float32, rows <= cols
) -> Tensor:
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    for a, b, c in resolve("polar_express", steps=5).rows:
        xxt = x @ x.mT
        x = a * x + (b * xxt + c * xxt @ xxt) @ x
    return x


ARMS = {
    "NorMuon": nm.Config(),
    "Muon": nm.Config(
        normalize=False, scale="rms"
    ),  # "paper" would bring any update, however small, to one RMS
    "torch.optim.Muon": None,
    "Muon, norm + 1e-7": nm.Config(
        normalize=False, scale="rms", orthogonalizer=newton_schulz_with_eps
    ),
    "NorMuon, norm + 1e-7": nm.Config(orthogonalizer=newton_schulz_with_eps),
}


def normuon_fn_step(plan: nm.Plan, start: Tensors, lr: float) -> Step:
    state = nm.init(start, plan)
    hyper = nm.Hyper.of(
        start, lr=lr, momentum=MOMENTUM, adamw_betas=ADAMW_BETAS, adamw_eps=ADAMW_EPS
    )

    def step(params: Tensors, grads: Tensors) -> Tensors:
        nonlocal state
        result = nm.step(params, grads, state, hyper, plan)
        state = result.state
        return result.params

    return step


def torch_step(matrices: list[str], start: Tensors, lr: float) -> Step:
    own = {name: p.clone() for name, p in start.items()}
    whole, rest = (
        [own[name] for name in matrices],
        [p for name, p in own.items() if name not in matrices],
    )
    options = {"nesterov": False, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(whole, lr=lr, momentum=MOMENTUM, eps=EPS, **options)
    adamw = torch.optim.AdamW(rest, lr=lr, betas=ADAMW_BETAS, eps=ADAMW_EPS, weight_decay=0.0)

    def step(_: Tensors, grads: Tensors) -> Tensors:
        for name, p in own.items():
            p.grad = grads[name]
        muon.step()
        adamw.step()
        return {name: p.clone() for name, p in own.items()}

    return step


def last_update(before: Tensors, after: Tensors, matrices: list[str], lr: float) -> Row:
    """RMS over all matrices in units of lr, as it arrived in the weights; and the mean stable rank.

    The stable rank is |U|_F^2 / |U|_2^2.

    The stable rank is in units of the rank: 1 for an orthogonal matrix, and 0 for one that did not
    move.
    """
    updates = [(before[name] - after[name]).double() / lr for name in matrices]
    squares = torch.stack([u.square().sum() for u in updates])
    spectral = torch.stack([torch.linalg.matrix_norm(u, 2) ** 2 * min(u.shape) for u in updates])
    rank = torch.where(squares > 0, squares / spectral, 0.0).mean()
    return {
        "rms": float(squares.sum() / sum(u.numel() for u in updates)) ** 0.5,
        "rank": float(rank),
    }


def study(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The loss curves, and a row for every arm and scale."""
    text = Text(args.data)
    torch.manual_seed(args.seed)
    model = GPT(len(text.characters), tie=False).to(args.device)
    start = {name: p.detach() for name, p in model.named_parameters()}
    matrices = [name for name, p in start.items() if name.startswith("blocks.") and p.ndim == 2]
    routes = {name: nm.Route("normuon") for name in matrices} | {"*": nm.Route("adamw")}
    windows = text.val[: args.windows * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT).to(args.device)

    def loss_fn(params: Tensors, tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, params, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    loss_and_grad = torch.compile(torch.func.grad_and_value(loss_fn), fullgraph=True, dynamic=False)

    def train(step: Step, scale: float, label: str) -> tuple[list[float], Tensors, Tensors]:
        """The losses, and the parameters before and after the last step."""
        generator = torch.Generator().manual_seed(args.seed)
        before, params, losses = start, start, []
        for _ in trange(args.steps, unit="step", desc=label):
            starts = torch.randint(len(text.train) - CONTEXT, (args.batch, 1), generator=generator)
            grads, loss = loss_and_grad(
                params, text.train[starts + torch.arange(CONTEXT + 1)].to(args.device)
            )
            grads = {
                name: grad * scale if name in matrices else grad for name, grad in grads.items()
            }
            before, params = params, step(params, grads)
            losses.append(loss)
        return torch.stack(losses).tolist(), before, params

    curves, rows = [], []
    for arm, config in ARMS.items():
        plan = config and nm.make_plan(start, config, routes=routes)  # compiled once for all scales
        for exponent in EXPONENTS:
            step = (
                normuon_fn_step(plan, start, args.lr)
                if plan
                else torch_step(matrices, start, args.lr)
            )
            losses, before, after = train(step, 2.0**exponent, f"{arm}, 2^{exponent}")
            if exponent == 0:
                plain = losses, after
            same = losses == plain[0] and all(
                torch.equal(after[name], plain[1][name]) for name in start
            )
            with torch.no_grad():
                val = sum(float(loss_fn(after, w)) * len(w) for w in windows.split(64)) / len(
                    windows
                )
            row = {
                "arm": arm,
                "exponent": exponent,
                "train": fmean(losses[-LAST:]),
                "val": val,
                "same": same,
            }
            rows.append(row | last_update(before, after, matrices, args.lr))
            curves += [
                {"arm": arm, "exponent": exponent, "step": k, "loss": loss}
                for k, loss in enumerate(losses, 1)
            ]
    return curves, rows


def seen(rows: list[Row], arm: str) -> str:
    """What the numbers say of an arm."""
    plain, *small = (row for row in rows if row["arm"] == arm)
    if all(row["same"] for row in small):
        return (
            f"- {arm}: the scale changes no bit, neither of any loss nor of the final parameters."
        )
    changes = []
    for row in small:
        update = (
            f"{row['rms'] / plain['rms']:.2g} times the RMS and "
            f"{row['rank'] / plain['rank']:.2g} times the stable rank"
        )
        loss = f"the validation loss changes by {row['val'] - plain['val']:+.3f}"
        changes.append(f"at 2^{row['exponent']} the last update has {update}, and {loss}")
    return fill(
        f"- {arm}, against its own run at scale 1: {'; '.join(changes)}.",
        126,
        subsequent_indent="  ",
    )


def section(facts: Row) -> str:
    table = [
        {
            "arm": row["arm"], "scale": f"2^{row['exponent']}" if row["exponent"] else "1",
            "training loss": f"{row['train']:.4f}", "validation loss": f"{row['val']:.4f}",
            "update RMS / lr": f"{row['rms']:.3g}", "stable rank / rank": f"{row['rank']:.3f}",
            "equal to scale 1, bit for bit": row["same"] if row["exponent"] else "-",
        }
        for row in facts["rows"]
    ]  # fmt: skip
    said = "\n".join(seen(facts["rows"], arm) for arm in ARMS)
    return f"""
## Small gradients

`{facts["command"]}`

{facts["measured_on"]}

Do small gradients still train the matrices? The gradients of the matrices are multiplied by
`scale`, the same factor at every step. (In NVIDIA/Megatron-LM#5394, a gradient clip brought them
to 2e-8 of their size.) AdamW's parameters (embedding, head, norms) get plain gradients in every
arm, because AdamW's eps is another matter. "Muon" is `Config(normalize=False, scale="rms")`,
which does not scale an update to a given RMS. "norm + 1e-7" replaces normuon_fn's Newton-Schulz
with a textbook one that divides by the norm plus 1e-7. NorMuon scales every update to RMS 0.2,
even one that is far from orthogonal; the stable rank shows how far. Blocks start as the identity,
so where the matrices do not move, the rest of the model still learns which character follows
which.

{said}

The training loss is the mean of the last {LAST} steps. The update is that of the last step, as it
arrived in the weights.

{markdown(table)}

![Loss curves at three scales of the gradients](small_gradients.png)
"""


def plot(curves: list[dict[str, str]], file: Path) -> None:
    figure, panels = plt.subplots(
        1, len(EXPONENTS), figsize=(12, 4.2), sharey=True, layout="constrained"
    )
    for axes, exponent in zip(panels, EXPONENTS, strict=True):
        for arm, style, width in zip(
            ARMS, ("-", "-", "-", "--", ":"), (4, 1.5, 3, 1.5, 1.5), strict=True
        ):
            losses = torch.tensor(
                [
                    float(c["loss"])
                    for c in curves
                    if c["arm"] == arm and int(c["exponent"]) == exponent
                ]
            )
            mean = losses.unfold(0, min(10, len(losses)), 1).mean(-1)  # of the last 10 batches
            axes.plot(
                range(len(losses) - len(mean) + 1, len(losses) + 1),
                mean,
                style,
                linewidth=width,
                alpha=0.4 if width > 2 else 1,
                label=arm,
            )
        axes.set(
            xlabel="step",
            title=f"matrix gradients times 2^{exponent}" if exponent else "plain gradients",
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss, nats a character")
    panels[0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of each of the 15 runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--windows", type=int, default=256, help="of validation text; they do not overlap"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="everything eager")
    parser.add_argument("--data", type=Path, default=FOLDER.parent / "data" / "shakespeare.txt")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="small_gradients.csv, .json, .png and RESULTS.md"
    )
    parser.add_argument(
        "--from-csv", action="store_true", help="table and figure from what --out holds"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    csv, facts = args.out / "small_gradients.csv", args.out / "small_gradients.json"
    if not args.from_csv:
        torch.set_flush_denormal(
            True
        )  # the eps arms at 2^-66 are full of them: 10 times as slow a step on a CPU
        torch.use_deterministic_algorithms(
            True
        )  # the embedding's backward adds in any order otherwise: no two runs alike
        if args.no_compile:
            torch.compiler.set_stance("force_eager")
        curves, rows = study(args)
        options = " ".join(
            f"--{name} {getattr(args, name)}"
            for name in ("steps", "batch", "lr", "seed", "windows", "device")
        )
        options += " --no-compile" * args.no_compile
        found = {"command": f"python -m examples.study.small_gradients {options}", "rows": rows}
        found["measured_on"] = measured_on(torch.device(args.device))
        write_csv(csv, curves)
        facts.write_text(json.dumps(found, indent=1) + "\n")
    plot(read_csv(csv), args.out / "small_gradients.png")
    text = section(json.loads(facts.read_text()))
    write_section(args.out / "RESULTS.md", "small gradients", text)
    print(text)


if __name__ == "__main__":
    main()
