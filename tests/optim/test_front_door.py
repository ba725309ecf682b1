"""What `NorMuon` takes and says once: a model, groups without names, a framework's own groups."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from tests.planning.test_front_door import Small


def rules(optimizer: nm.NorMuon) -> dict[Tensor, str]:
    """normuon or adamw by parameter, as its state says."""
    return {
        p: "normuon" if "momentum" in kinds else "adamw" for p, kinds in optimizer.state.items()
    }


def right(model: Small, optimizer: nm.NorMuon) -> bool:
    matrices = {model.second.weight, model.third.weight}
    expected = {p: "normuon" if p in matrices else "adamw" for p in model.parameters()}
    return rules(optimizer) == expected


def step(model: Small, optimizer: nm.NorMuon) -> None:
    model(torch.arange(8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_of_a_model_reads_its_modules(eager: None) -> None:
    model = Small()
    optimizer = nm.NorMuon(model, lr=0.02, weight_decay=0.1, guard="full")
    assert right(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    step(model, optimizer)
    assert {p.name: p.reason for p in optimizer.plan.parameters}["first.weight"] == "embedding"


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m), lambda m: nn.Sequential(m)])
def test_an_optimizer_of_a_wrapped_model_does_too(wrap: Any) -> None:
    model = Small()
    assert right(model, nm.NorMuon(wrap(model)))


def test_routes_beside_a_model_go_first() -> None:
    model = Small()
    optimizer = nm.NorMuon(model, routes={"second.weight": nm.Route("adamw", lr_mul=0.5)})
    assert rules(optimizer)[model.second.weight] == "adamw"
    assert rules(optimizer)[model.fourth.weight] == "adamw"
    assert rules(optimizer)[model.third.weight] == "normuon"


def test_a_table_finds_parameters_without_names_and_under_other_names(eager: None) -> None:
    model = Small()
    table = nm.routes_for(model)
    decayed, others = list(model.parameters())[:3], list(model.parameters())[3:]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
    for params in (
        list(model.parameters()), groups, [(f"model.{n}", p) for n, p in model.named_parameters()]
    ):  # fmt: skip
        assert right(model, nm.NorMuon(params, routes=table))


def test_a_table_prefers_the_tensor_to_a_name_that_another_one_has() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Sequential(nn.Linear(4, 4, bias=False)))
    inner = dict(model[1].named_parameters())  # "0.weight", as the embedding's in the model
    plan = nm.make_plan(inner, routes=nm.routes_for(model))
    assert plan.parameters[0].route == nm.Route()


def test_a_table_of_a_model_that_is_gone_or_was_pickled_goes_by_name() -> None:
    model = Small()
    table = pickle.loads(pickle.dumps(nm.routes_for(model)))
    assert right(model, nm.NorMuon(model.named_parameters(), routes=table))
    with pytest.raises(ValueError, match="neither as a tensor nor by name"):
        nm.NorMuon(model.parameters(), routes=table)
    table = nm.routes_for(Small())
    assert right(model, nm.NorMuon(model.named_parameters(), routes=table))


def test_a_tensor_that_was_put_into_the_model_later_is_found() -> None:
    model = Small()
    table = nm.routes_for(model)
    model.first.weight = nn.Parameter(torch.zeros(50, 16))  # as after resize_token_embeddings
    assert right(model, nm.NorMuon(model.parameters(), routes=table))


def test_a_table_does_not_keep_modules_from_swapping_their_tensors() -> None:
    model = Small()
    table = nm.routes_for(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert right(model, nm.NorMuon(model.parameters(), routes=table))


def test_a_copied_optimizer_of_parameters_without_names_keeps_its_routes(eager: None) -> None:
    model = Small()
    optimizer = nm.NorMuon(model.parameters(), routes=nm.routes_for(model))
    both = copy.deepcopy((model, optimizer))
    step(*both)
    assert right(*both)


def test_without_names_and_without_a_model_one_warning_names_the_shapes(eager: None) -> None:
    model = Small()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        optimizer = nm.NorMuon(model.parameters())
        step(model, optimizer)
    (warning,) = seen
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert "2 of 40x16, 2 of 16x16" in str(warning.message)
    assert "nm.NorMuon(model, ...)" in str(warning.message)


def test_a_group_that_says_its_algorithm_needs_no_names() -> None:
    model = Small()
    matrices = [model.second.weight, model.third.weight]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [
        {"params": matrices, "algorithm": "normuon"},
        {"params": others, "algorithm": "adamw"},
    ]
    assert right(model, nm.NorMuon(groups))
    del groups[0]["algorithm"]  # the other group's tells that somebody has split them
    assert right(model, nm.NorMuon(groups))


def test_doubts_are_said_at_construction_and_not_again_when_other_gradients_come(
    eager: None,
) -> None:
    params = {"body.0.w": torch.zeros(8, 8), "stem.weight": torch.zeros(8, 3, 3, 3)}
    params = {name: nn.Parameter(p) for name, p in params.items()}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = nm.NorMuon(list(params.items()))
        for names in (["body.0.w"], ["body.0.w", "stem.weight"], ["stem.weight"]):
            for name in params:
                params[name].grad = torch.ones_like(params[name]) if name in names else None
            optimizer.step()
    assert len(seen) == 1 and seen[0].filename == __file__


def test_a_group_that_is_added_later_is_doubted_alone() -> None:
    with pytest.warns(UserWarning, match="stem.weight"):
        optimizer = nm.NorMuon([("stem.weight", nn.Parameter(torch.zeros(8, 3, 3, 3)))])
    with pytest.warns(UserWarning, match=r"later.weight.*flatten") as seen:
        later = ("later.weight", nn.Parameter(torch.zeros(8, 3, 3, 3)))
        optimizer.add_param_group({"params": [later]})
    assert len(seen) == 1 and "stem.weight" not in str(seen[0].message)


def test_the_trainer_makes_the_optimizer_with_the_models_routes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    rows = (torch.arange(24)[:, None] + 3 * torch.arange(8)) % 16
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=nm.for_trainer(model, lr=0.02, weight_decay=0.1),
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, nm.NorMuon)
    routes = {p.name: p.route for p in optimizer.plan.parameters}
    assert routes["lm_head.weight"] == routes["model.embed_tokens.weight"] == nm.Route("adamw")
    assert routes["model.layers.0.mlp.up_proj.weight"] == nm.Route()
    assert routes["model.norm.weight"] == nm.Route("adamw", wd_mul=0.0)
    assert int(optimizer.state[model.lm_head.weight]["step"]) == 3


def test_the_trainers_own_groups_find_their_routes_in_a_table(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    model = Small()
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1
    )
    trainer = transformers.Trainer(
        model, arguments,
        optimizer_cls_and_kwargs=(nm.NorMuon, {"lr": 0.02, "routes": nm.routes_for(model)}),
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    assert right(model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_what_a_framework_makes_is_said_at_the_users_line_and_for_a_trainer_with_its_line() -> None:
    """The frameworks' own files stand in for them: only the folder that they are in counts."""
    for package, has_line in (("transformers", True), ("accelerate", False)):
        code = "def make(cls, params):\n    return cls(params)\n"
        names: dict[str, Any] = {}
        exec(compile(code, f"/env/lib/site-packages/{package}/trainer.py", "exec"), names)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            names["make"](nm.NorMuon, [{"params": list(Small().parameters())}])
            line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        (warning,) = said
        assert (warning.filename, warning.lineno) == (__file__, line)
        assert ("optimizer_cls_and_kwargs=nm.for_trainer" in str(warning.message)) == has_line


