"""The pages of examples/guides: their code as one script, and single blocks of it.

A page may say in an HTML comment what its code needs:

    <!-- needs: transformers, lightning -->       packages, without which its test is skipped
    <!-- ranks: 2 -->                             runs on so many ranks, as torchrun starts them
    <!-- not run: it needs two GPUs -->           is compiled and not run, for the reason given
"""

from __future__ import annotations

import re

from tests.processes import ROOT

GUIDES = ROOT / "examples" / "guides"
PAGES = sorted(path.name for path in GUIDES.glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page: str) -> str:
    return (GUIDES / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return _BLOCK.findall(text(page))


def block_with(page: str, words: str) -> str:
    """The block of a page that has these words."""
    return next(block for block in blocks(page) if words in block)


def said(page: str, what: str) -> str | None:
    """What the page says of its code in a comment ``<!-- what: ... -->``."""
    found = re.search(rf"^<!-- {what}: (.*?) -->$", text(page), re.MULTILINE)
    return found and found[1]


def script(page: str, first: str = "") -> str:
    """All blocks from top to bottom, every line at the number that it has in the page.

    ``first`` comes before them, in the line of the page's title.
    """
    lines, whole = [""] * text(page).count("\n"), text(page)
    for found in _BLOCK.finditer(whole):
        begin = whole.count("\n", 0, found.start(1))
        code = found[1].splitlines()
        lines[begin : begin + len(code)] = code
    lines[0] = first
    return "\n".join(lines) + "\n"


def named_in_navigation() -> list[str]:
    """The pages of examples/mkdocs.yml, in its order."""
    nav = (ROOT / "examples" / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return re.findall(r"- (?:[^:\n]+: )?(\S+\.md)$", nav, re.MULTILINE)


def pending() -> list[str]:
    """Pages of the navigation that may be missing."""
    (listed,) = re.findall(
        r"^  pending: \[(.*)\]$", (ROOT / "examples" / "mkdocs.yml").read_text(), re.MULTILINE
    )
    return listed.split(", ") if listed else []
