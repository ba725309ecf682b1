"""Parameters and state of a run in one file, which must agree with the plan that reads it.

    save: names, shapes, dtypes, extra -> file_format.write
    load: file_format.read -> configuration, routes, names, shapes, dtypes -> copy

For plain tensors. DTensors go through torch.distributed.checkpoint, which takes the dict
``{"params": params, "state": state}`` as it is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import address
from ..distributed.dtensors import is_dtensor
from ..planning.checks import check_tensors
from ..planning.hyperball import check_sizes
from ..planning.memory import check_writable
from ..planning.momentum_codes import fitted_file
from ..planning.plan import Plan, check_plan
from ..planning.streaming import placed, wait_for_copies_sync
from ..types import Tensors
from .description import CheckpointError
from .file_format import DTYPES, read, require_safetensors, write
from .meaning import Meaning, config_texts, differences, fields_of, listed, misfits, route_texts
from .old_names import with_names_of


class Checkpoint(NamedTuple):
    """What `load` returns."""

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    extra: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    params: Tensors,
    state: Tensors,
    plan: Plan,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a run as one safetensors file. Waits for the device.

    An old file stays complete until the new one is on disk, also for those who have mapped it. A
    process that dies while it writes leaves ``.<name>.*.tmp`` beside it. With several ranks, call
    it on one.

    Args:
        params, state: of the plan; on any device. With ``Config(replicas="share")`` the state of
            all ranks: ``nm.gather_state(state, plan)``.
        extra: tensors and JSON values by name, for example a step number or a generator's state.

    Raises:
        ImportError: safetensors is not installed (``pip install normuon_fn[checkpoint]``).
        TypeError: the plan has DTensors; or ``extra`` has a value that would not come back as it
            is, which is anything but JSON values (no tuples, no keys that are not strings) and
            dense plain tensors of a dtype that safetensors has.
        ValueError: ``params`` or ``state`` are not those of the plan in names, shapes or dtypes.
        OSError: the file cannot be written: no such folder, a folder of that name, a read-only one,
            a full disk. An old file is as it was.
    """
    require_safetensors()
    _check_run(plan, params, state, whole=True)
    wait_for_copies_sync(plan)
    extra = {} if extra is None else extra
    if not isinstance(extra, Mapping):
        raise TypeError(
            f"extra: expected a dict of tensors and JSON values, got {type(extra).__name__}"
        )
    _check_extra("extra", dict(extra))
    tensors = {f"extra/{name}": value for name, value in extra.items() if isinstance(value, Tensor)}
    tensors |= {f"params/{name}": tensor for name, tensor in params.items()}
    tensors |= {f"state/{name}": tensor for name, tensor in state.items()}
    about = {
        "config": config_texts(plan.config),
        "routes": {p.name: route_texts(p.route) for p in plan.parameters},
        "extra": {name: value for name, value in extra.items() if not isinstance(value, Tensor)},
    }
    write(path, tensors, about)


