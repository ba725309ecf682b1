"""`routes_for`: what the modules of a model say of their parameters. Modules are told by type, class name and attributes.

named_modules -> every use of every tensor -> what each use makes of it -> one route a tensor, with the reason
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import projections as fused
from .heads import Heads
from .projections import _get, is_a, kind_of, says_nothing
from .routes import Route, Routed, RouteTable, _default_route

Decision = tuple[Route, str]

# Parts of a path that only wrap: DDP, torch.compile, activation checkpoints, FSDP, parametrizations, adapters.
_WRAPPERS = re.compile(
    r"^(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|parametrizations|base_layer|weight\w*|original\d*)$"
)
_ADAPTER = re.compile(r"(^|\.)(lora_(embedding_)?[ab])(\.|$)", re.IGNORECASE)
_LOOKUPS = re.compile(
    r"(^|_)(pos(ition(al)?)?_?emb(ed(ding)?s?)?|pos_embed|embeddings?|token|tokens|class_embedding|latents|prompt)(_|$)|bias|A_logs?$",
    re.IGNORECASE,
)
_NORM = re.compile(
    r"Norm(\dd)?$"
)  # and neither LayerNormLinear nor NormalizedLinear, which have matrices
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.original\d*$")
_TOWARDS_WIDTH = re.compile(r"^(w2|down_proj|down|c_proj|output_linear|wo|fc2)$")
_GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Use:
    """A tensor under one of its names."""

    name: str
    tensor: Tensor
    owners: tuple[nn.Module, ...]  # the modules that it lies in, the nearest first
    buffer: bool = False

    @property
    def module(self) -> nn.Module:
        return next(
            (m for m in self.owners if kind_of(m) not in ("ParametrizationList", "ModuleDict")),
            self.owners[0],
        )

    @property
    def leaf(self) -> str:
        """What its module calls it."""
        found = _PARAMETRIZED.search(self.name)
        return found[1] if found else self.name.rpartition(".")[2]

    @property
    def own(self) -> str:
        """The projection's name: its module's if the tensor is but its ``weight``."""
        parts = [part for part in self.name.split(".") if not _WRAPPERS.match(part)]
        return parts[-1].removesuffix("_weight") if parts else self.leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def routes_for(
    model: nn.Module,
    overrides: Mapping[str | Callable[[str, Tensor], bool], Route] | None = None,
    *,
    per_head: bool = False,
    decay_vectors: bool = True,
) -> RouteTable:
    """A route for every parameter and buffer of a model, from its modules. ``print(routes_for(model))`` explains each.

        plan = nm.make_plan(params, config, routes=nm.routes_for(model))

    Linear layers, convolutions (flattened), experts and adapters get NorMuon; embeddings, output heads, routers of experts,
    norms, biases and other vectors AdamW; what needs no gradient and buffers are frozen, the former only in plans of tensors
    that do not require one: `NorMuon` trains what is unfrozen later (``Route.unfrozen``). Projections fused in one matrix are
    split where their sizes are known from the modules or their configuration; where not, they are left whole, and the reason
    says so. A weight with several names has one route under each of them.

    Args:
        overrides: name, glob or predicate -> Route, as ``make_plan(routes=)`` takes them; they come first.
        per_head: every attention head of q, k and v is a matrix of its own, also where they are separate parameters.
        decay_vectors: ``False``: no weight decay for what has no two dimensions.

    Raises:
        TypeError: not a module, or an override that is not a Route.
        ValueError: parameters or buffers without a shape yet (lazy modules), or an override that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    given = dict((overrides or {}).items())
    for key, route in given.items():
        if not isinstance(route, Route):
            raise TypeError(f"overrides[{key!r}]: expected a Route, got {type(route).__name__}")
    seen = Seen(model, Heads(model), per_head)
    uses: dict[int, list[Use]] = {}
    for use in _uses(model):
        uses.setdefault(id(use.tensor), []).append(use)

    entries, matched = [], set()
    for same in uses.values():
        keys = [key for key in given if any(_matches(key, use) for use in same)]
        matched |= set(keys)
        if keys:
            route, reason = given[keys[0]], f"overrides[{keys[0]!r}]"
        else:
            route, reason = _joint(same, [seen.decide(use) for use in same])
            if not decay_vectors and route.algorithm == "adamw" and _is_vector(same[0].shape):
                route = Route("adamw", wd_mul=0.0)
            if route.algorithm != "frozen" and not same[0].tensor.requires_grad:
                route, reason = Route("frozen", unfrozen=route), "requires_grad=False"
        entries += [Routed(use.name, use.shape, kind_of(use.module), route, reason) for use in same]
    if len(matched) < len(given):
        raise ValueError(
            f"overrides: {[key for key in given if key not in matched]!r} match no parameter"
        )
    order = {name: k for k, name in enumerate(name for name, _ in model.named_parameters())}
    return RouteTable(sorted(entries, key=lambda entry: order.get(entry.name, len(order))))


