"""Runs an example, and prints how many threads there were before it ended its process group, and
how many when the interpreter is about to shut down.

    python threads_left.py examples/train_fsdp2.py --steps 20
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch.distributed as dist


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


destroy, before = dist.destroy_process_group, []


def counted() -> None:
    before.append(threads())
    destroy()


if __name__ == "__main__":
    dist.destroy_process_group = counted
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if it had been started alone
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.write(f"threads: {before[0]}, then {threads()}\n")  # in one piece
