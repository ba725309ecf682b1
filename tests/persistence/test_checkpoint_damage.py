"""A damaged checkpoint is refused and touches nothing.

A process that dies while it saves leaves a complete file.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import normuon_fn as nm
from normuon_fn.persistence import file_format
from tests import scripts
from tests.persistence.test_checkpoint import copies, problem, same

Tensors = dict[str, Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nm.Plan, Tensors, Tensors]:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan, extra={"step": 2})
    return tmp_path / "run", plan, params, state


def assert_refused_and_untouched(path: Path, plan: nm.Plan) -> None:
    _, running, state = problem(steps=1)
    before = copies(running), copies(state)
    with pytest.raises(nm.CheckpointError, match=r"damaged|not written by"):
        nm.load(path, plan, params=running, state=state)
    assert same(running, before[0]) and same(state, before[1])


def test_a_truncated_file_is_refused_wherever_it_ends(
    saved: tuple[Path, nm.Plan, Tensors, Tensors],
) -> None:
    path, plan, *_ = saved
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for length in (
        0,
        1,
        7,
        8,
        9,
        8 + header // 2,
        8 + header - 1,
        8 + header,
        8 + header + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        assert_refused_and_untouched(path, plan)
    path.write_bytes(whole + b"\0" * 8)
    assert_refused_and_untouched(path, plan)


def test_every_flipped_byte_of_the_header_is_found_or_changes_nothing(
    saved: tuple[Path, nm.Plan, Tensors, Tensors],
) -> None:
    path, plan, params, state = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for at in range(0, header, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = nm.load(path, plan)
        except nm.CheckpointError:
            refused += 1
            continue
        assert (
            same(found.params, params) and same(found.state, state) and found.extra == {"step": 2}
        )
    assert refused > 0.95 * header / 3


def test_a_flipped_bit_of_the_data_is_found_and_named(
    saved: tuple[Path, nm.Plan, Tensors, Tensors],
) -> None:
    path, plan, *_ = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in {header, len(whole) - 1, *range(header, len(whole), 997)}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert_refused_and_untouched(path, plan)
    path.write_bytes(whole)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    tensors["state/qkv.momentum"][0, 0] += 1
    save_file(tensors, path, metadata=meta)
    with pytest.raises(
        nm.CheckpointError,
        match=r"the contents of \['state/qkv.momentum'\] are not those that were saved",
    ):
        nm.load(path, plan)


def test_another_format_and_other_files_are_refused(
    saved: tuple[Path, nm.Plan, Tensors, Tensors], monkeypatch
) -> None:
    path, plan, params, state = saved
    monkeypatch.setattr(file_format, "FORMAT", 2)
    with pytest.raises(
        nm.CheckpointError, match="has format 1, this version of normuon_fn reads format 2"
    ):
        nm.load(path, plan)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(nm.CheckpointError, match=r"was not written by normuon_fn.save"):
        nm.load(path, plan)
    torch.save({"params": params, "state": state}, path)  # a pickle: never opened as one
    with pytest.raises(nm.CheckpointError, match=r"got one of torch\.save; write torch\.load"):
        nm.load(path, plan)


@pytest.mark.parametrize(
    ("what", "name", "changed"),
    [
        ("params", "z.w", lambda x: x.bfloat16()),
        ("params", "z.w", lambda x: x.T),
        ("params", "z.w", lambda x: x.to_sparse()),
        ("params", "z.w", lambda x: x.tolist()),
        ("state", "qkv.momentum", lambda x: x.double()),
        ("state", "guard.step", lambda x: x.reshape(1)),
    ],
)
def test_what_could_not_be_loaded_is_not_saved_or_written_and_the_old_file_stays(
    tmp_path: Path, what: str, name: str, changed: Any
) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    given = {"params": dict(params), "state": dict(state)}
    given[what][name] = changed(given[what][name])
    with pytest.raises((TypeError, ValueError), match=rf"{what}\['{name}'\]: expected"):
        nm.save(tmp_path / "run", **given, plan=plan)
    found = nm.load(tmp_path / "run", plan)
    assert (
        same(found.params, params) and same(found.state, state) and os.listdir(tmp_path) == ["run"]
    )
    with pytest.raises((TypeError, ValueError), match=rf"{what}\['{name}'\]: expected"):
        nm.load(tmp_path / "run", plan, **given)


# ----------------------------------------------------------------------- death while saving

WRITER = """
import os, random, signal, sys, time
import torch, normuon_fn as nm
from normuon_fn.persistence import file_format
path, how, times, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
params = {f"w{k}": torch.zeros(64, 512) for k in range(12)}
plan = nm.make_plan(params)
state = nm.init(plan, params)

def version(k):
    for tensor in (*params.values(), *state.values()):
        tensor.fill_(k)
    nm.save(path, params, state, plan=plan, extra={"version": k})

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, filename, metadata=None):
    keep(tensors, filename, metadata=metadata)
    os.truncate(filename, os.path.getsize(filename) // 2)
    die()

import safetensors.torch
keep = safetensors.torch.save_file
start = time.perf_counter(); version(1); window = time.perf_counter() - start
rng = random.Random(seed)
done = at_once = 0
for k in range(2, 2 + times):
    child = os.fork()
    if child == 0:
        if how == "half": safetensors.torch.save_file = half
        if how == "replace": os.replace = die
        if how == "sync": file_format._sync = die
        version(k)
        os._exit(0)
    if how == "random":
        time.sleep(rng.random() * window)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = nm.load(path, plan)  # whole, or this raises
    values = {float(t.max()) for t in (*found.params.values(), *found.state.values())}
    values |= {float(t.min()) for t in (*found.params.values(), *found.state.values())}
    assert values == {float(found.extra["version"])}, values
    assert found.extra["version"] in ((done or 1, k) if how == "random" else (1,)), (found.extra, k)
    at_once += found.extra["version"] == k
    window *= 0.8 if found.extra["version"] == k else 1.15  # so that both happen
    done = found.extra["version"]
print("replaced", at_once, "of", times)
"""


def killed(tmp_path: Path, how: str, times: int) -> str:
    writer = tmp_path / "writer.py"
    writer.write_text(WRITER)
    return scripts.run(writer, tmp_path / "run", how, times, 0).stdout


@pytest.mark.parametrize("how", ["half", "sync", "replace"])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_old_file_whole(
    tmp_path: Path, how: str
) -> None:
    assert killed(tmp_path, how, 2) == "replaced 0 of 2\n"


def test_a_process_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    replaced = int(killed(tmp_path, "random", 60).split()[1])
    assert 0 < replaced < 60  # some died before, some after


def test_what_is_synced_is_written_and_the_folder_after_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    keep = file_format._sync, os.replace
    monkeypatch.setattr(
        file_format,
        "_sync",
        lambda p: (order.append("folder" if Path(p).is_dir() else "file"), keep[0](p)),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), keep[1](a, b)))
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan)
    assert order == ["file", "replace", "folder"]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, params, state = problem()
    nm.save(tmp_path / "run", params, state, plan=plan, extra={"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_format, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        nm.save(tmp_path / "run", params, state, plan=plan, extra={"step": 2})
    assert os.listdir(tmp_path) == ["run"] and nm.load(tmp_path / "run").extra == {"step": 1}
