"""Projections of Mamba, gated linear attention and latent attention (MLA): where the parts are.

Every one of them reads its sizes from the mixer or its configuration and counts only if they add up
to the outputs. Sources: the forward of the class in transformers 5.23 or of its first publication.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .attributes import first, get, kind_of, sources_of

_INNER = ("intermediate_size", "d_inner", "inner_size", "d_ssm", "mamba_d_ssm", "inner_dim")
_STATE = ("ssm_state_size", "d_state", "state_size", "mamba_d_state", "ssm_state_dim")
_GROUPS = ("n_groups", "ngroups", "mamba_n_groups", "num_groups")
_SSM_HEADS = ("num_heads", "nheads", "n_mamba_heads", "mamba_num_heads", "mamba_n_heads", "n_heads")
_DT_RANK = ("time_step_rank", "dt_rank", "mamba_dt_rank")
_MAMBA = ("in_proj", "x_proj", "in_x", "in_proj_states")
_GATED_DELTA = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkvzba")
_LATENT_DOWN = ("kv_a_proj_with_mqa", "wkv_a", "kv_a_proj", "kv_a", "fused_qkv_a_proj_with_mqa")
_LATENT_UP = (
    "kv_b_proj", "wkv_b", "kv_b", "q_b_proj", "wq_b", "q_b", "kv_up_proj", "q_up_proj",
)  # fmt: skip
_SSM = re.compile(r"mamba|ssm|ssd|s6|state_?space", re.I)


class Cut(NamedTuple):
    """``splits`` and ``heads`` of a Route along the outputs, or neither, and why."""

    splits: tuple[int, ...] | None
    heads: int | tuple[int, ...] | None
    reason: str


def mixer(
    own: str, owners: Sequence[nn.Module], outputs: int, inputs: int, *, per_head: bool
) -> Cut | None:
    """How a projection of one of these mixers falls into parts; ``None``: it is none of them."""
    if own in _MAMBA:
        return _mamba(own, owners, sources_of(owners), outputs)
    if own in _GATED_DELTA:
        return _gated_delta(own, sources_of(owners), outputs, per_head)
    if own in _LATENT_DOWN:
        return _latent_down(sources_of(owners), outputs)
    if own in _LATENT_UP:
        return _latent_up(own, sources_of(owners), outputs, per_head)
    return None


def latent_query(sources: Sequence[Any], outputs: int) -> tuple[int, int] | None:
    """The heads, and their size, of an MLA's query that is one projection."""
    nope, rope = first(sources, ("qk_nope_head_dim",)), first(sources, ("qk_rope_head_dim",))
    size = first(sources, ("qk_head_dim", "q_head_dim")) or ((nope or 0) + (rope or 0))
    if not size or not (nope or rope) or outputs % size:
        return None
    return outputs // size, size


def _mamba(
    own: str, owners: Sequence[nn.Module], sources: Sequence[Any], outputs: int
) -> Cut | None:
    kinds = " ".join(map(kind_of, owners[:2]))
    # x_proj exists in a Mamba alone, where a dt_proj takes what it puts out.
    if not (_SSM.search(kinds) or get(owners[0], "dt_proj") is not None or _a_log(owners)):
        return None
    state = first(sources, _STATE)
    inner = first(sources[:2], ("d_inner",)) or first(sources, _INNER)
    taken = get(get(owners[1] if len(owners) > 1 else None, "out_proj"), "in_features")
    inner = taken if isinstance(taken, int) else inner
    if own == "x_proj":
        rank = first(sources, _DT_RANK)
        if rank and state and rank + 2 * state == outputs:
            return Cut((rank, state, state), None, f"dt of {rank}, B and C of {state}")
        return Cut(None, None, f"dt, B and C, left whole: {_say(rank, state)} is not {outputs}")
    if inner and outputs == 2 * inner:
        if "Zamba" in kinds and "Zamba2" not in kinds:
            return Cut(
                None, None, f"x and gate, left whole: in {kinds.split()[-1]} they take turns"
            )
        return Cut((inner, inner), None, f"x and gate of {inner}")
    groups, heads = first(sources, _GROUPS) or 1, first(sources, _SSM_HEADS)
    if inner and state and heads:
        for g in dict.fromkeys((groups, 1)):
            parts = (inner, inner, g * state, g * state, heads)
            if sum(parts) == outputs:
                return Cut(
                    parts, None, f"gate and x of {inner}, B and C of {g * state}, dt of {heads}"
                )
    return Cut(
        None,
        None,
        f"in_proj of a state space, left whole: its sizes do not add up to {outputs}; give splits=",
    )


