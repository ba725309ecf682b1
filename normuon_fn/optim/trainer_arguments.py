"""What transformers' ``TrainingArguments`` say of the optimizer, beside what is written for it.

The arguments, and what is written -> what contradicts, what is taken, what nobody reads
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnostics.monitor import find_inside
from ..distributed.dtensors import is_dtensor
from ..distributed.groups import all_ranks
from ..routing.doubts import warn_at_caller
from .hyper import check_betas, check_value

_NUMBERS = {"lr": "learning_rate", "weight_decay": "weight_decay", "adamw_eps": "adam_epsilon"}
_BETAS = ("adam_beta1", "adam_beta2")
_OWN_BETAS = (0.9, 0.95)  # NorMuon's, where the arguments have their defaults
_UNREAD = ("optim", "optim_args", "optim_target_modules")
_PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")  # what it is if nobody writes it


def are_arguments(given: object) -> bool:
    """Whether something is TrainingArguments, by what it has: nothing is imported for it."""
    return all(hasattr(given, name) for name in ("learning_rate", "weight_decay", "output_dir"))


def calling_trainer(make: object) -> Any | None:
    """The Trainer that is making its optimizer with ``make`` now; ``None`` if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        pair = getattr(found, "__dict__", {}).get("optimizer_cls_and_kwargs")
        if isinstance(pair, (tuple, list)) and pair and pair[0] is make:
            return found
        frame = frame.f_back
    return None


def stepping_trainer(groups: Sequence[Mapping[str, Any]]) -> Any | None:
    """The Trainer that is stepping the optimizer of these groups now; ``None`` if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        own = getattr(found, "__dict__", {})
        if are_arguments(own.get("args")) and "optimizer" in own:
            inner = find_inside(own["optimizer"])
            if inner is not None and inner.param_groups is groups:
                return found
        frame = frame.f_back
    return None


def say_if_unread(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warns once where a Trainer steps an optimizer that has other numbers than its arguments.

    It is one that was given to the Trainer, or a class that the Trainer gave its groups to.
    """
    trainer = stepping_trainer(groups)
    if trainer is None:
        return
    texts, called = [], type(trainer.args).__name__
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    for name, values in (
        ("learning_rate", rates),
        ("weight_decay", [group["weight_decay"] for group in groups]),
    ):
        theirs = getattr(trainer.args, name)
        if _is_written(trainer.args, name) and _has_none_of(values, theirs):
            shown = ", ".join(str(value) for value in dict.fromkeys(values))
            mine = "lr" if name == "learning_rate" else name
            texts.append(f"{name}={theirs} of {called} is not read, {mine} is {shown}")
    kept = {group["weight_decay"] for group in groups}
    if isinstance(trainer.__dict__.get("optimizer_cls_and_kwargs"), tuple):
        written = trainer.optimizer_cls_and_kwargs[1].get("weight_decay")
        if written is not None and written not in kept:
            texts.append(
                f"weight_decay={written} beside the class is not read, the Trainer's groups have "
                f"weight_decay={trainer.args.weight_decay} of {called}"
            )
    if texts:
        is_resumed = bool(getattr(getattr(trainer, "state", None), "global_step", 0))
        warn_at_caller(
            f"NorMuon: {'; '.join(texts)}. "
            + (
                "A resumed run goes on with the numbers of its checkpoint, as with any optimizer"
                if is_resumed
                else "Write each number once: optimizer_cls_and_kwargs=nm.for_trainer(model, "
                "arguments) takes those of the Trainer's arguments"
            )
            + ". This is said once"
        )


def _has_none_of(values: Sequence[Any], number: float) -> bool:
    return not any(isinstance(value, Tensor) or float(value) == number for value in values)


def with_replicas(written: Mapping[str, Any], trainer: Any, model: nn.Module) -> dict[str, Any]:
    """What is written, and ``mesh`` where the Trainer puts the model into DistributedDataParallel.

    All ranks then have the same parameters and gradients, but for those that it is told to ignore,
    as experts of which each rank has its own: then ``mesh`` is left out, with one warning. Other
    ways to part a model are left to what the parameters tell, or the user writes.
    """
    accelerator = getattr(trainer, "accelerator", None)
    kind = str(_plain(getattr(accelerator, "distributed_type", "")))
    replicated = (
        kind.startswith("MULTI_")
        and getattr(accelerator, "parallelism_config", None) is None
        and not any(map(is_dtensor, model.parameters()))
    )
    asked = [written.get(key) for key in ("mesh", "guard_mesh")]  # WORLD is None before the ranks
    ranks = all_ranks() if replicated and asked == [None, None] else None
    if ranks is None:
        return dict(written)
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    own = [n for n, p in model.named_parameters() if p.requires_grad and n in ignored]
    if not own:
        return {**written, "mesh": ranks}
    more = f" and {len(own) - 1} more" if len(own) > 1 else ""
    warn_at_caller(
        "for_trainer: mesh is left out, so that no rank shares the work of another, because "
        f"DistributedDataParallel is told to ignore {own[0]}{more}: ranks may have different "
        "values there, as each its own experts. Write guard_mesh="
        "torch.distributed.group.WORLD if that is so and all ranks skip a step together, "
        "mesh='alone' if each decides alone, or mesh=torch.distributed.group.WORLD if all "
        "parameters and gradients are the same on all ranks"
    )
    return dict(written)


