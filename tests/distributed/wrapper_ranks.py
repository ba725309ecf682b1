"""What every rank of `test_wrappers` runs: `NorMuon` under the wrappers of torch and of Accelerate.
gloo on CPU.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import normuon_fn as nm
from normuon_fn.compat.graphs import compile_whole
from normuon_fn.step import local_update_
from tests.distributed.optimizer_ranks import EXACT, local, model_of, off, whole
from tests.distributed.trainer_ranks import trained

STEPS, MICRO, WORLD, CLIP = 6, 2, 2, 0.05


def batch(k: int, micro: int, rank: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * k + 10 * micro + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().mean()


def optimizer_of(model: nn.Module, lr: float = 0.02, **options: Any) -> nm.NorMuon:
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    options = {"config": EXACT, **options}
    return nm.NorMuon(
        [{"params": matrices}, {"params": vectors, "algorithm": "adamw"}],
        lr=lr,
        guard="full",
        **options,
    )


def alone() -> tuple[dict[str, Tensor], list[float]]:
    """One device with the batches of all ranks."""
    model = model_of()
    optimizer = optimizer_of(model)
    losses = []
    for k in range(STEPS):
        given = [batch(k, micro, rank) for micro in range(MICRO) for rank in range(WORLD)]
        loss = torch.stack([loss_of(model, x) for x in given]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return whole(model), losses


def unwrapped(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p for name, p in whole(model).items()}


def go_on(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        for micro in range(MICRO):
            with nullcontext() if micro == MICRO - 1 else model.no_sync():
                (loss_of(model, batch(k, micro, dist.get_rank())) / MICRO).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=k % 2 == 0)  # views of the buckets stay, or are made again


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{k}.{kind}": x
        for k, kept in optimizer.state_dict()["state"].items()
        for kind, x in kept.items()
    }


def ddp(options: dict[str, Any]) -> dict[str, Any]:
    model = DistributedDataParallel(model_of(), gradient_as_bucket_view=True)
    optimizer = optimizer_of(model, **options)
    go_on(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go_on(model, optimizer, range(3, STEPS))
    views = all(p.grad is not None and p.grad._is_view() for p in model.parameters())
    again = DistributedDataParallel(model_of(1), gradient_as_bucket_view=True)
    resumed = optimizer_of(again, 0.5, **options)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go_on(again, resumed, range(3, STEPS))
    first = {name: p.clone() for name, p in whole(model).items()}
    for p in first.values():
        dist.broadcast(p, 0)
    expected, losses = alone()
    return {
        "views": views, "learned": losses[-1] / losses[0], "off": off(unwrapped(model), expected),
        "resumed": max(off(whole(again), whole(model)), off(states(resumed), states(optimizer))),
        "from the first rank": off(whole(model), first),
    }  # fmt: skip


def accelerated(folder: str) -> dict[str, Any]:
    """The same through Accelerate, which wraps the model and the optimizer."""
    from accelerate import Accelerator

    def made(seed: int, lr: float) -> tuple[Accelerator, Any, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        model = model_of(seed)
        return accelerator, *accelerator.prepare(model, optimizer_of(model, lr))

    def run(accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> None:
        for k in steps:
            for micro in range(MICRO):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, batch(k, micro, dist.get_rank())))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()

    first = made(0, 0.02)
    run(*first, range(3))
    first[0].save_state(f"{folder}/accelerate")
    run(*first, range(3, STEPS))
    again = made(1, 0.5)
    again[0].load_state(f"{folder}/accelerate")
    run(*again, range(3, STEPS))
    return {
        "wrapped": isinstance(first[1], DistributedDataParallel),
        "off": off(unwrapped(first[1]), alone()[0]),
        "resumed": max(
            off(whole(again[1]), whole(first[1])), off(states(again[2]), states(first[2]))
        ),
    }


def sharded(seed: int, policy: MixedPrecisionPolicy) -> nn.Module:
    model = model_of(seed)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    return model


def mixed() -> dict[str, Any]:
    """FSDP2 that computes in bfloat16 and keeps float32, with the same batch on every rank."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def run(model: nn.Module, optimizer: nm.NorMuon, steps: range) -> None:
        for k in steps:
            (model(batch(k, 0, 0)).float() - batch(k, 0, 0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = sharded(0, policy)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(3))
    again = sharded(1, policy)
    resumed = optimizer_of(again, 0.5)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    dcp.set_optimizer_state_dict(
        again, resumed, copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    )
    run(model, optimizer, range(3, STEPS))
    run(again, resumed, range(3, STEPS))

    single = model_of()
    own = optimizer_of(single)
    for k in range(STEPS):
        low = {
            name: p.detach().bfloat16().requires_grad_() for name, p in single.named_parameters()
        }
        out = torch.func.functional_call(single, low, (batch(k, 0, 0).bfloat16(),))
        (out.float() - batch(k, 0, 0)).square().mean().backward()
        for name, p in single.named_parameters():
            grad = low[name].grad
            p.grad = None if grad is None else grad.float()
        own.step()
    dtypes = {str(local(p).dtype) for p in model.parameters()}
    return {
        "dtypes": sorted(dtypes),
        "off": off(whole(model), whole(single)),
        "resumed": off(whole(again), whole(model)),
    }


def masters() -> dict[str, Any]:
    """bfloat16 shards with float32 behind them.

    The models are loaded after their optimizers were made.
    """
    seen = {}
    for master in ("mantissa", "fp32"):
        config = nm.Config(master=master, orthogonalize_dtype=torch.float32)  # type: ignore[arg-type]

        def run(model: nn.Module, optimizer: nm.NorMuon, steps: range) -> None:
            for k in steps:
                loss_of(model, batch(k, 0, 0).bfloat16()).backward()
                optimizer.step()
                optimizer.zero_grad()

        def made(seed: int, lr: float, config: nm.Config = config) -> tuple[nn.Module, nm.NorMuon]:
            model = model_of(seed).bfloat16()
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            return model, optimizer_of(model, lr, config=config)

        model, optimizer = made(1, 0.01)
        model.load_state_dict(made(0, 0.01)[0].state_dict())
        run(model, optimizer, range(3))
        again, resumed = made(2, 0.5)
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        dcp.set_optimizer_state_dict(
            again, resumed, copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
        )
        run(model, optimizer, range(3, STEPS))
        run(again, resumed, range(3, STEPS))

        single = model_of().bfloat16()
        run(single, optimizer_of(single, 0.01, config=config), range(STEPS))
        seen[master] = {
            "off": off(whole(model), whole(single)),
            "resumed": off(whole(again), whole(model)),
        }
        seen[master]["moved"] = off(whole(model), whole(model_of().bfloat16()))
    return seen


def switched() -> dict[str, Any]:
    """The optimizer is there before the parameters are sharded, and gets them put in: so Accelerate
    prepares FSDP2.
    """
    model, other = model_of(), sharded(0, MixedPrecisionPolicy())
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(optimizer.state_dict())
    new = dict(other.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    before = {
        name: sorted(kept)
        for name, kept in dcp.get_optimizer_state_dict(other, optimizer)["state"].items()
    }
    plain = optimizer_of(model)
    for k in range(STEPS):
        for net, own in ((other, optimizer), (model, plain)):
            loss_of(net, batch(k, 0, 0)).backward()
            own.step()
            own.zero_grad()
    return {"keys": before, "off": off(whole(other), whole(model))}


def main(folder: Path, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    asked = {
        "WORLD_SIZE": world,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }
    os.environ |= {
        key: str(value) for key, value in asked.items()
    }  # by Accelerate, which takes the group that is there
    mesh = init_device_mesh("cpu", (world,))
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "ddp": lambda: ddp({}),
        "ddp, work shared": lambda: ddp({"mesh": mesh}),
        "fsdp2, mixed": mixed,
        "fsdp2, switched": switched,
        "fsdp2, masters": masters,
    }
    try:
        import accelerate  # noqa: F401
    except ImportError:
        pass
    else:
        cases["accelerate"] = lambda: accelerated(str(folder))
    if resumes_on_cpu_ranks():
        cases["trainer"] = lambda: trained(folder)
    return {name: case() for name, case in cases.items()}


def resumes_on_cpu_ranks() -> bool:
    """Whether the Trainer does: before 5.18, transformers has torch load to "cpu:0"."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, found.split(".")[:2])) >= (5, 18)


def compiled(rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """One matrix in a graph, and the same operation by operation.

    test_layouts takes two ranks through Inductor.
    """
    config = nm.Config(steps=1, method="standard", orthogonalize_dtype=torch.float32)
    results, skipped = [], []
    module = __import__("normuon_fn.optim.normuon", fromlist=["step_"])
    runtime = __import__("normuon_fn.runtime.outside", fromlist=["compile_whole"])
    runtime.compile_whole = functools.partial(compile_whole, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(6, 7, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, guard="full", config=config)
        for k in range(3):
            model(batch(k, 0, 0)).square().mean().backward()
            if k == 1 and rank == world - 1:
                assert model.weight.grad is not None
                local(model.weight.grad).view(-1)[0] = float("nan")
            with nullcontext() if k == 0 else torch._dynamo.config.patch(error_on_recompile=True):
                optimizer.step()
            optimizer.zero_grad()
            assert optimizer.result is not None
            skipped.append(bool(optimizer.result.skipped))
        results.append(whole(model))
        module.step_ = local_update_
    torch.manual_seed(0)
    start = whole(nn.Linear(6, 7, bias=False))
    return {"off": off(*results), "moved": off(results[0], start), "skipped": skipped}
