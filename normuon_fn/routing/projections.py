"""Projections that a model keeps as one matrix: where q, k and v, gate and up, or the gates of a recurrent cell begin and end.

Sizes are read from the modules' attributes and configurations, and count only if they add up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

_HEADS = (
    "num_heads",
    "n_heads",
    "num_attention_heads",
    "n_head",
    "nhead",
    "num_q_heads",
    "n_q_heads",
)
_KV_HEADS = (
    "num_key_value_heads",
    "n_kv_heads",
    "num_kv_heads",
    "n_kv_head",
    "num_query_groups",
    "n_query_groups",
)
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head")
_QKV = re.compile(r"((^|_)w?qkv(_|$)|^(query_key_value|c_attn|att_proj|w_pack)$)", re.IGNORECASE)
_KV = re.compile(r"^(kv|kv_proj|to_kv|wkv|key_value|c_attn)$", re.IGNORECASE)
_GATE_UP = re.compile(
    r"^(gate_up_proj|up_gate_proj|gate_up|w13|w1w3|w12|Wi)$"
)  # T5's `wi` is one matrix
_QUERY = re.compile(r"^(q_proj|q|wq|query|to_q)$")
_KEY_VALUE = re.compile(r"^([kv]_proj|[kv]|w[kv]|key|value|to_[kv])$")
# Whose q, k and v take turns head by head, so that no three ranges of rows are q, k and v: the classes' names begin so.
_TAKE_TURNS = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "InternLM2", "CodeGen", "GPTBigCode")


class Cut(NamedTuple):
    """``splits`` and ``heads`` of a Route along the outputs, or neither, and why."""

    splits: tuple[int, ...] | None
    heads: int | tuple[int, ...] | None
    reason: str


class Attention(NamedTuple):
    """What is known of the attention that a projection belongs to."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None


