"""A small convolutional network on scikit-learn's 1797 handwritten digits: NorMuon or AdamW."""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normuon_fn as nm

TRAIN = 1437  # of 1797; the rest, written by others, is what the accuracy is of


def data() -> tuple[Tensor, Tensor]:
    """[1797, 1, 8, 8] from 0 to 1, and the digits."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(digits.target).long()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def optimizer_of(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    routes = nm.routes_for(
        model, {"11.weight": nm.Route("adamw")}
    )  # the classifier; convolutions are flattened
    print(routes)
    return nm.NorMuon(
        model.named_parameters(), lr=lr, weight_decay=0.1, guard="full", routes=routes
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == targets).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=("normuon", "adamw"), default="normuon")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-compile", action="store_true", help="operation by operation: starts at once"
    )
    args = parser.parse_args()
    if args.no_compile:
        torch.compiler.set_stance("force_eager")
    torch.manual_seed(args.seed)
    images, targets = data()
    model = network()
    optimizer = optimizer_of(args.optimizer, model, args.lr)
    steps = args.epochs * (TRAIN // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, cycle_momentum=False
    )
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for rows in torch.randperm(TRAIN).split(args.batch)[: TRAIN // args.batch]:
            loss = F.cross_entropy(model(images[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        reached = accuracy(model, images[TRAIN:], targets[TRAIN:])
        print(
            f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {reached:.4f}, "
            f"{time.perf_counter() - start:.1f} s"
        )
    print(f"accuracy: {reached:.4f} {args.optimizer}")


if __name__ == "__main__":
    main()
