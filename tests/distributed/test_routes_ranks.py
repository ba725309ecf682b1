"""Transposed matrices and parts of stacks on two ranks (gloo, CPU), beside the same steps on one
device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import normuon_fn as nm
from tests.distributed.processes import run_ranks

SHAPES = {
    "turned": (10, 24),
    "c_attn": (10, 24),
    "gate_up": (3, 12, 8),
    "gate_up.turned": (4, 8, 12),
}
ROUTES = {
    "turned": nm.Route(transposed=True),
    "c_attn": nm.Route(transposed=True, splits=(12, 7, 5), dim=1),
    "gate_up": nm.Route(splits=(5, 7)),
    "gate_up.turned": nm.Route(transposed=True, splits=(5, 7), dim=1),
}
CONFIGS = {
    "paper": nm.Config(orthogonalize_dtype=torch.float32),
    "dion": nm.Config.preset("dion", orthogonalize_dtype=torch.float32),
}
DIMS = (0, 1, 2)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(
    params: dict[str, Tensor], grads: list[dict[str, Tensor]], config: nm.Config
) -> dict[str, Tensor]:
    plan = nm.make_plan(params, config, routes=ROUTES)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, weight_decay=0.1)
    for grad in grads:
        params, state, _, _ = nm.update(params, grad, state, hyper, plan)
    return {
        **params,
        **{name: tensor for name, tensor in state.items() if not name.startswith("guard")},
    }


def _main(rank: int, world: int, device: torch.device) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (world,))
    seen = {}
    for name, config in CONFIGS.items():
        alone = stepped(tensors(0), [tensors(1), tensors(2)], config)
        for dim in DIMS:

            def place(given: dict[str, Tensor], dim: int = dim) -> dict[str, Tensor]:
                return {
                    k: distribute_tensor(x, mesh, [Shard(min(dim, x.ndim - 1))])
                    for k, x in given.items()
                }

            ours = stepped(place(tensors(0)), [place(tensors(1)), place(tensors(2))], config)
            for key, tensor in ours.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                seen[f"{name} Shard({dim}) {key}"] = float((whole - alone[key]).abs().max())
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run_ranks(_main, 2, tmp_path_factory.mktemp("ranks"))


def test_shards_of_transposed_matrices_and_of_split_stacks_step_as_on_one_device(
    ranks: list[dict[str, float]],
) -> None:
    for seen in ranks:
        assert len(seen) == len(CONFIGS) * len(DIMS) * 3 * len(SHAPES)
        assert max(seen.values()) <= 5e-7, {
            key: error for key, error in seen.items() if error > 5e-7
        }  # seen 0
