"""Gates whose experts cannot be counted: routers, gates of a hidden layer, gates of heads.

A router has few outputs, and nothing beside it has as many. The gate of a feed-forward has a
projection of its size beside it or one that takes its outputs in; that of an attention scales its
heads. What remains is decided as a router's, and said once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from . import adapters, words
from .attributes import first, get, is_a, is_layer, kind_of, outputs_and_inputs, signature
from .routes import Decision, Route

EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "n_experts", "num_routed_experts",
    "moe_num_experts", "num_moe_experts", "n_expert",
)  # fmt: skip
LISTS = nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict
MANY = 64  # outputs of a gate of which nothing says that it chooses among experts
_MANY_EXPERTS = 1024
MIXERS = re.compile(r"Att(n|ention)|Mixer|Mamba|SSM|Delta|Indexer|LSTM|GRU|RNN|Retention|MHA|MLA")
OF_ATTENTION = re.compile(
    r"^(w?qkv|c_attn|query_key_value|in_proj_weight|(w|to|c)?_?[qk](_proj)?|query|key)$", re.I
)
_TOP = ("top_k", "topk", "num_experts_per_tok", "moe_top_k", "experts_per_token", "capacity_factor",
        "num_experts_per_token", "n_activated_experts", "num_selected_experts")  # fmt: skip


def decide(
    own: str,  # what the holder calls the gate, or the router that it is the last layer of
    owners: Sequence[nn.Module],  # the modules around it up to the holder, the nearest first
    shape: tuple[int, ...],  # [outputs, inputs]
    counts: set[int],  # of experts, and of what the lists and stacks beside it have
) -> Decision | None:
    """The rule of what may be a router, with how sure that is; ``None`` if it is none."""
    few, many = sorted(shape)
    named, known = words.router(own), few in counts
    speaks = _speaks_of_experts(own, owners)
    if not (named or ((known or speaks) and (is_layer(owners[0]) or words.of_experts(own)))):
        return None
    if _is_of_heads(owners) and not speaks:
        return None
    sure = named == "strong" or (named and _has_experts(own, owners[-1], few))
    if not sure and _has_counterpart(own, owners[-1], few):
        return None
    return judge(own, few, many, known=known, speaks=speaks)


def counted(own: str, owners: Sequence[nn.Module], shape: tuple[int, ...]) -> Decision | None:
    """As `decide`, of a layer with as many outputs as there are experts, which are not few."""
    if words.router(own) is None or _is_of_heads(owners) or is_hidden(own, owners[-1], shape[0]):
        return None
    return of_many(shape)


def of_many(shape: tuple[int, ...]) -> Decision:
    """A layer that is named as a router and has an output per expert; a square one may be none."""
    text = f"router: logits of {shape[0]} experts"
    return Decision(Route("adamw"), text, "likely" if shape[0] == shape[1] else "certain")


def judge(own: str, few: int, many: int, *, known: bool, speaks: bool) -> Decision | None:
    """The rule of a layer with ``few`` outputs, which nothing beside it takes in.

    ``known``: so many experts, or members of a list or a stack, are beside it. ``speaks``: a name
    or a class says that there are experts.
    """
    named = words.router(own)
    if known:
        return _counted(own, few, sure=named is not None)
    if few > MANY and 8 * few > many:
        return None
    if named == "strong" or (named and speaks):
        return Decision(Route("adamw"), f"router, by name: logits of {few} choices", "likely")
    if named is None and (few > MANY or 4 * few > many or not speaks):
        return None
    what = "its name" if named else "what is beside it"
    text = f"router or matrix: {few} outputs that, by {what}, may choose among experts"
    return Decision(Route("adamw"), text, "untold")


def has_few_outputs(shape: tuple[int, ...], *, either_way: bool) -> bool:
    """Whether a weight may choose, by its shape.

    ``either_way``: a parameter of no layer, which may be stored as [inputs, outputs].
    """
    few, many = sorted(shape)
    return 2 <= few <= min(many // 2, _MANY_EXPERTS) and (few == shape[0] or either_way)


def _counted(own: str, few: int, *, sure: bool) -> Decision:
    if sure:
        return Decision(Route("adamw"), f"router: logits of {few} experts")
    if words.is_projection(own):
        text = f"matrix, unless its {few} outputs choose among the {few} beside it"
        return Decision(Route(), text, "untold")
    text = f"router: as many outputs as there are members beside it, {few}"
    return Decision(Route("adamw"), text, "likely")


def members(holder: nn.Module) -> set[int]:
    """How many members the lists, stacks and numbered attributes have that a module holds, or that
    its children and theirs do. The places of a Sequential are members if they are alike."""
    found = {0, 1}
    for module in (holder, *inside(holder)):
        if is_a(module, *LISTS):
            if module is not holder:
                found |= {len(module._modules), len(module._parameters)}
            continue
        if not is_a(module, nn.modules.conv._ConvNd):
            found |= {p.shape[0] for p in _parameters(module) if p.ndim == 3}
        children = dict(module.named_children())
        if is_a(module, nn.Sequential):
            kinds = {signature(child) for child in children.values()}
            if len(kinds) > 1 or next(module.parameters(), None) is None:
                continue  # layers, one after another
        stems = [stem_of(name) for name in children if name[-1:].isdigit()]
        found |= {n for stem, n in Counter(stems).items() if is_a_list(stem, n)}
    return found - {0, 1}


def stem_of(part: str) -> str:
    """``expert_3`` and ``expert3`` -> expert, ``3`` -> nothing."""
    return re.sub(r"_?\d+$", "", part)


def is_a_list(stem: str, count: int) -> bool:
    """Whether numbered names are members of one kind: w1, w2 and w3 are not."""
    return count > 1 and (not stem or count > 3 or words.of_experts(stem))


def inside(
    holder: nn.Module, depth: int = 3, *, skip: Callable[[str], bool] | None = None
) -> Iterator[nn.Module]:
    """The modules in it, to a depth, without those in a list and those of a name to ``skip``."""
    if depth and not is_a(holder, *LISTS):
        for name, child in holder.named_children():
            if skip is None or not skip(name):
                yield child
                yield from inside(child, depth - 1, skip=skip)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _is_of_heads(owners: Sequence[nn.Module]) -> bool:
    """Whether it stands in an attention or another mixer of tokens, whose heads it may scale."""
    if any(MIXERS.search(kind_of(owner)) for owner in owners):
        return True
    names = (*owners[-1]._modules.keys(), *owners[-1]._parameters.keys())
    return any(map(OF_ATTENTION.match, names))


def _is_of_experts(kind: str) -> bool:
    """Whether a class is one of experts; Qwen3MoeAttention is called so after its model."""
    return words.of_experts(kind) and not MIXERS.search(kind)


def _speaks_of_experts(own: str, owners: Sequence[nn.Module]) -> bool:
    """Whether a name or a class says that there are experts, or a number how many are chosen."""
    return words.of_experts(own) or any(
        _is_of_experts(kind_of(owner))
        or any(map(words.of_experts, owner._modules.keys()))
        or any(map(words.of_experts, owner._parameters.keys()))
        or any(isinstance(get(owner, name), (int, float)) for name in _TOP)
        for owner in owners
        if not is_a(owner, *LISTS)
    )


def is_hidden(name: str, holder: nn.Module, outputs: int) -> bool:
    """Whether a layer directly beside it has the same outputs, or takes them in.

    The factors of an adapter do not tell, nor does another layer where there are as many experts.
    """
    beside = any(
        child is not None and n != name and not words.router(n) and not adapters.is_adapters(n)
        and is_layer(child) and outputs in outputs_and_inputs(child)
        for n, child in holder._modules.items()
    )  # fmt: skip
    return beside and not _has_experts(name, holder, outputs)


def _has_experts(name: str, holder: nn.Module, count: int) -> bool:
    """Whether a module itself has so many experts, and says that they are experts."""
    if _is_of_heads([holder]) or not _speaks_of_experts(name, [holder]):
        return False
    return first([holder], EXPERTS) == count or count in members(holder)


def _has_counterpart(own: str, holder: nn.Module, few: int) -> bool:
    """Whether a matrix beside it has as many rows or columns as it has outputs, which are then
    hidden ones. Another router beside it, its noise, one bias per expert and the factors of an
    adapter are no such matrix."""
    skip = adapters.is_adapters
    beside = [(n, p) for n, p in holder._parameters.items() if n != own]
    for name, child in holder._modules.items():
        if child is not None and name != own and not (words.router(name) or skip(name)):
            for module in (child, *inside(child, skip=skip)):
                one = next(iter(module.children()), None) if is_a(module, *LISTS) else None
                for each in (module, *((one, *inside(one, skip=skip)) if one is not None else ())):
                    beside += each._parameters.items()
    return any(
        p is not None and p.ndim in (2, 3) and few in p.shape[-2:]
        for name, p in beside
        if not (words.router(name) or words.is_biases(name) or skip(name))
    )
