"""What the parameters of an adapter are: PEFT's, torchtune's, loralib's, diffusers'.

An adapter's parameter is told by the name that its method has for it. A factor that inputs are
multiplied by is a matrix and gets NorMuon; an entry of a rotation, a scale, a coefficient or a
vector that is looked up gets AdamW.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from torch import nn

from . import words
from .attributes import first, get, is_layer, kind_of
from .routes import Decision, Route
from .uses import unwrapped

_ADAMW = {
    "trainable_tokens_delta": "rows of an embedding (trainable tokens)",
    "lora_embedding_[ab]": "LoRA of an embedding",
    "hira_embedding_[ab]": "HiRA of an embedding",
    "(lora_)?magnitude_vector": "DoRA: a magnitude per output",
    "lora_e": "AdaLoRA: a singular value per rank",
    "oft_(embedding_)?r": "OFT: angles of rotations, entries of skew-symmetric blocks",
    "boft_r": "BOFT: butterfly factors, entries of skew-symmetric blocks",
    "boft_s": "BOFT: a scale per output",
    "psoft_r": "PSOFT: entries of a rotation",
    "c3a_kernel": "C3A: kernels of circular convolutions, each row a vector",
    "vblora_logits_[ab]": "VB-LoRA: logits that choose vectors of the bank",
    "vblora_vector_bank": "VB-LoRA: a bank of vectors, chosen by logits",
    "p?vera_lambda_[bd]": "VeRA: scales of frozen random matrices",
    "p?vera_[ab]": "VeRA: random matrices that every layer shares",
    "ia3_l": "IA3: a scale per channel",
    "fourierft_spectrum": "FourierFT: coefficients of a spectrum",
    "waveft_spectrum": "WaveFT: coefficients of a spectrum",
    "randlora_(lambda|gamma)": "RandLoRA: scales of frozen random matrices",
    "randlora_[ab]": "RandLoRA: random matrices that every layer shares",
    "hra_u": "HRA: directions of Householder reflections, each column a vector",
    "road_(theta|alpha)": "RoAd: angles and scales of plane rotations",
    "shira_weight": "SHiRA: scattered entries of a matrix",
    "hada_t[12]": "LoHa: the core of a Tucker decomposition",
    "lokr_t2": "LoKr: the core of a Tucker decomposition",
    "(lily|poly)_router": "router: logits of the adapter's experts",
    "module_logits": "router: logits of the adapter's skills",
    "tinylora_v": "TinyLoRA: coefficients of fixed matrices",
    "unilora_theta_d": "Uni-LoRA: one vector that all factors are read from",
    "delora_lambda": "DeLoRA: a strength per layer",
    "frod_lambda_(l|s_values)": "FRoD: scales of frozen matrices",
    "beft_bias": "BEFT: a bias",
    "supertuning_values": "scattered entries of a matrix",
    "prefix_task_(cols|rows)": "multitask prompt: a table of vectors per task",
    "(trainable_)?embedding": "virtual tokens: a table of vectors",
    "s_low": "OSF: singular values",
    "adaption_prompt": "adaption prompt: a table of vectors",
}  # fmt: skip
_FACTORS = {
    "(hira|delora|lily|gralora|peanut|adamss|supertuning_lora|poly_lora)_[ab](_general)?":
        "low-rank adapter: each factor is a matrix of its own",
    "hada_w[12]_[ab]": "LoHa: each factor is a matrix of its own",
    "lokr_w[12](_[ab])?": "LoKr: each factor is a matrix of its own",
    "(u|v)_low": "OSF: the trained singular vectors, a matrix",
    "glora_[a-e]": "GLoRA: each factor is a matrix of its own",
    "deft_[pr]": "DEFT: each factor is a matrix of its own",
    "miss_block": "MiSS: a matrix that is repeated over the inputs",
    "peanut_(encoders|decoders)": "PEANuT: a matrix of a small network",
    r"(\w+_)?lora_?a([_\d]\w*)?": "LoRA A: each factor is a matrix of its own",
    r"(\w+_)?lora_?b([_\d]\w*)?": "LoRA B: each factor is a matrix of its own",
    r"(\w+_)?lora_(down|up)([_\d]\w*)?": "LoRA: each factor is a matrix of its own",
}  # fmt: skip
_RULES = [(re.compile(rf"^{key}$", re.I), text, "adamw") for key, text in _ADAMW.items()]
_RULES += [(re.compile(rf"^{key}$", re.I), text, "normuon") for key, text in _FACTORS.items()]
_VIRTUAL = re.compile(r"(?:^|\.)prompt_encoder\.\w+\.(embedding|transform|mlp_head)\.")
_SIDE_A = re.compile(r"lora_?(a|down)(?![a-z])|_a$")
_SIDE_B = re.compile(r"lora_?(b|up)(?![a-z])|(_b|up)$")
_OF_HEAD = "LoRA B of an output head: its rows are the head's outputs"
_PLAIN = ("embedding", "trainable_embedding", "module_logits", "u_low", "v_low", "s_low")


def decide(
    name: str,
    owners: Sequence[nn.Module],  # the nearest first
    shape: tuple[int, ...],
    *,
    of_head: bool,
) -> Decision | None:
    """The rule of an adapter's parameter, with the reason; ``None`` if it belongs to no adapter.

    ``of_head``: the adapter is one of an output head.
    """
    parts = name.split(".")
    mixer = next((o for o in owners if kind_of(o) == "XLoraClassifier"), None)
    if mixer is not None:
        last = [m for m in mixer.modules() if is_layer(m)][-1]
        text = "router: logits of the adapters that X-LoRA mixes"
        return Decision(Route("adamw"), text) if owners[0] is last else None
    for part in reversed(parts):
        found = _rule(part)
        if found is None or (part.lower() in _PLAIN and not _in_peft(owners)):
            continue
        text, algorithm = found
        if algorithm == "adamw":
            return Decision(Route("adamw"), text)
        return _factor(part.lower(), owners, shape, text, of_head)
    return _unknown(parts, owners)


@lru_cache(4096)
def _rule(part: str) -> tuple[str, str] | None:
    """The reason and the rule of what an adapter calls ``part``."""
    return next(((text, rule) for pattern, text, rule in _RULES if pattern.match(part)), None)


def is_adapters(part: str) -> bool:
    """Whether a part of a path is what an adapter calls its parameter, as a factor of low rank."""
    return part.lower() not in _PLAIN and _rule(part) is not None


def by_name(name: str, shape: tuple[int, ...]) -> Decision | None:
    """As `decide`, where no module can be asked."""
    parts = name.split(".")
    virtual = _VIRTUAL.search(name)  # PEFT's virtual tokens, and the layers that make them
    if virtual is not None:
        if virtual[1] == "embedding":
            return Decision(Route("adamw"), _ADAMW["(trainable_)?embedding"])
        return Decision(Route(), "matrix: a layer of virtual tokens")
    for k in reversed(range(len(parts))):
        found = _rule(parts[k])
        if found is None or parts[k].lower() in _PLAIN:
            continue
        text, algorithm = found
        around = unwrapped(".".join(parts[:k]))[-1:]
        if algorithm == "adamw":
            return Decision(Route("adamw"), text)
        if around and _SIDE_B.search(parts[k].lower()) and words.head(around[0]) == "strong":
            return Decision(Route("adamw"), _OF_HEAD)
        if len(shape) == 4:
            return Decision(Route(flatten=True), f"{text}; a convolution, flattened", "likely")
        if around in (["experts"], ["expert"]):
            return Decision(Route(), f"{text}, unless experts share it", "untold")
        if parts[k] == "lily_B":
            return Decision(Route(), f"{text}, unless experts share it", "likely")
        return Decision(Route(), text)
    return None


def _factor(
    which: str, owners: Sequence[nn.Module], shape: tuple[int, ...], text: str, of_head: bool
) -> Decision:
    side = "a" if _SIDE_A.search(which) else "b" if _SIDE_B.search(which) else ""
    if of_head and side == "b":
        return Decision(Route("adamw"), _OF_HEAD)
    if kind_of(owners[0]) == "Embedding":
        return Decision(Route("adamw"), "LoRA of an embedding")
    wrapper = next((o for o in owners if isinstance(get(o, "parameter_name"), str)), None)
    experts = first([wrapper], ("num_experts",)) if wrapper is not None else None
    if experts is not None and experts > 1 and len(shape) == 2:
        stacked = f"of {experts} experts of {wrapper.parameter_name}"  # type: ignore[union-attr]
        if side == "a" and shape[0] % experts == 0:
            return Decision(Route(heads=experts), f"LoRA A {stacked}: one matrix per expert")
        return Decision(
            Route("adamw"),
            f"LoRA B {stacked}: its columns take turns expert by expert, so that no split has one "
            "expert's; AdamW treats each entry alone",
        )
    merged = next((get(o, "enable_lora") for o in owners if get(o, "enable_lora")), None)
    count = sum(map(bool, merged)) if isinstance(merged, (tuple, list)) else 0
    if count > 1 and len(shape) == 2 and shape[0] % count == 0:
        return Decision(Route(heads=count), f"{text}, for each of {count} merged projections")
    if which.startswith(("poly_lora", "gralora")) and len(shape) > 2:
        return Decision(Route(transposed=True), f"{text}, stored [inputs, outputs]")
    if which == "lily_b" and len(shape) == 2:
        bank = get(next((o for o in owners if get(o, "lily_router")), None), "lily_router")
        count = next((layer.weight.shape[0] for layer in bank.values()), 1) if bank else 1
        if count > 1 and shape[0] % count == 0:
            return Decision(Route(heads=count), f"{text}: {count} experts")
    if len(shape) == 4 or (len(shape) == 3 and kind_of(owners[0]).startswith("Conv")):
        return Decision(Route(flatten=True), f"{text}; a convolution, flattened")
    return Decision(Route(), text)


def _in_peft(owners: Sequence[nn.Module]) -> bool:
    return any(type(owner).__module__.partition(".")[0] == "peft" for owner in owners) or any(
        kind_of(owner) in ("PromptEmbedding", "PrefixEncoder", "PromptEncoder", "CPTEmbedding")
        for owner in owners[:3]
    )


def _unknown(parts: Sequence[str], owners: Sequence[nn.Module]) -> Decision | None:
    """An adapter layer of PEFT's says which of its attributes are the adapter's."""
    for owner in owners:
        names = get(owner, "adapter_layer_names")
        if isinstance(names, (tuple, list)) and "modules_to_save" not in names:
            mine = [part for part in parts if part in names]
            if mine and "base_layer" not in parts[parts.index(mine[-1]) :]:
                return Decision(
                    Route("adamw"),
                    f"{mine[-1]} of {kind_of(owner)}: an adapter that is not known here",
                    "untold",
                )
    return None
