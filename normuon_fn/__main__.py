"""The command line of the package.

``python -m normuon_fn``: versions, devices, the kernels in use, and one step compared with a
float64 reference of its own. ``python -m normuon_fn replay FILE``: what `capture` saved, and what
every method and dtype makes of it.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .compat import VERSION
from .diagnostics.replay import replay
from .planning.make_plan import make_plan
from .planning.plan import Plan
from .routing.routes import Route
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
# Relative error of the change of a parameter. Seen: float32 6e-6 (CPU, torch 2.13, 2026-11-23).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}

Matrices = dict[str, Tensor]


class Outcome(NamedTuple):
    """The self-test on one device."""

    device: str
    kernels: str
    error: float  # the largest error of all parameters, divided by the one that is allowed
    shown: str
    ms: float

    @property
    def passed(self) -> bool:
        return self.error <= 1.0


def reference(w: Tensor, grad: Tensor, momentum: Tensor, variance: Tensor) -> Tensor:
    """One matrix after the paper's step (arXiv 2510.05491, algorithm 1) in float64.

    The polynomial is applied to singular values, without an iteration on matrices.
    """
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
    on_host: Any = {"device": "cpu", "generator": torch.Generator("cpu").manual_seed(0)}
    params = {name: torch.randn(shape, **on_host) for name, shape in SHAPES.items()}
    grads = {name: torch.randn(shape, **on_host) for name, shape in SHAPES.items()}
    state = {f"{name}.momentum": torch.randn(shape, **on_host) for name, shape in SHAPES.items()}
    state |= {
        f"{name}.variance": torch.rand(*shape[:-1], 1, **on_host) / shape[-1]
        for name, shape in SHAPES.items()
    }
    return tuple({k: v.to(device) for k, v in part.items()} for part in (params, grads, state))  # type: ignore[return-value]


def self_test(device: torch.device, *, compiled: bool) -> Outcome:
    """One step of five parameters against the reference; its second call is timed. Waits."""
    params, grads, before = problem(device)
    plan = make_plan(params, Config.preset("paper"), routes=dict.fromkeys(params, Route("normuon")))
    state = {name: before.get(name, zeros) for name, zeros in init(plan, params).items()}
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
            for x in (params[name], grads[name], before[f"{name}.momentum"])
        ]
        variance = before[f"{name}.variance"].double().cpu().reshape(-1, SHAPES[name][-2], 1)
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
    """The implementations that the step of a plan uses, in words."""
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

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return (
        f"normuon_fn {VERSION}, torch {torch.__version__}, triton {triton_version}, "
        f"python {platform.python_version()}"
    )


def devices() -> list[tuple[torch.device, str]]:
    found = [(torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        found.append(
            (torch.device("cuda", k), f"{torch.cuda.get_device_name(k)}, sm_{major}{minor}")
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m normuon_fn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; the default is every device")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="test the compiled step instead of the eager one (takes a minute)",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="replay")
    shown = "show a capture and what every method and dtype makes of it"
    shows = commands.add_parser("replay", help=shown, description=shown)
    shows.add_argument("file", help="the .json or .safetensors file that capture wrote")
    args = parser.parse_args(arguments)
    if args.command == "replay":
        try:
            print(replay(args.file))
        except ValueError as error:
            parser.error(str(error))
        return 0
    tested = [
        (device, what)
        for device, what in devices()
        if args.device in (None, str(device), device.type)
    ]
    if not tested:
        parser.error(f"--device: expected a device of this machine, got {args.device!r}")
    return test_all(tested, compiled=args.compile)


def test_all(tested: list[tuple[torch.device, str]], *, compiled: bool) -> int:
    """The self-test of every device as a table. Returns 1 where one of them failed."""
    print(versions())
    how = "compiled" if compiled else "eager, not --compile"
    rows = [("device", "what", "kernels", "error", "ms", f"self-test ({how})")]
    failed = False
    for device, what in tested:
        try:
            outcome = self_test(device, compiled=compiled)
        except Exception as error:
            failed = True
            first_line = (str(error).splitlines() or [""])[0]
            shown = f"{type(error).__name__}: {first_line[:80]}"
            rows.append((str(device), what, "-", shown, "-", "FAIL"))
            continue
        failed |= not outcome.passed
        verdict = "pass" if outcome.passed else "FAIL"
        ms = f"{outcome.ms:.2f}"
        rows.append((outcome.device, what, outcome.kernels, outcome.shown, ms, verdict))
    print(render(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
