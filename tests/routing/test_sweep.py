"""A sample of the sweep over the model types of transformers, against the committed table."""

from __future__ import annotations

import warnings

import pytest

from tests.routing import sweep

transformers = pytest.importorskip("transformers")

# What each is there for: tables, routers, mixers, latent attention, odd attentions.
SAMPLE = (
    "llama",
    "sam",
    "qwen3_next",
    "deepseek_v3",
    "mamba2",
    "jetmoe",
    "xlnet",
    "csm",
    "longcat_flash",
    "zamba",
)


def test_the_table_names_the_rules_that_the_issue_of_silence_was_about() -> None:
    table = {(kind, rule) for _, kind, rule in sweep.read_table()}
    for kind, rule in (
        ("ModuleList.*.attn.rel_pos_h", "adamw"),
        ("CsmForConditionalGeneration.depth_decoder.codebooks_head.weight", "adamw"),
        ("LongcatFlashMoE.router.classifier.weight", "adamw"),
        ("MMGroundingDinoModel.level_embed", "adamw"),
        ("Kosmos2ForConditionalGeneration.image_to_text_projection.latent_query", "adamw"),
        ("ModuleList.*.rel_attn.q", "normuon flatten transposed"),
        ("Mamba2Block.mixer.in_proj.weight", "normuon splits n+n+n+n+n of rows"),
    ):
        assert (kind, rule) in table, kind


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_routed_as_the_table_says(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about shrunk configurations
        transformers.logging.set_verbosity_error()
        found = set(sweep.lines_of(model_type))
    expected = {row for row in sweep.read_table() if row[0] == model_type}
    version = sweep.table_version()
    if found != expected and transformers.__version__ != version:
        pytest.skip(f"the table is of transformers {version}")
    assert found == expected


@pytest.mark.parametrize("model_type", [*SAMPLE, "rt_detr_v2", "sam3", "bark", "mask2former"])
def test_names_alone_are_certain_of_nothing_that_the_modules_decide_otherwise(
    model_type: str,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        counts, differs = sweep.compare_with_names(model_type)
    assert counts["certain"] > 0
    assert [row for row in differs if row.by_names.certainty == "certain"] == []


def test_most_types_are_in_the_table() -> None:
    rows = sweep.read_table()
    built = {row[0] for row in rows if not row[2].startswith("not built")}
    assert len(built) > 550 and len(rows) > 9000


def test_axial_positions_of_a_reformer_get_adamw() -> None:
    rows = {
        rule
        for kind_type, kind, rule in sweep.read_table()
        if kind_type == "reformer" and "position" in kind
    }
    assert rows == {"adamw"}
