"""Parameters and state of a run in one safetensors file: written whole or not at all, checked whole before anything is used.

    save: tensors -> temporary file beside the target -> fsync -> os.replace -> fsync of the folder
    load: header -> version, plan, names, shapes, dtypes -> data and their digests -> copy

Plain tensors. DTensors go through torch.distributed.checkpoint, where ``{"params": params, "state": state}`` is what to give.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..planning.checks import check_tensors
from ..planning.plan import Plan
from ..types import Config, Tensors

FORMAT = 1
_META = "normuon_fn"
# What gives the state another meaning, or another layout of the same shape: a state of another one is not continued.
_CONFIG_OF_STATE = ("momentum_form", "reduction")
_DTYPES = (  # of safetensors
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
)  # fmt: skip
_ROUTE_OF_STATE = ("algorithm", "flatten", "heads", "splits", "dim", "transposed")


class CheckpointError(ValueError):
    """A file that is damaged, of another format, or of another model or plan."""


class Checkpoint(NamedTuple):
    """What `load` returns."""

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    extra: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    params: Tensors,
    state: Tensors,
    *,
    plan: Plan,
    extra: Mapping[str, Any]
    | None = None,  # tensors and JSON values by name: a step number, a generator's state
) -> None:
    """Waits for the device. Writes ``path`` as one safetensors file: the old one stays whole until the new one is on disk.

    Of a process that dies while it writes, ``.<name>.*.tmp`` remains beside it. With several ranks, call it on one.

    Raises:
        ImportError: safetensors is not installed (``pip install normuon_fn[checkpoint]``).
        TypeError: a plan of DTensors, or an ``extra`` that would not come back as it is: no JSON (tuples, keys that are no
            strings), or a tensor that is no plain dense one or of a dtype that safetensors lacks.
        ValueError: ``params`` or ``state`` are not the plan's, in names, shapes or dtypes. They may lie on any device.
    """
    _safetensors()
    from safetensors.torch import save_file

    _check_given(plan, params, state)
    extra = {} if extra is None else extra
    if not isinstance(extra, Mapping):
        raise TypeError(
            f"extra: expected a dict of tensors and JSON values, got {type(extra).__name__}"
        )
    _check_extra("extra", dict(extra))
    plain = {name: value for name, value in extra.items() if not isinstance(value, Tensor)}
    tensors = {f"extra/{name}": value for name, value in extra.items() if isinstance(value, Tensor)}
    tensors |= {f"params/{name}": tensor for name, tensor in params.items()}
    tensors |= {f"state/{name}": tensor for name, tensor in state.items()}
    host = _on_host(tensors)
    meta = {
        "format": FORMAT,
        "order": list(tensors),  # safetensors keeps none, and a compiled step guards on it
        "sha256": {key: _digest(key, tensor) for key, tensor in host.items()},
        "config": _config(plan.config),
        "routes": {p.name: _route(p.route) for p in plan.parameters},
        "extra": plain,
        "torch": torch.__version__,
    }
    try:
        text = json.dumps(meta, allow_nan=True)
    except TypeError as error:
        raise TypeError(f"extra: expected tensors and JSON values, got {error}") from error
    sealed = {_META: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    target = Path(os.path.realpath(path))  # a link keeps leading to it
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
    )
    os.close(descriptor)
    try:
        save_file(host, temporary, metadata=sealed)
        with contextlib.suppress(OSError):  # mkstemp's are for the owner alone
            os.chmod(
                temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
            )
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        _sync(target.parent)


def load(
    path: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    params: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """What `save` wrote, in the order of the keys that it was given.

    With ``plan``: checked against it, and on its device. ``params`` and ``state``, which need it, are written in place, and
    only once everything has been read and found good. Without: as it was saved, on the CPU. Nothing is ever unpickled.

    A configuration that differs where it does not touch the state (guard, coefficients, ...) is warned of.

    Raises:
        ImportError: safetensors is not installed.
        OSError: no such file.
        TypeError: a plan of DTensors.
        ValueError: ``params`` or ``state`` are not the plan's.
        CheckpointError (a ValueError): damaged or truncated, of another format, or not of this plan: which names are missing
            or too many, which shapes or dtypes are others, which options give the state another meaning.
    """
    if plan is None and not (params is None and state is None):
        raise ValueError("params, state: to be written in place they need plan=")
    if plan is not None:
        _check_given(plan, params, state)
    meta, found = _read(Path(path))
    if plan is not None:
        _check_plan(path, meta, plan)
        want = {f"params/{p.name}": (p.spec.shape, p.spec.dtype) for p in plan.parameters}
        want |= {f"state/{name}": (spec.shape, spec.dtype) for name, spec in plan.state.items()}
        _check_tensors(path, {k: t for k, t in found.items() if not k.startswith("extra/")}, want)

    by_part: dict[str, dict[str, Any]] = {"params": {}, "state": {}, "extra": dict(meta["extra"])}
    with torch.no_grad():
        for key, tensor in found.items():
            what, _, name = key.partition("/")
            into = {"params": params, "state": state}.get(what)
            if into is not None:
                by_part[what][name] = into[name].copy_(tensor)
            else:
                by_part[what][name] = (
                    tensor if plan is None or what == "extra" else tensor.to(plan.device)
                )
    for what, given in (("params", params), ("state", state)):
        if given is not None:
            by_part[what] = given
    return Checkpoint(by_part["params"], by_part["state"], by_part["extra"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, and copies of all tensors in the order in which they were saved; all of it checked."""
    error_of_the_format = _safetensors()
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            meta = _meta(path, file.metadata() or {})
            if set(file.keys()) != set(meta["order"]) or set(meta["sha256"]) != set(meta["order"]):
                raise CheckpointError(f"{path}: damaged: its tensors are not those that it lists")
            tensors = {
                key: file.get_tensor(key).clone() for key in meta["order"]
            }  # the file may go away under a mapping
    except CheckpointError:
        raise
    except (
        error_of_the_format,
        RuntimeError,
        UnicodeDecodeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated, or no safetensors file: {error}"
        ) from error
    wrong = [key for key, tensor in tensors.items() if _digest(key, tensor) != meta["sha256"][key]]
    if wrong:
        raise CheckpointError(
            f"{path}: damaged: the contents of {wrong[:8]} are not those that were saved"
        )
    return meta, tensors


