"""State of other optimizers as the state of a plan.

A sum (M <- b M + G) is 1/(1-b) times the ema of the same gradients (M <- b M + (1-b) G). A variance
is a mean of squares of the orthogonalized momentum before any scale, but for dion's blocks of
``split_sizes``: see ``other_optimizers.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..distributed.placements import to_dtensor
from ..planning.checks import check_tensors
from ..planning.momentum_codes import fitted
from ..planning.plan import Parameter, Plan, Spec, check_plan
from ..planning.streaming import placed
from ..types import MomentumForm
from .other_optimizers import Found, SourceVariance, StateDict, entries, unscaled
from .step_counts import with_one_count


def convert_state(
    source: StateDict | Sequence[StateDict],
    plan: Plan,
    names: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    source_momentum: MomentumForm | None = None,
    source_variance: SourceVariance | None = None,
    step: int | None = None,
    missing: Literal["error", "zeros"] = "error",
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The state with which a plan continues where another optimizer stopped.

    It has the keys, shapes and dtypes of ``init``. A variance that the source does not have starts
    at zero, as at the first step. Where the momentum coefficient changed during the run, a sum has
    no exact ema; the conversion takes the present coefficient.

    Args:
        source: the optimizer's ``state_dict()``. A list of them, where one optimizer had the
            matrices and another one the rest, or where every rank had a part.
        names: the parameters' names in the order of the optimizer's groups, for each source: see
            `names_in`. ``None``: the state dict has the names itself, as those of optimizers made
            from ``named_parameters()`` and of distributed checkpoints do.
        source_momentum: the form of its momentum where its keys mislead: ``"sum"`` for
            KellerJordan/Muon before 2025.
        source_variance: whether the variances of dion's parameters with ``split_sizes`` have the
            square of each block's learning-rate scale as a factor, which is divided out.
            ``"scaled"``: saved by dion before its pull request #113 of 2026-08-18; ``"plain"``: by
            a later one. The state does not say which, so that ``None`` is an error where the scales
            are not 1.
        step: how many steps AdamW has made (for its bias correction); ``None``: as the source says.
            Where its parameters have different counts, the largest, with a warning; their moments
            are multiplied so that the correction of one count gives what their own gave.
        missing: what to do with a parameter without state in the source, with the state of the
            other algorithm, or with a variance that the plan cannot use.
        params: the present parameters, from which float32 masters start: for a plan of
            ``Config(master="fp32")``. A mantissa starts as zeros.

    Raises:
        TypeError: ``source`` is not a state dict, or ``plan`` is not a Plan.
        ValueError: names that do not fit, parameters without state, shapes that are not the plan's,
            step counters that differ and cannot be made one, a state whose momentum is of another
            kind (SGD, RMSprop), or the state of `NorMuon` itself.
    """
    check_plan(plan)
    _check_options(missing, source_momentum, source_variance, step)
    found = _entries_of_all(source, names, source_momentum)
    if source_variance == "scaled" and not any(entry.blocks for entry in found.values()):
        raise ValueError(
            "source_variance: 'scaled' is for dion's parameters with split_sizes whose scales "
            "differ from 1, and no group of the source has such; leave it out"
        )
    _say_what_is_ignored(found)
    unknown = [name for name in found if name not in plan.names]
    if unknown:
        raise ValueError(
            f"source: expected parameters of the plan, got {unknown[:8]}, which it does not have"
        )
    found, steps = with_one_count(found, plan, step)
    state: dict[str, Tensor] = {}
    unused = []
    for parameter in plan.parameters:
        try:
            state |= _state_of(parameter, found.get(parameter.name), plan, source_variance)
        except LookupError as error:
            unused.append(f"{parameter.name!r}: {error.args[0]}")
    if unused and missing == "error":
        raise ValueError(
            f"source: no state for {'; '.join(unused[:8])}. missing='zeros' starts these anew"
        )
    state["guard.step"] = torch.tensor(steps, dtype=torch.int32, device=plan.device)
    state |= _masters(plan, params)
    result = {
        name: placed(state[name], spec, plan) if name in state else _zeros(spec, plan)
        for name, spec in plan.state.items()
    }
    check_tensors(plan, "state", result, plan.state)
    return result


def _say_what_is_ignored(found: Mapping[str, Found]) -> None:
    keys = sorted({key for entry in found.values() for key in entry.ignored})
    if keys:
        name = next(name for name, entry in found.items() if entry.ignored)
        warnings.warn(
            f"convert_state leaves out {keys} of the source (of {name!r}, for example), which have "
            "no counterpart",
            stacklevel=3,
        )


def _check_options(
    missing: str, source_momentum: str | None, source_variance: str | None, step: int | None
) -> None:
    if missing not in ("error", "zeros"):
        raise ValueError(f"missing: expected 'error' or 'zeros', got {missing!r}")
    if source_momentum not in (None, *get_args(MomentumForm)):
        raise ValueError(
            f"source_momentum: expected None or one of {get_args(MomentumForm)}, "
            f"got {source_momentum!r}"
        )
    if source_variance not in (None, *get_args(SourceVariance)):
        raise ValueError(
            f"source_variance: expected None or one of {get_args(SourceVariance)}, "
            f"got {source_variance!r}"
        )
    if step is not None and (
        isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**31
    ):
        raise ValueError(f"step: expected None or an int >= 0 that fits int32, got {step!r}")


