"""`NorMuon.offload_` and `NorMuon.reload_`: its state in host memory between phases of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..compat.graphs import outside_graphs
from ..distributed.placements import local
from ..runtime.offloading import HOST, move
from .planned import Planner


class Offloading:
    """A part of `NorMuon`."""

    _offloaded = False  # also of optimizers that were pickled before there was such a state

    if TYPE_CHECKING:
        state: Any  # as the optimizer has it
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
        move([(x, local(p).device) for p in self._params() for x in self._tensors(p)])
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
