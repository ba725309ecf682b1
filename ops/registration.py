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
from torch.library import custom_op
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Op = Callable[..., Any]


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def stack_shape(tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    """[n, rows, cols] of a list of matrices [rows, cols] and stacks of matrices [b, rows, cols]."""
    return sum(x.shape[0] if x.ndim == 3 else 1 for x in tensors), tensors[0].shape[-2], tensors[0].shape[-1]


def register(name: str, schema: str, reference: Op, fake: Op, *, writes: Sequence[str] = ()) -> tuple[Op, Op]:
    """``(pure, in_place)``: the same arguments, the same results.

    ``schema`` is that of the pure operator. ``writes`` names its leading list arguments, whose new values are its leading
    results; the in-place operator writes them and returns the rest, to which its Python wrapper adds the lists themselves.
    """

    def body(*arguments: Any) -> Any:
        return tree_map(lambda x: x.contiguous(), reference(*arguments))

    pure = custom_op(f"normuon_fn::{name}", body, mutates_args=(), schema=schema)
    pure.register_fake(fake)

    def each(function: Op, arguments: Sequence[Any]) -> Any:
        """``function`` of every member's arguments, the results stacked along a new first dimension."""
        count = next(x for x in tree_leaves(arguments) if isinstance(x, Tensor)).shape[0]

        def member(i: int) -> list[Any]:
            return [tree_map_only(Tensor, lambda x: x[i], argument) for argument in arguments]

        return tree_map(lambda *results: torch.stack(results), *(function(*member(i)) for i in range(count)))

    # One node for all members, as the pure operator is one for all parameters.
    members = custom_op(
        f"normuon_fn::{name}_members", lambda *arguments: each(reference, arguments), mutates_args=(), schema=schema
    )
    members.register_fake(lambda *arguments: each(fake, arguments))

    def vmap_rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def first(value: Any, dim: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [first(x, d) for x, d in zip(value, dim, strict=True)]
            if not isinstance(value, Tensor):
                return value
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        result = members(*(first(value, dim) for value, dim in zip(arguments, in_dims, strict=True)))
        return result, tree_map(lambda _: 0, result)

    pure.register_vmap(vmap_rule)
    if not writes:
        return pure, pure

    count = len(writes)
    takes, gives = schema.split(" -> ")
    for letter, argument in zip("abc", writes, strict=False):
        takes = takes.replace(f"Tensor[] {argument}", f"Tensor({letter}!)[] {argument}")
    rest = [kind.strip() for kind in gives.strip("()").split(",")][count:]
    gives = f"({', '.join(rest)})" if len(rest) != 1 else rest[0]

    def write(*arguments: Any) -> Any:
        results = reference(*arguments)
        lists = results[:count] if count > 1 or rest else (results,)
        for targets, sources in zip(arguments, lists, strict=False):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        return None if not rest else results[count] if len(rest) == 1 else results[count:]

    def write_fake(*arguments: Any) -> Any:
        results = fake(*arguments)
        return None if not rest else results[count] if len(rest) == 1 else results[count:]

    mutating = custom_op(f"normuon_fn::{name}_", write, mutates_args=tuple(writes), schema=f"{takes} -> {gives}")
    mutating.register_fake(write_fake)

    def in_place(*arguments: Any) -> Any:
        others = mutating(*arguments)
        lists: tuple[list[Tensor], ...] = tuple(arguments[:count])
        if not rest:
            return lists if count > 1 else lists[0]
        return (*lists, others) if len(rest) == 1 else (*lists, *others)

    return pure, in_place
