"""What the words of a name mean: tables of vectors, output heads, routers, parts of blocks.

A name counts by its words, not by its letters: ``head_proj`` and ``emb_gate`` are projections,
``pos_embed`` and ``lm_head`` are what their last word says.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

Strength = Literal["strong", "weak"]
_cached = lru_cache(maxsize=4096)  # the same few names stand in every layer


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EMBED = _set(
    "embed embedder embeds embedding embeddings emb embs wte wpe codebook codebooks ape lookup"
    " vocab vocabulary lut"
)
_TABLE = _set(
    "token tokens tok toks table tables queries latents registers register prompt prompts"
    " mask_emb position positions memory memories slot slots"
)
# What an embed_... is made of; embed_dim or embed_proj are not among them.
_EMBEDDED = _set(
    "tokens token in out positions position pos word words table input inputs output vocab ids id"
    " type types char chars text entities segment segments e global"
)
_CONTINUOUS = _set(
    "patch patches time timestep timesteps t image img pixel audio x vision visual video speech"
    " encoder decoder predictor"
)
_PROJECTIONS = _set("proj projection projections linear dense fc conv mlp net transform")
_MODELS = _set("model net network transformer module backbone lm gpt decoder encoder bert llm core")
_PLACE = _set("pos position positions positional rel relative axial relpos")
# A name with one of these is a layer, whatever stands before it.
_OF_LAYERS = _set(
    "proj projection projections mixer mixing gate gates gating mlp dense linear fc net conv attn"
    " attention norm ln key keys value values query q k v up down in1 in2 transform net block"
    " adapter mix lin scale kv qkv"
)
_OF_MATRICES = _OF_LAYERS | _set(
    "weight weights kernel kernels matrix matrices mat fn lora wq wk wv wo"
)
_VECTOR = _set("bias biases norm ln layernorm rmsnorm gamma beta gain scale scales ls alpha")
_NORMS = _set("norm norms ln layernorm rmsnorm groupnorm batchnorm")
# What may stand beside such a word; norm_gate, norm_to_q and ln_cond are layers.
_OF_NORMS = _NORMS | _set(
    "f out in final first last pre post attn attention mlp ffn ff self cross input output layer"
    " q k v kv query key value block embed emb head x h pos context encoder decoder"
)
_HEAD = _set("head heads classifier unembed unembedding logits classifiers unembeddings")
_WEAK_HEADS = _set(
    "output outputs out decoder score fc generator proj_out output_proj output_projection"
    " output_layer final final_layer final_proj final_linear readout prediction predictions pred"
    " predictor shared project_out out_proj vocab_proj vocab_projection fc_out out_layer cls"
    " classification regressor last_layer last lin_out linear_out pi action_net action_out"
)
_STRONG_HEADS = _set(
    "class_embed bbox_embed embed_out to_logits qa_outputs w_u score classifier lm_head"
    " seq_relationship"
)
_ENDS = ("class_embed", "bbox_embed")
ROUTERS = _set("gate router wg gating routers switch classifier")
_ROUTES = _set("router routers routing route")
_CHOOSES = _set("gate gates gating gater wg switch selector dispatcher dispatch scorer noise")
# What may stand beside such a word; attn_gate, input_gate and shared_expert_gate are no routers.
_OF_ROUTERS = _set(
    "moe expert experts mixture sparse token topk top proj projection linear layer layers net"
    " network fn func function weight weights w logits logit fc head noisy score scores model mlp"
    " dense module vision text image audio modality"
)
_OF_EXPERTS = _set("moe moes expert experts mixture smoe")


def words_of(segment: str) -> list[str]:
    """``tokEmbed_1`` -> tok, embed: lower case, without numbers."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub(r"\d[dD]$", "", segment))
    return [word for word in re.split(r"[_\W\d]+", apart.lower()) if word]


@_cached
def embedding(segment: str) -> Strength | None:
    """Whether a name says that its rows (or columns) are vectors looked up by number."""
    words = words_of(segment)
    if len(words) > 1 and words[-1] in ("layer", "layers") and words[-2] in _EMBED:
        words = words[:-1]
    if not words or re.search(r"[a-z]2[a-z]", segment):  # as in hidden2emb
        return None
    joined = "_".join(words)
    if joined in (
        "w_e",
        "w_pos",
        "tok",
        "token",
        "tokens",
        "tok_e",
        "pos",
        "position",
        "positions",
    ):
        return "strong"
    if joined == "shared":
        return "weak"
    looked_up = words[-1] in _EMBED or (words[-1] in ("tokens", "token") and _EMBED & set(words))
    if looked_up and (_CONTINUOUS | _PROJECTIONS) & set(words[:-1]) and not _PLACE & set(words):
        return "weak"
    if words[-1] in _EMBED or (words[0] in _EMBED and set(words[1:]) <= _EMBEDDED):
        return "strong"
    if joined.startswith(("embed_tokens_", "embed_positions_")) and words[-1] not in _OF_LAYERS:
        return "strong"
    if is_place_bias(segment):
        return "strong"
    if words[-1] in ("table", "tokens", "token") or (
        words[0] in ("tok", "token", "vocab", "word") and not _OF_LAYERS & set(words)
    ):
        return "strong"
    return None


