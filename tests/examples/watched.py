"""Runs pretrain.py or train_ddp.py, and shows what a test wants to know of it.

    python watched.py examples/train_ddp.py --steps 20

It prints how many threads there were before the process group ended, and how many when the
interpreter is about to shut down, or that it does not shut down. ``NAN_AT``: the last rank's loss
is NaN at this step. ``BOARD``: "none" for no TensorBoard, "stand-in" for the class below; without
it, what is installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


class SummaryWriter:
    """What pretrain.py calls of torch's class. It writes when it is closed, and not before."""

    def __init__(self, log_dir: Path, comment: str = "", purge_step: int | None = None) -> None:
        self.file, self.lines = Path(log_dir) / "board.jsonl", [{"purge": purge_step}]

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.lines.append({"tag": tag, "value": float(scalar_value), "step": int(global_step)})

    def close(self) -> None:
        with self.file.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)


def scalars(file: Path) -> dict[str, dict[int, float]]:
    """By tag and step what a reader of the stand-in's file shows, as TensorBoard does."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        if "purge" in line:
            for steps in found.values() if line["purge"] is not None else ():
                for step in [k for k in steps if k >= line["purge"]]:
                    del steps[step]
        else:
            found.setdefault(line["tag"], {})[line["step"]] = line["value"]
    return found


def take_board(name: str | None) -> None:
    """What ``from torch.utils.tensorboard import SummaryWriter`` finds in this process."""
    if name == "none":
        sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    elif name == "stand-in":
        sys.modules["torch.utils.tensorboard"] = stand_in = ModuleType("tensorboard")
        stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]


def numbers_of(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars in TensorBoard's events, or in the file of the stand-in."""
    if (folder / "board.jsonl").exists():
        return scalars(folder / "board.jsonl")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def main() -> None:
    destroy, before = dist.destroy_process_group, [0]

    def counted() -> None:
        before[0] = threads()
        destroy()

    def ended(code: int) -> None:
        sys.stdout.write("no shutdown\n")
        sys.stdout.flush()
        leave(code)

    leave, os._exit = os._exit, ended  # type: ignore[assignment]
    dist.destroy_process_group = counted
    take_board(os.environ.get("BOARD"))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if it had been started alone
    pretrain = importlib.import_module("pretrain")
    example = importlib.import_module(Path(sys.argv[0]).stem)

    class Watched(example.Trainer):  # type: ignore[misc, name-defined]
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            loss = super().loss(batch)
            bad = torch.is_grad_enabled() and str(self.step) == os.environ.get("NAN_AT")
            return loss * float("nan") if bad and self.rank == self.ranks - 1 else loss

    pretrain.main(Watched)
    sys.stdout.write(f"threads: {before[0]}, then {threads()}\n")  # in one piece


if __name__ == "__main__":
    main()
