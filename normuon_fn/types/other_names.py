"""What other optimizers call our arguments, so that an unknown one is refused with a line to write.

Sources of the names: torch.optim, microsoft/dion, KellerJordan/Muon, zichongli5/NorMuon, NVIDIA's
Emerging-Optimizers, timm, transformers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

RENAMED = {  # arguments of other optimizers, and what they are called here
    "betas": "adamw_betas", "eps": "adamw_eps", "adam_betas": "adamw_betas",
    "adam_eps": "adamw_eps", "adam_lr": "adamw_lr", "adam_weight_decay": "adamw_weight_decay",
    "adam_wd": "adamw_weight_decay", "adamw_wd": "adamw_weight_decay", "scalar_lr": "adamw_lr",
    "learning_rate": "lr", "muon_lr": "lr", "matrix_lr": "lr",
    "mu": "momentum", "muon_momentum": "momentum", "momentum_beta": "momentum",
    "muon_beta2": "beta2", "normuon_beta2": "beta2",
    "wd": "weight_decay", "decay": "weight_decay", "muon_weight_decay": "weight_decay",
    "muon_wd": "weight_decay",
    "use_muon": "algorithm", "distributed_mesh": "mesh", "process_group": "mesh",
    "num_heads": "heads", "n_heads": "heads", "warmup_steps": "warmup", "total_steps": "total",
    "num_warmup_steps": "warmup", "num_training_steps": "total",
    "no_decay": "decay_vectors",
}  # fmt: skip
_OF_ADAMW = "write momentum, or adamw_betas for AdamW"
ELSEWHERE = {  # arguments of other optimizers, and what to do instead
    "maximize": "negate the loss",
    "amsgrad": "leave it out, there is none here",
    "foreach": "leave it out: the step is one compiled graph over all tensors",
    "fused": "leave it out: the step is one compiled graph over all tensors",
    "use_triton": "leave it out: kernels are chosen by the device",
    "capturable": "leave it out: lr may be a tensor in any case, and graphed=True captures",
    "differentiable": "leave it out: the step has no derivative",
    "decoupled_weight_decay": "leave it out: weight decay is always decoupled",
    "dampening": "leave it out, or write config=Config(momentum_form=...)",
    "rank": "leave it out: ranks are those of DTensors or of mesh=",
    "world_size": "leave it out: ranks are those of DTensors or of mesh=",
    "beta1": _OF_ADAMW,
    "adam_beta1": _OF_ADAMW,
    "adam_beta2": "write beta2, or adamw_betas for AdamW",
    "adamw_beta1": "write adamw_betas=(beta1, beta2)",
    "adamw_beta2": "write adamw_betas=(beta1, beta2)",
    "epsilon": "write adamw_eps, or NorMuon(config=Config(eps=...)) for matrices",
    "adjust_lr": "write NorMuon(config=Config(scale=...))",
    "adjust_lr_fn": "write NorMuon(config=Config(scale=...))",
    "scale_mode": "write NorMuon(config=Config(scale=...))",
    "extra_scale_factor": "write NorMuon(config=Config(rms=...))",
    "rms_scale": "write NorMuon(config=Config(rms=...))",
    "ns_steps": "write NorMuon(config=Config(steps=...))",
    "num_ns_steps": "write NorMuon(config=Config(steps=...))",
    "backend_steps": "write NorMuon(config=Config(steps=...))",
    "ns_coefficients": "write NorMuon(config=Config(coefficients=...))",
    "coefficient_type": "write NorMuon(config=Config(coefficients=...))",
    "newton_schulz_func": "write NorMuon(config=Config(orthogonalizer=...))",
    "use_nesterov": "write NorMuon(config=Config(nesterov=...))",
    "cautious_wd": "write NorMuon(config=Config(weight_decay_form='cautious'))",
    "model": "give the model as the first argument: nm.NorMuon(model, lr=...)",
    "parameters": "give the model as the first argument: nm.NorMuon(model, lr=...)",
    "cautious": "write NorMuon(config=Config(weight_decay_form='cautious'))",
    "weight_decay_method": "write NorMuon(config=Config(weight_decay_form=...))",
    "flatten": "write routes={...: Route(flatten=True)}",
    "decay_vectors": "write routes=nm.routes_for(model, decay_vectors=...)",
    "per_head": "write routes=nm.routes_for(model, per_head=...)",
}
OF_ROUTES = ("lr_mul", "wd_mul", "heads", "splits", "transposed")  # of one parameter, not of many
_OF_HYPER = (
    "lr", "momentum", "beta2", "weight_decay", "adamw_lr", "adamw_betas", "adamw_eps",
    "adamw_weight_decay",
)  # fmt: skip
_OF_ROUTE = {  # what a route has a factor of
    "lr": "lr_mul", "learning_rate": "lr_mul", "lr_scale": "lr_mul", "adamw_lr": "lr_mul",
    "weight_decay": "wd_mul", "wd": "wd_mul", "adamw_weight_decay": "wd_mul",
}  # fmt: skip
_ALIKE = 0.85  # of difflib: "weigth_decay" is 0.92 of weight_decay, "max_momentum" 0.80 of momentum


def alike(key: str, known: Collection[str]) -> str | None:
    """The argument that somebody meant who wrote ``key``, if there is one."""
    found = difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE)
    return found[0] if found else None


def with_hints(function: F, *, options: Collection[str] = (), example: str = "") -> F:
    """``function``, which says what to write in the place of an argument that it does not have.

    ``options`` are the fields of `Config`, where the function takes one. ``example`` is a call of
    it, which is shown where an argument is missing. The signature stays visible to `inspect`,
    `help` and type checkers.
    """
    known, needed = arguments_of(function), arguments_of(function, needed=True)
    by_place = places_of(function)
    where = function.__qualname__.removesuffix(".__init__").removesuffix(".__new__")

    @functools.wraps(function)
    def hinting(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(by_place) > 0:
            raise TypeError(_too_many(where, by_place[-1], args[len(by_place) :]))
        unknown = [key for key in kwargs if key not in known]
        if unknown:  # all at once: a line of another optimizer has several
            raise TypeError("\n".join([hint(where, key, known, options) for key in unknown]))
        if example and len(args) < len(needed):
            lacking = [key for key in needed if key not in (*known[: len(args)], *kwargs)]
            if lacking:
                raise TypeError(f"{where}: lacks {', '.join(lacking)}; write {example}")
        return function(*args, **kwargs)

    return hinting  # type: ignore[return-value]


def arguments_of(function: Callable[..., Any], *, needed: bool = False) -> tuple[str, ...]:
    """The names of the arguments of a function; with ``needed``, of those without a default."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    found = inspect.signature(function).parameters.values()
    return tuple(
        p.name for p in found if p.kind in kinds and not (needed and p.default is not p.empty)
    )


