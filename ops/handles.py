"""Lists of tensors that stay outside of a graph, which knows each of them by a handle.

    outside: lists in a table  |  in the graph: operator(order, "0:0:72;72*float32[64,64]", ...)

A graph pays for every tensor that it takes: guards, wrappers and passes over all arguments, some of
them with the square of their number. An operator over lists needs none of that. It finds its lists
in a table when it runs, and the graph has only the handle: which entries of the table, and what
their tensors look like. So two graphs are equal only where their lists look alike.

The operators must run in the order in which they were traced, because the graph does not see that
one reads what another writes. So each of them claims to write one tensor, `Graph.order`: one for
every set of lists that share no memory with others.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from itertools import count, groupby
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor


class Like(NamedTuple):
    """What is known of a tensor of such a list while the graph is made."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def new_empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


class Place(NamedTuple):
    """Neighbours in a list of the table, or some of the matrices of one stack [b, rows, cols]."""

    entry: int
    start: int
    stop: int
    low: int = 0  # matrices of the stack
    high: int = 0  # 0: all of every tensor

    @property
    def text(self) -> str:
        return ":".join(map(str, self if self.high else self[:3]))


class Graph:
    """Lists of one graph while it is traced, whose operators must keep their order.

    ``entries`` counts the entries of the table, also those of the graph's other lists.
    """

    def __init__(self, order: Tensor, entries: Iterator[int] | None = None) -> None:
        self.order, self.entries = order, count() if entries is None else entries

    def add(self, likes: Sequence[Like]) -> Handle:
        """A handle for a list that will be in the next entry of the table."""
        return Handle(self, (Place(next(self.entries), 0, len(likes)),), tuple(likes))


class Handle(Sequence[Like]):
    """A list of the table, a part of one, or several of them as one list."""

    def __init__(self, graph: Graph, places: tuple[Place, ...], likes: tuple[Like, ...]) -> None:
        self.graph, self.places, self.likes = graph, places, likes

    def __len__(self) -> int:
        return len(self.likes)

    @overload
    def __getitem__(self, k: int) -> Like: ...
    @overload
    def __getitem__(self, k: slice) -> Handle: ...
    def __getitem__(self, k: int | slice) -> Like | Handle:
        if not isinstance(k, slice):
            return self.likes[k]
        start, stop, _ = k.indices(len(self))
        places, at = [], 0
        for place in self.places:
            length = place.stop - place.start
            low, high = max(start - at, 0), min(stop - at, length)
            if low < high:
                places.append(place._replace(start=place.start + low, stop=place.start + high))
            at += length
        return Handle(self.graph, tuple(places), self.likes[k])

    def cut(self, k: int, low: int, high: int) -> Handle:
        """A list of one: of the stack at ``k`` the matrices from ``low`` to ``high``."""
        (place,), like = self[k : k + 1].places, self.likes[k]
        shape = torch.Size((high - low, *like.shape[1:]))
        cut = place._replace(low=place.low + low, high=place.low + high)
        return Handle(self.graph, (cut,), (like._replace(shape=shape),))

    @property
    def text(self) -> str:
        """The handle as the graph has it."""
        places = ",".join(place.text for place in self.places)
        kinds = [
            f"{len([*group])}*{str(dtype).removeprefix('torch.')}{[*shape]}".replace(" ", "")
            for (shape, dtype, _), group in groupby(self.likes)
        ]
        return f"{places};{'|'.join(kinds)}"


def is_handle(tensors: object) -> bool:
    """Whether what stands for a list is a handle."""
    return isinstance(tensors, Handle)


def joined(handles: Sequence[Handle]) -> Handle:
    """Several lists as one. There is at least one."""
    places: list[Place] = []
    for place in (place for handle in handles for place in handle.places):
        last = places[-1] if places else None
        if last and (last.entry, last.stop) == place[:2] and not (last.high or place.high):
            places[-1] = last._replace(stop=place.stop)
        else:
            places.append(place)
    likes = tuple(like for handle in handles for like in handle.likes)
    return Handle(handles[0].graph, tuple(places), likes)


