"""Every guide runs from top to bottom as one script, and the site of all of them builds."""

from __future__ import annotations

import importlib.util
import re
import socket
import sys
from pathlib import Path

import pytest

import normuon_fn as nm
from tests import guides, processes, scripts
from tests.processes import ROOT

WITH_CODE = [page for page in guides.PAGES if guides.blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_a_guide_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    """Operation by operation, without Inductor: a page then takes seconds."""
    reason = guides.said(page, "not run")
    if reason:
        compile(guides.script(page), page, "exec")
        pytest.skip(f"{page} says: {reason}")
    for package in filter(None, (guides.said(page, "needs") or "").split(", ")):
        pytest.importorskip(package)
    start = "import os, torch"
    start += f"; os.chdir({str(tmp_path)!r}); torch.compiler.set_stance('force_eager')"
    file = tmp_path / f"{page.removesuffix('.md').replace('-', '_')}.py"
    file.write_text(guides.script(page, start), encoding="utf-8")
    ranks = int(guides.said(page, "ranks") or 1)
    if ranks == 1:
        scripts.run(file)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
    world |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    each = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    found = scripts.run_all([scripts.Script(file, (), own) for own in each])
    assert not any(done.returncode for done in found), [done.stderr[-4000:] for done in found]


def test_what_a_page_asks_of_its_test_is_spelled_as_the_test_reads_it() -> None:
    known = re.compile(r"^<!-- (needs|ranks|not run): \S.* -->$")
    for page in guides.PAGES:
        comments = re.findall(r"<!--.*?-->", guides.text(page), re.DOTALL)
        assert not [c for c in comments if not known.match(c)], page
        assert "```py\n" not in guides.text(page) and "``` python" not in guides.text(page), page


def test_a_script_has_every_line_of_code_at_the_number_of_its_page() -> None:
    for page in WITH_CODE:
        code, lines = guides.script(page).splitlines(), guides.text(page).splitlines()
        assert len(code) == len(lines), page
        assert all(a in ("", b) for a, b in zip(code, lines, strict=True)), page
        assert sum(map(bool, code)) == sum(
            bool(line) for block in guides.blocks(page) for line in block.splitlines()
        )


def test_the_navigation_has_every_page_once_and_no_other() -> None:
    listed = guides.named_in_navigation()
    of_site = {"reference.md", "results/study.md", "results/benchmarks.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) - of_site - set(guides.pending()) <= set(guides.PAGES) <= set(listed)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if not (importlib.util.find_spec("mkdocs") and importlib.util.find_spec("mkdocstrings")):
        pytest.skip("mkdocs and mkdocstrings are not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "examples" / "mkdocs.yml"), "--site-dir", str(tmp_path)]
    processes.run(command, env={"NO_MKDOCS_2_WARNING": "1"})
    reference = (tmp_path / "reference.html").read_text()
    headings = re.findall(r'<h3 id="normuon_fn\.(?:[\w.]+\.)?(\w+)"', reference)
    assert sorted(headings) == sorted(nm.__all__)
    assert "&gt;&gt;&gt;" not in reference  # examples are code, and not quotations
    pages = [page for page in guides.named_in_navigation() if page not in guides.pending()]
    assert all((tmp_path / page).with_suffix(".html").exists() for page in pages)
