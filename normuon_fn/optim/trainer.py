"""`for_trainer`: NorMuon for frameworks that make the optimizer themselves."""

from __future__ import annotations

from collections.abc import Mapping
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
from .trainer_arguments import (
    are_arguments,
    calling_trainer,
    check_agreement,
    check_numbers,
    with_arguments,
    with_replicas,
)


def for_trainer(
    model: nn.Module | None = None, args: Any = None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """What ``transformers.Trainer(optimizer_cls_and_kwargs=...)`` takes.

        arguments = transformers.TrainingArguments("run", learning_rate=0.002, weight_decay=0.1)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data,
            optimizer_cls_and_kwargs=nm.for_trainer(model, arguments, guard="full"),
        )

    The Trainer then makes ``NorMuon(model, ...)`` when it needs the optimizer, with the routes of
    the modules of the model that it trains, also one that ``model_init`` makes. Its own two groups
    are not used: there is one group, which its scheduler scales. As in the Trainer's groups,
    biases, norms and other vectors have no weight decay, unless ``routes`` is a table of
    `routes_for`.

    **Numbers.** ``learning_rate`` and ``weight_decay`` of the Trainer's arguments are ``lr`` and
    ``weight_decay``. ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are ``adamw_betas`` and
    ``adamw_eps`` where they are not the defaults of the arguments' class; elsewhere NorMuon's own
    defaults, (0.9, 0.95) and 1e-8, hold. What is written here goes before a default there; two
    numbers that are both written and differ are refused. ``max_grad_norm`` and the precisions are
    the Trainer's work and hold as ever. ``optim`` and its options are not read, which is said once.
    Where the Trainer puts the model into DistributedDataParallel, ``mesh`` is all ranks. Where that
    is told to ignore parameters, which may differ by rank, it is left out, which is said once.

    Args:
        model: the module that the Trainer is given, which is read at once, so that what is wrong is
            raised here; may be left out.
        args: the Trainer's arguments, which are compared at once, so that a contradiction is raised
            here; may be left out, because they are those of the Trainer that makes the optimizer.
        kwargs: as for `NorMuon`; ``routes`` go before those of the model.

    Units: ``lr`` as in `Hyper`; AdamW's rates carry over.

    Raises:
        TypeError, ValueError: as `routes_for`; an argument that `NorMuon` does not have; what is no
            number in the place of one; a number that contradicts one of ``args``, here or when the
            Trainer makes the optimizer; or then, that ``mesh`` was ``None`` because the ranks came
            later, and is not told otherwise.

    Source: ``Trainer.create_optimizer`` of transformers 5, which calls what is no optimizer's class
    with its model, and of transformers 4, which calls it with its groups.
    """
    if are_arguments(model):
        raise TypeError(
            f"for_trainer: expected a model first, got {type(model).__name__}; write "
            "nm.for_trainer(args=arguments) or nm.for_trainer(model, arguments)"
        )
    if args is not None and not are_arguments(args):
        raise TypeError(
            "args: expected the TrainingArguments that the Trainer is given, got "
            f"{type(args).__name__}; write nm.for_trainer(model, arguments)"
        )
    check_arguments(NorMuon.__init__, kwargs)
    check_numbers(kwargs)
    if args is not None:
        check_agreement(kwargs, args)
    if model is not None and not isinstance(kwargs.get("routes"), RouteTable):
        routes_for(model, kwargs.get("routes"))

    ranks = [kwargs.get("mesh"), kwargs.get("guard_mesh")]
    too_early = bool({"mesh", "guard_mesh"} & kwargs.keys()) and is_before_ranks(*ranks)

    def of_model(model: nn.Module, **given: Any) -> NorMuon:
        trainer = calling_trainer(make)
        arguments = args if trainer is None else getattr(trainer, "args", args)
        if trainer is not None:
            given = with_replicas(given, trainer, model)
        if too_early:
            _check_mesh(given)
        return _of_model(
            model, **(given if arguments is None else with_arguments(given, arguments))
        )

    def make(groups: Any = None, **given: Any) -> Any:
        if groups is None:  # a Trainer that hands its model to factories
            return of_model
        trainer = calling_trainer(make)
        trained = model if trainer is None else trainer.model
        if trained is None:
            raise TypeError(
                "for_trainer: this version of transformers does not hand its model to what makes "
                "the optimizer; write nm.for_trainer(model, ...)"
            )
        _check_same(trained, groups)
        return of_model(trained, **given)

    return make, kwargs


def _of_model(model: nn.Module, *, routes: Routes | None = None, **kwargs: Any) -> NorMuon:
    if not isinstance(routes, RouteTable):
        routes = routes_for(model, routes, decay_vectors=False)
    return NorMuon(model, routes=routes, **kwargs)


def _check_mesh(given: Mapping[str, Any]) -> None:
    """Whether ``mesh``, which was ``None`` before there was a process group, is still wanted.

    Raises:
        ValueError: there are other ranks by now, and what they decide together depends on it.
    """
    if given.get("mesh") is not None or (world := rank_and_world_size()[1]) == 1:
        return
    text = (
        f"for_trainer: mesh was None when it was called, and now there are {world} ranks: "
        "torch.distributed.group.WORLD is None before the process group is there. Write in this "
        f"order: {OF_TRAINER}"
    )
    guard, fallback = given.get("guard"), given.get("nan_guard_fallback", False)
    if asks_for_ranks(with_guard(given.get("config"), guard, fallback)):
        raise ValueError(f"{text}; or mesh='alone' if each rank is meant to decide alone")
    warn_at_caller(f"{text}. Without it, no rank shares the work of another")


def _check_same(model: nn.Module, groups: Any) -> None:
    """That a Trainer's groups are of this model's parameters."""
    own = set(map(id, model.parameters()))
    if any(id(p) not in own for group in groups for p in group["params"]):
        raise ValueError(
            "for_trainer: the Trainer trains another model than the one that was given here; write "
            "nm.for_trainer(model, ...) with the Trainer's model"
        )
