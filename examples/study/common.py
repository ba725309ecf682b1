"""What the studies share: where their results go, and what a result was measured on.

A study writes ``<name>.csv``, ``<name>.png`` and its section of RESULTS.md, between two marks that
name it.
"""

from __future__ import annotations

import csv
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import normuon_fn as nm

FOLDER = Path(__file__).parent
Row = dict[str, Any]


def measured_on(device: torch.device) -> str:
    """One line: the device, the versions and the date."""
    if device.type == "cuda":
        from triton import __version__ as triton

        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, triton {triton}"
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = (
        f"normuon_fn {nm.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}"
    )
    return f"{where}, {versions}, {date.today()}"


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def markdown(rows: Sequence[Row]) -> str:
    """A table; the columns are the keys of the first row."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(results: Path, name: str, text: str) -> None:
    """Replaces the section of that name in a Markdown file by ``text``, or appends it."""
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->"
    pages = results.read_text() if results.exists() else ""
    old = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end of {re.escape(name)} -->", re.DOTALL)
    if old.search(pages):
        results.write_text(old.sub(lambda _: section, pages))
    else:
        results.write_text(f"{pages.rstrip()}\n\n{section}\n".lstrip())
