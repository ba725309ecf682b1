"""The published rules by name, as fields of `Config`: see `Config.preset`."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal[
    "paper", "author", "dion", "modded_nanogpt", "emerging_optimizers", "muon", "muoneq", "adamuon",
    "hyperball", "nanochat",
]  # fmt: skip

_CUSHIONED: dict[str, Any] = {"coefficients": "polar_express_cushioned"}
_FLOOR: dict[str, Any] = {"reduction": "short", "eps_form": "floor"}
_MUON: dict[str, Any] = {
    "coefficients": "simple", "nesterov": True, "normalize": False, "scale": "muon",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2510.05491, Algorithm 1: Newton-Schulz with Keller Jordan's five steps.
    "paper": {"coefficients": "simple"},
    # zichongli5/NorMuon normuon.py, d45c9a4.
    "author": {"coefficients": "simple", "nesterov": True, "scale": "muon", "eps": 1e-10},
    # microsoft/dion normuon.py, muon.py, 0a059a4.
    "dion": {**_CUSHIONED, "momentum_form": "sum", "scale": "spectral", "eps": 1e-8},
    # KellerJordan/modded-nanogpt train_gpt.py, f411b3d3.
    "modded_nanogpt": {
        **_CUSHIONED, **_FLOOR, "nesterov": True, "scale": "muon", "eps": 1e-10,
        "weight_decay_form": "cautious", "weight_decay_lr_power": 2,
    },
    # NVIDIA-NeMo/Emerging-Optimizers adaptive_muon.py (`normuon`), fd77292: sqrt(max(m, n)) * 1.
    "emerging_optimizers": {
        **_FLOOR, "coefficients": "quintic", "scale": "rms", "rms": 1.0, "eps": 1e-8,
    },
    # KellerJordan/Muon muon.py.
    "muon": _MUON,
    # arXiv 2603.28254, MuonEq-R, with the step length of Moonlight (arXiv 2502.16982): 0.2
    # sqrt(max(m, n)).
    "muoneq": {**_MUON, "precondition": "rows", "scale": "rms"},
    # arXiv 2507.11005, Algorithm 1, with the Nesterov momentum of its authors' code. Their beta2 is
    # the coefficient of the momentum.
    "adamuon": {
        "coefficients": "simple", "nesterov": True, "precondition": "sign", "reduction": "entries",
        "eps": 1e-8,
    },
    # arXiv 2606.16899 (MuonH): Muon on spheres, whatever the length of its update.
    "hyperball": {**_MUON, "weight_decay_form": "hyperball"},
    # karpathy/nanochat optim.py, 0e4b3fad, whose norm of 1.01 before Newton-Schulz is 1.02 here.
    "nanochat": {
        **_CUSHIONED, **_FLOOR, "nesterov": True, "precondition": "rows", "snap": True,
        "scale": "muon", "eps": 1e-10, "weight_decay_form": "cautious",
    },
}  # fmt: skip
