"""The one warning about every decision that is not certain, and the caller's line for it."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType

from .routes import Decision, Route
from .uses import is_window

_FRAMEWORKS = re.compile(
    r"-packages/(transformers|trl|accelerate|lightning|lightning_fabric|pytorch_lightning)/"
)
_PACKAGE = str(Path(__file__).parents[1])
_SHOWN = 20
_PARTS = re.compile(r"; split it is (nm\.Route\([^;]*\))")
_MANY = 3  # parameters that one glob stands for


def unsure(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Those decisions about what is trained that are likely, or could not be told."""
    return {
        name: found
        for name, found in decisions.items()
        if found.certainty != "certain" and found.route.algorithm != "frozen"
    }


def line_to_write(name: str, decision: Decision, shape: tuple[int, ...] = ()) -> str:
    """The entry of ``routes=`` that a reader writes if the decision was wrong."""
    return f'"{name}": {_other(decision, shape)}'


def _other(decision: Decision, shape: tuple[int, ...]) -> str:
    """The route for the other rule, or for the parts of a matrix that was left whole."""
    route = decision.route
    parts = _PARTS.search(decision.reason)
    if parts is not None:
        return parts[1]
    if len(shape) > 2 and is_window(shape) and not route.flatten:
        return "nm.Route(flatten=True)"
    return 'nm.Route("adamw")' if route.algorithm == "normuon" else "nm.Route()"


def left_whole(reason: str, parts: Route) -> str:
    """The reason for a matrix that may be several, with the route that would split it."""
    fields = ("flatten", "splits", "heads", "dim", "transposed")
    given = [f"{name}={getattr(parts, name)!r}" for name in fields if getattr(parts, name)]
    return f"{reason}, left whole; split it is nm.Route({', '.join(given)})"


def is_left_whole(decision: Decision) -> bool:
    """Whether its reason is one of `left_whole`."""
    return _PARTS.search(decision.reason) is not None


def warning_text(
    decisions: Mapping[str, Decision],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    by_modules: bool = False,
    names: Iterable[str] = (),
) -> str | None:
    """One text about every decision that is not certain; ``None`` if all are.

    Per parameter: its name, the rule it got, why, and the entry of ``routes=`` for the other rule.
    ``by_modules``: the model was read, and its modules do not tell more. ``names``: those of all
    parameters; where many with one ending have the same doubt, and nothing else ends so, they have
    one line with a glob.
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
    said = {
        name: (
            f"got {found.route} ({_PARTS.sub('', found.reason)})",
            _other(found, shapes.get(name, ())),
        )
        for name, found in shown
    }
    together = _together(said, [*names] or [*decisions])
    rest = [*together.items()]
    for glob, own in rest[:_SHOWN]:
        got, other = said[own[0]]
        many = f" ({len(own)} parameters)" if len(own) > 1 else ""
        lines.append(f'  {glob}{many}: {got}; otherwise "{glob}": {other}')
    if len(rest) > _SHOWN:
        left = [name for _, own in rest[_SHOWN:] for name in own]
        lines.append(f"  and {len(left)} more: {', '.join(left)}")
    return "\n".join(lines)


def _together(said: Mapping[str, tuple[str, str]], names: Iterable[str]) -> dict[str, list[str]]:
    """By glob, or by name, the parameters that have one line, in the order of ``said``."""
    ends = Counter(end for name in names for end in _ends(name))
    members: dict[tuple[str, tuple[str, str]], list[str]] = {}
    for name, what in said.items():
        for end in _ends(name):
            members.setdefault((end, what), []).append(name)
    found: dict[str, list[str]] = {}
    done: set[str] = set()
    for name, what in said.items():
        if name in done:
            continue
        own = [name]
        glob = name
        for end in _ends(name):
            alike = members[end, what]
            if len(alike) >= _MANY and len(alike) == ends[end] and done.isdisjoint(alike):
                glob, own = f"*.{end}", alike
                break
        found[glob] = own
        done.update(own)
    return found


def _ends(name: str) -> list[str]:
    """What comes after the last dot, and after the last but one."""
    parts = name.split(".")
    ends = [".".join(parts[-k:]) for k in (1, 2) if len(parts) > k]
    return [end for end in ends if not set(end) & set("*?[")]


def warn_at_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the first frame outside this package, and outside of torch and the
    frameworks that may call the optimizer in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno)


def is_called_by(package: str) -> bool:
    """Whether an installed package of this name stands between the caller and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_inside(frame.f_code.co_filename):
        if f"-packages/{package}/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _is_inside(filename: str) -> bool:
    if filename.startswith((_PACKAGE, "<")) or "/torch/" in filename:
        return True
    return _FRAMEWORKS.search(filename) is not None
