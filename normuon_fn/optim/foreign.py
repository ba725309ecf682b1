"""What is no ``state_dict`` of `NorMuon`, refused with the lines that bring it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .saved import values_of
from .state import COUNTERS, States

_PUT = """
    nm.put_state_(optimizer, state, model)"""
_CONVERT = """
    named = dict(model.named_parameters())
    plan = nm.make_plan(model, optimizer.config)  # and routes=, where the optimizer has it
    names = nm.names_in(state_dict, named)
    state = nm.convert_state(state_dict, plan, names, missing="zeros", params=named)"""
_OWN = {"algorithm", "adamw_betas"}  # keys of every group of NorMuon, and of nobody else


def refuse_foreign(given: Mapping[str, Any], named: Mapping[str, Tensor], states: States) -> None:
    """Refuses the flat state of a plan, and what another optimizer has saved.

    Raises:
        ValueError: with the lines to write.
    """
    if "guard.step" in given and "param_groups" not in given:
        _refuse_flat(given, named, states)
    groups = given.get("param_groups", ())
    if any(values and not values.keys() >= _OWN for values in map(values_of, groups)):
        raise ValueError(
            "state_dict: was saved by another optimizer. What fits of its state is converted, and "
            f"put into this one:{_CONVERT}{_PUT}\n"
            "missing='zeros' starts anew what the other optimizer did not have. Make the scheduler "
            "anew too, without the old one's state, which holds the old groups' rates, and call "
            "its step() as often as the old one's was: its state has that as 'last_epoch'. Of two "
            "optimizers side by side (Muon and AdamW) give lists of both: "
            "[muon_state, adamw_state], [its_names, its_names]"
        )


def _refuse_flat(given: Mapping[str, Any], named: Mapping[str, Tensor], states: States) -> None:
    lacking = [
        f"{name}.{kind}"
        for name, p in named.items()
        for kind in states.get(p, {})
        if kind not in COUNTERS and f"{name}.{kind}" not in given
    ]
    config = (
        f"\nIt lacks {lacking[:8]}: make it with the optimizer's own options, "
        "plan = nm.make_plan(model, optimizer.config), and its routes="
        if lacking
        else ""
    )
    raise ValueError(
        "state_dict: expected what optimizer.state_dict() returned, got the flat state of a plan, "
        f"as convert_state and init return it. Put it into the optimizer:{_PUT}"
        f"{config}"
    )
