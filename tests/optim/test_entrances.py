"""What `NorMuon` can be given: each way in works, or is refused with the line to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import normuon_fn as nm
from tests.planning.test_front_door import Small


class Plain(nn.Module):
    """Whose names tell all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.lm_head = nn.Linear(16, 40)


def orthogonalized(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {p for p, kinds in optimizer.state.items() if "momentum" in kinds}


def matrices(*models: nn.Module) -> set[Tensor]:
    """The layers between the embedding and the head."""
    return {
        m.weight
        for model in models
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.in_features == m.out_features
    }


NAMED: dict[str, Callable[[Plain], Any]] = {
    "a dict": lambda model: dict(model.named_parameters()),
    "a generator": lambda model: model.named_parameters(),
    "a list": lambda model: list(model.named_parameters()),
    "a generator in a group": lambda model: [{"params": model.named_parameters(), "lr": 0.1}],
    "a list in a group": lambda model: [{"params": list(model.named_parameters())}],
    "those of a compiled model": lambda model: torch.compile(model).named_parameters(),
    "those of a wrapped model": lambda model: nn.DataParallel(model).named_parameters(),
    "an iterator over a list": lambda model: iter(list(model.named_parameters())),
}


@pytest.mark.parametrize("kind", NAMED)
def test_named_parameters_are_taken_in_any_container(kind: str) -> None:
    model = Plain()
    assert orthogonalized(nm.NorMuon(NAMED[kind](model))) == matrices(model)


@pytest.mark.parametrize(
    "together",
    [lambda a, b: nn.ModuleList([a, b]), lambda a, b: nn.ModuleDict({"a": a, "b": b})],
)  # fmt: skip
@pytest.mark.parametrize("made", [Plain, Small])
def test_several_models_are_taken_in_one_module(
    together: Callable[..., nn.Module], made: type[nn.Module]
) -> None:
    models = made(), made()
    optimizer = nm.NorMuon(together(*models))
    assert orthogonalized(optimizer) == matrices(*models)


def test_parameters_without_names_find_their_routes_in_a_table() -> None:
    model = Small()
    table = nm.routes_for(model)
    for params in (model.parameters(), list(model.parameters()), [{"params": model.parameters()}]):
        assert orthogonalized(nm.NorMuon(params, routes=table)) == matrices(model)


MODELS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a list": (lambda m: [m], r"list of Small: write nm\.NorMuon\(model, "),
    "a list of two": (lambda m: [m, Small()], r"Small, Small.*ModuleList\(\.\.\.\)"),
    "a tuple": (lambda m: (m, Small()), r"tuple of Small, Small"),
    "children": (lambda m: m.children(), r"Embedding, Linear.*nm\.NorMuon\(model, "),
    "modules": (lambda m: m.modules(), r"nm\.NorMuon\(model, "),
    "named children": (lambda m: m.named_children(), r"nm\.NorMuon\(model, "),
    "a dict": (lambda m: {"a": m, "b": Small()}, r"dict of Small, Small.*ModuleDict\(\.\.\.\)"),
    "a dict with params": (lambda m: {"params": m}, r"nm\.NorMuon\(model, "),
    "a group": (lambda m: [{"params": m, "lr": 1.0}], r"module\.parameters\(\).*nm\.routes_for"),
    "a part in a group": (lambda m: [{"params": m.fourth}], r"Linear.*nm\.routes_for\(model\)"),
    "parts in a group": (lambda m: [{"params": [m.first, m.second]}], r"Embedding, Linear"),
    "a dict in a group": (
        lambda m: [{"params": dict(m.named_parameters())}], r"list\(named\.items\(\)\)"
    ),
    "a group that is not in a list": (lambda m: {"params": m.parameters()}, r"\[\{'params': "),
    "a method": (lambda m: m.parameters, r"'parameters' \(call it\)"),
    "a class": (lambda m: Small, r"'Small' \(call it\)"),
    "a name": (lambda m: "model", r"got str 'model'"),
    "nothing": (lambda m: None, r"got NoneType"),
    "a state_dict": (lambda m: m.state_dict(), r"state_dict\(\).*nm\.NorMuon\(model, "),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_another_place_is_refused_with_the_line_to_write(kind: str) -> None:
    make, text = MODELS[kind]
    with pytest.raises(TypeError, match=text):
        nm.NorMuon(make(Small()))


def test_a_module_that_is_added_as_a_group_is_refused_and_changes_nothing() -> None:
    model = Small()
    optimizer = nm.NorMuon([model.second.weight, model.third.weight], algorithm="normuon",
                           routes=nm.routes_for(model))  # fmt: skip
    with pytest.raises(TypeError, match=r"module Linear.*routes_for"):
        optimizer.add_param_group({"params": model.fourth})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "params", [lambda m: [m], lambda m: list(m.parameters()), lambda m: m.named_parameters()]
)
def test_a_plan_of_something_else_says_what_to_write(params: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(TypeError, match=r"nm\.make_plan\(model\)"):
        nm.make_plan(params(Small()))


# ------------------------------------------------------------------------------ frameworks' ways in


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_zero_redundancy_takes_a_table_and_warns_without_one(one_process: None) -> None:
    model = Small()
    table = nm.routes_for(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), nm.NorMuon, lr=0.1, routes=table)
    assert orthogonalized(optimizer.optim) == matrices(model)
    with pytest.warns(UserWarning, match=r"no names.*routes=nm\.routes_for\(model\)") as seen:
        ZeroRedundancyOptimizer(model.parameters(), nm.NorMuon, lr=0.1)
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", minversion="5")


def small_llama(transformers: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


def train(trainer: Any) -> nm.NorMuon:
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, nm.NorMuon)
    return optimizer


@pytest.mark.parametrize(
    "way", ["optimizers", "a table", "for_trainer", "model_init", "model_init, another model"]
)
def test_the_trainer_steps_its_own_model_with_the_rules_of_its_modules(
    transformers: Any, tmp_path: Path, way: str
) -> None:
    rows = (torch.arange(24)[:, None] + 3 * torch.arange(8)) % 16
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_strategy="no", use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    given: dict[str, Any] = {
        "args": arguments, "train_dataset": [{"input_ids": row, "labels": row} for row in rows]
    }  # fmt: skip
    model = small_llama(transformers)
    if way == "optimizers":
        given |= {"model": model, "optimizers": (nm.NorMuon(model, lr=0.02), None)}
    elif way == "a table":
        made: Any = nm.NorMuon, {"lr": 0.02, "routes": nm.routes_for(model)}
        given |= {"model": model, "optimizer_cls_and_kwargs": made}
    elif way == "for_trainer":
        given |= {"model": model, "optimizer_cls_and_kwargs": nm.for_trainer(model, lr=0.02)}
    else:
        made = nm.for_trainer(*([model] if "another" in way else []), lr=0.02)
        given |= {
            "model_init": lambda: small_llama(transformers), "optimizer_cls_and_kwargs": made
        }  # fmt: skip
    trainer = transformers.Trainer(**given)
    found = orthogonalized(train(trainer))
    assert found == {p for n, p in trainer.model.named_parameters() if n.endswith("proj.weight")}
    assert len(found) == 7


def test_arguments_for_one_trainer_are_good_for_the_next(transformers: Any, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    made = nm.for_trainer(lr=0.02)
    for _ in range(2):
        model = small_llama(transformers)
        trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=made)
        assert orthogonalized(trainer.create_optimizer()) <= {*model.parameters()}
    with pytest.raises(ValueError, match="match no parameter"):
        nm.for_trainer(model, routes={"nobody": nm.Route("adamw")})
