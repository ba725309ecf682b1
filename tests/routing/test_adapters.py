"""Adapters: PEFT's own models where it is installed, and classes of its form and of loralib's."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm
from normuon_fn.routing.names import by_names

V, D, F = 64, 32, 48
ADAMW, NORMUON = nm.Route("adamw"), nm.Route()


def trained(model: nn.Module) -> dict[str, nm.Route]:
    """The routes of what is trained, matrices alone, by the ends of their names."""
    entries = nm.routes_for(model).entries.values()
    return {
        entry.name.removeprefix("base_model.model.").removeprefix("model.layers.0."): entry.route
        for entry in entries
        if entry.route.algorithm != "frozen" and sum(size != 1 for size in entry.shape) > 1
    }


# ------------------------------------------------------------------------------ PEFT's own models


@pytest.fixture
def peft() -> Iterator[Any]:
    pytest.importorskip("transformers")
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT asks transformers for, which is deprecated
        yield module


SIZES = {
    "num_hidden_layers": 1, "hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": F, "vocab_size": V, "pad_token_id": 0,
}  # fmt: skip


def llama(kind: str = "LlamaForCausalLM", **sizes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind)(transformers.LlamaConfig(**(SIZES | sizes)))


def test_a_head_that_peft_saves_and_tokens_that_it_trains_get_adamw(peft: Any) -> None:
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["q_proj"], r=4, trainable_token_indices=[1, 2]
    )
    found = trained(
        peft.get_peft_model(llama("LlamaForSequenceClassification", num_labels=3), lora)
    )
    assert found == {
        "self_attn.q_proj.lora_A.default.weight": NORMUON,
        "self_attn.q_proj.lora_B.default.weight": NORMUON,
        "score.modules_to_save.default.weight": ADAMW,
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default": ADAMW,
    }


def test_lora_of_an_embedding_and_of_a_head_of_pefts(peft: Any) -> None:
    lora = peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "v_proj"], r=4)
    found = trained(peft.get_peft_model(llama(), lora))
    assert {name for name, route in found.items() if route == ADAMW} == {
        "model.embed_tokens.lora_embedding_A.default",
        "model.embed_tokens.lora_embedding_B.default",
        "lm_head.lora_B.default.weight",
    }


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_pefts_lora_of_stacked_experts(peft: Any, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_local_experts=4, head_dim=8)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=stacks)
    model = peft.get_peft_model(getattr(transformers, f"{kind}ForCausalLM")(config), lora)
    found = trained(model)
    for at in ("mlp.experts.base_layer", "mlp.experts"):
        assert found[f"{at}.lora_A.default.weight"] == nm.Route(heads=4)
        assert found[f"{at}.lora_B.default.weight"] == ADAMW


def test_the_columns_of_pefts_lora_b_take_turns_expert_by_expert(peft: Any) -> None:
    """Why no route splits it: expert 1 of 4 has every fourth column."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    lora = peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora)
    (layer,) = (m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    layer.lora_B["default"].weight.data.zero_()[:, 1::4] = 1.0
    delta = layer.get_delta_weight("default")
    assert [bool(delta[e].any()) for e in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_of_the_classifier_of_pefts_x_lora_the_last_layer_gets_adamw(
    peft: Any, depth: int, tmp_path: Path
) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    for k in range(2):
        peft.get_peft_model(llama(), lora).save_pretrained(tmp_path / str(k))
    model: Any = llama()
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=D, xlora_depth=depth, xlora_size=16,
        adapters={str(k): str(tmp_path / str(k)) for k in range(2)},
    )  # fmt: skip
    found = trained(peft.get_peft_model(model, config))
    assert list(found.values()) == [NORMUON] * (depth - 1) + [ADAMW]


METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "use_dora": True}, "AdaLoraConfig": {"init_r": 4, "total_step": 9},
    "OFTConfig": {"oft_block_size": 8, "r": 0}, "BOFTConfig": {"boft_block_size": 8},
    "C3AConfig": {"block_size": 8}, "VBLoRAConfig": {"num_vectors": 16, "vector_length": 8},
    "VeraConfig": {"r": 4}, "IA3Config": {"feedforward_modules": []}, "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 9}, "RandLoraConfig": {"r": 4}, "LoHaConfig": {"r": 4},
    "RoadConfig": {"group_size": 8}, "LoKrConfig": {"r": 4}, "MissConfig": {"r": 4},
    "PolyConfig": {"r": 4, "n_tasks": 2}, "GraloraConfig": {"r": 4, "gralora_k": 2},
    "DeloraConfig": {"r": 4}, "HiraConfig": {"r": 4}, "OSFConfig": {"effective_rank": 4},
    "ShiraConfig": {"r": 4}, "GloraConfig": {}, "LilyConfig": {}, "DeftConfig": {},
    "PeanutConfig": {}, "PsoftConfig": {}, "PveraConfig": {}, "BeftConfig": {},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_pefts_is_known_and_names_alone_give_the_same_rules(
    peft: Any, method: str
) -> None:
    if not hasattr(peft, method):
        pytest.skip(f"PEFT {peft.__version__} has no {method}")
    config = getattr(peft, method)(target_modules=["q_proj", "v_proj"], **METHODS[method])
    model = peft.get_peft_model(llama(), config)
    table = nm.routes_for(model)
    assert table.unsure() == {}
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, found in by_names(params).items():
        assert found.route.algorithm == table[name].algorithm, (name, found)


