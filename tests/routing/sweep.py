"""What `routes_for` decides for every model type of transformers: a table to compare versions with.

    python -m tests.routing.sweep                    # every type: what moved against the table
    python -m tests.routing.sweep --only llama,bert  # those types alone, with the reasons
    python -m tests.routing.sweep --write            # writes tests/routing/sweep_table.tsv.gz
    python -m tests.routing.sweep --names            # where names alone decide otherwise

Every registered configuration is shrunk (two layers, eight experts; widths as published) and its
model is built on the meta device, so that no memory is used: 804 types took 70 s on one CPU core.
A line of the table is a model type, a kind of parameter (the classes and names around it, without
numbers) and the rule it gets. Vectors are left out: they get AdamW by their shape.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.routing.names import by_names
from normuon_fn.routing.routes import Decision

# What a configuration cannot be made, or its model built, without.
_NEEDED: dict[str, dict[str, Any]] = {
    "reformer": {"is_decoder": True},
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "wav2vec2-bert": {"vocab_size": 50},
    "wav2vec2-conformer": {"vocab_size": 50},
    "esm": {"vocab_size": 50, "pad_token_id": 0},
}
TABLE = Path(__file__).with_name("sweep_table.tsv.gz")
_LAYERS = re.compile(r"(^|_)(n_layers?|num_(\w+_)?(layers|blocks)|(num_)?depth|layers|n_blocks)$")
_EXPERTS = re.compile(r"(^|_)(n_|num_)\w*experts$")
_PER_TOKEN = re.compile(r"(per_tok|topk|top_k|shared|activated|per_token|_k)")
# The classes of a type that have a head, the commonest first.
_AUTO = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "CTC", "PRETRAINING", "AUDIO_CLASSIFICATION",
    "TEXT_TO_WAVEFORM", "DEPTH_ESTIMATION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION",
    "TIME_SERIES_PREDICTION",
)  # fmt: skip


def model_types() -> list[str]:
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    return sorted(auto.CONFIG_MAPPING_NAMES)


def shrink(config: Any, depth: int = 0) -> None:
    """Two layers and eight experts, in the configuration and in those inside it."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and depth < 4:
            shrink(value, depth + 1)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif _LAYERS.search(name) and value > 2 and "first" not in name:
            setattr(config, name, 2)
        elif _EXPERTS.search(name) and not _PER_TOKEN.search(name) and value > 8:
            setattr(config, name, 8)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) > 2:  # one layer of each kind
        config.layer_types = (list(dict.fromkeys(types)) + types)[:2]


def model_classes(config_class: type) -> list[type[nn.Module]]:
    """The classes of a configuration, those with a head first."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found = []
    for name in [f"MODEL_FOR_{kind}_MAPPING" for kind in _AUTO] + ["MODEL_MAPPING"]:
        mapping = getattr(auto, name, None)
        if mapping is not None and config_class in mapping:
            made = mapping[config_class]
            found += list(made) if isinstance(made, tuple) else [made]
    return found


def build(model_type: str) -> nn.Module:
    """The model of that type on the meta device, shrunk where its configuration lets it."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    config_class = auto.CONFIG_MAPPING[model_type]
    error: Exception = LookupError("no model class is registered")
    for made in model_classes(config_class):
        for small in (True, False):
            try:
                config = config_class(**_NEEDED.get(model_type, {}))
                if small:
                    shrink(config)
                with torch.device("meta"):
                    return made(config)
            except Exception as found:
                error = found
    raise error


def kind_of(model: nn.Module, name: str) -> str:
    """The name with the class it stands in, and with no numbers."""
    parts = name.split(".")
    classes = [type(model.get_submodule(".".join(parts[:k]))).__name__ for k in range(len(parts))]
    at = max(0, len(parts) - 3)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", f"{classes[at]}.{'.'.join(parts[at:])}")