def _uses(model: nn.Module) -> Iterator[Use]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        parts = path.split(".") if path else []
        owners = tuple(modules[".".join(parts[:k])] for k in range(len(parts), -1, -1))
        tensors = [(name, p, False) for name, p in module._parameters.items()]
        tensors += [(name, b, True) for name, b in module._buffers.items()]
        for name, tensor, buffer in tensors:
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            if is_lazy(tensor):
                raise ValueError(
                    f"{full}: has no shape yet (a lazy module); run the model once before routes_for()"
                )
            yield Use(full, tensor, owners, buffer)


def _matches(key: str | Callable[[str, Tensor], bool], use: Use) -> bool:
    if isinstance(key, str):
        return key == use.name or fnmatch.fnmatchcase(use.name, key)
    return bool(key(use.name, use.tensor))


def _joint(uses: list[Use], decisions: list[Decision]) -> Decision:
    """Of a tensor with several names: AdamW if it is an embedding or a head anywhere, else what its first name says."""
    if len(uses) == 1:
        return decisions[0]
    route, reason = next(
        (found for found in decisions if found[0].algorithm != "normuon"), decisions[0]
    )
    return route, f"{reason}; one tensor: {', '.join(use.name for use in uses)}"


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size != 1 for size in shape) < 2


class Seen:
    """What has been found out about the model as a whole, and by it what a tensor gets."""

    def __init__(self, model: nn.Module, heads: Heads, per_head: bool) -> None:
        self.heads, self.per_head = heads, per_head

    def decide(self, use: Use) -> Decision:
        module, shape = use.module, use.shape
        kind = kind_of(module)
        if use.buffer:
            return Route("frozen"), "buffer"
        if not use.tensor.dtype.is_floating_point:
            return Route("frozen"), f"{use.tensor.dtype}"
        if _is_vector(shape):
            return Route("adamw"), "norm" if _is_norm(module) else "bias" if use.leaf.startswith(
                "bias"
            ) else "vector"
        adapter = _ADAPTER.search(use.name)
        if adapter:
            return _adapter(adapter[2])
        if is_a(module, nn.Embedding, nn.EmbeddingBag) or (
            kind.endswith("Embedding") and use.leaf == "weight"
        ):
            return Route("adamw"), "embedding"
        if _is_norm(module):
            return Route("adamw"), "norm"
        head = self.heads.reason(module, use.leaf, shape)
        if head is not None:
            return Route("adamw"), head
        if is_a(module, nn.modules.conv._ConvNd):
            return _convolution(module, shape)
        if is_a(module, nn.RNNBase, nn.RNNCellBase) and len(shape) == 2:
            hidden = _get(module, "hidden_size") or shape[0] // _GATES.get(
                kind.removesuffix("Cell"), 1
            )
            return _with(fused.recurrent(use.leaf, int(hidden), shape[0]), kind)
        if is_a(module, nn.MultiheadAttention) and use.leaf == "in_proj_weight":
            each, count = shape[1], _get(module, "num_heads")
            heads = (count,) * 3 if self.per_head and count else None
            return Route(splits=(each,) * 3, heads=heads), "fused qkv of MultiheadAttention"
        if is_a(module, nn.Bilinear):
            return Route(flatten=True), "Bilinear, flattened"
        transposed = kind == "Conv1D" and hasattr(module, "nf") and use.leaf == "weight"
        raw = not (is_a(module, nn.Linear) or "Linear" in kind or transposed)
        if raw and (
            _LOOKUPS.search(use.leaf) or (len(shape) == 3 and 1 in shape[:-1] and shape[0] == 1)
        ):
            return Route("adamw"), "table of vectors, by name"
        by_name = _default_route(use.name, use.tensor)
        if raw and says_nothing(module) and by_name[0].algorithm == "adamw":
            return by_name
        if len(shape) == 3:
            return self._stack(use)
        if len(shape) > 3:
            return Route(), f"of {kind}, read as matrices of {shape[-2]}x{shape[-1]}"
        outputs, inputs = (shape[1], shape[0]) if transposed else shape
        cut = fused.cut(use.own, use.owners, outputs, inputs, per_head=self.per_head)
        what = (
            "Conv1D, stored [inputs, outputs]"
            if transposed
            else "matrix"
            if not raw
            else f"matrix of {kind}"
        )
        return _with(cut, what, transposed)

    def _stack(self, use: Use) -> Decision:
        """[n, rows, cols]: experts, mostly."""
        transposed = self._stored_by_inputs(use)
        is_experts = any("expert" in text.lower() for text in (use.name, kind_of(use.module)))
        what = f"{use.shape[0]} {'experts' if is_experts else 'matrices'}"
        if transposed is None:
            transposed, what = False, f"{what}, taken as [outputs, inputs]"
        elif transposed:
            what += ", stored [inputs, outputs]"
        outputs, inputs = (
            (use.shape[2], use.shape[1]) if transposed else (use.shape[1], use.shape[2])
        )
        found = fused.cut(use.own, use.owners, outputs, inputs, per_head=False)
        return _with(found, what, transposed)

    def _stored_by_inputs(self, use: Use) -> bool | None:
        """Which dimension is the model's width tells how an expert lies; ``None``: both or neither are."""
        known = _get(use.module, "is_transposed")
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
    return is_a(
        module, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase
    ) or bool(_NORM.search(kind_of(module)))


