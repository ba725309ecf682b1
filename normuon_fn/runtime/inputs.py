"""What a captured graph was captured with: keys, addresses and layouts.

A replay starts only when the call passes tensors at the captured addresses, so nothing needs to
keep them alive. Keeping the gradients alive would cost their memory a second time and give new
gradients other addresses. So tensors are known by weak reference, except for the parameters and the
state of a captured step, which its result keeps alive in any case.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from ..distributed.placements import local
from ..types import Grads, Hyper, Tensors

# A choice. The number is odd, so that of state that has two tensors per parameter every replay asks
# some of both: where all state gets other memory, or all of a few layers, it is noticed at once.
TURNS = 13

_call: Any = getattr(operator, "call", lambda function: function())  # Python 3.10 has none
T = TypeVar("T")


def note_move() -> None:
    """To be called before this library gives other memory to tensors of a state.

    The next call of every `GraphedStep` then asks all tensors of its state for their addresses.
    """
    for inputs in list(_watched):
        inputs.before_move()


class Inputs:
    """The inputs of one call. Only `keep` keeps tensors alive, the parameters and the state.

    Apart from the launch, `same` is all that a replay costs the host: 41 us for 144 matrices (589
    tensors), 0.28 ms for 1000 (4013), of which half is `data_ptr`; 56 us and 0.39 ms if it asked
    every tensor (one core of a 2-core CPU machine, torch 2.13.0, Python 3.11, 2026-11-28).

    It asks every parameter and gradient for its address, which also notices ``p.data = x``. Of the
    state it asks one tensor in 13, others at each call, and all of them where one is another object
    or where this library has moved something.
    """

    def __init__(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        found_inf: Tensor | None,
        *,
        sharded: bool,  # whether there may be DTensors among them
    ) -> None:
        self.sharded, self.count = sharded, len(params)
        self.keys = [*params], [*grads], [*state]
        of_params, of_grads, of_state = (
            [f"{kind}[{name!r}]" for name in names]
            for kind, names in zip(("params", "grads", "state"), self.keys, strict=True)
        )
        of_hyper = [f"hyper.{name}" for name in Hyper._fields]
        lasting = self._local([*params.values(), *state.values()])
        passing = self._local([*grads.values(), *hyper, found_inf])
        self.lasting = _Known([*of_params, *of_state], lasting)
        self.passing = _Known([*of_grads, *of_hyper, "found_inf"], passing)
        self.kept: list[Tensor] = []  # the lasting tensors as they were last passed
        self.unmoved = False  # whether the library has moved nothing since then
        self.turn = 0
        self.lost: str | None = None  # what was `unnoticed` before the library moved something

    def keep(self, params: Tensors, state: Tensors) -> None:
        """Keeps the tensors of a capture alive, as its result does. They have to be the `same`.

        Comparing them by strong reference is faster, and the same tensors of a state need not all
        be asked for their addresses.
        """
        self.kept, self.unmoved = [*params.values(), *state.values()], True
        _watched.add(self)

    def same(
        self,
        params: Tensors,
        grads: Grads,
        state: Tensors,
        hyper: Hyper,
        found_inf: Tensor | None,
    ) -> bool:
        """Whether a graph of these inputs can be replayed for a call with these arguments."""
        return (
            ([*params], [*grads], [*state]) == self.keys
            and self.passing.same(self._local([*grads.values(), *hyper, found_inf]))
            and self._same_lasting(params, state)
        )

    def _same_lasting(self, params: Tensors, state: Tensors) -> bool:
        given = chain(params.values(), state.values())
        if self.unmoved and all(map(operator.is_, self.kept, given)):
            self.turn = (self.turn + 1) % TURNS
            asked, known = self._asked(self.kept), self._asked(self.lasting.addresses)
            return _addresses(self._local(asked)) == known
        now = self._local([*params.values(), *state.values()])
        if self.lost is not None or not self.lasting.same(now):
            return False
        if self.kept:
            self.keep(params, state)
        return True

    def _asked(self, lasting: list[T]) -> list[T]:
        """Of all parameters, and of the state whose turn it is."""
        return lasting[: self.count] + lasting[self.count + self.turn :: TURNS]

    def unnoticed(self) -> str | None:
        """Says which state got other memory, where replays may have gone on with the old memory.

        What the library has moved since the last replay is not meant.
        """
        if not self.unmoved:
            return self.lost
        now = _addresses(self._local(self.kept))
        known = [*zip(self.lasting.names, self.lasting.addresses, now, strict=True)]
        moved = [name for name, before, after in known[self.count :] if before != after]
        if not moved:
            return None
        others = f" and {len(moved) - 1} more of the state" if len(moved) > 1 else ""
        return (
            f"GraphedStep: {moved[0]}{others} moved to another address (`x.data = y` or set_), "
            f"which is not looked for at every call: up to {TURNS - 1} of the steps before may "
            f"have read and written the old memory, whatever is there now; {_advice(moved[0])}"
        )

    def before_move(self) -> None:
        """Afterwards nobody could tell what the caller had moved from what the library moves."""
        self.lost, self.unmoved = self.unnoticed(), False

    def difference(self, new: Inputs) -> str:
        """Names the first tensor that differs, and says what to do about it."""
        if new.keys != self.keys:
            return (
                "GraphedStep: the keys of params, grads or state came in another order; build the "
                "dicts in the same order at every step"
            )
        found = self.lasting.difference(new.lasting) or self.passing.difference(new.passing)
        return f"GraphedStep: {found or 'a tensor was replaced'}"

    def _local(self, values: list[Any]) -> list[Any]:
        return [x if x is None else local(x) for x in values] if self.sharded else values


_watched: weakref.WeakSet[Inputs] = weakref.WeakSet()  # whose tensors are kept


class _Known:
    """Some tensors by weak reference, and where they were."""

    def __init__(self, names: list[str], values: list[Tensor | None]) -> None:
        self.names = names
        self.addresses = _addresses(values)
        self.layouts = [_layout(x) for x in values]
        self.objects: list[Callable[[], Tensor | None]] = [
            _nothing if x is None else weakref.ref(x) for x in values
        ]

    def same(self, values: list[Tensor | None]) -> bool:
        if _addresses(values) != self.addresses:
            return False
        # The same object at the same address has the same layout. For another object there (a new
        # detach(), for instance) the layout is compared.
        if all(map(operator.is_, map(_call, self.objects), values)):  # no Python code per tensor
            return True
        compared = zip(self.objects, values, self.layouts, strict=True)
        return all(known() is x or _layout(x) == layout for known, x, layout in compared)

    def difference(self, new: _Known) -> str | None:
        for k, name in enumerate(self.names):
            old_address, new_address = self.addresses[k], new.addresses[k]
            if old_address == new_address and self.layouts[k] == new.layouts[k]:
                continue
            if old_address is None:
                what = "was None and is a tensor now"
            elif new_address is None:
                what = "was a tensor and is None now"
            elif old_address != new_address:
                what = "moved to another address"
            else:
                what = "has other strides"
            return f"{name} {what}; {_advice(name)}"
        return None


def _addresses(values: list[Any]) -> list[int | None]:
    if not values:
        return []
    address, last = Tensor.data_ptr, values[-1]  # `found_inf` is None in most calls
    try:  # no Python code per tensor
        return [*map(address, values[:-1]), None if last is None else address(last)]
    except TypeError:  # another one is None
        pass
    return [None if x is None else address(x) for x in values]


def _layout(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _nothing() -> None:
    return None


def _advice(name: str) -> str:
    if name.startswith("grads"):
        return "keep the gradients allocated: zero_grad(set_to_none=False)"
    if name.startswith(("hyper", "found_inf")):
        return f"keep the tensor and write the new value into it: {name}.fill_(x)"
    return "keep the tensor and write the new values into it: copy_"
