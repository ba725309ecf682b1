"""What no check of one file finds: crafted descriptions, disks and folders that refuse, and tensors
that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import normuon_fn as nm
from tests import scripts
from tests.persistence.test_checkpoint import copies, problem, same

Tensors = dict[str, Tensor]
REMOVE = object()


def sealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file again, with another description and the digest of that."""
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["normuon_fn"])
    tensors = load_file(path)
    found = change(meta)
    text = found if isinstance(found, str) else json.dumps(meta if found is None else found)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, metadata={"normuon_fn": text, "sha256": digest})


VALUES: list[Any] = [
    REMOVE, None, 0, 1.5, True, "x", [], {}, [1], [["params/z.w"]], {"x": 1}, {"params/z.w": []},
    {"z.w": {"algorithm": 1}}, {"z.w": []}, ["params"], ["params/z.w", "params/z.w"],
]  # fmt: skip


@pytest.mark.parametrize("key", ["format", "order", "sha256", "config", "routes", "extra"])
def test_every_crafted_description_is_refused_by_the_name_of_its_file(
    tmp_path: Path, key: str
) -> None:
    plan, params, state = problem(steps=0)
    for k, value in enumerate(VALUES):
        path = tmp_path / f"run{k}"
        nm.save(path, params, state, plan=plan)

        def change(meta: dict[str, Any], value: Any = value) -> None:
            meta.pop(key) if value is REMOVE else meta.update({key: value})

        sealed(path, change)
        for given in (plan, None):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # options that differ from the saved ones
                    found = nm.load(path, given)
            except nm.CheckpointError as error:
                said = str(error)
                assert said.startswith(f"{path}: ") and len(said) < 300, value
            else:  # what means nothing else than was saved
                assert same(found.params, params) and same(found.state, state), value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: "{", "its description is no JSON"),
        (lambda meta: "[" * 100_000, "its description is no JSON"),
        (lambda meta: '{"format": ' + "9" * 5000 + "}", "its description is no JSON|has format"),
        (lambda meta: [], "its description is no JSON object"),
        (lambda meta: meta["order"].pop() and None, "'sha256' has other names than 'order'"),
        (
            lambda meta: meta["order"].append(meta["order"][0]),
            "'order' has names twice, or of no part",
        ),
        (lambda meta: meta["routes"].update({"qkv": 3}), "'routes' is no dict of texts"),
        (lambda meta: meta["config"].update({"scale": 3}), "'config' is no dict of texts"),
        (lambda meta: meta["extra"].update({"t": 3}), r"'extra' has names of tensors: \['t'\]"),
        (lambda meta: meta["sha256"].update({"params/z.w": "0"}), r"contents of \['params/z.w'\]"),
    ],
)
def test_what_is_wrong_in_a_crafted_description_is_said(
    tmp_path: Path, change: Any, message: str
) -> None:
    plan, params, state = problem(steps=0)
    path = tmp_path / "run"
    nm.save(path, params, state, plan=plan, extra={"t": torch.ones(1)})
    sealed(path, change)
    with pytest.raises(nm.CheckpointError, match=f"^{path}: .*({message})"):
        nm.load(path, plan, params=params, state=state)


def test_no_bytes_whatever_raise_anything_else(tmp_path: Path) -> None:
    plan, params, state = problem(steps=0)
    path = tmp_path / "run"
    nm.save(path, params, state, plan=plan)
    whole, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    cases = [whole[: rng.randrange(len(whole))] for _ in range(50)]
    for _ in range(200):  # several bytes of the header at once
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(header)] = rng.randrange(256)
        cases.append(bytes(changed))
    for dtype in ("F4", "F8_E8M0", "F6_E2M3", "I128", ""):
        cases.append(whole.replace(b'"dtype":"F32"', f'"dtype":"{dtype}"'.encode(), 1))
    cases += [rng.randbytes(n) for n in (1, 8, 9, 100)]
    for data in cases:
        path.write_bytes(data)
        try:
            found = nm.load(path, plan)
        except nm.CheckpointError as error:
            said = str(error)
            assert said.startswith(f"{path}: ")
        else:
            assert same(found.params, params) and same(found.state, state)


# ------------------------------------------------------------------------ where it is written