def _adapter(which: str) -> Decision:
    if "embedding" in which.lower():
        return Route("adamw"), "LoRA of an embedding"
    return Route(), f"LoRA {which[-1].upper()}: each factor is a matrix of its own"


def _convolution(module: nn.Module, shape: tuple[int, ...]) -> Decision:
    kind, groups = kind_of(module), _get(module, "groups")  # which a traced module does not have
    if groups != 1 and shape[1] == 1:
        return Route("adamw"), f"depthwise {kind}: every filter sees one channel"
    what = f"{kind}, flattened to {shape[0]}x{torch.Size(shape[1:]).numel()}"
    if is_a(module, nn.modules.conv._ConvTransposeNd) or _get(module, "transposed"):
        return Route(flatten=True, transposed=True), f"{what}: the rows are inputs"
    return Route(flatten=True), what if groups in (
        None,
        1,
    ) else f"{what}: its {groups} groups together"


def _with(cut: fused.Cut | None, what: str, transposed: bool = False) -> Decision:
    """A matrix, or a stack, along whose outputs ``cut`` says where the parts are."""
    if cut is None:
        return Route(transposed=transposed), what
    dim = int(transposed) if cut.splits or cut.heads else 0
    reason = cut.reason if what.startswith("matrix") else f"{what}; {cut.reason}"
    return Route(splits=cut.splits, heads=cut.heads, dim=dim, transposed=transposed), reason
