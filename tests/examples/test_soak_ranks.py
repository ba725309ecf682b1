"""The soak of several ranks at a size of seconds; and it notices a claim that does not hold."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from tests.processes import ROOT, run

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
FILE = ROOT / "examples" / "benchmarks" / "soak_ranks.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_ranks", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak_ranks"] = module  # its NamedTuples look for their annotations there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    file = tmp_path_factory.mktemp("soak") / "soak.json"
    printed = run([sys.executable, FILE, "--steps", "40", "--json", file]).stdout
    return json.loads(file.read_text()), printed


def test_killed_ranks_faults_and_restarts_at_other_world_sizes_leave_the_bits_of_a_quiet_run(
    found: tuple[dict[str, Any], str],
) -> None:
    seen, printed = found
    assert printed.count("| yes |") == 7 and "| no |" not in printed
    assert seen["faults"] >= 3 and seen["differences"] == [None] * 10
    episodes = seen["episodes"]
    assert [(x["ranks"], len(x["seen"])) for x in episodes] == [
        (2, 1), (2, 2), (1, 1), (4, 3), (4, 4), (2, 2),
    ]  # fmt: skip
    assert [x["from"] for x in episodes] == [0, 12, 20, 24, 28, 32]
    assert any(rank["faults"] for x in episodes for rank in x["seen"] if x["ranks"] > 1)


def test_every_defect_is_noticed(soak: ModuleType, found: tuple[dict[str, Any], str]) -> None:
    def planted(change: Any, *, compiled: bool = False) -> list[str]:
        seen = copy.deepcopy(found[0])
        change(seen, seen["episodes"][0]["seen"][0], seen["episodes"][-1]["seen"])
        return [claim.split()[0] for claim, _, holds in soak.claims(seen, compiled) if not holds]

    def bits(*values: float) -> Any:
        return lambda seen, *_: seen["differences"].extend(values)

    def sample(kind: str, more: float) -> Any:
        def change(_: Any, rank: dict[str, Any], __: Any) -> None:
            rank["samples"] = [*rank["samples"], copy.copy(rank["samples"][-1])]
            rank["samples"][-1][kind] += more

        return change

    assert planted(lambda *_: None) == []
    assert planted(bits(1e-7)) == ["checkpoints"] and planted(bits(1e-7), compiled=True) == []
    assert planted(bits(1e-2), compiled=True) == ["checkpoints"]
    assert planted(bits(1e-7, float("nan")), compiled=True) == ["checkpoints"]
    assert planted(lambda _, __, last: last[0].update(steps=1)) == ["the"]
    assert planted(lambda _, __, last: last[1].update(skipped=0)) == ["skipped"]
    assert planted(lambda _, rank, __: rank.update(error="Connection reset")) == ["survivors"]
    assert planted(lambda _, rank, last: last[0].update(error=rank["error"])) == ["survivors"]
    assert planted(lambda seen, *_: seen["trained"].update(last=9.0)) == ["squared"]
    assert planted(sample("tensors", 1)) == ["tensors"] and planted(sample("rss", 5)) == [
        "resident"
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bits_are_compared_not_values(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    counters = {f"guard.{x}": torch.tensor(0) for x in ("step", "skipped", "consecutive")}

    def state(value: float, step: int, skipped: int) -> dict[str, Any]:
        now = {"guard.step": torch.tensor(step), "guard.skipped": torch.tensor(skipped)}
        return {"params": {"a": torch.tensor([value])}, "state": {**counters, **now}}

    dcp.save(state(0.0, 3, 1), checkpoint_id=tmp_path / "saved", no_dist=True)
    cases = {
        "same": (0.0, 2, 0, None), "sign": (-0.0, 3, 1, 0.0), "count": (0.0, 3, 0, 1.0),
        "value": (0.5, 3, 1, 0.5),
    }  # fmt: skip
    for name, (*values, expected) in cases.items():
        torch.save(state(*values), tmp_path / name)
        assert soak.difference(tmp_path / "saved", tmp_path / name) == expected, name