def places_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that may be given by their places, ``self`` included."""
    found = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found):
        return ()
    return tuple(p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _too_many(where: str, last: str, extra: tuple[Any, ...]) -> str:
    """What to say of arguments that were given by place, behind ``last``, and have none."""
    first = extra[0]
    write = ""
    if isinstance(first, (tuple, list)):
        write = f"; AdamW's betas are adamw_betas={first!r}"
    return (
        f"{where}: arguments after {last!r} need their names, got {type(first).__name__} "
        f"{first!r:.80}{write}"
    )


def hint(where: str, key: str, known: Collection[str], options: Collection[str] = ()) -> str:
    """What to write instead of an argument ``key`` of ``where``, which has those in ``known``."""
    if where == "Route" and key in _OF_ROUTE:
        factor = _OF_ROUTE[key]
        return (
            f"Route: there is no argument {key!r}; write {factor}=, by which the optimizer's value "
            "is multiplied"
        )
    if RENAMED.get(key) in known:
        return f"{where}: {key!r} is called {RENAMED[key]!r} here"
    if key in options:
        return f"{where}: {key!r} is a field of Config; write config=Config({key}=...)"
    if RENAMED.get(key, key) in _OF_HYPER and where in ("Config", "make_plan"):
        key = RENAMED.get(key, key)
        return (
            f"{where}: {key!r} may change from step to step; write nm.NorMuon(model, {key}=...), "
            f"or nm.Hyper.of(params, {key}=...)"
        )
    if key in ELSEWHERE:
        write = ELSEWHERE[key]
        if where == "Config":
            write = write.replace("NorMuon(config=Config(", "Config(").replace("))", ")")
        return f"{where}: there is no argument {key!r}; {write}"
    if key in OF_ROUTES and "routes" in known:
        return f"{where}: {key!r} is of single parameters; write routes={{...: Route({key}=...)}}"
    meant = alike(key, [*known, *options])
    shown = [name for name in known if name != "self"]
    more = f"; did you mean {meant!r}?" if meant else f"; expected one of {shown}"
    return f"{where}: there is no argument {key!r}{more}"
