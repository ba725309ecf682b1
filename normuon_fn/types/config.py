"""What is static: `Config`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .hyper import check_number
from .other_names import hint, with_hints
from .presets import PRESETS, Preset
from .unread import check_read, without_unread

Row = tuple[float, float, float]
CoefficientsName = Literal[
    "polar_express", "polar_express_cushioned", "quintic", "you", "cans", "aol", "deepseekv4",
    "cubic5", "simple",
]  # fmt: skip
Coefficients = CoefficientsName | Sequence[Sequence[float]]  # a name, or rows of your own
CheckedCoefficients = CoefficientsName | tuple[Row, ...]
MomentumForm = Literal["ema", "sum"]
Precondition = Literal["none", "rows", "sign"]
Reduction = Literal["rows", "short", "entries"]
Scale = Literal["paper", "spectral", "rms", "muon", "none"]
EpsForm = Literal["add", "floor"]
DecayForm = Literal["decoupled", "cautious", "hyperball"]
Method = Literal["auto", "standard", "gram"]
Guard = Literal["off", "output", "full"]
GuardScope = Literal["step", "bucket"]
MissingGrads = Literal["skip", "zeros"]
Replicas = Literal["each", "share"]
Master = Literal["none", "mantissa", "fp32", "stochastic"]
Other = Literal["adamw", "lion"]
Orthogonalizer = Callable[[Tensor], Tensor]
Tensors = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]

FIXED_STEPS = {"cubic5": 5}  # one composition, which can neither be cut nor continued
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPES = {
    "orthogonalize_dtype": COMPUTE_DTYPES,
    "momentum_dtype": (torch.bfloat16, torch.float32, torch.float64, torch.int8),
}


@dataclass(frozen=True)
class Config:
    """What shapes the graph. ``Config()`` is arXiv 2510.05491 with Polar Express rows.

    For a matrix of m rows (outputs) and n columns, with M the momentum, G the gradient, O the
    orthogonalized M, v the variance, W the parameter and U its update:

    - ``momentum_form``: ``"ema"``, M <- b M + (1-b) G; ``"sum"``, M <- b M + G (dion).
    - ``nesterov``: orthogonalizes b M + (1-b) G (``"sum"``: b M + G) in the place of M.
    - ``precondition``: before it is orthogonalized, M is left as it is (``"none"``), has its rows
      (outputs) brought to one norm (``"rows"``: MuonEq, nanochat), or is sign(M) (``"sign"``:
      AdaMuon).
    - ``reduction``: ``"rows"``, one v per row, the mean of O^2 over its columns; ``"short"``, over
      the shorter axis: per row if m >= n, else per column (modded-nanogpt); ``"entries"``, one v
      per entry of O (AdaMuon).
    - ``snap``: brings O to the Frobenius norm sqrt(min(m, n)) of an orthogonal matrix before v sees
      it (Muon+).
    - ``normalize``: divides by sqrt(v). ``False`` is Muon, without variance and its state.
    - ``eps``, ``eps_form``: ``"add"``, O / (sqrt(v) + eps); ``"floor"``, O / sqrt(max(v, eps)). 0
      divides where v > 0 and gives 0 elsewhere. Neither O nor eps depends on the gradient's scale.
    - ``renormalize``: brings O / sqrt(v) back to the Frobenius norm of O.
    - ``scale``: ``"paper"``, the RMS of the update is ``rms``; ``"spectral"``, sqrt(m/n);
      ``"rms"``, rms sqrt(max(m, n)); ``"muon"``, sqrt(max(1, m/n)); ``"none"``, 1.
    - ``weight_decay_form``: ``"decoupled"``, W <- (1 - lr wd) W - lr U; ``"cautious"`` decays only
      entries with U W >= 0; ``"hyperball"``: W keeps its Frobenius norm, U is as long as W, so lr
      is relative, and nothing decays. ``weight_decay_lr_power`` 2: lr^2 wd in the place of lr wd.
    - ``cautious_update``: entries with U G < 0 do not move; the others, k of d, move d / (k + 1)
      times as far (arXiv 2411.16085, Algorithm 2; see finishing.py for what its code does).
    - ``update_floor``: U is made longer where it is shorter than this share of W, per output row
      or ``"matrix"`` (``update_floor_per``; modded-nanogpt#328, #274).
    - A `Route` can give its parameters another ``weight_decay_form`` and ``cautious_update``.
    - ``coefficients``: a name in ``normuon_fn.COEFFICIENTS``, or your own (a, b, c) rows.
      ``steps``: of Newton-Schulz. ``safety_factor``: p(x / sf) in the place of p(x); ``None``: the
      set's own (Polar Express 1.05).
    - ``method``: ``"standard"``, ``"gram"``, or by aspect ratio and dtype (``"auto"``): standard
      where float32 or float64 is asked for, which is up to 3 times as exact, and bfloat16.
    - ``orthogonalize_dtype``: ``None``: on CUDA float16 (Gram) and bfloat16 (standard), on CPUs
      with bfloat16 matrix units bfloat16, elsewhere float32; float64 for float64 parameters.
    - ``orthogonalizer``: your own function in the place of Newton-Schulz, traced into the graph:
      [n, rows, cols], rows <= cols, in float32 (or float64), to the same shape; see `check_stage`.
    - ``momentum_dtype``: ``None``: float32 (float64 for float64 parameters). bfloat16 has the
      same range, but loses changes below 1/512 of an entry: not for a momentum above 0.99.
      ``"int8"`` (or torch.int8): one byte an entry and one per 64 columns of a row (ops/codes.py);
      loses changes below 1/128 of the largest of those entries: not above 0.99 either.
    - ``state_device``: ``"cpu"``: the momentum of matrices is in pinned host memory, and passes
      through the device in pieces, under the products of others: see the guide on memory.
    - ``guard``: ``"off"``; ``"output"``: parameters and variance keep their bits if an update is
      not finite, or ten times what it can be; ``"full"``: momentum too, if a gradient is not.
    - ``guard_scope``: ``"step"``: one bad matrix skips all, and with guard ``"full"`` the run goes
      on bit for bit as one that never saw the batch; ``"bucket"``: only its bucket is skipped, and
      AdamW's bias correction and ``"stochastic"`` count the step for all.
    - ``missing_grads``: ``"skip"``: a gradient of ``None`` keeps its parameter as it is. Ranks that
      share parameters must lack the same ones, and none of a matrix that they orthogonalize
      together. ``"zeros"``: it counts as zeros, so ranks may differ.
    - ``other``: what updates the parameters that routes give to AdamW: ``"adamw"``, or ``"lion"``
      with AdamW's rates and betas (arXiv 2302.06675).
    - ``replicas``: of plain tensors that the ranks of ``mesh=`` have copies of. ``"each"``: every
      rank keeps momentum and variance of all matrices. ``"share"``: the owner of a matrix alone,
      1/n of them on each of n ranks; the state of a rank lacks what other ranks own, and a rank
      reads the gradients of what it owns. `gather_state` brings all together.
    - ``master``: what keeps updates below the last bit of bfloat16 parameters. ``"mantissa"``: 16
      more bits each, which make them an exact float32; ``"fp32"``: a float32 of their own (float16
      too); ``"stochastic"``: they are rounded by chance, without bias. Others get none.
    - ``metrics``: also returns six numbers per parameter, with the same bits of the step: see
      `report_metrics`.
    - ``seed``: of the chances of ``"stochastic"``, which also depend on the number of steps (see
      ``guard_scope``), the parameter's name, the entry's place, and on a mesh its sharding.

    Raises TypeError or ValueError for an unknown option, options that exclude each other, or one
    that another leaves without effect.
    """

    momentum_form: MomentumForm = "ema"
    nesterov: bool = False
    precondition: Precondition = "none"
    snap: bool = False
    reduction: Reduction = "rows"
    normalize: bool = True
    renormalize: bool = True
    scale: Scale = "paper"
    rms: float = 0.2
    eps: float = 0.0
    eps_form: EpsForm = "add"
    weight_decay_form: DecayForm = "decoupled"
    weight_decay_lr_power: Literal[1, 2] = 1
    cautious_update: bool = False
    update_floor: float = 0.0
    update_floor_per: Literal["row", "matrix"] = "row"
    coefficients: Coefficients = "polar_express"
    safety_factor: float | None = None
    steps: int = 5
    method: Method = "auto"
    orthogonalize_dtype: torch.dtype | None = None
    orthogonalizer: Orthogonalizer | None = None
    momentum_dtype: torch.dtype | Literal["int8"] | None = None
    state_device: Literal["cpu"] | None = None
    guard: Guard = "off"
    guard_scope: GuardScope = "step"
    missing_grads: MissingGrads = "skip"
    other: Other = "adamw"
    replicas: Replicas = "each"
    master: Master = "none"
    seed: int = 0
    metrics: bool = False

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices or isinstance(value, bool):
                meant = (
                    {"guard": "full", "master": "mantissa"}.get(field) if value is True else None
                )
                write = f"; write {field}={meant!r}" if meant else ""
                raise ValueError(f"Config.{field}: expected one of {choices}, got {value!r}{write}")
        for field in ("nesterov", "snap", "normalize", "renormalize", "cautious_update", "metrics"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"Config.{field}: expected a bool, got {getattr(self, field)!r}")
        check_number("Config.rms", self.rms)
        check_number("Config.eps", self.eps)
        check_number("Config.update_floor", self.update_floor)
        if (to := self.state_device) not in (None, "cpu"):
            raise ValueError(f"Config.state_device: expected None or 'cpu', got {to!r}")
        _check_together(self)
        if self.rms == 0.0:
            raise ValueError("Config.rms: expected a number > 0, got 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"Config.seed: expected an int, got {self.seed!r}")
        if self.momentum_dtype == "int8":
            object.__setattr__(self, "momentum_dtype", torch.int8)
        for field, choices in _DTYPES.items():
            value = getattr(self, field)
            if not (value is None or value in choices):
                shown = [*choices, "int8"] if torch.int8 in choices else [*choices]
                why = ""
                if isinstance(value, str) and getattr(torch, value, None) in choices:
                    why = f"; write torch.{value}, without quotes"
                elif value == torch.float16:
                    why = ": small gradients vanish in float16; write torch.bfloat16"
                raise ValueError(
                    f"Config.{field}: expected None or one of {shown}, got {value!r}{why}"
                )
        if self.orthogonalizer is not None and not callable(self.orthogonalizer):
            own: object = self.orthogonalizer  # type: ignore[unreachable]
            raise TypeError(f"Config.orthogonalizer: expected a callable, got {own!r}")
        checked = check_coefficients(self.coefficients, self.steps, self.safety_factor, "Config.")
        object.__setattr__(self, "coefficients", checked)
        check_read(vars(self), _DEFAULTS)

    @staticmethod
    def preset(name: Preset, **overrides: Any) -> Config:
        """The published variant ``name``, with any field overridden.

        What an override leaves unread of the preset (``eps`` with ``normalize=False``) is left out.
        The formulas are theirs; the floors and eps inside their Newton-Schulz norms are not: those
        make small gradients vanish. ``"emerging_optimizers"`` follows the axis of its code, and not
        that of its comment. An unknown name or field is a ValueError or a TypeError.
        """
        if name not in PRESETS:
            plain = "; NorMuon itself is nm.Config()" if str(name).lower() == "normuon" else ""
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}{plain}")
        fields = [field.name for field in dataclasses.fields(Config)]
        for key in overrides.keys() - fields:
            raise TypeError(hint("Config", key, fields))
        return Config(**without_unread(PRESETS[name], overrides, _DEFAULTS))


# A dataclass writes its own __init__: it has hints for the names of other optimizers too.
Config.__init__ = with_hints(Config.__init__)  # type: ignore[method-assign]
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
_CHOICES = {k: get_args(v) for k, v in get_type_hints(Config).items() if get_origin(v) is Literal}


def _check_together(config: Config) -> None:
    if config.reduction == "entries" and not config.normalize:
        raise ValueError(
            "Config.reduction: 'entries' keeps variances, and normalize=False leaves them out; "
            "write reduction='rows' with normalize=False"
        )
    if config.replicas == "share" and config.reduction == "entries":
        raise ValueError(
            "Config.replicas: 'share' leaves variances to the owners of matrices, and with "
            "reduction='entries' every rank divides by them; write replicas='each'"
        )
    if config.replicas == "share" and config.cautious_update:
        raise ValueError(
            "Config.cautious_update: every rank looks at its gradients, of which "
            "replicas='share' reads those of owned matrices alone; write replicas='each'"
        )
    if config.weight_decay_form != "hyperball":
        return
    if config.update_floor > 0:
        raise ValueError(
            "Config.update_floor: weight_decay_form='hyperball' makes every update as long as its "
            "matrix, so no floor is reached; write update_floor=0"
        )
    if config.weight_decay_lr_power != 1:
        raise ValueError(
            "Config.weight_decay_lr_power: nothing decays with weight_decay_form='hyperball'; "
            "leave it out"
        )


def check_coefficients(
    coefficients: object, steps: object, safety_factor: object, where: str = ""
) -> CheckedCoefficients:
    """``coefficients`` as a name, or as rows of floats.

    Raises TypeError or ValueError for malformed ones, or ``steps`` that a set does not have.
    """
    checked: Any = coefficients
    names = get_args(CoefficientsName)
    if not isinstance(coefficients, str):
        checked = _check_rows(coefficients, where)
    elif coefficients not in names:
        raise ValueError(
            f"{where}coefficients: expected one of {sorted(names)} or a tuple of (a, b, c) rows, "
            f"got {coefficients!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{where}steps: expected an int >= 1, got {steps!r}")
    factor = 1.0 if safety_factor is None else safety_factor
    if not isinstance(factor, (int, float)) or not 1.0 <= factor < 2.0:
        raise ValueError(
            f"{where}safety_factor: expected a number in [1, 2), got {safety_factor!r}"
        )
    fixed = FIXED_STEPS.get(checked, steps) if isinstance(checked, str) else steps
    if steps != fixed:
        raise ValueError(
            f"{where}steps: {coefficients!r} is one composition of exactly {fixed} steps, which "
            f"cannot be cut or continued; got {steps}"
        )
    return checked


def _check_rows(rows: object, where: str) -> tuple[Row, ...]:
    if not isinstance(rows, Sequence) or not all(isinstance(row, Sequence) for row in rows):
        one = isinstance(rows, (tuple, list)) and len(rows) == 3
        write = f"; for the same row at every step write ({rows!r},) * steps" if one else ""
        raise TypeError(
            f"{where}coefficients: expected a name or a tuple of (a, b, c) rows, got "
            f"{rows!r}{write}"
        )
    for row in rows:
        if len(row) != 3 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in row):
            raise ValueError(
                f"{where}coefficients: expected rows of three finite numbers (a, b, c), got {row!r}"
            )
    if not rows:
        raise ValueError(f"{where}coefficients: expected at least one (a, b, c) row, got none")
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)
