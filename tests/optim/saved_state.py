"""Ways in which the state of an optimizer is saved and set again, for one process and for ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# "full_state_dict" beside "flatten_optimizer_state_dict" is a KeyError inside torch 2.13.
OPTIONS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "on the CPU": {"cpu_offload": True},
    "whole": {"full_state_dict": True},
}
WAYS = (*OPTIONS, "with the model", "a checkpoint", "a flattened checkpoint")


def hand_over(
    way: str,
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    other: nn.Module,
    into: Optimizer,
) -> None:
    """Gives ``into`` the state of ``optimizer``, through torch's own functions."""
    if way in OPTIONS:
        options = dsd.StateDictOptions(**OPTIONS[way])
        saved = copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer, options=options))
        dsd.set_optimizer_state_dict(other, into, saved, options=options)
    elif way == "with the model":
        weights, saved = copy.deepcopy(dsd.get_state_dict(model, optimizer))
        dsd.set_state_dict(other, into, model_state_dict=weights, optim_state_dict=saved)
    else:
        flat = way == "a flattened checkpoint"
        options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
        mine = dsd.get_optimizer_state_dict(model, optimizer, options=options)
        checkpoint.save({"optimizer": mine}, checkpoint_id=folder)
        theirs = {"optimizer": dsd.get_optimizer_state_dict(other, into, options=options)}
        checkpoint.load(theirs, checkpoint_id=folder)
        dsd.set_optimizer_state_dict(other, into, theirs["optimizer"], options=options)


def by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Every parameter's state and learning rate, with whole tensors."""
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return {
        name: {kind: _whole(x) for kind, x in optimizer.state[p].items()} | {"lr": rates[p]}
        for name, p in model.named_parameters()
        if p in rates
    }


def _whole(x: Any) -> Any:
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.detach().clone() if isinstance(whole, Tensor) else whole


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is not equal in two results of `by_name`."""
    assert a.keys() == b.keys()
    return [
        f"{name}.{kind}"
        for name in a
        for kind in sorted(a[name].keys() | b[name].keys())
        if not _equal(a[name].get(kind), b[name].get(kind))
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a.cpu() == b.cpu()).all())
    return type(a) is type(b) and a == b


def regrouped(model: nn.Module, *, other: bool, lr: tuple[float, float] = (0.5, 0.01)) -> Any:
    """Two groups of a model's parameters with their names; ``other``: all in another order.

    The first group has two parameters whose shapes are equal to those of two in the second.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[0].startswith("0.")], "lr": lr[0]},
        {"params": [pair for pair in named if not pair[0].startswith("0.")], "lr": lr[1]},
    ]
    if other:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    return groups
