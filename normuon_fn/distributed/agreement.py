"""An agreement of hosts: that all ranks of a group say the same.

It goes through the store by which the ranks found each other, and not through the group. So it is
apart from the collectives of the step, in which the other ranks may be already when one of them
comes here, and it can end.

    post what this rank says  -->  wait until all have posted, or too long  -->  compare
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..compat import group_named, host_store

# Seconds. At a first step every rank comes, however long it compiles or loads before (as long as
# NCCL waits by default). Later a rank comes for a change, which the others have had, too, or never
# will: ranks begin a step together, because they have reduced the gradients together.
PATIENCE_AT_FIRST = 600.0
PATIENCE = 30.0

Explain = Callable[[Mapping[int, Sequence[str]]], str]  # by rank, what each said
# By group: how many times its ranks have agreed, and the keys that the last time left.
_rounds: WeakKeyDictionary[ProcessGroup, tuple[int, list[str]]] = WeakKeyDictionary()


def agree(said: Mapping[str, Sequence[str]], *, first: bool, explain: Explain) -> None:
    """Checks that every rank says the same. ``said``: by process group, what this rank says there.

    Under the fake backend, which sends nothing, they do.

    Raises:
        ValueError: on all ranks of a group, if one says something else; on this rank, if another
            one does not come.
    """
    if not said:
        return
    found = _compared(said, first, explain)
    texts = {explain(found)} if found else set()
    if len(said) > 1:  # ranks of one group tell those of their other groups
        told = _compared({group: sorted(texts) for group in said}, first, lambda _: "")
        texts |= {text for lines in told.values() for text in lines}
    if texts:
        raise ValueError(
            f"the ranks differ in what they give to a step: {'; '.join(sorted(texts))}"
        )


def _compared(
    said: Mapping[str, Sequence[str]], first: bool, explain: Explain
) -> dict[int, list[str]]:
    """By rank, what each rank said, of the groups whose ranks said different things."""
    store = host_store()
    groups = {group: group_named(group) for group in said}
    rounds = [
        _Round.posted(store, ranks, list(said[group]))
        for group, ranks in groups.items()
        if store is not None and dist.get_backend(ranks) != "fake"
    ]
    patience = PATIENCE_AT_FIRST if first else PATIENCE
    end = time.monotonic() + patience
    open_ones = [each for each in rounds if not each.complete(end)]
    absent = sorted({rank for each in open_ones for rank in each.absent()})
    found: dict[int, list[str]] = {}
    for each in rounds:
        if each in open_ones:
            each.withdraw()
        else:
            found |= each.differing()
            each.finish()
    if open_ones:
        mine = dist.get_rank()
        raise ValueError(
            f"rank {mine} alone came to a step with a change: {explain({mine: open_ones[0].said})}"
            f". Ranks {absent} did not come with it within {patience:g} s; they wait for this rank "
            "in their step, until it ends or makes the step as it was before"
        )
    return found


@dataclass
class _Round:
    """One time that the ranks of a group compare what they say."""

    store: Any
    ranks: ProcessGroup
    said: list[str]
    number: int
    old: list[str]  # keys that nobody reads any more
    key: str
    digest: str

    @staticmethod
    def posted(store: Any, ranks: ProcessGroup, said: list[str]) -> _Round:
        number, old = _rounds.get(ranks, (0, []))
        text = json.dumps(said)
        key = f"normuon_fn/{ranks.group_name}/{number}"
        digest = f"{key}/{hashlib.sha1(text.encode()).hexdigest()}"
        store.set(f"{key}/{ranks.rank()}", text)
        store.add(digest, 1)
        if store.add(f"{key}/arrived", 1) == ranks.size():
            store.set(f"{key}/all", "")
        return _Round(store, ranks, said, number, old, key, digest)

    def complete(self, end: float) -> bool:
        """Whether all ranks have posted by then."""
        pause = 0.001  # a blocking wait would keep the other users of the store waiting too
        while not self.store.check([f"{self.key}/all"]):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def absent(self) -> list[int]:
        return [
            dist.get_global_rank(self.ranks, k)
            for k in range(self.ranks.size())
            if not self.store.check([f"{self.key}/{k}"])
        ]

    def withdraw(self) -> None:
        """As if this rank had not come: a later agreement of all ranks can succeed."""
        self.store.add(self.digest, -1)
        self.store.add(f"{self.key}/arrived", -1)
        self._delete([f"{self.key}/{self.ranks.rank()}"])

    def differing(self) -> dict[int, list[str]]:
        """By rank, what each said; nothing if all said the same."""
        if self.store.add(self.digest, 0) == self.ranks.size():
            return {}
        return {
            dist.get_global_rank(self.ranks, k): json.loads(self.store.get(f"{self.key}/{k}"))
            for k in range(self.ranks.size())
        }

    def finish(self) -> None:
        """The next time gets a new number. All have read what the last time left."""
        self._delete(self.old)
        left = [f"{self.key}/{self.ranks.rank()}"]
        if self.ranks.rank() == 0:
            left += [f"{self.key}/all", f"{self.key}/arrived", self.digest]
        _rounds[self.ranks] = self.number + 1, left

    def _delete(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not every store can
            for key in keys:
                self.store.delete_key(key)
