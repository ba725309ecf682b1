"""What every framework is given here: a small network on tokens that can be learned, and the bits
it ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normuon_fn as nm

TOKENS, LENGTH, ROWS = 16, 8, 4


def batch(k: int) -> Tensor:
    """[ROWS, LENGTH]: every token follows from the one before."""
    start = torch.randint(TOKENS, (ROWS, 1), generator=torch.Generator().manual_seed(k))
    return (start + 3 * torch.arange(LENGTH)) % TOKENS


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(TOKENS, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss."""
        x = self.embed(tokens[:, :-1])
        x = self.norm(x + self.down(F.silu(self.up(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def optimizer_of(model: nn.Module, lr: float = 0.05, **options: Any) -> nm.NorMuon:
    """Two groups, one of them AdamW's, and routes from the modules."""
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    vectors = [(name, p) for name, p in named if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "algorithm": "adamw", "lr": lr / 2}]
    return nm.NorMuon(
        groups, lr=lr, weight_decay=0.01, guard="full", routes=nm.routes_for(model), **options
    )


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and every tensor of the optimizer's state."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for k, kept in optimizer.state_dict()["state"].items():
        found |= {f"{k}.{kind}": x.clone() for kind, x in kept.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def norm_of(params: Iterable[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))


def by_hand(
    steps: int,
    *,
    clip: float | None = None,
    in_groups: bool = False,  # the norm is added up in the order of the groups
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    backward_inside: bool = False,  # of autocast
    scale: float | None = None,
    parameters: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """The plain loop: what it ends with, and its losses."""
    model = Net().to(parameters)
    optimizer = optimizer_of(model, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    schedule = None if scheduler is None else scheduler(optimizer)
    losses = []
    for k in range(steps):
        for i in range(accumulate):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(batch(k * accumulate + i))
                if backward_inside:
                    scaler.scale(loss / accumulate).backward()
            if not backward_inside:
                scaler.scale(loss / accumulate).backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            scaler.unscale_(optimizer)
            grouped = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(grouped if in_groups else model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return bits(model, optimizer), losses
