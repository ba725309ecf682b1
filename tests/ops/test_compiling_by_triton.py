"""Kernels that Triton itself compiles beforehand, for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..scripts import run

pytest.importorskip("triton")
SCRIPT = """
import sys
import threading
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches = []

class Driver:
    "What Triton asks of a GPU: nothing is loaded, and a launch is counted."

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        load_binary = staticmethod(lambda *given: (object(), 1, 32, 0, 1024))

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *given: launches.append(given)

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

driver.set_active(Driver())
torch.cuda.current_device = lambda: None
from normuon_fn.ops import advance, compiling, launch

kernel = launch.loaded(advance.combine_kernel)
given = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.float64), torch.zeros(3, 4)
CPU = torch.device("cpu")

def launched(n, blocks):
    launch.launch(kernel, n, given, (n, 1, blocks), num_warps=4, enable_fp_fusion=False)

# Of one matrix beforehand and of four in another thread: one variant of Triton's, two keys of ours.
with compiling.beforehand(CPU):
    launched(1, 256)
    thread = threading.Thread(target=launched, args=(4, 256))
    thread.start()
    thread.join()
launched(4, 256)
launched(1, 256)
assert len(launches) == 3, launches
assert {type(found).__name__ for found in launch._compiled.values()} == {"CompiledKernel"}

# A compilation that fails once, as where a disk is full for a moment.
whole = kernel.compile
def full(*_, **__):
    raise OSError(28, "No space left on device")
kernel.compile = full
with compiling.beforehand(CPU):
    launched(1, 128)
kernel.compile = whole
launched(1, 128)
assert len(launches) == 4 and not compiling._begun
"""


def test_they_are_launched_afterwards_and_compiled_again_where_that_failed(tmp_path: Path) -> None:
    script = tmp_path / "beforehand.py"
    script.write_text(SCRIPT)
    run(script, env={"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_INTERPRET": "0"})
