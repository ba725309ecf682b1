"""`for_trainer`: NorMuon for frameworks that make the optimizer themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..routing.modules import routes_for
from ..routing.route_table import RouteTable
from .groups import check_arguments
from .normuon import NorMuon


def for_trainer(model: nn.Module, **kwargs: Any) -> tuple[type[NorMuon], dict[str, Any]]:
    """What ``transformers.Trainer(optimizer_cls_and_kwargs=...)`` takes.

        trainer = transformers.Trainer(
            model, arguments, train_dataset=data,
            optimizer_cls_and_kwargs=nm.for_trainer(model, lr=0.002, weight_decay=0.1),
        )

    The Trainer then makes ``NorMuon(model, ...)`` when it needs the optimizer, with the routes of
    the model's modules. Its own two groups and the ``learning_rate`` and ``weight_decay`` of its
    arguments are not used: write ``lr`` and ``weight_decay`` here. As in the Trainer's groups,
    biases, norms and other vectors have no weight decay, unless ``routes`` is a table of
    `routes_for`.

    The Trainer takes the model out of these arguments: make new ones for another Trainer.

    Args:
        model: the module that the Trainer is given.
        kwargs: as for `NorMuon`; ``routes`` go before those of the model.

    Raises:
        TypeError, ValueError: as `routes_for`; or an argument that `NorMuon` does not have.
    """
    check_arguments(NorMuon.__init__, kwargs)
    routes = kwargs.pop("routes", None)
    if not isinstance(routes, RouteTable):
        routes = routes_for(model, routes, decay_vectors=False)
    return NorMuon, {"model": model, "routes": routes, **kwargs}
