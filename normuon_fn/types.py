"""The three things a caller holds: what is static (`Config`), what changes (`Hyper`), what comes back (`StepResult`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Row = tuple[float, float, float]
CoefficientsName = Literal[
    "polar_express",
    "polar_express_cushioned",
    "quintic",
    "you",
    "cans",
    "aol",
    "deepseekv4",
    "cubic5",
    "simple",
]
Coefficients = CoefficientsName | tuple[Row, ...]  # a name, or rows of your own
MomentumForm = Literal["ema", "sum"]
Reduction = Literal["rows", "short"]
Scale = Literal["paper", "spectral", "rms", "muon", "none"]
EpsForm = Literal["add", "floor"]
DecayForm = Literal["decoupled", "cautious"]
Method = Literal["auto", "standard", "gram"]
Guard = Literal["off", "output", "full"]
GuardScope = Literal["step", "bucket"]
MissingGrads = Literal["skip", "zeros"]
Master = Literal["none", "mantissa", "fp32", "stochastic"]
Preset = Literal["paper", "author", "dion", "modded_nanogpt", "emerging_optimizers"]
Orthogonalizer = Callable[[Tensor], Tensor]
Tensors = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]

FIXED_STEPS = {"cubic5": 5}  # one composition, which can neither be cut nor continued
ONE = 1.0 - 2.0**-25  # rounded to float32 it is 1, and with it all numbers from there on
LARGEST = torch.finfo(torch.float32).max
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Config:
    """Everything that shapes the graph. ``Config()`` is the rule of arXiv 2510.05491 with Polar Express coefficients.

    For a matrix of m rows (outputs) and n columns, with M the momentum, O its orthogonalization, v the variance:

    =======================  ==============================================================================================
    ``momentum_form``        ``"ema"``: M <- b M + (1-b) G.  ``"sum"``: M <- b M + G (microsoft/dion).
    ``nesterov``             orthogonalize (1-b) G + b M (``"sum"``: G + b M) in the place of M.
    ``reduction``            ``"rows"``: one v per row, mean of O^2 over columns.  ``"short"``: over the shorter axis, that is
                             per row if m >= n, else per column (modded-nanogpt, Emerging-Optimizers).
    ``normalize``            divide by sqrt(v).  ``False`` is Muon: no variance, no variance state.
    ``eps``, ``eps_form``    ``"add"``: O / (sqrt(v) + eps).  ``"floor"``: O / sqrt(max(v, eps)).  0 divides where v > 0 and
                             gives 0 elsewhere.  O does not depend on the gradient's scale, so this eps does not either.
    ``renormalize``          bring O / sqrt(v) back to the Frobenius norm of O.
    ``scale``                ``"paper"``: the update's RMS is ``rms``.  ``"spectral"``: sqrt(m/n).  ``"none"``: 1.
                             ``"rms"``: rms sqrt(max(m, n)).  ``"muon"``: sqrt(max(1, m/n)).
    ``weight_decay_form``    ``"decoupled"``: W <- (1 - lr wd) W - lr U.  ``"cautious"``: decays only entries with U W >= 0.
    ``weight_decay_lr_power``  2: lr^2 wd in the place of lr wd (modded-nanogpt).
    ``coefficients``         the name of a set in ``normuon_fn.COEFFICIENTS``, or rows (a, b, c) of your own.
    ``safety_factor``        p(x / sf) in the place of p(x); ``None``: the set's own (Polar Express 1.05).
    ``steps``                Newton-Schulz steps.
    ``method``               ``"standard"``, ``"gram"``, or by aspect ratio and dtype (``"auto"``).
    ``orthogonalize_dtype``  ``None``: float16 (Gram) and bfloat16 (standard) on CUDA, and on CPUs with bfloat16 matrix units
                             bfloat16; float32 on other devices; float64 for float64 parameters.
    ``orthogonalizer``       a function of your own in the place of Newton-Schulz: ``[n, rows, cols]``, rows <= cols, float32
                             (or float64) -> the same shape. It is traced into the graph.
    ``momentum_dtype``       ``None``: float32 (float64 for float64 parameters).
    ``guard``                ``"off"``, ``"output"`` (params and variance keep their bits if an update is not finite) or
                             ``"full"`` (momentum too, if a gradient is not finite).
    ``guard_scope``          ``"step"``: one bad matrix skips everything.  ``"bucket"``: only its bucket.
    ``missing_grads``        ``"skip"``: a gradient of ``None`` leaves its parameter as it is; an error for matrices that ranks
                             share.  ``"zeros"``: it counts as zeros, so that ranks may differ in what they lack.
    ``master``               what keeps updates below the last bit of bfloat16 parameters.  ``"mantissa"``: 16 more bits
                             each, with which they are an exact float32.  ``"fp32"``: a float32 of their own (float16
                             too).  ``"stochastic"``: nothing, but they are rounded by chance, without bias.  Parameters
                             of float32 and float64 need none and get none.
    ``seed``                 of the chances of ``"stochastic"``: they depend on it, on ``"guard.step"``, the parameter's name
                             and the entry's place; on a mesh also on how the parameter is sharded.
    =======================  ==============================================================================================

    Raises:
        TypeError, ValueError: an option of the wrong type, unknown, or that cannot be combined with another.
    """

    momentum_form: MomentumForm = "ema"
    nesterov: bool = False
    reduction: Reduction = "rows"
    normalize: bool = True
    renormalize: bool = True
    scale: Scale = "paper"
    rms: float = 0.2
    eps: float = 0.0
    eps_form: EpsForm = "add"
    weight_decay_form: DecayForm = "decoupled"
    weight_decay_lr_power: int = 1
    coefficients: Coefficients = "polar_express"
    safety_factor: float | None = None
    steps: int = 5
    method: Method = "auto"
    orthogonalize_dtype: torch.dtype | None = None
    orthogonalizer: Orthogonalizer | None = None
    momentum_dtype: torch.dtype | None = None
    guard: Guard = "off"
    guard_scope: GuardScope = "step"
    missing_grads: MissingGrads = "skip"
    master: Master = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"Config.{field}: expected one of {choices}, got {value!r}")
        for field in ("nesterov", "normalize", "renormalize"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"Config.{field}: expected a bool, got {getattr(self, field)!r}")
        for field, least in (("rms", 0.0), ("eps", 0.0)):
            check_number(f"Config.{field}", getattr(self, field), least)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"Config.seed: expected an int, got {self.seed!r}")
        if self.rms == 0.0:
            raise ValueError("Config.rms: expected a number > 0, got 0")
        for field, dtypes in (
            ("orthogonalize_dtype", COMPUTE_DTYPES),
            ("momentum_dtype", COMPUTE_DTYPES),
        ):
            if getattr(self, field) is not None and getattr(self, field) not in dtypes:
                raise ValueError(
                    f"Config.{field}: expected None or one of {dtypes}, got {getattr(self, field)!r}"
                )
        if self.orthogonalizer is not None and not callable(self.orthogonalizer):
            raise TypeError(
                f"Config.orthogonalizer: expected a callable [n, rows, cols] -> same, got {self.orthogonalizer!r}"
            )
        checked = check_coefficients(self.coefficients, self.steps, self.safety_factor)
        object.__setattr__(self, "coefficients", checked)

    @staticmethod
    def preset(name: Preset, **overrides: Any) -> Config:
        """The published variant ``name``, with any field overridden.

        The formulas are theirs; the floors and eps inside their Newton-Schulz norms are not, for those make small gradients
        vanish. ``"emerging_optimizers"`` follows the axis of its code (its comment states the opposite one).

        Raises:
            ValueError: unknown preset.
            TypeError: unknown field.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {sorted(_PRESETS)}, got {name!r}")
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(Config)})
        if unknown:
            raise TypeError(f"preset: unknown Config fields {unknown}")
        return Config(**{**_PRESETS[name], **overrides})


