"""Every table of RESULTS.md for one device, at one commit: each benchmark in turn, its output kept.

    python examples/benchmarks/all_tables.py --out tables     # on a GPU, perhaps half an hour
    python examples/benchmarks/all_tables.py --out tables --only suite,scale
    # what does not fit is cut off
    python examples/benchmarks/all_tables.py --out tables --seconds 550

A file for each in ``--out``, with the command in its first line. Nothing else should run on the
device meanwhile. Peers join where they can be imported: see step.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RANDOM = ("--only", "graph", "--guard", "off", "--no-peers", "--no-first-step")
MOMENTUMS = ("--only", "momentum", "--guard", "off", "--no-peers", "--no-first-step")
OURS = ("--rounds", "4", "--no-orthogonalize")
# By name: the script and its arguments, in the order in which they run.
TABLES: dict[str, tuple[str, ...]] = {
    "suite": ("-m", "pytest", "-q", "-n", "16", "--dist", "loadfile", "--no-loadscope-reorder"),
    "bars": ("step.py", "--bars", "--seconds", "400", "--plot", "{out}/step.png"),
    "clock": ("clock.py", "--seconds", "1"),
    **{
        f"random_{seed}": ("step.py", "--workload", f"random:{seed}", *RANDOM, *OURS)
        for seed in (1, 2, 3)
    },
    "momentums": (
        *("step.py", "--workload", "1.3b", *MOMENTUMS, *OURS),
        *("--momentum-dtype", "bfloat16,int8,float32"),
    ),
    "offload": ("offload.py",),
    "streamed": ("offload.py", "--streamed"),
    "variants": ("variants.py",),
    "scale": ("scale.py", "--matrices", "72,288,1000,4000"),
    "shared_device": ("shared_device.py",),
}


def command_of(name: str, out: Path) -> list[str]:
    first, *rest = (part.format(out=out) for part in TABLES[name])
    return [sys.executable, first if first == "-m" else str(HERE / first), *rest]


def run(name: str, out: Path, seconds: float) -> str:
    """What became of it. Its output is in ``out`` as far as it came."""
    command = command_of(name, out)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (out / f"{name}.txt").open("w") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            ended = "cut off"
    return f"{ended} after {time.monotonic() - start:.0f} s"


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in TABLES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(TABLES)}, got {unknown}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder, made where it is missing"
    )
    parser.add_argument("--only", type=names, default=[*TABLES], help=f"of {', '.join(TABLES)}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all together")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"commit {commit or 'unknown'}, torch {torch.__version__}, {device}", flush=True)
    whole = True
    for name in args.only:
        left = until - time.monotonic()
        ended = run(name, out, left) if left > 0 else "left out: the time was over"
        whole = whole and ended.startswith("exit code 0 ")
        print(f"{name}: {ended}", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
