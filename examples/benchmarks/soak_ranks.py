"""Whether a run of several ranks keeps working: faults, a killed rank, restarts, checkpoints.

    python examples/benchmarks/soak_ranks.py                          # 2000 steps, eager
    python examples/benchmarks/soak_ranks.py --compile                # the same, as compiled graphs
    python examples/benchmarks/soak_ranks.py --steps 40 --json out.json

Two ranks (gloo) train small matrices with `step_` and guard "full":

    steps    0 %          35 %        50 %     60 %         75 %        80 %     100 %
    ranks    2            2 again     1        4            4 again     2
             rank 1 is killed                  rank 2 is killed

- In 2 of 100 steps one rank has a NaN or an infinity in one entry of one gradient; which rank, and
  in which parameter, changes. All ranks must skip that step.
- 20 times in a run (10 times in less than 200 steps) everything is saved by
  torch.distributed.checkpoint, overwritten with NaN and loaded again. A killed rank costs the steps
  since then, which are repeated.
- The ranks that outlive a killed one must end with an error that names the collective.
- The same steps without those that were skipped, on one process that is never disturbed, must give
  the same bits of every parameter and every state, at every checkpoint. (Compiled, the last bits of
  a sum depend on the graph, and the graph on the number of ranks: they may differ by rounding.)
- Memory must be flat: the number of tensors that Python knows, and the resident memory.

The gradients are computed entry by entry from the parameters, so that the ranks need no collective
of their own for them: the bits of a sum depend on how many ranks add.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import normuon_fn as nm

SHAPES: dict[str, tuple[tuple[int, ...], Placement]] = {
    "embed.weight": ((32, 16), Shard(0)),
    "first.weight": ((24, 16), Shard(0)),
    "second.weight": ((16, 24), Shard(1)),
    "square.weight": ((16, 16), Shard(0)),
    "experts": ((4, 8, 12), Shard(0)),
    "bias": ((16,), Replicate()),
}
FAULTS = 0.02  # share of the steps
TIMEOUT = timedelta(seconds=60)
RSS_MAY_GROW = 4.0  # MB, within one episode of a rank
ROUNDING = 1e-4  # compiled, largest difference of any entry; 5e-7 to 1e-6 was seen


class Episode(NamedTuple):
    """What a number of ranks does, from the last checkpoint on."""

    ranks: int
    until: float  # share of the run
    killed: int | None = None  # this rank, at the end, before anything is saved


EPISODES = [
    Episode(2, 0.35, killed=1), Episode(2, 0.5), Episode(1, 0.6), Episode(4, 0.75, killed=2),
    Episode(4, 0.8), Episode(2, 1.0),
]  # fmt: skip


class Fault(NamedTuple):
    rank: int
    name: str
    value: float


def between_checkpoints(steps: int) -> int:
    """How many steps; every episode that no rank ends begins and ends with a checkpoint."""
    return steps // (20 if steps >= 200 else 10)


def fault_at(step: int, steps: int, ranks: int) -> Fault | None:
    """The same for every world, but for the rank."""
    drawn = torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(step)).tolist()
    share = max(FAULTS, 4 / steps)  # a short run has some too
    if drawn[0] >= share * 2**31:
        return None
    names, values = list(SHAPES), (float("nan"), float("inf"), float("-inf"))
    return Fault(drawn[1] % ranks, names[drawn[2] % len(names)], values[drawn[3] % len(values)])


class Run:
    """Parameters, state, and steps that are the same on any number of ranks."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step, self.faults = steps, 0, 0
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu") if self.ranks > 1 else None
        self.targets, self.params = self.drawn(1), self.drawn(2)
        # float32: where a CPU has units for bfloat16, the bits of a product depend on how many
        # matrices are multiplied at once, and so on the number of ranks.
        config = nm.Config(guard="full", orthogonalize_dtype=torch.float32)
        self.plan = nm.make_plan(self.params, config)
        self.state = nm.init(self.params, self.plan)
        self.hyper = nm.Hyper.of(self.params, lr=0.02, weight_decay=0.01, adamw_lr=0.01)

    def drawn(self, seed: int) -> dict[str, Tensor]:
        """Random tensors. Every rank draws the whole and keeps its part: nothing is sent."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, (shape, placement) in SHAPES.items():
            whole = torch.randn(shape, generator=generator)
            if self.mesh is not None:
                whole = distribute_tensor(whole, self.mesh, [placement], src_data_rank=None)
            found[name] = whole
        return found

    def grads(self) -> dict[str, Tensor]:
        """Of the squared distance to the targets, with noise; NaN or infinity where it is planned.

        A fault is on one rank: for a replicated parameter, the others do not have it.
        """
        noise = self.drawn(1000 + self.step)
        grads = {name: p - self.targets[name] + noise[name] for name, p in self.params.items()}
        fault = fault_at(self.step, self.steps, self.ranks)
        if fault is not None:
            self.faults += 1
            if fault.rank == self.rank:
                local(grads[fault.name]).view(-1)[0] = fault.value
        return grads

    def advance(self) -> None:
        self.step += 1
        nm.step_(self.params, self.grads(), self.state, self.hyper, self.plan)

    @property
    def saved(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state}

    def save(self, folder: Path) -> None:
        """Saves everything, forgets it and loads it again."""
        target = folder / str(self.step)
        dcp.save(self.saved, checkpoint_id=target)
        for x in (*self.params.values(), *self.state.values()):
            local(x).fill_(float("nan") if x.is_floating_point() else -1)
        self.load(target)

    def load(self, target: Path) -> None:
        dcp.load(self.saved, checkpoint_id=target)
        self.step = int(target.name)

    def distance(self) -> float:
        """To the targets: the mean square over this rank's entries."""
        pairs = [(local(p), local(self.targets[name])) for name, p in self.params.items()]
        return float(torch.cat([(p - t).view(-1) for p, t in pairs]).square().mean())


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def memory() -> dict[str, float]:
    """Resident MB, and how many tensors there are that were made since this process was forked.

    A thread of gloo holds those of the last message for some milliseconds after its end.
    """
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = []
    for _ in range(3):
        counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
        time.sleep(0.05)
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "tensors": min(counts)}


