"""`routes_for`: what the modules of a model tell about their parameters.

named_modules -> every use of every tensor -> what each use makes of it -> one route per tensor

Modules are told by type, class name and attributes.
"""

from __future__ import annotations

import re
from functools import cached_property, partial

from torch import nn

from ..compat.collection import without_collection
from ..types.other_names import with_hints
from . import adapters, convolutions, low_rank, parametrized, routers, words
from . import projections as fused
from . import raw as raw_parameter
from .attributes import get, is_a, is_conv1d_of_gpt2, is_linear, kind_of
from .heads import Heads
from .mixers import Cut
from .names import by_names
from .resolve import Entries, Routes
from .route_table import Routed, RouteTable
from .routes import NO_GRADIENT, Decision, Route
from .uses import Use, unwrapped, uses

_NORM = re.compile(
    r"Norm(\dd)?$"
)  # neither LayerNormLinear nor NormalizedLinear: they have matrices
_TOWARDS_WIDTH = re.compile(
    r"^(w2|down_proj|down|c_proj|output_linear|wo|fc2|w_?o|w_out|out_proj|o_proj)$", re.I
)
_GATES = {"LSTM": 4, "GRU": 3}


@with_hints
def routes_for(
    model: nn.Module,
    overrides: Routes | None = None,
    *,
    per_head: bool = False,
    decay_vectors: bool = True,
) -> RouteTable:
    """A route for every parameter and buffer of a model, from its modules.

        plan = nm.make_plan(params, config, routes=nm.routes_for(model))

    `NorMuon` and `make_plan` make this table themselves where they are given the model.
    ``print(routes_for(model))`` explains each. Linear layers, convolutions (flattened), experts and
    the factors of adapters get NorMuon; embeddings, output heads, routers of experts, norms, biases
    and other vectors get AdamW. What needs no gradient and buffers are frozen, the former only in
    plans of tensors that do not require one: `NorMuon` trains what is unfrozen later
    (``Route.unfrozen``). Projections fused in one matrix are split where their sizes are known from
    the modules or their configuration; elsewhere they are left whole, and the reason says why. A
    weight with several names has one route under each of them. Wrappers (DDP, FSDP, torch.compile,
    PEFT, AveragedModel, ...) are seen through. ``table.unsure()`` has what could not be told.

    Args:
        overrides: name, glob or predicate -> Route, as ``make_plan(routes=)`` takes them; they come
            first. Those with multipliers alone (`Route`) keep the rest of what the modules tell.
            Rates that fall with the distance from the last of twelve layers:
            ``{f"blocks.{k}.*": nm.Route(lr_mul=0.9 ** (12 - k)) for k in range(12)}``.
        per_head: every attention head of q, k and v is a matrix of its own, also where they are
            separate parameters.
        decay_vectors: ``False``: no weight decay for what has fewer than two dimensions
            (sizes of 1 do not count).

    Raises:
        TypeError: not a module, or an override that is not a Route.
        ValueError: parameters or buffers without a shape yet (lazy modules), or an override that
            matches nothing.
    """
    return table_of(model, overrides, per_head, decay_vectors, "overrides")


