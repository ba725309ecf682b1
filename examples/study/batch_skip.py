"""What bad batches cost: a NaN in one gradient at some steps, with the guard and without.

At 0.1 % of the steps and at 1 %.

    python -m examples.study.corpus --out runs/corpus.npz
    # 4e-3: the best rate of examples.study.training
    python -m examples.study.batch_skip --corpus runs/corpus.npz --lr 4e-3
    # table and figure once more, without training
    python -m examples.study.batch_skip --from-csv

One entry of one gradient is NaN, as a flipped bit or a bad kernel leaves it. With
`Config(guard="full")` such a step changes nothing, so that what it costs is its batch.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.study.common import markdown, read_csv, write_csv, write_section
from examples.study.corpus import Corpus
from examples.study.runs import Job, Result, arguments, parse, run_all

RATES = (0.001, 0.01)
COMMAND = "python -m examples.study.batch_skip --corpus runs/corpus.npz"
SEEDS = (0, 1, 2)


def jobs(lr: float) -> dict[str, list[Job]]:
    """By row of the table."""
    guarded = {
        rate: [Job("NorMuon, guard", lr, seed, faults=rate) for seed in SEEDS] for rate in RATES
    }
    return {
        "no faults": [Job("NorMuon, guard", lr, seed) for seed in SEEDS],
        **{f"{rate:.1%} of the steps, guard full": found for rate, found in guarded.items()},
        f"{RATES[0]:.1%} of the steps, guard off": [Job("NorMuon", lr, SEEDS[0], faults=RATES[0])],
    }


def study(
    found: dict[str, list[Result]], corpus: str, lr: float, command: str = COMMAND
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    by_seed = {r.job.seed: r.loss for r in found["no faults"]}
    clean = statistics.mean(by_seed.values())
    rows = []
    for name, results in found.items():
        losses = [r.loss for r in results]
        alive = all(map(math.isfinite, losses))
        more = [f"{r.loss - by_seed[r.job.seed]:+.4f}" for r in results]
        rows.append({
            "faults": name, "loss": f"{statistics.mean(losses):.4f}" if alive else "dead",
            "seeds": " ".join(f"{loss:.4f}" for loss in losses),
            "spread": f"{max(losses) - min(losses):.4f}" if alive else "-",
            "to the clean runs": f"{statistics.mean(losses) - clean:+.4f}" if alive else "-",
            "by seed": " ".join(more) if alive else "-",
            "NaNs": " ".join(str(r.faults) for r in results),
            "skipped": " ".join(str(r.skipped) for r in results),
        })  # fmt: skip
    first = found["no faults"][0]
    about = {
        "on": first.on,
        "corpus": corpus,
        "lr": lr,
        "steps": first.steps,
        "rows": rows,
        "command": command,
    }
    curves = [
        {"faults": name, "seed": r.job.seed, "step": step, "loss": f"{loss:.5f}"}
        for name, results in found.items()
        for r in results
        for step, loss in r.val
    ]
    return about, curves


def section(about: dict[str, Any]) -> str:
    return f"""
## Skipped batches

`{about["command"]} --lr {about["lr"]:g}`

{about["on"]}.

{about["corpus"]}.

{about["steps"]} steps of the training study's NorMuon. At some of them, drawn at random step by
step, one gradient has a NaN. `to the clean runs` and `by seed` are differences of losses: of the
means, and of each run from the clean run with the same seed.

![validation loss with and without faults](batch_skip.png)

{markdown(about["rows"])}
"""


def plot(curves: list[dict[str, str]], file: Path) -> None:
    figure, axes = plt.subplots(
        2, figsize=(8, 7), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    points: dict[tuple[str, str], dict[int, float]] = {}
    for c in curves:
        points.setdefault((c["faults"], c["seed"]), {})[int(c["step"])] = float(c["loss"])
    names = list(dict.fromkeys(name for name, _ in points))
    for (name, seed), losses in points.items():
        color, label = f"C{names.index(name)}", name if seed == "0" else None
        alive = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        axes[0].plot(list(alive), list(alive.values()), color=color, linewidth=1, label=label)
        clean = points["no faults", seed]
        axes[1].plot(
            list(alive),
            [loss - clean[step] for step, loss in alive.items()],
            color=color,
            linewidth=1,
        )
        if len(alive) < len(losses):
            step = max(alive, default=0)
            axes[0].plot(
                step, alive.get(step, math.nan), "x", color=color, markersize=10, markeredgewidth=3
            )
    axes[0].set(
        ylabel="validation loss, nats a token",
        title="A NaN in one gradient, now and then; x: the last finite look",
    )
    axes[1].set(xlabel="step", ylabel="less the clean run\nof the same seed")
    axes[0].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lr", type=float, default=4e-3)
    args, options, command = parse(parser, COMMAND)
    if not args.from_csv:
        wanted = jobs(args.lr)
        results = run_all([job for some in wanted.values() for job in some], options)
        found = {name: [results[job] for job in some] for name, some in wanted.items()}
        about, curves = study(found, str(Corpus.load(args.corpus)), args.lr, command)
        write_csv(args.out / "batch_skip.csv", curves)
        (args.out / "batch_skip.json").write_text(json.dumps(about, indent=1) + "\n")
    about = json.loads((args.out / "batch_skip.json").read_text())
    plot(read_csv(args.out / "batch_skip.csv"), args.out / "batch_skip.png")
    write_section(args.out / "RESULTS.md", "batch skip", section(about))
    print(section(about))


if __name__ == "__main__":
    main()
