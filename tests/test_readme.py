"""What the README and the guides say is so: code, numbers, links, and the facts about others.

The guides run from top to bottom in examples/test_guides.py.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import re
from itertools import pairwise
from typing import Any

import pytest
import torch

import normuon_fn as nm
from tests import guides
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = ["README.md", "examples/README.md", "examples/study/RESULTS.md"]
PAGES += ["examples/benchmarks/RESULTS.md", *(f"examples/guides/{page}" for page in guides.PAGES)]


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.split()) <= 1400
    heads = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert heads == ["Install", "Use", "Why this one", "When not to use it", "Where to go on"]


@pytest.mark.usefixtures("without_inductor")  # compiled by Inductor in compile_tests
def test_the_loop_runs_as_printed_and_learns() -> None:
    torch.manual_seed(0)
    printed: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), printed)
    first, x = {n: p.detach() for n, p in printed["model"].named_parameters()}, printed["x"]
    assert printed["loss_fn"](printed["params"], x) < 0.7 * printed["loss_fn"](first, x)
    assert int(printed["state"]["guard.step"]) == 20
    assert "`model.load_state_dict(params)` brings the weights back" in README
    printed["model"].load_state_dict(printed["params"])
    assert len(BLOCKS) == 1


@pytest.mark.usefixtures("eager")
def test_both_sides_of_the_diff_train_a_model() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    for sign in "-+":
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        printed: dict[str, Any] = {"torch": torch, "model": model}
        code = "\n".join(line[1:] for line in diff.splitlines() if line[0] == sign)
        exec(compile(code, "README.md", "exec"), printed)
        losses = []
        for _ in range(20):
            loss = model(torch.ones(4, 8)).square().mean()
            printed["optimizer"].zero_grad()
            loss.backward()
            printed["optimizer"].step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    assert len(diff.splitlines()) == 3


@pytest.mark.parametrize(
    "version",
    re.findall(
        r"(transformers|Accelerate|Lightning) (\d+\.\d+\.\d+)",
        guides.text("trainer-accelerate-lightning.md"),
    ),
)
def test_the_versions_of_the_frameworks_are_those_that_are_installed_for_the_tests(
    version: tuple[str, str],
) -> None:
    pinned = [
        line.partition(";")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    assert f"{version[0].lower()}=={version[1]}" in pinned


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    found = re.findall(r"\]\((\S+?\.py)\)[\s:]*`(test_\w+)`", text)
    assert all(f"def {name}(" in (folder / file).read_text() for file, name in found)
    assert len(found) >= (3 if page.endswith("guarantees.md") else 0)


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
SPEED = guides.text("speed.md")


def test_the_first_table_is_the_studys() -> None:
    main = ("AdamW", "Muon", "NorMuon")
    head, *rows = table(SPEED, after="## Gain", first="a GPT of")
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


def test_the_readme_sums_the_table_up() -> None:
    _, *rows = table(SPEED, after="## Gain", first="a GPT of")
    size, text = f"{STUDY['parameters'] / 1e6:.1f} million", README.replace("\n", " ")
    seen = f"{STUDY['steps'] * STUDY['tokens a step'] / 1e6:.0f} million tokens"
    tokens, seconds = (row[3] for row in rows if "AdamW's final loss" in row[0])
    assert f"A GPT of {size} parameters on {seen}" in text
    assert f"with {tokens} of the tokens and {seconds} of the time" in text
    _, *small = table(
        (ROOT / "examples/study/RESULTS.md").read_text(),
        after="\n## Tokens per parameter",
        first="tokens per parameter | run",
    )
    whole = [f"{float(row[10].rstrip('%')):.0f}" for row in small if row[1] == "NorMuon"][::-1]
    said = f"with 3, 10 and 20, in smaller models, it takes {whole[0]}, {whole[1]} and {whole[2]} %"
    assert f"{said} of the tokens" in text


@pytest.mark.usefixtures("eager")
def test_the_first_update_of_adamw_is_five_times_as_large_as_one_of_a_matrix() -> None:
    assert "AdamW's first updates are up to five times larger" in README.replace("\n", " ")
    moved = []
    for make in (lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.0), nm_at):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
        optimizer, before = make(model), model[0].weight.detach().clone()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        moved.append(float((model[0].weight.detach() - before).square().mean().sqrt()))
    assert moved[0] / moved[1] == pytest.approx(5.0, rel=0.01)


def nm_at(model: torch.nn.Module) -> nm.NorMuon:
    return nm.NorMuon(model, lr=0.01)


def test_the_guide_to_rates_has_the_grid_of_the_study() -> None:
    text = guides.text("rates.md")
    _, *rows = table(text, after="## Pretraining", first="lr")
    assert rows == [[str(row[c]) for c in ("lr", "AdamW", "NorMuon")] for row in STUDY["grid"]]
    assert all(float(row["NorMuon"]) < float(row["AdamW"]) for row in STUDY["grid"])
    assert f"GPT of {STUDY['parameters'] / 1e6:.1f} million parameters at six rates" in text


def test_the_first_numbers_rest_on_the_best_rates_of_the_grids() -> None:
    """The best rate of one column each; the page may give two whose losses differ by nothing."""
    _, *rows = table(guides.text("rates.md"), after="## The first number", first="study")
    study = (ROOT / "examples/study/RESULTS.md").read_text()
    found = []
    for ratio in (20, 10, 3):
        head, *grid = table(study, after=f"\n{ratio} tokens per parameter:\n", first="lr")
        best = []
        for name in ("AdamW", "NorMuon"):
            of = {row[0]: row[head.index(name)] for row in grid if len(row) == len(head)}
            best.append(min((float(x), lr) for lr, x in of.items() if x not in ("", "nan"))[1])
        found.append(best)
    found.append([str(RUNS[name]["lr"]) for name in ("AdamW", "NorMuon")])
    said = [[row[2], row[3].split(" to ")[0].split(" (")[0]] for row in rows]
    assert said == found


def test_a_cycle_of_torch_moves_the_momentum_of_the_matrices_unless_it_is_told_not_to() -> None:
    assert "unless you write `cycle_momentum=False`" in guides.text("rates.md").replace("\n", " ")
    for told, momentum in (({}, 0.85), ({"cycle_momentum": False}, 0.95)):
        optimizer = nm.NorMuon(torch.nn.Linear(4, 4), lr=0.01)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10, **told)
        optimizer._opt_called = True  # type: ignore[attr-defined] # nothing has to be stepped here
        lowest = 1.0
        for _ in range(9):
            cycle.step()
            lowest = min(lowest, optimizer.param_groups[0]["momentum"])
        assert lowest == pytest.approx(momentum)


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
    text = guides.text("skips.md").replace("\n", " ")
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
        "last update has 1.6e-12 of its RMS" in guides.text("guarantees.md")
        and "an update of 2e-12 of its size" in README
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
        in guides.text("guarantees.md")
    )


def test_the_speeds_are_those_of_the_results() -> None:
    speed = " ".join(SPEED.split())
    _, gpt2, large, guarded, plain, plain_gpt2 = table(SPEED, after="## Cost", first="matrices")
    ours, full, eager = (
        f"normuon_fn {what}"
        for what in ("graph, guard off", "graph, guard full", "step_, guard off")
    )
    muon, adamw = "torch Muon", "torch AdamW fused"
    found, newest = [], "## One H200, at 38c9dea"
    for name, line, alone in (("GPT-2", gpt2, plain_gpt2), ("1.3B", large, plain)):
        rows = {row[0]: row for row in table(MEASURED, after=newest, first=f"{name} fp32")}
        taken = (rows[ours][1], rows[ours][5], rows[muon][1], rows[adamw][1])
        found.append([f"{float(x):.3g}" for x in taken])
        assert [*line[1:3], *line[5:]] == found[-1]
        assert alone[1] == f"{float(rows[eager][1]):.3g}"
        peers = [float(row[1]) for k, row in rows.items() if k.startswith("dion")]
        digits = 2 if name == "GPT-2" else 3
        assert line[3].removesuffix(", captured") == f"{min(peers):.{digits}g}"
        assert ("captured" in line[3]) == (name == "GPT-2")
        others = [float(row[1]) for k, row in rows.items() if k.startswith("Emerging")]
        assert line[4] == "".join(f"{x:.3g}" for x in others)
        if name == "GPT-2":
            assert plain_gpt2[3] == f"{float(rows['dion NorMuon Triton'][1]):.3g}"
    assert guarded[1] == f"{float(rows[full][1]):.3g}"
    assert f"{found[1][0]} to {found[1][3]} with the 1.2 billion" in README
    theirs = [r for k, r in rows.items() if k.startswith(("dion", "Emerging"))]
    assert len(theirs) == 6
    by_setting = [float(row[1]) for row in theirs if row[0].startswith("dion")]
    times = [float(row[4].split()[0]) for row in theirs]
    assert f"takes {min(by_setting):.0f} to {max(by_setting):.0f} ms for the 1.3B" in speed
    others = table(MEASURED, after="## Other H200s", first="|")
    by_row = {row[0]: row[1:] for row in others}
    for ms, dion in zip(
        by_row["1.3B, captured, ms"], by_row["dion NorMuon / Triton at 1.3B, ms"], strict=True
    ):
        times += [float(x) / float(ms) for x in dion.split(" / ") if x != "-"]
    assert f"[{min(times):.1f} to {max(times):.1f} times](examples/guides/speed.md)" in README
    assert f"was {min(times):.1f} times as long as ours" in speed
    waits = [row.split(" / ") for row in by_row["GPT-2 without a graph, ms: ours / dion Triton"]]
    most = max(float(row[0]) / float(row[1]) for row in waits if len(row) == 2)
    assert f"took up to {most:.1f} times as long as theirs" in speed
    for label, matrices in (("GPT-2", "GPT-2 124M"), ("1.3B", "the 1.3B")):
        (row,) = (row for row in others if row[0] == f"{label}, captured, ms")
        fast, slow = min(row[2:-1]), max(row[2:-1])  # the products of today, other machines
        assert f"{fast} to {slow} ms for {matrices}" in speed
    host = re.search(r"warm `step_` \| 144 / 1000 \| ([\d.]+) / ([\d.]+) ms", MEASURED)
    assert host
    few, many = (f"{float(x):.0f}" for x in host.groups())
    assert f"takes {few} ms per step of 144 matrices" in README
    assert f"takes {few} ms per step for 144 matrices, {many} for 1000 (H200)" in speed
    sharded = {
        row[0]: float(row[1]) for row in table(MEASURED, after="## Two H200", first="row")[1:]
    }
    fsdp2, ddp, one = (
        sharded[k]
        for k in ("2 GPUs, FSDP2, guard off", "2 GPUs, DDP, guard off", "1 GPU, guard off")
    )
    measured = f"FSDP2 {fsdp2:.1f}, DDP {ddp:.1f}, one GPU {one:.1f}"
    said = f"{measured}. That is {one / fsdp2:.2f} and {one / ddp:.2f}"
    assert said in speed
    parts = [RUNS[name]["optimizer"].replace("%", " %") for name in ("NorMuon", "AdamW")]
    assert f"took {parts[0]} of a step and AdamW {parts[1]}" in speed
    ours, adamw = RUNS["NorMuon"]["optimizer, ms"], RUNS["AdamW"]["optimizer, ms"]
    assert f"{ours} ms to {adamw} with {STUDY['parameters'] / 1e6:.1f} million parameters" in README


def test_the_memory_and_the_first_step_are_those_of_the_results() -> None:
    text, memory = (" ".join(page.split()) for page in (README, guides.text("memory.md")))
    newest = MEASURED[MEASURED.index("## One H200, at 38c9dea") :]
    above = re.search(r"memory over .* at 1.3B, .*\| ([\d.]+) / ([\d.]+) GiB \| met", newest)
    assert above
    assert f"At 1.3B the step takes {above[1]} GiB ({above[2]} with a guard)" in text
    assert f"{above[1]} GiB above parameters, gradients and state, and {above[2]} with a" in memory
    sharded = {row[0]: row[6] for row in table(MEASURED, after="## Two H200", first="row")[1:]}
    assert f"two FSDP2 ranks take {sharded['2 GPUs, FSDP2, guard off']} GiB each" in text
    first = r"first step, empty cache \| 72 \| ([\d.]+)"
    seen = {round(float(x)) for x in re.findall(first, MEASURED)}
    (seconds,) = seen  # of an H200 and of two CPU cores
    assert f"{seconds} s for 72 matrices of one shape (H200, and two CPU cores)" in text
    many = re.search(r"\| \| 4000 \| ([\d.]+) s \|", MEASURED)
    assert many and round(float(many[1])) == seconds
    page = guides.text("troubleshooting.md").replace("\n", " ")
    assert f"72 or 4000 matrices of one shape take about {seconds} s" in page


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_package_and_every_option_that_a_page_writes_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in re.findall(r"\bnm\.(\w+)", text) if not hasattr(nm, name)] == []
    for called in (nm.Config, nm.Route):
        known = inspect.signature(called).parameters
        calls = re.findall(rf"(?<!\w){called.__name__}\(([^()]*)\)", text)
        written = {key for call in calls for key in re.findall(r"(\w+)=", call)}
        assert written <= {*known}, written - {*known}


def test_pages_and_examples_write_nm_init_in_one_order() -> None:
    files = [ROOT / page for page in PAGES] + [*(ROOT / "examples").rglob("*.py")]
    found = [call for file in files for call in re.findall(r"nm\.init\((.*?)\)", file.read_text())]
    assert len(found) > 20 and all(call.endswith("plan") for call in found), found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = folder / target if target else ROOT / page
        if file.name in guides.pending() and not file.exists():
            continue
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads
            }, anchor


@pytest.mark.parametrize("page", PAGES)
def test_no_page_holds_a_place_for_something(page: str) -> None:
    assert not re.findall(
        r"\b[A-Z]+_HERE\b|\b(?:TODO|FIXME)\b|\| (?:DIGITS|SWEEP|FSDP) \|",
        (ROOT / page).read_text(),
    )


def test_images_have_an_address_once_the_project_has_one() -> None:
    """A package index shows the README without the repository around it."""
    with_urls = "[project.urls]" in (ROOT / "pyproject.toml").read_text()
    images = re.findall(r"!\[[^\]]*\]\((\S+?)\)", README)
    assert images and all(image.startswith("https://") == with_urls for image in images)


# --- What is said about others


def test_torch_muon_takes_matrices_alone_one_after_another_and_knows_no_ranks() -> None:
    for shape in ((4,), (2, 4, 4)):
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            torch.optim.Muon([torch.nn.Parameter(torch.ones(shape))])
    module = importlib.import_module("torch.optim._muon")
    source, loop = inspect.getsource(module), inspect.getsource(module._single_tensor_muon)
    assert "distributed" not in source and "DTensor" not in source
    assert "for i, param in enumerate(params)" in loop and "foreach" not in loop


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("ours", [True, False])
def test_a_nan_is_skipped_and_named_here_and_goes_into_the_weights_of_torch_muon(
    ours: bool,
) -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer: torch.optim.Optimizer
    optimizer = nm.NorMuon(model, guard="full") if ours else torch.optim.Muon(model.parameters())
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(4, 4)
    model.weight.grad[0, 0] = float("nan")
    if ours:
        with pytest.warns(RuntimeWarning, match="step 1 skipped, 1 in a row: weight"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.weight, before) == ours
    assert bool(model.weight.isfinite().all()) == ours


@pytest.mark.usefixtures("eager")
def test_gradients_times_a_power_of_two_give_our_bits_and_next_to_nothing_of_torch_muon() -> None:
    """2^-66: the factor of the study. The README says 2e-12 of its size, and the study 1.6e-12."""

    def update(make: Any, factor: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = make(model)
        for _ in range(3):
            model.weight.grad = torch.randn(64, 64) * factor
            optimizer.step()
        return model.weight.detach()

    ours = [update(lambda m: nm.NorMuon(m, lr=0.01), f) for f in (1.0, 2.0**-66)]
    theirs = [
        update(lambda m: torch.optim.Muon(m.parameters(), lr=0.01, weight_decay=0.0), f)
        for f in (1.0, 2.0**-66)
    ]
    assert torch.equal(*ours)
    assert float(theirs[1].norm() / theirs[0].norm()) < 1e-10
    assert "| the same update, bit for bit | an update of 2e-12 of its size |" in README


def test_the_pythons_of_the_table_are_those_of_the_package_and_of_torch() -> None:
    (own,) = re.findall(r'requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert f"| Python | >= {own} |" in README and f"with Python >= {own}" in README
    (pinned,) = re.findall(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert f"torch {pinned})" in README.replace("\n", " ")
