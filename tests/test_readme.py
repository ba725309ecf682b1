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


def test_the_loop_runs_as_printed_and_learns() -> None:
    torch.manual_seed(0)
    printed: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), printed)
    first, x = {n: p.detach() for n, p in printed["model"].named_parameters()}, printed["x"]
    assert printed["loss_fn"](printed["params"], x) < 0.7 * printed["loss_fn"](first, x)
    assert int(printed["state"]["guard.step"]) == 20


def test_the_routes_fit_a_model_that_has_such_names() -> None:
    printed: dict[str, Any] = {"nm": nm}
    exec(compile(BLOCKS[1], "README.md", "exec"), printed)
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


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()


@pytest.mark.parametrize(("file", "name"), re.findall(r"\]\((\S+?\.py)\) `(test_\w+)`", README))
def test_tests_that_are_named_exist(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / file).read_text()
