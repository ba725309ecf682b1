"""The ops of the step in order, pinned.

``EXPECTTEST_ACCEPT=1`` rewrites the listings after a change that was meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from expecttest import assert_expected_inline

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, problem
from normuon_fn.step import local_update_

SHAPES = {
    "wte": (6, 4),
    "up": (8, 4),
    "down": (4, 8),
    "square": (4, 4),
    "experts": (2, 4, 4),
    "bias": (4,),
}


@functools.cache
def listing(function: Callable, guard: str, device: str = "cpu", world: int = 2) -> str:
    """On the first of two ranks, if nothing else is said."""
    with graphs.fake_ranks(world) as ranks:
        given = problem(SHAPES, nm.Config(guard=guard, **SHORT), ranks=ranks, device=device)
        recorded = graphs.record(function, *given)
    recorded.check(
        reductions=int(guard != "off" and world > 1), largest=2 * len(SHAPES), device=device
    )
    return recorded.listing


def test_ops_of_the_step_without_a_guard_and_no_collective() -> None:
    assert_expected_inline(
        listing(nm.update, "off"),
        """\
adamw_flags of 2
stack of 1
stack of 1
unstack of 1
stack of 1
stack of 1
unstack of 1
stack of 2
stack of 2
unstack of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
stack of 1
unstack of 1
unstack of 1
stack of 1
unstack of 1
unstack of 1
bmm 1, baddbmm 2
stack of 2
stack of 2
unstack of 2
unstack of 2
adamw of 2""",
    )


def test_ops_of_the_step_with_guard_output() -> None:
    assert_expected_inline(
        listing(nm.update, "output"),
        """\
adamw_flags of 2
stack of 1
stack of 1
unstack of 1
stack of 1
stack of 1
unstack of 1
stack of 2
stack of 2
unstack of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
bmm 1, baddbmm 2
stack of 2
max all_reduce [2, 6] int32
stack of 1
unstack of 1
unstack of 1
stack of 1
unstack of 1
unstack of 1
stack of 2
unstack of 2
unstack of 2
adamw of 2""",
    )


def test_ops_of_the_step_with_guard_full_whose_momentum_waits_for_the_decision() -> None:
    assert_expected_inline(
        listing(nm.update, "full"),
        """\
adamw_flags of 2
stack of 1
stack of 1
stack of 1
stack of 1
stack of 2
stack of 2
stack of 1
stack of 1
stack of 1
stack of 1
bmm 1, baddbmm 2
stack of 1
stack of 1
stack of 2
stack of 2
bmm 1, baddbmm 2
stack of 2
max all_reduce [2, 6] int32
stack of 1
stack of 1
unstack of 1
stack of 1
stack of 1
unstack of 1
stack of 1
unstack of 1
unstack of 1
stack of 1
unstack of 1
unstack of 1
stack of 2
stack of 2
unstack of 2
stack of 2
unstack of 2
unstack of 2
adamw of 2""",
    )


def test_ops_of_the_step_in_place_without_a_guard() -> None:
    assert_expected_inline(
        listing(local_update_, "off"),
        """\
adamw_flags of 2
stack of 1
stack of 1
unstack_ of 1
stack of 1
stack of 1
unstack_ of 1
stack of 2
stack of 2
unstack_ of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
stack of 1
unstack_ of 1
unstack_ of 1
stack of 1
unstack_ of 1
unstack_ of 1
bmm 1, baddbmm 2
stack of 2
stack of 2
unstack_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
    )


def test_ops_of_the_step_in_place_with_guard_output() -> None:
    assert_expected_inline(
        listing(local_update_, "output"),
        """\
adamw_flags of 2
stack of 1
stack of 1
unstack_ of 1
stack of 1
stack of 1
unstack_ of 1
stack of 2
stack of 2
unstack_ of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
bmm 1, baddbmm 2
stack of 2
max all_reduce [2, 6] int32
stack of 1
unstack_ of 1
unstack_ of 1
stack of 1
unstack_ of 1
unstack_ of 1
stack of 2
unstack_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
    )


def test_ops_of_the_step_in_place_with_guard_full() -> None:
    assert_expected_inline(
        listing(local_update_, "full"),
        """\
adamw_flags of 2
stack of 1
stack of 1
stack of 1
stack of 1
stack of 2
stack of 2
stack of 1
stack of 1
stack of 1
stack of 1
bmm 1, baddbmm 2
stack of 1
stack of 1
stack of 2
stack of 2
bmm 1, baddbmm 2
stack of 2
max all_reduce [2, 6] int32
stack of 1
stack of 1
unstack_ of 1
stack of 1
stack of 1
unstack_ of 1
stack of 1
unstack_ of 1
unstack_ of 1
stack of 1
unstack_ of 1
unstack_ of 1
stack of 2
stack of 2
unstack_ of 2
stack of 2
unstack_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
    )


def test_ops_on_one_device_with_guard_full_which_reads_the_gradients_before_it_writes() -> None:
    assert_expected_inline(
        listing(local_update_, "full", world=1),
        """\
adamw_flags of 2
stack of 1
stack of 1
stack of 2
stack of 1
stack of 1
unstack_ of 1
stack of 1
stack of 1
unstack_ of 1
stack of 2
stack of 2
unstack_ of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
bmm 1, baddbmm 2
stack of 2
stack of 1
unstack_ of 1
unstack_ of 1
stack of 1
unstack_ of 1
unstack_ of 1
stack of 2
unstack_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
    )


def test_ops_on_cuda_without_a_guard() -> None:
    with graphs.fake_cuda():
        assert_expected_inline(
            listing(nm.update, "off", "cuda"),
            """\
adamw_flags of 2
advance of 2
advance of 2
gather of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
apply of 1
unstack of 1
apply of 1
unstack of 1
gather of 2
bmm 1, baddbmm 2
stack of 2
apply of 2
unstack of 2
adamw of 2""",
        )


def test_ops_on_cuda_in_place_with_guard_full() -> None:
    with graphs.fake_cuda():
        assert_expected_inline(
            listing(local_update_, "full", "cuda"),
            """\
adamw_flags of 2
lookahead of 2
lookahead of 2
gather of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
gather of 2
bmm 1, baddbmm 2
stack of 2
max all_reduce [2, 6] int32
advance_ of 2
apply_ of 1
unstack_ of 1
apply_ of 1
unstack_ of 1
advance_ of 2
apply_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
        )


def test_ops_on_one_cuda_device_in_place_with_guard_full() -> None:
    with graphs.fake_cuda():
        assert_expected_inline(
            listing(local_update_, "full", "cuda", world=1),
            """\
adamw_flags of 2
largest of 2
largest of 2
advance_ of 2
advance_ of 2
gather of 2
bmm 1, baddbmm 2
stack of 1
stack of 1
gather of 2
bmm 1, baddbmm 2
stack of 2
apply_ of 1
unstack_ of 1
apply_ of 1
unstack_ of 1
apply_ of 2
unstack_ of 2
adamw_ of 2
copy_ 21""",
        )


def test_the_graph_on_cuda_in_its_own_half_precisions_keeps_the_promises() -> None:
    with graphs.fake_cuda():
        given = problem(SHAPES, nm.Config(guard="full", guard_scope="bucket"), device="cuda")
        recorded = graphs.record(local_update_, *given)
    recorded.check(device="cuda")
    assert recorded.dtypes_of("aten.bmm") == {torch.float16, torch.bfloat16}
