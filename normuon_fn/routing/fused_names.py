"""Projections that are fused by name alone: left whole, with the route that splits them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .doubts import left_whole
from .feedforward import GATE_UP
from .projections import is_fused_kv, is_fused_qkv
from .routes import Decision, Route
from .uses import is_window, unwrapped

_RECURRENT = re.compile(r"(^|\.)weight_(ih|hh)(_l\d+(_reverse)?)?$")
_CONV1D = re.compile(r"c_attn$")  # of GPT-2, stored [inputs, outputs]


def doubted(name: str, shapes: Mapping[str, tuple[int, ...]], found: Decision) -> Decision:
    """The decision for a matrix, likely where its name says that it is several."""
    route, shape = found.route, shapes[name]
    if route.algorithm != "normuon" or route.splits or route.heads:
        return found
    recurrent = bool(_RECURRENT.search(name)) and len(shape) == 2
    what, sizes = _gates(name, shapes) if recurrent else _parts(name, shape)
    if len(sizes) < 2:
        return found
    dim = _dim(name, shape)
    other = Route(flatten=route.flatten, splits=sizes, dim=dim, transposed=dim == 1)
    reason = "matrix" if found.certainty == "untold" else found.reason  # the name tells more
    return Decision(route, left_whole(f"{reason}: {what} by name", other), "likely")


def _parts(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    parts = unwrapped(name)
    own = parts[-1].removesuffix("_weight") if parts else ""
    dim = _dim(name, shape)
    across = shape[:2] if len(shape) == 2 or is_window(shape) else shape[-2:]
    outputs, inputs = across[dim], across[1 - dim]
    if is_fused_qkv(own) and not (own == "c_attn" and outputs == 2 * inputs):
        if own == "in_proj" and outputs != 3 * inputs:
            return "", ()  # of a Mamba, mostly
        return "q, k and v", _qkv(outputs, inputs)
    if is_fused_kv(own) and outputs % 2 == 0:
        return "k and v", (outputs // 2,) * 2
    if GATE_UP.match(own) and outputs % 2 == 0:
        return "gate and up", (outputs // 2,) * 2
    return "", ()


def _qkv(outputs: int, inputs: int) -> tuple[int, ...]:
    """As many queries as inputs, where the rest are two halves; else three thirds."""
    rest = outputs - inputs
    if outputs != 3 * inputs and rest > 0 and rest % 2 == 0 and inputs % (rest // 2) == 0:
        return inputs, rest // 2, rest // 2
    if outputs % 3 == 0:
        return (outputs // 3,) * 3
    return outputs - 2 * (outputs // 3), outputs // 3, outputs // 3


def _gates(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    """Four of an LSTM, three of a GRU, one of a plain cell, as the recurrent weight tells."""
    rows, hidden = shapes.get(name.replace("weight_ih", "weight_hh"), (0, 0))
    count = rows // hidden if hidden and rows % hidden == 0 else 1
    return "the gates of a recurrent cell", (hidden,) * count


def _dim(name: str, shape: Sequence[int]) -> int:
    """1 where the outputs are the columns, as GPT-2 keeps them."""
    parts = unwrapped(name)
    stored = bool(parts) and bool(_CONV1D.search(parts[-1]))
    return int(len(shape) == 2 and stored and shape[1] > shape[0])