class Quantized(torch.Tensor):
    """Stands for torchao's tensors: a wrapper with a dispatch of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantized:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return cast(Quantized, made)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantized(args[0].inner)
        raise NotImplementedError(f"{func}")


def test_a_frozen_parameter_may_be_of_any_kind() -> None:
    model = nn.Module()
    model.base = nn.Module()
    model.base.weight = nn.Parameter(Quantized(torch.ones(4, 4)), requires_grad=False)
    model.lora = nn.Linear(4, 4)
    nm.NorMuon(model)
    model.base.weight.requires_grad_(True)
    with pytest.raises(TypeError, match=r"base\.weight.*expected a plain tensor or a DTensor"):
        nm.NorMuon(model)


def test_a_module_that_the_model_gets_later_is_added_with_its_routes() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 40)})
    optimizer = nm.NorMuon(model, lr=0.1, routes={"*": nm.Route(lr_mul=0.5)})
    model["aux"] = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Embedding(50, 8))
    optimizer.add_param_group({"params": model["aux"].named_parameters(prefix="aux")})
    stranger = [("stranger.weight", nn.Parameter(torch.ones(4, 4)))]
    with pytest.raises(ValueError, match="was given a model without it"):
        optimizer.add_param_group({"params": stranger})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.plan is not None
    found = {p.name: str(p.route) for p in optimizer.plan.parameters}
    assert found["aux.0.weight"] == "normuon lr*=0.5" and found["body.weight"] == "normuon lr*=0.5"
    assert found["aux.2.weight"] == found["aux.1.bias"] == "adamw lr*=0.5"
    again = pickle.loads(pickle.dumps(optimizer))
    assert len(again.param_groups) == 2