def load(
    path: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    params: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """What `save` wrote, with the keys in the order in which `save` received them.

    Of a state that replicas share (``Config(replicas="share")``) each rank gets what it owns.

    With ``plan``, the file is checked against the plan and its tensors are on the plan's device.
    Without, the tensors are on the CPU as they were saved. Nothing is ever unpickled. An option
    that differs from the saved one but does not touch the state (guard, coefficients, a decay form
    or multiplier of a route, ...) causes a warning.

    Args:
        params, state: with ``plan``, these tensors are written in place, and only after the whole
            file was read and checked.

    Raises:
        ImportError: safetensors is not installed.
        OSError: there is no such file, or it cannot be opened.
        TypeError: the plan has DTensors.
        ValueError: ``params`` or ``state`` are not those of the plan, or cannot be written: they
            share memory, are expanded, on the meta device, or made under inference mode.
        CheckpointError (a ValueError): the file is damaged, truncated or of another format, or it
            does not fit the plan. The message says which names are missing or unexpected, which
            shapes or dtypes differ, which options give the state another meaning, or which matrix
            is zero that is to keep its norm.
    """
    if plan is None and not (params is None and state is None):
        raise ValueError("params, state: to be written in place they need plan=")
    if plan is not None:
        _check_run(plan, params, state)
        _check_targets({"params": params or {}, "state": state or {}})
    meta, found = read(Path(path))
    if plan is not None:
        meta, found = with_names_of(path, meta, found, plan)
        _check_meaning(path, meta, found, plan)
        found = fitted_file(found, plan)
        want = {f"params/{p.name}": (p.spec.shape, p.spec.dtype) for p in plan.parameters}
        whole = plan.whole_state.items()
        want |= {f"state/{name}": (spec.shape, spec.dtype) for name, spec in whole}
        own = {key: tensor for key, tensor in found.items() if not key.startswith("extra/")}
        _check_specs(path, own, want)
        _check_sizes(path, plan, found)
        found = {
            k: x for k, x in found.items() if k.removeprefix("state/") not in plan.owned.elsewhere
        }

    parts: dict[str, dict[str, Any]] = {"params": {}, "state": {}, "extra": dict(meta["extra"])}
    targets = {"params": params, "state": state}
    wait_for_copies_sync(plan)
    with torch.no_grad():
        for key, tensor in found.items():
            part, _, name = key.partition("/")
            into = targets.get(part)
            if into is not None:
                into[name].copy_(tensor)
            else:
                with torch.inference_mode(False):  # they will be written
                    if plan is not None and part == "state":
                        tensor = placed(tensor, plan.state[name], plan)
                    elif plan is not None and part == "params":
                        tensor = tensor.to(plan.device)
                    parts[part][name] = tensor
    return Checkpoint(
        parts["params"] if params is None else params,
        parts["state"] if state is None else state,
        parts["extra"],
    )


def _check_meaning(
    path: str | os.PathLike[str], meta: dict[str, Any], found: Tensors, plan: Plan
) -> None:
    """That shapes are the plan's, and that saved options and routes mean what the plan's do."""
    shapes = [(f"params/{p.name}", p.spec.shape) for p in plan.parameters]
    said = misfits((key, shape, found[key].shape) for key, shape in shapes if key in found)
    if said:
        raise CheckpointError(f"{path}: {said}")
    saved = Meaning(meta["config"], meta["routes"])
    routes = {p.name: p.route for p in plan.parameters}
    fatal, harmless = differences(saved, plan.config, routes)
    if fatal:
        raise CheckpointError(f"{path}: its state has another meaning: {listed(fatal)}")
    if harmless:
        shown = listed(harmless)
        warnings.warn(f"{path} was saved with another configuration: {shown}", stacklevel=3)


def _check_sizes(path: str | os.PathLike[str], plan: Plan, found: Mapping[str, Tensor]) -> None:
    """That no matrix is zero that is to keep its norm."""
    try:
        check_sizes(plan, {p.name: found[f"params/{p.name}"] for p in plan.parameters})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_specs(
    path: str | os.PathLike[str],
    found: Mapping[str, Tensor],
    want: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    missing, extra = [k for k in want if k not in found], [k for k in found if k not in want]
    if missing or extra:
        write = fields_of(map(_kind, want), map(_kind, found))
        raise CheckpointError(
            f"{path}: belongs to another model or plan: missing {missing[:8]}, "
            f"unexpected {extra[:8]}" + (f"; if the model is the same, {write}" if write else "")
        )
    for key, (shape, dtype) in want.items():
        tensor = found[key]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: {key}: expected {dtype} of shape {shape}, the file has {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}{_hint_of_dtype(key, shape, tensor)}"
            )


def _hint_of_dtype(key: str, shape: tuple[int, ...], tensor: Tensor) -> str:
    if _kind(key) != "momentum" or tuple(tensor.shape) != shape:
        return ""
    return f"; write Config(momentum_dtype={tensor.dtype})"


def _check_run(
    plan: Plan, params: Tensors | None, state: Tensors | None, *, whole: bool = False
) -> None:
    check_plan(plan)
    if plan.sharded:
        raise TypeError(
            "plan: expected a plan of plain tensors, got one of DTensors; save and load those with "
            "torch.distributed.checkpoint, which keeps their shards"
        )
    if params is not None:
        specs = {p.name: p.spec for p in plan.parameters}
        check_tensors(plan, "params", params, specs, anywhere=True)
    if state is not None:
        if whole and plan.owned.elsewhere and isinstance(state, Mapping):
            _check_gathered(plan, state)
        specs = plan.whole_state if whole else plan.state
        check_tensors(plan, "state", state, specs, anywhere=True)


def _check_gathered(plan: Plan, state: Tensors) -> None:
    lacking = sorted(plan.owned.elsewhere - state.keys())
    if lacking:
        raise ValueError(
            f"state: lacks {lacking[:8]}, which other ranks own with Config(replicas='share'); "
            "call whole = nm.gather_state(state, plan) on all ranks and pass whole"
        )


def _check_targets(given: Mapping[str, Tensors]) -> None:
    """That nothing can fail once the first of these tensors is written."""
    for what, tensors in given.items():
        for name, tensor in tensors.items():
            if address(tensor) is None and tensor.numel():
                raise ValueError(
                    f"{what}[{name!r}]: expected a tensor with memory to load into, got one on "
                    f"{tensor.device} without; give {what} to_empty(device=...) first"
                )
    check_writable(given)


def _check_extra(what: str, value: Any, depth: int = 0) -> None:
    """That ``value`` comes back as it is."""
    if isinstance(value, Tensor):
        _check_extra_tensor(what, value, depth)
    elif isinstance(value, tuple):
        raise TypeError(f"{what}: a tuple would come back as a list; save a list")
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{what}: expected strings as keys, got {key!r}, which would come back as one"
                )
            _check_extra(f"{what}[{key!r}]", each, depth + 1)
    elif isinstance(value, list):
        for k, each in enumerate(value):
            _check_extra(f"{what}[{k}]", each, depth + 1)
    elif not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(f"{what}: expected a tensor or a JSON value, got {type(value).__name__}")


def _check_extra_tensor(what: str, tensor: Tensor, depth: int) -> None:
    if depth > 1:
        raise TypeError(f"{what}: a tensor inside of something; give it a key of its own in extra")
    dense = tensor.layout == torch.strided and not (
        tensor.is_nested or tensor.is_meta or is_dtensor(tensor)
    )
    if not dense or tensor.dtype not in DTYPES:
        found = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise TypeError(
            f"{what}: expected a dense tensor with data and of a dtype that safetensors has, "
            f"got a {found}"
        )


def _kind(key: str) -> str:
    """Of ``"state/<name>.<kind>"``."""
    return key.rpartition(".")[2] if key.startswith("state/") else ""
