"""A model that is given whole: ordinary ones are taken without a word, odd ones warn once."""

from __future__ import annotations

import cProfile
import pstats
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm

V, D, F = 64, 16, 48


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)


class Gpt(nn.Module):
    """As the small ones that people write themselves."""

    def __init__(self, mlp: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(32, D)
        self.h = nn.ModuleList()
        for _ in range(2):
            inside = mlp() if mlp else nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
            self.h.append(
                nn.ModuleDict(
                    {"ln_1": nn.LayerNorm(D), "attn": Attention(), "ln_2": nn.LayerNorm(D),
                     "mlp": inside}
                )
            )  # fmt: skip
        self.ln_f, self.lm_head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, F), nn.Linear(F, D)) for _ in range(4)
        )


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.gate = 4, nn.Linear(D, 4, bias=False)
        self.w1, self.w2 = (nn.Parameter(torch.randn(4, *s)) for s in ((F, D), (D, F)))


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = 2 * D, 4, 2
        self.in_proj = nn.Linear(D, 4 * D, bias=False)
        self.conv1d = nn.Conv1d(2 * D, 2 * D, 4, groups=2 * D)
        self.x_proj = nn.Linear(2 * D, 10, bias=False)
        self.dt_proj = nn.Linear(2, 2 * D)
        self.A_log, self.D = nn.Parameter(torch.randn(2 * D, 4)), nn.Parameter(torch.ones(2, D))
        self.out_proj = nn.Linear(2 * D, D, bias=False)


def vit() -> nn.Module:
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.randn(1, 1, D))
    model.pos_embed = nn.Parameter(torch.randn(1, 17, D))
    model.patch_embed = nn.Conv2d(3, D, 4, 4)
    model.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(D, 4, F) for _ in range(2)))
    model.norm, model.head = nn.LayerNorm(D), nn.Linear(D, 10)
    return model


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "GPT": Gpt,
    "ViT": vit,
    "MoE": lambda: Gpt(Experts),
    "MoE of stacks": lambda: Gpt(StackedExperts),
    "Mamba": lambda: Gpt(Mamba),
    "LSTM": lambda: nn.ModuleDict(
        {"embed": nn.Embedding(V, D), "lstm": nn.LSTM(D, D, 2), "fc": nn.Linear(D, V)}
    ),
    "torch's Transformer": lambda: nn.Transformer(D, 4, 1, 1, F, batch_first=True),
}


