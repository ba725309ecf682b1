"""What every rank of `test_optimizer_ranks` runs: `NorMuon` beside the same optimizer of one
device. gloo on CPU, eagerly.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normuon_fn as nm
from tests.optim.saved_state import WAYS, by_name, differing, hand_over, regrouped

STEPS, BAD = 5, 3  # the step in which the last rank alone has a NaN
EXACT = nm.Config(
    orthogonalize_dtype=torch.float32
)  # else CPUs that have bfloat16 units multiply in bfloat16


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 6))


def groups(model: nn.Module, lr: float = 0.02) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if n == "0.weight"], "lr": lr, "momentum": 0.8},
        {"params": [(n, p) for n, p in named if n == "2.weight"], "lr": 2 * lr, "beta2": 0.5},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "lr": lr, "algorithm": "adamw"},
    ]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(model: nn.Module, optimizer: nm.NorMuon, steps: range, bad: bool = False) -> list[bool]:
    """Whether each step was skipped.

    Every rank has the same batch, and so the gradient of one device.
    """
    skipped = []
    for k in steps:
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(k))
        model(x).square().mean().backward()
        if bad and k == BAD:
            grad = next(p.grad for name, p in model.named_parameters() if name == "2.weight")
            assert grad is not None
            local(grad).view(-1)[0] = float("nan")
        optimizer.step()
        assert optimizer.result is not None
        skipped.append(bool(optimizer.result.skipped))
    return skipped


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def fsdp2(last: bool) -> dict[str, Any]:
    def sharded(seed: int) -> nn.Module:
        model = model_of(seed)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model

    model = sharded(0)
    optimizer = nm.NorMuon(groups(model), guard="full", config=EXACT)
    keys = {
        name: sorted(kept)
        for name, kept in dcp.get_optimizer_state_dict(model, optimizer)["state"].items()
    }
    skipped = train(model, optimizer, range(STEPS), bad=last)
    params = whole(model)
    resumed = sharded(1)
    again = nm.NorMuon(groups(resumed, lr=0.5), guard="full", config=EXACT)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    dcp.set_optimizer_state_dict(
        resumed, again, copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    )
    train(model, optimizer, range(STEPS, STEPS + 2))
    train(resumed, again, range(STEPS, STEPS + 2))
    return {
        "keys": keys,
        "skipped": skipped,
        "off": off(params, alone()),
        "resumed": off(whole(resumed), whole(model)),
    }


def reordered(last: bool) -> dict[str, Any]:
    """What differs after torch's functions gave an optimizer's state to one of another order."""

    def made(seed: int, kind: Any, other: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, kind(regrouped(model, other=other, lr=(0.1, 0.1) if other else (0.5, 0.01)))

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    found: dict[str, list[str]] = {}
    for kind in (nm.NorMuon, torch.optim.AdamW):
        model, optimizer = made(0, kind, False)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        for way in WAYS:
            other, into = made(1, kind, True)
            place = Path(folder[0]) / f"{kind.__name__} {way}"
            hand_over(way, place, model, optimizer, other, into)
            found[f"{kind.__name__} {way}"] = differing(
                by_name(model, optimizer), by_name(other, into)
            )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return found


def ddp(last: bool) -> dict[str, Any]:
    model = model_of()
    optimizer = nm.NorMuon(
        groups(model),
        guard="full",
        config=EXACT,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
    )
    skipped = train(model, optimizer, range(STEPS), bad=last)
    first = {name: p.clone() for name, p in whole(model).items()}
    for p in first.values():
        dist.broadcast(p, 0)
    return {
        "skipped": skipped,
        "off": off(whole(model), alone()),
        "from the first rank": off(whole(model), first),
    }


def owned(last: bool) -> dict[str, Any]:
    """As `ddp`, where each matrix's state is on its owner alone."""

    def made(seed: int, lr: float = 0.02, learns: bool = True) -> tuple[nn.Module, nm.NorMuon]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = model_of(seed).requires_grad_(learns)
        config = dataclasses.replace(EXACT, replicas="share")
        return model, nm.NorMuon(groups(model, lr), guard="full", config=config, mesh=mesh)

    model, optimizer = made(0)
    skipped = train(model, optimizer, range(STEPS), bad=True)  # DDP averages: all have it
    params = whole(model)
    keys = {
        name: sorted(kinds)
        for name, kinds in dcp.get_optimizer_state_dict(model, optimizer)["state"].items()
    }
    gathered = copy.deepcopy(optimizer.gathered_state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.get_optimizer_state_dict(model, optimizer)
        quiet = len(caught)
        part = copy.deepcopy(optimizer.state_dict())
        optimizer.state_dict()
    said = [str(w.message) for w in caught[quiet:]]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    saved = {"optimizer": dcp.get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(saved, checkpoint_id=folder[0])

    model.requires_grad_(False)
    optimizer.release()  # which forgets what was planned
    gathered_frozen = copy.deepcopy(optimizer.gathered_state_dict())
    model.requires_grad_(True)

    def resumed(
        load: Callable[[nn.Module, nm.NorMuon], None], one: bool = False, learns: bool = True
    ) -> nn.Module:
        other, again = made(1, 0.5, learns)
        if one:  # of a single device, which keeps all
            again = nm.NorMuon(groups(other, 0.5), guard="full", config=EXACT, mesh="alone")
        other.load_state_dict(copy.deepcopy(params))
        load(other, again)
        other.requires_grad_(True)
        train(other, again, range(STEPS, STEPS + 2))
        return other

    def from_checkpoint(other: nn.Module, again: nm.NorMuon) -> None:
        into = {"optimizer": dcp.get_optimizer_state_dict(other, again)}
        checkpoint.load(into, checkpoint_id=folder[0])
        dcp.set_optimizer_state_dict(other, again, into["optimizer"])

    others = {
        "checkpoint": resumed(from_checkpoint),
        "checkpoint, one": resumed(from_checkpoint, one=True),
        "own part": resumed(lambda _, again: again.load_state_dict(part)),
        "gathered": resumed(lambda _, again: again.load_state_dict(gathered)),
        "gathered, into a frozen model": resumed(
            lambda _, again: again.load_state_dict(gathered), learns=False
        ),
        "gathered of a frozen model": resumed(
            lambda _, again: again.load_state_dict(gathered_frozen)
        ),
        "gathered, one": resumed(lambda _, again: again.load_state_dict(gathered), one=True),
    }
    error = ""
    try:
        made(1)[1].load_state_dict(parts[0 if last else -1])
    except ValueError as raised:
        error = str(raised)
    train(model, optimizer, range(STEPS, STEPS + 2))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return {
        "skipped": skipped,
        "off": off(params, alone()),
        "keys": keys,
        "resumed": {how: off(whole(other), whole(model)) for how, other in others.items()},
        "error": error,
        "said": [quiet, *said],
    }


def nameless(last: bool) -> dict[str, Any]:
    """State on its owners alone, of parameters without names, whose routes nothing tells apart."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))

    def made(heads: int) -> nm.NorMuon:
        routes = {"0.weight": nm.Route(heads=4), "1.weight": nm.Route(heads=heads)}
        return nm.NorMuon(
            list(model.parameters()), mesh=mesh, config=nm.Config(replicas="share"),
            routes=nm.routes_for(model, routes),
        )  # fmt: skip

    optimizer = made(2)
    for p in model.parameters():
        p.grad = torch.eye(16)
    optimizer.step()
    saved, errors = dcp.get_optimizer_state_dict(model, optimizer), {}
    for what, heads, given in (
        ("the same", 2, saved), ("other heads", 8, optimizer.state_dict()),
    ):  # fmt: skip
        again = made(heads)
        try:
            if given is saved:
                dcp.set_optimizer_state_dict(model, again, copy.deepcopy(saved))
            else:
                again.load_state_dict(copy.deepcopy(given))
            errors[what] = ""
        except ValueError as error:
            errors[what] = str(error)
    return errors


def unlike(last: bool) -> dict[str, Any]:
    """Ranks whose optimizers are not alike."""
    try:
        nm.NorMuon(
            groups(model_of()),
            mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
            config=nm.Config(nesterov=last),
        )
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def alone() -> dict[str, Tensor]:
    """One device, that never saw the bad batch."""
    model = model_of()
    optimizer = nm.NorMuon(groups(model), guard="full", config=EXACT)
    for k in range(STEPS):
        if k != BAD:
            train(model, optimizer, range(k, k + 1))
    return whole(model)


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "fsdp2": fsdp2,
    "reordered": reordered,
    "ddp": ddp,
    "owned": owned,
    "nameless": nameless,
    "unlike": unlike,
}


def main(rank: int, world: int, device: torch.device) -> dict[str, Any]:
    return {name: case(rank == world - 1) for name, case in CASES.items()}
