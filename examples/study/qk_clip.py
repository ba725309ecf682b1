"""QK-clip: a small attention whose logits explode without it, and do not with it.

    python -m examples.study.qk_clip            # under a minute on one CPU core
    python -m examples.study.qk_clip --steps 4  # only to see that it runs

One attention of 4 heads learns to look up: in a sequence of keys and values it is asked for the
value of one of the keys. The answer needs a one-hot softmax, and a larger logit always makes the
loss a little smaller. With a large learning rate and no weight decay every step of NorMuon makes
queries and keys longer, so that their logits grow without a bound. `nm.qk_clip_` after each step,
with tau = 30, holds them there.

Writes qk_clip.json and qk_clip.png, with the largest logit and the loss by step.
"""

from __future__ import annotations

import argparse
import json

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import normuon_fn as nm
from examples.study.common import FOLDER, measured_on
from normuon_fn.step import local_update_

WIDTH, HEADS, KEYS, TAU, LR = 64, 4, 32, 30.0, 0.1


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.maximum = torch.zeros(HEADS)

    def forward(self, question: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in (
                (self.q_proj, question), (self.k_proj, keys), (self.v_proj, values),
            )
        )  # fmt: skip
        logits = q @ k.mT / q.shape[-1] ** 0.5
        self.maximum = logits.detach().amax((0, 2, 3))
        return self.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values, a question that is one of the keys with noise, and the value asked for."""
    keys = torch.randn(32, 16, WIDTH, generator=generator)
    values = torch.randn(32, 16, WIDTH, generator=generator)
    which = torch.randint(16, (32, 4), generator=generator)
    at = which[..., None].expand(-1, -1, WIDTH)
    noise = torch.randn(32, 4, WIDTH, generator=generator)
    return keys.gather(1, at) + 0.5 * noise, keys, values, values.gather(1, at)


def trained(clip: bool, steps: int, seed: int = 0) -> dict[str, list[float]]:
    torch.manual_seed(seed)
    model, generator = Attention(), torch.Generator().manual_seed(seed)
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = nm.make_plan(params, routes={"*": nm.Route()})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=LR)
    logits, losses = [], []
    for _ in range(steps):
        question, keys, values, answer = batch(generator)
        loss = F.mse_loss(model(question, keys, values), answer)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        local_update_(params, grads, state, hyper, plan)  # `step_` without its compilation
        if clip:
            nm.qk_clip_(params, {"": model.maximum}, plan, TAU)
        model.zero_grad()
        logits.append(model.maximum.max().item())
        losses.append(loss.item())
    return {"largest logit": logits, "loss": losses}


def draw(runs: dict[str, dict[str, list[float]]], where: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, what in zip(axes, ("largest logit", "loss"), strict=True):
        for name, run in runs.items():
            axis.plot(run[what], label=name, linewidth=1.2)
        axis.set(xlabel="step", title=what)
    axes[0].set_yscale("log")
    axes[0].axhline(TAU, color="gray", linestyle=":", label=f"tau = {TAU:g}")
    axes[0].legend()
    figure.supxlabel(where, fontsize=7)
    figure.savefig(FOLDER / "qk_clip.png", dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    runs = {name: trained(clip, steps) for name, clip in (("plain", False), ("QK-clip", True))}
    where = measured_on(torch.device("cpu"))
    for name, run in runs.items():
        print(
            f"{name:8} largest logit {run['largest logit'][-1]:10.1f}, at most "
            f"{max(run['largest logit']):.1f}; loss {sum(run['loss'][-20:]) / 20:.3f}"
        )
    rounded = {k: {w: [round(x, 4) for x in y] for w, y in run.items()} for k, run in runs.items()}
    text = json.dumps({"measured on": where, "tau": TAU, "lr": LR, "runs": rounded})
    (FOLDER / "qk_clip.json").write_text(f"{text}\n")
    draw(runs, where)


if __name__ == "__main__":
    main()