def says(make: Callable[[], object]) -> list[str]:
    """What is warned of, each at the caller's line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    assert all(warning.filename == __file__ for warning in seen)
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_model_is_taken_without_a_word(kind: str) -> None:
    model = ORDINARY[kind]()
    assert says(lambda: nm.make_plan(model)) == says(lambda: nm.NorMuon(model)) == []


@pytest.mark.parametrize(
    ("config", "made", "sizes"),
    [
        ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
        ("BertConfig", "BertForMaskedLM", {}),
        ("GPT2Config", "GPT2LMHeadModel", {}),
        ("ViTConfig", "ViTForImageClassification", {"image_size": 8, "patch_size": 4}),
        ("ConvNextConfig", "ConvNextForImageClassification",
         {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
        ("ResNetConfig", "ResNetForImageClassification",
         {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}),
        ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
        ("MambaConfig", "MambaForCausalLM", {"state_size": 4}),
        ("T5Config", "T5ForConditionalGeneration",
         {"d_model": D, "d_kv": 4, "num_heads": 4, "num_layers": 1, "d_ff": F}),
    ],
)  # fmt: skip
def test_an_ordinary_model_of_transformers_is_taken_without_a_word(
    config: str, made: str, sizes: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": V,
        "intermediate_size": F, "n_embd": D, "n_layer": 1, "n_head": 4,
    }  # fmt: skip
    if config in ("ViTConfig", "ConvNextConfig", "ResNetConfig", "T5Config", "GPT2Config"):
        known = vars(getattr(transformers, config)())
        small = {key: value for key, value in small.items() if key in known}
    model = getattr(transformers, made)(getattr(transformers, config)(**(small | sizes)))
    assert says(lambda: nm.make_plan(model)) == says(lambda: nm.NorMuon(model)) == []


class Odd(nn.Module):
    """One parameter of no known layer in an ordinary model."""

    def __init__(self, leaf: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = Gpt()
        self.odd = nn.Module()
        self.odd.adapter_layer_names = ("newest_thing",)
        setattr(self.odd, leaf, nn.Parameter(torch.randn(shape)))


ODD = {
    "a few vectors": ("mixing", (4, F)),
    "a few vectors, stored by columns": ("mixing", (F, 2)),
    "four dimensions": ("mystery", (4, 5, F, D)),
    "an unknown adapter": ("newest_thing", (D, D)),
    "a stack called weight": ("weight", (6, F, D)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_modules_do_not_tell_is_said_once_and_the_line_to_write_ends_it(kind: str) -> None:
    leaf, shape = ODD[kind]
    model = Odd(leaf, shape)
    name = f"odd.{leaf}"
    assert list(nm.routes_for(model).unsure()) == [name]
    for make in (
        lambda routes: nm.make_plan(model, routes=routes),
        lambda routes: nm.NorMuon(model, routes=routes),
        lambda routes: nm.NorMuon(model.parameters(), routes=nm.routes_for(model, routes)),
        lambda routes: nm.make_plan(
            dict(model.named_parameters()), routes=nm.routes_for(model, routes)
        ),
    ):
        (text,) = says(lambda make=make: make(None))
        line = re.search(rf'"{re.escape(name)}": nm\.Route\(.*\)', text)
        assert line is not None and "modules of the model" in text and "body." not in text
        written = eval(f"{{{line[0]}}}", {"nm": nm})
        assert says(lambda make=make, written=written: make(written)) == []
        kept = {name: nm.routes_for(model)[name]}
        assert says(lambda make=make, kept=kept: make(kept)) == []


def test_what_is_frozen_is_not_doubted_until_it_is_trained() -> None:
    model = Odd("mixing", (4, F))
    model.odd.mixing.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert not nm.routes_for(model).unsure()
    assert says(lambda: nm.make_plan(model)) == says(lambda: nm.NorMuon(model)) == []
    model.odd.mixing.requires_grad_(True)  # type: ignore[union-attr, operator]
    (text,) = says(lambda: nm.NorMuon(model))
    assert "odd.mixing" in text


def test_a_model_that_is_wrapped_is_doubted_for_the_same_parameters() -> None:
    model: Any = torch.compile(Odd("mixing", (4, F)))
    (text,) = says(lambda: nm.NorMuon(model))
    assert '_orig_mod.odd.mixing": nm.Route' in text


def test_a_tensor_without_a_module_is_still_asked_for_its_model() -> None:
    params: dict[str, Tensor] = {"a.w": torch.zeros(8, 8), "stem.weight": torch.zeros(8, 3, 3, 3)}
    (text,) = says(lambda: nm.make_plan(params))
    assert "Give the model" in text


def test_reading_a_model_is_linear_in_its_parameters_and_asks_little_of_each() -> None:
    """By counting what is called and not by a clock."""

    def calls(layers: int) -> int:
        with torch.device("meta"):
            model = nn.ModuleList(Gpt(Experts) for _ in range(layers))
        profile = cProfile.Profile()
        profile.runcall(nm.routes_for, model)
        each = pstats.Stats(profile).total_calls / len(list(model.parameters()))  # type: ignore[attr-defined]
        return round(each)

    few, many = calls(2), calls(16)
    assert (
        many < 1.3 * few and many < 1200
    )  # 760 each; 2900 when every name was asked of all owners


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D)
        self.A, self.B = nn.Parameter(torch.randn(4, D)), nn.Parameter(torch.zeros(D, 4))


def doubts_about(model: nn.Module, routes: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        nm.make_plan(model, routes=routes)
    return [line.strip() for w in seen for line in str(w.message).splitlines()[1:]]


def test_many_parameters_with_one_ending_and_one_doubt_have_one_line_with_a_glob() -> None:
    model = nn.Sequential(*(Factors() for _ in range(4)))
    first, second = doubts_about(model)
    assert first.startswith("*.A (4 parameters): got adamw (4 vectors of 16")
    assert second.endswith('otherwise "*.B": nm.Route()')
    assert doubts_about(model, {"*.A": nm.Route(), "*.B": nm.Route()}) == []


def test_a_glob_is_not_offered_where_it_would_reach_another_parameter() -> None:
    model = nn.Sequential(*(Factors() for _ in range(4)))
    model.add_module("more", nn.Module())
    model.more.register_parameter("A", nn.Parameter(torch.zeros(D)))  # type: ignore[union-attr]
    lines = doubts_about(model)
    assert [line.partition(":")[0] for line in lines] == [
        "0.A", "*.B (4 parameters)", "1.A", "2.A", "3.A",
    ]  # fmt: skip
    assert len(doubts_about(nn.Sequential(Factors(), Factors()))) == 4  # two layers are not many
