"""What ``import normuon_fn`` costs every process: ranks, notebooks, workers of a data loader."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

from normuon_fn.compat.graphs import constant_in_graphs, outside_graphs

# What takes long to import: 1 s of Dynamo and Inductor, 1 s of sympy and DTensor, 0.2 s of
# Triton.
SLOW = (
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "triton",
)
LINES = {
    "every public name": "from normuon_fn import *",
    "a plan and its state": (
        "import normuon_fn as nm; params = {'w': torch.ones(4, 4)}; plan = nm.make_plan(params); "
        "nm.init(plan, params); str(plan)"
    ),
}


def loaded_by(line: str) -> set[str]:
    """The modules that a new process has after ``line`` and not after ``import torch``."""
    program = (
        f"import sys, torch; before = set(sys.modules)\n{line}\nprint(*(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("what", LINES)
def test_nothing_slow_is_imported_before_it_is_used(what: str) -> None:
    if what == "a plan and its state" and TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("a plan tells Inductor of our operators there: see prepare_inductor")
    loaded = loaded_by(LINES[what])
    assert "normuon_fn.step" in loaded
    assert loaded.isdisjoint(SLOW), sorted(loaded & set(SLOW))


def test_the_marks_that_dynamo_reads_are_those_of_torch() -> None:
    def theirs() -> None: ...

    def ours() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_in_graphs(ours)) == vars(theirs)
    disabled = torch.compiler.disable(lambda: None, reason="why")
    left_out = vars(outside_graphs("why")(lambda: None))
    assert (
        left_out.items()
        >= {
            name: vars(disabled)[name]
            for name in ("_torchdynamo_disable", "_torchdynamo_disable_msg")
        }.items()
    )
    assert left_out["_torchdynamo_disable"] is True
