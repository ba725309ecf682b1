"""Draw the metrics of a run's TensorBoard log: how the step treats every parameter.

    python examples/pretrain.py --steps 200 --log-every 5 --out runs/metrics
    python examples/plot_metrics.py runs/metrics --out examples/metrics.png

Needs `pip install tensorboard`. Every panel is a metric of `nm.report_metrics`, and every line a
parameter. Without --all these are the embeddings, the head and the matrices of the first block.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "update_rms": "update RMS",
    "grad_rms": "gradient RMS",
    "momentum_rms": "momentum RMS",
    "weight_norm": "weight norm",
    "update_ratio": "norm of update / weights",
    "variance_spread": "spread of the neurons' variances",
}
Lines = dict[str, dict[str, list[tuple[int, float]]]]  # by metric and parameter: (step, number)


def lines_of(folder: Path) -> Lines:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    found: Lines = {metric: {} for metric in PANELS}
    for tag in sorted(events.Tags()["scalars"]):
        metric, _, parameter = tag.partition("/")
        if metric in found:
            found[metric][parameter] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def picture(lines: Lines, file: Path, chosen: list[str]) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for k, parameter in enumerate(chosen):
            points = lines[metric].get(parameter, [])
            axes.plot(*zip(*points, strict=True) if points else ((), ()), color=f"C{k}")
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    handles = [Figure().subplots().plot([], color=f"C{k}")[0] for k in range(len(chosen))]
    figure.legend(handles, chosen, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("log", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("metrics.png"))
    parser.add_argument("--all", action="store_true", help="every parameter")
    args = parser.parse_args()
    lines = lines_of(args.log)
    names = list(lines["update_rms"])
    if not names:
        parser.error(f"{args.log}: no scalar is called update_rms/PARAMETER there")
    first = [n for n in names if "norm" not in n and ("blocks.0." in n or "blocks." not in n)]
    picture(lines, args.out, names if args.all else first)
    print(args.out)


if __name__ == "__main__":
    main()
