"""`NorMuon` in transformers' Trainer and in Accelerate: they train, clip and schedule, and go on
exactly from a checkpoint.
"""

from __future__ import annotations

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
        self.rates.append(self.optimizer._hyper.hyper.lr.tolist())


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
