"""Which entry of `Hyper`'s tensors every parameter takes, from names and globs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..routing.keys import Keys, is_glob


def checked_hyper_of(
    params: Mapping[str, Tensor], hyper_of: Mapping[str, int] | None
) -> tuple[Mapping[str, int], int]:
    """The entry of every parameter, and how many entries there are (0: `Hyper` has scalars).

    Raises:
        TypeError: no mapping, or a key that is no string.
        ValueError: an entry that is no int >= 0, a parameter without one, or, where there are globs
            beside names, a key that matches nothing.
    """
    if hyper_of is None:
        return dict.fromkeys(params, 0), 0
    if not isinstance(hyper_of, Mapping):
        raise TypeError(
            f"hyper_of: expected a dict of name or glob -> int, got {type(hyper_of).__name__}"
        )
    for key, index in hyper_of.items():
        if not isinstance(key, str):
            raise TypeError(f"hyper_of: expected names or globs as keys, got {key!r}")
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"hyper_of[{key!r}]: expected an int >= 0, got {index!r}")
    keys, found = Keys(hyper_of), dict[str, int]()
    matched: Counter[str] = Counter()
    before: dict[str, str] = {}  # by key: the one that a parameter which it matches goes by
    for name, tensor in params.items():
        matching = [str(key) for key in keys.matching([(name, tensor)])]
        matched.update(matching)
        if matching:
            chosen = name if name in hyper_of else matching[0]
            found[name] = hyper_of[chosen]
            before |= {chosen: chosen} | {k: chosen for k in matching if before.get(k) != k}
    missing = [name for name in params if name not in found]
    if missing:
        raise ValueError(
            f"hyper_of[{missing[0]!r}]: expected an int >= 0 for every parameter; no name or glob "
            f"matches {_listed(missing)}; write an entry for each, or '*': 0 for all others"
        )
    unmatched = keys.unmatched()
    if unmatched and any(is_glob(key) for key in hyper_of.keys() - params.keys()):
        # A table of names alone may have more than the plan: then nothing matches by mistake.
        raise ValueError(
            f"hyper_of: {unmatched!r} match no parameter; the parameters are {_listed([*params])}"
        )
    for key, first in before.items():
        if is_glob(first) and matched[key] < matched[first] and hyper_of[key] != hyper_of[first]:
            raise ValueError(
                f"hyper_of[{key!r}]: gives no parameter its entry, because {first!r} stands before "
                f"it and matches them too; write {key!r} before {first!r}"
            )
    return found, 1 + max(hyper_of.values())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