# ------------------------------------------------------------- classes of PEFT's and loralib's form


class XLoraClassifier(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers = (nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.layers = nn.Sequential(*layers)


@pytest.mark.parametrize("sizes", [(D, 2), (D, 16, 2), (D, 16, 16, 16), (D, 8, 24)])
def test_the_logits_of_adapters_that_are_mixed_are_a_routers(sizes: tuple[int, ...]) -> None:
    """The rows of the last layer are adapters, also where they are as many as its inputs."""
    model = nn.Module()
    model.internal_xlora_classifier = XLoraClassifier(*sizes)
    found = [r for name, r in nm.routes_for(model).items() if name.endswith("weight")]
    assert found == [NORMUON] * (len(sizes) - 2) + [ADAMW]


class MergedLinear(nn.Linear):
    """loralib's: q, k and v in one layer, of which some are adapted."""

    def __init__(self, enable_lora: list[bool], r: int = 4) -> None:
        super().__init__(D, 3 * D)
        self.weight.requires_grad_(False)
        self.enable_lora, n = enable_lora, sum(enable_lora)
        self.lora_A = nn.Parameter(torch.randn(r * n, D))
        self.lora_B = nn.Parameter(torch.randn(D * n, r))


@pytest.mark.parametrize("enable", [[True, False, True], [True] * 3, [False, True, False]])
def test_the_factors_of_merged_projections_are_one_matrix_per_adapted_projection(
    enable: list[bool],
) -> None:
    table = nm.routes_for(nn.ModuleDict({"qkv": MergedLinear(enable)}))
    n = sum(enable)
    expected = nm.Route(heads=n) if n > 1 else NORMUON
    assert table["qkv.lora_A"] == table["qkv.lora_B"] == expected


class Lily(nn.Module):
    def __init__(self, shared: nn.Linear, experts: int, r: int = 4) -> None:
        super().__init__()
        self.base_layer = nn.Linear(D, F).requires_grad_(False)
        self.lily_A = nn.ModuleDict({"default": nn.Linear(D, r, bias=False)})
        self.lily_B = nn.ModuleDict({"default": shared})
        self.lily_router = nn.ModuleDict({"default": nn.Linear(r, experts, bias=False)})


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_a_shared_factor_of_lily_is_one_matrix_per_expert(experts: int) -> None:
    """PEFT reads lily_B as [experts, rank, outputs] and mixes the experts."""
    shared = nn.Linear(F, 4 * experts, bias=False)
    table = nm.routes_for(nn.ModuleList(Lily(shared, experts) for _ in range(2)))
    expected = nm.Route(heads=experts) if experts > 1 else NORMUON
    for k in range(2):
        assert table[f"{k}.lily_A.default.weight"] == NORMUON
        assert table[f"{k}.lily_B.default.weight"] == expected
        assert table[f"{k}.lily_router.default.weight"] == ADAMW


class GloraLoraPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Xd, self.Xu = nn.Parameter(torch.randn(D, 4)), nn.Parameter(torch.randn(4, D))


class GloraVectorPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.randn(D, 1))


@pytest.mark.parametrize(
    ("path", "rule"), [(GloraLoraPath, NORMUON), (GloraVectorPath, ADAMW)]
)  # fmt: skip
def test_the_paths_of_glora_are_matrices_where_they_are_factors(
    path: Callable[[], nn.Module], rule: nm.Route
) -> None:
    layer = nn.Module()
    layer.adapter_layer_names = ("glora_A",)
    layer.glora_A = nn.ModuleDict({"default": path()})
    assert set(nm.routes_for(layer).values()) == {rule}
