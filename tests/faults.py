"""Everything that can go wrong in a step, planted on purpose: where (`STAGES`), what (`VALUES`), in
which parameter (`SHAPES`).

`plant` writes the fault, `expected_flags` and `keeps_its_bits` say what must come of it: the table
of DESIGN, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

import normuon_fn as nm

SHAPES = {
    "square": (8, 8),
    "tall": (12, 8),
    "experts": (3, 8, 12),
    "bias": (8,),
    "embed.weight": (10, 8),
    "gain": (4,),
}
ROUTES = {"gain": nm.Route("adamw", lr_mul=0.5)}
ADAMW = {"bias", "embed.weight", "gain"}
VICTIMS = ("square", "tall", "experts", "bias", "embed.weight")
# What is orthogonalized together (8x12, the tall one transposed), and AdamW's parameters by rate.
BUCKETS = ({"square"}, {"tall", "experts"}, {"bias", "embed.weight"}, {"gain"})
COUNTERS = ("guard.step", "guard.skipped", "guard.consecutive")

STAGES = ("gradient", "momentum", "update", "variance")
VALUES = ("nan", "inf", "-inf", "overflow")

NAN, INF = float("nan"), float("inf")
_NUMBER = {"nan": NAN, "inf": INF, "-inf": -INF}

# Gradients of this size, and only they, make `brittle` return something else than an orthogonal
# matrix.
_CODES = {"nan": 1e3, "inf": 1e4, "-inf": 1e5, "overflow": 1e6, "large": 1e7}


def brittle(x: Tensor) -> Tensor:
    """An orthogonalizer [n, rows, cols] that diverges on clean gradients, when their largest entry
    tells it to.

    Its one cubic step has no prescaling: from 1e19 on it overflows by itself.
    """
    largest = x.abs().amax((-2, -1), keepdim=True)
    norm = x.square().sum((-2, -1), keepdim=True).sqrt()
    y = torch.bmm(torch.bmm(x, x.mT), x) / (norm * norm * norm)
    at_fault = x.abs() == largest
    for what, code in _CODES.items():
        told = (largest > 0.02 * code) & (
            largest < 0.2 * code
        )  # the momentum holds 0.05 of the gradient
        if what in _NUMBER:
            y = torch.where(told & at_fault, _NUMBER[what], y)
        else:  # overflows here, or is finite and its square overflows in the row statistics
            y = torch.where(told, y * 1e30 * 1e30 if what == "overflow" else y * 1e30, y)
    return y


# What is written where. A NorMuon parameter has "momentum" and "variance"; AdamW's moments have
# their own names.
_NORMUON_FAULTS = {
    **{("gradient", what): {"grad": number} for what, number in _NUMBER.items()},
    **{("momentum", what): {"momentum": number} for what, number in _NUMBER.items()},
    **{("variance", what): {"variance": number} for what, number in _NUMBER.items()},
    **{("update", what): {"grad": _CODES[what]} for what in VALUES},
    ("gradient", "overflow"): {"grad": 1e25},
    ("momentum", "overflow"): {"momentum": 1e25},
    ("variance", "overflow"): {"grad": _CODES["large"]},
}
_ADAMW_FAULTS = {
    **{("gradient", what): {"grad": number} for what, number in _NUMBER.items()},
    **{("momentum", what): {"exp_avg": number} for what, number in _NUMBER.items()},
    **{("variance", what): {"exp_avg_sq": number} for what, number in _NUMBER.items()},
    # With adamw_eps=0 an entry that never had a gradient divides by zero.
    ("update", "nan"): {"grad": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0},
    ("update", "inf"): {"grad": 0.0, "exp_avg": -1.0, "exp_avg_sq": 0.0},
    ("update", "-inf"): {"grad": 0.0, "exp_avg": 1.0, "exp_avg_sq": 0.0},
    ("update", "overflow"): {"grad": 0.0, "exp_avg": 1e30, "exp_avg_sq": 1e-30},
    ("momentum", "overflow"): {"grad": 0.0, "exp_avg": 3e38},  # in the bias correction
    ("variance", "overflow"): {"grad": 1e30},  # its square
}
_ADAMW_FAULTS["gradient", "overflow"] = _ADAMW_FAULTS["variance", "overflow"]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def hyper_of(params: dict[str, Tensor]) -> nm.Hyper:
    return nm.Hyper.of(params, lr=0.02, weight_decay=0.1, adamw_eps=0.0)


def plant(
    stage: str, what: str, name: str, grads: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Writes one fault, into tensors that are the caller's own."""
    table = _ADAMW_FAULTS if name in ADAMW else _NORMUON_FAULTS
    for kind, number in table[stage, what].items():
        target = grads[name] if kind == "grad" else state[f"{name}.{kind}"]
        target.view(-1)[5] = number


def expected_flags(stage: str, what: str, name: str) -> list[list[int]]:
    """[2, n_params]: every fault is a non-finite update; a gradient that overflows later is finite
    itself.
    """
    hit = [int(other == name) for other in SHAPES]
    return [hit, hit if stage == "gradient" and what != "overflow" else [0] * len(hit)]


def keeps_its_bits(guard: str, scope: str, stage: str, what: str, name: str) -> set[str]:
    """The parameters and state tensors that a step with that fault must leave alone.

    ======  =================================  ===========================================
    guard   a non-finite update                a non-finite gradient
    ======  =================================  ===========================================
    off     nothing                            nothing
    output  params, variance, AdamW's moments  params, variance, AdamW's moments
    full    params, variance, AdamW's moments  params, variance, AdamW's moments, momentum
    ======  =================================  ===========================================
    """
    if guard == "off":
        return set()
    skipped = (
        set(SHAPES) if scope == "step" else next(bucket for bucket in BUCKETS if name in bucket)
    )
    matrix, other = ["", ".variance"], ["", ".exp_avg", ".exp_avg_sq"]
    if guard == "full" and stage == "gradient" and what != "overflow":
        matrix.append(".momentum")
    return {name + kind for name in skipped for kind in (other if name in ADAMW else matrix)}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Like ``torch.equal``, but a NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
