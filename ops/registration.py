"""How an operation over lists of tensors becomes registered operators.

``name`` is pure, ``name_`` writes its lists, ``name_members`` is what `torch.vmap` calls, and
``name_by_handle`` and ``name__by_handle`` find their lists outside of the graph.

Why operators at all: elementwise code stays PyTorch where Inductor compiles it well, and over lists
it does not. Written out per parameter, the step of 72 matrices took 60 s to compile on 2 CPU cores
(2026-11-22, torch 2.13.0: 38 s of it in the scheduler); as operators over lists it took 16 s, and
144 matrices took 19 s. The graph then grows with buckets and not with parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .handles import Handle, current_table, likes_of, texts

Operation = Callable[..., Any]
Lists = tuple[list[Tensor], ...]

# Not `custom_op`: its Python code around every call costs as much as the call itself (24 small
# matrices, 2 CPU cores: 40-60 us).
_library = Library("normuon_fn", "FRAGMENT")

_writes = [0]  # calls of operators in place


def writes() -> int:
    """How often an operator has begun to write: whether one did between two times."""
    return _writes[0]


def count_write(*lists: Sequence[Tensor]) -> None:
    """Says that an operator writes these now: before it does, because it may fail half-way.

    A backward pass that still needs the old values must say so.
    """
    _writes[0] += 1
    for written in lists:
        with suppress(RuntimeError):  # inference tensors count no versions
            torch.autograd.graph.increment_version(written)


def define(
    name: str,
    schema: str,
    function: Operation,
    fake: Operation,
    vmap: Operation | None = None,
) -> Any:
    """The registered operator, which is opaque to Inductor.

    ``vmap`` is its rule, as `torch.library.register_vmap` takes it.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    register_fake(f"normuon_fn::{name}", fake, lib=_library)
    if vmap is not None:
        register_vmap(f"normuon_fn::{name}", vmap, lib=_library)
    return getattr(torch.ops.normuon_fn, name).default


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New contiguous tensors with the same shapes and dtypes."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def register(
    name: str,
    schema: str,
    body: Operation,
    fake: Operation | None = None,
    *,
    check: Operation | None = None,
    writes: Sequence[str] = (),
) -> tuple[Operation, Operation]:
    """``(pure, in_place)``: two functions that take the same arguments and return the same results.

    Their lists may be handles: see handles.py.

    Args:
        schema: the pure operator's.
        body: ``body(into, *arguments)`` writes the new values into the lists ``into`` and returns
            the other result. The lists are new tensors or those of the arguments. Without
            ``writes`` it is ``body(*arguments)``.
        fake: the other result without values; ``None``: there is no other.
        check: raises for arguments that do not fit each other, before anything is written.
        writes: the names of the leading list arguments whose new values are the leading results.
            At most one other result follows.
    """
    count, check = len(writes), check or (lambda *arguments: None)

    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return body(*arguments)

    def write_new(*arguments: Any, checks: bool = True) -> tuple[Lists, Any]:
        if checks:
            check(*arguments)
        into = tuple(empty_like(x) for x in arguments[:count])
        return into, body(into, *arguments)

    def results(lists: Sequence[Any], rest: Any) -> Any:
        if rest is not None:
            return (*lists, rest)
        return tuple(lists) if count > 1 else lists[0]

    def pure_fake(*arguments: Any) -> Any:
        rest = fake and fake(*arguments)
        return results([empty_like(x) for x in arguments[:count]], rest) if writes else rest

    function = (lambda *arguments: results(*write_new(*arguments))) if writes else checked
    operator = define(name, schema, function, pure_fake)
    _register_vmap(name, schema, function, pure_fake)
    if not schema.startswith("(Tensor[]"):
        return operator, operator
    if not writes:
        reader = _define_by_handle(name, schema, body, fake)

        def reading(*arguments: Any) -> Any:
            if isinstance(arguments[0], Handle):
                return reader(arguments[0].graph.order, *texts(arguments))
            return operator(*arguments)

        return reading, reading

    def keep_new(into: Sequence[int], *arguments: Any) -> Any:
        lists, rest = write_new(*arguments, checks=False)
        current_table().lists.update(zip(into, lists, strict=True))
        return rest

    def write(*arguments: Any) -> Any:
        lists = arguments[:count]
        count_write(*lists)
        return body(lists, *arguments)

    def checked_write(*arguments: Any) -> Any:
        check(*arguments)
        return write(*arguments)

    takes = schema.partition(" -> ")[0]
    for letter, argument in zip("abcd", writes, strict=False):
        takes = takes.replace(f"Tensor[] {argument}", f"Tensor({letter}!)[] {argument}")
    gives = "Tensor" if fake else "()"
    mutating = define(f"{name}_", f"{takes} -> {gives}", checked_write, fake or (lambda *_: None))
    maker = _define_by_handle(name, schema, keep_new, fake, into=True)
    writer = _define_by_handle(f"{name}_", schema, write, fake)

    def pure(*arguments: Any) -> Any:
        if not isinstance(arguments[0], Handle):
            return operator(*arguments)
        graph = arguments[0].graph
        lists = [graph.add(old.likes) for old in arguments[:count]]
        into = [made.places[0].entry for made in lists]
        return results(lists, maker(graph.order, into, *texts(arguments)))

    def in_place(*arguments: Any) -> Any:
        if isinstance(arguments[0], Handle):
            rest = writer(arguments[0].graph.order, *texts(arguments))
        else:
            rest = mutating(*arguments)
        return results(arguments[:count], rest)

    return pure, in_place