# ------------------------------------------------------------------------------------------ ranks


def episode(folder: Path, steps: int, start: int, until: int, killed: int | None) -> dict[str, Any]:
    """What one rank did and saw."""
    run = Run(steps)
    if start:
        run.load(folder / str(start))
    samples, error, began = [], "", time.monotonic()
    try:
        while run.step < until:
            if killed == run.rank and run.step == until - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            run.advance()
            if run.step % between_checkpoints(steps) == 0:
                run.save(folder)
                samples.append({"step": run.step, **memory()})
    except RuntimeError as found:
        error = str(found)
    return {
        "steps": run.step - start, "faults": run.faults, "error": error, "samples": samples,
        "skipped": int(run.state["guard.skipped"]), "seconds": time.monotonic() - began,
    }  # fmt: skip


def undisturbed(folder: Path, steps: int) -> dict[str, Any]:
    """One process: no fault, no restart, and nothing is loaded."""
    run, first = Run(steps), 0.0
    folder.mkdir()
    for step in range(1, steps + 1):
        if fault_at(step, steps, 1) is None:
            run.advance()
        else:  # the others skip it
            run.step += 1
        first = first or run.distance()
        if step % between_checkpoints(steps) == 0:
            torch.save(run.saved, folder / str(step))
    return {"first": first, "last": run.distance()}


