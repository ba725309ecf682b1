"""Fused projections that are convolutions: split where a linear layer's would be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm


class Attention(nn.Module):
    def __init__(self, qkv: nn.Module, out: nn.Module, name: str = "qkv", **own: Any) -> None:
        super().__init__()
        for key, value in own.items():
            setattr(self, key, value)
        self.add_module(name, qkv)
        self.proj = out

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def routed(module: nn.Module, name: str, **how: Any) -> tuple[nm.Route, str]:
    table = nm.routes_for(nn.ModuleDict({"attn": module, "mlp": nn.Linear(4, 4)}), **how)
    entry = table.entries[f"attn.{name}.weight"]
    assert entry.certainty == "certain"
    return entry.route, entry.reason


SPLIT = nm.Route(flatten=True, splits=(32, 32, 32))


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "qkv_proj"])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("window", [1, 3])
def test_a_fused_qkv_that_is_a_convolution_is_split_as_a_linear_one(
    name: str, conv: Any, window: int
) -> None:
    made = Attention(conv(32, 96, window), conv(32, 32, 1), name, num_heads=2)
    route, reason = routed(made, name)
    assert route == SPLIT and reason.endswith("fused qkv: 2 heads of 16")
    linear = Attention(nn.Linear(32, 96), nn.Linear(32, 32), name, num_heads=2)
    assert routed(linear, name)[0].splits == route.splits
    route, _ = routed(made, name, per_head=True)
    assert route == nm.Route(flatten=True, splits=(32, 32, 32), heads=(2, 2, 2))


@pytest.mark.parametrize(("name", "outputs", "splits"), [
    ("qkv", 64, (32, 16, 16)), ("kv", 64, (32, 32)), ("gate_up_proj", 128, (64, 64)),
    ("proj", 96, None), ("conv1", 96, None),
])  # fmt: skip
def test_the_parts_of_a_convolution_are_those_of_the_linear_layer_of_its_name(
    name: str, outputs: int, splits: tuple[int, ...] | None
) -> None:
    own = {"num_heads": 4, "num_kv_heads": 2} if name == "qkv" else {"num_heads": 4}
    found = [
        routed(Attention(make(outputs), nn.Conv2d(32, 32, 1), name, **own), name)[0]
        for make in (lambda n: nn.Conv2d(32, n, 1), lambda n: nn.Linear(32, n))
    ]
    assert [route.splits for route in found] == [splits, splits]


def test_a_transposed_convolution_is_split_along_its_outputs() -> None:
    made = Attention(nn.ConvTranspose2d(32, 96, 2), nn.Conv2d(32, 32, 1), num_heads=2)
    route, _ = routed(made, "qkv")
    assert route == nm.Route(flatten=True, splits=(32, 32, 32), dim=1, transposed=True)
    plan = nm.make_plan(made, routes=nm.routes_for(made))
    blocks = next(p.blocks for p in plan.parameters if p.name == "qkv.weight")
    assert [block.param.shape for block in blocks] == [(32, 128)] * 3
    made = Attention(nn.ConvTranspose2d(32, 96, 1, groups=2), nn.Conv2d(32, 32, 1), num_heads=2)
    assert routed(made, "qkv")[0].splits is None


class QKVAttentionLegacy(nn.Module):
    """Named as in guided diffusion, whose heads bring their q, k and v one after the other."""


@pytest.mark.parametrize(("case", "said"), [
    ({"num_heads": 3, "head_dim": 7}, "96 outputs are not those of 3 heads of 7; give splits="),
    ({"attention": QKVAttentionLegacy(), "num_heads": 2}, "take turns head by head; heads=6"),
])  # fmt: skip
def test_a_convolution_that_is_left_whole_says_why(case: dict, said: str) -> None:
    made = Attention(nn.Conv1d(24, 96, 1), nn.Conv1d(24, 24, 1), **case)
    route, reason = routed(made, "qkv")
    assert route == nm.Route(flatten=True) and "left whole" in reason and said in reason


def test_heads_of_guided_diffusion_step_alone_where_asked() -> None:
    made = Attention(
        nn.Conv1d(32, 96, 1), nn.Conv1d(32, 32, 1), attention=QKVAttentionLegacy(), num_heads=2
    )
    assert routed(made, "qkv", per_head=True)[0] == nm.Route(flatten=True, heads=6)


def test_outputs_that_may_be_a_pixel_shuffle_of_one_dimension_are_not_taken_for_a_gate() -> None:
    made = Attention(nn.Conv1d(8, 16, 1), nn.Identity(), name="up", proj_out=nn.Conv1d(8, 8, 3))
    route, reason = routed(made, "up")
    assert route == nm.Route(flatten=True)
    assert reason.endswith("which may be gate and up; give splits=")
    layers = nn.Sequential(nn.Conv1d(3, 16, 1), nn.Conv1d(16, 8, 1, groups=2))
    assert nm.routes_for(layers)["0.weight"] == nm.Route(flatten=True)


@pytest.mark.usefixtures("eager")
def test_a_diffusion_attention_trains_as_the_linear_one_of_the_same_numbers() -> None:
    torch.manual_seed(0)
    linear = Attention(nn.Linear(32, 96), nn.Linear(32, 32), num_heads=2)
    conv = Attention(nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1), num_heads=2)
    with torch.no_grad():
        for a, b in zip(conv.parameters(), linear.parameters(), strict=True):
            a.copy_(b.view(a.shape))
    for model in (linear, conv):
        optimizer = nm.NorMuon(model, lr=0.02)
        for seed in range(2):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.numel()).view(p.shape)
            optimizer.step()
    for a, b in zip(conv.parameters(), linear.parameters(), strict=True):
        assert torch.equal(a.view(b.shape), b)
