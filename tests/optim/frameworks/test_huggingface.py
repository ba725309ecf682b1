"""`NorMuon` in transformers' Trainer and in Accelerate: they train, clip, schedule and resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import normuon_fn as nm
from tests.optim.frameworks import problem

transformers = pytest.importorskip("transformers", minversion="5")
accelerate = pytest.importorskip("accelerate", minversion="1")

STEPS = 8


@pytest.fixture(autouse=True)
def eager() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return STEPS * problem.ROWS

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        row = problem.batch(k)[0]
        return {"input_ids": row, "labels": row}


class Seen(transformers.TrainerCallback):
    """Norms, as they are when the optimizer steps, and the rates it stepped with."""

    def __init__(self, optimizer: nm.NorMuon) -> None:
        self.optimizer, self.norms, self.rates = optimizer, [], []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.norms.append(problem.norm_of(model.parameters()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rates.append(self.optimizer._planner.hyper.hyper.lr.tolist())


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(
        vocab_size=problem.TOKENS,
        num_key_value_heads=1,
        max_position_embeddings=problem.LENGTH,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config)


def trainer_of(folder: Path, seed: int, lr: float, **options: Any) -> tuple[Any, nm.NorMuon, Seen]:
    model = llama(seed)
    optimizer = problem.optimizer_of(model, lr, config=nm.Config(nesterov=True))
    seen = Seen(optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=problem.ROWS,
        save_steps=4,
        logging_steps=1,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Tokens(),
        optimizers=(optimizer, None),
        callbacks=[seen],
    )
    return trainer, optimizer, seen


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_the_trainer_learns_clips_schedules_and_resumes_exactly(tmp_path: Path, bf16: bool) -> None:
    trainer, optimizer, seen = trainer_of(tmp_path, 0, 0.02, bf16=bf16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]
    before = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert max(before) > 0.6 and max(seen.norms) < 0.5001
    factors = [min(k / 2, (STEPS - k) / (STEPS - 2)) for k in range(STEPS)]
    assert seen.rates == [pytest.approx([0.02 * factor, 0.01 * factor]) for factor in factors]

    again, resumed, late = trainer_of(tmp_path / "again", 1, 0.7, bf16=bf16)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert problem.same(problem.bits(again.model, resumed), problem.bits(trainer.model, optimizer))
    assert (
        late.rates == seen.rates[4:]
        and int(resumed.state[again.model.lm_head.weight]["step"]) == STEPS
    )


class Bad(transformers.TrainerCallback):
    """A NaN in a gradient at some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.done = steps, 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.done += 1
        if self.done in self.steps:
            model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("nan")


def test_the_trainer_warns_of_a_skip_and_its_callback_logs_counters_and_rates(
    tmp_path: Path,
) -> None:
    trainer, _, seen = trainer_of(tmp_path, 0, 0.02)
    monitor, reporter = nm.SkipMonitor(trainer), Reporter()
    trainer.args.max_grad_norm = 0.0
    trainer.add_callback(Bad({3, 4, 6}))
    trainer.add_callback(nm.trainer_callback())
    trainer.add_callback(reporter)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(w.message) for w in heard if "skipped" in str(w.message)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert [text.partition(":")[0] for text in texts] == [
        "step 3 skipped, 1 in a row", "step 4 skipped, 2 in a row", "step 6 skipped, 1 in a row"
    ]  # fmt: skip
    assert all(name in text for text in texts)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped"] for entry in history] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [entry["consecutive"] for entry in history] == [0, 0, 1, 2, 0, 1, 0, 0]
    # The schedule has gone on when the Trainer logs; what is logged is what the step used.
    logged = [[entry["lr/0"], entry["lr/1"]] for entry in history]
    assert logged == [pytest.approx(rates) for rates in seen.rates]
    assert [entry["learning_rate"] for entry in history] == [entry["lr/0"] for entry in history]
    assert [entry["adamw_lr/1"] for entry in history] == [entry["lr/1"] for entry in history]
    assert [logs["skipped"] for logs in reporter.logs if "loss" in logs] == [
        entry["skipped"] for entry in history
    ]
    assert monitor() == 0 and all(x.isfinite().all() for x in trainer.model.parameters())


def test_the_trainer_ends_after_too_many_skips_in_a_row(tmp_path: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, 0, 0.02)
    trainer.optimizer = problem.optimizer_of(trainer.model, on_skip="raise")
    trainer.args.max_grad_norm = 0.0
    trainer.add_callback(Bad({3}))
    with pytest.raises(nm.NonFiniteStepError, match="step 3 skipped"):
        trainer.train()


class Reporter(transformers.TrainerCallback):
    """As those of ``report_to``."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


# --- Accelerate


@pytest.fixture
def forgotten() -> Any:
    """Accelerate keeps its state for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(seed: int, lr: float, **options: Any) -> tuple[Any, ...]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = problem.Net(seed)
    optimizer = problem.optimizer_of(model, lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def go_on(
    accelerator: Any, model: Any, optimizer: Any, schedule: Any, batches: range
) -> list[float]:
    losses = []
    for k in batches:
        with accelerator.accumulate(model):
            loss = model(problem.batch(k))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_has_the_bits_of_the_plain_loop_and_resumes_exactly(
    tmp_path: Path, forgotten: None, accumulate: int, mixed_precision: str
) -> None:
    options = {"gradient_accumulation_steps": accumulate, "mixed_precision": mixed_precision}
    accelerator, *made = accelerated(0, 0.05, **options)
    losses = go_on(accelerator, *made, range(4 * accumulate))
    accelerator.save_state(str(tmp_path / "state"))
    losses += go_on(accelerator, *made, range(4 * accumulate, STEPS * accumulate))
    ended = problem.bits(*made[:2])
    expected, its_losses = problem.by_hand(
        STEPS,
        clip=0.5,
        accumulate=accumulate,
        autocast=torch.bfloat16 if mixed_precision == "bf16" else None,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    assert problem.same(ended, expected) and losses == its_losses and losses[-1] < 0.8 * losses[0]

    accelerator, *again = accelerated(1, 0.7, **options)
    accelerator.load_state(str(tmp_path / "state"))
    go_on(accelerator, *again, range(4 * accumulate, STEPS * accumulate))
    assert problem.same(problem.bits(*again[:2]), ended)
    assert again[1].param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**STEPS)


def test_accelerate_warns_of_a_skip_and_its_wrapper_may_be_monitored(forgotten: None) -> None:
    accelerator, model, optimizer, _ = accelerated(0, 0.05)
    assert not hasattr(optimizer, "result")
    monitor, skips = nm.SkipMonitor(optimizer), []
    for k in range(4):
        accelerator.backward(model(problem.batch(k)) * (float("nan") if k == 2 else 1.0))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            optimizer.step()
            skips.append(monitor())
        assert [str(w.message).partition(":")[0] for w in heard] == (
            ["step 3 skipped, 1 in a row"] if k == 2 else []
        )
        optimizer.zero_grad()
    assert skips == [0, 0, 1, 0]
