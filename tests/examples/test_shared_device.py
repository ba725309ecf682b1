"""examples/benchmarks/shared_device.py counts the results that have other bits, and no others."""

from __future__ import annotations

import argparse
import queue
import threading

import pytest
import torch

from examples.benchmarks import shared_device


@pytest.mark.parametrize("products", ["library", "symmetric"])
@pytest.mark.parametrize("planted", [False, True])
def test_every_evaluation_with_other_bits_is_counted(
    products: str, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        real, calls = shared_device.iterate, iter(range(10**9))

        def other_once(*args: object) -> torch.Tensor:
            found = real(*args)
            # Calls 0 to 7 make what is expected of the four lanes.
            return found if next(calls) != 10 else found + 1

        monkeypatch.setattr(shared_device, "iterate", other_once)
    args = argparse.Namespace(device="cpu", matrices=2, rows=8, seconds=0.05)
    found: queue.Queue[tuple[int, int]] = queue.Queue()
    shared_device.work(args, products, 0, threading.Barrier(1), found)
    made, wrong = found.get()
    assert made >= 160 and wrong == planted
