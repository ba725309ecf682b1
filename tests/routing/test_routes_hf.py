"""`routes_for` on tiny models of transformers, which the package itself never imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.routing.test_routes_for import assert_parts_step_alone, rows, turned, whole

pytest.importorskip("transformers")

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "vocab_size": 50,
}
GQA = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 1, "n_embd": 24, "n_head": 3,
    "vocab_size": 50, "n_positions": 16,
                                               "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES | GQA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SIZES | GQA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", SIZES | GQA | {"num_local_experts": 4,
    "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", SIZES | GQA | {"num_local_experts": 4,
    "head_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES | {"bos_token_id": 1,
    "eos_token_id": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": 1, "hidden_size": 24, "n_head": 6,
    "vocab_size": 50}),
    "falcon": ("FalconConfig", "FalconForCausalLM", SIZES | {"multi_query": True,
    "bos_token_id": 1, "eos_token_id": 2}),
    "vit": ("ViTConfig", "ViTForImageClassification", {k: v for k,
    v in SIZES.items() if k != "vocab_size"}
            | {"image_size": 8, "patch_size": 4}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"num_layers": 1, "d_model": 24, "d_kv": 4,
    "num_heads": 6, "d_ff": 40,
                                                      "vocab_size": 50,
                                                      "decoder_start_token_id": 0}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    importlib.import_module("transformers").logging.set_verbosity_error()


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config, model, sizes = SMALL[kind]
    module = importlib.import_module(f"transformers.models.{kind}")
    made: nn.Module = getattr(module, model)(getattr(module, config)(**sizes))
    return made


ATTENTION = {f"model.layers.0.self_attn.{x}_proj.weight": [whole] for x in "qkvo"}
PARTS: dict[str, dict[str, list]] = {
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": turned(rows(24, 24, 24)),
        **{f"transformer.h.0.{name}.weight": turned([whole]) for name in ("attn.c_proj",
        "mlp.c_fc", "mlp.c_proj")},
    },
    "llama": ATTENTION | {f"model.layers.0.mlp.{x}_proj.weight": [whole] for x in ("gate", "up",
    "down")},
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": rows(24, 8, 8),
        "model.layers.0.self_attn.o_proj.weight": [whole],
        "model.layers.0.mlp.gate_up_proj.weight": rows(40, 40),
        "model.layers.0.mlp.down_proj.weight": [whole],
    },
    "mixtral": {
        **ATTENTION,
        "model.layers.0.mlp.experts.gate_up_proj": [
            lambda w, k=k, half=half: half(w[k]) for k in range(4) for half in rows(40, 40)
        ],
        "model.layers.0.mlp.experts.down_proj": [lambda w, k=k: w[k] for k in range(4)],
    },
    "gpt_oss": {
        **ATTENTION,
        "model.layers.0.mlp.experts.gate_up_proj": turned([lambda w, k=k: w[k] for k in range(4)]),
        "model.layers.0.mlp.experts.down_proj": turned([lambda w, k=k: w[k] for k in range(4)]),
    },
    "vit": {
        "vit.embeddings.patch_embeddings.projection.weight": [lambda w: w.flatten(1)],
        **{f"vit.layers.0.attention.{x}_proj.weight": [whole] for x in "qkvo"},
        **{f"vit.layers.0.mlp.fc{k}.weight": [whole] for k in (1, 2)},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_every_matrix_of_the_model_steps_as_a_parameter_of_its_own(kind: str) -> None:
    model = build(kind)
    assert_parts_step_alone(model, PARTS[kind], nm.routes_for(model))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}),
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("mixtral", {"model.embed_tokens.weight", "lm_head.weight",
        "model.layers.0.mlp.gate.weight"}),
        ("gpt_oss", {"model.embed_tokens.weight", "lm_head.weight",
        "model.layers.0.mlp.router.weight",
                     "model.layers.0.mlp.experts.gate_up_proj_bias",
                     "model.layers.0.mlp.experts.down_proj_bias"}),
        ("vit", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
        "classifier.weight"}),
        ("t5", {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
        "lm_head.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}),
    ],
)  # fmt: skip
def test_embeddings_heads_and_routers_get_adamw(kind: str, names: set[str]) -> None:
    table = nm.routes_for(build(kind))
    assert {
        e.name for e in table.entries.values() if e.route.algorithm == "adamw" and len(e.shape) > 1
    } == names


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt2", "transformer.h.0.attn.c_attn"), ("phi3", "model.layers.0.self_attn.qkv_proj"),
     ("falcon", "transformer.h.0.self_attention.query_key_value")],
)  # fmt: skip
def test_the_parts_that_it_takes_for_q_k_and_v_are_q_k_and_v(kind: str, name: str) -> None:
    """Where q is zero, no key matters: their gradient is zero, and that of the values is not."""
    model = build(kind)
    route = nm.routes_for(model)[f"{name}.weight"]
    assert route.splits is not None
    of_q, of_k, of_v = (
        part.abs().max()
        for part in gradient_without(model, name, route.splits[0], route.dim, route.splits)
    )
    assert of_k == 0 and of_v > 0 and of_q > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value"),
        ("bloom", "transformer.h.0.self_attention.query_key_value"),
    ],
)
def test_projections_whose_q_k_and_v_take_turns_are_left_whole_and_it_says_so(
    kind: str, name: str
) -> None:
    model = build(kind)
    table = nm.routes_for(model)
    assert table[f"{name}.weight"] == nm.Route()
    assert "take turns head by head; heads=18 would" in table.entries[f"{name}.weight"].reason
    thirds = gradient_without(model, name, 24, 0, (24, 24, 24))
    assert thirds[1].abs().max() > 0  # the second third is not k


def gradient_without(
    model: nn.Module, name: str, zeroed: int, dim: int, splits: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The gradient of a fused weight, in parts, with the first ``zeroed`` outputs at zero."""
    projection = model.get_submodule(name)
    with torch.no_grad():
        projection.weight.narrow(dim, 0, zeroed).zero_()
        if projection.bias is not None:
            projection.bias[:zeroed].zero_()
    tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    model.eval()(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    return projection.weight.grad.split(splits, dim)


def test_heads_of_grouped_queries_are_counted_from_the_configuration() -> None:
    table = nm.routes_for(build("llama"), per_head=True)
    heads = {name: table[f"model.layers.0.self_attn.{name}_proj.weight"].heads for name in "qkvo"}
    assert heads == {"q": 6, "k": 2, "v": 2, "o": None}
    fused = nm.routes_for(build("phi3"), per_head=True)["model.layers.0.self_attn.qkv_proj.weight"]
    assert fused == nm.Route(splits=(24, 8, 8), heads=(6, 2, 2))
    turned_heads = nm.routes_for(build("gpt2"), per_head=True)["transformer.h.0.attn.c_attn.weight"]
    assert turned_heads == nm.Route(splits=(24, 24, 24), heads=(3, 3, 3), dim=1, transposed=True)


def test_a_real_model_learns_with_its_routes() -> None:
    model = build("mixtral")
    tokens = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = nm.make_plan(params, nm.Config(guard="full"), routes=nm.routes_for(model))
    state, hyper, losses = nm.init(plan, params), nm.Hyper.of(params, lr=0.02), []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses.append(float(loss.detach()))
        loss.backward()
        result = nm.update(
            params, {name: p.grad for name, p in model.named_parameters()}, state, hyper, plan
        )
        state = result.state
        assert not nm.check(result, plan)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(result.params[name])
        model.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_the_package_does_not_import_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import torch, normuon_fn as nm; "
        "nm.routes_for(torch.nn.Linear(4, 4)); "
        "assert not any(m.startswith('transformers.') for m in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
