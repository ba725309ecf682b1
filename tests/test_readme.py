"""What the README prints runs as printed, and its links lead somewhere."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import normuon_fn as nm
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(text: str) -> str:
    return next(block for block in BLOCKS if text in block)


@pytest.mark.usefixtures("without_inductor")  # compiled by Inductor in compile_tests
def test_the_loop_runs_as_printed_and_learns() -> None:
    torch.manual_seed(0)
    printed: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), printed)
    first, x = {n: p.detach() for n, p in printed["model"].named_parameters()}, printed["x"]
    assert printed["loss_fn"](printed["params"], x) < 0.7 * printed["loss_fn"](first, x)
    assert int(printed["state"]["guard.step"]) == 20
    with torch.compiler.set_stance("force_eager"):
        exec(compile(block_with('0.1, guard="full")\n'), "README.md", "exec"), printed)
        printed["loss_fn"](dict(printed["model"].named_parameters()), x).backward()
        printed["optimizer"].step()


def test_the_routes_fit_a_model_that_has_such_names() -> None:
    printed: dict[str, Any] = {"nm": nm}
    exec(compile(block_with("stem.conv.weight"), "README.md", "exec"), printed)
    params = {
        "h.attn.qkv.weight": torch.randn(1280, 32), "stem.conv.weight": torch.randn(8, 3, 3, 3),
        "h.gate.weight": torch.randn(4, 4), "frozen.w": torch.randn(4, 4),
    }  # fmt: skip
    plan = nm.make_plan(params, routes=printed["routes"])
    assert [p.route.algorithm for p in plan.parameters] == ["normuon", "normuon", "adamw", "frozen"]


def test_routes_lists_and_checkpoints_run_as_printed_after_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed: dict[str, Any] = {}
    with torch.compiler.set_stance("force_eager"):
        for text in (
            "import normuon_fn as nm\n",
            "nm.routes_for(model, {",
            "nm.foreach_step_(",
            "nm.save(",
        ):
            exec(compile(block_with(text), "README.md", "exec"), printed)
    assert [p.route for p in printed["plan"].parameters][::2] == [nm.Route(), nm.Route(lr_mul=0.5)]
    assert all(x.any() for name in ("momentums", "variances") for x in printed[name])
    momentum = printed["state"]["0.weight.momentum"]
    assert momentum.any() and torch.equal(printed["run"].state["0.weight.momentum"], momentum)
    assert printed["run"].extra == {"step": 20}


def test_the_conversion_runs_as_printed() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    plan = nm.make_plan({"weight": model.weight.detach()}, nm.Config(normalize=False))
    printed: dict[str, Any] = {"nm": nm, "model": model, "optimizer": optimizer, "plan": plan}
    exec(compile(block_with("nm.convert_state("), "README.md", "exec"), printed)
    assert torch.equal(
        printed["state"]["weight.momentum"], optimizer.state[model.weight]["momentum_buffer"]
    )


def llama() -> Any:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes)
    )


ROWS = [
    {"input_ids": row, "labels": row}
    for row in (torch.arange(24)[:, None] + 3 * torch.arange(8)) % 16
]


@pytest.mark.parametrize("text", ["optimizers=(optimizer, None)", "nm.for_trainer("])
def test_the_trainer_runs_as_printed(tmp_path: Path, text: str) -> None:
    import transformers

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    printed: dict[str, Any] = {
        "nm": nm,
        "transformers": transformers,
        "model": llama(),
        "arguments": arguments,
        "data": ROWS,
    }
    with torch.compiler.set_stance("force_eager"):
        exec(compile(block_with(text), "README.md", "exec"), printed)
    losses = [entry["loss"] for entry in printed["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_the_lightning_module_runs_as_printed(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", minversion="2.5")
    printed: dict[str, Any] = {"nm": nm, "torch": torch, "lightning": lightning}
    exec(compile(block_with("lightning.LightningModule"), "README.md", "exec"), printed)
    module = printed["Module"](llama())
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
        gradient_clip_val=1.0,
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=8))
    (optimizer,) = trainer.optimizers
    assert int(optimizer.state[module.model.lm_head.weight]["step"]) == 3


def test_accelerate_is_prepared_as_printed() -> None:
    accelerate = pytest.importorskip("accelerate", minversion="1")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    data = torch.utils.data.DataLoader(ROWS, batch_size=8)
    printed: dict[str, Any] = {"nm": nm, "accelerate": accelerate, "model": llama(), "data": data}
    exec(compile(block_with("accelerator.prepare("), "README.md", "exec"), printed)
    model, optimizer = printed["model"], printed["optimizer"]
    with torch.compiler.set_stance("force_eager"):
        for batch in printed["data"]:
            printed["accelerator"].backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        isinstance(optimizer.optimizer, nm.NorMuon)
        and int(optimizer.state[model.lm_head.weight]["step"]) == 3
    )


@pytest.mark.parametrize(
    "version", re.findall(r"(transformers|Accelerate|Lightning) (\d+\.\d+\.\d+)", README)
)
def test_the_versions_of_the_frameworks_are_those_that_are_installed_for_the_tests(
    version: tuple[str, str],
) -> None:
    pinned = [
        line.partition(";")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    assert f"{version[0].lower()}=={version[1]}" in pinned


@pytest.mark.parametrize(("file", "name"), re.findall(r"\]\((\S+?\.py)\) `(test_\w+)`", README))
def test_tests_that_are_named_exist(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / file).read_text()


def table(pages: str, *, after: str, first: str) -> list[list[str]]:
    """The cells of the first table behind ``after`` whose head begins with ``first``.

    The rule under the head is left out.
    """
    start = pages.index(f"| {first}", pages.index(after))
    lines = pages[start:].split("\n\n")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for k, line in enumerate(lines)
        if k != 1
    ]


STUDY = json.loads((ROOT / "examples" / "study" / "training.json").read_text())
RUNS = {row["run"]: row for row in STUDY["rows"]}
MEASURED = (ROOT / "examples" / "benchmarks" / "RESULTS.md").read_text()


def test_the_first_table_is_the_studys() -> None:
    main = ("AdamW", "Muon", "NorMuon")
    head, *rows = table(README, after="# normuon_fn", first="a GPT of")
    tokens = STUDY["steps"] * STUDY["tokens a step"]
    size = f"a GPT of {STUDY['parameters'] / 1e6:.1f} million parameters"
    assert head[0] == f"{size}, {tokens / 1e6:.0f} million tokens"
    assert [cell.split(" (")[0] for cell in head[1:]] == [*main]
    columns = (
        "loss",
        "spread",
        "tokens to AdamW's loss",
        "time to AdamW's loss",
        "ms a step",
        "optimizer, ms",
    )
    of = [[RUNS[name][c] for name in main] for c in columns]
    whole = [
        ["100 %" if cell == "-" else f"{float(cell.rstrip('%')):.0f} %" for cell in cells]
        for cells in of[2:4]
    ]
    expected = [*of[:2], *whole, [f"{float(cell):.1f}" for cell in of[4]], of[5]]
    assert [row[1:] for row in rows] == expected


def test_the_claims_under_it_are_what_the_seeds_say() -> None:
    loss, spread, best = (
        {name: float(row[c]) for name, row in RUNS.items()} for c in ("loss", "spread", "lr")
    )
    assert RUNS["Muon"]["apart from AdamW"] == RUNS["NorMuon"]["apart from AdamW"] == "yes"
    assert abs(loss["NorMuon"] - loss["Muon"]) < spread["NorMuon"]
    assert (
        abs(loss["NorMuon, 75% of the text"] - loss["AdamW"]) < spread["NorMuon, 75% of the text"]
    )
    assert STUDY["baseline"] == "AdamW" and loss["AdamW, clipped"] > loss["AdamW"]
    clipped = {
        row["lr"]: float(row["AdamW, clipped"]) < float(row["AdamW"]) for row in STUDY["grid"]
    }
    assert [lr for lr, better in clipped.items() if better] == [2.8e-3, 4e-3, 8e-3]
    assert len(STUDY["grid"]) == 6 and 2.7 < best["NorMuon"] / best["AdamW"] < 3
    batches = {
        row["faults"]: row
        for row in json.loads((ROOT / "examples/study/batch_skip.json").read_text())["rows"]
    }
    text = README.replace("\n", " ")
    for faults, sentence in (
        (
            "1.0%",
            "at {} to {} of 1970 steps (drawn at 1 %) the study's model ended {} to {} above the "
            "clean run of the same seed",
        ),
        ("0.1%", "at {} to {} (0.1 %), {} to {}. Seeds differ by {spread}."),
    ):
        row = batches[f"{faults} of the steps, guard full"]
        faulty, by_seed = (
            sorted(map(int, row["NaNs"].split())),
            sorted(off.removeprefix("+") for off in row["by seed"].split()),
        )
        assert row["NaNs"] == row["skipped"] and STUDY["steps"] == 1970
        spread = batches["no faults"]["spread"]
        assert (
            sentence.format(faulty[0], faulty[-1], by_seed[0], by_seed[-1], spread=spread) in text
        )
    assert batches["0.1% of the steps, guard off"]["loss"] == "dead"
    small = (ROOT / "examples/study/RESULTS.md").read_text()
    assert (
        "last update has 1.6e-12 of its RMS" in text
        and "at 2^-66 the last update has 1.6e-12 times the RMS" in small
    )


def test_what_a_restart_leaves_is_what_the_soaks_saw() -> None:
    left = []
    for device in ("cpu", "cuda"):
        with (ROOT / "examples" / "study" / f"soak-{device}.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["run"] == "resumed"]
        cuts = json.loads((ROOT / "examples" / "study" / f"soak-{device}.json").read_text())[
            "cuts"
        ]["resumed"]
        at = {int(row["step"]): float(row["rss"]) for row in rows}
        left += [at[b] - at[a] for a, b in pairwise(cuts[1:])]
    assert (
        f"a restart leaves {min(left):.0f} to {max(left):.0f} MB on the host, none on the device"
        in README
    )


def test_the_speeds_are_those_of_the_results() -> None:
    _, gpt2, large, guarded, plain, plain_gpt2 = table(README, after="## Speed", first="matrices")
    found = []
    for name in ("gpt2", "1.3b"):
        rows = {row[0]: row for row in table(MEASURED, after=f"#### {name} fp32", first="row")}
        row = [rows[k] for k in ("normuon_fn graph, guard off", "torch Muon", "torch AdamW fused")]
        found.append([f"{float(x):.3g}" for x in (row[0][1], row[0][6], row[1][1], row[2][1])])
        alone = {"gpt2": plain_gpt2, "1.3b": plain}[name]
        assert alone[1] == f"{float(rows['normuon_fn step_, guard off'][1]):.3g}"
        full = rows["normuon_fn graph, guard full"][1] if name == "1.3b" else ""
    assert [gpt2[1:], large[1:]] == found and guarded[1] == f"{float(full):.3g}"
    assert (
        f"{found[1][0]} to {found[1][3]} with the 1.2 billion" in README and "7 to 9 ms" in README
    )
    sharded = {
        row[0]: float(row[1]) for row in table(MEASURED, after="## Two H200", first="row")[1:]
    }
    fsdp2, ddp, one = (
        sharded[k]
        for k in ("2 GPUs, FSDP2, guard off", "2 GPUs, DDP, guard off", "1 GPU, guard off")
    )
    measured = f"FSDP2 {fsdp2:.1f}, DDP {ddp:.1f}, one GPU {one:.1f}"
    assert f"{measured}. That is {one / fsdp2:.2f} and {one / ddp:.2f}" in README
    ours, adamw = RUNS["NorMuon"]["optimizer, ms"], RUNS["AdamW"]["optimizer, ms"]
    assert f"{ours} ms to {adamw} with {STUDY['parameters'] / 1e6:.1f} million parameters" in README


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "examples/README.md",
        "examples/study/RESULTS.md",
        "examples/benchmarks/RESULTS.md",
    ],
)
def test_every_link_leads_somewhere(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = folder / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads
            }, anchor


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "examples/study/RESULTS.md"])
def test_no_page_holds_a_place_for_something(page: str) -> None:
    assert not re.findall(
        r"\b[A-Z]+_HERE\b|\| (?:DIGITS|SWEEP|DDP|FSDP) \|", (ROOT / page).read_text()
    )