def _entries_of_all(
    source: StateDict | Sequence[StateDict],
    names: Sequence[str] | Sequence[Sequence[str]] | None,
    form: MomentumForm | None,
) -> dict[str, Found]:
    """By name; where several sources have state for one parameter, the first one counts."""
    several_given = isinstance(source, (list, tuple))
    sources: list[Any] = [*source] if several_given else [source]
    per_source: list[Any]
    if names is None:
        per_source = [None] * len(sources)
    else:
        several = bool(names) and not isinstance(names[0], str)
        per_source = list(names) if several else [names]
    if len(per_source) != len(sources):
        raise ValueError(
            f"names: expected a list for each of {len(sources)} state dicts, got {len(per_source)}"
        )
    found: dict[str, Found] = {}
    for state_dict, own in zip(sources, per_source, strict=True):
        for name, entry in entries(state_dict, own, form):
            found.setdefault(name, entry)
    return found


def _state_of(
    parameter: Parameter, found: Found | None, plan: Plan, source_variance: SourceVariance | None
) -> dict[str, Tensor]:
    """The state of one parameter.

    Raises:
        LookupError: the source has no state that the plan can use.
    """
    name, algorithm = parameter.name, parameter.route.algorithm
    if algorithm == "frozen":
        return {}
    if found is None:
        raise LookupError("the source has none")
    if (found.kind == "matrix") != (algorithm == "normuon"):
        optimizer = "Muon" if found.kind == "matrix" else "Adam"
        raise LookupError(f"the source has that of {optimizer}, the plan routes it to {algorithm}")
    if algorithm == "adamw":
        assert found.second is not None
        if plan.config.other != "adamw":
            raise LookupError(f"the source has that of Adam, the plan has {plan.config.other}")
        moments = {"exp_avg": found.first, "exp_avg_sq": found.second}
        return {
            f"{name}.{suffix}": _as(tensor, plan, name, suffix)
            for suffix, tensor in moments.items()
        }
    factor = 1.0
    if found.form != plan.config.momentum_form:
        if found.beta is None or not 0.0 <= found.beta < 1.0:
            raise ValueError(
                f"source: {name!r}: expected a momentum coefficient in [0, 1) to convert "
                f"{found.form!r} to {plan.config.momentum_form!r}, got {found.beta!r}"
            )
        factor = 1.0 - found.beta if found.form == "sum" else 1.0 / (1.0 - found.beta)
    momentum = {"momentum": _as(found.first, plan, name, "momentum", factor)}
    own = {f"{name}.{kind}": x for kind, x in fitted(plan, name, momentum).items()}
    if plan.config.normalize and found.unusable:
        raise LookupError(found.unusable)
    if found.second is not None and plan.config.normalize:
        variance = unscaled(name, found, source_variance)
        own[f"{name}.variance"] = _variance(parameter, variance, plan)
    return own


def _as(tensor: Tensor, plan: Plan, name: str, suffix: str, factor: float = 1.0) -> Tensor:
    """A copy as the plan wants it: its shape (checked), dtype and device, times ``factor``."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"source: {name!r}: expected a tensor as {suffix}, got {type(tensor).__name__}"
        )
    spec = plan.whole_state[f"{name}.{suffix}"]
    wide = torch.promote_types(spec.dtype, torch.float32)
    dtype = spec.dtype if spec.dtype.is_floating_point else wide  # codes are made of floats
    moved = tensor.detach().to(plan.device)
    if spec.sharded is None and tuple(moved.shape) != spec.shape:
        raise ValueError(
            f"source: {name!r}: expected {suffix} of shape {spec.shape}, got {tuple(moved.shape)}"
        )
    return (moved.to(wide) * factor).to(dtype, memory_format=torch.contiguous_format).clone()


def _variance(parameter: Parameter, variance: Tensor, plan: Plan) -> Tensor:
    """Other optimizers have [..., rows, 1].

    For a convolution that is one variance per row of every kernel; their mean is the variance of
    the row of the flattened matrix.
    """
    name, spec = parameter.name, plan.whole_state[f"{parameter.name}.variance"]
    if parameter.route.flatten and variance.ndim > 2 and spec.shape == (variance.shape[0], 1):
        variance = variance.flatten(1).float().mean(1, keepdim=True)
    if spec.sharded is None and tuple(variance.shape) != spec.shape:
        raise LookupError(
            f"its variance is {tuple(variance.shape)}, the plan's {spec.shape}, along another axis"
        )
    return _as(variance, plan, name, "variance")


def _masters(plan: Plan, params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    names = [p.name for p in plan.parameters if f"{p.name}.master" in plan.state]
    params = {} if params is None else params
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"params: {missing[:8]} have float32 masters, which start from the present parameters; "
            "write params=dict(model.named_parameters())"
        )
    return {f"{name}.master": _as(params[name], plan, name, "master") for name in names}


def _zeros(spec: Spec, plan: Plan) -> Tensor:
    return to_dtensor(spec.zeros(plan.device), spec.sharded)
