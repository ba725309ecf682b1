"""What moving the state to the host and back costs, beside a plain pinned copy of as many bytes.

python examples/benchmarks/offload.py                             # the matrices of a 1.3B model
python examples/benchmarks/offload.py --momentum-dtype bfloat16
python examples/benchmarks/offload.py --device cpu --workload tiny  # tries the script
python examples/benchmarks/offload.py --streamed                  # Config(state_device="cpu")

copy       one pinned tensor, there and back: what the link gives
first      the first `offload_`, which pins host memory
offload_   waits, copies, frees; `reload_` queues the copies, and is waited for here
freed      memory of the device that went back to it, by the driver's own count
steps      after `reload_`: the same bits as steps of a run that stayed, none compiled again

With ``--streamed`` the momentums stay in host memory and pass through the device at every step:

one way    a plain pinned copy of as many bytes, to the host and then to the device
both ways  the same at once, on two streams: no streamed step can be faster
step       with the momentums on the device, streamed, and streamed in a captured graph
ratio      of the streamed step to the longer of step and copy both ways (bar: 1.3)
peak       of memory on the device during a step, above what is there without the state
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import normuon_fn as nm

WORKLOADS = {
    "1.3b": [(96, 2048, 2048), (24, 8192, 2048), (24, 2048, 8192)],
    "gpt2": [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)],
    "tiny": [(4, 64, 64), (2, 128, 64)],
}
ROUNDS = 5


def seconds_sync(work: Callable[[], object], device: torch.device) -> float:
    _wait_sync(device)
    start = time.perf_counter()
    work()
    _wait_sync(device)
    return time.perf_counter() - start


def _wait_sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_sync(device: torch.device) -> float:
    """GiB of the device that are in use, by whomever."""
    if device.type != "cuda":
        return 0.0
    _wait_sync(device)
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def copies_sync(size: int, device: torch.device) -> tuple[float, float]:
    """The best bandwidth of a plain pinned copy, GB/s: to the host, and to the device."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pairs = ((here, there), (there, here))
    rates = []
    for into, source in pairs:
        each = [seconds_sync(lambda a=into, b=source: a.copy_(b), device) for _ in range(ROUNDS)]
        rates.append(size / min(each) / 1e9)
    return rates[0], rates[1]


def both_ways_sync(size: int, device: torch.device) -> float:
    """The best time of two plain pinned copies of so many bytes, one each way, at once."""
    cuda = device.type == "cuda"
    pairs = [
        (
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.empty(size, dtype=torch.uint8, pin_memory=cuda),
        )
        for _ in range(2)
    ]
    streams = [torch.cuda.Stream(device) for _ in pairs] if cuda else [None, None]

    def copy() -> None:
        for (there, here), stream, back in zip(pairs, streams, (False, True), strict=True):
            with torch.cuda.stream(stream):
                if back:
                    here.copy_(there, non_blocking=True)
                else:
                    there.copy_(here, non_blocking=True)

    return min(seconds_sync(copy, device) for _ in range(ROUNDS))


def captured_sync(
    plan: nm.Plan,
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    state: dict[str, Tensor],
    hyper: nm.Hyper,
    device: torch.device,
) -> float:
    """The best time of a replay, of copies of these tensors."""
    own = {name: x.clone() for name, x in params.items()}
    kept = {key: x.clone() if x.is_cuda else x.clone().pin_memory() for key, x in state.items()}
    with nm.GraphedStep(plan) as graphed:
        run = [
            seconds_sync(lambda: graphed(own, grads, kept, hyper), device)
            for _ in range(2 + ROUNDS)
        ]
    return min(run[2:])


