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
from torch.nn.parameter import UninitializedParameter

from . import fused
from .heads import Heads
from .routes import Route, Routed, RouteTable

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
_TOWARDS_WIDTH = re.compile(r"^(w2|down_proj|down|c_proj|output_linear|wo|fc2)$")


@dataclass(frozen=True)
class Use:
    """A tensor under one of its names."""

    name: str
    tensor: Tensor
    owners: tuple[nn.Module, ...]  # the modules that it lies in, the nearest first
    buffer: bool = False

    @property
    def module(self) -> nn.Module:
        return next((m for m in self.owners if type(m).__name__ not in ("ParametrizationList", "ModuleDict")), self.owners[0])

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

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
    norms, biases and other vectors AdamW; what needs no gradient and buffers are frozen. Projections fused in one matrix are
    split where their sizes are known from the modules or their configuration; where not, they are left whole, and the reason
    says so. A weight with several names has one route under each of them.

    Args:
        overrides: name, glob or predicate -> Route, as ``make_plan(routes=)`` takes them; they come first.
        per_head: every attention head of q, k and v is a matrix of its own, also where they are separate parameters.
        decay_vectors: ``False``: no weight decay for what has no two dimensions.

    Raises:
        TypeError: not a module, or an override that is not a Route.
        ValueError: parameters without a shape yet (lazy modules), or an override that matches nothing.
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
        entries += [Routed(use.name, use.shape, type(use.module).__name__, route, reason) for use in same]
    if len(matched) < len(given):
        raise ValueError(f"overrides: {[key for key in given if key not in matched]!r} match no parameter")
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
            if isinstance(tensor, UninitializedParameter):
                raise ValueError(f"{full}: has no shape yet (a lazy module); run the model once before routes_for()")
            yield Use(full, tensor, owners, buffer)


def _matches(key: str | Callable[[str, Tensor], bool], use: Use) -> bool:
    if isinstance(key, str):
        return key == use.name or fnmatch.fnmatchcase(use.name, key)
    return bool(key(use.name, use.tensor))


def _joint(uses: list[Use], decisions: list[Decision]) -> Decision:
    """Of a tensor with several names: AdamW if it is an embedding or a head anywhere, else what its first name says."""
    if len(uses) == 1:
        return decisions[0]
    route, reason = next((found for found in decisions if found[0].algorithm != "normuon"), decisions[0])
    return route, f"{reason}; one tensor: {', '.join(use.name for use in uses)}"


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size != 1 for size in shape) < 2


class Seen:
    """What has been found out about the model as a whole, and by it what a tensor gets."""

    def __init__(self, model: nn.Module, heads: Heads, per_head: bool) -> None:
        self.heads, self.per_head = heads, per_head

    def decide(self, use: Use) -> Decision:
        module, shape = use.module, use.shape
        kind = type(module).__name__
        if use.buffer:
            return Route("frozen"), "buffer"
        if not use.tensor.requires_grad:
            return Route("frozen"), "requires_grad=False"
        if not use.tensor.dtype.is_floating_point:
            return Route("frozen"), f"{use.tensor.dtype}"
        if _is_vector(shape):
            return Route("adamw"), "norm" if "Norm" in kind else "bias" if use.leaf.startswith("bias") else "vector"
        adapter = _ADAPTER.search(use.name)
        if adapter:
            return _adapter(adapter[2])
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or (kind.endswith("Embedding") and use.leaf == "weight"):
            return Route("adamw"), "embedding"
        if "Norm" in kind:
            return Route("adamw"), "norm"
        head = self.heads.reason(module, use.leaf, shape)
        if head is not None:
            return Route("adamw"), head
        if isinstance(module, nn.modules.conv._ConvNd):
            return _convolution(module, shape)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and len(shape) == 2:
            return _with(fused.recurrent(use.leaf, int(module.hidden_size), shape[0]), kind)
        if isinstance(module, nn.MultiheadAttention) and use.leaf == "in_proj_weight":
            each = shape[1]
            heads = (module.num_heads,) * 3 if self.per_head else None
            return Route(splits=(each,) * 3, heads=heads), "fused qkv of MultiheadAttention"
        if isinstance(module, nn.Bilinear):
            return Route(flatten=True), "Bilinear, flattened"
        transposed = kind == "Conv1D" and hasattr(module, "nf") and use.leaf == "weight"
        raw = not (isinstance(module, nn.Linear) or "Linear" in kind or transposed)
        if raw and (_LOOKUPS.search(use.leaf) or (len(shape) == 3 and 1 in shape[:-1] and shape[0] == 1)):
            return Route("adamw"), "table of vectors, by name"
        if len(shape) == 3:
            return self._stack(use)
        if len(shape) > 3:
            return Route(), f"of {kind}, read as matrices of {shape[-2]}x{shape[-1]}"
        outputs, inputs = (shape[1], shape[0]) if transposed else shape
        cut = fused.cut(use.own, use.owners, outputs, inputs, per_head=self.per_head)
        what = "Conv1D, stored [inputs, outputs]" if transposed else "matrix" if not raw else f"matrix of {kind}"
        return _with(cut, what, transposed)

    def _stack(self, use: Use) -> Decision:
        """[n, rows, cols]: experts, mostly."""
        transposed = self._stored_by_inputs(use)
        is_experts = any("expert" in text.lower() for text in (use.name, type(use.module).__name__))
        what = f"{use.shape[0]} {'experts' if is_experts else 'matrices'}"
        if transposed is None:
            transposed, what = False, f"{what}, taken as [outputs, inputs]"
        elif transposed:
            what += ", stored [inputs, outputs]"
        outputs, inputs = (use.shape[2], use.shape[1]) if transposed else (use.shape[1], use.shape[2])
        found = fused.cut(use.own, use.owners, outputs, inputs, per_head=False)
        return _with(found, what, transposed)

    def _stored_by_inputs(self, use: Use) -> bool | None:
        """Which dimension is the model's width tells how an expert lies; ``None``: both or neither are."""
        known = fused._get(use.module, "is_transposed")
        if isinstance(known, bool):
            return known
        widths = {size in self.heads.widths for size in use.shape[1:]}
        if widths != {True, False}:
            return None
        width_first = use.shape[1] in self.heads.widths
        return width_first != bool(_TOWARDS_WIDTH.match(use.own))


def _adapter(which: str) -> Decision:
    if "embedding" in which.lower():
        return Route("adamw"), "LoRA of an embedding"
    return Route(), f"LoRA {which[-1].upper()}: each factor is a matrix of its own"


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> Decision:
    kind = type(module).__name__
    if module.groups > 1 and shape[1] == 1:
        return Route("adamw"), f"depthwise {kind}: every filter sees one channel"
    what = f"{kind}, flattened to {shape[0]}x{torch.Size(shape[1:]).numel()}"
    if module.transposed:
        return Route(flatten=True, transposed=True), f"{what}: the rows are inputs"
    return Route(flatten=True), what if module.groups == 1 else f"{what}: its {module.groups} groups together"


def _with(cut: fused.Cut | None, what: str, transposed: bool = False) -> Decision:
    """A matrix, or a stack, along whose outputs ``cut`` says where the parts are."""
    if cut is None:
        return Route(transposed=transposed), what
    dim = int(transposed) if cut.splits or cut.heads else 0
    reason = cut.reason if what.startswith("matrix") else f"{what}; {cut.reason}"
    return Route(splits=cut.splits, heads=cut.heads, dim=dim, transposed=transposed), reason
