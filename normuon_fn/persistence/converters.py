"""The state of other optimizers as this one's.

    microsoft/dion          momentum (sum), variance_neuron;  AdamW: momentum, variance; group["step"], group["mu"]
    KellerJordan/Muon       momentum_buffer (ema);  Adam: exp_avg, exp_avg_sq, step
    zichongli5/NorMuon      momentum_buffer (ema), second_momentum_buffer;  Adam: exp_avg, exp_avg_sq, step
    torch.optim.Muon        momentum_buffer (ema: what the code does; its docstring shows a sum)
    torch.optim.AdamW       exp_avg, exp_avg_sq, step

A sum (M <- b M + G) is 1/(1-b) times the ema of the same gradients (M <- b M + (1-b) G). A variance is a mean of squares of the
orthogonalized momentum, before any scale, in all of them. Read in their code: dion 0a059a4, Muon 00ba60d, NorMuon e5aaaf4,
torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..distributed.placements import to_dtensor
from ..planning.checks import check_tensors
from ..planning.plan import Parameter, Plan, Spec
from ..types import MomentumForm

StateDict = Mapping[str, Any]
_NOT_MUONS = {
    "dampening": "SGD",
    "alpha": "RMSprop",
}  # whose momentum_buffer is a sum, or of other gradients


class _Found(NamedTuple):
    """What an optimizer has of one parameter: its tensors under one set of names."""

    kind: Literal["matrix", "adam"]
    first: Tensor  # momentum, or the first moment
    second: Tensor | None  # variance, or the second moment
    form: MomentumForm
    beta: float | None  # of the momentum
    step: int | None


def names_in(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> list[str]:
    """The names of an optimizer's parameters in its own order (some sort them): the ``names`` of `convert_state`.

    Raises:
        ValueError: the optimizer has a parameter that ``params`` (``model.named_parameters()``, or a dict of it) has not.
    """
    known = {id(p): name for name, p in (params.items() if isinstance(params, Mapping) else params)}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [tuple(p.shape) for p in own if id(p) not in known]
    if missing:
        raise ValueError(
            f"params: without {len(missing)} of the optimizer's parameters, of shapes {missing[:8]}"
        )
    return [known[id(p)] for p in own]


def convert_state(
    source: StateDict | Sequence[StateDict],
    plan: Plan,
    names: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    source_momentum: MomentumForm | None = None,
    step: int | None = None,
    missing: Literal["error", "zeros"] = "error",
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The state with which a plan goes on where another optimizer stopped: ``init``'s keys, shapes and dtypes.

    Args:
        source: the optimizer's ``state_dict()``; several, where there was one for the matrices and one for the rest, or one
            a rank that each has a part.
        names: of the parameters in the order of the optimizer's groups, for each source: see `names_in`. ``None``: the state
            dict has them, as those of optimizers made from ``named_parameters()`` and of distributed checkpoints have.
        source_momentum: what its momentum is where its keys mislead: ``"sum"`` for KellerJordan/Muon before 2025.
        step: how many steps AdamW has made (its bias correction); ``None``: as the source says.
        missing: what a parameter gets that the source has no state for, or one of the other algorithm, or a variance that is
            none of the plan's.
        params: the parameters as they are now, from which float32 masters begin: for a plan of ``Config(master="fp32")``. A
            mantissa begins as zeros.

    A variance that the source never had starts at zero, as at the first step. With several values of momentum behind it, a sum
    has no exact ema: the present one counts.

    Raises:
        TypeError: something that is not a state dict.
        ValueError: names that do not fit, parameters without state, shapes that are not the plan's, counters that differ, a
            state whose momentum is of another kind (SGD, RMSprop) or that is `NorMuon`'s own.
    """
    if missing not in ("error", "zeros"):
        raise ValueError(f"missing: expected 'error' or 'zeros', got {missing!r}")
    if source_momentum not in (None, *get_args(MomentumForm)):
        raise ValueError(
            f"source_momentum: expected None or one of {get_args(MomentumForm)}, got {source_momentum!r}"
        )
    if step is not None and (
        isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**31
    ):
        raise ValueError(f"step: expected None or an int >= 0 that fits int32, got {step!r}")
    sources = [source] if isinstance(source, Mapping) else list(source)
    several = bool(names) and not isinstance(names[0], str)  # type: ignore[index]
    of_source: list[Any] = (
        [None] * len(sources) if names is None else list(names) if several else [names]
    )
    if len(of_source) != len(sources):
        raise ValueError(
            f"names: expected a list for each of {len(sources)} state dicts, got {len(of_source)}"
        )
    found: dict[str, _Found] = {}
    for state_dict, own in zip(sources, of_source, strict=True):
        for name, entry in _entries(state_dict, own, source_momentum):
            found.setdefault(name, entry)
    unknown = [name for name in found if name not in plan.names]
    if unknown:
        raise ValueError(f"source: {unknown[:8]} are no parameters of the plan")

    state: dict[str, Tensor] = {}
    unused = []
    for parameter in plan.parameters:
        try:
            state |= _of_parameter(parameter, found.get(parameter.name), plan)
        except LookupError as error:
            unused.append(f"{parameter.name!r}: {error.args[0]}")
    if unused and missing == "error":
        raise ValueError(
            f"source: no state for {'; '.join(unused[:8])}. missing='zeros' starts these anew"
        )
    counted = _steps(plan, found) if step is None else step
    state["guard.step"] = torch.tensor(counted, dtype=torch.int32, device=plan.device)
    state |= _masters(plan, params)
    result = {
        name: state[name] if name in state else _zeros(spec, plan)
        for name, spec in plan.state.items()
    }
    check_tensors(plan, "state", result, plan.state)
    return result


