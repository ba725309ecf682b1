"""`NorMuon` in Lightning: precisions, manual steps and clipping have the bits of the plain loop."""

from __future__ import annotations

import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from tests.optim.frameworks import problem

lightning = pytest.importorskip("lightning", minversion="2.5")
precisions = pytest.importorskip("lightning.pytorch.plugins.precision")

STEPS, SCALE = 8, 2.0**10
schedule_of = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch"
    ),
]


@pytest.fixture(autouse=True)
def eager() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


class Module(lightning.LightningModule):
    def __init__(
        self, seed: int, lr: float, manual: bool, clip: float | None, **options: Any
    ) -> None:
        super().__init__()
        self.net = problem.Net(seed)
        self.automatic_optimization = not manual
        self.lr, self.clip, self.options = lr, clip, options
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def training_step(self, number: Tensor, _: int) -> Tensor | None:
        loss = self.net(problem.batch(self.global_step))
        self.losses.append(float(loss.detach()))
        if self.automatic_optimization:
            return loss
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip is not None:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm"
            )
        optimizer.step()
        schedule.step()
        return None

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 4:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir, "four.ckpt"))

    def configure_optimizers(self) -> Any:
        self.own = problem.optimizer_of(self.net, self.lr, **self.options)
        self.own.register_step_post_hook(
            lambda own, *_: self.rates.append(own._planner.hyper.hyper.lr.tolist())
        )
        return {
            "optimizer": self.own,
            "lr_scheduler": {"scheduler": schedule_of(self.own), "interval": "step"},
        }


PRECISIONS: dict[str, dict[str, Any]] = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {},  # on the CPU only by a plugin that has a GradScaler
}


def fitted(
    folder: Path,
    precision: str,
    manual: bool,
    clip: float | None,
    seed: int = 0,
    lr: float = 0.05,
    **fit: Any,
) -> Module:
    options = PRECISIONS[precision]
    if not options:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        options = {"plugins": precisions.MixedPrecision("16-mixed", "cpu", scaler)}
    config = nm.Config(master="mantissa") if precision == "bf16-true" else None
    module = Module(seed, lr, manual, clip, config=config)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        gradient_clip_val=None if manual else clip,
        enable_checkpointing=False,
        default_root_dir=str(folder),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None), **fit)
    return module


CASES = [
    pytest.param(
        precision, manual, clip, id=f"{precision}-{'manual' if manual else 'automatic'}-{clip}"
    )
    for precision in PRECISIONS
    for manual in (False, True)
    for clip in (None, 0.5)
    if not (
        precision == "16-mixed" and manual and clip
    )  # Lightning clips before it unscales there, whatever the optimizer
]


