"""Which saved name is which parameter's: equal, or equal but for what wrappers put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
SHOWN = 8  # of a long list in a message


def unwrapped(name: str) -> str:
    """A parameter's name without what DDP, FSDP, checkpointing and compiling put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def matched(own: Iterable[str], saved: Sequence[str], is_key: bool) -> dict[str, str]:
    """For every own name the saved one of the same parameter.

    Raises:
        ValueError: a name on one side is none of the other's, listing those of both sides.
    """
    own = list(own)
    rules: list[Callable[[str], str]] = [str, unwrapped]
    prefix = _prefix([*map(unwrapped, own)], [*map(unwrapped, saved)])
    if prefix:  # of a module that has the model as a part, on one of the two sides
        rules.append(lambda name: unwrapped(name).removeprefix(prefix))
    for rule in rules:
        mine, theirs = {rule(name): name for name in own}, {rule(name): name for name in saved}
        if len(mine) == len(own) and len(theirs) == len(saved) and mine.keys() == theirs.keys():
            return {name: theirs[short] for short, name in mine.items()}
    only_own = sorted(name for name in own if name not in saved)
    only_saved = sorted(name for name in saved if name not in own)
    where = "'params' of its group and as key of state_dict['state']"
    where = where if is_key else "'param_names' of its group"
    in_order = (
        ""
        if is_key
        else "; or, if they are the same parameters in the same order, load without names: "
        "for group in state_dict['param_groups']: del group['param_names']"
    )
    raise ValueError(
        f"state_dict: its parameters have other names. Only in this optimizer: {some(only_own)}. "
        f"Only in the state_dict: {some(only_saved)}. For a parameter that was renamed, write "
        f"its new name into {where}{in_order}"
    )


def by_any_name(keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """For keys of torch's functions the name that is the same parameter's, where there is one."""
    prefix = _prefix([*map(unwrapped, keys)], [*map(unwrapped, names)])
    short = {unwrapped(name).removeprefix(prefix): name for name in names}
    found = {key: short.get(unwrapped(key).removeprefix(prefix)) for key in keys}
    return {key: name for key, name in found.items() if name is not None}


def _prefix(own: list[str], saved: list[str]) -> str:
    """What stands before all names of one side, if the names are the other side's after it."""
    longer, shorter = sorted((own, saved), key=lambda names: sum(map(len, names)), reverse=True)
    size, rest = divmod(sum(map(len, longer)) - sum(map(len, shorter)), len(longer) or 1)
    prefix = longer[0][:size] if longer else ""
    fits = not rest and prefix.endswith(".") and set(longer) == {prefix + x for x in shorter}
    return prefix if fits else ""


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{list(names[:SHOWN])}{more}"