def _masters(plan: Plan, params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    names = [p.name for p in plan.parameters if f"{p.name}.master" in plan.state]
    missing = [name for name in names if params is None or name not in params]
    if missing:
        raise ValueError(
            f"params: {missing[:8]} have float32 masters, which begin as they are; give them with params="
        )
    return (
        {f"{name}.master": _as(params[name], plan, name, "master") for name in names}
        if params is not None
        else {}
    )


def _zeros(spec: Spec, plan: Plan) -> Tensor:
    return to_dtensor(torch.zeros(spec.shape, dtype=spec.dtype, device=plan.device), spec.sharded)


def _entries(
    source: StateDict, names: Sequence[str] | None, form: MomentumForm | None
) -> Iterable[tuple[str, _Found]]:
    if not isinstance(source, Mapping) or "state" not in source or "param_groups" not in source:
        raise TypeError(
            "source: expected an optimizer's state_dict(), with 'state' and 'param_groups'"
        )
    groups = source["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if names is None:
        given = [name for group in groups for name in group.get("param_names", ())]
        names = keys if all(isinstance(key, str) for key in keys) else given
    if len(names) != len(keys):
        raise ValueError(
            f"names: expected {len(keys)} for the optimizer's parameters, in its order, got {len(names)}"
        )
    at = 0
    for group in groups:
        for key in group["params"]:
            name, own = names[at], source["state"].get(key)
            at += 1
            if own:
                yield name, _found(name, own, group, form)


def _found(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any], form: MomentumForm | None
) -> _Found:
    steps = own.get("step", group.get("step"))
    count = None if steps is None else int(steps)
    if "consecutive" in own:
        raise ValueError(
            f"source: {name!r} was of normuon_fn.NorMuon, whose load_state_dict reads it as it is"
        )
    if "exp_avg" in own and "exp_avg_sq" in own:
        return _Found("adam", own["exp_avg"], own["exp_avg_sq"], "ema", None, count)
    if "momentum" in own and group.get("algorithm") == "lion":
        raise ValueError(f"source: {name!r} was of Lion, which has no counterpart; leave it out")
    if "momentum" in own and "variance" in own:
        return _Found("adam", own["momentum"], own["variance"], "ema", None, count)
    if "momentum" in own:
        return _Found(
            "matrix",
            own["momentum"],
            own.get("variance_neuron"),
            form or "sum",
            group.get("mu"),
            count,
        )
    if "momentum_buffer" in own:
        for option, theirs in _NOT_MUONS.items():
            if option in group:
                hint = "leave it out, and missing='zeros' starts it anew"
                raise ValueError(
                    f"source: {name!r} was of torch.optim.{theirs}, whose momentum is none of Muon's; {hint}"
                )
        variance = own.get("second_momentum_buffer")
        return _Found(
            "matrix", own["momentum_buffer"], variance, form or "ema", group.get("momentum"), count
        )
    raise ValueError(
        f"source: {name!r} has {sorted(own)}, the state of no optimizer that is known here"
    )


def _of_parameter(parameter: Parameter, found: _Found | None, plan: Plan) -> dict[str, Tensor]:
    """Its part of the state.

    Raises:
        LookupError: what is there is of no use.
    """
    name, algorithm = parameter.name, parameter.route.algorithm
    if algorithm == "frozen":
        return {}
    if found is None:
        raise LookupError("it has none")
    if (found.kind == "matrix") != (algorithm == "normuon"):
        theirs = "Muon" if found.kind == "matrix" else "Adam"
        raise LookupError(f"it was {theirs}'s, the plan gives it to {algorithm}")
    if algorithm == "adamw":
        assert found.second is not None
        moments = {"exp_avg": found.first, "exp_avg_sq": found.second}
        return {
            f"{name}.{suffix}": _as(tensor, plan, name, suffix)
            for suffix, tensor in moments.items()
        }
    factor = 1.0
    if found.form != plan.config.momentum_form:
        if found.beta is None or not 0.0 <= found.beta < 1.0:
            raise ValueError(
                f"source: {name!r}: a momentum of {found.beta!r} tells no sum from an average"
            )
        factor = 1.0 - found.beta if found.form == "sum" else 1.0 / (1.0 - found.beta)
    own = {f"{name}.momentum": _as(found.first, plan, name, "momentum", factor)}
    if found.second is not None and plan.config.normalize:
        own[f"{name}.variance"] = _variance(parameter, found.second, plan)
    return own


def _as(tensor: Tensor, plan: Plan, name: str, suffix: str, factor: float = 1.0) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"source: {name!r}: expected a tensor as {suffix}, got {type(tensor).__name__}"
        )
    spec = plan.state[f"{name}.{suffix}"]
    wide = torch.promote_types(spec.dtype, torch.float32)
    moved = tensor.detach().to(plan.device)
    if spec.sharded is None and tuple(moved.shape) != spec.shape:
        raise ValueError(
            f"source: {name!r}: expected {suffix} of shape {spec.shape}, got {tuple(moved.shape)}"
        )
    return (moved.to(wide) * factor).to(spec.dtype, memory_format=torch.contiguous_format).clone()


def _variance(parameter: Parameter, variance: Tensor, plan: Plan) -> Tensor:
    """Theirs is [..., rows, 1]. Of a convolution it has one a row of every kernel, whose mean is that of the whole row."""
    name, spec = parameter.name, plan.state[f"{parameter.name}.variance"]
    if parameter.route.flatten and variance.ndim > 2 and spec.shape == (variance.shape[0], 1):
        variance = variance.flatten(1).float().mean(1, keepdim=True)
    if spec.sharded is None and tuple(variance.shape) != spec.shape:
        raise LookupError(
            f"its variance is {tuple(variance.shape)}, the plan's {spec.shape}, along another axis"
        )
    return _as(variance, plan, name, "variance")


def _steps(plan: Plan, found: Mapping[str, _Found]) -> int:
    adam = {p.name for p in plan.parameters if p.route.algorithm == "adamw"}
    counts = {
        entry.step for name, entry in found.items() if name in adam and entry.step is not None
    }
    if not counts:
        counts = {entry.step for entry in found.values() if entry.step is not None}
    if len(counts) > 1:
        raise ValueError(
            f"source: its parameters have made {sorted(counts)} steps, here all make the same number; give step="
        )
    return counts.pop() if counts else 0
