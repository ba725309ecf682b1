"""Routers, and gates that may be routers, where names and shapes alone are known."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from . import adapters, words
from .gates import OF_ATTENTION, has_few_outputs, is_a_list, judge, of_many, stem_of
from .places import LEAVES, Named
from .routes import Decision
from .uses import is_window, unwrapped

_MIXERS = re.compile(r"(^|_)(att(n|ention)|mixer|mamba|ssm|rnn|lstm|gru|indexer)", re.I)
_DEPTH = 5  # parts of a path below the module that has a router, in which its experts are
Path = tuple[str, ...]


class _Inside(NamedTuple):
    """A parameter inside a module."""

    path: Path  # from the module on, without the leaf of a layer
    shape: tuple[int, ...]
    is_raw: bool  # of no layer

    @property
    def is_adapters(self) -> bool:
        return any(map(adapters.is_adapters, self.path))

    @property
    def is_of_others(self) -> bool:
        """Whether it is no layer of the module itself: one of its experts, or of an adapter."""
        return self.is_adapters or words.of_experts(self.path[0])


class NamedGates:
    """All parameters, by the paths of the modules around them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def decide(self, m: Named) -> Decision | None:
        """The rule of a router, or of what may be one; ``None`` if it is none."""
        has_few = has_few_outputs(m.shape, either_way=not m.is_weight)
        if not (has_few or (m.is_weight and any(map(words.router, m.layer[-2:])))):
            return None
        path = self._place(m)
        if path is None:
            return None
        own, holder = path[-1], path[:-1]
        named, inside = words.router(own), self._index[holder]
        children = {each.path[0] for each in inside}
        speaks = any(map(words.of_experts, (*holder[-1:], *children)))
        of_heads = any(map(_MIXERS.search, holder[-1:])) or any(map(OF_ATTENTION.match, children))
        if of_heads and not (speaks and has_few):
            return None
        if not has_few:
            return _of_many(own, m.shape, inside, speaks=speaks) if named else None
        if named is None and not (m.is_weight and m.in_block) and not words.of_experts(own):
            return None
        few, many = sorted(m.shape)
        known = few in _members(inside)
        if not (named or known or speaks):
            return None
        sure = named == "strong" or (named and known and speaks)
        if not sure and _has_counterpart(own, inside, few):
            return None
        return judge(own, few, many, known=known, speaks=speaks)

    def _place(self, m: Named) -> Path | None:
        """The path of the router that it is the last layer of, or its own."""
        path = m.layer
        while len(path) > 1 and words.router(path[-2]):
            inside = self._index[path[:-1]]
            matrices = [
                each
                for each in inside
                if len(each.shape) == 2 and (each.path[0] == path[-1] or not each.is_of_others)
            ]
            fed = any(m.shape[0] in each.shape for each in matrices if each.is_raw)
            layers = [
                each
                for each in matrices
                if not each.is_raw and (each.path[0] == path[-1] or each.shape != m.shape)
            ]
            if m.is_weight and (fed or layers[-1].path[0] != path[-1]):
                return None
            path = path[:-1]
        return None if path[-1].isdigit() else path

    @cached_property
    def _index(self) -> dict[Path, list[_Inside]]:
        """What every module has, to a depth."""
        found: dict[Path, list[_Inside]] = defaultdict(list)
        for name, shape in self._shapes.items():
            parts = tuple(part for part in unwrapped(name) if part not in LEAVES)
            is_raw = name.rpartition(".")[2] not in (*LEAVES, "bias")
            for k in range(max(0, len(parts) - _DEPTH), len(parts)):
                found[parts[:k]].append(_Inside(parts[k:], shape, is_raw))
        return found


def _of_many(
    own: str, shape: tuple[int, int], inside: list[_Inside], *, speaks: bool
) -> Decision | None:
    """A router with as many outputs as there are experts, which are not few."""
    if shape[0] not in _members(inside):
        return None
    beside = [each for each in inside if len(each.path) == 1 and each.path[0] != own]
    hidden = any(shape[0] in each.shape for each in beside if not words.router(each.path[0]))
    return None if hidden and not speaks else of_many(shape)


def _members(inside: list[_Inside]) -> set[int]:
    """How many members the lists and the stacks in a module have."""
    lists: dict[Path, set[str]] = defaultdict(set)
    found = set()
    for path, shape, _ in inside:
        at = next((k for k, part in enumerate(path) if part[-1].isdigit()), None)
        if at is not None:
            key = (*path[:at], stem_of(path[at]))
            lists[key].add(path[at])
        is_stack = len(shape) == 3 and not is_window(shape)
        if is_stack and not any(part.isdigit() for part in path):
            found.add(shape[0])
    return found | {len(each) for stem, each in lists.items() if is_a_list(stem[-1], len(each))}


def _has_counterpart(own: str, inside: list[_Inside], few: int) -> bool:
    """As `gates.decide` asks: whether a matrix beside it has hidden units as many as it has."""
    return any(
        len(each.shape) in (2, 3) and few in each.shape[-2:] and not each.is_adapters
        for each in inside
        if each.path[0] != own
        and not (words.router(each.path[0]) or words.is_biases(each.path[-1]))
    )
