"""``python -m normuon_fn``: versions, devices, the kernels in use, and one step beside a float64 reference of its own."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__, ops
from .planning.make_plan import make_plan
from .planning.plan import Plan
from .routing.table import render
from .runtime.compiled import step
from .step import init, update
from .types import Config, Hyper

SIMPLE = (3.4445, -4.7750, 2.0315)  # Keller Jordan's polynomial, five times
SHAPES = {
    "square": (48, 48),
    "wide": (40, 96),
    "tall": (96, 40),
    "large": (512, 768),
    "stack": (3, 24, 32),
}
LR, MOMENTUM, BETA2, DECAY = 0.02, 0.9, 0.8, 0.1
# Of the change of a parameter, relative. Seen: float32 6e-6 (CPU, torch 2.13, 2026-11-23).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}

Matrices = dict[str, Tensor]


class Outcome(NamedTuple):
    """The self-test on one device."""

    device: str
    kernels: str
    error: float  # the largest of all parameters, over the largest that is allowed
    shown: str
    ms: float

    @property
    def passed(self) -> bool:
        return self.error <= 1.0


def reference(w: Tensor, grad: Tensor, momentum: Tensor, variance: Tensor) -> Tensor:
    """The paper's step (arXiv 2510.05491, algorithm 1) of one matrix in float64: by singular values, without an iteration."""
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * grad
    u, sigma, vt = torch.linalg.svd(momentum, full_matrices=False)
    sigma = sigma / sigma.square().sum().sqrt()
    for _ in range(5):
        a, b, c = SIMPLE
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    o = (u * sigma) @ vt
    o = o / (BETA2 * variance + (1 - BETA2) * o.square().mean(1, keepdim=True)).sqrt()
    return (
        w - LR * DECAY * w - o * (0.2 * LR * math.sqrt(o.numel()) / float(o.square().sum().sqrt()))
    )


def problem(device: torch.device) -> tuple[Matrices, Matrices, Matrices]:
    """Parameters, gradients, and a state in the middle of a run."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    grads = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state = {
        f"{name}.momentum": torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }
    state |= {
        f"{name}.variance": torch.rand(*shape[:-1], 1, generator=generator) / shape[-1]
        for name, shape in SHAPES.items()
    }
    return tuple({k: v.to(device) for k, v in part.items()} for part in (params, grads, state))  # type: ignore[return-value]


def self_test(device: torch.device, *, compiled: bool) -> Outcome:
    """Waits for the device. One step of five parameters, the second time timed."""
    params, grads, given = problem(device)
    plan = make_plan(params, Config.preset("paper"))
    state = {name: given.get(name, zeros) for name, zeros in init(plan, params).items()}
    hyper = Hyper.of(params, lr=LR, momentum=MOMENTUM, beta2=BETA2, weight_decay=DECAY)
    run = step if compiled else update
    run(params, grads, state, hyper, plan)
    _wait(device)
    start = time.perf_counter()
    result = run(params, grads, state, hyper, plan)
    _wait(device)
    ms = 1e3 * (time.perf_counter() - start)
    worst, shown = 0.0, ""
    for name in SHAPES:
        parts = [
            x.double().cpu().reshape(-1, *x.shape[-2:])
            for x in (params[name], grads[name], given[f"{name}.momentum"])
        ]
        variance = given[f"{name}.variance"].double().cpu().reshape(-1, SHAPES[name][-2], 1)
        want = torch.stack([reference(*matrix) for matrix in zip(*parts, variance, strict=True)])
        error = float(
            (result.params[name].double().cpu().reshape(want.shape) - want).norm()
            / (want - parts[0]).norm()
        )
        error = error if math.isfinite(error) else math.inf
        allowed = TOLERANCE[_dtype(plan, name)]
        if error / allowed >= worst:
            worst, shown = error / allowed, f"{error:.1e} of {allowed:.0e} allowed ({name})"
    return Outcome(str(device), kernels(plan), worst, shown, ms)


def kernels(plan: Plan) -> str:
    """Which implementations the step of a plan takes."""
    lists = (
        "Triton"
        if ops.kernels_for(plan.device, [torch.float32])
        else "CPU reference"
        if plan.device.type == "cpu"
        else "PyTorch"
    )
    forms = {
        (bucket.form.products, str(bucket.form.dtype).removeprefix("torch."))
        for bucket in plan.buckets
    }
    named = {"library": "library products", "symmetric": "symmetric kernels"}
    return ", ".join([lists, *sorted(f"{named[products]} in {dtype}" for products, dtype in forms)])


def _dtype(plan: Plan, name: str) -> torch.dtype:
    return next(
        bucket.form.dtype
        for bucket in plan.buckets
        if any(block.name == name for block in bucket.blocks)
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> str:
    try:
        import triton

        of_triton = triton.__version__
    except ImportError:
        of_triton = "not installed"
    return f"normuon_fn {__version__}, torch {torch.__version__}, triton {of_triton}, python {platform.python_version()}"


def devices() -> list[tuple[torch.device, str]]:
    found = [(torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        found.append(
            (torch.device("cuda", k), f"{torch.cuda.get_device_name(k)}, sm_{major}{minor}")
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m normuon_fn", description=__doc__)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: all there are")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the compiled step in the place of the eager one (takes a minute)",
    )
    args = parser.parse_args(arguments)
    print(versions())
    rows = [("device", "what", "kernels", "error", "ms", "self-test")]
    failed = False
    for device, what in devices():
        if args.device and args.device not in (str(device), device.type):
            continue
        try:
            outcome = self_test(device, compiled=args.compile)
        except Exception as error:
            failed = True
            rows.append(
                (
                    str(device),
                    what,
                    "-",
                    f"{type(error).__name__}: {str(error).splitlines()[0][:80]}",
                    "-",
                    "FAIL",
                )
            )
            continue
        failed |= not outcome.passed
        verdict = "pass" if outcome.passed else "FAIL"
        rows.append(
            (outcome.device, what, outcome.kernels, outcome.shown, f"{outcome.ms:.2f}", verdict)
        )
    if len(rows) == 1:
        parser.error(f"no device {args.device!r} here")
    print(render(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
