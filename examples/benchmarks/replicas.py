"""What replicas and the order of buckets cost on several GPUs: interleaved in one process a rank.

    torchrun --standalone --nproc-per-node 4 examples/benchmarks/replicas.py
    # tiny, on the CPU
    torchrun --standalone --nproc-per-node 2 examples/benchmarks/replicas.py --width 64 \\
        --layers 2 --calls 3

    ddp         every rank keeps the state of all matrices
    ddp share   Config(replicas="share"): its owner alone
    fsdp2       [Shard(0)], the order and the cut of buckets that the plan chose
    fsdp2 1:1   the same with the buckets in the order of the parameters, and none cut
    hsdp        [Replicate, Shard(0)], two replicas, with 4 or more ranks

The median of the slowest rank, ms a step; and the bytes of state on rank 0. Every row compiles its
step: choose a few with --rows and --guards where minutes count.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import normuon_fn as nm

Step = Callable[[], object]


def shapes_of(width: int, layers: int) -> dict[str, tuple[int, int]]:
    """Of a GPT: four square matrices a layer, one tall and one wide."""
    found: dict[str, tuple[int, int]] = {}
    for k in range(layers):
        found |= {f"{k}.{name}": (width, width) for name in "qkvo"}
        found |= {f"{k}.up": (4 * width, width), f"{k}.down": (width, 4 * width)}
    return found


def step_of(kind: str, guard: str, args: argparse.Namespace, device: torch.device) -> tuple:
    """``(step, bytes of state, buckets)`` of one row."""
    world, config = dist.get_world_size(), nm.Config(guard=guard)  # type: ignore[arg-type]
    mesh, placements = None, [Shard(0)]
    if kind.startswith("fsdp2"):
        mesh = init_device_mesh(device.type, (world,))
    elif kind == "hsdp":
        mesh = init_device_mesh(device.type, (2, world // 2), mesh_dim_names=("outer", "inner"))
        placements = [Replicate(), Shard(0)]
    if kind == "ddp share":
        config = nm.Config(guard=guard, replicas="share")  # type: ignore[arg-type]

    def made(scale: float) -> dict[str, Tensor]:
        torch.manual_seed(0)  # replicas have the same
        found: dict[str, Tensor] = {}
        for name, shape in shapes_of(args.width, args.layers).items():
            whole = torch.randn(shape, device=device) * scale
            found[name] = (
                whole
                if mesh is None
                else distribute_tensor(whole, mesh, placements, src_data_rank=None)
            )
        return found

    params, grads = made(0.02), made(1e-3)
    planning = import_module("normuon_fn.planning.make_plan")
    as_given = mock.patch.multiple(
        planning, in_order=lambda x: tuple(x), with_cut=lambda stacks, *_: [*stacks.items()]
    )
    routes = {"*": nm.Route("normuon")}
    ranks = dist.group.WORLD if kind.startswith("ddp") else None
    if kind == "fsdp2 1:1":
        with as_given:
            plan = nm.make_plan(params, config, routes=routes, mesh=ranks)
    else:
        plan = nm.make_plan(params, config, routes=routes, mesh=ranks)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=1e-3)
    local = [x.to_local() if isinstance(x, DTensor) else x for x in state.values()]
    size = sum(x.numel() * x.element_size() for x in local)
    return (lambda: nm.step_(params, grads, state, hyper, plan)), size, len(plan.buckets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--calls", type=int, default=20, help="of every row, by turns")
    parser.add_argument("--rows", default="ddp,ddp share,fsdp2,fsdp2 1:1,hsdp")
    parser.add_argument("--guards", default="off")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    kinds = [row for row in args.rows.split(",") if row != "hsdp" or dist.get_world_size() >= 4]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {device.type}, torch {torch.__version__}", flush=True)
    for guard in args.guards.split(","):
        rows = {kind: step_of(kind, guard, args, device) for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for call in range(-3, args.calls):
            for kind, (step, _, _) in rows.items():
                dist.barrier()
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                ms = torch.tensor(1e3 * (time.perf_counter() - start), device=device)
                dist.all_reduce(ms, dist.ReduceOp.MAX)
                if call >= 0:
                    times[kind].append(float(ms))
        for kind, (_, size, buckets) in rows.items():
            if dist.get_rank() == 0:
                ms = statistics.median(times[kind])
                least = min(times[kind])
                print(
                    f"guard {guard:5} {kind:10} {ms:9.3f} ms (least {least:9.3f}), "
                    f"{buckets} buckets, {size / 2**20:9.1f} MiB of state on rank 0",
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
