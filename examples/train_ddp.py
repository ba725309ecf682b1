"""The GPT of train_gpt.py under DistributedDataParallel.

All ranks have all parameters, and each orthogonalizes its share of them.

    # GPUs over NCCL, or CPUs over gloo
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --checkpoint run --save-every 50
    # resumes on any number of ranks
    torchrun --standalone --nproc-per-node 4 examples/train_ddp.py --resume run/step-50.pt

DDP averages the gradients; the step gathers the updates. All ranks end up with the same bits: rank
0 saves its own.
"""

import argparse
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel
from train_gpt import BATCH, GPT, LAYERS, WIDTH, Text

import normuon_fn as nm


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        raise ValueError(
            f"expected a number of ranks that divides the batch of {BATCH}, got {world}"
        )
    text = Text(args.data)
    torch.manual_seed(args.seed)
    model = GPT(len(text.characters), tie=False, layers=args.layers).to(device)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)

    params = {name: p.detach() for name, p in model.named_parameters()}  # the model's own memory
    routes = {
        "*norm*": nm.Route("adamw", wd_mul=0.0),
        "*.qkv.weight": nm.Route(splits=(WIDTH, WIDTH, WIDTH)),
    }
    plan = nm.make_plan(
        params, nm.Config(guard="full"), routes=routes, mesh=init_device_mesh(device.type, (world,))
    )
    state = nm.init(plan, params)
    hyper = nm.Hyper.of(params, lr=args.lr, weight_decay=0.1)
    warmup = max(1, args.steps // 10)
    shape = [
        min((i + 1) / warmup, (args.steps - i) / (args.steps - warmup + 1))
        for i in range(args.steps)
    ]
    schedule = torch.tensor(shape, device=device)
    done = load(args.resume, params, state) if args.resume else 0
    if rank == 0:
        print(
            plan if args.show_plan else f"{world} ranks on {device.type}, from step {done}",
            flush=True,
        )

    for step in range(done + 1, args.steps + 1):
        batch = text.batch(
            torch.Generator().manual_seed(args.seed + step)
        )  # of all ranks: a resumed run draws the same
        tokens = batch.chunk(world)[rank].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = parallel(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if step == args.nan_at and rank == world - 1:
            loss = loss * float("nan")
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        now = hyper.scaled(schedule[step - 1])  # tensors: never a recompile
        result = nm.step_(params, grads, state, now, plan)
        model.zero_grad()

        mean = loss.detach() / world
        dist.all_reduce(mean)
        skipped = nm.check(
            result, plan, max_consecutive=20
        )  # waits for the device; nm.SkipMonitor does not
        if rank == 0:
            print(f"step {step} loss {mean.item():.7f}{' skipped' if skipped else ''}", flush=True)
            if args.checkpoint and (
                step == args.steps or (args.save_every and step % args.save_every == 0)
            ):
                save(
                    args.checkpoint / f"step-{step}.pt",
                    {"params": params, "state": state, "step": step},
                )


def save(path: Path, saved: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(saved, partial)
    os.replace(partial, path)  # whoever reads sees all of it or nothing


def load(path: Path, params: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> int:
    """The step that was saved; its tensors go into ``params`` and ``state``."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in params.items():
        tensor.copy_(saved["params"][name])
    for name, tensor in state.items():
        tensor.copy_(saved["state"][name])
    return saved["step"]


def main(train: Callable[[argparse.Namespace, torch.device], None], about: str | None) -> None:
    """Options, and a process group around ``train``: of train_fsdp2.py too."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the model")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of the checkpoints; one is written at the end"
    )
    parser.add_argument("--save-every", type=int, help="and one every so many steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint in that folder, to go on from")
    parser.add_argument(
        "--nan-at", type=int, help="make the last rank's loss NaN at this step: all ranks skip it"
    )
    parser.add_argument(
        "--show-plan", action="store_true", help="print what each parameter gets and why"
    )
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        train(args, device)
    finally:
        leave()


def leave() -> None:
    """Ends the process group and the threads of its backend.

    ``destroy_process_group`` alone does not end gloo's threads after FSDP2: DTensor's caches keep
    the mesh, and the mesh keeps the group. A thread that frees the tensor of its last collective
    while the interpreter shuts down then aborts the process, now and then, with "terminate called
    without an active exception" (pytorch#190489). Without the caches, which differ from version to
    version, the group is freed here, which waits for its threads. On torch 2.11 something else
    keeps the mesh too: there, ending by ``os._exit`` is the safe way.
    """
    dist.destroy_process_group()
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper and "torch.distributed" in cache.__module__:
            cache.cache_clear()
    gc.collect()  # modules under FSDP2 are cycles, and have the mesh too


if __name__ == "__main__":
    main(train, __doc__)
