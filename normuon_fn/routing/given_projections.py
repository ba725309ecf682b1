"""Whether what a user says of the projections of queries and keys can be read, and all of it is."""

from __future__ import annotations

from collections.abc import Mapping

_EXCLUDE = {  # roles, and those which would be left unread beside them
    "qkv": ("q", "gated_q", "k", "kv", "latent"), "q": ("gated_q",), "kv": ("k",),
    "latent": ("k", "kv"),
}  # fmt: skip


def check_projections(given: object, layers: Mapping[str, object]) -> None:
    """Refuses projections of another form, or of a layer that is none of ``layers``.

    Raises:
        TypeError, ValueError: naming the layer and what to write.
    """
    form = "{'layers.0.attn': {'q': 'layers.0.attn.wq', 'k': 'layers.0.attn.wk'}}"
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(
            "projections: expected None or a dict, name of the module of an attention -> role -> "
            f"name of a weight, got {type(given).__name__}; write projections={form}"
        )
    for layer, roles in given.items():
        if not isinstance(roles, Mapping):
            raise TypeError(
                f"projections[{layer!r}]: expected a dict, role -> name of a weight, got "
                f"{type(roles).__name__}; write projections={form}"
            )
        for role, name in roles.items():
            if not isinstance(role, str) or not isinstance(name, str):
                raise TypeError(
                    f"projections[{layer!r}]: expected a role and the name of a weight, got "
                    f"{role!r} and a {type(name).__name__}; write projections={form}"
                )
        _check_roles(layer, roles)
    others = [layer for layer in given if layer not in layers]
    if others:
        raise ValueError(
            f"projections: expected names of max_logits, {list(layers)[:8]}, got {others[:8]}, of "
            "which no maximum is given"
        )


def _check_roles(layer: str, roles: Mapping[str, str]) -> None:
    """That the roles make one query and one key, and none of them would be left unread."""
    if not roles:
        raise ValueError(
            f"projections[{layer!r}]: expected the names of a query and a key, got none; leave it "
            "out where the names tell"
        )
    for main, others in _EXCLUDE.items():
        found = [role for role in others if role in roles]
        if main in roles and found:
            raise ValueError(
                f"projections[{layer!r}]: expected one query and one key, got {found!r} and "
                f"{main!r}; leave one of them out"
            )
    if "latent_down" in roles and "latent" not in roles:
        raise ValueError(
            f"projections[{layer!r}]: 'latent_down' goes with 'latent', the weight behind it; got "
            f"{list(roles)!r}"
        )
