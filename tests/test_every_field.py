"""No field of `Config` and `Route` is taken and then ignored without a word.

Every field is set to another value beside every value of every other field. That must change bits of
a run, or be refused or warned of, or stand in a list here with the reason why it may change nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm

Fields = dict[str, Any]


def own_orthogonalizer(x: Tensor) -> Tensor:
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    return x / torch.where(norm == 0, 1.0, norm)


# By field: values that are not its default.
VALUES: dict[str, list[Any]] = {
    "momentum_form": ["sum"],
    "nesterov": [True],
    "precondition": ["rows", "sign"],
    "snap": [True],
    "reduction": ["short", "entries"],
    "normalize": [False],
    "renormalize": [False],
    "scale": ["spectral", "rms", "muon", "none"],
    "rms": [0.4],
    "eps": [1e-2],
    "eps_form": ["floor"],
    "weight_decay_form": ["cautious", "hyperball"],
    "weight_decay_lr_power": [2],
    "cautious_update": [True],
    "update_floor": [0.5],
    "update_floor_per": ["matrix"],
    "coefficients": ["simple"],
    "safety_factor": [1.2],
    "steps": [4],
    "method": ["standard", "gram"],
    "orthogonalize_dtype": [torch.bfloat16],
    "orthogonalizer": [own_orthogonalizer],
    "momentum_dtype": [torch.bfloat16, "int8"],
    "guard": ["output", "full"],
    "guard_scope": ["bucket"],
    "missing_grads": ["zeros"],
    "other": ["lion"],
    "replicas": ["share"],
    "master": ["mantissa", "fp32", "stochastic"],
    "seed": [1],
    "metrics": [True],
}
SHAPES = {"tall": (10, 6), "wide": (6, 12), "half": (6, 6), "late": (4, 6), "bias": (6,)}
ROUTES = {"half": nm.Route(transposed=True), "*": nm.Route(), "bias": nm.Route("adamw")}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"half": found["half"].bfloat16()}


def run(config: Fields) -> str:
    """A digest of every bit of a run that has what fields are about: decay, NaN, missing ones."""
    params = tensors(0)
    plan = nm.make_plan(
        params, nm.Config(**config), routes=dict(sorted(ROUTES.items(), reverse=True))
    )
    state, digest = nm.init(plan, params), hashlib.sha256()
    hyper = nm.Hyper.of(params, lr=0.05, weight_decay=0.5)
    for k in range(4):
        grads: dict[str, Tensor | None] = dict(tensors(k + 1))
        if k == 2:
            grads["late"] = None
        if k == 3:
            grads["tall"] = torch.full((10, 6), float("nan"))
        params, state, *rest = nm.update(params, grads, state, hyper, plan)
        for x in (*params.values(), *state.values(), *rest):
            if x is not None:
                digest.update(
                    repr((x.shape, x.dtype)).encode()
                    + x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                )
    return digest.hexdigest()


def outcome(config: Fields) -> str | None:
    """The digest of a run; None where something is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return run(config)
        except (TypeError, ValueError, UserWarning):
            return None


if __name__ == "__main__":
    import time

    t = time.time()
    contexts = [{}] + [{f: v} for f, vs in VALUES.items() for v in vs]
    n = 0
    for ctx in contexts:
        base = outcome(ctx)
        if base is None:
            print("CTX refused", ctx)
            continue
        for f, vs in VALUES.items():
            if f in ctx:
                continue
            for v in vs:
                n += 1
                o = outcome({**ctx, f: v})
                if o == base:
                    print("SILENT", ctx, f, v)
    print(n, time.time() - t)
