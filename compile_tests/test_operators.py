"""Every operator is what its registration says, pure and in place.

That is: schema, aliasing, fake kernel, autograd, AOT dispatch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from compile_tests import graphs
from normuon_fn.ops import adamw_reference, lists, reference
from normuon_fn.ops.handles import Graph, Like, Table, lists_outside
from normuon_fn.ops.repack import Boxes

ROWS, COLS = 4, 6
PRODUCTS = {"symmetric_matmul", "symmetric_addmm", "addmm"}  # on stacks: tests/ops/test_products.py
STAGING = {name for name in graphs.registered_ops() if name.startswith("stage_")}  # test_staging.py
REGISTERED = sorted(graphs.registered_ops() - PRODUCTS - STAGING)
BY_HANDLE = [name for name in REGISTERED if name.endswith("_by_handle")]
NAMES = [name for name in REGISTERED if name not in BY_HANDLE]
SKIPS = ("advance", "advance_coded", "apply", "apply_wide", "adamw", "adamw_wide")
BASE = [name for name in NAMES if not name.endswith("_members")]


def matrices(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three matrices, each one of a kind."""
    if kind == "views":  # a column slice and a transpose: no two strides alike
        made = [
            torch.randn(ROWS, 3 * COLS)[:, COLS : 2 * COLS],
            torch.randn(COLS, ROWS).mT,
            torch.randn(2 * ROWS, COLS)[::2],
        ]
    elif kind == "stacks":  # two in a stack of heads cut along the columns, one of its own
        made = [torch.randn(ROWS, 2, COLS).transpose(0, 1), torch.randn(ROWS, COLS)]
    else:
        made = [torch.randn(ROWS, COLS) for _ in range(3)]
    return [x.to(dtype, memory_format=torch.preserve_format) for x in made]


def arguments(name: str, kind: str, skip: Tensor | None) -> tuple[Any, ...]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    params, grads, first = matrices(kind, dtype), matrices(kind, dtype), matrices(kind)
    second = [x.square() for x in matrices(kind)]
    update, scale = torch.randn(3, ROWS, COLS), torch.randn(3, ROWS, 1)
    rate = torch.tensor(0.1)
    betas = (
        torch.tensor(0.9),
        torch.tensor(0.95),
        torch.tensor(1e-8),
        torch.tensor(0.2),
        torch.tensor(0.1),
    )
    sizes = [1, len(first) - 1]
    rests = [(100 * x).to(torch.int16, memory_format=torch.preserve_format) for x in matrices(kind)]
    ones = torch.ones(3)
    codes = [
        (30 * x).to(torch.int8, memory_format=torch.preserve_format).clamp(-100, 100) for x in first
    ]
    scales = [torch.full((*x.shape[:-1], 1), 130, dtype=torch.uint8) for x in first]
    given: dict[str, tuple[Any, ...]] = {
        "advance": (first, grads, rate, skip, sizes, "ema", False),
        "lookahead": (first, grads, rate, sizes, "sum", True),
        "measure": (first, sizes),
        "largest": (grads, sizes),
        "gather": (
            first,
            grads,
            rate,
            ones,
            0.5 * ones,
            sizes,
            "ema",
            True,
            True,
            torch.float16,
            [False] * len(sizes),
        ),
        "advance_coded": (codes, scales, grads, rate, skip, sizes, "ema", True),
        "lookahead_coded": (codes, scales, grads, rate, sizes, "sum", True),
        "gather_coded": (
            codes,
            scales,
            grads,
            rate,
            ones,
            0.5 * ones,
            sizes,
            "ema",
            True,
            True,
            torch.float16,
            [False] * len(sizes),
        ),
        "apply": (params, update, scale, rate, skip, True),
        "apply_wide": (params, rests, update, scale, rate, skip, True),
        "unstack": (first, update),
        "orientation": (update @ update.mT,),
        "orient": (
            update @ scale.expand_as(update).mT,
            torch.tensor([0, 1, 2], dtype=torch.int32),
            dtype,
            None,
            None,
        ),
        "stack": (first,),
        "all_finite": (first,),
        "repack": ([update, scale], *repacked()),
        "reinterpret": (first[0], torch.int32),
        "adamw_flags": (first, second, grads, *betas),
        "adamw": (params, first, second, grads, rate, rate, *betas, skip),
        "lion": (params, first, grads, rate, rate, *betas[:2], skip),
        "lion_wide": (params, rests, first, grads, rate, rate, *betas[:2], skip),
        "adamw_wide": (params, rests, first, second, grads, rate, rate, *betas, skip),
    }
    return given[name.removesuffix("_members").removesuffix("_").removesuffix("_measured")]


def repacked() -> tuple[Any, ...]:
    """A part of the first source, and all of the second."""
    boxes = Boxes()
    boxes.add(0, 0, 8, 0, (3, ROWS, 8), (4 * ROWS * COLS, 4 * COLS), (8 * ROWS, 8))
    boxes.row(1, 1, 0, 0, 12 * ROWS)
    moves = boxes.moves(torch.device("cpu"), [6 * ROWS], torch.int32, [3 * ROWS], torch.float32)
    return (
        moves.table,
        list(moves.parts),
        list(moves.narrow),
        moves.dtype,
        list(moves.wide),
        moves.wide_dtype,
    )


