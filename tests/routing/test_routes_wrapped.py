"""`routes_for` on wrapped, copied and adapted models: the rule is that of the bare model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import normuon_fn as nm
from normuon_fn.routing.uses import unwrapped

V, D, F, CLASSES = 50, 24, 40, 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_proj, self.fc, self.out = nn.Linear(D, D), nn.Linear(D, F), nn.Linear(F, D)


class Named(nn.Module):
    """With a head that only its weak name and its place tell."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.tok = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Block(), Block()])
        self.fc = head or nn.Linear(D, CLASSES)


def sequential() -> nn.Module:
    """Where the vocabulary alone tells the head, and all is numbered."""
    return nn.Sequential(
        nn.Embedding(V, D), Block(), Block(), nn.LayerNorm(D), nn.Linear(D, V, bias=False)
    )


def with_a_sequential_head() -> nn.Module:
    return Named(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, CLASSES)))


class Distilled(nn.Module):
    """As timm's: get_classifier() answers with both heads."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.dist_token = (nn.Parameter(torch.randn(1, 1, D)) for _ in range(2))
        self.blocks = nn.Sequential(Block(), Block())
        self.head, self.head_dist = nn.Linear(D, CLASSES), nn.Linear(D, CLASSES)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist


class Lightning(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.criterion = nn.Linear(3, 3)


class LightningModule(nn.Module):
    """Only its name counts."""


class AnyAttribute(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.anything, self.loss = model, nn.Bilinear(2, 2, 2)


class WithTeacher(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = model, copy.deepcopy(model).requires_grad_(False)


class WithEma(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.ema = model, AveragedModel(model)


class DistributedDataParallel(nn.Module):
    """The structure of torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def sharded_blocks(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for k, block in enumerate(child):
                if isinstance(block, Block):
                    child[k] = FullyShardedDataParallel(block)
        elif isinstance(child, nn.Linear):
            setattr(model, name, FullyShardedDataParallel(child))
    return FullyShardedDataParallel(model)


def checkpointed(model: nn.Module) -> nn.Module:
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for k, block in enumerate(child):
                if isinstance(block, Block):
                    child[k] = checkpoint_wrapper(block)
    return model


def parametrized(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            nn.utils.parametrizations.weight_norm(module)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "compile": torch.compile,
    "compiled ddp": lambda m: torch.compile(DistributedDataParallel(m)),
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
    "lightning, net": Lightning,
    "lightning, any": AnyAttribute,
    "teacher": WithTeacher,
    "ema": WithEma,
    "fsdp": sharded_blocks,
    "checkpoint": checkpointed,
    "weight_norm": parametrized,
    "lightning of compiled ema": lambda m: Lightning(torch.compile(WithEma(m))),
    # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [Named, sequential, with_a_sequential_head, Distilled])
def test_every_parameter_keeps_its_rule_inside_a_wrapper(
    make: Callable[[], nn.Module], wrapper: str
) -> None:
    bare = nm.routes_for(make())
    adamw = {name for name, route in bare.items() if route == nm.Route("adamw")}
    heads = [entry.name for entry in bare.entries.values() if "head" in entry.reason]
    assert heads, "the bare model has a head"
    seen = set()
    for entry in nm.routes_for(WRAPPERS[wrapper](make())).entries.values():
        parts = [
            p
            for p in unwrapped(entry.name)
            if p not in ("net", "anything", "student", "teacher", "model", "ema")
        ]
        name = ".".join(parts)
        name = name if name in bare else f"{name}.weight"
        route = entry.route.unfrozen or entry.route
        if name not in bare or bare[name].algorithm == "frozen" or "original0" in entry.name:
            continue
        seen.add(name)
        assert route.algorithm == bare[name].algorithm, (entry, bare.entries[name])
    assert seen >= adamw - {f"{head.removesuffix('weight')}bias" for head in heads}


@pytest.mark.parametrize("name", ["head_proj", "fc", "out"])
def test_layers_of_blocks_are_no_heads(name: str) -> None:
    table = nm.routes_for(WithEma(Named()))
    assert (
        table[f"model.layers.0.{name}.weight"]
        == table[f"ema.module.layers.1.{name}.weight"]
        == nm.Route()
    )


# -------------------------------------------------------------------- adapters, by PEFT's structure


class ModulesToSaveWrapper(nn.Module):
    def __init__(self, module: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.original_module = module.requires_grad_(False)
        copies = {
            name: copy.deepcopy(module).requires_grad_(k == 0) for k, name in enumerate(adapters)
        }
        self.modules_to_save = nn.ModuleDict(copies)


class Causal(nn.Module):
    def __init__(self, *, tells: bool = True) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, D)
        self.model.layers = nn.ModuleList([Block()])
        name = "lm_head" if tells else "score"
        setattr(self, name, nn.Linear(D, V if tells else 3, bias=False))
        self.tells = tells

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.tells else None  # type: ignore[return-value]


class Peft(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model.requires_grad_(False)


@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
@pytest.mark.parametrize("head", ["lm_head", "score"])
def test_a_head_that_is_saved_beside_an_adapter_keeps_its_rule(
    head: str, adapters: tuple[str, ...]
) -> None:
    peft = Peft(Causal(tells=head == "lm_head"))
    inner: Any = peft.base_model.model
    setattr(inner, head, ModulesToSaveWrapper(getattr(inner, head), *adapters))
    entries = nm.routes_for(peft).entries
    stem = f"base_model.model.{head}"
    active = entries[f"{stem}.modules_to_save.default.weight"]
    assert active.route == nm.Route("adamw") and "output head" in active.reason
    for name in (
        f"{stem}.original_module.weight",
        *(f"{stem}.modules_to_save.{a}.weight" for a in adapters[1:]),
    ):
        assert entries[name].route == nm.Route("frozen") and entries[
            name
        ].route.unfrozen == nm.Route("adamw")


class TrainableTokens(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.trainable_tokens_delta = nn.ParameterDict({"default": nn.Parameter(torch.randn(3, D))})


def test_trained_rows_of_an_embedding_are_an_embedding() -> None:
    model = nn.Module()
    model.embed = TrainableTokens(nn.Embedding(V, D).requires_grad_(False))
    assert nm.routes_for(model)["embed.trainable_tokens_delta.default"] == nm.Route("adamw")


class ParamWrapper(nn.Module):
    def __init__(self, base: nn.Module, name: str, rank: int) -> None:
        super().__init__()
        self.base_layer, self.parameter_name = base.requires_grad_(False), name
        self.num_experts, outputs, inputs = getattr(base, name).shape
        self.lora_A = nn.ModuleDict(
            {"default": nn.Linear(inputs, rank * self.num_experts, bias=False)}
        )
        self.lora_B = nn.ModuleDict(
            {"default": nn.Linear(rank * self.num_experts, outputs, bias=False)}
        )


def adapted_experts() -> nn.Module:
    experts = nn.Module()
    experts.up = nn.Parameter(torch.randn(4, F, D))
    return ParamWrapper(experts, "up", 3)


def test_lora_on_stacked_experts_is_one_matrix_per_expert() -> None:
    """PEFT reads lora_B as [outputs, rank, experts]: no route has the columns of one expert."""
    model = adapted_experts()
    table = nm.routes_for(nn.ModuleDict({"experts": model}))
    assert table["experts.lora_A.default.weight"] == nm.Route(heads=4)
    assert table["experts.lora_B.default.weight"] == nm.Route("adamw")
    assert "take turns expert by expert" in table.entries["experts.lora_B.default.weight"].reason


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(3, 4, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(4, 8, 1, bias=False)})


def test_the_factors_of_a_convolution_are_flattened() -> None:
    table = nm.routes_for(Conv())
    assert (
        table["lora_A.default.weight"] == table["lora_B.default.weight"] == nm.Route(flatten=True)
    )


ADAPTERS: dict[str, tuple[tuple[int, ...], str]] = {
    "oft_R.default.weight": ((6, 6), "rotations"), "boft_R.default": ((1, 6, 4, 4),
    "skew-symmetric"),
    "boft_s.default": ((D, 1), "vector"), "c3a_kernel.default": ((6, 6, 4), "circular"),
    "vblora_logits_A.default": ((4, 6, 8), "logits"), "vblora_vector_bank.default": ((8, 4),
    "bank"),
    "vera_lambda_b.default": ((D,), "vector"), "ia3_l.default": ((1, D), "vector"),
    "hra_u.default": ((D, 4), "Householder"),
    "randlora_gamma.default": ((6, D), "scales"), "lora_magnitude_vector.default.weight": ((1, D),
    "vector"),
    "poly_router.default.module_logits": ((2, 4), "logits"), "lora_embedding_A.default": ((4, V),
    "embedding"),
    "hada_t1.default": ((4, 4, 3, 3), "Tucker"), "prefix_task_cols": ((2, 5, 1), "table"),
    "newest_thing.default": ((D, D), "not known"),
}  # fmt: skip
FACTORS = ("lora_A.default.weight", "hada_w1_a.default", "lokr_w1.default", "lokr_w2_b.default",
"delora_B.default",
           "hira_A.default", "lora_down.weight", "lora_a.weight")  # fmt: skip


def adapter(name: str, tensor: Tensor) -> nn.Module:
    layer = nn.Module()
    layer.adapter_layer_names = ("newest_thing",)
    at: nn.Module = layer
    *path, leaf = name.split(".")
    for part in path:
        child: nn.Module = (
            nn.ParameterDict() if part == path[-1] and leaf == "default" else nn.Module()
        )
        at.add_module(part, child)
        at = child
    at.register_parameter(leaf, nn.Parameter(tensor))
    return nn.ModuleDict({"q_proj": layer})


@pytest.mark.parametrize("name", ADAPTERS)
def test_rotations_scales_logits_and_banks_of_adapters_get_adamw_with_the_reason(name: str) -> None:
    shape, why = ADAPTERS[name]
    entry = nm.routes_for(adapter(name, torch.randn(shape))).entries[f"q_proj.{name}"]
    assert entry.route == nm.Route("adamw") and why in entry.reason
    assert entry.certainty == ("untold" if why == "not known" else "certain")


@pytest.mark.parametrize("name", FACTORS)
def test_the_factors_of_adapters_are_matrices(name: str) -> None:
    entry = nm.routes_for(adapter(name, torch.randn(4, D))).entries[f"q_proj.{name}"]
    assert entry.route == nm.Route() and "factor" in entry.reason


def test_members_of_an_ensemble_held_by_a_module_keep_their_biases_as_vectors() -> None:
    models = [nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    stacked = copy.deepcopy(models[0])
    for name, p in params.items():
        owner, _, leaf = name.rpartition(".")
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(p))
    loose = nn.ParameterDict(
        {name.replace(".", "_"): nn.Parameter(p) for name, p in params.items()}
    )
    for model in (stacked, loose):
        table = nm.routes_for(model)
        assert {n.replace("_", ".") for n,
        route in table.items() if route.algorithm == "normuon"} == {
            "0.weight", "2.weight",
        }  # fmt: skip


def test_a_name_of_the_model_inside_is_refused_with_the_name_that_its_wrapper_gives() -> None:
    compiled = torch.compile(Named())
    with pytest.raises(
        ValueError, match=r"did you mean '_orig_mod.fc.weight'\? The model is wrapped"
    ):
        nm.NorMuon(compiled, routes={"fc.weight": nm.Route()})
    routes = {"_orig_mod.fc.weight": nm.Route()}
    assert nm.NorMuon(compiled, routes=routes).param_groups
    assert nm.NorMuon(compiled._orig_mod, routes={"fc.weight": nm.Route()}).param_groups
