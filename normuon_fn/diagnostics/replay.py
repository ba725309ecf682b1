"""Shows a capture: what was saved, and what every method and dtype makes of it on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithm.coefficients import CoefficientSet, resolve
from ..algorithm.orthogonalize import Form, choose, newton_schulz
from ..routing.table import render

Rows = list[tuple[str, ...]]


def replay(path: str | os.PathLike[str]) -> str:
    """A capture as text: the saved tensors, then each input through every method and dtype.

    Args:
        path: the ``.json`` or the ``.safetensors`` file that `capture` wrote.

    Raises:
        ValueError: the file is not a capture, or its tensors are missing or damaged.
    """
    from safetensors.torch import load_file

    stem = Path(path)
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(stem.with_suffix(".safetensors"))
        rows = about["coefficients"]
        own = rows if isinstance(rows, str) else tuple(tuple(row) for row in rows)
        chosen = resolve(own, about["steps"], about["safety_factor"])
        saved = _saved(about["tensors"])
        inputs = [(entry, tensors[entry["tensor"]]) for entry in about["blocks"]]
        where = f"step {about['step']}, rank {about['rank']} of {about['world_size']}"
        head = f"{where}; {about['versions']}"
    except Exception as error:
        raise ValueError(
            f"{path}: not a capture that can be read ({type(error).__name__}: {error})"
        ) from error
    replayed = _replayed(inputs, chosen)
    methods = render(replayed) if inputs else "no orthogonalization failed (AdamW only)"
    return "\n\n".join([head, render(saved), methods])


def _saved(tensors: dict[str, dict[str, Any]]) -> Rows:
    rows: Rows = [("tensor", "shape", "dtype", "norm", "largest", "non-finite")]
    for key, found in tensors.items():
        shape = "x".join(map(str, found["shape"])) or "scalar"
        numbers = found["norm"], found["largest"], str(found["non_finite"])
        rows.append((key, shape, found["dtype"], *numbers))
    return rows


def _replayed(inputs: list[tuple[dict[str, str], Tensor]], chosen: CoefficientSet) -> Rows:
    """``error``: relative to the standard method in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    finite = "non-finite in", "non-finite out"
    table: Rows = [("tensor", "method", "dtype", "used", *finite, "largest sigma", "error")]
    for entry, saved in inputs:
        x = saved.to(device)
        x = x.mT if x.shape[-2] > x.shape[-1] else x
        exact = newton_schulz(x.double(), chosen, Form("standard", torch.float64), torch.float64)
        rows, cols = x.shape[-2:]
        before = str(int((~x.isfinite()).sum()))
        for method in ("standard", "gram"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                form = choose(chosen, method, dtype, rows, cols, x.device, x.dtype)
                wide = x.double() if dtype == torch.float64 else x
                out = newton_schulz(wide, chosen, form, torch.float64)
                used = "<-" if (entry["method"], entry["dtype"]) == (method, str(dtype)) else ""
                lost = int((~out.isfinite()).sum())
                sigma, error = "-", "-"
                if not lost:
                    sigma = f"{float(torch.linalg.matrix_norm(out, 2).max()):.4g}"
                    error = f"{float((out - exact).norm() / exact.norm()):.2g}"
                name = str(dtype).removeprefix("torch.")
                table.append((entry["tensor"], method, name, used, before, str(lost), sigma, error))
    return table
