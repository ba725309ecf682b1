"""Every kernel once or more, on small and ragged shapes: what to run under compute-sanitizer.

    compute-sanitizer --target-processes application-only --kernel-name kns=_kernel \\
        python examples/benchmarks/every_kernel.py

Run it once without the sanitizer first: then nothing is left for Triton to compile. Steps run
operation by operation, so that only kernels of this package and of the library run. The last line
names the kernels that were launched, and those of the package that were not.
"""

import argparse
import importlib
import itertools
import pkgutil
from collections import Counter
from typing import Any

import torch

import normuon_fn as nm
from normuon_fn import ops
from normuon_fn.ops.product_configs import TileConfig
from normuon_fn.ops.product_launch import product
from normuon_fn.ops.repack import Boxes, repack

SHAPES = {
    "square": (96, 96), "wide": (100, 300), "tall": (257, 64), "odd": (17, 33), "row": (1, 40),
    "large": (1040, 1088), "stack": (3, 48, 80), "conv": (24, 8, 3, 3), "vector": (100,),
    "table": (130, 24), "none": (0, 16),
}  # fmt: skip
ROUTES = {
    "table": nm.Route("adamw"), "conv": nm.Route(flatten=True), "wide": nm.Route(heads=4),
    "vector": nm.Route("adamw"), "none": nm.Route("frozen"), "*": nm.Route("normuon"),
}  # fmt: skip


def _name_of(kernel: Any) -> str:
    """Of a kernel, also of one that Triton has not seen yet."""
    function = getattr(kernel, "function", None) or kernel.fn
    return str(function.__name__)