_CHOICES: dict[str, tuple[Any, ...]] = {
    "momentum_form": get_args(MomentumForm),
    "reduction": get_args(Reduction),
    "scale": get_args(Scale),
    "eps_form": get_args(EpsForm),
    "weight_decay_form": get_args(DecayForm),
    "weight_decay_lr_power": (1, 2),
    "method": get_args(Method),
    "guard": get_args(Guard),
    "guard_scope": get_args(GuardScope),
    "missing_grads": get_args(MissingGrads),
    "master": get_args(Master),
}

_PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2510.05491, Algorithm 1: Newton-Schulz with Keller Jordan's five steps.
    "paper": {"coefficients": "simple"},
    # zichongli5/NorMuon normuon.py, d45c9a4.
    "author": {"coefficients": "simple", "nesterov": True, "scale": "muon", "eps": 1e-10},
    # microsoft/dion normuon.py, muon.py, 0a059a4.
    "dion": {
        "coefficients": "polar_express_cushioned",
        "momentum_form": "sum",
        "scale": "spectral",
        "eps": 1e-8,
    },
    # KellerJordan/modded-nanogpt train_gpt.py, f411b3d3.
    "modded_nanogpt": {
        "coefficients": "polar_express_cushioned",
        "nesterov": True,
        "reduction": "short",
        "scale": "muon",
        "eps": 1e-10,
        "eps_form": "floor",
        "weight_decay_form": "cautious",
        "weight_decay_lr_power": 2,
    },
    # NVIDIA-NeMo/Emerging-Optimizers adaptive_muon.py (`normuon`), fd77292: sqrt(max(m, n)) times 1.
    "emerging_optimizers": {
        "coefficients": "quintic",
        "reduction": "short",
        "scale": "rms",
        "rms": 1.0,
        "eps": 1e-8,
        "eps_form": "floor",
    },
}


