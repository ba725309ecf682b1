"""A transformer named as torchtitan names them: a dense block, and one with experts. Never run."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

DIM, HIDDEN, HEADS, KV_HEADS, EXPERTS = 24, 40, 6, 2, 4


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, KV_HEADS, DIM // HEADS
        kv = self.n_kv_heads * self.head_dim
        if fused:
            self.wqkv = nn.Linear(DIM, DIM + 2 * kv, bias=False)
        else:
            self.wq, self.wk, self.wv = (nn.Linear(DIM, n, bias=False) for n in (DIM, kv, kv))
        self.wo = nn.Linear(DIM, DIM, bias=False)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)


class GroupedExperts(nn.Module):
    def __init__(self, *, by_inputs: bool) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        up, down = ((DIM, HIDDEN), (HIDDEN, DIM)) if by_inputs else ((HIDDEN, DIM), (DIM, HIDDEN))
        self.w1, self.w2, self.w3 = (
            nn.Parameter(torch.randn(EXPERTS, *shape)) for shape in (up, down, up)
        )


class TokenChoiceTopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)


class MoE(nn.Module):
    def __init__(self, *, by_inputs: bool) -> None:
        super().__init__()
        self.experts, self.router = GroupedExperts(by_inputs=by_inputs), TokenChoiceTopKRouter()


class Block(nn.Module):
    def __init__(self, *, moe: bool, by_inputs: bool) -> None:
        super().__init__()
        self.attention = Attention(fused=moe)
        if moe:
            self.moe = MoE(by_inputs=by_inputs)
        else:
            self.feed_forward = FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)


class Transformer(nn.Module):
    def __init__(self, *, by_inputs: bool = False) -> None:
        super().__init__()
        self.model_args = SimpleNamespace(dim=DIM)
        self.tok_embeddings = nn.Embedding(50, DIM)
        self.layers = nn.ModuleDict(
            {str(k): Block(moe=k == 1, by_inputs=by_inputs) for k in range(2)}
        )
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, 50, bias=False)
