"""What every rank of `test_wrappers` runs of the Trainer, which wraps its model in DDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import normuon_fn as nm
from tests.distributed.optimizer_ranks import off

STEPS = 4


def trained(folder: Path) -> dict[str, Any]:
    """A run, the same one resumed in another folder, and one with a fault on a single rank."""
    import transformers

    class Fault(transformers.TrainerCallback):
        """A NaN on one rank alone, at the second step."""

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step == 1 and dist.get_rank() == 1:
                model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("nan")

    def llama(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=16, num_attention_heads=2, num_key_value_heads=1, **sizes
            )
        )

    def trainer_of(name: str, seed: int, written: Any = None, **options: Any) -> Any:
        arguments = transformers.TrainingArguments(
            str(folder / name), max_steps=STEPS, save_steps=2, per_device_train_batch_size=4,
            logging_steps=1, learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.0,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )  # fmt: skip
        return transformers.Trainer(
            llama(seed), arguments, train_dataset=data,
            optimizer_cls_and_kwargs=nm.for_trainer(
                args=arguments, guard="full", **(written or {})
            ), **options,
        )  # fmt: skip

    def losses(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    rows = (torch.arange(8 * STEPS)[:, None] + 3 * torch.arange(8)) % 16
    data = [{"input_ids": row, "labels": row} for row in rows]
    whole = trainer_of("whole", 0)
    whole.train()
    again = trainer_of("again", 1)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    # As torch.distributed.group.WORLD is before the process group.
    faulty = trainer_of("faulty", 0, {"mesh": None}, callbacks=[Fault()])
    faulty.train()
    inner = faulty.optimizer.optimizer
    mine = {name: p.detach() for name, p in faulty.model.named_parameters()}
    first = copy.deepcopy(mine)
    for p in first.values():
        dist.broadcast(p, 0)
    return {
        "wrapped": type(whole.model_wrapped).__name__,
        "learned": losses(whole)[-1] / losses(whole)[0],
        "resumed": losses(again) == losses(whole),
        "skipped": int(inner.state[faulty.model.lm_head.weight]["skipped"]),
        "from the first rank": off(mine, first),
    }