@without_collection
def table_of(
    model: nn.Module,
    overrides: Routes | None,
    per_head: bool = False,
    decay_vectors: bool = True,
    called: str = "routes",  # what the caller has written ``overrides`` as
    *,
    say: bool = True,
) -> RouteTable:
    """`routes_for`, whose errors call the overrides by the name that the caller knows."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; where there is no "
            "model, nm.make_plan(params) and NorMuon(params) decide by names and shapes"
        )
    asked = Entries("overrides", overrides or {}, called)
    reader = Reader(model, per_head)
    by_tensor: dict[int, list[Use]] = {}
    for use in uses(model):
        by_tensor.setdefault(id(use.tensor), []).append(use)

    entries = []
    for same in by_tensor.values():
        override = asked.decide([(use.name, use.tensor) for use in same])
        if override is not None and override.route.decides:
            found = override
        else:
            found = _joint(same, [reader.decide(use) for use in same])
            if not decay_vectors and found.route.algorithm == "adamw" and _is_vector(same[0].shape):
                found = found._replace(route=Route("adamw", wd_mul=0.0))
            if override is not None:
                found = override.over(found)
            if found.route.algorithm != "frozen" and not same[0].tensor.requires_grad:
                later = Route("frozen", unfrozen=found.route)
                found = Decision(later, NO_GRADIENT, found.certainty)
        entries += [Routed(use.name, use.shape, kind_of(use.module), *found) for use in same]
    asked.check_used()
    if say:
        asked.warn_of_no_effect()
    asked.check_options({entry.name: entry.route for entry in entries})
    order = {name: k for k, name in enumerate(name for name, _ in model.named_parameters())}
    entries.sort(key=lambda entry: order.get(entry.name, len(order)))
    table = RouteTable(entries, model)
    table.read_again = partial(
        table_of, overrides=overrides, per_head=per_head, decay_vectors=decay_vectors,
        called=called, say=False,
    )  # fmt: skip
    return table


def _joint(found: list[Use], decisions: list[Decision]) -> Decision:
    """For a tensor with several names: AdamW if it is an embedding or a head under any of them,
    otherwise what its first name says."""
    if len(found) == 1:
        return decisions[0]
    chosen = next((d for d in decisions if d.route.algorithm != "normuon"), decisions[0])
    names = ", ".join(use.name for use in found)
    return chosen._replace(reason=f"{chosen.reason}; one tensor: {names}")


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size != 1 for size in shape) < 2


class Reader:
    """What has been found out about the model as a whole, and by it what a tensor gets."""

    def __init__(self, model: nn.Module, per_head: bool) -> None:
        self.model, self.per_head = model, per_head
        self.heads = Heads(model)

    @cached_property
    def by_names(self) -> dict[str, Decision]:
        return by_names(dict(self.model.named_parameters(remove_duplicate=False)))

    def decide(self, use: Use) -> Decision:
        """Asked in this order: what is no matrix, whose adapter it is, what its module is."""
        module, shape = use.module, use.shape
        if use.buffer:
            return Decision(Route("frozen"), "buffer")
        if not use.tensor.dtype.is_floating_point:
            return Decision(Route("frozen"), f"{use.tensor.dtype}")
        if 0 in shape and len(shape) > 1:
            return Decision(Route("frozen"), "no entries")
        if _is_vector(shape):
            what = (
                "norm" if _is_norm(module) else "bias" if use.leaf.startswith("bias") else "vector"
            )
            return Decision(Route("adamw"), what)
        of_head = any(self.heads.is_head(owner) for owner in use.owners[1:3])
        of_head = of_head or low_rank.adapts_a_head(use)
        adapter = adapters.decide(use.name, use.owners, shape, of_head=of_head)
        factor = low_rank.decide(use, of_head=of_head)
        if factor is not None and (adapter is None or factor.route.algorithm == "adamw"):
            return factor
        if adapter is not None:
            return adapter
        if is_a(module, nn.Embedding, nn.EmbeddingBag) or (
            kind_of(module).endswith("Embedding") and use.leaf == "weight"
        ):
            return Decision(Route("adamw"), "embedding")
        if _is_norm(module):
            return Decision(Route("adamw"), "norm")
        if use.leaf != "weight" and words.is_biases(use.leaf):
            return Decision(Route("adamw"), "biases or scales, one vector per row")
        if use.leaf == "bias":
            return Decision(Route("adamw"), "biases, one per member")
        head = self.heads.decide(module, use.leaf)
        if head is not None:
            return head
        found = self._layer(use, is_conv1d_of_gpt2(module) and use.leaf == "weight")
        if found.route.flatten and shape[0] == 1:
            return Decision(Route("adamw"), f"vector: a {kind_of(module)} of one row, flattened")
        return parametrized.doubted(use, self.heads.doubted(module, use.leaf, found))

    def _layer(self, use: Use, transposed: bool) -> Decision:
        module, shape, kind = use.module, use.shape, kind_of(use.module)
        outputs_first = shape[::-1] if transposed else shape
        parts = unwrapped(use.name)
        router = routers.decide(
            [part for part in parts if part != "weight"], use.around, use.leaf, outputs_first
        )
        if router is not None:
            return router
        if use.leaf == "weight" and len(shape) == 2 and words.is_place_bias(use.own):
            return Decision(Route("adamw"), "table of relative positions, stored by columns")
        if is_a(module, nn.modules.conv._ConvNd):
            return convolutions.decide(use, per_head=self.per_head)
        if is_a(module, nn.RNNBase, nn.RNNCellBase) and len(shape) == 2:
            gates = _GATES.get(kind.removesuffix("Cell"), 1)
            hidden = get(module, "hidden_size") or shape[0] // gates
            return _with(fused.recurrent(use.leaf, int(hidden), shape[0]), kind)
        if is_a(module, nn.MultiheadAttention) and use.leaf == "in_proj_weight":
            each, count = shape[1], get(module, "num_heads")
            heads = (count,) * 3 if self.per_head and count else None
            route = Route(splits=(each,) * 3, heads=heads)
            return Decision(route, "fused qkv of MultiheadAttention")
        if is_a(module, nn.Bilinear):
            return Decision(Route(flatten=True), "Bilinear, flattened")
        raw = not (is_linear(module) or is_a(module, nn.Linear) or "Linear" in kind or transposed)
        if raw:
            found = raw_parameter.decide(use, lambda: self.by_names[use.name])
            if found is not None:
                return found
        if len(shape) == 3:
            return self._stack(use)
        if len(shape) > 3:
            what = f"{kind}, read as matrices of {shape[-2]}x{shape[-1]}"
            return Decision(Route(), what, "untold")
        cut = fused.cut(
            use.own, use.owners, outputs_first[0], outputs_first[1], per_head=self.per_head
        )
        what = "matrix" if not raw else f"matrix of {kind}"
        found = _with(cut, "Conv1D, stored [inputs, outputs]" if transposed else what, transposed)
        named = next((part for part in reversed(parts) if not part.isdigit()), use.leaf)
        if raw and cut is None and not words.is_matrix(named):
            return Decision(found.route, f"{what}, by its shape alone", "likely")
        return found

    def _stack(self, use: Use) -> Decision:
        """[n, rows, cols]: experts, mostly."""
        transposed = self._stored_by_inputs(use)
        is_experts = any("expert" in text.lower() for text in (use.name, kind_of(use.module)))
        what = f"{use.shape[0]} {'experts' if is_experts else 'matrices'}"
        sure = is_experts or not use.leaf.startswith("weight") or "Linear" in kind_of(use.module)
        if transposed is None:
            transposed, what = False, f"{what}, taken as [outputs, inputs]"
        elif transposed:
            what += ", stored [inputs, outputs]"
        rows, cols = use.shape[1:]
        outputs, inputs = (cols, rows) if transposed else (rows, cols)
        cut = fused.cut(use.own, use.owners, outputs, inputs, per_head=False)
        found = _with(cut, what, transposed)
        return found if sure else found._replace(certainty="likely")

    def _stored_by_inputs(self, use: Use) -> bool | None:
        """Which dimension is the model's width tells how an expert is stored; ``None``: both are,
        or neither."""
        known = get(use.module, "is_transposed")
        if isinstance(known, bool):
            return known
        widths = {size in self.heads.widths for size in use.shape[1:]}
        if widths != {True, False}:
            return None
        width_first = use.shape[1] in self.heads.widths
        return width_first != bool(_TOWARDS_WIDTH.match(use.own))


def _is_norm(module: nn.Module) -> bool:
    if is_a(module, nn.Linear, nn.modules.conv._ConvNd):
        return False
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return is_a(module, *norms) or bool(_NORM.search(kind_of(module)))


def _with(cut: Cut | None, what: str, transposed: bool = False) -> Decision:
    """A matrix, or a stack, along whose outputs ``cut`` says where the parts are."""
    if cut is None:
        return Decision(Route(transposed=transposed), what)
    dim = int(transposed) if cut.splits or cut.heads else 0
    reason = cut.reason if what.startswith("matrix") else f"{what}; {cut.reason}"
    route = Route(splits=cut.splits, heads=cut.heads, dim=dim, transposed=transposed)
    return Decision(route, reason)
