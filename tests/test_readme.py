"""What the README prints runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import normuon_fn as nm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(text: str) -> str:
    return next(block for block in BLOCKS if text in block)


def test_the_loop_runs_as_printed_and_learns() -> None:
    torch.manual_seed(0)
    printed: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), printed)
    first, x = {n: p.detach() for n, p in printed["model"].named_parameters()}, printed["x"]
    assert printed["loss_fn"](printed["params"], x) < 0.7 * printed["loss_fn"](first, x)
    assert int(printed["state"]["guard.step"]) == 20


def test_the_routes_fit_a_model_that_has_such_names() -> None:
    printed: dict[str, Any] = {"nm": nm}
    exec(compile(block_with("nm.Route(splits"), "README.md", "exec"), printed)
    params = {
        "h.attn.qkv.weight": torch.randn(1280, 32), "stem.conv.weight": torch.randn(8, 3, 3, 3),
        "h.gate.weight": torch.randn(4, 4), "frozen.w": torch.randn(4, 4),
    }  # fmt: skip
    plan = nm.make_plan(params, routes=printed["routes"])
    assert [p.route.algorithm for p in plan.parameters] == ["normuon", "normuon", "adamw", "frozen"]


def test_the_lists_are_stepped_as_printed() -> None:
    printed: dict[str, Any] = {"nm": nm, "torch": torch}
    block = next(block for block in BLOCKS if "foreach_step_" in block)
    with torch.compiler.set_stance("force_eager"):
        exec(compile(block, "README.md", "exec"), printed)
    assert all(x.any() for name in ("momentums", "variances") for x in printed[name])


def test_routes_for_a_model_and_its_checkpoints_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.MultiheadAttention(8, 2)
    params = {name: p.detach() for name, p in model.named_parameters()}
    printed: dict[str, Any] = {"nm": nm, "torch": torch, "model": torch.nn.ModuleDict({"h": model})}
    printed["params"] = {f"h.{name}": p for name, p in params.items()}
    exec(compile(block_with("nm.routes_for(model"), "README.md", "exec"), printed)
    assert printed["routes"]["h.in_proj_weight"] == nm.Route(splits=(8, 8, 8))
    assert printed["plan"].parameters[2].route == nm.Route(lr_mul=0.5)

    hyper = nm.Hyper.of(params, lr=0.02)
    result = nm.update(
        printed["params"], printed["params"], nm.init(printed["plan"], printed["params"]), hyper, printed["plan"]
    )
    printed |= {"params": result.params, "state": result.state}
    exec(compile(block_with("nm.save("), "README.md", "exec"), printed)
    assert torch.equal(printed["run"].state["h.in_proj_weight.momentum"], result.state["h.in_proj_weight.momentum"])
    assert printed["run"].extra == {"step": 20}


def test_the_conversion_runs_as_printed() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    plan = nm.make_plan({"weight": model.weight.detach()}, nm.Config(normalize=False))
    printed: dict[str, Any] = {"nm": nm, "model": model, "optimizer": optimizer, "plan": plan}
    exec(compile(block_with("nm.convert_state("), "README.md", "exec"), printed)
    assert torch.equal(printed["state"]["weight.momentum"], optimizer.state[model.weight]["momentum_buffer"])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()


@pytest.mark.parametrize(("file", "name"), re.findall(r"\]\((\S+?\.py)\) `(test_\w+)`", README))
def test_tests_that_are_named_exist(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / file).read_text()
