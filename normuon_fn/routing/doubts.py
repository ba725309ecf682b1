"""The one warning about every decision that is not certain, and the caller's line for it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from .routes import Decision
from .uses import is_window

_PACKAGE = str(Path(__file__).parents[1])
_SHOWN = 20


def unsure(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Those decisions about what is trained that are likely, or could not be told."""
    return {
        name: found
        for name, found in decisions.items()
        if found.certainty != "certain" and found.route.algorithm != "frozen"
    }


def line_to_write(name: str, decision: Decision, shape: tuple[int, ...] = ()) -> str:
    """The entry of ``routes=`` that a reader writes if the decision was wrong."""
    route = decision.route
    if len(shape) > 2 and is_window(shape) and not route.flatten:
        other = "nm.Route(flatten=True)"
    else:
        other = 'nm.Route("adamw")' if route.algorithm == "normuon" else "nm.Route()"
    return f'"{name}": {other}'


def warning_text(
    decisions: Mapping[str, Decision],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    by_modules: bool = False,
) -> str | None:
    """One text about every decision that is not certain; ``None`` if all are.

    Per parameter: its name, the rule it got, why, and the entry of ``routes=`` for the other rule.
    ``by_modules``: the model was read, and its modules do not tell more.
    """
    shapes = shapes or {}
    doubtful = unsure(decisions)
    if not doubtful:
        return None
    untold = sum(found.certainty == "untold" for found in doubtful.values())
    count = f"{len(doubtful)} parameter{'s' if len(doubtful) > 1 else ''}"
    either = f", and {untold} of them could be either kind" if untold else ""
    if by_modules:
        lines = [
            f"The modules of the model do not tell the rule of {count} for certain{either}. Write "
            "the entry that is meant, for either rule, into routes={...} beside the model, or into "
            "nm.routes_for(model, {...}); a route that is written is not doubted:"
        ]
    else:
        lines = [
            f"The rule of {count} follows from names and shapes alone{either}. Give the model "
            "(nm.NorMuon(model), nm.make_plan(model), or routes=nm.routes_for(model)) to have its "
            "modules read, or write the entries that are wrong into routes={...}:"
        ]
    shown = sorted(doubtful.items(), key=lambda item: item[1].certainty != "untold")
    for name, found in shown[:_SHOWN]:
        lines.append(
            f"  {name}: got {found.route} ({found.reason}); otherwise "
            f"{line_to_write(name, found, shapes.get(name, ()))}"
        )
    if len(shown) > _SHOWN:
        lines.append(f"  and {len(shown) - _SHOWN} more: {', '.join(n for n, _ in shown[_SHOWN:])}")
    return "\n".join(lines)


def warn_at_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the first frame outside this package (and outside torch, which may call
    the optimizer's constructor in between)."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno)


def _is_inside(filename: str) -> bool:
    return filename.startswith((_PACKAGE, "<")) or "/torch/" in filename
