"""`Hyper`: the numbers of a step that may change, as tensors, and one call that moves all rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .other_names import F, with_hints

ONE = 1.0 - 2.0**-25  # rounded to float32 it is 1, and with it all numbers from there on
LARGEST = torch.finfo(torch.float32).max

# By tensor of a rate: the numbers that it was made from, before any schedule.
_peaks: Any = WeakIdKeyDictionary()
_eps: Any = WeakIdKeyDictionary()  # by tensor of adamw_eps: what was written, if it was
EPS = 1e-8  # of AdamW, if nothing is written
BETA2 = 0.95  # of the variance, if nothing is written


def _with_hints(function: F) -> F:
    return with_hints(function, example="nm.Hyper.of(params, lr=0.01)")


class Hyper(NamedTuple):
    """What may change from step to step: 0-d float32 tensors on the device (1-d: see `stack`).

    Units: ``lr`` multiplies the update that ``Config.scale`` describes (with ``"paper"``, RMS
    ``rms`` per step, so AdamW's learning rates carry over); ``weight_decay`` is per step and unit
    of ``lr``. ``lr`` and ``weight_decay`` are for matrices alone: AdamW's parameters have
    ``adamw_lr`` and ``adamw_weight_decay``.

    A schedule moves both rates with one call, `scaled`. No change recompiles. ``_replace`` and
    ``fill_`` change one value alone: ``hyper.lr.fill_(x)`` leaves ``adamw_lr`` as it is.
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
    @_with_hints
    def of(
        params: Mapping[str, Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        beta2: float = BETA2,
        weight_decay: float = 0.0,
        adamw_lr: float | None = None,  # None: lr
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = EPS,
        adamw_weight_decay: float | None = None,  # None: weight_decay
    ) -> Hyper:
        """The hyperparameters as 0-d float32 tensors on the device of ``params``.

        Write the rates at their peak here, and let a schedule move them with `scaled`.

        Raises TypeError for what is not a number, ValueError for one that is negative or not
        finite, or a momentum or beta outside [0, 1) in float32.
        """
        if not isinstance(params, Mapping) or not params:
            raise ValueError(
                "params: expected a non-empty dict of name -> tensor, to know the device, got "
                f"{type(params).__name__}; of a model write dict(model.named_parameters())"
            )
        device = next(iter(params.values())).device
        if not isinstance(adamw_betas, (tuple, list)) or len(adamw_betas) != 2:
            raise TypeError(f"adamw_betas: expected two numbers, got {adamw_betas!r}")
        decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        adamw = (lr if adamw_lr is None else adamw_lr, *adamw_betas, adamw_eps, decay)
        values = (lr, momentum, beta2, weight_decay, *adamw)
        for name, value in zip(Hyper._fields, values, strict=True):
            check_number(name, value)
            if name in ("momentum", "beta2", "adamw_beta1", "adamw_beta2") and value >= ONE:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r} as float32")
        numbers = [*map(float, values)]
        with torch.inference_mode(False):  # so that a schedule may write them anywhere
            made = Hyper(*(torch.tensor(x, dtype=torch.float32, device=device) for x in numbers))
        _remember(made, (numbers[0],), (numbers[4],))
        if adamw_eps != EPS and not torch.compiler.is_dynamo_compiling():
            _eps[made.adamw_eps] = adamw_eps
        return made

    @staticmethod
    def stack(hypers: Sequence[Hyper]) -> Hyper:
        """One `Hyper` of 1-d tensors, for a plan with ``hyper_of``: entry k is ``hypers[k]``.

        It has copies: to move its rates, use `scaled` of the stack itself.
        """
        if not hypers:
            raise ValueError("hypers: expected at least one Hyper, got none")
        stacked = Hyper(*(torch.stack(values) for values in zip(*hypers, strict=True)))
        rates = [peaks_of(hyper) for hyper in hypers]
        written = [eps for hyper in hypers if (eps := written_eps(hyper)) is not None]
        if written:
            _eps[stacked.adamw_eps] = written[0]
        if all(lr and adamw_lr for lr, adamw_lr in rates):
            _remember(stacked, *(sum(each, ()) for each in zip(*rates, strict=True)))
        return stacked

    def scaled(self, factor: float | Tensor, *, out: Hyper | None = None) -> Hyper:
        """This Hyper with both learning rates times ``factor``: one step of a schedule.

        ``self`` has the peak rates and keeps them, so ``factor`` is a schedule's value in [0, 1],
        and ``adamw_lr`` keeps its ratio to ``lr``, also after a factor of 0. Weight decay is per
        unit of learning rate and follows. The other fields are the same tensors as those of
        ``self``.

        >>> peak = nm.Hyper.of(params, lr=0.01, adamw_lr=0.005)
        >>> hyper = peak.scaled(0.0)
        >>> for k, batch in enumerate(data):
        ...     peak.scaled(schedule(k), out=hyper)

        ``out`` has both rates written in place and comes back: a captured graph that was given
        ``out`` steps with the new rates from its next replay on. Nothing waits for the device.

        Shapes: ``factor`` is a float, a 0-d tensor, or for the result of `stack` also one factor
        per entry. In a graph of your own a float is a constant; pass a tensor there.

        Raises:
            TypeError, ValueError: ``factor`` is negative, not finite or of another shape, or
                ``out`` is not a Hyper of the same shapes whose rates are tensors of its own.
        """
        if isinstance(factor, Tensor):
            if factor.ndim and factor.shape != self.lr.shape:
                raise ValueError(
                    f"factor: expected a number, a 0-d tensor or one factor per entry, shape "
                    f"{tuple(self.lr.shape)}, got shape {tuple(factor.shape)}"
                )
            factor = factor.to(self.lr.dtype)
        else:
            check_number("factor", factor)
        if out is None:
            made = self._replace(lr=self.lr * factor, adamw_lr=self.adamw_lr * factor)
            _remember(made, *peaks_of(self))
            return made
        _check_out(self, out)
        with torch.no_grad():
            torch.mul(self.lr, factor, out=out.lr)
            torch.mul(self.adamw_lr, factor, out=out.adamw_lr)
        return out


Hyper.__new__ = _with_hints(Hyper.__new__)  # type: ignore[method-assign]


def peaks_of(hyper: Hyper) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers that `Hyper.of` made ``lr`` and ``adamw_lr`` from, one per entry.

    Empty where a tensor was not made by `of`, `stack` or `scaled`.
    """
    if torch.compiler.is_dynamo_compiling():
        return (), ()
    return _peaks.get(hyper.lr, ()), _peaks.get(hyper.adamw_lr, ())


def written_eps(hyper: Hyper) -> float | None:
    """The ``adamw_eps`` that `Hyper.of` was given, if it is not the default."""
    is_tensor = isinstance(hyper.adamw_eps, Tensor)
    if torch.compiler.is_dynamo_compiling() or not is_tensor:
        return None
    return _eps.get(hyper.adamw_eps)


def _remember(made: Hyper, lr: tuple[float, ...], adamw_lr: tuple[float, ...]) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    for rate, peak in ((made.lr, lr), (made.adamw_lr, adamw_lr)):
        if peak:
            _peaks[rate] = peak


def _check_out(peak: Hyper, out: Hyper) -> None:
    if not isinstance(out, Hyper):
        raise TypeError(f"out: expected a Hyper, got {type(out).__name__}")
    for name in ("lr", "adamw_lr"):
        own, into = getattr(peak, name), getattr(out, name)
        if into is peak.lr or into is peak.adamw_lr:
            raise ValueError(
                f"out: its {name} is the tensor that holds the peak rate, and every call would "
                "start from the one before; make another one with hyper = peak.scaled(0.0) and "
                "pass out=hyper"
            )
        if into.shape != own.shape or into.device != own.device:
            raise ValueError(
                f"out: expected {name} of shape {tuple(own.shape)} on {own.device}, got "
                f"{tuple(into.shape)} on {into.device}"
            )


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        betas = isinstance(value, (tuple, list)) and name.endswith(("momentum", "beta2"))
        write = f"; AdamW's betas are adamw_betas={value!r}" if betas else ""
        if name.endswith("lr") and isinstance(value, (Mapping, tuple, list)):
            write = (
                "; for rates of single parameters write routes={...: Route(lr_mul=...)}, or "
                "Hyper.stack([Hyper.of(...), ...]) and make_plan(hyper_of={...: k})"
            )
        if isinstance(value, Tensor):
            write = f"; write {name}=float(...), and fill_ the tensor that is made of it later"
        elif isinstance(value, str):
            write = (
                f"; write {name}=float({value!r}) (YAML reads 3e-4 as text, and 3.0e-4 as a number)"
            )
        elif callable(value):
            write = (
                "; a schedule moves the rates: write torch.optim.lr_scheduler.LambdaLR(optimizer, "
                "schedule) for NorMuon, peak.scaled(schedule(step), out=hyper) for Hyper"
            )
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a Python number, got {kind} ({value!r}){write}")
    if not 0.0 <= value <= LARGEST:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r} as float32")