@pytest.mark.parametrize(("precision", "manual", "clip"), CASES)
def test_lightning_has_the_bits_of_the_plain_loop_and_resumes_exactly(
    tmp_path: Path, precision: str, manual: bool, clip: float | None
) -> None:
    whole = fitted(tmp_path, precision, manual, clip)
    ended = problem.bits(whole.net, whole.own)
    how: dict[str, Any] = {
        "bf16-mixed": {"autocast": torch.bfloat16},
        "16-mixed": {"autocast": torch.float16, "scale": SCALE},
        "bf16-true": {"parameters": torch.bfloat16, "config": nm.Config(master="mantissa")},
    }.get(precision, {})
    expected, losses = problem.by_hand(
        STEPS, clip=clip, scheduler=schedule_of, in_groups=True, backward_inside=manual, **how
    )
    assert whole.losses == losses and losses[-1] < 0.8 * losses[0]
    assert problem.same(ended, expected)
    assert whole.rates == [pytest.approx([0.05 * 0.9**k, 0.025 * 0.9**k]) for k in range(STEPS)]

    resumed = fitted(
        tmp_path / "again", precision, manual, clip, 1, 0.7, ckpt_path=str(tmp_path / "four.ckpt")
    )
    assert (
        len(resumed.losses) == STEPS - 4
        and resumed.losses == whole.losses[4:]
        and resumed.rates == whole.rates[4:]
    )
    assert problem.same(problem.bits(resumed.net, resumed.own), ended)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric_has_the_bits_of_the_plain_loop_and_resumes_exactly(
    tmp_path: Path, precision: str
) -> None:
    """The same loop in one's own hands."""

    def made(seed: int, lr: float) -> tuple[Any, Any, Any]:
        how: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
            how = {"plugins": lightning.fabric.plugins.MixedPrecision("16-mixed", "cpu", scaler)}
        fabric = lightning.Fabric(accelerator="cpu", devices=1, **how)
        model = problem.Net(seed)
        return fabric, *fabric.setup(model, problem.optimizer_of(model, lr))

    def run(fabric: Any, model: Any, optimizer: Any, steps: range) -> None:
        for k in steps:
            fabric.backward(model(problem.batch(k)))
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()

    first, again = made(0, 0.05), made(1, 0.7)
    run(*first, range(4))
    first[0].save(tmp_path / "four", {"model": first[1], "optimizer": first[2]})
    again[0].load(tmp_path / "four", {"model": again[1], "optimizer": again[2]})
    run(*first, range(4, STEPS))
    run(*again, range(4, STEPS))
    how: dict[str, Any] = {"32-true": {}, "bf16-mixed": {"autocast": torch.bfloat16}}.get(
        precision, {"autocast": torch.float16, "scale": SCALE}
    )
    expected, _ = problem.by_hand(STEPS, clip=0.5, in_groups=True, **how)
    assert problem.same(problem.bits(first[1].module, first[2].optimizer), expected)
    assert problem.same(problem.bits(again[1].module, again[2].optimizer), expected)


class Poisoned(Module):
    """A NaN in a gradient at some steps."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step in (2, 3, 5):
            self.net.up.weight.grad[0, 0] = float("nan")  # type: ignore[index]


class Logger(lightning.pytorch.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append((step, dict(metrics)))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_warns_of_a_skip_and_its_callback_logs_counters_and_rates(
    tmp_path: Path, manual: bool
) -> None:
    module, logger, every = Poisoned(0, 0.05, manual, None), Logger(), 2
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, enable_checkpointing=False, logger=logger,
        default_root_dir=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=every, callbacks=[nm.lightning_callback(prefix="normuon/")],
    )  # fmt: skip
    module.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None))
    texts = [str(w.message) for w in heard if "skipped" in str(w.message)]
    assert [text.partition(" (")[0] for text in texts] == [
        "step 3 skipped, 1 in a row: up.weight",
        "step 4 skipped, 2 in a row: up.weight",
        "step 6 skipped, 1 in a row: up.weight",
    ]
    rows = [(step, row) for step, row in logger.rows if "normuon/skipped" in row]
    assert [step for step, _ in rows] == [2, 4, 6, 8]
    assert [row["normuon/skipped"] for _, row in rows] == [0, 2, 3, 3]
    assert [row["normuon/consecutive"] for _, row in rows] == [0, 2, 1, 0]
    assert [row["normuon/lr/0"] for _, row in rows] == [
        pytest.approx(0.05 * 0.9 ** (step - 1)) for step, _ in rows
    ]
    assert [row["normuon/adamw_lr/1"] for _, row in rows] == [
        pytest.approx(0.025 * 0.9 ** (step - 1)) for step, _ in rows
    ]


def test_the_wrappers_of_lightning_may_be_monitored_and_its_callback_pickled() -> None:
    model = problem.Net()
    wrapper = lightning.pytorch.core.optimizer.LightningOptimizer(problem.optimizer_of(model))
    monitors = [nm.SkipMonitor(wrapper, on_skip=None)]
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    own, optimizer = fabric.setup(model, wrapper.optimizer)
    monitors.append(nm.SkipMonitor(optimizer, on_skip=None))
    fabric.backward(own(problem.batch(0)) * float("nan"))
    with pytest.warns(RuntimeWarning, match="step 1 skipped"):
        optimizer.step()
    assert [monitor() for monitor in monitors] == [1, 1]
    callback = pickle.loads(pickle.dumps(nm.lightning_callback(prefix="x/")))
    assert callback.prefix == "x/" and isinstance(callback, lightning.pytorch.Callback)
