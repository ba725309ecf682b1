"""In which order buckets go through the step: what ranks wait for at its ends is to be cheap.

    advance 1, 2, 3          momentums; the parts of each set out
    orthogonalize 1, 2, 3    each waits for its parts; updates set out

Parts of the first bucket travel under the momentums of the others, updates of all but the last
under products of the others. Where the large is both first and last, as of two buckets one is, the
matrices of one shape become two buckets. Neither the order nor the cut changes a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..distributed.cost import Load
from ..types import Config, Row
from .buckets import Bucket, Group, SharedBucket
from .sharing import load_of

Key = tuple[Any, ...]  # of a bucket: its rows, columns and form, and more

# Of the passes over parameters, gradients and state: what comes before the parts set out (reads the
# gradient and the momentum, writes the momentum and the stack).
_ADVANCE = 0.5
_CANDIDATES = 8  # buckets that may come first or last: those whose updates are there first
_SECONDS = 10e-6  # a prediction of less is none
# A bucket more is a longer graph, and smaller stacks keep a GPU less busy: what a cut has to gain,
# as a part of the whole, and how many matrices of a half every rank owns at least.
_GAIN, _OWNED = 0.03, 2


class Times(NamedTuple):
    """Seconds that a bucket takes on every rank."""

    advance: float
    parts: float  # on the way to the owners
    products: float
    updates: float  # on the way back

    @staticmethod
    def of(load: Load) -> Times:
        replicas = len(load.ranks)
        back = load.exchange(replicas) + load.relay(replicas)
        advance = _ADVANCE * load.passes()
        return Times(advance, load.exchange(replicas), load.products(replicas), back)


def with_cut(
    stacks: Mapping[Key, Sequence[Group]], coefficients: Sequence[Row], config: Config
) -> list[tuple[Key, list[Group]]]:
    """The groups of every bucket. Those of one are two halves, if that is predicted to pay.

    Not with ``guard_scope="bucket"``, where a bucket is what skips a step together.
    """
    whole = [(key, list(groups)) for key, groups in stacks.items()]
    if config.guard_scope == "bucket" or config.orthogonalizer is not None:
        return whole
    owners = [groups[0].ownership for _, groups in whole]
    sets = _by_ranks([None if x is None else x.group for x in owners])
    cut = {_best_cut(whole, of_ranks, coefficients) for of_ranks in sets}
    found = []
    for k, (key, groups) in enumerate(whole):
        halves = halves_of(groups) if k in cut else None
        found += [(key, half) for half in halves or (groups,)]
    return found


def _by_ranks(groups: Sequence[str | None]) -> list[list[int]]:
    """The places of buckets of one process group, for each that has any.

    Whatever is decided about order is decided for each by itself: ranks of one group have its
    buckets in common, but may have different ones beside them.
    """
    found: dict[str, list[int]] = {}
    for k, group in enumerate(groups):
        if group is not None:
            found.setdefault(group, []).append(k)
    return [*found.values()]


def _best_cut(
    whole: Sequence[tuple[Key, list[Group]]], shared: Sequence[int], coefficients: Sequence[Row]
) -> int | None:
    """Of buckets of the same ranks, the one to cut in two; ``None`` if none is predicted to pay."""
    times = [_times(*whole[k], coefficients) for k in shared]
    best, at = (1 - _GAIN) * duration(times, best_order(times)) - _SECONDS, None
    for place, k in enumerate(shared):
        key, groups = whole[k]
        halves = halves_of(groups)
        if halves is None or min(map(_least_owned, halves)) < _OWNED:
            continue
        cut = [*times[:place], *(_times(key, half, coefficients) for half in halves)]
        cut += times[place + 1 :]
        seconds = duration(cut, best_order(cut))
        if seconds < best:
            best, at = seconds, k
    return at


def halves_of(groups: Sequence[Group]) -> tuple[list[Group], list[Group]] | None:
    """About half of the matrices each; ``None``: every group is one block."""
    first: list[Group] = []
    second: list[Group] = []
    for group in groups:  # by turns, because neighbours may have one owner
        late = group.blocks[1::2]
        of_late = tuple(dict.fromkeys(block.name for block in late))
        others = tuple(name for name in group.names if name not in of_late)
        early = replace(group, blocks=group.blocks[::2], names=others, owners=group.owners[::2])
        first.append(early if late else group)
        if late:
            owners = group.owners[1::2]
            second.append(replace(group, blocks=late, names=of_late, owners=owners))
    return (first, second) if second else None


def _least_owned(groups: Sequence[Group]) -> int:
    ownership = groups[0].ownership
    assert ownership is not None
    ranks = ownership.shards.size * ownership.replicas.size
    return sum(group.count for group in groups) // ranks


def _times(key: Key, groups: Sequence[Group], coefficients: Sequence[Row]) -> Times:
    ownership = groups[0].ownership
    assert ownership is not None
    rows, cols, form = key[:3]
    matrices = sum(group.count for group in groups)
    return Times.of(load_of(form, coefficients, rows, cols, matrices, ownership))


def in_order(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Those of one device first, whose arithmetic lies over the messages of the others."""
    alone = [bucket for bucket in buckets if not isinstance(bucket, SharedBucket)]
    shared = [bucket for bucket in buckets if isinstance(bucket, SharedBucket)]
    found = list(shared)
    for places in _by_ranks([bucket.exchange.group for bucket in shared]):
        own = [shared[k] for k in places]
        times = [_times((x.rows, x.cols, x.form), x.groups, x.coefficients.rows) for x in own]
        for place, k in zip(places, best_order(times), strict=True):
            found[place] = own[k]
    return (*alone, *found)


def best_order(times: Sequence[Times]) -> tuple[int, ...]:
    """The order after which the last update is there first; as they are, if none is better."""
    given = tuple(range(len(times)))
    ends = sorted(given, key=lambda k: times[k].updates)[:_CANDIDATES]
    orders = [
        (first, *(k for k in given if k not in (first, last)), last)
        for first in ends
        for last in ends
        if first != last
    ]
    best = min(orders, key=lambda order: duration(times, order), default=given)
    return best if duration(times, best) + _SECONDS < duration(times, given) else given


def duration(times: Sequence[Times], order: Sequence[int]) -> float:
    """Seconds until the last update is there. Messages travel one after the other."""
    now = sent = 0.0
    arrived: dict[int, float] = {}
    for k in order:
        now += times[k].advance
        arrived[k] = sent = max(sent, now) + times[k].parts
    for k in order:
        now = max(now, arrived[k]) + times[k].products
        sent = max(sent, now) + times[k].updates
    return sent