def check_numbers(written: Mapping[str, Any]) -> None:
    """That the numbers which may stand in both places are numbers.

    Raises:
        TypeError, ValueError: naming the parameter and what to write.
    """
    try:
        for key in _NUMBERS:
            if key in written:
                check_value(key, written[key])
        if "adamw_betas" in written:
            check_betas("", written["adamw_betas"])
            for beta in written["adamw_betas"]:
                check_value("adamw_betas", beta)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"for_trainer: {error}; leave it out of nm.for_trainer(...), which then takes that of "
            "TrainingArguments, or write what is expected"
        ) from None


def check_agreement(written: Mapping[str, Any], arguments: object) -> None:
    """That no number is written in both places with two values.

    A number of the arguments that is their class's default counts as not written.

    Raises:
        ValueError: naming both numbers and what to write.
    """
    for key, name in _NUMBERS.items():
        theirs = getattr(arguments, name, None)
        if _is_written(arguments, name) and key in written and _differ(written[key], theirs):
            raise ValueError(_contradiction(key, written[key], name, theirs))
    if "adamw_betas" in written:
        for mine, name in zip(written["adamw_betas"], _BETAS, strict=True):
            theirs = getattr(arguments, name, None)
            if _is_written(arguments, name) and _differ(mine, theirs):
                raise ValueError(
                    _contradiction("adamw_betas", written["adamw_betas"], name, theirs)
                )


def with_arguments(written: Mapping[str, Any], arguments: object) -> dict[str, Any]:
    """What is written, and the numbers of the arguments where nothing is.

    One warning names the arguments that nobody reads, and a rate that is their default.

    Raises:
        ValueError: as `check_agreement`.
    """
    check_agreement(written, arguments)
    found = dict(written)
    if "lr" not in written:
        found["lr"] = getattr(arguments, "learning_rate")  # noqa: B009
    if "weight_decay" not in written:
        found["weight_decay"] = getattr(arguments, "weight_decay")  # noqa: B009
    if "adamw_eps" not in written and _is_written(arguments, "adam_epsilon"):
        found["adamw_eps"] = getattr(arguments, "adam_epsilon")  # noqa: B009
    if "adamw_betas" not in written and any(_is_written(arguments, name) for name in _BETAS):
        found["adamw_betas"] = tuple(
            getattr(arguments, name) if _is_written(arguments, name) else own
            for name, own in zip(_BETAS, _OWN_BETAS, strict=True)
        )
    _say(written, arguments)
    return found


def _say(written: Mapping[str, Any], arguments: object) -> None:
    called, texts = type(arguments).__name__, []
    unread = [
        f"{name}={value!r}"
        for name in _UNREAD
        if _is_written(arguments, name)
        and (value := _plain(getattr(arguments, name))) not in _PLAIN_ADAMW
    ]
    if unread:
        texts.append(
            f"{', '.join(unread)} of {called} {'is' if len(unread) == 1 else 'are'} not read, "
            "because for_trainer() makes a NorMuon: leave out of them what is not meant, and write "
            "options of NorMuon into nm.for_trainer(...)"
        )
    if "lr" not in written and not _is_written(arguments, "learning_rate"):
        texts.append(
            f"lr is {getattr(arguments, 'learning_rate')}, the default of {called}, because no "  # noqa: B009
            f"rate is written; write {called}(learning_rate=...)"
        )
    if texts:
        warn_at_caller("for_trainer: " + ".\n".join(texts))


def _is_written(arguments: object, name: str) -> bool:
    """Whether an argument is not its class's default, which is all that can be told."""
    value = getattr(arguments, name, None)
    fields = getattr(type(arguments), "__dataclass_fields__", {})
    default = fields[name].default if name in fields else dataclasses.MISSING
    return value is not None and _plain(value) != _plain(default)


def _plain(value: object) -> object:
    """The text of an enumeration's member, and everything else as it is."""
    return getattr(value, "value", value)


def _differ(mine: Any, theirs: Any) -> bool:
    """Whether two numbers differ, both rounded to the precision of the one that is written."""
    if isinstance(mine, Tensor):
        mine = mine.detach().reshape(()).cpu()
        if mine.is_floating_point():
            theirs = torch.tensor(float(theirs), dtype=mine.dtype, device="cpu")
    elif not isinstance(mine, (int, float)):  # a numpy scalar, as of float32
        theirs = type(mine)(theirs)
    return float(mine) != float(theirs)


def _contradiction(key: str, mine: Any, name: str, theirs: Any) -> str:
    return (
        f"for_trainer: {key}={mine} contradicts {name}={theirs} of TrainingArguments; write one of "
        f"them: either leave {key}= out of nm.for_trainer(...), which then takes {name}, or leave "
        f"{name}= out of TrainingArguments(...)"
    )
