"""What is known of an attention: how many heads for q, k and v, and how large each one is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .attributes import first, get, is_layer, outputs_and_inputs, sources_of

# The names of configurations, then those that research code uses.
HEADS = (
    "num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "num_q_heads", "n_q_heads",
    "attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_head", "nheads",
    "heads", "nh", "h", "n_h", "num_local_heads", "n_local_heads", "H",
)  # fmt: skip
_KV_HEADS = (
    "num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head", "num_query_groups",
    "n_query_groups", "num_local_key_value_heads", "n_local_kv_heads", "kv_heads", "n_kv", "nkv",
    "num_kv", "kv", "nheads_kv", "num_heads_kv", "heads_kv", "n_head_kv", "num_head_kv",
)  # fmt: skip
_HEAD_DIM = (
    "head_dim", "attention_head_size", "head_size", "d_head", "dim_head", "hd", "dh", "d_k",
    "key_value_proj_dim", "attention_head_dim", "kv_channels", "head_width",
)  # fmt: skip
_OUT = (
    "o_proj", "out_proj", "wo", "c_proj", "proj", "dense", "to_out", "out", "o", "output",
    "proj_out", "attn_out", "Wo", "w_o", "out_lin", "linear_out", "o", "W_o", "attn_proj",
)  # fmt: skip


class Attention(NamedTuple):
    """What is known of the attention that a projection belongs to."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    q: int | None = None  # the outputs of all queries: what its output projection takes in

    def __str__(self) -> str:
        if self.heads is None:
            return "heads whose number is not known"
        parts = [f"{self.heads} heads"]
        if self.kv_heads not in (None, self.heads):
            parts.append(f"{self.kv_heads} of k and v")
        return ", ".join(parts) + (f" of {self.head_dim}" if self.head_dim else "")


def attention(owners: Sequence[nn.Module]) -> Attention:
    """The numbers of the nearest module, or configuration of one, that has them."""
    sources = sources_of(owners)
    heads = first(sources, HEADS)
    kv_heads = first(sources, _KV_HEADS)
    if kv_heads is not None and heads is not None and heads % kv_heads:
        kv_heads = None  # a number of something else
    groups = first(sources, ("num_key_value_groups", "n_rep", "num_queries_per_kv"))
    if kv_heads is None and groups and heads and heads % groups == 0:
        kv_heads = heads // groups
    if kv_heads is None and any(get(source, "multi_query") is True for source in sources):
        kv_heads = 1
    return Attention(heads, kv_heads, first(sources, _HEAD_DIM), output_inputs(owners))


def output_inputs(owners: Sequence[nn.Module], names: Sequence[str] = _OUT) -> int | None:
    """How many inputs the projection has that stands beside the one asked about as its output."""
    for owner in owners[:3]:
        for name in names:
            module = get(owner, name)
            if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
                module = module[0]
            if isinstance(module, nn.Module) and is_layer(module):
                return outputs_and_inputs(module)[1]
    return None
