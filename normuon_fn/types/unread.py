"""Options that another option leaves unread: they are refused, for nobody would hear of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Options = Mapping[str, Any]  # all of a Config


class _Rule(NamedTuple):
    fields: tuple[str, ...]
    is_unread: Callable[[Options], bool]
    why: str


_RULES = (
    _Rule(
        ("reduction", "eps"),
        lambda o: not o["normalize"],
        "normalize=False leaves out the variance that it is about",
    ),
    _Rule(
        ("rms",),
        lambda o: o["scale"] not in ("paper", "rms"),
        "only the scales 'paper' and 'rms' have it",
    ),
    _Rule(
        ("renormalize",),
        lambda o: o["normalize"] and o["scale"] == "paper",
        "scale='paper' brings every update to the same RMS, whatever it was before; write another "
        "scale beside it",
    ),
    _Rule(
        ("snap",),
        lambda o: not o["normalize"] and o["scale"] == "paper",
        "scale='paper' brings every update to the same RMS, and normalize=False leaves out the "
        "variance that would see its norm before; write another scale beside it",
    ),
    _Rule(
        ("coefficients", "safety_factor", "steps", "method"),
        lambda o: o["orthogonalizer"] is not None,
        "it is about Newton-Schulz, in whose place the orthogonalizer is",
    ),
    _Rule(
        ("orthogonalize_dtype",),
        lambda o: o["orthogonalizer"] is not None and _is_narrow(o["orthogonalize_dtype"]),
        "an orthogonalizer of your own is given float32 (or float64), and casts by itself",
    ),
    _Rule(
        ("update_floor_per",),
        lambda o: o["update_floor"] == 0,
        "update_floor=0 has no floor; write update_floor=0.35, for example",
    ),
)


def _is_narrow(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.itemsize < 4


def check_read(options: Options, defaults: Options) -> None:
    """Refuses options that are not the default and that another option leaves unread.

    Raises:
        ValueError: naming the field and why it has no effect.
    """
    for rule in _RULES:
        for field in rule.fields:
            if options[field] != defaults[field] and rule.is_unread(options):
                raise ValueError(
                    f"Config.{field}: {options[field]!r} has no effect: {rule.why}; or leave "
                    f"{field} out"
                )


def without_unread(preset: Options, overrides: Options, defaults: Options) -> dict[str, Any]:
    """The options of a preset with overrides, which may leave some of the preset's own unread."""
    options = {**preset, **overrides}
    whole = {**defaults, **options}
    unread = {field for rule in _RULES if rule.is_unread(whole) for field in rule.fields}
    return {k: x for k, x in options.items() if k in overrides or k not in unread}