def forked(ranks: int, folder: Path, main: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``main`` returned on every rank that ended by itself."""
    folder.mkdir(parents=True)
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
                    timeout=TIMEOUT,
                )  # fmt: skip
                (folder / f"{rank}.json").write_text(json.dumps(main()))
                code = 0
            except BaseException as error:
                sys.stderr.write(f"{folder.name}, rank {rank}: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(code)
    for pid in pids:
        os.waitpid(pid, 0)
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


# --------------------------------------------------------------------------------------- the whole


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """What every episode's ranks saw, and how far each checkpoint is from the undisturbed run's."""
    every, found, start = between_checkpoints(steps), [], 0
    saved, alone = folder / "saved", folder / "alone"
    for number, each in enumerate(EPISODES):
        until = round(each.until * steps)
        main = functools.partial(episode, saved, steps, start, until, each.killed)
        seen = forked(each.ranks, folder / f"episode {number}", main)
        found.append({"ranks": each.ranks, "killed": each.killed, "from": start, "seen": seen})
        start = (until - (each.killed is not None)) // every * every
    (trained,) = forked(1, folder / "one", functools.partial(undisturbed, alone, steps))
    checked = range(every, steps + 1, every)
    faults = sum(fault_at(step, steps, 1) is not None for step in range(1, steps + 1))
    return {
        "steps": steps, "faults": faults, "episodes": found, "trained": trained,
        "differences": [difference(saved / str(step), alone / str(step)) for step in checked],
    }  # fmt: skip


def difference(saved: Path, alone: Path) -> float | None:
    """The largest of any entry; None where the bits are the same."""
    whole = torch.load(alone)
    tensors = {part: {k: torch.empty_like(x) for k, x in whole[part].items()} for part in whole}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=saved, no_dist=True)
    pairs = []
    for each in (tensors, whole):
        counters = [each["state"].pop(f"guard.{x}") for x in ("step", "skipped", "consecutive")]
        each["state"]["applied"] = counters[0] - counters[1]
        flat = {f"{part}.{name}": x for part in each for name, x in each[part].items()}
        pairs.append([flat[name].reshape(-1) for name in sorted(flat)])
    both = list(zip(*pairs, strict=True))
    if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in both):
        return None
    return max(float((a.double() - b.double()).abs().max()) for a, b in both)


def claims(found: dict[str, Any], compiled: bool) -> list[tuple[str, str, bool]]:
    """What was claimed, what was seen, and whether it holds."""
    episodes, steps = found["episodes"], found["steps"]
    ranks = [rank for each in episodes for rank in each["seen"]]
    errors = [rank["error"] for rank in ranks if rank["error"]]
    named = sum(" failed on rank " in error for error in errors)
    survivors = sum(each.ranks - 1 for each in EPISODES if each.killed is not None)
    reached = {episodes[-1]["from"] + rank["steps"] for rank in episodes[-1]["seen"]}
    skipped = {rank["skipped"] for rank in episodes[-1]["seen"]}
    first, last = found["trained"]["first"], found["trained"]["last"]
    differences = found["differences"]
    differing = [x for x in differences if x is not None]
    same, of = len(differences) - len(differing), len(differences)
    tensors = max(grown(rank["samples"], "tensors") for rank in ranks)
    rss = max(grown(rank["samples"], "rss") for rank in ranks)
    bits = f"{same} of {of}" + (f", else up to {max(differing):.1e}" if differing else "")
    return [
        ("checkpoints with the bits of the undisturbed run", bits,
         same == of or (compiled and all(x < ROUNDING for x in differing))),
        ("the last step", " ".join(map(str, reached)), reached == {steps}),
        ("skipped steps of every rank, faults", f"{skipped}, {found['faults']}",
         skipped == {found["faults"]}),
        ("survivors whose error names the collective", f"{named} of {survivors}",
         named == survivors == len(errors)),
        ("squared distance to the targets, first and last", f"{first:.2f}, {last:.2f}",
         last < first),
        ("tensors more than at an episode's second checkpoint", f"{tensors:g}", tensors == 0),
        ("resident memory more than there (MB, of any rank)", f"{rss:.1f}", rss <= RSS_MAY_GROW),
    ]  # fmt: skip


def grown(samples: list[dict[str, float]], kind: str) -> float:
    """From the second checkpoint of an episode on, when all that is made once has been made."""
    counted = [sample[kind] for sample in samples[1:]]
    return max(counted) - counted[0] if counted else 0.0


def report(found: dict[str, Any], compiled: bool, seconds: float) -> str:
    """A page of Markdown."""
    lines = [
        f"{found['steps']} steps, {'compiled' if compiled else 'eager'}, {len(EPISODES)} episodes, "
        f"{found['faults']} faults, {seconds:.0f} s "
        f"({os.cpu_count()} {platform.machine()} CPU cores, torch {torch.__version__}, normuon_fn "
        f"{nm.__version__}, python {platform.python_version()}, {date.today()})",
        "", "| ranks | from step | steps | killed | rss grew (MB) | tensors |", "|" + " --- |" * 6,
    ]  # fmt: skip
    for each in found["episodes"]:
        seen = each["seen"]
        rss = " ".join(f"{grown(x['samples'], 'rss'):.1f}" for x in seen)
        tensors = sorted({int(s["tensors"]) for x in seen for s in x["samples"][1:]})
        cells = (
            each["ranks"], each["from"], max(x["steps"] for x in seen),
            "" if each["killed"] is None else f"rank {each['killed']}", rss,
            " to ".join(map(str, sorted({*tensors[:1], *tensors[-1:]}))),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| claim | seen | holds |", "| --- | --- | --- |"]
    for claim, seen, holds in claims(found, compiled):
        lines.append(f"| {claim} | {seen} | {'yes' if holds else 'no'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--compile", action="store_true", help="compiled steps, not eager ones")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, and stay")
    parser.add_argument("--json", type=Path, help="a file for all that was seen")
    given = parser.parse_args()
    if given.steps < 20 or given.steps % 20:
        parser.error(f"--steps: expected a multiple of 20, got {given.steps}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch asks for devices, and may not after a fork
    torch.set_num_threads(1)  # forked processes must have no threads of the one before
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.set_stance("default" if given.compile else "force_eager")
    torch.compile(torch.sin)  # imports what every rank would import again
    gc.freeze()  # tensors are counted among what is made from now on
    folder, began = given.folder or Path(tempfile.mkdtemp(prefix="soak_ranks")), time.monotonic()
    try:
        found = soak(folder, given.steps)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    print(report(found, given.compile, time.monotonic() - began))
    return int(not all(holds for _, _, holds in claims(found, given.compile)))


if __name__ == "__main__":
    sys.exit(main())
