"""One safetensors file with a description and a digest of everything: written completely or not.

    write: tensors -> temporary file beside the target -> fsync -> os.replace -> fsync of the folder
    read:  header -> its digest, format and list of tensors -> tensors and their digests

What the header has: see ``description.py``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .description import META, CheckpointError, description

FORMAT = 1
_LONGEST = 40  # characters of its target's name in that of a temporary file: 255 bytes are allowed
DTYPES = (  # those of safetensors
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Waits for the device. ``about`` (JSON values) joins the description of the tensors.

    Raises:
        OSError: the file cannot be written; an old one is as it was.
    """
    safetensors_error = require_safetensors()
    from safetensors.torch import save_file

    target = Path(os.path.realpath(path))  # a link keeps leading to it
    _check_target(path, target)
    host = _on_host(tensors)
    meta = {
        "format": FORMAT,
        "order": list(tensors),  # safetensors does not keep it, and a compiled step guards on it
        "sha256": {key: _digest(key, tensor) for key, tensor in host.items()},
        **about,
        "torch": torch.__version__,
    }
    text = json.dumps(meta, allow_nan=True)
    sealed = {META: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    prefix = f".{target.name[:_LONGEST]}."
    descriptor, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    try:
        save_file(host, temporary, metadata=sealed)
        with contextlib.suppress(OSError):  # files of mkstemp are readable by their owner alone
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
            os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, safetensors_error):
            raise _as_os_error(error, path) from error
        raise
    if os.name == "posix":
        _sync(target.parent)


def _check_target(path: str | os.PathLike[str], target: Path) -> None:
    """What can be told before anything is written."""
    if target.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file, in it for example")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it first")


def _as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    """What safetensors says of a write that failed, as what it is."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, f"{path}: could not be written, an old file is as it was ({error})")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, and copies of all tensors in the order in which they were saved.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        CheckpointError: the file is damaged, truncated, or of another format.
    """
    require_safetensors()
    from safetensors import safe_open

    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected a file of normuon_fn.save")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            meta = description(path, file.metadata() or {}, FORMAT)
            if set(file.keys()) != set(meta["order"]):
                raise CheckpointError(
                    f"{path}: damaged: its tensors are not those that its description lists"
                )
            # Clones, because the file may disappear under a memory map.
            tensors = {key: file.get_tensor(key).clone() for key in meta["order"]}
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # safetensors and torch have many for what a file can say
        if _begins_as_zip(path):
            raise CheckpointError(
                f"{path}: expected a file of normuon_fn.save, got one of torch.save; write "
                "torch.load(path), and load_state_dict of what it has"
            ) from error
        raise CheckpointError(
            f"{path}: damaged or truncated, or no safetensors file: {error}"
        ) from error
    wrong = [key for key, tensor in tensors.items() if _digest(key, tensor) != meta["sha256"][key]]
    if wrong:
        raise CheckpointError(
            f"{path}: damaged: the contents of {wrong[:8]} are not those that were saved"
        )
    return meta, tensors


def require_safetensors() -> type[Exception]:
    """The error that safetensors raises for a damaged file.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise ImportError(
            "checkpoints need safetensors: pip install normuon_fn[checkpoint]"
        ) from error
    found: type[Exception] = SafetensorError
    return found


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: on the CPU, contiguous, each with a storage of its own size.

    The extra tensors are copied, because they may share a storage with parameters or state.
    """
    host = {}
    for key, tensor in tensors.items():
        moved = tensor.detach().to("cpu").contiguous()
        own = moved.untyped_storage().nbytes() == moved.numel() * moved.element_size()
        host[key] = moved if own and not key.startswith("extra/") else moved.clone()
    return host


def _digest(key: str, tensor: Tensor) -> str:
    """A SHA-256 of a tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


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


def _begins_as_zip(path: Path) -> bool:
    """Whether it may be a file of torch.save."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
