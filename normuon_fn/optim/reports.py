"""What an optimizer says about its steps: the skipped ones, and those that find no gradient."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..diagnostics import monitor
from ..diagnostics.skips import check_skips
from ..distributed.dtensors import is_dtensor
from ..planning.plan import Plan
from ..routing.doubts import warn_at_caller
from ..routing.route_table import RouteTable
from ..types import Config, StepResult
from .group_keys import KeyWatch
from .groups import AddedGroup
from .new_parameters import ModelWatch
from .trainer_arguments import say_if_unread

OnSkip = monitor.OnSkip | Literal["auto"]
_SHOWN = 8


class Reports:
    """One optimizer's, with what it remembers to say things once."""

    _asked_trainer = False

    def __init__(self, config: Config, on_skip: OnSkip, max_consecutive: int | None) -> None:
        if on_skip == "auto":  # without a guard only a GradScaler skips, as a part of its search
            on_skip = "warn" if config.guard != "off" or max_consecutive is not None else None
        self.skips = None
        if on_skip is not None or max_consecutive is not None:
            self.skips = monitor.SkipReports(on_skip, max_consecutive)
            check_skips(config.guard, on_skip, max_consecutive)
        self._told_missing = self._told_gone = False
        self._keys, self._watch = KeyWatch(), ModelWatch()
        # by the optimizer's names: the model that the parameter was one of, and its name there
        self._of_models: dict[str, tuple[weakref.ref[nn.Module], str]] = {}

    # --- skipped steps

    def before_step(self, groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
        """Says what arrived since the last step, and which keys of the groups no step reads.

        An error comes before anything is written.
        """
        self._keys.look(groups, defaults)
        if not self._asked_trainer:
            self._asked_trainer = True
            say_if_unread(groups)
        if self.skips is not None:
            self.skips.look()

    def look_at_models(self, groups: Sequence[dict[str, Any]]) -> None:
        """Says which parameters the model has got; those that keep a step from all are refused
        before that, by `check_gradients`.
        """
        self._watch.look(groups)

    def after_step(self, result: StepResult, plan: Plan) -> None:
        if self.skips is not None:
            self.skips.send(result, plan)
            self.skips.look()

    # --- gradients that never come

    def remember_models(self, added: Sequence[AddedGroup], routes: object) -> None:
        """Remembers which parameters are a model's, as far as routes know the model."""
        tables = [routes, *(group.routes for group in added)]
        models = {id(t.model): t.model for t in tables if isinstance(t, RouteTable)}
        self._watch.remember(model for model in models.values() if model is not None)
        for model in models.values():
            paths = {} if model is None else {id(p): path for path, p in _named(model).items()}
            for name, p in ((name, p) for group in added for name, p in group.params):
                if id(p) in paths and name not in self._of_models and model is not None:
                    self._of_models[name] = weakref.ref(model), paths[id(p)]

    def check_gradients(self, params: Mapping[str, Tensor]) -> None:
        """Whether the parameters without a gradient are still those of the model.

        For a step without any gradient, and for the first one with a new set of them.

        Raises:
            ValueError: the model has other tensors by now, which no step would reach.
        """
        lacking = {name: p for name, p in params.items() if p.requires_grad and p.grad is None}
        replaced, gone = self._former(lacking, params)
        if replaced:
            raise ValueError(
                f"{_first(replaced)}: the model has another tensor by this name than when the "
                "optimizer was made, and no step would reach it. Make the optimizer after whatever "
                "replaces parameters (fully_shard, FSDP, to_empty, load_state_dict(assign=True)): "
                "fully_shard(model); optimizer = nm.NorMuon(model, ...)"
            )
        if gone and not self._told_gone:
            self._told_gone = True
            warn_at_caller(
                f"{_first(gone)}: without a gradient, and no longer a parameter of the model that "
                "the optimizer was made for (tied or removed since?), so no step moves it"
            )
        if all(p.grad is None for p in params.values()):
            self._warn_of_no_gradient()

    def _former(
        self, lacking: Mapping[str, Tensor], params: Mapping[str, Tensor]
    ) -> tuple[list[str], list[str]]:
        """Of the parameters that lack a gradient: those that the model has others for, and those
        that it has no longer."""
        replaced, gone = [], []
        own = {id(p) for p in params.values()}
        now: dict[int, dict[str, Tensor]] = {}
        for name, p in lacking.items():
            ref, path = self._of_models.get(name, (None, ""))
            model = None if ref is None else ref()
            if model is None:
                continue
            named = now.setdefault(id(model), {})
            if not named:
                named |= _named(model)
            new = named.get(path)
            if new is p or (is_dtensor(p) and not is_dtensor(new)):
                continue  # FSDP puts whole parameters into the model between forward and backward
            if new is not None and new.requires_grad and id(new) not in own:
                replaced.append(name)
            elif all(p is not each for each in named.values()):
                gone.append(name)
        return replaced, gone

    def _warn_of_no_gradient(self) -> None:
        if not self._told_missing:
            self._told_missing = True
            warn_at_caller(
                "NorMuon.step: no parameter has a gradient. Was backward() "
                "not called, or zero_grad() called before step()? Was the model wrapped "
                "or copied after the optimizer was made (fully_shard, FSDP, deepcopy)? Then make "
                "the optimizer after that. This is said once"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_models": {}}  # a copy's parameters are no model's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_watch": ModelWatch(), **state})


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(repr, names[:_SHOWN]))}{more}"