class Hyper(NamedTuple):
    """Everything that may change from step to step: 0-d float32 tensors on the parameters' device (1-d: see `stack`).

    ``hyper._replace(lr=tensor)`` changes a value without recompiling; ``hyper.lr.fill_(x)`` also under a replayed CUDA graph.
    Units: ``lr`` multiplies the update that ``Config.scale`` describes (with ``"paper"``, RMS ``rms`` per step, so AdamW's
    learning rates carry over); ``weight_decay`` is per step and unit of ``lr``.
    """

    lr: Tensor
    momentum: Tensor
    beta2: Tensor
    weight_decay: Tensor
    adamw_lr: Tensor
    adamw_beta1: Tensor
    adamw_beta2: Tensor
    adamw_eps: Tensor
    adamw_weight_decay: Tensor

    @staticmethod
    def of(
        params: Mapping[str, Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        adamw_lr: float | None = None,  # None: lr
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,  # None: weight_decay
    ) -> Hyper:
        """The hyperparameters as 0-d float32 tensors on the device of ``params``.

        Raises:
            TypeError: a value that is not a number, or ``params`` without a tensor.
            ValueError: a negative or non-finite value, or a momentum or beta outside [0, 1), as float32 has them.
        """
        if not isinstance(params, Mapping) or not params:
            raise ValueError("params: expected a non-empty dict of tensors, to know the device")
        device = next(iter(params.values())).device
        if not isinstance(adamw_betas, (tuple, list)) or len(adamw_betas) != 2:
            raise TypeError(f"adamw_betas: expected two numbers, got {adamw_betas!r}")
        values = {
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "adamw_lr": lr if adamw_lr is None else adamw_lr,
            "adamw_beta1": adamw_betas[0],
            "adamw_beta2": adamw_betas[1],
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": weight_decay
            if adamw_weight_decay is None
            else adamw_weight_decay,
        }
        for name, value in values.items():
            check_number(name, value, 0.0)
            if name in ("momentum", "beta2", "adamw_beta1", "adamw_beta2") and value >= ONE:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r} as float32")
        return Hyper(
            **{
                name: torch.tensor(float(v), dtype=torch.float32, device=device)
                for name, v in values.items()
            }
        )

    @staticmethod
    def stack(hypers: Sequence[Hyper]) -> Hyper:
        """One `Hyper` of 1-d tensors, for a plan made with ``hyper_of``: entry k is ``hypers[k]``."""
        if not hypers:
            raise ValueError("hypers: expected at least one Hyper, got none")
        return Hyper(*(torch.stack(values) for values in zip(*hypers, strict=True)))


class StepResult(NamedTuple):
    """``params`` and ``state`` have the keys of what was given, in the same order."""

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    flags: Tensor  # [2, n_params] int32, in the order of plan.names: non-finite update, non-finite gradient
    skipped: Tensor  # 0-d bool: something kept its bits


def check_number(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a Python number, got {type(value).__name__} ({value!r})")
    if not least <= value <= LARGEST:
        raise ValueError(f"{name}: expected a finite number >= {least:g}, got {value!r} as float32")


def check_coefficients(coefficients: object, steps: object, safety_factor: object) -> Coefficients:
    """``coefficients`` as a name, or as rows of floats.

    Raises:
        TypeError, ValueError: an unknown name, malformed rows, ``steps`` < 1, a number of steps that the set
            does not have, or a safety factor outside [1, 2).
    """
    checked: Any = coefficients
    if isinstance(coefficients, str):
        if coefficients not in get_args(CoefficientsName):
            raise ValueError(
                f"coefficients: expected one of {sorted(get_args(CoefficientsName))} or a tuple of "
                f"(a, b, c) rows, got {coefficients!r}"
            )
    else:
        checked = _check_rows(coefficients)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an int >= 1, got {steps!r}")
    if safety_factor is not None and not (
        isinstance(safety_factor, (int, float)) and 1.0 <= safety_factor < 2.0
    ):
        raise ValueError(f"safety_factor: expected a number in [1, 2), got {safety_factor!r}")
    fixed = FIXED_STEPS.get(checked, steps) if isinstance(checked, str) else steps
    if steps != fixed:
        raise ValueError(
            f"steps: {coefficients!r} is one composition of exactly {fixed} steps, which can neither "
            f"be cut nor continued; got {steps}"
        )
    return checked


def _check_rows(rows: object) -> tuple[Row, ...]:
    if not isinstance(rows, Sequence) or not all(isinstance(row, Sequence) for row in rows):
        raise TypeError(f"coefficients: expected a name or a tuple of (a, b, c) rows, got {rows!r}")
    for row in rows:
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in row)
        if len(row) != 3 or not numbers:
            raise ValueError(
                f"coefficients: expected rows of three finite numbers (a, b, c), got {row!r}"
            )
    if not rows:
        raise ValueError("coefficients: expected at least one (a, b, c) row, got none")
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)