def lines_of(model_type: str, *, reasons: bool = False) -> Iterator[tuple[str, str, str]]:
    try:
        model = build(model_type)
    except Exception as error:
        yield model_type, "-", f"not built: {type(error).__name__}: {str(error).splitlines()[:1]}"
        return
    seen = {}
    for entry in nm.routes_for(model).entries.values():
        if sum(size != 1 for size in entry.shape) < 2 or entry.reason == "buffer":
            continue
        rule = re.sub(
            r"\d+(\+\d+)+", lambda m: "+".join("n" * (m[0].count("+") + 1)), str(entry.route)
        )
        rule = re.sub(r"heads \d+", "heads n", rule)
        if reasons:
            rule += f" | {entry.shape} | {entry.reason}"
        seen.setdefault((kind_of(model, entry.name), rule))
    for kind, rule in seen:
        yield model_type, kind, rule


class Differs(NamedTuple):
    """A kind of parameter for which names alone give another rule than the modules."""

    model_type: str
    kind: str
    name: str
    shape: tuple[int, ...]
    by_modules: Decision
    by_names: Decision


def compare_with_names(model_type: str) -> tuple[Counter[str], list[Differs]]:
    """How many kinds names are certain of, or doubt, and those whose rule is not the modules'."""
    model = build(model_type)
    table = nm.routes_for(model)
    found = by_names({name: p for name, p in model.named_parameters() if name in table})
    counts, differs, seen = Counter[str](), [], set()
    for name, decision in found.items():
        entry = table.entries[name]
        known = Decision(entry.route.unfrozen or entry.route, entry.reason, entry.certainty)
        rules = known.route.algorithm, decision.route.algorithm
        kind = (kind_of(model, name), *rules, decision.certainty)
        if sum(size != 1 for size in entry.shape) < 2 or rules[0] == "frozen" or kind in seen:
            continue
        seen.add(kind)
        counts["certain" if decision.certainty == "certain" else "doubted"] += 1
        if rules[0] != rules[1]:
            differs.append(Differs(model_type, kind[0], name, entry.shape, known, decision))
    return counts, differs


def print_names(types: list[str]) -> None:
    counts, wrong = Counter[str](), Counter[str]()
    for model_type in types:
        try:
            of_type, differs = compare_with_names(model_type)
        except Exception:  # not built, which the table says
            continue
        counts += of_type
        for row in differs:
            sure = "certain" if row.by_names.certainty == "certain" else "doubted"
            wrong[sure] += 1
            print(sure, *row[:4], row.by_modules[1], row.by_names[1], sep="\t")
    print(f"kinds: {dict(counts)}, of them with another rule: {dict(wrong)}", file=sys.stderr)


def table_version() -> str:
    """The version of transformers that the table was written with."""
    with gzip.open(TABLE, "rt") as file:
        return file.readline().split()[2].rstrip(":")


def read_table() -> list[tuple[str, str, str]]:
    with gzip.open(TABLE, "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
    return [(row[0], row[1], row[2]) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, by commas")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--names", action="store_true", help="names alone against the modules")
    parser.add_argument("--out", help="all lines with their reasons to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    types = args.only.split(",") if args.only else model_types()
    if args.names:
        print_names(types)
        return 0
    started, rows = time.perf_counter(), []
    out = open(args.out, "w") if args.out else sys.stdout if args.only else None  # noqa: SIM115
    for model_type in types:
        for row in lines_of(model_type, reasons=out is not None):
            rows.append((row[0], row[1], row[2].split(" | ")[0]))
            if out is not None:
                print(*row, sep="\t", file=out, flush=True)
    print(f"{len(types)} types, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if args.write:
        with gzip.GzipFile(TABLE, "wb", mtime=0) as file:
            head = f"# transformers {transformers.__version__}: model type, kind, rule\n"
            file.write((head + "".join("\t".join(row) + "\n" for row in rows)).encode())
        return 0
    before = {row for row in read_table() if row[0] in types} if TABLE.exists() else set()
    for row in sorted(before - set(rows)):
        print("-", *row, sep="\t")
    for row in sorted(set(rows) - before) if before else []:
        print("+", *row, sep="\t")
    return int(bool(before ^ set(rows)))


if __name__ == "__main__":
    raise SystemExit(main())
