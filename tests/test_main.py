"""`python -m normuon_fn`, and what the wheel is made of."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch

import normuon_fn
from normuon_fn import __main__ as command
from normuon_fn.algorithm import bucket, normalize
from tests import oracle, processes
from tests.processes import ROOT


def run(*arguments: str, before: str = "") -> CompletedProcess[str]:
    given = f"import runpy, sys; sys.argv[1:] = {list(arguments)!r}"
    code = f"{given}\n{before}\nrunpy.run_module('normuon_fn', run_name='__main__')"
    return processes.run([sys.executable, "-W", "error", "-c", code], code=None)


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


@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_compiled_it_passes_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {name: command.SHAPES[name] for name in ("tall",)}
    monkeypatch.setattr(command, "SHAPES", shapes)  # Inductor's time is by the bucket
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    assert command.main(["--device", "cpu", "--compile"]) == 0
    _, header, *_, row = capsys.readouterr().out.splitlines()
    assert header.endswith("self-test (compiled)") and row.endswith("pass")
    assert counters["unique_graphs"] == before + 1


def broken(*_: object) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("module", "name", "planted"),
    [
        (normalize, "per_row", lambda *_: False),
        (bucket, "carry", lambda *_: 1.5),
        (bucket, "iterate", broken),
        (bucket, "iterate", lambda x, *_: x * float("nan")),
    ],
)
def test_a_step_that_is_wrong_fails_it(
    module: ModuleType,
    name: str,
    planted: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, planted)
    assert command.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("FAIL")


def test_what_it_returns_is_the_exit_code() -> None:
    planted = "import normuon_fn.algorithm.bucket as b; b.carry = lambda *_: 1.5"
    done = run("--device", "cpu", before=planted)
    assert done.returncode == 1 and done.stdout.rstrip().endswith("FAIL"), done.stdout + done.stderr


def test_help_and_unknown_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    asked = capsys.readouterr()
    assert left.value.code == 0 and "--device" in asked.out and "self-test" not in asked.err
    assert "replay" in asked.out
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


def test_type_checkers_read_a_call_of_every_public_name() -> None:
    """`make lint` has mypy read the file, and .ci/release pyright."""
    written = set(re.findall(r"\bnm\.(\w+)", (ROOT / "tests" / "documented_calls.py").read_text()))
    assert written == set(normuon_fn.__all__)


def test_wheel_and_sdist_have_all_that_a_run_and_a_type_checker_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("normuon_fn", "ops"):  # normuon_fn/ops is the link to ops that it is here
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    build = (
        "import setuptools.build_meta as b; print(b.build_sdist('..')); print(b.build_wheel('..'))"
    )
    done = processes.run([sys.executable, "-c", build], cwd=source)
    sdist, wheel = (line for line in done.stdout.splitlines() if line.endswith((".gz", ".whl")))
    assert wheel.startswith(f"normuon_fn-{normuon_fn.__version__}-")
    with zipfile.ZipFile(tmp_path / wheel) as opened:
        names = {name for name in opened.namelist() if name.endswith((".py", "py.typed"))}
        opened.extractall(there)
    files = {
        f"normuon_fn/{file.relative_to(ROOT / 'normuon_fn')}"
        for pattern in ("*.py", "*/*.py", "py.typed")
        for file in (ROOT / "normuon_fn").glob(pattern)
    } | {f"normuon_fn/ops/{file.name}" for file in (ROOT / "ops").glob("*.py")}
    assert names == files and "normuon_fn/ops/launch.py" in files
    with tarfile.open(tmp_path / sdist) as opened_sdist:
        packed = {member.name.partition("/")[2] for member in opened_sdist if member.isfile()}
    assert files <= packed
    isolated = f"import runpy, sys; sys.path.insert(0, {str(there)!r})\n"
    isolated += "import normuon_fn; print(normuon_fn.__file__)\n"
    isolated += "sys.argv[1:] = ['--device', 'cpu']\n"
    isolated += "runpy.run_module('normuon_fn', run_name='__main__')"
    ran = processes.run(
        [sys.executable, "-c", isolated], cwd=tmp_path, env={"PYTHONPATH": ""}, code=0
    )
    assert ran.stdout.startswith(str(there)) and ran.stdout.rstrip().endswith("pass")
