"""Parameters for the graph tests: as few as show the thing, for a graph costs 0.5 s and more to
trace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import normuon_fn as nm

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

TINY: Shapes = {"w": (4, 4), "bias": (4,)}
SMALL: Shapes = {
    "wte": (12, 8),
    "qkv": (24, 8),
    "up": (32, 8),
    "down": (8, 32),
    "experts": (2, 8, 8),
    "bias": (8,),
}
ROUTES = {"qkv": nm.Route(splits=(8, 8, 8))}
# One Newton-Schulz step in the standard form: the same promises, a tenth of the nodes.
SHORT = {"method": "standard", "steps": 1, "orthogonalize_dtype": torch.float32}


class Problem(NamedTuple):
    params: Tensors
    grads: Tensors
    state: Tensors
    hyper: nm.Hyper
    plan: nm.Plan


def tensors(shapes: Shapes, seed: int = 0, device: str = "cpu") -> Tensors:
    torch.manual_seed(seed)
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def problem(
    shapes: Shapes, config: nm.Config, *, routes=None, ranks=None, device: str = "cpu"
) -> Problem:
    params = tensors(shapes, 0, device)
    plan = nm.make_plan(params, config, routes=routes, guard_mesh=ranks)
    return Problem(
        params,
        tensors(shapes, 1, device),
        nm.init(plan, params),
        nm.Hyper.of(params, lr=0.02),
        plan,
    )


def many(matrices: int, buckets: int) -> Shapes:
    """So many matrices in so many shapes, as small as they can be told apart."""
    return {f"layers.{k}": (2, 2 + k % buckets) for k in range(matrices)}


def copies(given: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in given.items()}
