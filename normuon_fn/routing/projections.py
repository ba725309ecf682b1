"""Projections that a model keeps as one matrix: where q, k and v, or gate and up, begin and end.

Sizes are read from the modules' attributes and configurations, and from the projection that takes
in what this one puts out. They count only if they add up; otherwise the reason says what is
missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from .attention import HEADS, Attention, attention, output_inputs
from .attributes import first, get, kind_of, sources_of
from .feedforward import FIRST, GATE_UP, gate_up, second_inputs
from .mixers import Cut, latent_query, mixer

_QKV = re.compile(
    r"((^|_)w?qkv(_|$)|^(query_key_value|c_attn|att_proj|w_pack|in_proj|in_proj_weight|qkvs)$)",
    re.I,
)
_KV = re.compile(r"^(kv|kv_proj|to_kv|wkv|key_value|c_attn|kv_lin|linear_kv)$", re.I)
_QUERY = re.compile(r"^(q_proj|q|wq|query|to_q|w_q|q_lin|linear_q|query_proj|c_q|Wq)$")
_KEY_VALUE = re.compile(
    r"^([kv]_proj|[kv]|w[kv]|w_[kv]|key|value|to_[kv]|[kv]_lin|linear_[kv]|(key|value)_proj|c_[kv]|W[kv])$"
)
_MODULATION = re.compile(r"ada_?ln|modulation|^mod(ulate)?(_|$)|AdaLayerNorm|AdaRMSNorm", re.I)
_SIZES = re.compile(
    r"(split|fused|chunk|part)\w*(dims?|sizes?|sections?|lengths?)$|^(splits|split)$"
)
# Whose q, k and v take turns head by head, so that no three ranges of rows are q, k and v: the
# classes' names begin so.
_TAKE_TURNS = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "InternLM2", "CodeGen", "GPTBigCode")


def cut(
    own: str,
    owners: Sequence[nn.Module],
    outputs: int,
    inputs: int,
    *,
    per_head: bool,
    by_neighbours: bool = True,
) -> Cut | None:
    """How the projection ``own`` of [outputs, inputs] falls into parts; ``None``: it is one matrix.

    ``owners``: the modules around it, the nearest first. ``by_neighbours``: whether it counts that
    the next layer takes in half of the outputs.
    """
    declared = _declared(owners, outputs)
    if declared is not None:
        return declared
    found = mixer(own, owners, outputs, inputs, per_head=per_head)
    if found is not None:
        return found
    if GATE_UP.match(own):
        return gate_up(owners, outputs)
    named = (_QUERY.match(own), _KEY_VALUE.match(own), _KV.match(own), _QKV.search(own))
    known = attention(owners) if any(named) else Attention(None, None, None)
    gated = _gated_query(own, owners, known, outputs, per_head)
    if gated is not None:
        return gated
    fused_kv = _KV.match(own) and _halves(own, known, outputs, inputs)
    if _QKV.search(own) and not fused_kv and (own != "in_proj" or _is_attention(owners)):
        return _qkv(own, owners, known, outputs, inputs, per_head)
    if fused_kv:
        each = known.kv_heads or known.heads
        heads = (each, each) if per_head and each and outputs // 2 % each == 0 else None
        return Cut((outputs // 2, outputs // 2), heads, "k and v of equal size")
    if inputs < outputs <= 9 * inputs and outputs % inputs == 0 and _is_modulation(own, owners):
        count = outputs // inputs
        return Cut((inputs,) * count, None, f"{count} modulations (shifts, scales, gates)")
    if per_head and (_QUERY.match(own) or _KEY_VALUE.match(own)):
        return _separate(own, owners, known, outputs)
    if by_neighbours and FIRST.match(own) and 2 * (second_inputs(owners) or 0) == outputs:
        return gate_up(owners, outputs, "gate and up: the next layer takes in half of the outputs")
    if own == "in_proj" and outputs % inputs == 0 and outputs > inputs:
        count = outputs // inputs
        if output_inputs(owners) == outputs:
            return None  # the next layer takes in all of the outputs
        if output_inputs(owners) == inputs and count <= 4:
            return Cut((inputs,) * count, None, f"{count} projections of {inputs} in one")
        return Cut(None, None, f"in_proj, left whole: what its {outputs} outputs are is not known")
    return None


def is_fused_qkv(own: str) -> bool:
    """Whether a projection is called as q, k and v in one are."""
    return bool(_QKV.search(own))


def is_fused_kv(own: str) -> bool:
    """Whether a projection is called as k and v in one are."""
    return bool(_KV.match(own))


def is_of_attention(name: str) -> bool:
    """Whether a layer is called as the queries, keys or values of an attention are."""
    return any(x.match(name) for x in (_QUERY, _KEY_VALUE, _KV)) or bool(_QKV.search(name))


def _is_attention(owners: Sequence[nn.Module]) -> bool:
    """Whether the nearest modules themselves, and not a configuration alone, count heads."""
    return any("att" in kind_of(o).lower() for o in owners[:2]) or bool(
        attention(owners[:1]).heads or (len(owners) > 1 and first(owners[1:2], HEADS))
    )


def _declared(owners: Sequence[nn.Module], outputs: int) -> Cut | None:
    """The sizes that the module itself splits the outputs by, where an attribute has them."""
    for owner in owners[:2]:
        for name, value in vars(owner).items():
            if not isinstance(value, (tuple, list)) or not _SIZES.search(name):
                continue
            sizes = tuple(value)
            ints = len(sizes) > 1 and all(type(n) is int and n > 0 for n in sizes)
            if ints and sum(sizes) == outputs:
                return Cut(sizes, None, f"{name} of {kind_of(owner)}")
    return None


def _qkv(
    own: str,
    owners: Sequence[nn.Module],
    known: Attention,
    outputs: int,
    inputs: int,
    per_head: bool,
) -> Cut:
    turns = _turns(own, owners, known, outputs, per_head)
    if turns is not None:
        return turns
    for source in sources_of(owners):
        key, value = get(source, "key_dim"), get(source, "value_dim")
        if isinstance(key, int) and isinstance(value, int) and 2 * key + value == outputs:
            where = kind_of(owners[0])
            return Cut(
                (key, key, value), None, f"fused qkv: key_dim {key}, value_dim {value} of {where}"
            )
    by_heads = _by_heads(known, outputs, inputs, per_head)
    if by_heads is not None:
        return by_heads
    # What the output projection takes in is as wide as all queries; k and v share the rest.
    if known.q and outputs > known.q and (outputs - known.q) % 2 == 0:
        kv = (outputs - known.q) // 2
        multi_head = kv == known.q
        grouped = kv < known.q and known.q % kv == 0 and known.heads is None
        if multi_head or grouped:
            count = known.heads if multi_head and known.heads and kv % known.heads == 0 else None
            heads = (count,) * 3 if per_head and count else None
            size = f"{known.q} as the output projection takes in"
            return Cut((known.q, kv, kv), heads, f"fused qkv: q of {size}, k and v of {kv}")
    if known.heads is not None:
        return Cut(
            None,
            None,
            f"fused qkv, left whole: {outputs} outputs are not those of {known}; give splits=",
        )
    if outputs == 3 * inputs:
        return Cut((inputs,) * 3, None, "fused qkv: three times as many outputs as inputs")
    return Cut(None, None, "fused qkv, left whole: the number of heads is not known; give splits=")


def _by_heads(known: Attention, outputs: int, inputs: int, per_head: bool) -> Cut | None:
    if known.heads is None:
        return None
    for kv_heads in dict.fromkeys((known.kv_heads or known.heads, known.heads)):
        total = known.heads + 2 * kv_heads
        fits = known.head_dim and total * known.head_dim == outputs
        size = known.head_dim if fits else outputs // total
        assert size is not None
        # Without a head_dim, q has as many outputs as it has inputs (or as its output projection
        # takes in): so that a wrong number of heads does not pass.
        wide = known.heads * size in (inputs, known.q)
        if total * size == outputs and (size == known.head_dim or wide):
            heads = (known.heads, kv_heads, kv_heads)
            splits = (known.heads * size, kv_heads * size, kv_heads * size)
            how = f"{known.heads} heads of {size}"
            how += f", {kv_heads} of k and v" if kv_heads != known.heads else ""
            return Cut(splits, heads if per_head else None, f"fused qkv: {how}")
    return None


def _turns(
    own: str, owners: Sequence[nn.Module], known: Attention, outputs: int, per_head: bool
) -> Cut | None:
    """Where q, k and v take turns head by head."""
    for name in map(kind_of, owners[:2]):
        if not name.startswith(_TAKE_TURNS) or _contiguous(owners, known):
            continue
        count = 3 * known.heads if known.heads and known.kv_heads in (None, known.heads) else None
        if per_head and count and outputs % count == 0:
            return Cut(None, count, f"fused qkv: {known.heads} heads, each with its q, k and v")
        blocks = f"; heads={count} would give every head's q, k and v its own" if count else ""
        return Cut(
            None,
            None,
            f"fused qkv, left whole: in {name} q, k and v take turns head by head{blocks}",
        )
    # The attention of guided diffusion; its other order is a class without this word.
    children = [child for owner in owners[1:2] for child in owner.children()]
    if any(kind_of(child) == "QKVAttentionLegacy" for child in children):
        count = 3 * known.heads if known.heads and outputs % (3 * known.heads) == 0 else None
        how = f"heads={count}" if count else "heads= three times their number"
        if per_head and count:
            return Cut(None, count, f"fused qkv: {known.heads} heads, each with its q, k and v")
        return Cut(
            None,
            None,
            "fused qkv, left whole: in QKVAttentionLegacy q, k and v take turns head by head; "
            f"{how} would give every head's q, k and v its own",
        )
    if own == "linear_qkv":
        return Cut(
            None,
            None,
            "fused qkv, left whole: in Megatron's linear_qkv q, k and v take turns group by group",
        )
    return None


def _contiguous(owners: Sequence[nn.Module], known: Attention) -> bool:
    """The kinds of those classes with one k and v for all heads keep them behind q."""
    return known.kv_heads == 1 and not any(
        get(owner, "new_decoder_architecture") for owner in owners
    )


def _gated_query(
    own: str, owners: Sequence[nn.Module], known: Attention, outputs: int, per_head: bool
) -> Cut | None:
    """A query that brings its own gate: twice as many outputs as the output projection takes in."""
    if not _QUERY.match(own):
        return None
    size = known.head_dim
    by_heads = known.heads and size and outputs == 2 * known.heads * size
    if not (by_heads or (known.q and outputs == 2 * known.q)) or (known.q == outputs):
        return None
    heads = known.heads
    if heads and per_head and outputs % (2 * heads) == 0:
        return Cut(None, 2 * heads, f"{heads} heads, each with its query and its gate")
    return Cut(
        None,
        None,
        "q and its gate, left whole: they take turns head by head"
        + (f"; per_head=True splits {heads} heads of both" if heads else ""),
    )


def _separate(own: str, owners: Sequence[nn.Module], known: Attention, outputs: int) -> Cut:
    query = bool(_QUERY.match(own))
    latent = latent_query(sources_of(owners), outputs) if query else None
    if latent is not None:
        return Cut(None, latent[0], f"{latent[0]} query heads of {latent[1]}")
    count = known.heads if query else known.kv_heads or known.heads
    if count and outputs % count == 0 and known.head_dim in (None, outputs // count):
        return Cut(None, count, f"{count} heads of {outputs // count}")
    if count and known.head_dim and outputs % known.head_dim == 0 and not query:
        count = outputs // known.head_dim  # keys and values of a number of their own
        return Cut(None, count, f"{count} heads of {known.head_dim}")
    if count:
        return Cut(None, None, f"matrix, left whole: {outputs} outputs are not those of {known}")
    return Cut(None, None, "matrix, left whole: the number of heads is not known")


def _halves(own: str, known: Attention, outputs: int, inputs: int) -> bool:
    """Whether it is k and v alone, as in cross attention."""
    if known.head_dim is not None and (known.kv_heads or known.heads):
        return outputs == 2 * known.head_dim * (known.kv_heads or known.heads or 0)
    if own == "c_attn":
        return False
    each = known.kv_heads or known.heads
    return outputs == 2 * inputs or bool(each and outputs % (2 * each) == 0)


def _is_modulation(own: str, owners: Sequence[nn.Module]) -> bool:
    if _MODULATION.search(own):
        return True
    for owner in owners[1:3]:
        if _MODULATION.search(kind_of(owner)):
            return True
    # Lists have numbers for names, and thousands of them would be looked through for each member.
    named = [o for o in owners[1:4] if not next(iter(o._modules), "").isdigit()]
    return any(
        child is inside and _MODULATION.search(name)
        for owner in named
        for name, child in owner._modules.items()
        for inside in owners[:2]
    )


def recurrent(leaf: str, hidden: int, outputs: int) -> Cut | None:
    """The gates of an LSTM (4), a GRU (3) or a plain cell (1) follow one another in the rows."""
    stacked = leaf.startswith(("weight_ih", "weight_hh")) and outputs % hidden == 0
    gates = outputs // hidden if stacked else 1
    return Cut((hidden,) * gates, None, f"{gates} gates of {hidden}") if gates > 1 else None
