"""The training and batch-skip studies, with a tiny model; and that the pages show the files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from examples.study import batch_skip, tokens_per_parameter, training
from examples.study.common import markdown, write_section
from examples.study.corpus import Corpus
from examples.study.runs import TINY, Job, Options, Result, run_all
from tests import scripts
from tests.processes import ROOT, run

STUDY = ROOT / "examples" / "study"


def study(module: str, *arguments: object, code: int | None = 0) -> CompletedProcess[str]:
    return scripts.run(f"examples.study.{module}", *arguments, code=code)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    study("corpus", "--packages", "mpmath", "--vocabulary", 300, "--out", file)
    return file


@pytest.fixture(scope="module")
def results(corpus: Path) -> dict[Job, Result]:
    """Of both studies, and of a run with many faults."""
    options = Options(corpus, corpus.parent / "runs", TINY, steps=20, compiled=False)
    jobs = [*training.grid_jobs(), *training.seed_jobs(dict.fromkeys(training.MAIN, 2e-3))]
    jobs += [job for some in batch_skip.jobs(2e-3).values() for job in some]
    jobs += [Job(variant, 2e-3, 0, faults=0.3) for variant in ("NorMuon, guard", "NorMuon")]
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        return run_all(jobs, options)
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
        torch.compiler.set_stance("default")


def test_a_corpus_is_the_same_twice_and_a_damaged_one_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    study("corpus", "--packages", "mpmath", "--vocabulary", 300, "--out", tmp_path / "again.npz")
    first, again = Corpus.load(corpus), Corpus.load(tmp_path / "again.npz")
    assert (
        torch.equal(first.train, again.train)
        and torch.equal(first.val, again.val)
        and first.about == again.about
    )
    assert (
        len(first.train) > 20 * len(first.val) > 0
        and first.vocabulary == 300
        and int(first.train.max()) < 300
    )
    with np.load(corpus) as kept:
        parts = dict(kept)
    parts["train"][7] += 1
    np.savez(tmp_path / "damaged.npz", **parts)
    with pytest.raises(ValueError, match="SHA-256"):
        Corpus.load(tmp_path / "damaged.npz")


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = study("corpus", "--packages", "no_such_package", "--out", tmp_path / "x.npz", code=None)
    assert done.returncode != 0
    assert "no_such_package: not an installed package" in done.stderr


def test_a_run_is_exact_and_is_not_run_twice(
    results: dict[Job, Result], corpus: Path, tmp_path: Path
) -> None:
    job = Job("NorMuon", 2e-3, 1)
    options = Options(corpus, tmp_path, TINY, steps=20, compiled=False)
    command = [
        sys.executable,
        "-c",
        "from pathlib import *; from examples.study.runs import *\n"
        f"run_all([{job!r}], {options!r})",
    ]
    run(command)
    (file,) = tmp_path.glob("NorMuon*.json")
    again = Result.load(file)
    assert (
        again.digest == results[job].digest and again.val == results[job].val and again.job == job
    )
    file.write_text(file.read_text().replace(again.digest, "kept"))
    assert run_all([job], options)[job].digest == "kept"


def test_a_folder_of_runs_is_of_one_size_one_length_and_one_text(
    corpus: Path, tmp_path: Path
) -> None:
    options = Options(corpus, tmp_path, TINY, steps=20, compiled=False)
    assert run_all([], options) == run_all([], options) == {}
    for other in ({"steps": None}, {"size": dataclasses.replace(TINY, width=64)}):
        with pytest.raises(ValueError, match="choose another folder"):
            run_all([], dataclasses.replace(options, **other))
    (tmp_path / "study.json").write_text(
        (tmp_path / "study.json").read_text().replace('"corpus": "', '"corpus": "0')
    )
    with pytest.raises(ValueError, match="text"):
        run_all([], options)


def test_a_trial_says_what_it_is_and_leaves_what_is_published_alone(
    corpus: Path, tmp_path: Path
) -> None:
    published = (STUDY / "RESULTS.md").read_bytes()
    options = ["--corpus", corpus, "--tiny", "--steps", "2"]
    study("batch_skip", *options, "--runs", tmp_path)
    assert (
        "batch_skip --corpus runs/corpus.npz --steps 2 --tiny --lr 0.004`"
        in (tmp_path / "RESULTS.md").read_text()
    )
    assert (STUDY / "RESULTS.md").read_bytes() == published
    missing = ("--corpus", tmp_path / "none.npz", "--runs", tmp_path)
    done = study("batch_skip", *missing, code=2)
    assert "examples.study.corpus --out" in done.stderr


def test_seeds_lengths_and_learning_rates_are_in_force(results: dict[Job, Result]) -> None:
    base = results[Job("NorMuon", 2e-3, 0)]
    others = (
        Job("NorMuon", 2e-3, 1),
        Job("NorMuon", 4e-3, 0),
        Job("Muon", 2e-3, 0),
        Job("AdamW", 2e-3, 0),
    )
    clipped = results[Job("AdamW, clipped", 2e-3, 0)]
    assert len({base.digest, clipped.digest, *(results[job].digest for job in others)}) == 6
    assert (
        results[Job("NorMuon", 2e-3, 0, 0.75)].steps == 15
        and base.steps == 20
        and base.tokens == TINY.batch * TINY.context
    )
    assert base.val[0][1] > base.loss and base.val[-1][0] == 20
    assert 0 < base.optimizer_ms < base.step_ms < 1e3 * base.seconds


def test_the_guard_keeps_every_bit_and_every_nan_out(results: dict[Job, Result]) -> None:
    for seed in training.SEEDS:
        assert (
            results[Job("NorMuon, guard", 2e-3, seed)].digest
            == results[Job("NorMuon", 2e-3, seed)].digest
        )
    guarded, plain = (
        results[Job(variant, 2e-3, 0, faults=0.3)] for variant in ("NorMuon, guard", "NorMuon")
    )
    assert guarded.faults == guarded.skipped == plain.faults > 2 and plain.skipped == 0
    assert math.isfinite(guarded.loss) and math.isnan(plain.loss)


def test_the_tables_say_what_the_runs_say(results: dict[Job, Result], tmp_path: Path) -> None:
    grid = {job: results[job] for job in training.grid_jobs()}
    best = training.best_of(grid)
    assert all(
        grid[Job(v, best[v], 0)].loss == min(grid[Job(v, lr, 0)].loss for lr in training.GRID)
        for v in training.MAIN
    )
    seeds = {job: results[job] for job in training.seed_jobs(dict.fromkeys(training.MAIN, 2e-3))}
    about, curves = training.study(grid, seeds, "text", 64)
    rows = {row["run"]: row for row in about["rows"]}
    mean = sum(results[Job("Muon", 2e-3, seed)].loss for seed in training.SEEDS) / 3
    assert {(c["run"], c["lr"]) for c in curves if "grid" in c["run"]} == {
        (f"grid {j.variant}", j.lr) for j in grid
    }
    assert about["baseline"] == min(training.BASELINES, key=lambda name: float(rows[name]["loss"]))
    assert (
        rows[about["baseline"]]["to AdamW"] == "+0.0000"
        and rows[about["baseline"]]["apart from AdamW"] == "-"
    )
    assert rows["Muon"]["loss"] == f"{mean:.4f}" and about["guard keeps the bits"] is True
    broken = {job: dataclasses.replace(r, digest=job.variant) for job, r in seeds.items()}
    assert "do NOT have" in training.section(training.study(grid, broken, "text", 64)[0])
    training.plot([{k: str(v) for k, v in c.items()} for c in curves], about, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000

    found = {name: [results[job] for job in some] for name, some in batch_skip.jobs(2e-3).items()}
    dying = results[Job("NorMuon", 2e-3, 0, faults=0.3)]
    found["0.1% of the steps, guard off"] = [dying]
    about, curves = batch_skip.study(found, "text", 2e-3)
    assert about["rows"][-1]["loss"] == "dead" and about["rows"][-1]["NaNs"] == str(dying.faults)
    batch_skip.plot([{k: str(v) for k, v in c.items()} for c in curves], tmp_path / "y.png")


def test_a_loss_is_reached_where_the_line_crosses_it() -> None:
    val = [(10, 4.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert (
        training.step_of(3.0, val) == 15
        and training.step_of(2.0, val) == 20
        and training.step_of(1.75, val) == 35
    )
    assert training.step_of(0.5, val) is None and training.step_of(9.0, val) == 10


def test_a_section_is_replaced_where_it_stands(tmp_path: Path) -> None:
    pages = tmp_path / "RESULTS.md"
    pages.write_text("# Title\n")
    for name, text in (("a", "first"), ("b", "second"), ("a", r"third \1")):
        write_section(pages, name, text)
    assert (
        pages.read_text() == "# Title\n\n<!-- a -->\nthird \\1\n<!-- end of a -->\n\n"
        "<!-- b -->\nsecond\n<!-- end of b -->\n"
    )
    assert markdown([{"x": 1, "y": "z"}]) == "| x | y |\n| --- | --- |\n| 1 | z |"


@pytest.mark.parametrize(
    "command",
    [
        "training",
        "batch_skip",
        "small_gradients",
        "tokens_per_parameter",
        "soak --device cpu",
        "soak --device cuda",
    ],
    ids=str,
)
def test_every_table_is_made_again_from_its_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in STUDY.glob("*.[cjm][sd]*"):
        shutil.copy(file, tmp_path)
    pages = (STUDY / "RESULTS.md").read_text()
    name = command.replace("soak --device", "soak").replace("_", " ")
    marked = re.search(rf"<!-- {name} -->.*?<!-- end of {name} -->", pages, re.DOTALL)
    assert marked is not None
    (tmp_path / "RESULTS.md").write_text(
        pages.replace(marked[0], f"<!-- {name} -->\n<!-- end of {name} -->")
    )
    module, *options = command.split()
    monkeypatch.setattr(sys, "argv", [module, *options, "--from-csv", "--out", str(tmp_path)])
    code: object = 0
    try:
        importlib.import_module(f"examples.study.{module}").main()
    except SystemExit as ended:
        code = ended.code or 0
    failing = (
        module == "soak" and "| no |" in marked[0]
    )  # the soak says with its status whether all its claims hold
    assert code == int(failing)
    assert (tmp_path / "RESULTS.md").read_text() == pages
    figures = re.findall(r"\]\((\S+\.png)\)", marked[0])
    assert figures and all(
        (tmp_path / figure).stat().st_size > 1000 and (STUDY / figure).exists()
        for figure in figures
    )


def test_the_study_has_the_bits_that_it_says() -> None:
    about = json.loads((STUDY / "training.json").read_text())
    assert about["guard keeps the bits"] is True and about["steps"] == 1970


def test_a_search_ends_with_its_best_rate_inside_and_every_seed_of_it() -> None:
    ends = tokens_per_parameter
    for optimizer, lowest in (("NorMuon", 3e-4), ("AdamW", 3e-2), ("Muon", 6e-3)):
        results: dict[ends.Job, ends.Result] = {}
        search = ends.search(20, optimizer)
        wanted = next(search)
        while True:
            for job in wanted:  # AdamW's own rates move the minimum
                off = abs(math.log(job.lr / lowest)) + abs(math.log(job.embed / 5))
                loss = off + 0.5 * abs(math.log(job.lr * job.head / lowest))
                curve = [(1, loss, loss + job.seed)]
                results[job] = ends.Result(job, 1, 1, 1, curve, 1.0, 1, True, "nothing")
            try:
                wanted = search.send(results)
            except StopIteration:
                break
        at = min(results, key=lambda job: results[job].choose + job.seed)
        rates = [j.lr for j in results if (j.embed, j.head) == (at.embed, at.head)]
        assert min(rates) < at.lr < max(rates)
        assert {j.seed for j in results if dataclasses.replace(j, seed=0) == at} == {0, 1, 2}
        assert (at.embed > 1.0) == (optimizer == "AdamW")


def test_runs_at_once_have_the_bits_of_each_alone(corpus: Path, tmp_path: Path) -> None:
    of = tokens_per_parameter
    options = of.Options(corpus, tmp_path, of.TINY, at_once=2, steps=4, compiled=False)
    try:
        bench = of.Bench(of.TINY[0], "NorMuon", options)
        jobs = [of.Job(20, "NorMuon", 2e-3, seed=0), of.Job(20, "NorMuon", 4e-3, seed=1)]
        both = bench.run(jobs)
        assert [bench.run([job])[0].curve for job in jobs] == [r.curve for r in both]
        assert both[0].curve[-1] != both[1].curve[-1] and len(both[0].curve) == 2
        bench.run(jobs[:1])
        options.save(both[0].job.key, dataclasses.asdict(both[0]))
        assert options.load(jobs[0]) == both[0]
    finally:
        torch.compiler.set_stance("default")
