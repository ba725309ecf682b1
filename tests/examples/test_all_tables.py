"""examples/benchmarks/all_tables.py runs what it names, and keeps what was printed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("all_tables", FOLDER / "all_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["all_tables.py", *arguments])
    return int(script.main())


def test_every_script_that_it_names_is_there_and_knows_its_options(script: Any) -> None:
    for name in script.TABLES:
        _, first, *rest = script.command_of(name, Path("out"))
        if first == "-m":
            continue
        text = Path(first).read_text()
        options = [part.replace("--no-", "--") for part in rest if part.startswith("--")]
        assert all(f'"{option}"' in text for option in options), name


def test_output_is_kept_of_what_ends_what_fails_and_what_is_cut_off(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = "import time; print('begun'); time.sleep(60)"
    for name, code in (("ends", "print(3)"), ("fails", "1/0"), ("waits", waits), ("late", "1")):
        (tmp_path / f"{name}.py").write_text(code)
    tables = {name: (str(tmp_path / f"{name}.py"),) for name in ("ends", "fails", "waits", "late")}
    monkeypatch.setattr(script, "TABLES", tables)
    out = tmp_path / "out"
    assert started(script, monkeypatch, "--out", str(out), "--only", "ends") == 0
    assert started(script, monkeypatch, "--out", str(out), "--seconds", "5") == 1
    printed = capsys.readouterr().out
    assert "ends: exit code 0 after" in printed and "fails: exit code 1 after" in printed
    assert "waits: cut off after" in printed and "late: left out" in printed
    kept = {path.stem: path.read_text() for path in out.iterdir()}
    assert kept["ends"].splitlines()[-1] == "3" and kept["ends"].startswith("$ ")
    assert "ZeroDivisionError" in kept["fails"] and "begun" in kept["waits"]


def test_a_name_that_is_none_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        started(script, monkeypatch, "--out", "x", "--only", "speed")
    assert "expected some of suite, bars" in capsys.readouterr().err
