"""Which rows of which parameters make the queries and keys of an attention, head by head.

names, shapes and routes of one attention -> the role of each projection -> `Rows`

It looks at names alone and uses no regular expression, so that a graph can be traced through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .routes import Route

ROLES = {
    "q": ("q_proj", "q", "wq", "query", "to_q", "w_q", "q_lin", "linear_q", "query_proj", "c_q",
          "Wq", "q_b_proj", "wq_b", "q_b", "q_up_proj"),
    "gated_q": (),  # every query brings its gate, behind it; also by the reason of its route
    "k": ("k_proj", "k", "wk", "key", "to_k", "w_k", "k_lin", "linear_k", "key_proj", "c_k", "Wk"),
    "qkv": ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj", "to_qkv",
            "att_proj", "W_pack", "wqkv", "qkv_lin"),
    "kv": ("kv", "kv_proj", "to_kv", "wkv", "key_value", "kv_lin", "linear_kv"),
    "latent": ("kv_b_proj", "wkv_b", "kv_b", "kv_up_proj"),  # of MLA: k and v of every head
    "latent_down": ("kv_a_proj_with_mqa", "wkv_a", "kv_a_proj", "kv_a", "kv_down_proj"),
}  # fmt: skip
# A norm of every query or key takes back what is done to the scale of its projection.
_NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm", "q_ln",
          "k_ln", "norm_q", "norm_k")  # fmt: skip


class Field(NamedTuple):
    """Rows that every head has, beside each other in its block."""

    offset: int
    size: int
    kind: str  # "q", "k", or "rope": a query's rows that meet a key which all heads share


class Rows(NamedTuple):
    """``heads`` blocks of ``each`` rows (or columns), one behind the other from ``start`` on."""

    start: int
    heads: int  # of queries, or of keys
    each: int
    fields: tuple[Field, ...]


class Projection(NamedTuple):
    """The queries or keys (or both) in one weight and in its bias."""

    names: tuple[str, ...]
    dim: int  # of the weight's outputs; a bias has only these
    rows: tuple[Rows, ...]


class Known(NamedTuple):
    """What is known of a parameter."""

    name: str
    shape: tuple[int, ...]  # of all of it, not of a shard
    route: Route
    reason: str = ""  # for the route


def projections_of(
    layer: str, heads: int, known: Sequence[Known], given: Mapping[str, str] | None = None
) -> list[Projection]:
    """The projections of the queries and keys of the attention ``layer``.

    Args:
        heads: of queries.
        known: all parameters.
        given: role -> name of a weight, where names do not tell: see `ROLES`.

    Raises:
        ValueError: they cannot be told, naming the layer or the parameter and what to write.
    """
    found = _by_role(layer, known, given or {})
    if "gated_q" in found:
        found["q"] = found["gated_q"]
    if "qkv" in found:
        return [_fused(layer, heads, known, found["qkv"])]
    if "q" not in found or not found.keys() & {"k", "kv", "latent"}:
        seen = [each.name for each in known if _inside(layer, each.name)][:8]
        raise ValueError(
            f"max_logits[{layer!r}]: expected parameters of a query and a key there, found {seen}; "
            f"write projections={{{layer!r}: {{'q': ..., 'k': ...}}}} with the names of weights"
        )
    query = found["q"]
    gated = "gated_q" in found or "and its gate" in query.reason
    if "latent" in found:
        return _latent(layer, heads, known, found)
    size = _outputs(query)
    twice = 2 if gated else 1
    each = _divided(layer, query, size, twice * heads)
    field = Field(0, each, "q")
    rows = Rows(0, heads, twice * each, (field,))
    if "kv" in found:
        key = found["kv"]
        if key.route.splits is None or len(key.route.splits) != 2:
            raise ValueError(_splits(key, "k and v"))
        length = key.route.splits[0]
    else:
        key = found["k"]
        length = _outputs(key)
    of_keys = _of_keys(layer, heads, key, 0, length, each)
    return [_projection(known, query, (rows,)), _projection(known, key, (of_keys,))]


def _by_role(layer: str, known: Sequence[Known], given: Mapping[str, str]) -> dict[str, Known]:
    by_name = {each.name: each for each in known}
    found: dict[str, Known] = {}
    for role, name in given.items():
        if role not in ROLES or name not in by_name:
            raise ValueError(
                f"projections[{layer!r}]: expected one of {sorted(ROLES)} and the name of a "
                f"parameter, got {role!r}: {name!r}"
            )
        found[role] = by_name[name]
    if given:
        return found
    for each in known:
        if not _inside(layer, each.name):
            continue
        own = _own(each.name)
        if own in _NORMS:
            raise ValueError(
                f"max_logits[{layer!r}]: {each.name!r} normalizes every query or key, which takes "
                "back what is done to the scale of its projection; leave this layer out"
            )
        for role, names in ROLES.items():
            if own in names and len(each.shape) != 1:
                if role in found:
                    raise ValueError(
                        f"max_logits[{layer!r}]: expected one attention, got both "
                        f"{found[role].name!r} and {each.name!r}; write the name of one of them"
                    )
                found[role] = each
    return found


def _fused(layer: str, heads: int, known: Sequence[Known], weight: Known) -> Projection:
    splits = weight.route.splits
    if splits is None and weight.route.heads == 3 * heads:  # q, k and v take turns head by head
        each = _divided(layer, weight, _outputs(weight), 3 * heads)
        fields = (Field(0, each, "q"), Field(each, each, "k"))
        return _projection(known, weight, (Rows(0, heads, 3 * each, fields),))
    if splits is None or len(splits) != 3:
        raise ValueError(_splits(weight, "q, k and v"))
    each = _divided(layer, weight, splits[0], heads)
    queries = Rows(0, heads, each, (Field(0, each, "q"),))
    keys = _of_keys(layer, heads, weight, splits[0], splits[1], each)
    return _projection(known, weight, (queries, keys))


def _latent(
    layer: str, heads: int, known: Sequence[Known], found: Mapping[str, Known]
) -> list[Projection]:
    """MLA. Every query is [nope, rope], every key [nope, the one rotary key], beside its value."""
    query, latent, down = found["q"], found["latent"], found.get("latent_down")
    if down is None:
        raise ValueError(
            f"max_logits[{layer!r}]: the size of its rotary key is not known without the projection"
            f" to the latent; write projections={{{layer!r}: {{'q': ..., 'latent': ..., "
            "'latent_down': ...}}"
        )
    rank = latent.shape[1 - _dim(latent)]
    rope = _outputs(down) - rank
    each = _divided(layer, query, _outputs(query), heads)
    block = _divided(layer, latent, _outputs(latent), heads)
    nope = each - rope
    if rope < 0 or nope < 1 or nope >= block:
        raise ValueError(
            f"max_logits[{layer!r}]: {heads} heads do not fit {query.name!r} {query.shape}, "
            f"{latent.name!r} {latent.shape} and {down.name!r} {down.shape}: a query would be "
            f"{nope} + {rope} of {each}, a key and its value {block}"
        )
    fields = (Field(0, nope, "q"), Field(nope, rope, "rope")) if rope else (Field(0, nope, "q"),)
    return [
        _projection(known, query, (Rows(0, heads, each, fields),)),
        _projection(known, latent, (Rows(0, heads, block, (Field(0, nope, "k"),)),)),
    ]


def _of_keys(layer: str, heads: int, weight: Known, start: int, length: int, each: int) -> Rows:
    """The keys in a projection; every one of them serves as many queries as the others."""
    count, told = length // each, weight.route.heads
    told = told[start > 0] if isinstance(told, tuple) else told  # of a fused one q comes before k
    if length % each or count < 1 or heads % count or told not in (None, count):
        known = f", and its route has {told} heads" if told not in (None, count) else ""
        raise ValueError(
            f"max_logits[{layer!r}]: expected one entry per head of the queries, got {heads}, which"
            f" makes heads of {each}; the {length} outputs of the keys in {weight.name!r} are not "
            f"heads of that size{known}"
        )
    return Rows(start, count, each, (Field(0, each, "k"),))


def _divided(layer: str, weight: Known, size: int, heads: int) -> int:
    told = weight.route.heads
    told = told[0] if isinstance(told, tuple) else told
    if size % heads or told not in (None, heads):
        known = (
            f"its route has {told} heads" if told not in (None, heads) else f"it has {size} rows"
        )
        raise ValueError(
            f"max_logits[{layer!r}]: expected one entry per head of the queries; {heads} heads do "
            f"not fit {weight.name!r}: {known}"
        )
    return size // heads


def _projection(known: Sequence[Known], weight: Known, rows: tuple[Rows, ...]) -> Projection:
    if not _is_matrix(weight):
        raise ValueError(
            f"params[{weight.name!r}]: expected a matrix, got shape {weight.shape}; clip each "
            "attention as a parameter of its own"
        )
    own = weight.name
    bias = f"{own[: -len('weight')]}bias" if own.endswith("weight") else ""
    parts = [weight, *(each for each in known if each.name == bias)]
    for each in parts:
        if each.route.algorithm == "frozen":
            raise ValueError(
                f"params[{each.name!r}]: is frozen, and clipping would change it; leave its layer "
                "out"
            )
    return Projection(tuple(each.name for each in parts), _dim(weight), rows)


def _splits(weight: Known, what: str) -> str:
    return (
        f"params[{weight.name!r}]: is {what} in one, and where each begins is not known; write its "
        f"route with their sizes, {{{weight.name!r}: nm.Route(splits=(...))}}"
        + ("; where they take turns head by head, Route(heads=3 * heads)" if "q" in what else "")
    )


def _dim(weight: Known) -> int:
    """The dimension of the outputs."""
    return 1 if weight.route.transposed else weight.route.dim


def _outputs(weight: Known) -> int:
    if not _is_matrix(weight):
        raise ValueError(f"params[{weight.name!r}]: expected a matrix, got shape {weight.shape}")
    return weight.shape[_dim(weight)]


def _is_matrix(weight: Known) -> bool:
    """A convolution, whose first dimension is its outputs, is one too."""
    return len(weight.shape) == 2 or (weight.route.flatten and not weight.route.transposed)


def _inside(layer: str, name: str) -> bool:
    return not layer or name.startswith(f"{layer}.")


def _own(name: str) -> str:
    """The name of a parameter's module, or of what it is called itself."""
    parts = name.split(".")
    if parts[-1] in ("weight", "bias") and len(parts) > 1:
        return parts[-2]
    for end in ("_weight", "_bias"):
        if parts[-1].endswith(end):
            return parts[-1][: -len(end)]
    return parts[-1]
