"""The description in a file's header: JSON under "normuon_fn", its SHA-256 under "sha256".

    format    1
    order     the names of all tensors, "params/<name>", "state/<name>" or "extra/<name>", as saved
    sha256    a digest of each of them
    config    every option of the Config, as text; routes the same of every parameter
    extra     the JSON values of extra

A digest tells accidents, not malice: whoever writes the text writes its digest. So nothing of it is
used before it is checked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

META = "normuon_fn"
_PARTS = ("params", "state", "extra")


class CheckpointError(ValueError):
    """A file that is damaged, has another format, or belongs to another model or plan."""


def description(path: Path, header: dict[str, str], version: int) -> dict[str, Any]:
    """What the header of a file says, all of it of the type that `load` expects.

    Raises:
        CheckpointError: it says something else.
    """
    if META not in header or "sha256" not in header:
        raise CheckpointError(
            f"{path}: expected a file of normuon_fn.save; this one was not written by "
            "normuon_fn.save, or it is damaged"
        )
    if hashlib.sha256(header[META].encode()).hexdigest() != header["sha256"]:
        raise CheckpointError(f"{path}: damaged: its description is not the one that was saved")
    try:
        meta = json.loads(header[META])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: its description is no JSON: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: damaged: its description is no JSON object")
    if meta.get("format") != version:
        raise CheckpointError(
            f"{path}: has format {meta.get('format')!r:.40}, this version of normuon_fn reads "
            f"format {version}"
        )
    fault = _fault(meta)
    if fault:
        raise CheckpointError(f"{path}: damaged: in its description {fault}")
    return meta


def _fault(meta: dict[str, Any]) -> str:
    """What is not as it should be, or nothing."""
    order = meta.get("order")
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        return "'order' is no list of names"
    strange = [key for key in order if key.partition("/")[0] not in _PARTS or "/" not in key]
    if strange or len(set(order)) < len(order):
        return f"'order' has names twice, or of no part: {strange[:8]}"
    for key in ("sha256", "config"):
        if not _is_text_by_name(meta.get(key)):
            return f"'{key}' is no dict of texts by name"
    if set(meta["sha256"]) != set(order):
        return "'sha256' has other names than 'order'"
    routes, extra = meta.get("routes"), meta.get("extra")
    if not isinstance(routes, dict) or not all(map(_is_text_by_name, routes.values())):
        return "'routes' is no dict of texts by name for each parameter"
    if not isinstance(extra, dict):
        return "'extra' is no dict"
    twice = [name for name in extra if f"extra/{name}" in meta["sha256"]]
    return f"'extra' has names of tensors: {twice[:8]}" if twice else ""


def _is_text_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
