"""`routes_for` on what torch's and Lightning's own wrappers make of a model, on one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normuon_fn as nm
from normuon_fn.routing.uses import unwrapped
from tests.routing.test_routes_wrapped import Block, Distilled, Named, with_a_sequential_head


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def lightning(model: nn.Module) -> nn.Module:
    module = pytest.importorskip("lightning")

    class Task(module.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.anything, self.criterion = model, nn.CrossEntropyLoss()

    return Task()


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    return model


def in_fsdp2(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module)
    return fully_shard(model)


REAL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda m: torch.compile(DistributedDataParallel(m)),  # type: ignore[dict-item]
    "DDP of a compiled model": lambda m: DistributedDataParallel(torch.compile(m)),  # type: ignore[arg-type]
    "replicate": replicate,
    "FSDP2": in_fsdp2,
    "AveragedModel": AveragedModel,
    "AveragedModel, EMA": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "OptimizedModule": torch.compile,  # type: ignore[dict-item]
    "activation checkpoints": checkpointed,
    "LightningModule": lightning,
    "LightningModule of a compiled model": lambda m: lightning(torch.compile(m)),  # type: ignore[arg-type]
}
OUTER = ("anything",)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", REAL)
@pytest.mark.parametrize("make", [Named, with_a_sequential_head, Distilled])
def test_every_parameter_has_the_rule_and_the_certainty_of_the_bare_model(
    make: Callable[[], nn.Module], wrapper: str
) -> None:
    bare = nm.routes_for(make()).decisions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its deprecated ways
        model = REAL[wrapper](make())
    found = {}
    for name, decision in nm.routes_for(model).decisions().items():
        short = ".".join(part for part in unwrapped(name) if part not in OUTER)
        route = decision.route.unfrozen or decision.route
        found[short if short in bare else f"{short}.weight"] = route, decision.certainty
    expected = {name: (d.route, d.certainty) for name, d in bare.items()}
    assert {name: found[name] for name in expected} == expected
    assert any(d.reason.startswith("output head") for d in bare.values())


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_on_one_process_is_refused_where_it_flattens_and_read_where_it_does_not(
    use_orig_params: bool,
) -> None:
    """On one rank FSDP1 shards nothing: with ``use_orig_params`` the shapes stay."""
    model = FullyShardedDataParallel(
        Named(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    if not use_orig_params:
        with pytest.raises(ValueError, match=r"flattened by FSDP1.*fully_shard"):
            nm.NorMuon(model)
        return
    optimizer = nm.NorMuon(model)
    found = {
        ".".join(unwrapped(name)): "momentum" in optimizer.state[p]
        for name, p in model.named_parameters()
    }
    bare = {
        ".".join(unwrapped(name)): route.algorithm == "normuon"
        for name, route in nm.routes_for(Named()).items()
    }
    assert found == bare


def originals(model: nn.Module) -> dict[str, str]:
    """The rule of what each parametrized weight is made from."""
    return {
        name.partition("parametrizations.weight.")[2]: route.algorithm
        for name, route in nm.routes_for(model).items()
        if "parametrizations.weight." in name and not name.endswith("_u")
    }


PARAMETRIZED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, str]]] = {
    "weight_norm": (parametrizations.weight_norm, {"original0": "adamw", "original1": "normuon"}),
    "orthogonal": (parametrizations.orthogonal, {"original": "adamw"}),
    "spectral_norm": (parametrizations.spectral_norm, {"original": "normuon"}),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_weight_has_the_rule_of_the_weight(kind: str) -> None:
    """Of a layer the direction is a matrix, but for a triangle that stands for an orthogonal one;
    of an output head all of it gets AdamW."""
    apply, expected = PARAMETRIZED[kind]
    model = Named()
    apply(model.layers[0].fc)  # type: ignore[union-attr, index]
    found = {n: rule for n, rule in originals(model).items() if n in expected}
    assert found == expected
    model = Named()
    apply(model.fc)
    found = {n: rule for n, rule in originals(model).items() if n in expected}
    assert found == dict.fromkeys(expected, "adamw")
    assert nm.routes_for(model).unsure() == {}


def test_a_wrapped_model_gives_no_warning_and_its_named_parameters_the_same_rules(
    one_process: None,
) -> None:
    model = DistributedDataParallel(Named())
    by_model, by_table = (
        nm.NorMuon(model), nm.NorMuon(model.named_parameters(), routes=nm.routes_for(model.module))
    )  # fmt: skip
    for p in model.parameters():
        assert by_model.state[p].keys() == by_table.state[p].keys()
