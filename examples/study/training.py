"""AdamW, Muon and NorMuon on one corpus: the loss they reach, in how many tokens and what time.

    python -m examples.study.corpus --out runs/corpus.npz
    # 50 runs; several GPUs share them
    python -m examples.study.training --corpus runs/corpus.npz
    # table and figure once more, without training
    python -m examples.study.training --from-csv

First every optimizer at every learning rate of one grid, with seed 0, AdamW with and without
gradient clipping; then, each at its best, three seeds; NorMuon also in other forms, at NorMuon's
best, and over less text. One epoch; a run over less text sees the first of its shuffled windows.
The spread of a row is the largest difference between its seeds. Comparisons with AdamW are with the
better of its two.
"""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.study.common import markdown, read_csv, write_csv, write_section
from examples.study.corpus import Corpus
from examples.study.runs import FULL, Job, Result, arguments, parse, run_all

GRID = (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 8e-3)
BASELINES = ("AdamW", "AdamW, clipped")
MAIN = (*BASELINES, "Muon", "NorMuon")
FORMS = (
    "NorMuon, Gram",
    "NorMuon, standard",
    "NorMuon, guard",
    "NorMuon, bfloat16 + mantissa",
    "NorMuon, bfloat16 alone",
)
SHORTER = (0.75,)
SEEDS = (0, 1, 2)
COMMAND = "python -m examples.study.training --corpus runs/corpus.npz"


def name_of(job: Job) -> str:
    return job.variant if job.length == 1 else f"{job.variant}, {job.length:.0%} of the text"


def grid_jobs() -> list[Job]:
    return [Job(variant, lr, 0) for variant in MAIN for lr in GRID]


def best_of(grid: dict[Job, Result]) -> dict[str, float]:
    """The learning rate with the lowest loss, by optimizer."""
    finite = [r for r in grid.values() if math.isfinite(r.loss)]
    return {
        v: min((r for r in finite if r.job.variant == v), key=lambda r: r.loss).job.lr for v in MAIN
    }


def seed_jobs(best: dict[str, float]) -> list[Job]:
    jobs = [Job(variant, best[variant], seed) for variant in MAIN for seed in SEEDS]
    jobs += [Job("NorMuon", best["NorMuon"], seed, length) for length in SHORTER for seed in SEEDS]
    return jobs + [Job(variant, best["NorMuon"], seed) for variant in FORMS for seed in SEEDS]


def step_of(loss: float, val: list[tuple[int, float]]) -> float | None:
    """The step at which the validation loss first is ``loss``; None if never.

    Between two looks the loss is taken as a straight line.
    """
    for (before, high), (after, low) in pairwise(val):
        if low <= loss:
            return (
                before if high <= loss else before + (after - before) * (high - loss) / (high - low)
            )
    return None