def fail(error: Exception) -> Callable[..., None]:
    def save_file(tensors: Tensors, filename: str, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half")
        raise error

    return save_file


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan, params, state = problem(steps=0)
    nm.save(tmp_path / "run", params, state, plan=plan, extra={"step": 1})
    monkeypatch.setattr(safetensors.torch, "save_file", fail(error))
    with pytest.raises(OSError, match="No space left") as raised:
        nm.save(tmp_path / "run", params, state, plan=plan, extra={"step": 2})
    assert raised.value.errno == 28 and os.listdir(tmp_path) == ["run"]
    assert nm.load(tmp_path / "run", plan).extra == {"step": 1}


def test_the_writer_itself_says_that_a_disk_is_full_in_the_form_that_is_understood(
    tmp_path: Path,
) -> None:
    """What the test above pretends: a file that may not grow, in a process of its own."""
    code = (
        "import resource, signal, sys, torch, normuon_fn as nm\n"
        "params = {'w': torch.zeros(64, 64)}\n"
        "plan = nm.make_plan(params); state = nm.init(params, plan)\n"
        "nm.save(sys.argv[1], params, state, plan)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: nm.save(sys.argv[1], params, state, plan)\n"
        "except OSError as error: print(error.errno, error)\n"
        "nm.load(sys.argv[1], plan)\n"
    )
    (tmp_path / "writer.py").write_text(code)
    ended = scripts.run(tmp_path / "writer.py", tmp_path / "run")
    assert ended.stdout.startswith("27 ") and "an old file is as it was" in ended.stdout  # EFBIG
    assert sorted(os.listdir(tmp_path)) == ["run", "writer.py"]


def test_folders_that_cannot_hold_the_file_are_named(tmp_path: Path) -> None:
    plan, params, state = problem(steps=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder: is a folder; give the name of a file"):
        nm.save(tmp_path / "folder", params, state, plan=plan)
    with pytest.raises(IsADirectoryError, match="folder: is a folder; expected a file"):
        nm.load(tmp_path / "folder", plan)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; make it first"):
        nm.save(tmp_path / "absent" / "run", params, state, plan=plan)
    if os.geteuid():  # the superuser may write everywhere
        (tmp_path / "folder").chmod(0o555)
        with pytest.raises(PermissionError):
            nm.save(tmp_path / "folder" / "run", params, state, plan=plan)
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


def test_names_of_any_letters_and_length_and_empty_tensors_come_back(tmp_path: Path) -> None:
    names = ["", "a.b.c", "a/b", "/", "größe.重み", "x" * 300, "params", "extra/x", "w.momentum"]
    params = {name: torch.randn(4, 4) for name in names} | {"none": torch.zeros(0, 4)}
    plan = nm.make_plan(params, routes={"*": nm.Route(), "none": nm.Route("adamw")})
    state = nm.init(plan, params)
    path = tmp_path / ("ö" * 127)  # 254 bytes: a file's name may have 255
    nm.save(path, params, state, plan=plan, extra={"größe": torch.ones(2), "": 1})
    found = nm.load(path, plan)
    assert same(found.params, params) and same(found.state, state)
    assert torch.equal(found.extra["größe"], torch.ones(2)) and found.extra[""] == 1


def test_who_has_mapped_the_old_file_keeps_it(tmp_path: Path) -> None:
    plan, params, state = problem(steps=0)
    path = tmp_path / "run"
    nm.save(path, params, state, plan=plan)
    with safe_open(path, framework="pt") as file:
        mapped, before = file.get_tensor("params/z.w"), params["z.w"].clone()
        nm.save(path, {k: p + 1 for k, p in params.items()}, state, plan=plan)
        assert torch.equal(mapped, before)
    found = nm.load(path, plan)
    nm.save(path, params, state, plan=plan)
    assert torch.equal(found.params["z.w"], before + 1)


# ------------------------------------------------------------------------ what is written


def expanded(shape: torch.Size) -> Tensor:
    return torch.zeros(1).expand(shape)


def of_inference(shape: torch.Size) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(shape)


def of_meta(shape: torch.Size) -> Tensor:
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    ("what", "name", "make", "message"),
    [
        ("params", "half", expanded, "several of its entries are one place"),
        ("state", "half.momentum", expanded, "several of its entries are one place"),
        ("state", "half.momentum", of_inference, "it was made under torch.inference_mode"),
        ("params", "bias", of_meta, "expected a tensor with memory to load into, got one on meta"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_any_is(
    tmp_path: Path, what: str, name: str, make: Any, message: str
) -> None:
    plan, params, state = problem(steps=1)
    nm.save(tmp_path / "run", params, state, plan=plan)
    _, here, there = problem(steps=0)
    given = {"params": here, "state": there}
    old = given[what][name]
    given[what][name] = make(old.shape).to(old.dtype) if make is not expanded else make(old.shape)
    if make is expanded and old.dtype != torch.float32:
        given[what][name] = torch.zeros(1, dtype=old.dtype).expand(old.shape)
    before = copies({k: x for k, x in {**here, **there}.items() if not x.is_meta})
    with pytest.raises(ValueError, match=rf"{what}\['{name}'\]: .*{message}"):
        nm.load(tmp_path / "run", plan, params=here, state=there)
    assert all(torch.equal({**here, **there}[k], x) for k, x in before.items())


def test_targets_that_share_memory_are_refused_before_any_is_written(tmp_path: Path) -> None:
    plan, params, state = problem(steps=1)
    nm.save(tmp_path / "run", params, state, plan=plan)
    array = np.zeros((8, 12), dtype=np.float32)
    _, here, there = problem(steps=0)
    cases: list[tuple[Tensors, Tensors, str]] = [
        (here, there | {"z.w.momentum": here["z.w"]}, "state.*z.w.* params.*z.w|params.* state"),
        (
            here,
            there | {"bias.exp_avg": there["bias.exp_avg_sq"]},
            "state.*shares memory with 'bias",
        ),
        (
            here | {"z.w": torch.from_numpy(array)},  # of two storages
            there | {"z.w.momentum": torch.from_numpy(array)},
            "shares memory with",
        ),
    ]
    for one, other, message in cases:
        before = copies(one), copies(other)
        with pytest.raises(ValueError, match=f"{message}.*; each must have memory of its own"):
            nm.load(tmp_path / "run", plan, params=one, state=other)
        assert same(one, before[0]) and same(other, before[1])
    # Parts of one storage that do not overlap are what DDP and FSDP keep.
    flat = torch.zeros(2 * 96)
    one = here | {"z.w": flat[:96].view(8, 12)}
    other = there | {"z.w.momentum": flat[96:].view(8, 12)}
    nm.load(tmp_path / "run", plan, params=one, state=other)
    assert same(one, params) and same(other, state)


def test_what_is_loaded_under_inference_mode_can_be_trained(tmp_path: Path) -> None:
    plan, params, state = problem(steps=1)
    nm.save(tmp_path / "run", params, state, plan=plan)
    with torch.inference_mode():
        found = nm.load(tmp_path / "run", plan)
    assert not any(x.is_inference() for x in (*found.params.values(), *found.state.values()))
