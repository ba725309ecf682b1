"""Files in which parameters have numbers: ``groups.0.8``, the ninth one of the first group.

So an optimizer called what its groups gave no name, also where a table of routes knew one.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..planning.plan import Plan

_NUMBER = re.compile(r"groups\.(\d+)\.(\d+)")


def with_names_of(
    path: str | os.PathLike[str], meta: dict[str, Any], found: Mapping[str, Tensor], plan: Plan
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's description and tensors with the plan's names, where the file has numbers.

    They are taken in the order of the groups, which is that of the optimizer's plan; a warning says
    so. Shapes are checked by whoever reads on.
    """
    saved = [name for name in meta["routes"] if _NUMBER.fullmatch(name)]
    if not saved or len(saved) != len(meta["routes"]) or len(saved) != len(plan.names):
        return meta, dict(found)
    if any(map(_NUMBER.fullmatch, plan.names)):
        return meta, dict(found)
    saved.sort(key=lambda name: tuple(map(int, name.split(".")[1:])))
    names = dict(zip(saved, plan.names, strict=True))
    shown = ", ".join(f"{old} is {new}" for old, new in [*names.items()][:3])
    warnings.warn(
        f"{path}: its parameters have numbers in the place of names, of an optimizer whose groups "
        f"had none; they are taken in the order of the plan ({shown}, ...). So it is right for the "
        "plan of that optimizer, made with the same groups",
        stacklevel=3,
    )
    routes = {names[name]: route for name, route in meta["routes"].items()}
    return {**meta, "routes": routes}, {_renamed(key, names): x for key, x in found.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    part, _, name = key.partition("/")
    if part == "params":
        return f"{part}/{names[name]}"
    of, _, kind = name.rpartition(".")
    return f"{part}/{names[of]}.{kind}" if part == "state" and of in names else key
