"""What the variants cost beside NorMuon: milliseconds per step, bytes of state, peak memory.

python examples/benchmarks/variants.py                    # under 90 s on a GPU
python examples/benchmarks/variants.py --size 64 --count 2 --steps 3   # anywhere
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import normuon_fn as nm

VARIANTS: dict[str, dict[str, Any]] = {
    "NorMuon": {},
    "nanochat": {"name": "nanochat"},
    "adamuon": {"name": "adamuon"},
    "hyperball": {"weight_decay_form": "hyperball"},
    "cautious update": {"cautious_update": True},
    "floor per row": {"update_floor": 0.35},
    "Lion": {"other": "lion"},
}


def measured(fields: dict[str, Any], size: int, count: int, steps: int, device: str) -> str:
    generator = torch.Generator(device).manual_seed(0)

    def tensors(scale: float) -> dict[str, torch.Tensor]:
        shapes = {f"{k}.weight": (size, size * (1 + k % 2)) for k in range(count)}
        shapes["embed"] = (4 * size, size)
        return {
            name: scale * torch.randn(shape, generator=generator, device=device)
            for name, shape in shapes.items()
        }

    params, grads = tensors(0.02), tensors(1.0)
    config = nm.Config.preset(**{"name": "paper", "guard": "full", **fields})
    routes = {"embed": nm.Route("adamw"), "*": nm.Route("normuon")}
    plan = nm.make_plan(params, config, routes=routes)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=1e-3, weight_decay=0.1)
    norm = params["0.weight"].norm()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    begin = time.perf_counter()
    nm.step_(params, grads, state, hyper, plan)
    wait()
    compiled = time.perf_counter() - begin
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(steps):
        result = nm.step_(params, grads, state, hyper, plan)
    wait()
    ms = 1e3 * (time.perf_counter() - begin) / steps
    entries = sum(x.numel() for x in params.values())
    held = sum(x.numel() * x.element_size() for x in state.values()) / entries
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    drift = float((params["0.weight"].norm() / norm - 1).abs())
    return (
        f"{ms:9.2f} ms  {held:5.2f} bytes of state per entry  peak {peak:5.2f} GiB  first step "
        f"{compiled:5.1f} s  norm {drift:.1e}  skipped {bool(result.skipped)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("size", 2048), ("count", 24), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {given.count} matrices of {given.size}", flush=True)
    for name, fields in VARIANTS.items():
        row = measured(fields, given.size, given.count, given.steps, device)
        print(f"{name:16} {row}", flush=True)


if __name__ == "__main__":
    main()
