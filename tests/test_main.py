"""`python -m normuon_fn`, and what the wheel is made of."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import normuon_fn
from normuon_fn import __main__ as command
from tests import oracle, processes
from tests.processes import ROOT


def run(*arguments: str, before: str = "", warnings: str = "error") -> CompletedProcess[str]:
    given = f"import runpy, sys; sys.argv[1:] = {list(arguments)!r}"
    code = f"{given}\n{before}\nrunpy.run_module('normuon_fn', run_name='__main__')"
    return processes.run([sys.executable, "-W", warnings, "-c", code], code=None)


def test_it_prints_versions_devices_and_kernels_and_passes_its_self_test() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(
        rf"normuon_fn {normuon_fn.__version__}, torch {re.escape(torch.__version__)}, triton \S+",
        lines[0],
    )
    assert lines[1].endswith("self-test (eager, not --compile)")
    assert re.search(
        r"cpu .* CPU reference, .*products in \w+ +\d\.\de-\d\d of \de-\d\d allowed .* "
        r"\d+\.\d\d +pass$",
        lines[-1],
    )


def test_compiled_it_passes_too() -> None:
    shows = (
        "import torch._dynamo.utils as u, atexit; "
        "atexit.register(lambda: print(u.counters['stats']['unique_graphs']))"
    )
    done = run("--device", "cpu", "--compile", before=shows, warnings="ignore")  # Inductor's own
    assert done.returncode == 0, done.stdout + done.stderr
    _, header, *_, row, compiled = done.stdout.splitlines()
    assert header.endswith("self-test (compiled)")
    assert row.endswith("pass") and compiled == "1"


@pytest.mark.parametrize(
    "planted",
    [
        "import normuon_fn.algorithm.normalize as n; n.per_row = lambda *_: False",
        "import normuon_fn.algorithm.bucket as b; b.carry = lambda *_: 1.5",
        "import normuon_fn.algorithm.bucket as b\n"
        "def broken(*_): raise RuntimeError('no kernel image')\nb.iterate = broken",
        "import normuon_fn.algorithm.bucket as b; b.iterate = lambda x, *_: x * float('nan')",
    ],
)
def test_a_step_that_is_wrong_fails_it_with_exit_code_1(planted: str) -> None:
    done = run("--device", "cpu", before=planted)
    assert done.returncode == 1 and done.stdout.rstrip().endswith("FAIL"), done.stdout + done.stderr


def test_help_and_unknown_devices() -> None:
    asked = processes.run([sys.executable, "-m", "normuon_fn", "--help"])
    assert "--device" in asked.stdout and "self-test" not in asked.stderr
    assert "replay" in asked.stdout
    with pytest.raises(SystemExit) as left:
        command.main(["--device", "tpu"])
    assert left.value.code == 2


def test_the_reference_of_the_self_test_is_the_oracles_step() -> None:
    generator = torch.Generator().manual_seed(0)
    w, grad, momentum = (torch.randn(8, 12, generator=generator).double() for _ in range(3))
    variance = torch.rand(8, 1, generator=generator).double()
    rule = oracle.Rule(rows=oracle.SIMPLE * 5)
    given = (x.numpy() for x in (w, grad, momentum, variance))
    want, _, _ = oracle.normuon_matrix(rule, *given, lr=0.02, beta=0.9, beta2=0.8, weight_decay=0.1)
    torch.testing.assert_close(
        command.reference(w, grad, momentum, variance),
        torch.from_numpy(want),
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_names_that_come_later_are_all_there() -> None:
    assert set(normuon_fn._LATER) <= set(normuon_fn.__all__) <= set(dir(normuon_fn))
    for name in normuon_fn.__all__:
        assert getattr(normuon_fn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = normuon_fn.nothing  # type: ignore[attr-defined]


def test_the_wheel_has_the_marker_of_types_and_the_operators(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "normuon_fn", tmp_path / "normuon_fn", ignore=shutil.ignore_patterns("__pycache__")
    )  # ops as files
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    done = processes.run([sys.executable, "-c", build], cwd=tmp_path)
    wheel = done.stdout.splitlines()[-1]
    assert wheel.startswith(f"normuon_fn-{normuon_fn.__version__}-")
    names = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    assert {"normuon_fn/py.typed", "normuon_fn/__main__.py", "normuon_fn/ops/launch.py"} <= names