@lru_cache(maxsize=4096)
def _places(text: str) -> tuple[Place, ...]:
    found = text.partition(";")[0]
    return tuple(Place(*map(int, place.split(":"))) for place in found.split(",") if place)


def likes_of(text: str, device: torch.device) -> list[Like]:
    """What the tensors of a handle look like, from its text."""
    found: list[Like] = []
    for kind in filter(None, text.partition(";")[2].split("|")):
        number, dtype, sizes = re.fullmatch(r"(\d+)\*(\w+)\[([\d,]*)\]", kind).groups()  # type: ignore[union-attr]
        shape = torch.Size([int(size) for size in sizes.split(",") if size])
        found += [Like(shape, getattr(torch, dtype), device)] * int(number)
    return found


class Table:
    """The lists of one run of a graph: those that it reads, and those that it has made.

    ``read(entry)`` is called once for every entry that is read. ``transfers``: what copies lists of
    the host to the device and back, see staging.py.
    """

    def __init__(self, read: Callable[[int], list[Tensor]], transfers: Any = None) -> None:
        self.lists: dict[int, list[Tensor]] = {}
        self._read, self.transfers = read, transfers
        self._found: dict[str, list[Tensor]] = {}
        self.facts: dict[Hashable, tuple[object, Any]] = {}  # of lists, which it keeps

    def find(self, text: str) -> list[Tensor]:
        """The tensors of a handle. The same text gives the same list."""
        found = self._found.get(text)
        if found is None:
            places = _places(text)
            parts = [self._list(place.entry) for place in places]
            if len(parts) == 1 and places[0][1:] == (0, len(parts[0]), 0, 0):
                found = parts[0]
            else:
                found = []
                for part, place in zip(parts, places, strict=True):
                    own = part[place.start : place.stop]
                    found += [x[place.low : place.high] for x in own] if place.high else own
            self._found[text] = found
        return found

    def _list(self, entry: int) -> list[Tensor]:
        if entry not in self.lists:
            self.lists[entry] = self._read(entry)
        return self.lists[entry]


_thread = threading.local()


@contextmanager
def _meanwhile(name: str, value: Any) -> Iterator[None]:
    """This thread knows ``value`` by that name until the block ends."""
    before = getattr(_thread, name, None)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, before)


def lists_outside(table: Table) -> AbstractContextManager[None]:
    """While a graph runs: its operators find their lists in ``table``."""
    return _meanwhile("table", table)


def current_table() -> Table:
    """The table of the graph that this thread runs."""
    found = getattr(_thread, "table", None)
    if found is None:
        raise RuntimeError("normuon_fn: a graph of lists outside was run without its lists")
    return found


def inputs(of: dict[int, Tensor]) -> AbstractContextManager[None]:
    """While a graph is traced: what it takes in the place of tensors that its plan keeps, by id."""
    return _meanwhile("inputs", of)


def input_for(kept: Tensor) -> Tensor:
    """The input of the graph that is being traced for a tensor that its plan keeps, or itself."""
    if torch.compiler.is_dynamo_compiling():
        return kept
    of = getattr(_thread, "inputs", None)
    return kept if of is None else of.get(id(kept), kept)


def remembered(tensors: Sequence[Tensor], fact: Callable[[Sequence[Tensor]], Any]) -> Any:
    """``fact(tensors)``, which is asked once per list while a graph runs."""
    table = None if torch.compiler.is_dynamo_compiling() else getattr(_thread, "table", None)
    if table is None:
        return fact(tensors)
    key = id(tensors), fact
    found = table.facts.get(key)
    if found is None:
        found = table.facts[key] = tensors, fact(tensors)
    return found[1]


def texts(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of an operator by handle: handles by their texts."""
    return [x.text if isinstance(x, Handle) else x for x in arguments]