def _meta(path: Path, header: dict[str, str]) -> dict[str, Any]:
    if _META not in header or "sha256" not in header:
        raise CheckpointError(f"{path}: was not written by normuon_fn.save, or is damaged")
    if hashlib.sha256(header[_META].encode()).hexdigest() != header["sha256"]:
        raise CheckpointError(f"{path}: damaged: its description is not the one that was saved")
    meta: dict[str, Any] = json.loads(header[_META])
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {meta['format']}, this version of normuon_fn reads format {FORMAT}"
        )
    return meta


def _check_plan(path: str | os.PathLike[str], meta: dict[str, Any], plan: Plan) -> None:
    now = _config(plan.config)
    differ = {
        k: (meta["config"].get(k, repr(f.default)), now[k]) for k, f in _fields(Config).items()
    }
    differ = {k: (old, new) for k, (old, new) in differ.items() if old != new}
    fatal = [
        f"Config.{k} was {old}, is {new}"
        for k, (old, new) in differ.items()
        if k in _CONFIG_OF_STATE
    ]
    for p in plan.parameters:
        old, new = meta["routes"].get(p.name), _route(p.route)
        if old is not None:
            fatal += [
                f"the route of {p.name!r} had {k}={old[k]}, has {new[k]}"
                for k in _ROUTE_OF_STATE
                if old.get(k, new[k]) != new[k]
            ]
    if fatal:
        raise CheckpointError(f"{path}: its state has another meaning: {'; '.join(fatal[:8])}")
    if differ:
        shown = "; ".join(f"Config.{k} was {old}, is {new}" for k, (old, new) in differ.items())
        warnings.warn(f"{path} was saved with another configuration: {shown}", stacklevel=3)


def _check_tensors(
    path: str | os.PathLike[str],
    found: Mapping[str, Tensor],
    want: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    missing, extra = [k for k in want if k not in found], [k for k in found if k not in want]
    if missing or extra:
        raise CheckpointError(
            f"{path}: of another model or plan: missing {missing[:8]}, unexpected {extra[:8]}"
        )
    for key, (shape, dtype) in want.items():
        tensor = found[key]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: {key}: expected {dtype} of shape {shape}, the file has {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def _check_given(plan: Plan, params: Tensors | None, state: Tensors | None) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    if plan.sharded:
        raise TypeError(
            "plan: of DTensors; save and load them with torch.distributed.checkpoint, that knows of shards"
        )
    specs = {p.name: p.spec for p in plan.parameters}
    for what, given, of in (("params", params, specs), ("state", state, plan.state)):
        if given is not None:
            check_tensors(plan, what, given, of, anywhere=True)


def _check_extra(what: str, value: Any, depth: int = 0) -> None:
    """That it comes back as it is. What else JSON does not have, ``json.dumps`` says."""
    if isinstance(value, Tensor):
        if depth > 1:
            raise TypeError(
                f"{what}: a tensor inside of something; give it a key of its own in extra"
            )
        dense = value.layout == torch.strided and not (
            value.is_nested or value.is_meta or isinstance(value, DTensor)
        )
        if not dense or value.dtype not in _DTYPES:
            found = f"{type(value).__name__} of {value.dtype}, {value.layout}, on {value.device}"
            raise TypeError(
                f"{what}: expected a dense tensor, with data, of a dtype that safetensors has, got a {found}"
            )
    elif isinstance(value, tuple):
        raise TypeError(f"{what}: a tuple would come back as a list; give a list")
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


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, none a view of a larger storage or of another's: what safetensors takes."""
    host = {}
    for key, tensor in tensors.items():
        here = tensor.detach().to("cpu").contiguous()
        own = here.untyped_storage().nbytes() == here.numel() * here.element_size()
        host[key] = here if own and not key.startswith("extra/") else here.clone()
    return host


def _digest(key: str, tensor: Tensor) -> str:
    """Of the bytes, and of what they are read as."""
    digest = hashlib.sha256(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _fields(of: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(of) if f.name != "orthogonalizer"}


def _config(config: Config) -> dict[str, str]:
    return {name: repr(getattr(config, name)) for name in _fields(Config)}


def _route(route: Any) -> dict[str, str]:
    return {f.name: repr(getattr(route, f.name)) for f in dataclasses.fields(route)}


def _safetensors() -> type[Exception]:
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise ImportError(
            "checkpoints need safetensors: pip install normuon_fn[checkpoint]"
        ) from error
    found: type[Exception] = SafetensorError
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
