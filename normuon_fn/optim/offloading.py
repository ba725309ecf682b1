"""`NorMuon.offload_` and `NorMuon.reload_`: its state in host memory between phases of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..compat.graphs import outside_graphs
from ..distributed.placements import local
from ..planning.streaming import wait_for_copies_sync as wait_sync
from ..runtime.offloading import HOST, move
from ..types import Config
from .planned import Planner


class Offloading:
    """A part of `NorMuon`."""

    _offloaded = False  # also of optimizers that were pickled before there was such a state

    if TYPE_CHECKING:
        config: Config  # as the optimizer has it
        state: Any
        _planner: Planner | None

        def _settled(self) -> Planner: ...

    @outside_graphs()
    def offload_(self) -> None:
        """Moves the state into pinned host memory, and gives its memory on the device back.

        It waits for the device. Nothing is compiled again afterwards. With ``graphed`` the captured
        graph is freed with its memory: the first step after `reload_` is a plain one, the second
        captures again. A step before `reload_` is refused. ``state_dict``, ``load_state_dict``,
        copies and pickles work in the meantime; a copy is offloaded as well. Parameters and
        gradients stay: move the model, and ``zero_grad(set_to_none=True)``.

        A second call does nothing. On a CPU no call does anything, and steps go on.

        >>> optimizer.offload_()
        >>> generate()
        >>> optimizer.reload_()

        Raises:
            RuntimeError: there is not enough host memory. Nothing has moved then.
        """
        if self._planner is not None:
            self._planner.release()
        pairs = [(x, HOST) for p in self._params() for x in self._tensors(p)]
        if move(pairs):
            self._offloaded = True
            if self._planner is not None:
                self._planner.offloaded = True

    @outside_graphs()
    def reload_(self) -> None:
        """Moves the state back to the device of the parameters, on the current stream.

        A second call does nothing, and on a CPU no call does.

        Raises:
            torch.OutOfMemoryError: there is no room on the device. Nothing has moved then.
        """
        if not self._offloaded:
            return
        stays = in_host_memory(self._settled()) if self.config.state_device == "cpu" else set()
        own = [(x, local(p).device) for p in self._params() for x in self._tensors(p)]
        move([(x, device) for x, device in own if id(x) not in stays])
        self._offloaded = False
        if self._planner is not None:
            self._planner.offloaded = False

    def _loaded(self) -> Planner:
        """The planner for a step.

        Raises:
            RuntimeError: the state is offloaded.
        """
        if self._offloaded:
            raise RuntimeError(
                "NorMuon.step: its state is in host memory since offload_(); write "
                "optimizer.reload_() before the step"
            )
        return self._settled()

    def _params(self) -> list[Tensor]:
        return [p for p in self.state if isinstance(p, Tensor)]

    def _tensors(self, p: Tensor) -> list[Tensor]:
        return [x for x in self.state[p].values() if isinstance(x, Tensor)]


def in_host_memory(planner: Planner) -> set[int]:
    """By id, the tensors that steps expect in host memory: ``Config(state_device="cpu")``."""
    each = [(step.state, step.plan.state) for step in planner.steps.values()]
    return {id(x) for state, specs in each for key, x in state.items() if specs[key].host}


def wait_for_copies_sync(planner: Planner | None) -> None:
    """Waits for copies to host memory and from it, before the host itself reads or writes it."""
    for step in [] if planner is None else planner.steps.values():
        wait_sync(step.plan)
