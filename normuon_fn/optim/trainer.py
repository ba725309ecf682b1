"""`for_trainer`: NorMuon for frameworks that make the optimizer themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.placements import rank_and_world_size
from ..planning.before_ranks import OF_TRAINER, asks_for_ranks, is_before_ranks
from ..routing.doubts import warn_at_caller
from ..routing.modules import routes_for
from ..routing.resolve import Routes
from ..routing.route_table import RouteTable
from .groups import check_arguments, with_guard
from .normuon import NorMuon


def for_trainer(model: nn.Module | None = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """What ``transformers.Trainer(optimizer_cls_and_kwargs=...)`` takes.

        trainer = transformers.Trainer(
            model, arguments, train_dataset=data,
            optimizer_cls_and_kwargs=nm.for_trainer(model, lr=0.002, weight_decay=0.1),
        )

    The Trainer then makes ``NorMuon(model, ...)`` when it needs the optimizer, with the routes of
    the modules of the model that it trains, also one that ``model_init`` makes. Its own two groups
    and the ``learning_rate`` and ``weight_decay`` of its arguments are not used: write ``lr`` and
    ``weight_decay`` here. As in the Trainer's groups, biases, norms and other vectors have no
    weight decay, unless ``routes`` is a table of `routes_for`.

    Args:
        model: the module that the Trainer is given, which is read at once, so that what is wrong is
            raised here; may be left out.
        kwargs: as for `NorMuon`; ``routes`` go before those of the model.

    Raises:
        TypeError, ValueError: as `routes_for`; or an argument that `NorMuon` does not have. When
            the Trainer makes the optimizer: ``mesh`` was ``None`` because the ranks came later.
    """
    check_arguments(NorMuon.__init__, kwargs)
    if model is not None and not isinstance(kwargs.get("routes"), RouteTable):
        routes_for(model, kwargs.get("routes"))

    made = _of_model
    ranks = [kwargs.get("mesh"), kwargs.get("guard_mesh")]
    if {"mesh", "guard_mesh"} & kwargs.keys() and is_before_ranks(*ranks):
        made = _before_ranks

    def make(groups: object = None, **given: Any) -> Any:
        if groups is None:  # a Trainer that hands its model to factories
            return made
        if model is None:
            raise TypeError(
                "for_trainer: this version of transformers does not hand its model to what makes "
                "the optimizer; write nm.for_trainer(model, ...)"
            )
        return made(model, **given)

    return make, kwargs


def _of_model(model: nn.Module, *, routes: Routes | None = None, **kwargs: Any) -> NorMuon:
    if not isinstance(routes, RouteTable):
        routes = routes_for(model, routes, decay_vectors=False)
    return NorMuon(model, routes=routes, **kwargs)


def _before_ranks(model: nn.Module, **kwargs: Any) -> NorMuon:
    """The optimizer, whose ``mesh`` was written before there was a process group.

    Raises:
        ValueError: there are other ranks by now, and what they decide together depends on it.
    """
    config, guard = kwargs.get("config"), kwargs.get("guard")
    config = with_guard(config, guard, kwargs.get("nan_guard_fallback", False))
    if (world := rank_and_world_size()[1]) > 1:
        text = (
            f"for_trainer: mesh was None when it was called, and now there are {world} ranks: "
            "torch.distributed.group.WORLD is None before the process group is there. Write in "
            f"this order: {OF_TRAINER}"
        )
        if asks_for_ranks(config):
            raise ValueError(f"{text}; or mesh='alone' if each rank is meant to decide alone")
        warn_at_caller(f"{text}. Without it, no rank shares the work of another")
    return _of_model(model, **kwargs)