def _define_by_handle(
    name: str, schema: str, function: Operation, fake: Operation | None, *, into: bool = False
) -> Any:
    """The operator whose lists are handles. ``into``: it also takes the entries of its results.

    It checks nothing: whoever runs the graph has compared the lists with what it was made for.
    """
    takes = schema.partition(" -> ")[0].removeprefix("(")
    lists = [part.strip().startswith("Tensor[]") for part in takes.split(",")]
    takes = takes.replace("Tensor[] ", "str ")
    first = "Tensor(z!) order, int[] into, " if into else "Tensor(z!) order, "

    def run(order: Tensor, *arguments: Any) -> Any:
        table, lead = current_table(), arguments[:into]
        rest = zip(arguments[into:], lists, strict=False)
        return function(*lead, *(table.find(x) if is_list else x for x, is_list in rest))

    def run_fake(order: Tensor, *arguments: Any) -> Any:
        if fake is None:
            return None
        rest = zip(arguments[into:], lists, strict=False)
        return fake(*(likes_of(x, order.device) if is_list else x for x, is_list in rest))

    gives = "Tensor" if fake else "()"
    return define(f"{name}_by_handle", f"({first}{takes} -> {gives}", run, run_fake)


# --- vmap ---


def _register_vmap(name: str, schema: str, function: Operation, fake: Operation) -> None:
    """The vmap rule of the operator ``name``: one node in the graph for all members.

    `torch.vmap` calls a rule with the tensors of all members at once. ``in_dims`` has the structure
    of the arguments and says which dimension of a tensor counts the members; ``None`` stands for a
    tensor that all members share, and for what is not a tensor. The rule returns the results of all
    members, and which dimension of each counts them.

    ``name`` itself has no dimension to spare for members, because the matrices in a list differ in
    shape. So the rule moves the members to the front and calls a second operator of the same
    schema, ``name_members``, whose tensors are all [members, ...] and which loops over the members
    inside.

    Under vmap in vmap the rule of ``name`` runs first, and so ``name_members`` is what the outer
    vmap meets. The rule of ``name_members`` makes one dimension of both: more members.
    """

    def for_all(*arguments: Any) -> Any:
        return _for_each_member(function, arguments)

    def fake_for_all(*arguments: Any) -> Any:
        return _for_each_member(fake, arguments)

    members = define(f"{name}_members", schema, for_all, fake_for_all)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = members(*_members_first(arguments, in_dims, info.batch_size))
        return results, _zero_dims(results)

    def rule_of_members(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        nested = _members_first(arguments, in_dims, info.batch_size)  # [outer, inner, ...]
        outer_and_inner = info.batch_size, _first_tensor(nested).shape[1]
        flat = tree_map_only(Tensor, lambda x: x.flatten(0, 1), nested)
        results = tree_map(lambda x: x.unflatten(0, outer_and_inner), members(*flat))
        return results, _zero_dims(results)

    register_vmap(f"normuon_fn::{name}", rule, lib=_library)
    register_vmap(f"normuon_fn::{name}_members", rule_of_members, lib=_library)


def _for_each_member(function: Operation, arguments: Sequence[Any]) -> Any:
    """``function`` on the arguments of each member; the results are stacked, members first."""

    def arguments_of(member: int) -> list[Any]:
        return [tree_map_only(Tensor, lambda x: x[member], argument) for argument in arguments]

    members = _first_tensor(arguments).shape[0]
    results = [function(*arguments_of(member)) for member in range(members)]
    return tree_map(lambda *parts: torch.stack(parts), *results)


def _members_first(arguments: Sequence[Any], in_dims: Sequence[Any], members: int) -> list[Any]:
    """Every tensor as [members, ...]: moved, or expanded where all members share it."""

    def moved(value: Any, dim: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [moved(x, d) for x, d in zip(value, dim, strict=True)]
        if not isinstance(value, Tensor):
            return value
        return value.expand(members, *value.shape) if dim is None else value.movedim(dim, 0)

    return [moved(value, dim) for value, dim in zip(arguments, in_dims, strict=True)]


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    return next(x for x in tree_leaves(arguments) if isinstance(x, Tensor))


def _zero_dims(results: Any) -> Any:
    """What a rule says of its results: the first dimension of each counts the members."""
    return tree_map(lambda _: 0, results)
