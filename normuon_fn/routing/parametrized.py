"""Parameters from which a parametrization (torch.nn.utils.parametrize) makes a module's weight."""

from __future__ import annotations

import re

from torch import nn

from .attributes import kind_of
from .routes import Decision, Route
from .uses import Use

# Whose original is a matrix as the weight itself is: its norm, or that of its rows, is another.
_OF_MATRICES = ("_SpectralNorm", "_WeightNorm")
_ADAPTER = re.compile(r"lora|adapter", re.I)
_ORIGINAL = re.compile(r"(^|\.)parametrizations\.\w+\.original$")


def doubted(use: Use, found: Decision) -> Decision:
    """The decision for a matrix, by what a parametrization makes of it."""
    owner = use.owners[0]
    inside = ".original" in use.name and use.name.rpartition(".")[2].startswith("original")
    if found.route.algorithm != "normuon" or kind_of(owner) != "ParametrizationList" or not inside:
        return found
    kinds = [kind_of(made) for made in owner.children() if isinstance(made, nn.Module)]
    if "_Orthogonal" in kinds:
        why = "its lower triangle alone counts"
        return Decision(Route("adamw"), f"original of an orthogonal parametrization: {why}")
    other = [k for k in kinds if k not in _OF_MATRICES and not _ADAPTER.search(k)]
    if not other:
        return found
    text = f"{found.reason}, behind a parametrization ({', '.join(other)})"
    return Decision(found.route, text, "likely" if found.certainty == "certain" else "untold")


def doubted_by_name(name: str, found: Decision) -> Decision:
    """As `doubted`, where the parametrization cannot be asked."""
    if found.route.algorithm != "normuon" or not _ORIGINAL.search(name):
        return found
    if found.certainty != "certain":
        return found
    return Decision(found.route, f"{found.reason}, behind a parametrization", "likely")