def study(
    grid: dict[Job, Result],
    seeds: dict[Job, Result],
    corpus: str,
    validated: int,
    command: str = COMMAND,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the tables say, and the rows of the curves."""
    by_name: dict[str, list[Result]] = {}
    for job, result in seeds.items():
        by_name.setdefault(name_of(job), []).append(result)
    mean = {name: statistics.mean(r.loss for r in results) for name, results in by_name.items()}
    baseline = min(BASELINES, key=lambda name: mean[name])
    goal, base = mean[baseline], by_name[baseline]
    # What a step takes depends on neither rate nor seed: the fastest of all that were captured.
    every = {**grid, **seeds}.values()
    captured = {
        name: [r for r in every if r.job.variant == results[0].job.variant and r.captured]
        for name, results in by_name.items()
    }
    step = {name: min((r.step_ms for r in some), default=None) for name, some in captured.items()}
    optimizer = {
        name: min((r.optimizer_ms for r in some), default=None) for name, some in captured.items()
    }
    rows = []
    for name, results in by_name.items():
        losses = sorted(r.loss for r in results)
        reached = [step_of(goal, r.val) for r in results]
        at = None if None in reached else statistics.mean(s for s in reached if s is not None)
        took, part = step[name], optimizer[name]
        whole = base[0].steps * step[baseline] if step[baseline] else None
        pairs = list(zip(results, by_name["Muon"], strict=True))
        apart = "yes" if _apart(results, base) else "no"
        parts = [f"{s / base[0].steps:.1%}" for s in reached if s]
        rows.append({
            "run": name, "lr": results[0].job.lr, "loss": f"{mean[name]:.4f}",
            "seeds": " ".join(f"{r.loss:.4f}" for r in results),
            "spread": f"{losses[-1] - losses[0]:.4f}",
            "to AdamW": f"{mean[name] - goal:+.4f}",
            "to Muon, by seed": " ".join(f"{a.loss - b.loss:+.4f}" for a, b in pairs),
            "apart from AdamW": "-" if name == baseline else apart,
            "tokens to AdamW's loss": "-" if at is None else f"{at / base[0].steps:.1%}",
            "tokens, by seed": "-" if at is None else " ".join(parts),
            "time to AdamW's loss": "-" if None in (at, took) else f"{at * took / whole:.1%}",
            "ms a step": f"{took:.2f}" if took else "-",
            "optimizer, ms": f"{part:.2f}" if took else "-",
            "optimizer": f"{part / took:.1%}" if took else "-",
        })  # fmt: skip
    lrs = [{"lr": lr, **{v: f"{grid[Job(v, lr, 0)].loss:.4f}" for v in MAIN}} for lr in GRID]
    plain, guarded = by_name["NorMuon"], by_name["NorMuon, guard"]
    same = all(a.digest == b.digest for a, b in zip(plain, guarded, strict=True))
    gram, standard = by_name["NorMuon, Gram"], by_name["NorMuon, standard"]
    about = {
        "on": base[0].on, "corpus": corpus, "parameters": base[0].parameters,
        "steps": base[0].steps,
        "tokens a step": base[0].tokens, "validated": validated, "rows": rows, "grid": lrs,
        "guard keeps the bits": same,
        "Gram and standard apart": _apart(gram, standard), "baseline": baseline, "command": command,
    }  # fmt: skip
    named = [(name, r) for name, results in by_name.items() for r in results]
    curves = [
        {"run": name, "lr": r.job.lr, "seed": r.job.seed, "step": step, "loss": f"{loss:.5f}"}
        for name, r in [*named, *((f"grid {job.variant}", r) for job, r in grid.items())]
        for step, loss in r.val
    ]
    return about, curves


def _apart(a: list[Result], b: list[Result]) -> bool:
    """Whether every seed of one is on the same side of every seed of the other."""
    a_losses, b_losses = [r.loss for r in a], [r.loss for r in b]
    return max(a_losses) < min(b_losses) or max(b_losses) < min(a_losses)


def section(about: dict[str, Any]) -> str:
    forms = (
        "beyond the spread of the seeds"
        if about["Gram and standard apart"]
        else "within the spread of the seeds"
    )
    epoch = ", one epoch" if about["command"] == COMMAND else ""
    same = "have" if about["guard keeps the bits"] else "do NOT have"
    return f"""
## Training

`{about["command"]}`

{about["on"]}.

{about["corpus"]}.

GPT of {about["parameters"] / 1e6:.1f} million parameters, {about["steps"]} steps of
{about["tokens a step"]:,} tokens{epoch}, bfloat16 autocast; linear warm-up over 5 % of the steps,
then linear decay to 0; weight decay 0.1, but none on norms. Losses are nats per token, on the first
{about["validated"]:,} tokens of the validation text. The rates were chosen on the same text with
seed 0, which is one of the three seeds below.

All optimizers are normuon_fn's own. In every row AdamW, with betas 0.9 and 0.95, steps the
embedding, the head and the norms at the learning rate of the row. The names of the rows:

- "clipped": the norm of all gradients together is at most 1. No other row is clipped.
- "Muon" is `Config(normalize=False)`: NorMuon without its variance. Every update has RMS 0.2, and
  there is no Nesterov momentum.
- "NorMuon" is `Config()`, which takes the Gram form of Newton-Schulz for wide and tall matrices and
  the standard form for square ones. "Gram" and "standard" take one form for all of them.
- "guard" is `guard="full"`. "bfloat16" has all parameters in bfloat16, "+ mantissa" with
  `master="mantissa"`.

![validation loss by tokens](training.png)

{markdown(about["rows"])}

How to read the columns:

- `loss` is the mean of three seeds, and `spread` the largest difference between them.
- `to AdamW` is the loss minus AdamW's, and `to Muon, by seed` each loss minus Muon's with the same
  seed. `apart from AdamW` says whether all seeds of the row are on one side of all of AdamW's.
  Here and in the next columns AdamW means the better of its two rows, "{about["baseline"]}".
- `tokens to AdamW's loss` is the share of AdamW's tokens after which the validation loss first
  reaches AdamW's final loss. Every run's rate decays over its full length, so it gets there before
  the end of its schedule. Between evaluations (every {about["steps"] // FULL.evaluations} steps)
  the loss is interpolated linearly. `time to AdamW's loss` multiplies that share by the ratio of
  the times per step. `-`: not every seed reached it.
- `ms a step` is time on the device: the median of a run's last 100 steps, for the fastest run of
  this optimizer at any rate, with its step in a captured graph. `optimizer` is the optimizer's part
  of it, with the copy of all gradients to where the graph reads them. Differences of less than 1 %
  between two rows are noise.

What it shows beyond the table: runs with the guard {same} bit for bit the parameters of those
without it, for all seeds. The difference between Gram and standard Newton-Schulz is {forms}.

What it does not show: this is one token per parameter, and models are trained on far more. AdamW
might come closer with rates of its own for embedding and head, with other betas or with another
clip. The other optimizers were not clipped, and the grid has no rate between 0.004 and 0.008. The
paper reports 21.7 % better training efficiency than Adam and 11.3 % than Muon at 1.1 billion
parameters (arXiv 2510.05491); here the step from Muon to NorMuon is small.

The grid, with seed 0. The best rate of each column is the one used above; all forms of NorMuon use
NorMuon's:

{markdown(about["grid"])}
"""


def plot(curves: list[dict[str, str]], about: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    shown = [*MAIN, *(name_of(Job("NorMuon", 0.0, 0, length)) for length in SHORTER)]
    for k, name in enumerate(shown):
        for seed in SEEDS:
            points = [
                (int(c["step"]), float(c["loss"]))
                for c in curves
                if c["run"] == name and int(c["seed"]) == seed
            ]
            tokens, losses = (
                [step * about["tokens a step"] / 1e6 for step, _ in points],
                [loss for _, loss in points],
            )
            axes[0].plot(
                tokens, losses, color=f"C{k}", linewidth=1, label=name if seed == 2 else None
            )
    goal = next(float(row["loss"]) for row in about["rows"] if row["run"] == about["baseline"])
    low = min(float(row["loss"]) for row in about["rows"])
    axes[0].axhline(goal, color="gray", linestyle=":", linewidth=1, label="AdamW at the end")
    axes[0].set(
        xlabel="tokens, millions",
        ylabel="validation loss, nats a token",
        title="Three seeds each, each at its best rate",
    )
    axes[0].set_ylim(0.97 * low, 1.65 * low)
    for k, variant in enumerate(MAIN):
        losses = [float(row[variant]) for row in about["grid"]]
        axes[1].plot(
            [f"{row['lr']:g}" for row in about["grid"]], losses, "o-", color=f"C{k}", label=variant
        )
    top = 1.2 * low
    above = [
        f"{v} {row[v]} at {row['lr']:g}"
        for row in about["grid"]
        for v in MAIN
        if float(row[v]) > top
    ]
    axes[1].set(
        xlabel="peak learning rate", ylabel="validation loss at the end", title="The grid, seed 0"
    )
    axes[1].set_ylim(0.95 * low, top)
    if above:
        axes[1].text(
            0.02,
            0.97,
            "\n".join(["above:", *above]),
            transform=axes[1].transAxes,
            va="top",
            fontsize=8,
        )
    for axis, place in zip(axes, ("upper right", "lower left"), strict=True):
        axis.grid(alpha=0.3)
        axis.legend(loc=place)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    args, options, command = parse(arguments(__doc__), COMMAND)
    if not args.from_csv:
        grid = run_all(grid_jobs(), options)
        seeds = run_all(seed_jobs(best_of(grid)), options)
        about, curves = study(
            grid,
            seeds,
            str(Corpus.load(args.corpus)),
            options.size.windows * options.size.context,
            command,
        )
        write_csv(args.out / "training.csv", curves)
        (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    about = json.loads((args.out / "training.json").read_text())
    plot(read_csv(args.out / "training.csv"), about, args.out / "training.png")
    write_section(args.out / "RESULTS.md", "training", section(about))
    print(section(about))


if __name__ == "__main__":
    main()
