"""What the state dicts of other optimizers say, parameter by parameter.

    microsoft/dion        momentum (sum), variance_neuron; with split_sizes, before its pull request
    (Muon, NorMuon)       #113 of 2026-08-18, times the square of each block's learning-rate scale;
                          AdamW: momentum, variance, step_dev; group["step"], group["mu"]
    KellerJordan/Muon     momentum_buffer (ema);  Adam: exp_avg, exp_avg_sq, step
    zichongli5/NorMuon    momentum_buffer (ema), second_momentum_buffer;
                          Adam: exp_avg, exp_avg_sq, step
    torch.optim.Muon      momentum_buffer (ema: what its code does; its docstring shows a sum)
    torch.optim.AdamW     exp_avg, exp_avg_sq, step

Read in their code: dion 0a059a4, Muon 00ba60d, NorMuon e5aaaf4, torch 2.13; and what dion's pull
requests #113, #114 and #121 changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed.placements import times_rows
from ..types import MomentumForm

SourceVariance = Literal["scaled", "plain"]
StateDict = Mapping[str, Any]

# By an option of their groups: optimizers whose momentum_buffer is a sum, or not of gradients.
_WITHOUT_MUONS_MOMENTUM = {"dampening": "SGD", "alpha": "RMSprop"}
# By the algorithm of dion's groups: a part of their momentum is taken away at every step.
_ERROR_FEEDBACK = {"dion": "Dion", "dion2": "Dion2", "nordion2": "NorDion2 (Dion3)"}
# What else a state may have without it being lost on the way.
_COUNTERS = {"step", "step_dev", "variance_neuron_layout_version"}


class Found(NamedTuple):
    """The state of one parameter, under the same names whatever optimizer it came from."""

    kind: Literal["matrix", "adam"]
    first: Tensor  # momentum, or the first moment
    second: Tensor | None  # variance, or the second moment
    form: MomentumForm
    beta: float | None  # of the momentum
    step: int | None
    # dion's split_sizes: the rows of each block, and the square of its learning-rate scale, which
    # its variance may have as a factor
    blocks: tuple[tuple[int, float], ...] = ()
    unusable: str = ""  # why its variance cannot be converted
    ignored: tuple[str, ...] = ()  # keys of the source that have no counterpart
    betas: tuple[float, float] | None = None  # of Adam


def entries(
    source: StateDict, names: Sequence[str] | None, form: MomentumForm | None
) -> Iterator[tuple[str, Found]]:
    """Every parameter of ``source`` that has state, with its name.

    Args:
        names: in the order of the source's groups; ``None``: the source has them itself.
        form: the form of the momentum, where the keys of the source mislead.
    """
    if not isinstance(source, Mapping) or "state" not in source or "param_groups" not in source:
        is_optimizer = hasattr(source, "state_dict") and hasattr(source, "param_groups")
        raise TypeError(
            "source: expected an optimizer's state_dict(), with 'state' and 'param_groups', got "
            f"{type(source).__name__}" + ("; write optimizer.state_dict()" if is_optimizer else "")
        )
    groups = source["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if names is None:
        own_names = [name for group in groups for name in group.get("param_names", ())]
        names = keys if all(isinstance(key, str) for key in keys) else own_names
    if len(names) != len(keys):
        for key in keys:
            _check_foreign(key, source["state"].get(key) or {})
        raise ValueError(
            f"names: expected {len(keys)} for the optimizer's parameters, in its order, got "
            f"{len(names)}; normuon_fn.names_in(optimizer, model.named_parameters()) has them"
        )
    remaining = iter(names)
    for group in groups:
        for key in group["params"]:
            name, own = next(remaining), source["state"].get(key)
            if own:
                yield name, _found(name, own, group, form)


def _check_foreign(name: object, own: Mapping[str, Any]) -> None:
    if "consecutive" in own:
        raise ValueError(
            f"source: {name!r} has the state of normuon_fn.NorMuon, whose own load_state_dict "
            "reads it, with the config and the routes that it was saved with. To change the route "
            "of a parameter, delete its entry of source['state'] before loading: its state begins "
            "anew"
        )


def _found(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any], form: MomentumForm | None
) -> Found:
    _check_foreign(name, own)
    found = _adam(name, own, group)
    if found is None:
        found = _of_dion(name, own, group, form) if "momentum" in own else None
    if found is None and "momentum_buffer" in own:
        found = _of_muon(name, own, group, form)
    if found is None:
        raise ValueError(
            f"source: {name!r} has {sorted(own)}, which is the state of no optimizer that is known "
            "here"
        )
    used = {"momentum", "momentum_buffer", "variance", "exp_avg", "exp_avg_sq"}
    used |= {"variance_neuron", "second_momentum_buffer", "moment2_buffer", *_COUNTERS}
    return found._replace(ignored=tuple(sorted(str(key) for key in own if key not in used)))


def _adam(name: str, own: Mapping[str, Any], group: Mapping[str, Any]) -> Found | None:
    if "exp_avg" in own and "exp_avg_sq" in own:
        count = own.get("step", group.get("step"))
        moments = own["exp_avg"], own["exp_avg_sq"]
        return Found("adam", *moments, "ema", None, _int(count), betas=_betas(group))
    if "momentum" in own and "variance" in own:  # dion's; a replayed graph counts step_dev alone
        return Found(
            "adam", own["momentum"], own["variance"], "ema", None, _steps_of_dion(own, group)
        )
    return None


def _of_dion(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any], form: MomentumForm | None
) -> Found:
    algorithm = group.get("algorithm")
    if algorithm == "lion":
        raise ValueError(
            f"source: {name!r} has the state of Lion, which is not converted; leave it out, "
            "and missing='zeros' starts it anew"
        )
    if algorithm in _ERROR_FEEDBACK or "Q" in own:
        optimizer = _ERROR_FEEDBACK.get(str(algorithm), "Dion")
        raise ValueError(
            f"source: {name!r} has the state of {optimizer}, whose momentum is not Muon's (error "
            "feedback takes a part of it away at every step); leave it out, and missing='zeros' "
            "starts it anew"
        )
    variance = own.get("variance_neuron")
    found = Found(
        "matrix", own["momentum"], variance, form or "sum", group.get("mu"),
        _int(own.get("step", group.get("step"))),
    )  # fmt: skip
    return found if variance is None else found._replace(blocks=_blocks(name, own, group))


def _of_muon(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any], form: MomentumForm | None
) -> Found:
    for option, optimizer in _WITHOUT_MUONS_MOMENTUM.items():
        if option in group:
            raise ValueError(
                f"source: {name!r} has the state of torch.optim.{optimizer}, whose momentum is "
                "not Muon's; leave it out, and missing='zeros' starts it anew"
            )
    count = _int(own.get("step", group.get("step")))
    beta = group.get("momentum", group.get("momentum_beta"))
    found = Found(
        "matrix",
        own["momentum_buffer"],
        own.get("second_momentum_buffer"),
        form or "ema",
        beta,
        count,
    )
    if "moment2_buffer" not in own:
        return found
    return found._replace(
        unusable="its moment2_buffer (of NVIDIA's Emerging-Optimizers) may have the square of the "
        "update's scale as a factor, and the state does not say it"
    )


def _blocks(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[tuple[int, float], ...]:
    """The rows of dion's blocks and the squares of their learning-rate scales; none if all are 1.

    The scale is that of a block's shape, over that of the whole shape, as ``adjust_lr`` says.
    """
    sizes = group.get("split_sizes")
    if sizes is None:
        return ()
    rows, cols = sum(sizes), own["momentum"].shape[-1]
    if own["momentum"].shape[0] != rows:
        raise ValueError(
            f"source: {name!r}: expected split_sizes that sum up to its {own['momentum'].shape[0]} "
            f"rows, its group has {tuple(sizes)}"
        )
    adjust = group.get("adjust_lr", "nothing")
    if adjust == "spectral_norm":
        squares = [size / rows for size in sizes]
    elif adjust == "rms_norm":
        squares = [max(size, cols) / max(rows, cols) for size in sizes]
    elif adjust is None:
        return ()
    else:
        raise ValueError(
            f"source: {name!r}: expected a group with split_sizes to have adjust_lr 'spectral_norm'"
            f", 'rms_norm' or None, got {adjust!r}"
        )
    return () if set(squares) == {1.0} else tuple(zip(sizes, squares, strict=True))


def _steps_of_dion(own: Mapping[str, Any], group: Mapping[str, Any]) -> int | None:
    """By the counter on the device, where there is one that has counted.

    A replayed CUDA graph counts it, and leaves that of the group as it was.
    """
    on_device = _int(own.get("step_dev"))
    return on_device or _int(group.get("step"))


def _betas(group: Mapping[str, Any]) -> tuple[float, float] | None:
    betas = group.get("betas")
    return (float(betas[0]), float(betas[1])) if isinstance(betas, (tuple, list)) else None


def _int(steps: Any) -> int | None:
    return None if steps is None else int(steps)


def unscaled(name: str, found: Found, how: SourceVariance | None) -> Tensor:
    """The variance without the squares of dion's learning-rate scales.

    Raises:
        ValueError: it may have them, and ``how`` does not say whether it has.
    """
    assert found.second is not None
    if not found.blocks or how == "plain":
        return found.second
    if how is None:
        sizes = tuple(size for size, _ in found.blocks)
        raise ValueError(
            f"source: {name!r} was trained by dion with split_sizes={sizes}. Until its pull request"
            " #113 (2026-08-18) dion kept the square of each block's learning-rate scale in the "
            "variance, and the state does not say which version saved it. Write "
            "source_variance='scaled' for the version before, source_variance='plain' for the one "
            "after"
        )
    double: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    inverse = [torch.full((size, 1), 1.0 / s, **double) for size, s in found.blocks]
    wide = torch.promote_types(found.second.dtype, torch.float32)
    return times_rows(found.second.to(wide), torch.cat(inverse).to(found.second.device, wide))
