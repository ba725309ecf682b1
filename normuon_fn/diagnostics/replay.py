"""What went into an orthogonalization that failed, saved for later: the purpose of microsoft/dion PR #78.

capture -> step12-rank0.safetensors + step12-rank0.json -> python -m normuon_fn.report step12-rank0.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..algorithm.coefficients import resolve
from ..algorithm.orthogonalize import Form, choose, newton_schulz
from ..ops import reference
from ..planning.buckets import Bucket, Group
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..routing.table import render
from ..types import Hyper, StepResult


@torch.no_grad()
def capture(
    result: StepResult,
    plan: Plan,
    grads: Mapping[str, Tensor | None],
    directory: str | os.PathLike[str],
    *,
    hyper: Hyper,
) -> Path:
    """Waits for the device. Rebuilds and saves, on this rank, what the flagged parameters' orthogonalization was given.

    The input is rebuilt from the gradients and from the state after the step (where the momentum was held, it is advanced:
    what the orthogonalization was spared). Two files, each written whole or not at all: tensors ``"<name>.input"``
    [n, rows, cols] of every block, ``"<name>.grad"`` and the state of the flagged parameters, as safetensors; and a JSON with
    names, shapes, step, rank, versions, configuration, and every tensor's norm, largest entry and number of non-finite ones.

    Of DTensors whole tensors are saved, by every rank: a collective, to be called by all.

    Returns:
        The path of the JSON.

    Raises:
        ImportError: safetensors is not installed (``pip install normuon_fn[checkpoint]``).
        ValueError: nothing was flagged; or DTensors without a guard, whose ranks do not know what the others flagged.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "capture needs safetensors: pip install normuon_fn[checkpoint]"
        ) from error
    flags = dict(zip(plan.names, result.flags.T.tolist(), strict=True))
    bad = {name for name, found in flags.items() if any(found)}
    if not bad:
        raise ValueError("result: no parameter was flagged, there is nothing to capture")

    if plan.sharded:
        if not gathers(plan):
            raise ValueError(
                "plan: of DTensors, without a guard over ranks of the same parameters: who flagged what?"
            )
        result, grads, plan = _gathered(result, grads, plan, bad)

    tensors: dict[str, Tensor] = {}
    blocks = []
    for bucket, group in _groups(plan):
        held = plan.config.guard == "full" and _gradient_flagged(plan, bucket, flags)
        for block in group.blocks:
            grad = grads[block.name]
            if block.name not in bad or grad is None:
                continue
            key = (
                f"{block.name}.input"
                if block.param.length is None
                else (f"{block.name}.input.{block.param.start}")
            )
            own = block.param.read(grad, writable=False)
            beta = hyper.momentum if plan.hypers == 0 else hyper.momentum[group.hyper]
            tensors[key] = _rebuild(
                own, block.param.read(result.state[f"{block.name}.momentum"]), plan, beta, held
            )
            blocks.append(
                {
                    "tensor": key,
                    "parameter": block.name,
                    "method": bucket.form.method,
                    "dtype": str(bucket.form.dtype),
                }
            )
    for name in sorted(bad):
        own_grad = grads[name]
        if own_grad is not None:
            tensors[f"{name}.grad"] = own_grad
        tensors |= {
            key: value for key, value in result.state.items() if key.rpartition(".")[0] == name
        }
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}

    rank = dist.get_rank() if dist.is_initialized() else 0
    step = int(result.state["guard.step"])
    about = {
        "step": step,
        "rank": rank,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "versions": _versions(plan.device),
        "config": {name: str(value) for name, value in vars(plan.config).items()},
        "coefficients": plan.config.coefficients,
        "steps": plan.config.steps,
        "safety_factor": plan.config.safety_factor,
        "flags": {
            name: {"update": bool(flags[name][0]), "gradient": bool(flags[name][1])}
            for name in sorted(bad)
        },
        "blocks": blocks,
        "tensors": {key: _statistics(value) for key, value in tensors.items()},
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step{step}-rank{rank}"
    _whole(stem.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
    _whole(stem.with_suffix(".json"), lambda path: path.write_text(json.dumps(about, indent=1)))
    return stem.with_suffix(".json")


def replay(path: str | os.PathLike[str]) -> str:
    """A capture as text: what was saved, and what every method and dtype makes of it on this machine.

    Raises:
        ValueError: the file is not a capture, or its tensors are missing or damaged.
    """
    from safetensors.torch import load_file

    stem = Path(path)
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(stem.with_suffix(".safetensors"))
        chosen = resolve(_rows(about["coefficients"]), about["steps"], about["safety_factor"])
        head = f"step {about['step']}, rank {about['rank']} of {about['world_size']}; {about['versions']}"
        saved = [("tensor", "shape", "dtype", "norm", "largest", "non-finite")]
        for key, found in about["tensors"].items():
            shape = "x".join(map(str, found["shape"])) or "scalar"
            saved.append(
                (
                    key,
                    shape,
                    found["dtype"],
                    found["norm"],
                    found["largest"],
                    str(found["non_finite"]),
                )
            )
        inputs = [(entry, tensors[entry["tensor"]]) for entry in about["blocks"]]
    except Exception as error:
        raise ValueError(
            f"{path}: not a capture that can be read ({type(error).__name__}: {error})"
        ) from error

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        (
            "tensor",
            "method",
            "dtype",
            "used",
            "non-finite in",
            "non-finite out",
            "largest sigma",
            "error",
        )
    ]
    for entry, given in inputs:
        x = given.to(device)
        x = x.mT if x.shape[-2] > x.shape[-1] else x
        exact = newton_schulz(x.double(), chosen, Form("standard", torch.float64), torch.float64)
        for method in ("standard", "gram"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                form = choose(chosen, method, dtype, x.shape[-2], x.shape[-1], x.device, x.dtype)
                out = newton_schulz(
                    x if dtype != torch.float64 else x.double(), chosen, form, torch.float64
                )
                used = "<-" if (entry["method"], entry["dtype"]) == (method, str(dtype)) else ""
                lost = int((~out.isfinite()).sum())
                sigma = f"{float(torch.linalg.matrix_norm(out, 2).max()):.4g}" if not lost else "-"
                off = f"{float((out - exact).norm() / exact.norm()):.2g}" if not lost else "-"
                before = int((~x.isfinite()).sum())
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    (entry["tensor"], method, name, used, str(before), str(lost), sigma, off)
                )
    return "\n\n".join(
        [
            head,
            render(saved),
            render(rows) if len(rows) > 1 else "no orthogonalization failed (AdamW only)",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m normuon_fn.report", description=replay.__doc__)
    parser.add_argument("file", help="the .json or .safetensors file that capture wrote")
    print(replay(parser.parse_args(arguments).file))


def gathers(plan: Plan) -> bool:
    """Whether the ranks that share DTensors have the same flags, so that all of them gather the same tensors."""
    return plan.config.guard != "off" and plan.guard.alike


def _gathered(
    result: StepResult, grads: Mapping[str, Tensor | None], plan: Plan, bad: set[str]
) -> tuple[StepResult, dict[str, Tensor | None], Plan]:
    """What one device would have of the parameters ``bad``, and a plan for that."""

    def whole(x: Any) -> Any:
        return x.full_tensor() if isinstance(x, DTensor) else x

    found = [p for p in plan.parameters if p.name in bad]
    state = {
        key: whole(x)
        for key, x in result.state.items()
        if key.rpartition(".")[0] in {*bad, "guard"}
    }
    lies = [
        (p.spec.shape if p.spec.sharded is None else p.spec.sharded.shape, p.spec.dtype)
        for p in found
    ]
    like = [torch.empty((), dtype=dtype, device=plan.device).expand(shape) for shape, dtype in lies]
    params = {p.name: x for p, x in zip(found, like, strict=True)}
    of = {p.name: p.hyper for p in found} if plan.hypers else None
    alone = make_plan(params, plan.config, routes={p.name: p.route for p in found}, hyper_of=of)
    return result._replace(state=state), {name: whole(grads[name]) for name in params}, alone


def _groups(plan: Plan) -> Iterator[tuple[Bucket, Group]]:
    for bucket in plan.buckets:
        for group in bucket.groups:
            yield bucket, group


def _gradient_flagged(plan: Plan, bucket: Bucket, flags: Mapping[str, list[int]]) -> bool:
    """Whether a gradient flag kept the momentum of this bucket: anyone's, or with the guard's scope a bucket one of its own."""
    if plan.config.guard_scope == "step":
        return any(gradient for _, gradient in flags.values())
    return any(flags[block.name][1] for group in bucket.groups for block in group.blocks)


def _rebuild(grad: Tensor, momentum: Tensor, plan: Plan, beta: Tensor, held: bool) -> Tensor:
    config = plan.config
    if held:
        momentum = reference.advanced(momentum, grad, beta, config.momentum_form)
    update = reference.update_of(momentum, grad, beta, config.momentum_form, config.nesterov)
    return update if update.ndim == 3 else update.unsqueeze(0)


def _versions(device: torch.device) -> dict[str, Any]:
    import normuon_fn

    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    triton = None
    if find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    own = {"normuon_fn": normuon_fn.__version__, "torch": torch.__version__, "triton": triton}
    return own | {"python": platform.python_version(), "device": f"{device.type}: {where}"}


def _statistics(tensor: Tensor) -> dict[str, Any]:
    finite = tensor[tensor.isfinite()].double()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": f"{float(finite.norm()):.4g}",
        "largest": f"{float(finite.abs().max()) if finite.numel() else 0.0:.4g}",
        "non_finite": tensor.numel() - finite.numel(),
    }


def _rows(coefficients: Any) -> Any:
    return (
        coefficients if isinstance(coefficients, str) else tuple(tuple(row) for row in coefficients)
    )


def _whole(path: Path, write: Any) -> None:
    """The file appears under its name only once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
