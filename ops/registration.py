"""How an op over lists of tensors becomes two registered operators: ``name``, pure, and ``name_``, which writes its lists.

Why operators at all: elementwise code stays PyTorch where Inductor compiles it well, and over lists it does not. Written out
per parameter, the step of 72 matrices took 60 s to compile on 2 CPU cores (2026-11-22, torch 2.13.0: 38 s of it in the
scheduler); as list ops 16 s, and 144 matrices 19 s. The graph then grows with buckets and not with parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Op = Callable[..., Any]
Lists = tuple[list[Tensor], ...]

# Not `custom_op`: its Python around every call costs as much as the call (24 small matrices, 2 CPU cores: 40-60 us).
_library = Library("normuon_fn", "FRAGMENT")


def define(name: str, schema: str, function: Op, fake: Op, vmap: Op | None = None) -> Any:
    """The registered operator, opaque to Inductor. ``vmap``: the rule, as of `torch.library.register_vmap`."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    register_fake(f"normuon_fn::{name}", fake, lib=_library)
    if vmap is not None:
        register_vmap(f"normuon_fn::{name}", vmap, lib=_library)
    return getattr(torch.ops.normuon_fn, name).default


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def register(
    name: str, schema: str, body: Op, fake: Op, *, writes: Sequence[str] = ()
) -> tuple[Op, Op]:
    """``(pure, in_place)``: the same arguments, the same results.

    ``schema`` is that of the pure operator. ``writes`` names its leading list arguments, whose new values are its leading
    results; at most one other result follows. ``body(into, *arguments)`` writes the new values into the lists ``into``: new
    tensors, or those of the arguments; without ``writes`` it is ``body(*arguments)``. It returns the other result.
    """
    count = len(writes)

    def new(*arguments: Any) -> Any:
        if not writes:
            return body(*arguments)
        into = tuple(empty_like(x) for x in arguments[:count])
        rest = body(into, *arguments)
        return into[0] if count == 1 and rest is None else into if rest is None else (*into, rest)

    pure = define(name, schema, new, fake)
    _register_members(name, schema, new, fake)
    if not writes:
        return pure, pure

    takes, gives = schema.split(" -> ")
    for letter, argument in zip("abcd", writes, strict=False):
        takes = takes.replace(f"Tensor[] {argument}", f"Tensor({letter}!)[] {argument}")
    has_rest = len(gives.split(",")) > count

    def write(*arguments: Any) -> Any:
        lists = arguments[:count]
        rest = body(lists, *arguments)
        for written in lists:
            torch.autograd.graph.increment_version(
                written
            )  # a backward that still needs the old values must say so
        return rest

    fake_rest = (
        (lambda *arguments: fake(*arguments)[count]) if has_rest else (lambda *arguments: None)
    )
    mutating = define(f"{name}_", f"{takes} -> {'Tensor' if has_rest else '()'}", write, fake_rest)

    def in_place(*arguments: Any) -> Any:
        rest = mutating(*arguments)
        lists = arguments[:count]
        return (*lists, rest) if has_rest else lists if count > 1 else lists[0]

    return pure, in_place


def _register_members(name: str, schema: str, function: Op, fake: Op) -> None:
    """Under vmap: one node for all members, as the pure operator is one for all parameters; vmap in vmap is more members."""

    def each(function: Op, arguments: Sequence[Any]) -> Any:
        """``function`` of every member's arguments, the results stacked along a new first dimension."""
        size = next(x for x in tree_leaves(arguments) if isinstance(x, Tensor)).shape[0]

        def member(i: int) -> list[Any]:
            return [tree_map_only(Tensor, lambda x: x[i], argument) for argument in arguments]

        return tree_map(
            lambda *results: torch.stack(results), *(function(*member(i)) for i in range(size))
        )

    members = define(
        f"{name}_members",
        schema,
        lambda *arguments: each(function, arguments),
        lambda *arguments: each(fake, arguments),
    )

    def first(value: Any, dim: Any, size: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [first(x, d, size) for x, d in zip(value, dim, strict=True)]
        if not isinstance(value, Tensor):
            return value
        return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)

    def of_members(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        given = (
            first(value, dim, info.batch_size)
            for value, dim in zip(arguments, in_dims, strict=True)
        )
        result = members(*given)
        return result, tree_map(lambda _: 0, result)

    def of_members_of_members(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[Any, Any]:
        given = [
            first(value, dim, info.batch_size)
            for value, dim in zip(arguments, in_dims, strict=True)
        ]
        inner = next(x for x in tree_leaves(given) if isinstance(x, Tensor)).shape[1]
        result = members(*tree_map_only(Tensor, lambda x: x.flatten(0, 1), given))
        result = tree_map(lambda x: x.unflatten(0, (info.batch_size, inner)), result)
        return result, tree_map(lambda _: 0, result)

    register_vmap(f"normuon_fn::{name}", of_members, lib=_library)
    register_vmap(f"normuon_fn::{name}_members", of_members_of_members, lib=_library)