def launched_by(call: Any) -> Counter[str]:
    """How often the call launches each kernel of ops."""
    names: Counter[str] = Counter()
    modules = [
        importlib.import_module(f"{ops.__name__}.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    real = importlib.import_module(f"{ops.__name__}.launch").launch

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        names[_name_of(kernel)] += 1
        real(kernel, *args, **options)

    users = [module for module in modules if getattr(module, "launch", None) is real]
    for module in users:
        module.launch = counting  # type: ignore[attr-defined]
    try:
        call()
    finally:
        for module in users:
            module.launch = real  # type: ignore[attr-defined]
    return names


def all_kernels() -> set[str]:
    """The names of the kernels of ops: functions that Triton compiles and a launch names."""
    found = set()
    for m in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{m.name}")
        found |= {
            name
            for name, x in vars(module).items()
            if name.endswith("_kernel") and (hasattr(x, "fn") or hasattr(x, "function"))
        }
    return found


def steps(device: torch.device, dtype: torch.dtype, config: nm.Config) -> None:
    """Three steps: one as it is, one with a non-finite gradient, one with a non-contiguous one."""
    torch.manual_seed(0)
    params = {name: torch.randn(shape, device=device).to(dtype) for name, shape in SHAPES.items()}
    plan = nm.make_plan(params, config, routes=ROUTES)
    state, hyper = nm.init(params, plan), nm.Hyper.of(params, lr=0.01, weight_decay=0.1)
    for k in range(3):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        if k == 1:
            grads["wide"][3, 5] = float("nan")
        if k == 2:
            grads["square"], grads["odd"] = (
                grads["square"].T,
                torch.randn(33, 17, device=device).T.to(dtype),
            )
        nm.step_(params, grads, state, hyper, plan)


def products(device: torch.device) -> None:
    """The three products in every variant of their kernels, with ragged tiles and odd strides."""
    sizes = itertools.product((96, 200, 333), ("pointers", "tma", "persistent"), (64, 128))
    for rows, variant, block in sizes:
        if variant != "pointers" and rows % 8:  # no descriptor takes such strides
            continue
        torch.manual_seed(0)
        x = torch.randn(3, rows, 264, device=device).to(torch.bfloat16)
        a = torch.randn(3, rows, rows, device=device).to(torch.bfloat16)
        a = a + a.mT
        tiles = TileConfig(block, block, 32, 8, 4, 3, variant)  # type: ignore[arg-type]
        product(x, x.mT, None, 1.0, 0.0, True, tiles)
        product(a, a, a, 0.5, 2.0, True, tiles)
        product(a, x, x, 1.0, 2.0, False, tiles)
    if torch.cuda.get_device_capability(device) != (9, 0):
        return
    for rows, (block_n, warps) in itertools.product((96, 200, 1160), ((128, 4), (256, 8))):
        torch.manual_seed(0)
        x = torch.randn(70, rows, 264, device=device).to(torch.bfloat16)
        a = torch.randn(70, rows, rows, device=device).to(torch.bfloat16)
        tiles = TileConfig(128, block_n, 64, 4, warps, 3, "specialized", ends=True)
        product(x, x.mT, None, 1.0, 0.0, True, tiles)
        product(a, a, a, 0.5, 2.0, True, tiles)
        product(a, x, x, 1.0, 2.0, False, tiles)


def settings() -> list[tuple[torch.dtype, nm.Config]]:
    """What the steps are run with."""
    wide, half = torch.float32, torch.bfloat16
    found = [
        (dtype, nm.Config(guard=guard, nesterov=guard == "full"))  # type: ignore[arg-type]
        for dtype, guard in itertools.product((wide, half), ("full", "off"))
    ]
    masters = ("mantissa", "fp32", "stochastic")
    found += [(half, nm.Config(guard="output", master=master)) for master in masters]  # type: ignore[arg-type]
    return [
        *found,
        (torch.float16, nm.Config(master="fp32", weight_decay_form="cautious")),
        (wide, nm.Config(method="gram", momentum_dtype=half)),
        (wide, nm.Config.preset("modded_nanogpt", guard="full")),
        (wide, nm.Config.preset("adamuon", guard="full", momentum_dtype="int8")),
        (wide, nm.Config.preset("hyperball", guard="full", other="lion")),
        (half, nm.Config.preset("nanochat", guard="full", cautious_update=True)),
    ]


def others(device: torch.device) -> None:
    """What no step on one device launches: `orthogonalize` of square matrices, and `repack`."""
    torch.manual_seed(0)
    for size, dtype in itertools.product((17, 96, 200), (torch.float32, torch.bfloat16)):
        x = torch.randn(3, size, size, device=device).to(dtype)
        nm.orthogonalize(x)
        nm.orthogonalize(x.mT)
    x, words = (
        torch.randn(300, 70, device=device).to(torch.bfloat16),
        torch.randn(33, device=device),
    )
    boxes = Boxes()
    boxes.add(0, 0, 0, 0, (1, 300, 66), (0, 140), (0, 66))  # bytes: a part of every row
    boxes.row(1, 1, 4, 0, 120)
    repack([x, words], boxes.moves(device, [300 * 33], torch.bfloat16, [30], torch.float32))


def everything(device: torch.device, chosen: set[int]) -> None:
    """0: the products and `others`; the rest: steps, by the places of `settings`."""

    def done(what: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"{what} done", flush=True)

    if 0 in chosen:
        if device.type == "cuda":
            products(device)
        others(device)
        done("products and others")
    with torch.compiler.set_stance("force_eager"):
        for k, (dtype, config) in enumerate(settings(), 1):
            if k in chosen:
                steps(device, dtype, config)
                done(f"setting {k}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    every = ",".join(map(str, range(len(settings()) + 1)))
    parser.add_argument("--settings", default=every, help="some of them, in processes of their own")
    args = parser.parse_args()
    chosen = {int(k) for k in args.settings.split(",")}
    names = launched_by(lambda: everything(torch.device(args.device), chosen))
    print(f"launched: {dict(sorted(names.items()))}")
    print(f"not launched: {sorted(all_kernels() - set(names))}")


if __name__ == "__main__":
    main()
