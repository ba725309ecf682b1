"""Saves the input of an orthogonalization that failed: the purpose of microsoft/dion PR #78.

capture -> step12-rank0.safetensors + step12-rank0.json
        -> python -m normuon_fn replay step12-rank0.json
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithm.momentum import SCALE
from ..compat import VERSION
from ..distributed.placements import full_tensor, rank_and_world_size
from ..ops import reference
from ..ops.codes import quantized, restored
from ..planning.buckets import Bucket, Group
from ..planning.make_plan import plan_of
from ..planning.momentum_codes import read_codes
from ..planning.plan import Plan
from ..routing.routes import Decision
from ..types import Grads, Hyper, StepResult


@torch.no_grad()
def capture(
    result: StepResult,
    grads: Grads,
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    hyper: Hyper,
) -> Path:
    """Returns the path of the JSON file of a capture. Waits for the device.

    Rebuilds what the orthogonalization of the flagged parameters received on this rank, from the
    gradients and from the state after the step. Where the guard kept the old momentum, the momentum
    is advanced first, so that the file has the input that the guard refused.

    Writes two files, each complete or not at all. The safetensors file has the tensors
    ``"<name>.input"`` [n, rows, cols] of every block, ``"<name>.grad"``, and the state of the
    flagged parameters. The JSON file has names, shapes, step, rank, versions and configuration, and
    for every tensor its norm, its largest entry and its number of non-finite entries.

    For DTensors every rank gathers and saves whole tensors. That is a collective: all ranks must
    call `capture`. Until 0.3 the order of 0.1, ``(result, plan, grads, directory)``, works too.

    Raises:
        ImportError: safetensors is not installed (``pip install normuon_fn[checkpoint]``).
        ValueError: no parameter was flagged; or the plan has DTensors and no guard over their
            ranks, so that a rank does not know what the others flagged.
    """
    if isinstance(grads, Plan):
        grads, plan = plan, grads  # type: ignore[assignment]
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "capture needs safetensors: pip install normuon_fn[checkpoint]"
        ) from error
    flags = dict(zip(plan.names, result.flags.T.tolist(), strict=True))
    bad = sorted(name for name, found in flags.items() if any(found))
    if not bad:
        raise ValueError("result: no parameter was flagged, so there is nothing to capture")
    if plan.sharded:
        if not can_gather(plan):
            raise ValueError(
                "plan: expected a guard over the ranks that share these DTensors, got none: a rank "
                "does not know what the others flagged; use Config(guard='output' or 'full')"
            )
        result, grads, plan = _gathered(result, grads, plan, bad)

    inputs, blocks = _inputs(result, grads, plan, hyper, flags)
    tensors = inputs | _grads_and_state(result, grads, bad)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    rank, world_size = rank_and_world_size()
    step = int(result.state["guard.step"])
    about = {
        "step": step,
        "rank": rank,
        "world_size": world_size,
        "versions": _versions(plan.device),
        "config": {name: str(value) for name, value in vars(plan.config).items()},
        "coefficients": plan.config.coefficients,
        "steps": plan.config.steps,
        "safety_factor": plan.config.safety_factor,
        "flags": {
            name: {"update": bool(flags[name][0]), "gradient": bool(flags[name][1])} for name in bad
        },
        "blocks": blocks,
        "tensors": {key: _statistics(value) for key, value in tensors.items()},
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step{step}-rank{rank}"
    _write_then_rename(stem.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
    text = json.dumps(about, indent=1)
    _write_then_rename(stem.with_suffix(".json"), lambda path: path.write_text(text))
    return stem.with_suffix(".json")


def can_gather(plan: Plan) -> bool:
    """Whether the ranks that share DTensors have the same flags and so gather the same tensors."""
    return plan.config.guard != "off" and plan.guard.alike


def _gathered(
    result: StepResult, grads: Grads, plan: Plan, bad: list[str]
) -> tuple[StepResult, dict[str, Tensor | None], Plan]:
    """What a single device would have for the parameters ``bad``, and a plan for them."""
    parameters = [p for p in plan.parameters if p.name in bad]
    state = {
        key: full_tensor(x)
        for key, x in result.state.items()
        if key.rpartition(".")[0] in {*bad, "guard"}
    }
    whole = {}
    for p in parameters:
        shape = p.spec.shape if p.spec.sharded is None else p.spec.sharded.shape
        whole[p.name] = torch.empty((), dtype=p.spec.dtype, device=plan.device).expand(shape)
    found: dict[str, Tensor | None] = {}
    for name in whole:
        grad = grads[name]
        found[name] = None if grad is None else full_tensor(grad)
    hyper_of = {p.name: p.hyper for p in parameters} if plan.hypers else None
    decisions = {p.name: Decision(p.route, p.reason) for p in parameters}
    alone = plan_of(whole, decisions, plan.config, hyper_of=hyper_of)
    return result._replace(state=state), found, alone


def _inputs(
    result: StepResult, grads: Grads, plan: Plan, hyper: Hyper, flags: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """The stacks that were orthogonalized, by name, and how each of them was."""
    tensors, blocks = {}, []
    for bucket, group in _groups(plan):
        kept = plan.config.guard == "full" and _gradient_flagged(plan, bucket, flags)
        for k, block in enumerate(group.blocks):
            own = group.own[k if len(group.own) > 1 else 0]
            beta = hyper.momentum if plan.hypers == 0 else hyper.momentum[own.hyper]
            grad = grads[block.name]
            if not any(flags[block.name]) or grad is None:
                continue
            if f"{block.name}.momentum" in plan.owned.elsewhere:
                continue  # another rank orthogonalized it, and captures it
            part = "" if block.param.length is None else f".{block.param.start}"
            key = f"{block.name}.input{part}"
            read = block.param.read(grad)
            momentum = result.state[f"{block.name}.momentum"].to(grad.device)
            scales = result.state.get(f"{block.name}.{SCALE.name}")
            scales = None if scales is None else scales.to(grad.device)
            if scales is None:
                momentum = block.param.read(momentum)
            else:
                momentum = read_codes(momentum, scales, block)
            tensors[key] = _input(read, momentum, plan, beta, kept)
            form = {"method": bucket.form.method, "dtype": str(bucket.form.dtype)}
            blocks.append({"tensor": key, "parameter": block.name, **form})
    return tensors, blocks


def _grads_and_state(result: StepResult, grads: Grads, bad: list[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in bad:
        grad = grads[name]
        if grad is not None:
            tensors[f"{name}.grad"] = grad
        own = {key: x for key, x in result.state.items() if key.rpartition(".")[0] == name}
        tensors |= own
    return tensors


def _groups(plan: Plan) -> Iterator[tuple[Bucket, Group]]:
    for bucket in plan.buckets:
        for group in bucket.groups:
            yield bucket, group


def _gradient_flagged(plan: Plan, bucket: Bucket, flags: Mapping[str, list[int]]) -> bool:
    """Whether a gradient flag made this bucket keep its momentum.

    With ``guard_scope="step"`` the gradient of any parameter does, otherwise one of this bucket.
    """
    if plan.config.guard_scope == "step":
        return any(gradient for _, gradient in flags.values())
    return any(flags[block.name][1] for group in bucket.groups for block in group.blocks)


def _input(grad: Tensor, momentum: Tensor, plan: Plan, beta: Tensor, kept: bool) -> Tensor:
    """The update before its orthogonalization. ``kept``: the guard kept the old momentum."""
    config = plan.config
    if kept:
        momentum = reference.advanced(momentum, grad, beta, config.momentum_form)
        if config.momentum_dtype == torch.int8:
            momentum = restored(*quantized(momentum))
    update = reference.update_of(momentum, grad, beta, config.momentum_form, config.nesterov)
    return update if update.ndim == 3 else update.unsqueeze(0)


def _versions(device: torch.device) -> dict[str, Any]:
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    triton = None
    if find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    own = {"normuon_fn": VERSION, "torch": torch.__version__, "triton": triton}
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


def _write_then_rename(path: Path, write: Callable[[Path], Any]) -> None:
    """The file appears under its name only once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
