"""A model in the place of its parameters, and what is said or refused when a plan begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .doubts import unsure, warning_text
from .modules import table_of
from .resolve import Routes, is_written
from .route_table import RouteTable
from .routes import Decision

_FLAT = 2**20  # elements; the longest bias of a published model is a vocabulary of 262144


def read_model(model: nn.Module, routes: Routes | None) -> tuple[dict[str, Tensor], RouteTable]:
    """The parameters of a model by name, and the route of each.

    ``routes`` come first and the model's modules decide about the rest; a table is used as it is.

    Raises:
        TypeError, ValueError: as `routes_for`; or a model without parameters.
    """
    params: dict[str, Tensor] = dict(model.named_parameters())
    if not params:
        raise ValueError(
            f"params: expected a model with parameters, got a {type(model).__name__} without any"
        )
    if isinstance(routes, RouteTable):
        return params, routes
    if routes is not None and not isinstance(routes, Mapping):
        raise TypeError(
            "routes: expected a dict of name, glob or predicate -> Route, got "
            f"{type(routes).__name__}"
        )
    return params, table_of(model, routes)


def doubts_of(
    params: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    table: RouteTable | None = None,  # by which they were made
) -> str | None:
    """The text of the one warning about the decisions that are not certain, or ``None``.

    A parameter has the name in it that it has in the table, so that its line can be written there.
    """
    doubtful = unsure(decisions)
    names = {} if table is None or not doubtful else table.names_of(params)
    shapes = {names.get(name, name): tuple(params[name].shape) for name in doubtful}
    said = {names.get(name, name): found for name, found in doubtful.items()}
    every = [names.get(name, name) for name in params]
    return warning_text(said, shapes, by_modules=table is not None, names=every)


def refuse_flattened(params: Mapping[str, Tensor], decisions: Mapping[str, Decision]) -> None:
    """Refuses parameters whose matrices a wrapper has flattened or taken away.

    Raises:
        ValueError: naming them, and what to do instead.
    """
    marked = {name: p for name, p in params.items() if getattr(p, "_fsdp_flattened", False)}
    if any(p.ndim > 1 for p in marked.values()):  # FSDP1 left the shapes as they were
        marked = {}
    open_ = {name: p for name, p in params.items() if not _is_left_out(decisions[name])}
    _refuse(
        (name for name in open_ if name in marked),
        params,
        "flattened by FSDP1, so that no matrix is left",
        "use FSDP2 (torch.distributed.fsdp.fully_shard), which keeps every parameter's shape",
    )
    _refuse(
        (name for name, p in open_.items() if hasattr(p, "ds_id") or hasattr(p, "ds_shape")),
        params,
        "placeholders of DeepSpeed ZeRO, whose entries are elsewhere",
        "use FSDP2 (torch.distributed.fsdp.fully_shard), or build the optimizer before wrapping",
    )
    _refuse(
        (name for name, p in open_.items() if p.ndim == 1 and p.requires_grad and p.numel() == 0),
        params,
        "empty vectors that require gradients, as wrappers leave them in the place of matrices",
        "use FSDP2 (torch.distributed.fsdp.fully_shard), or build the optimizer before wrapping",
    )
    _refuse(
        (
            name
            for name, p in open_.items()
            if p.ndim == 1 and p.numel() >= _FLAT and decisions[name].reason not in ("bias", "norm")
        ),
        params,
        f"vectors of {_FLAT} elements or more, which look like many matrices in one flat buffer",
        "build the optimizer before wrapping, or use FSDP2 (torch.distributed.fsdp.fully_shard)",
    )


def _is_left_out(decision: Decision) -> bool:
    return is_written(decision) and decision.route.algorithm != "normuon"


def _refuse(names: Iterable[str], params: Mapping[str, Tensor], what: str, cure: str) -> None:
    found = {name: tuple(params[name].shape) for name in names}
    if found:
        shown = dict(list(found.items())[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        first = next(iter(found))
        raise ValueError(
            f"params: expected parameters with the shapes of their layers, got {shown}{more}: "
            f"{what}. All of them would silently get AdamW or nothing: {cure}. If AdamW is meant, "
            f"write routes={{{first!r}: nm.Route('adamw')}}"
        )