def streamed_sync(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    device: torch.device,
    momentum_dtype: torch.dtype,
    guard: str,
) -> None:
    """Prints what momentums in host memory cost, and what memory they free."""
    routes, cuda = {"*": nm.Route("normuon")}, device.type == "cuda"
    plans = {
        where: nm.make_plan(
            params,
            nm.Config(guard=guard, momentum_dtype=momentum_dtype, state_device=where),  # type: ignore[arg-type]
            routes=routes,
        )
        for where in (None, "cpu")
    }
    print(plans["cpu"].notes[-1])
    hyper, found, times, peaks = nm.Hyper.of(params, lr=0.02), [], {}, {}
    without = torch.cuda.memory_allocated(device) if cuda else 0
    for where, plan in plans.items():
        own = {name: x.clone() for name, x in params.items()}
        copies = sum(x.nbytes for x in own.values()) if cuda else 0
        state = nm.init(own, plan)
        for _ in range(2):  # compiles; the second has all tables on the device
            nm.step_(own, grads, state, hyper, plan)
        _wait_sync(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        each = [
            seconds_sync(lambda a=own, s=state, p=plan: nm.step_(a, grads, s, hyper, p), device)
            for _ in range(ROUNDS)
        ]
        times[where] = min(each)
        if cuda:
            peaks[where] = torch.cuda.max_memory_allocated(device) - without - copies
        if cuda and where == "cpu":
            times["captured"] = captured_sync(plan, own, grads, state, hyper, device)
        if where == "cpu":
            size = sum(x.nbytes for key, x in state.items() if plan.state[key].host)
        found.append({name: x.cpu() for name, x in own.items()})
        del own, state
    part = min(size, 2**32)
    host, back = copies_sync(part, device)
    apart = size / host / 1e9 + size / back / 1e9
    link = both_ways_sync(part, device) * size / part
    print(f"momentums {size / 2**30:8.2f} GiB")
    print(f"one way   {apart * 1e3:8.1f} ms   to host {host:.1f} GB/s, to device {back:.1f} GB/s")
    print(f"both ways {link * 1e3:8.1f} ms   {size / link / 1e9:.1f} GB/s each way")
    plain, bar = times[None], max(times[None], link)
    print(f"step      {plain * 1e3:8.1f} ms on the device")
    for name in [name for name in ("cpu", "captured") if name in times]:
        what = "streamed" if name == "cpu" else "streamed, captured"
        ratios = f"ratio {times[name] / bar:.2f}, to one way {times[name] / max(plain, apart):.2f}"
        print(f"step      {times[name] * 1e3:8.1f} ms {what}   {ratios}")
    if cuda:
        on, off = peaks[None] / 2**30, peaks["cpu"] / 2**30
        print(f"peak      {on:8.2f} GiB, streamed {off:.2f} GiB: {on - off:.2f} GiB less")
    alike = all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    print(f"same bits after {2 + ROUNDS} steps: {alike}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", choices=WORKLOADS, default="1.3b")
    parser.add_argument("--momentum-dtype", default="float32", help="float32, bfloat16 or int8")
    parser.add_argument("--streamed", action="store_true", help="Config(state_device='cpu')")
    parser.add_argument("--guard", default="full", help="off, output or full")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.workload}, momentum {args.momentum_dtype}")

    shapes = [s for count, *s in WORKLOADS[args.workload] for _ in range(count)]
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    how: dict[str, object] = {"device": device, "dtype": dtype, "generator": generator}
    params = {f"p{k}": torch.randn(s, **how).mul_(0.02) for k, s in enumerate(shapes)}  # type: ignore[call-overload]
    grads = {name: torch.randn(p.shape, **how) for name, p in params.items()}  # type: ignore[call-overload]
    if args.streamed:
        streamed_sync(params, grads, device, getattr(torch, args.momentum_dtype), args.guard)
        return
    config = nm.Config(guard=args.guard, momentum_dtype=getattr(torch, args.momentum_dtype))
    plan = nm.make_plan(params, config, routes={"*": nm.Route("normuon")})
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    nm.step_(params, grads, state, hyper, plan)
    size = sum(x.nbytes for x in state.values())
    print(f"state: {size / 2**30:.2f} GiB in {len(state)} tensors")

    host, back = copies_sync(min(size, 2**32), device)
    print(f"copy      to host {host:6.1f} GB/s   to device {back:6.1f} GB/s")
    before = used_sync(device)
    first = seconds_sync(lambda: nm.offload_(state), device)
    print(f"first     {first * 1e3:8.1f} ms   freed {before - used_sync(device):.2f} GiB")
    nm.reload_(state, plan)
    times: dict[str, list[float]] = {"offload_": [], "reload_": []}
    for _ in range(ROUNDS):
        times["offload_"].append(seconds_sync(lambda: nm.offload_(state), device))
        times["reload_"].append(seconds_sync(lambda: nm.reload_(state, plan), device))
    for (what, each), rate in zip(times.items(), (host, back), strict=True):
        best = size / min(each) / 1e9
        print(f"{what:9} {min(each) * 1e3:8.1f} ms   {best:6.1f} GB/s   {best / rate:.0%} of copy")
    both = sum(map(min, times.values()))
    link = size / host / 1e9 + size / back / 1e9
    print(f"both      {both * 1e3:8.1f} ms   {link / both:.0%} of the link (bar: 70%)")

    stayed: tuple[dict[str, Tensor], ...] = tuple(
        {k: x.clone() for k, x in one.items()} for one in (params, state)
    )
    slow = seconds_sync(lambda: nm.step_(stayed[0], grads, stayed[1], hyper, plan), device)
    nm.reload_(nm.offload_(state), plan)
    step = seconds_sync(lambda: nm.step_(params, grads, state, hyper, plan), device)
    alike = all(torch.equal(x, stayed[0][name]) for name, x in params.items())
    print(f"steps     {step * 1e3:8.1f} ms (stayed: {slow * 1e3:.1f} ms)   same bits: {alike}")


if __name__ == "__main__":
    main()
