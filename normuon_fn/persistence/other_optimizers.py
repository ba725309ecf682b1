"""What the state dicts of other optimizers say, parameter by parameter.

    microsoft/dion        momentum (sum), variance_neuron;
                          AdamW: momentum, variance; group["step"], group["mu"]
    KellerJordan/Muon     momentum_buffer (ema);  Adam: exp_avg, exp_avg_sq, step
    zichongli5/NorMuon    momentum_buffer (ema), second_momentum_buffer;
                          Adam: exp_avg, exp_avg_sq, step
    torch.optim.Muon      momentum_buffer (ema: what its code does; its docstring shows a sum)
    torch.optim.AdamW     exp_avg, exp_avg_sq, step

Read in their code: dion 0a059a4, Muon 00ba60d, NorMuon e5aaaf4, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..types import MomentumForm

StateDict = Mapping[str, Any]

# By an option of their groups: optimizers whose momentum_buffer is a sum, or not of gradients.
_WITHOUT_MUONS_MOMENTUM = {"dampening": "SGD", "alpha": "RMSprop"}


class Found(NamedTuple):
    """The state of one parameter, under the same names whatever optimizer it came from."""

    kind: Literal["matrix", "adam"]
    first: Tensor  # momentum, or the first moment
    second: Tensor | None  # variance, or the second moment
    form: MomentumForm
    beta: float | None  # of the momentum
    step: int | None


def entries(
    source: StateDict, names: Sequence[str] | None, form: MomentumForm | None
) -> Iterator[tuple[str, Found]]:
    """Every parameter of ``source`` that has state, with its name.

    Args:
        names: in the order of the source's groups; ``None``: the source has them itself.
        form: the form of the momentum, where the keys of the source mislead.
    """
    if not isinstance(source, Mapping) or "state" not in source or "param_groups" not in source:
        raise TypeError(
            "source: expected an optimizer's state_dict(), with 'state' and 'param_groups'"
        )
    groups = source["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if names is None:
        own_names = [name for group in groups for name in group.get("param_names", ())]
        names = keys if all(isinstance(key, str) for key in keys) else own_names
    if len(names) != len(keys):
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


def _found(
    name: str, own: Mapping[str, Any], group: Mapping[str, Any], form: MomentumForm | None
) -> Found:
    steps = own.get("step", group.get("step"))
    count = None if steps is None else int(steps)
    if "consecutive" in own:
        raise ValueError(
            f"source: {name!r} has the state of normuon_fn.NorMuon, whose own load_state_dict "
            "reads it as it is"
        )
    if "exp_avg" in own and "exp_avg_sq" in own:
        return Found("adam", own["exp_avg"], own["exp_avg_sq"], "ema", None, count)
    if "momentum" in own and group.get("algorithm") == "lion":
        raise ValueError(
            f"source: {name!r} has the state of Lion, which has no counterpart; leave it out"
        )
    if "momentum" in own and "variance" in own:
        return Found("adam", own["momentum"], own["variance"], "ema", None, count)
    if "momentum" in own:
        variance, beta = own.get("variance_neuron"), group.get("mu")
        return Found("matrix", own["momentum"], variance, form or "sum", beta, count)
    if "momentum_buffer" in own:
        for option, optimizer in _WITHOUT_MUONS_MOMENTUM.items():
            if option in group:
                raise ValueError(
                    f"source: {name!r} has the state of torch.optim.{optimizer}, whose momentum is "
                    "not Muon's; leave it out, and missing='zeros' starts it anew"
                )
        variance, beta = own.get("second_momentum_buffer"), group.get("momentum")
        return Found("matrix", own["momentum_buffer"], variance, form or "ema", beta, count)
    raise ValueError(
        f"source: {name!r} has {sorted(own)}, which is the state of no optimizer that is known here"
    )
