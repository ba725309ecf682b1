"""`for_trainer` beside ``TrainingArguments``: whose numbers hold, and what contradicts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import normuon_fn as nm
from normuon_fn.optim import trainer_arguments

transformers = pytest.importorskip("transformers", minversion="5")

STEPS = 6


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


def arguments_of(folder: Path, kind: Any = None, **options: Any) -> Any:
    return (kind or transformers.TrainingArguments)(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, per_device_train_batch_size=8, **options,
    )  # fmt: skip


def trainer_of(
    arguments: Any, made: Any, model: Any = None, kind: Any = None, **options: Any
) -> Any:
    rows = (torch.arange(48)[:, None] + 3 * torch.arange(8)) % 16
    return (kind or transformers.Trainer)(
        llama() if model is None else model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=made,
        **options,
    )


class OfVersion4(transformers.Trainer):
    """Makes its optimizer as transformers 4 does: what it is given is called with groups."""

    def create_optimizer(self, model: Any = None) -> Any:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.args.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        cls, kwargs = self.optimizer_cls_and_kwargs
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer


VERSIONS = pytest.mark.parametrize(
    "kind", [transformers.Trainer, OfVersion4], ids=["transformers 5", "transformers 4"]
)


def numbers(optimizer: Any) -> tuple[float, float, tuple[float, float], float]:
    (group,) = optimizer.param_groups
    return group["lr"], group["weight_decay"], group["adamw_betas"], group["adamw_eps"]


@VERSIONS
@pytest.mark.parametrize("given", [{}, {"args"}, {"model"}, {"model", "args"}])
def test_the_trainers_own_numbers_reach_the_optimizer(
    tmp_path: Path, kind: Any, given: set[str]
) -> None:
    arguments = arguments_of(
        tmp_path, learning_rate=0.003, weight_decay=0.2, adam_beta1=0.8, adam_epsilon=1e-6
    )
    has = {"model": llama(), "args": arguments}
    made = nm.for_trainer(**{key: has[key] for key in given})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = trainer_of(arguments, made, has["model"], kind).create_optimizer()
    assert numbers(optimizer) == (0.003, 0.2, (0.8, 0.95), 1e-6)


def test_a_number_that_is_written_goes_before_a_default_of_the_arguments(tmp_path: Path) -> None:
    made = nm.for_trainer(lr=0.02, weight_decay=0.1, adamw_betas=(0.7, 0.9), adamw_eps=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = trainer_of(arguments_of(tmp_path), made).create_optimizer()
    assert numbers(optimizer) == (0.02, 0.1, (0.7, 0.9), 1e-9)
    same = nm.for_trainer(lr=0.02)  # written twice, with one value
    optimizer = trainer_of(arguments_of(tmp_path, learning_rate=0.02), same).create_optimizer()
    assert numbers(optimizer)[:2] == (0.02, 0.0)


@VERSIONS
@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ({"lr": 0.02}, {"learning_rate": 0.003}, r"lr=0\.02 contradicts learning_rate=0\.003"),
        ({"lr": torch.tensor(0.5)}, {"learning_rate": 0.003}, r"contradicts learning_rate=0\.003"),
        ({"weight_decay": 0.0}, {"weight_decay": 0.1}, r"weight_decay=0\.0 contradicts weight_de"),
        ({"adamw_betas": (0.9, 0.95)}, {"adam_beta2": 0.98}, r"\(0\.9, 0\.95\) contradicts adam_b"),
        ({"adamw_eps": 1e-8}, {"adam_epsilon": 1e-6}, r"adamw_eps=1e-08 contradicts adam_epsilon"),
    ],
)
def test_two_numbers_that_contradict_each_other_are_refused_by_name(
    tmp_path: Path, kind: Any, mine: dict[str, Any], theirs: dict[str, Any], message: str
) -> None:
    arguments = arguments_of(tmp_path, **theirs)
    trainer = trainer_of(arguments, nm.for_trainer(**mine), kind=kind)
    with pytest.raises(ValueError, match=message + r"[^;]*; write one of them: .*leave"):
        trainer.create_optimizer()
    assert trainer.optimizer is None
    with pytest.raises(ValueError, match=message):  # at the line, where the arguments are given
        nm.for_trainer(args=arguments, **mine)


def test_arguments_that_nobody_reads_are_named_once_at_the_users_line(tmp_path: Path) -> None:
    arguments = arguments_of(
        tmp_path, optim="adafactor", optim_args="beta1=0.5", optim_target_modules=["q_proj"]
    )
    trainer = trainer_of(arguments, nm.for_trainer())
    with pytest.warns(UserWarning, match="not read") as seen:
        trainer.create_optimizer()
    (warning,) = seen
    text = str(warning.message)
    assert all(part in text for part in ("optim='adafactor'", "'beta1=0.5'", "target_modules=["))
    assert "lr is 5e-05, the default of TrainingArguments" in text and "learning_rate=" in text
    assert warning.filename == __file__


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_adamw_that_is_the_trainers_default_is_not_remarked_on(
    tmp_path: Path, optim: str
) -> None:
    arguments = arguments_of(tmp_path, learning_rate=0.003, optim=optim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of(arguments, nm.for_trainer()).create_optimizer()


def test_a_default_is_that_of_the_arguments_own_class(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Own(transformers.TrainingArguments):
        learning_rate: float = 2e-5  # as in trl.SFTConfig

    made = nm.for_trainer(lr=0.02)
    assert numbers(trainer_of(arguments_of(tmp_path, Own), made).create_optimizer())[0] == 0.02
    with pytest.raises(ValueError, match=r"learning_rate=5e-05"):
        trainer_of(arguments_of(tmp_path, Own, learning_rate=5e-5), made).create_optimizer()


def test_a_search_over_rates_reaches_each_trials_optimizer(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, learning_rate=0.003)
    trainer = trainer_of(arguments, nm.for_trainer(args=arguments))
    trainer.create_optimizer()
    trainer.optimizer, trainer.args.learning_rate = None, 0.01  # as the Trainer's search does
    assert numbers(trainer.create_optimizer())[0] == 0.01


def test_what_is_no_model_or_no_arguments_is_answered_with_the_line_to_write(
    tmp_path: Path,
) -> None:
    with pytest.raises(TypeError, match=r"nm\.for_trainer\(args=arguments\)"):
        nm.for_trainer(arguments_of(tmp_path))
    with pytest.raises(TypeError, match=r"args: .*got dict.*nm\.for_trainer\(model, arguments\)"):
        nm.for_trainer(llama(), {"learning_rate": 0.1})
    other = trainer_of(arguments_of(tmp_path, learning_rate=0.1), nm.for_trainer(), kind=OfVersion4)
    made, kwargs = nm.for_trainer(llama(1))
    with pytest.raises(ValueError, match="another model than"):
        made([{"params": list(other.model.parameters())}], **kwargs)


@pytest.mark.parametrize("way", ["optimizers", "a class"])
def test_numbers_that_an_optimizer_made_elsewhere_does_not_have_are_said_once(
    tmp_path: Path, way: str
) -> None:
    def run(theirs: dict[str, Any], **mine: float) -> list[str]:
        arguments, model = (
            arguments_of(tmp_path, max_steps=2, save_strategy="no", **theirs),
            llama(),
        )
        made = {"optimizer_cls_and_kwargs": (nm.NorMuon, {"routes": nm.routes_for(model), **mine})}
        if way == "optimizers":
            made = {"optimizers": (nm.NorMuon(model, **mine), None)}  # type: ignore[dict-item]
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, **made)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        own = [w for w in said if "NorMuon:" in str(w.message)]
        assert all(w.filename == __file__ for w in own)
        return [str(w.message) for w in own]

    (text,) = run({"learning_rate": 0.003, "weight_decay": 0.2}, lr=0.02)
    assert "learning_rate=0.003 of TrainingArguments is not read, lr is 0.02" in text
    assert "nm.for_trainer(model, arguments)" in text
    assert ("weight_decay=0.2 of TrainingArguments is not read" in text) == (way == "optimizers")
    said = run({}, lr=0.02, weight_decay=0.1)
    assert ["weight_decay=0.1 beside the class is not read" in text for text in said] == (
        [True] if way == "a class" else []
    )
    assert run({"learning_rate": 0.003}, lr=0.003) == run({}, lr=0.02) == []


class Rates(transformers.TrainerCallback):
    """The rates of matrices and of AdamW that the graph was given at every step."""

    def __init__(self) -> None:
        self.hypers: list[tuple[float, float]] = []

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        hyper = inner._planner.hyper.hyper
        self.hypers.append((float(hyper.lr), float(hyper.adamw_lr)))


@VERSIONS
def test_its_schedule_scales_every_rate_and_a_resumed_run_has_the_losses_of_an_undisturbed_one(
    tmp_path: Path, kind: Any
) -> None:
    def run(folder: str, seed: int, **more: Any) -> tuple[list[float], list[Any]]:
        arguments = arguments_of(
            tmp_path / folder, learning_rate=0.02, weight_decay=0.1, max_steps=STEPS, save_steps=3,
            lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.5,
        )  # fmt: skip
        rates = Rates()
        made = nm.for_trainer(args=arguments, adamw_lr=0.01, guard="full")
        trainer = trainer_of(arguments, made, llama(seed), kind, callbacks=[rates])
        trainer.train(**more)
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], rates.hypers

    losses, rates = run("whole", 0)
    assert losses[-1] < losses[0]
    factors = [min(k / 2, (STEPS - k) / (STEPS - 2)) for k in range(STEPS)]
    assert rates == [pytest.approx((0.02 * factor, 0.01 * factor)) for factor in factors]
    again, _ = run("again", 1, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again == losses


def test_a_resumed_run_whose_arguments_have_another_rate_says_that_the_checkpoints_holds(
    tmp_path: Path,
) -> None:
    for rate, start in ((0.02, None), (0.01, str(tmp_path / "checkpoint-1"))):
        arguments = arguments_of(
            tmp_path, learning_rate=rate, max_steps=2, save_steps=1, lr_scheduler_type="constant"
        )
        trainer = trainer_of(arguments, nm.for_trainer(args=arguments))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=start)
        own = [str(w.message) for w in said if "NorMuon:" in str(w.message)]
        assert trainer.optimizer.param_groups[0]["lr"] == 0.02  # as of AdamW
        assert len(own) == (start is not None)
    assert "learning_rate=0.01" in own[0] and "numbers of its checkpoint" in own[0]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, np.float32])
def test_a_number_in_another_precision_than_pythons_agrees_with_the_same_number(
    tmp_path: Path, kind: Any
) -> None:
    def of(value: float) -> Any:
        return torch.tensor(value, dtype=kind) if isinstance(kind, torch.dtype) else kind(value)

    written = {"learning_rate": 0.01, "adam_beta1": 0.8, "adam_epsilon": 1e-7, "weight_decay": 0.1}
    arguments = arguments_of(tmp_path, **written)
    betas = (of(0.8), 0.95)
    nm.for_trainer(
        llama(), arguments, lr=of(0.01), adamw_betas=betas, adamw_eps=of(1e-7), weight_decay=of(0.1)
    )
    with pytest.raises(ValueError, match=r"contradicts learning_rate=0\.01"):
        nm.for_trainer(llama(), arguments, lr=of(0.011))
    with pytest.raises(ValueError, match=r"contradicts adam_beta1=0\.8"):
        nm.for_trainer(llama(), arguments, adamw_betas=(of(0.9), 0.95))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_decay", None), ("lr", None), ("adamw_eps", None), ("lr", "0.1"),
        ("lr", torch.ones(2)), ("adamw_betas", 0.8), ("adamw_betas", None),
        ("adamw_betas", (0.8,)), ("adamw_betas", (0.8, None)), ("adamw_betas", (0.8, 1.5)),
        ("weight_decay", True),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_the_parameters_name(
    tmp_path: Path, key: str, value: Any, first: bool
) -> None:
    written = {"learning_rate": 0.01, "adam_beta1": 0.8, "weight_decay": 0.1, "adam_epsilon": 1e-7}
    given = (llama(), arguments_of(tmp_path, **written)) if first else ()
    with pytest.raises((TypeError, ValueError), match=rf"for_trainer: {key}: expected .*leave it"):
        nm.for_trainer(*given, **{key: value})


def test_all_ranks_are_the_mesh_unless_ddp_is_told_to_ignore_what_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = SimpleNamespace(distributed_type="MULTI_GPU", parallelism_config=None)
    trainer, model = SimpleNamespace(accelerator=accelerator), llama()
    monkeypatch.setattr(trainer_arguments, "all_ranks", lambda: "all")
    own, frozen = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    model.get_parameter(frozen).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ignored in ([], ["a.buffer"], [frozen]):
            model._ddp_params_and_buffers_to_ignore = ignored
            assert trainer_arguments.with_replicas({"lr": 1}, trainer, model)["mesh"] == "all"
        model._ddp_params_and_buffers_to_ignore = [own, frozen]
        for written in ({"mesh": "alone"}, {"guard_mesh": "group"}):
            assert trainer_arguments.with_replicas(written, trainer, model) == written
    with pytest.warns(UserWarning, match=rf"to ignore {own}: .*guard_mesh=") as seen:
        assert trainer_arguments.with_replicas({"lr": 1}, trainer, model) == {"lr": 1}
    assert len(seen) == 1 and seen[0].filename == __file__