def cut(
    own: str, owners: Sequence[nn.Module], outputs: int, inputs: int, *, per_head: bool
) -> Cut | None:
    """How the projection ``own`` of [outputs, inputs] falls into parts; ``None``: it is one matrix.

    ``owners``: the modules that it lies in, the nearest first.
    """
    if _GATE_UP.match(own):
        return _gate_up(owners, outputs)
    known = attention(owners)
    fused_kv = _KV.match(own) and _halves(own, known, outputs, inputs)
    if _QKV.search(own) and not fused_kv:
        return _qkv(own, owners, known, outputs, inputs, per_head)
    if fused_kv:
        each = known.kv_heads or known.heads
        heads = (each, each) if per_head and each and outputs // 2 % each == 0 else None
        return Cut((outputs // 2, outputs // 2), heads, "k and v of equal size")
    if per_head and (_QUERY.match(own) or _KEY_VALUE.match(own)):
        count = known.heads if _QUERY.match(own) else known.kv_heads or known.heads
        if count and outputs % count == 0 and known.head_dim in (None, outputs // count):
            return Cut(None, count, f"{count} heads of {outputs // count}")
        return Cut(None, None, "matrix, left whole: the number of heads is not known")
    return None


def attention(owners: Sequence[nn.Module]) -> Attention:
    """The numbers of the nearest module, or configuration of one, that has them."""
    sources = [
        source
        for owner in owners
        for source in (owner, _get(owner, "config"))
        if source is not None
    ]
    heads = _first(sources, _HEADS)
    kv_heads = _first(sources, _KV_HEADS)
    groups = _first(sources, ("num_key_value_groups",))
    if kv_heads is None and groups and heads and heads % groups == 0:
        kv_heads = heads // groups
    if kv_heads is None and any(_get(source, "multi_query") is True for source in sources):
        kv_heads = 1
    return Attention(heads, kv_heads, _first(sources, _HEAD_DIM))


def _qkv(
    own: str,
    owners: Sequence[nn.Module],
    known: Attention,
    outputs: int,
    inputs: int,
    per_head: bool,
) -> Cut:
    where = kind_of(owners[0]) if owners else ""
    for name in map(kind_of, owners[:2]):
        if name.startswith(_TAKE_TURNS) and not _contiguous(owners, known):
            blocks = (
                ""
                if known.heads is None
                else f"; heads={3 * known.heads} would give every head's q, k and v its own"
            )
            return Cut(
                None,
                None,
                f"fused qkv, left whole: in {name} q, k and v take turns head by head{blocks}",
            )
    if own == "linear_qkv":
        return Cut(
            None,
            None,
            "fused qkv, left whole: in Megatron's linear_qkv q, k and v take turns group by group",
        )
    key, value = _first(owners, ("key_dim",)), _first(owners, ("value_dim",))
    if key and value and 2 * key + value == outputs:
        return Cut(
            (key, key, value), None, f"fused qkv: key_dim {key}, value_dim {value} of {where}"
        )
    if known.heads is not None:
        for kv_heads in dict.fromkeys((known.kv_heads or known.heads, known.heads)):
            total = known.heads + 2 * kv_heads
            size = (
                known.head_dim
                if known.head_dim and total * known.head_dim == outputs
                else outputs // total
            )
            # Without a head_dim, q has as many outputs as it has inputs: so that a wrong number of heads does not pass.
            if total * size == outputs and (size == known.head_dim or known.heads * size == inputs):
                heads = (known.heads, kv_heads, kv_heads)
                splits = (known.heads * size, kv_heads * size, kv_heads * size)
                how = f"{known.heads} heads of {size}" + (
                    f", {kv_heads} of k and v" if kv_heads != known.heads else ""
                )
                return Cut(splits, heads if per_head else None, f"fused qkv: {how}")
        return Cut(
            None,
            None,
            f"fused qkv, left whole: {outputs} outputs are not those of {_describe(known)}; give splits=",
        )
    if outputs == 3 * inputs:
        return Cut((inputs,) * 3, None, "fused qkv: three times as many outputs as inputs")
    return Cut(None, None, "fused qkv, left whole: the number of heads is not known; give splits=")


def _contiguous(owners: Sequence[nn.Module], known: Attention) -> bool:
    """The kinds of those classes with one k and v for all heads keep them behind q."""
    return known.kv_heads == 1 and not any(
        _get(owner, "new_decoder_architecture") for owner in owners
    )


def _halves(own: str, known: Attention, outputs: int, inputs: int) -> bool:
    """Whether it is k and v alone, as in cross attention: as many as two projections of that attention have."""
    if known.head_dim is not None and (known.kv_heads or known.heads):
        return outputs == 2 * known.head_dim * (known.kv_heads or known.heads or 0)
    return outputs == 2 * inputs and own != "c_attn"


def _gate_up(owners: Sequence[nn.Module], outputs: int) -> Cut:
    where = kind_of(owners[0]) if owners else ""
    if _get(owners[0], "is_concatenated") is False or where.startswith("GptOss"):
        return Cut(None, None, f"gate and up, left whole: in {where} they take turns row by row")
    if outputs % 2:
        return Cut(None, None, f"gate and up, left whole: {outputs} outputs are not two halves")
    return Cut((outputs // 2,) * 2, None, "gate and up")


def recurrent(leaf: str, hidden: int, outputs: int) -> Cut | None:
    """The gates of an LSTM (4), a GRU (3) or a plain cell (1) lie one below the other."""
    gates = (
        outputs // hidden
        if leaf.startswith(("weight_ih", "weight_hh")) and outputs % hidden == 0
        else 1
    )
    return Cut((hidden,) * gates, None, f"{gates} gates of {hidden}") if gates > 1 else None


def _describe(known: Attention) -> str:
    parts = [f"{known.heads} heads"]
    parts += [f"{known.kv_heads} of k and v"] if known.kv_heads not in (None, known.heads) else []
    return ", ".join(parts) + (f" of {known.head_dim}" if known.head_dim else "")


def _first(sources: Sequence[Any], names: Sequence[str]) -> int | None:
    for source in sources:
        for name in names:
            value = _get(source, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def kind_of(module: nn.Module) -> str:
    """The class's name; of a TorchScript module or a parametrized one, that of what it was made of."""
    name = _get(module, "original_name") if isinstance(module, torch.jit.ScriptModule) else None
    return str(name or type(module).__name__).removeprefix("Parametrized")


def is_a(module: nn.Module, *types: type[nn.Module]) -> bool:
    """``isinstance``, of a TorchScript module too if its class is torch's."""
    if isinstance(module, torch.jit.ScriptModule):
        own = getattr(nn, kind_of(module), None)
        return isinstance(own, type) and issubclass(own, types)
    return isinstance(module, types)


def says_nothing(module: nn.Module) -> bool:
    """Whether the class is one that torch.fx, torch.export or TorchScript puts in the place of any, or `nn.Module` itself."""
    if isinstance(module, torch.jit.ScriptModule):
        return not hasattr(nn, kind_of(module))
    return type(module) is nn.Module or type(module).__module__.startswith(
        ("torch.fx.", "torch.export.")
    )


def _get(source: Any, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except Exception:  # a property that does not hold here
        return None