def check(name: str, given: tuple[Any, ...]) -> None:
    outcome = torch.library.opcheck(getattr(torch.ops.normuon_fn, name).default, given)
    assert set(outcome) >= {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["bfloat16", "views", "stacks"])
@pytest.mark.parametrize("name", BASE)
def test_opcheck_passes(name: str, kind: str) -> None:
    check(name, arguments(name, kind, torch.tensor(kind == "views")))


@pytest.mark.parametrize("name", [name for name in BASE if name.rstrip("_") in SKIPS])
def test_opcheck_passes_where_nothing_can_be_skipped(name: str) -> None:
    check(name, arguments(name, "contiguous", None))


@pytest.mark.parametrize("name", ["apply", "apply_", "adamw", "adamw_"])
def test_opcheck_passes_where_parameters_are_rounded_by_chance(name: str) -> None:
    chances = (torch.tensor(3, dtype=torch.int32), [1, 2**31 - 1, 7])
    check(name, (*arguments(name, "bfloat16", torch.tensor(False)), *chances))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_members")])
def test_opcheck_passes_for_the_operators_that_vmap_calls(name: str) -> None:
    check(
        name,
        tree_map_only(
            Tensor,
            lambda x: torch.stack([x, x + x if x.ndim else x]),  # a beta of 1.8 makes NaN
            arguments(name, "bfloat16", torch.tensor(True)),
        ),
    )


@pytest.mark.parametrize("name", [name for name in BASE if not name.endswith("_")])
def test_no_operator_waits_for_the_device_inside(name: str) -> None:
    given = arguments(name, "stacks", torch.tensor(True))
    twin = getattr(adamw_reference if name.startswith("adamw") else reference, name, None)
    with graphs.no_host_sync():
        if twin is None:  # stack, unstack and all_finite: Python around other operators
            getattr(torch.ops.normuon_fn, name)(*given)
        else:
            twin(*([lists.unstack] if name in ("advance", "apply", "apply_wide") else []), *given)


@pytest.mark.parametrize("kind", ["bfloat16", "views", "stacks"])
@pytest.mark.parametrize("name", BY_HANDLE)
def test_an_operator_by_handle_is_the_operator_over_the_same_lists(name: str, kind: str) -> None:
    base = name.removesuffix("_by_handle")
    given, expected = (arguments(base, kind, torch.tensor(False)) for _ in range(2))
    lists = [x for x in given if is_list(x)]
    graph, order = Graph(torch.zeros(())), torch.zeros(())
    texts = [
        graph.add([Like(x.shape, x.dtype, x.device) for x in each]).text if is_list(each) else each
        for each in given
    ]
    operator, plain = (getattr(torch.ops.normuon_fn, each).default for each in (name, base))
    makes = operator._schema.arguments[1].name == "into"
    results = [str(result.type) for result in plain._schema.returns].count("List[Tensor]")
    into = [list(range(7, 7 + results))] if makes else []

    with FakeTensorMode() as mode:  # what it returns follows from the texts alone
        faked = operator(*tree_map_only(Tensor, mode.from_tensor, [order, *into, *texts]))
    table = Table(lambda entry: lists[entry])
    with lists_outside(table):
        rest = operator(order, *into, *texts)
    assert (faked is None) == (rest is None)
    assert rest is None or (faked.shape, faked.dtype) == (rest.shape, rest.dtype)

    leaves = [x for x in tree_leaves(plain(*expected)) if isinstance(x, Tensor)]
    if base.endswith("_"):  # the lists that it was given are written
        assert same(tree_leaves(lists), tree_leaves([x for x in expected if is_list(x)]))
        assert rest is None or same([rest], leaves)
    else:
        made = tree_leaves([table.lists[7 + k] for k in range(results)])
        assert same([*made, *([] if rest is None else [rest])], leaves)


def is_list(x: Any) -> bool:
    return isinstance(x, list) and isinstance(x[0], Tensor)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected)) and len(found) == len(expected) > 0


@pytest.mark.parametrize("name", [name for name in BASE if f"{name}_" in BASE])
@pytest.mark.parametrize("kind", ["contiguous", "bfloat16", "views", "stacks"])
@pytest.mark.parametrize("skip", [None, False, True])
def test_in_place_equals_pure_bit_for_bit_and_skip_keeps_every_bit(
    name: str, kind: str, skip: bool | None
) -> None:
    given = arguments(name, kind, None if skip is None else torch.tensor(skip))
    schema = getattr(torch.ops.normuon_fn, f"{name}_").default._schema
    writes = [k for k, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    before = [[x.clone() for x in given[k]] for k in writes]
    pure = getattr(torch.ops.normuon_fn, name)(*given)
    lists = (
        [pure] if isinstance(pure[0], Tensor) else [part for part in pure if isinstance(part, list)]
    )
    assert all(
        torch.equal(a, b)
        for k, kept in zip(writes, before, strict=True)
        for a, b in zip(given[k], kept, strict=True)
    )
    getattr(torch.ops.normuon_fn, f"{name}_")(*given)
    for k, new, old in zip(writes, lists, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(given[k], new, strict=True))
        assert all(
            torch.equal(a, b) == (skip is True and name != "unstack")
            for a, b in zip(given[k], old, strict=True)
        )
