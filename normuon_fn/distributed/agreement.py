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
_left: WeakKeyDictionary[ProcessGroup, list[str]] = WeakKeyDictionary()  # keys of the last time


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
    old: list[str]  # keys that nobody reads any more
    counter: str  # of all times
    key: str
    digest: str

    @staticmethod
    def posted(store: Any, ranks: ProcessGroup, said: list[str]) -> _Round:
        text, members = json.dumps(said), json.dumps(dist.get_process_group_ranks(ranks))
        counter = f"normuon_fn/{ranks.group_name}/{_hashed(members)}/arrived"
        # The store counts, and not this process: a store may have served a group of the same name
        # and ranks that was destroyed since.
        number = (store.add(counter, 1) - 1) // ranks.size()
        key = f"{counter}/{number}"
        digest = f"{key}/{_hashed(text)}"
        store.set(f"{key}/{ranks.rank()}", text)
        store.add(digest, 1)
        if store.add(f"{key}/posted", 1) == ranks.size():
            store.set(f"{key}/all", "")
        return _Round(store, ranks, said, _left.get(ranks, []), counter, key, digest)

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
        self.store.add(f"{self.key}/posted", -1)
        self.store.add(self.counter, -1)
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
        """All have read what the last time left."""
        self._delete(self.old)
        left = [f"{self.key}/{self.ranks.rank()}"]
        if self.ranks.rank() == 0:
            left += [f"{self.key}/all", f"{self.key}/posted", self.digest]
        _left[self.ranks] = left

    def _delete(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not every store can
            for key in keys:
                self.store.delete_key(key)


def _hashed(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
