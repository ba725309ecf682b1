"""The graph of a step whose bfloat16 parameters keep small updates: one, without a wait, and no
larger than it must be.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

import normuon_fn as nm
from compile_tests import graphs
from compile_tests.inputs import SHORT, tensors
from normuon_fn.step import local_update_

SHAPES = {"up": (8, 4), "square": (4, 4), "other": (4, 4), "bias": (4,)}


@functools.cache
def recorded(master: str, device: str) -> graphs.Recorded:
    params, grads = (
        {k: x.bfloat16() for k, x in tensors(SHAPES, seed, device).items()} for seed in (0, 1)
    )
    config, matrix = nm.Config(master=master, guard="output", **SHORT), nm.Route()
    plan = nm.make_plan(params, config, routes={"up": matrix, "square": matrix, "other": matrix})
    found = graphs.record(
        local_update_, params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=0.02), plan
    )
    found.check(device=device)
    return found


def ours(found: graphs.Recorded) -> Counter[str]:
    """But for what stands for ``view(dtype)`` on torch 2.11."""
    names = {name: name.partition(".")[2] for name in found.ops if name.startswith("normuon_fn.")}
    return Counter({own: found.ops[name] for name, own in names.items() if own != "reinterpret"})


def more(master: str, device: str) -> tuple[Counter[str], Counter[str], int]:
    """What a step has beyond one without: operators; those that it lacks; and how many nodes."""
    found, plain = recorded(master, device), recorded("none", device)
    return ours(found) - ours(plain), ours(plain) - ours(found), len(found.calls) - len(plain.calls)


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_masters_on_the_cpu_are_stacked_and_written_like_the_parameters(master: str) -> None:
    new, gone, nodes = more(master, "cpu")
    assert new == {"stack": 2, "unstack_": 2, "adamw_wide_": 1} and gone == {
        "adamw_": 1
    }  # two groups
    assert nodes <= (60 if master == "mantissa" else 15)  # seen: 56 and 12


def test_on_cuda_masters_take_no_operator_more_and_rounding_by_chance_one_node_a_bucket() -> None:
    with graphs.fake_cuda():
        new, gone, nodes = more("mantissa", "cuda")
        assert new == {"apply_wide_": 2, "adamw_wide_": 1} and gone == {"apply_": 2, "adamw_": 1}
        assert nodes == 2 * len(SHAPES)  # every rest is read and written
        assert more("stochastic", "cuda") == ({}, {}, 3)  # each bucket counts the accepted steps


def test_rounding_by_chance_on_the_cpu_is_elementwise() -> None:
    new, gone, nodes = more("stochastic", "cpu")
    assert not new and not gone and nodes <= 130  # seen: 126, for two groups
