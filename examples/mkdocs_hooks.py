"""What the site of `make docs` has beside the guides: the results with their pictures, and a
reference page from the docstrings.

The guides are read in the repository as well, so their links are relative to the repository's
files. A link that leaves the site becomes one to ``repo_url``, or plain text where there is none.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).resolve().parent
ROOT, GUIDES = EXAMPLES.parent, EXAMPLES / "guides"
# Where a file of the repository stands in the site.
MOVED = {
    EXAMPLES / "study" / "RESULTS.md": "results/study.md",
    EXAMPLES / "benchmarks" / "RESULTS.md": "results/benchmarks.md",
    **{image: f"images/{image.name}" for image in sorted(EXAMPLES.glob("*.png"))},
    **{image: f"results/{image.name}" for image in sorted(EXAMPLES.glob("*/*.png"))},
}
FROM = {place: source for source, place in MOVED.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]+)?\)")

SECTIONS = {
    "The optimizer": ["NorMuon", "for_trainer", "trainer_callback", "lightning_callback"],
    "The functional step": [
        "make_plan", "Plan", "Config", "Hyper", "Schedule", "init", "step", "step_", "update",
        "StepResult", "GraphedStep", "check_stage", "foreach_step_", "ForeachResult",
        "orthogonalize", "COEFFICIENTS",
    ],
    "Routes": ["routes_for", "Route", "RouteTable"],
    "Skipped steps": ["check", "SkipMonitor", "Skip", "NonFiniteStepError", "capture"],
    "Metrics and attention logits": ["report_metrics", "MeasuredResult", "qk_clip", "qk_clip_"],
    "Checkpoints, conversion, memory": [
        "save", "load", "Checkpoint", "CheckpointError", "convert_state", "put_state_", "names_in",
        "gather_state", "offload_", "reload_",
    ],
}  # fmt: skip


def public_names() -> dict[str, str]:
    """The package's ``__all__``, read without importing it: the path of each for mkdocstrings.

    That is ``normuon_fn.NAME``, but for a name that a module has too.
    """
    nodes = list(ast.walk(ast.parse((ROOT / "normuon_fn" / "__init__.py").read_text())))
    origin = {
        alias.name: f"normuon_fn.{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    for node in nodes:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            modules = {path.stem for path in (ROOT / "normuon_fn").glob("*")}
            return {
                name: origin[name] if name in modules else f"normuon_fn.{name}"
                for name in ast.literal_eval(node.value)
            }
    raise LookupError("normuon_fn/__init__.py: expected a literal __all__")


class Examples(griffe.Extension):
    """Docstrings as Markdown: ``>>>`` is code, and the single backticks of a public name a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        names, text = public_names(), obj.docstring.value
        text = re.sub(
            r"^([ ]*)>>>.*(?:\n\1(?:>>>|\.\.\.).*)*",
            lambda found: textwrap.indent(
                "\n```python\n"
                + re.sub(r"^ *(>>>|\.\.\.) ?", "", found[0], flags=re.M)
                + "\n```\n",
                found[1],
            ),
            text,
            flags=re.MULTILINE,
        )
        obj.docstring.value = re.sub(
            r"(?<![`\w])`(\w+)`(?!`)",
            lambda found: f"[{found[0]}][{names[found[1]]}]" if found[1] in names else found[0],
            text,
        )


def reference() -> str:
    """The page of all public names; one that no section has comes under "More"."""
    names = public_names()
    sections = {title: [n for n in listed if n in names] for title, listed in SECTIONS.items()}
    listed = {name for group in sections.values() for name in group}
    sections["More"] = [name for name in names if name not in listed]
    lines = ["# API reference", "", "`import normuon_fn as nm`: every public name is `nm.NAME`."]
    for title, group in sections.items():
        lines += ["", f"## {title}"] if group else []
        lines += [line for name in group for line in ("", f"::: {names[name]}")]
    return "\n".join(lines) + "\n"


def on_config(config: Any) -> Any:
    """Leaves out pages that may be missing and are."""
    absent = {name for name in config["extra"]["pending"] if not (GUIDES / name).exists()}

    def present(entries: list[Any]) -> list[Any]:
        kept: list[Any] = []
        for entry in entries:
            if not isinstance(entry, dict):
                kept += [] if entry in absent else [entry]
                continue
            ((title, inner),) = entry.items()
            if isinstance(inner, list):
                kept += [{title: pages}] if (pages := present(inner)) else []
            elif inner not in absent:
                kept.append(entry)
        return kept

    config["nav"] = present(config["nav"])
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, place in MOVED.items():
        files.append(File.generated(config, place, abs_src_path=str(source)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = FROM.get(page.file.src_uri, GUIDES / page.file.src_uri)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for k in range(0, len(parts), 2):  # code stays as it is
        parts[k] = LINK.sub(lambda found: _link(found, here, page.file.src_uri, config), parts[k])
    return "".join(parts)


def _link(found: re.Match[str], here: Path, uri: str, config: Any) -> str:
    mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or "://" in target or target == "reference.md":
        return found[0]
    file = (here.parent / target).resolve()
    if file in MOVED:
        place = MOVED[file]
    elif file.parent == GUIDES:
        if not file.exists() and file.name in config["extra"]["pending"]:
            return text
        place = file.name
    elif config.get("repo_url"):
        return f"[{text}]({config['repo_url']}/blob/main/{file.relative_to(ROOT).as_posix()})"
    else:
        path = file.relative_to(ROOT).as_posix()
        return text if file.stem in text else f"{text} (`{path}`)"
    return f"{mark}[{text}]({os.path.relpath(place, Path(uri).parent)}{anchor})"
