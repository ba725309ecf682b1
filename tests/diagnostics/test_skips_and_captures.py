"""The host side of the guard: check, SkipMonitor, capture and its replay."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import normuon_fn as nm
from normuon_fn import __main__ as command_line
from normuon_fn.diagnostics import skips
from normuon_fn.diagnostics.replay import replay

SHAPES = {"qkv": (24, 8), "tall": (16, 8), "experts": (2, 8, 12), "bias": (8,)}
ROUTES = {"qkv": nm.Route(splits=(8, 8, 8))}


def run(config: nm.Config, bad: str | None = None, steps: int = 1, **hyper: float):
    """``steps`` finite steps and one with a NaN in the gradient of ``bad``."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    plan = nm.make_plan(params, config, routes=ROUTES)
    state, values = nm.init(plan, params), nm.Hyper.of(params, lr=0.02, **hyper)
    for k in range(steps + 1):
        grads: dict[str, Tensor | None] = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        }
        if k == steps and bad is not None:
            grads[bad].view(-1)[3] = float("nan")
        result = nm.update(params, grads, state, values, plan)
        before, params, state = state, result.params, result.state
    return result, plan, grads, values, before


def test_the_second_skip_at_the_same_place_is_not_swallowed() -> None:
    result, plan, _, _, _ = run(nm.Config(guard="full"), bad="tall")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            nm.check(result, plan)
    assert [str(w.message) for w in seen] == [
        "step 2 skipped, 1 in a row: tall (non-finite gradient and update)"
    ] * 3
    assert {Path(w.filename).name for w in seen} == {Path(__file__).name}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")  # the caller's own filter holds
        assert nm.check(result, plan) is True
    assert not seen


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_is_told_once_by_a_warning_or_on_other_ranks_in_the_log(
    rank: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, plan, _, _, _ = run(nm.Config(), bad="bias")
    monkeypatch.setattr(skips, "warns_here", lambda *_: rank == 0)
    with (
        caplog.at_level(logging.INFO, logger="normuon_fn"),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        assert nm.check(result, plan) is False
        assert nm.SkipMonitor(plan)(result) == 0  # tells nothing that check has told
    expected = "step 2 not skipped (guard='off'): bias (non-finite gradient and update)"
    assert [str(w.message) for w in seen] == [expected] * (rank == 0)
    logged = [("normuon_fn", logging.INFO, expected)]
    assert caplog.record_tuples == logged * (rank == 1)


def test_a_clean_step_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    result, plan, _, _, _ = run(nm.Config(guard="full"))
    assert nm.check(result, plan, max_consecutive=1) is False and not recwarn.list


def test_max_consecutive_raises_with_the_table_of_offenders() -> None:
    result, plan, _, _, _ = run(nm.Config(guard="full"), bad="experts")
    with pytest.warns(RuntimeWarning), pytest.raises(nm.NonFiniteStepError) as raised:
        nm.check(result, plan, max_consecutive=1)
    lines = str(raised.value).splitlines()
    assert lines[0] == "1 steps in a row were skipped (max_consecutive=1), the last at step 2:"
    assert lines[3].split() == ["experts", "2x8x12", "normuon", "gradient", "and", "update"]
    with pytest.raises(ValueError, match="max_consecutive: expected None or an int >= 1, got 0"):
        nm.check(result, plan, max_consecutive=0)


def test_the_monitor_reports_what_check_reports() -> None:
    clean, plan, _, _, _ = run(nm.Config(guard="full"))
    bad, _, _, _, _ = run(nm.Config(guard="full"), bad="qkv")
    monitor = nm.SkipMonitor(plan, max_consecutive=2)
    assert monitor(clean) == 0
    with pytest.warns(RuntimeWarning, match=r"qkv \(non-finite gradient and update\)"):
        assert monitor(bad) + monitor.wait() == 1
    twice = bad._replace(
        state={**bad.state, "guard.consecutive": torch.tensor(2, dtype=torch.int32)}
    )
    with pytest.warns(RuntimeWarning), pytest.raises(nm.NonFiniteStepError):
        monitor(twice)
        monitor.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and events need a GPU")
def test_the_monitor_never_waits_for_the_device() -> None:
    device = torch.device("cuda")
    params = {"w": torch.randn(8, 8, device=device)}
    plan = nm.make_plan(params, nm.Config(guard="full"))
    state, hyper, monitor = (
        nm.init(plan, params),
        nm.Hyper.of(params, lr=0.02),
        nm.SkipMonitor(plan),
    )
    bad = {"w": torch.full((8, 8), float("nan"), device=device)}
    nm.update(params, bad, state, hyper, plan)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    result = nm.update(params, bad, state, hyper, plan)
    assert monitor(result) == 0  # the device sleeps: nothing has arrived, and nobody waited for it
    with pytest.warns(RuntimeWarning, match="w "):
        assert monitor.wait() == 1


@pytest.mark.parametrize("guard", ["off", "output", "full"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_capture_rebuilds_exactly_what_the_orthogonalizer_was_given(
    guard: str, nesterov: bool, form: str, tmp_path: Path
) -> None:
    given: list[Tensor] = []

    def recorder(x: Tensor) -> Tensor:
        given.append(x.clone())
        return x

    options: Any = {"guard": guard, "nesterov": nesterov, "momentum_form": form}
    config = nm.Config(**options, orthogonalizer=recorder)
    result, plan, grads, hyper, _ = run(config, bad="experts")
    if guard == "full":  # the orthogonalizer received the old momentum: what the guard refused
        run(replace(config, guard="off"), bad="experts")
    path = nm.capture(result, grads, plan, tmp_path, hyper=hyper)
    saved = load_file(path.with_suffix(".safetensors"))
    expected = next(x for x in reversed(given) if x.shape == (2, 8, 12))
    assert torch.equal(saved["experts.input"].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(saved["experts.momentum"].isnan(), result.state["experts.momentum"].isnan())


def test_capture_says_who_when_and_with_what(tmp_path: Path) -> None:
    result, plan, grads, hyper, _ = run(nm.Config(guard="full", method="gram"), bad="qkv")
    path = nm.capture(result, grads, plan, tmp_path, hyper=hyper)
    assert path == tmp_path / "step2-rank0.json" and sorted(p.name for p in tmp_path.iterdir()) == [
        "step2-rank0.json",
        "step2-rank0.safetensors",
    ]
    about = json.loads(path.read_text())
    assert (about["step"], about["rank"], about["world_size"]) == (2, 0, 1)
    assert about["versions"]["torch"] == torch.__version__ and about["config"]["guard"] == "full"
    assert about["flags"] == {"qkv": {"update": True, "gradient": True}}
    assert [entry["tensor"] for entry in about["blocks"]] == [
        "qkv.input.0",
        "qkv.input.8",
        "qkv.input.16",
    ]
    found = about["tensors"]["qkv.grad"]
    assert found["shape"] == [24, 8] and found["non_finite"] == 1
    finite = grads["qkv"][grads["qkv"].isfinite()]
    assert (
        found["largest"] == f"{float(finite.abs().max()):.4g}"
        and found["norm"] == f"{float(finite.norm()):.4g}"
    )


def test_the_order_of_the_first_version_writes_the_same_capture(tmp_path: Path) -> None:
    result, plan, grads, hyper, _ = run(nm.Config(guard="full"), bad="tall")
    new = nm.capture(result, grads, plan, tmp_path / "new", hyper=hyper)
    old = nm.capture(result, plan, grads, tmp_path / "old", hyper=hyper)  # type: ignore[arg-type]
    for suffix in (".json", ".safetensors"):
        assert old.with_suffix(suffix).read_bytes() == new.with_suffix(suffix).read_bytes()


def test_the_command_prints_and_replays_a_capture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, plan, grads, hyper, _ = run(nm.Config(guard="full"), bad="tall")
    path = nm.capture(result, grads, plan, tmp_path, hyper=hyper)
    assert command_line.main(["replay", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("tall.input")]
    assert rows[0][:3] == ["tall.input", "1x16x8", "float32"]
    assert [tuple(row[1:3]) for row in rows[1:]] == [
        (method, dtype)
        for method in ("standard", "gram")
        for dtype in ("float64", "float32", "bfloat16", "float16")
    ]
    # A NaN reaches all entries of the result in every method.
    assert all(row[-3] == "128" for row in rows[1:])


def test_a_replay_shows_which_method_fails(tmp_path: Path) -> None:
    """The prescale makes a momentum too large for float16 harmless: all errors are small."""
    result, plan, grads, hyper, _ = run(nm.Config(guard="full"), bad="tall")
    path = nm.capture(result, grads, plan, tmp_path, hyper=hyper)
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors["tall.input"] = torch.randn(1, 16, 8) * 1e30
    save_file(tensors, path.with_suffix(".safetensors"))
    rows = [line.split() for line in replay(path).splitlines() if line.startswith("tall.input")][1:]
    used = [row for row in rows if "<-" in row]
    assert (len(used) == 1 and used[0][1:3] == ["gram", "float32"]) or torch.cuda.is_available()
    assert all(row[-3] == "0" and float(row[-1]) < 0.05 for row in rows)


def test_a_damaged_capture_is_refused(tmp_path: Path) -> None:
    result, plan, grads, hyper, _ = run(nm.Config(guard="full"), bad="tall")
    path = nm.capture(result, grads, plan, tmp_path, hyper=hyper)
    whole = path.with_suffix(".safetensors").read_bytes()
    path.with_suffix(".safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a capture that can be read"):
        replay(path)
    with pytest.raises(ValueError, match="not a capture that can be read"):
        replay(tmp_path / "nothing.json")
    with pytest.raises(SystemExit) as left:
        command_line.main(["replay", str(path)])
    assert left.value.code == 2


def test_the_environment_switches_capture_on_for_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, plan, grads, hyper, _ = run(nm.Config(guard="full"), bad="tall")
    monkeypatch.setenv("NORMUON_CAPTURE_DIR", str(tmp_path / "captures"))
    with pytest.warns(RuntimeWarning):
        nm.check(result, plan)  # not given what it needs: says so in the log, and goes on
    assert not (tmp_path / "captures").exists()
    with pytest.warns(RuntimeWarning):
        nm.check(result, plan, grads=grads, hyper=hyper)
    assert (tmp_path / "captures" / "step2-rank0.json").exists()
    clean, _, clean_grads, _, _ = run(nm.Config(guard="full"))
    nm.check(clean, plan, grads=clean_grads, hyper=hyper)
    with pytest.raises(ValueError, match="no parameter was flagged"):
        nm.capture(clean, clean_grads, plan, tmp_path, hyper=hyper)
