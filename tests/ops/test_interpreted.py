"""The Triton kernels in Triton's interpreter, all of them in one process of its own: Triton reads
TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

from tests import processes
from tests.processes import ROOT

# The lists and the messages run on a CUDA device where there is one. Products in tiles of every
# size are tried here alone.
HERE = (
    []
    if torch.cuda.is_available()
    else ["test_list_kernels.py", "test_measured_kernels.py", "test_repack.py"]
)


def test_the_kernels_hold_their_claims_in_the_interpreter() -> None:
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    files = [ROOT / "tests" / "ops" / name for name in [*HERE, "interpreted_products.py"]]
    if TorchVersion(triton.__version__) < (3, 7) and TorchVersion(numpy.__version__) >= (2, 4):
        pytest.skip("this Triton's interpreter takes int() of arrays, which this numpy refuses")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *files]
    printed = processes.run(command, env={"TRITON_INTERPRET": "1"}).stdout
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None and int(passed[1]) >= len(files)