def _a_log(owners: Sequence[nn.Module]) -> bool:
    return any(get(owner, "A_log") is not None for owner in owners[:2])


def _gated_delta(own: str, sources: Sequence[Any], outputs: int, per_head: bool) -> Cut:
    """Qwen3-Next: per key head q, k and the values and gates (or b and a) of its value heads."""
    n = first(sources, ("num_k_heads", "linear_num_key_heads"))
    v = first(sources, ("num_v_heads", "linear_num_value_heads"))
    dk = first(sources, ("head_k_dim", "linear_key_head_dim"))
    dv = first(sources, ("head_v_dim", "linear_value_head_dim"))
    what = "q, k, v and z" if "qkvz" in own else "b and a"
    one: tuple[int, ...]
    if n and v and v % n == 0:
        each = v // n
        one = (dk, dk, each * dv, each * dv) if "qkvz" in own and dk and dv else (each, each)
        if per_head and sum(one) * n == outputs:
            if min(one) == 1:  # a row of its own would be a vector
                return Cut(None, n, f"{what} of {n} key heads, each head's together")
            return Cut(one * n, None, f"{what} of each of {n} key heads")
    return Cut(
        None,
        None,
        f"{what}, left whole: they take turns key head by key head"
        + (f"; per_head=True splits the {n} heads" if n else ""),
    )


def _latent_down(sources: Sequence[Any], outputs: int) -> Cut:
    rank, rope = first(sources, ("kv_lora_rank",)), first(sources, ("qk_rope_head_dim",))
    q_rank = first(sources, ("q_lora_rank",))
    if rank and rope and rank + rope == outputs:
        return Cut((rank, rope), None, f"latent of {rank}, rotary key of {rope}")
    if rank and rope and q_rank and q_rank + rank + rope == outputs:
        return Cut(
            (q_rank, rank, rope), None, f"latents of {q_rank} and {rank}, rotary key of {rope}"
        )
    if rank == outputs:
        return Cut(None, None, f"matrix: a latent of {rank}")
    return Cut(
        None, None, f"latent and rotary key, left whole: {_say(rank, rope)} is not {outputs}"
    )


def _latent_up(own: str, sources: Sequence[Any], outputs: int, per_head: bool) -> Cut | None:
    if own.startswith(("q", "wq")):
        found = latent_query(sources, outputs)
        if not per_head:
            return None
        if found is None:
            return Cut(None, None, "matrix, left whole: the size of a query head is not known")
        return Cut(None, found[0], f"{found[0]} query heads of {found[1]}")
    nope, value = first(sources, ("qk_nope_head_dim",)), first(sources, ("v_head_dim",))
    if not nope or not value or outputs % (nope + value):
        return Cut(
            None, None, "k and v of every head, left whole: the sizes of a head are not known"
        )
    count = outputs // (nope + value)
    if not per_head:
        return Cut(
            None,
            None,
            "k and v, left whole: they take turns head by head; per_head=True splits "
            f"{count} heads",
        )
    if nope == value:
        return Cut(None, 2 * count, f"k and v of each of {count} heads, {nope} both")
    return Cut((nope, value) * count, None, f"k of {nope} and v of {value} of {count} heads")


def _say(*sizes: int | None) -> str:
    return " + ".join("an unknown size" if size is None else str(size) for size in sizes)
