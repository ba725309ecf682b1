"""The GPT of train_gpt.py under FSDP2.

Parameters, gradients and optimizer state are sharded DTensors; each rank steps its shards.

    # GPUs over NCCL, or CPUs over gloo
    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py
    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --checkpoint run \\
        --save-every 50
    # resumes on any number of ranks
    torchrun --standalone --nproc-per-node 4 examples/train_fsdp2.py --resume run/step-50

A checkpoint says where every shard belongs: whoever resumes reads its own part of it, and goes on
with the same losses.
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from train_ddp import main
from train_gpt import BATCH, GPT, WIDTH, Text

import normuon_fn as nm


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        raise ValueError(
            f"expected a number of ranks that divides the batch of {BATCH}, got {world}"
        )
    text = Text(args.data)
    torch.manual_seed(args.seed)  # every rank makes the same model, and keeps its part
    model = GPT(len(text.characters), tie=False, layers=args.layers).to(device)
    mesh = init_device_mesh(device.type, (world,))
    precision = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if device.type == "cuda"
        else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)

    params = {
        name: p.detach() for name, p in model.named_parameters()
    }  # DTensors: the model's own memory
    routes = {
        "*norm*": nm.Route("adamw", wd_mul=0.0),
        "*.qkv.weight": nm.Route(splits=(WIDTH, WIDTH, WIDTH)),
    }
    plan = nm.make_plan(params, nm.Config(guard="full"), routes=routes)
    state = nm.init(plan, params)
    hyper = nm.Hyper.of(params, lr=args.lr, weight_decay=0.1)
    warmup = max(1, args.steps // 10)
    shape = [
        min((i + 1) / warmup, (args.steps - i) / (args.steps - warmup + 1))
        for i in range(args.steps)
    ]
    schedule = torch.tensor(shape, device=device)
    saved = {"params": params, "state": state, "step": 0}
    if args.resume:
        dcp.load(saved, checkpoint_id=args.resume)  # into the tensors of params and state
    if rank == 0:
        print(
            plan
            if args.show_plan
            else f"{world} ranks on {device.type}, from step {saved['step']}",
            flush=True,
        )

    for step in range(saved["step"] + 1, args.steps + 1):
        batch = text.batch(
            torch.Generator().manual_seed(args.seed + step)
        )  # of all ranks: a resumed run draws the same
        tokens = batch.chunk(world)[rank].to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
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
            dcp.save({**saved, "step": step}, checkpoint_id=args.checkpoint / f"step-{step}")


if __name__ == "__main__":
    main(train, __doc__)
