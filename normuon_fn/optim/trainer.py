"""`for_trainer`: NorMuon for frameworks that make the optimizer themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..routing.modules import routes_for
from ..routing.resolve import Routes
from ..routing.route_table import RouteTable
from .groups import check_arguments
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
        TypeError, ValueError: as `routes_for`; or an argument that `NorMuon` does not have.
    """
    check_arguments(NorMuon.__init__, kwargs)
    if model is not None and not isinstance(kwargs.get("routes"), RouteTable):
        routes_for(model, kwargs.get("routes"))

    def make(groups: object = None, **given: Any) -> Any:
        if groups is None:  # a Trainer that hands its model to factories
            return _of_model
        if model is None:
            raise TypeError(
                "for_trainer: this version of transformers does not hand its model to what makes "
                "the optimizer; write nm.for_trainer(model, ...)"
            )
        return _of_model(model, **given)

    return make, kwargs


def _of_model(model: nn.Module, *, routes: Routes | None = None, **kwargs: Any) -> NorMuon:
    if not isinstance(routes, RouteTable):
        routes = routes_for(model, routes, decay_vectors=False)
    return NorMuon(model, routes=routes, **kwargs)