@_cached
def router(segment: str) -> Strength | None:
    """Whether a name says that its outputs choose: a router is strong, a gate may be another."""
    own = {*words_of(segment)}
    if own & _ROUTES and not own & {"shared", "bias"}:
        return "strong"
    return "weak" if own & _CHOOSES and own <= _CHOOSES | _OF_ROUTERS else None


@_cached
def of_experts(segment: str) -> bool:
    """Whether a name, or a class's name, speaks of experts: ``SparseMoeBlock``, ``expert_bank``."""
    return bool(_OF_EXPERTS & {*words_of(segment)}) or bool(
        re.search(r"MoE|Moe(?![a-z])|Experts?(?![a-z])|MOE", segment)
    )


def is_projection(segment: str) -> bool:
    """Whether a word of a name says that it is a layer with a matrix."""
    return bool(_PROJECTIONS & {*words_of(segment)})


def is_model(part: str) -> bool:
    """Whether an attribute is called as one that has a whole model is."""
    return bool(_MODELS & {*words_of(part)})


def is_well_known(segment: str) -> bool:
    """Whether a name is one that tokens or their positions have in every model."""
    return bool(_set("tok token tokens word words vocab wte wpe") & {*words_of(segment)[:2]}) or (
        bool(_PLACE & {*words_of(segment)})
    )


def is_place_bias(segment: str) -> bool:
    """Whether a layer takes one of a few places in and puts a bias per head out."""
    words = words_of(segment)
    return bool(words) and words[0] in _PLACE and words[-1] in ("bias", "biases")


@_cached
def head(segment: str) -> Strength | None:
    """Whether a name outside every block says output head."""
    words = words_of(segment)
    if not words:
        return None
    joined = "_".join(words)
    predicts = len(words) > 1 and (words[-1] == "predictor" or words[0] == "predict")
    if joined in _STRONG_HEADS or words[-1] in _HEAD or joined.endswith(_ENDS) or predicts:
        return "strong"
    if words[0] == "head" and not _OF_LAYERS & set(words[1:]):
        return "strong"
    return "weak" if joined in _WEAK_HEADS and not segment[-1].isdigit() else None


@_cached
def is_table(leaf: str) -> bool:
    """Whether a parameter that belongs to no layer is named as a table of vectors."""
    words = words_of(leaf)
    if not words or (_OF_LAYERS & set(words[-1:]) and words[-1] not in ("query", "queries")):
        return is_biases(leaf)
    joined = "_".join(words)
    return bool(
        words[-1] in _EMBED | _TABLE
        or words[0] in _EMBED
        or (set(words) & _PLACE and not set(words) & _OF_LAYERS)
        or (words[0] in ("cls", "mask") and "".join(words[1:2]).startswith(("tok", "emb")))
        or joined in ("latent", "latent_query", "latent_queries", "cls", "class_token", "a_log")
        or re.search(r"(^|_)(a_logs?|embed\w*|centroids?|prototypes?|anchors?|level_\w+)$", joined)
        or is_biases(leaf)
        or words[0] == "log"  # logarithms, each of which counts by itself
        or words[-1] in ("log", "logs", "logit", "logits")
    )


@_cached
def is_matrix(leaf: str) -> bool:
    """Whether a parameter that belongs to no layer is named as a matrix; a letter alone is one."""
    words = words_of(leaf)
    return not words or len(words[0]) == 1 or bool(_OF_MATRICES & {*words})


@_cached
def is_norm(segment: str) -> bool:
    """Whether a layer is called a norm, as ``norm1``, ``ln_f`` and ``q_norm`` are."""
    words = {*words_of(segment)}
    return bool(words & _NORMS) and words <= _OF_NORMS


@_cached
def is_biases(leaf: str) -> bool:
    """Whether a parameter is one bias, or one norm's scale, per expert or per member."""
    words = words_of(leaf)
    return bool(words) and (words[-1] in _VECTOR or bool({"bias", "biases"} & set(words)))
