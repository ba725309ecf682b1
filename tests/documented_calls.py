"""A user's file with the calls that the documentation shows: only to be checked, never run.

`make lint` checks it with mypy --strict, and .ci/release with pyright against the built wheel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import normuon_fn as nm


def functional(model: nn.Module, loss_fn: Callable[..., Tensor], batches: list[Tensor]) -> None:
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = nm.make_plan(model, nm.Config(guard="full"))
    plan = nm.make_plan(params)
    plan = nm.make_plan(dict(model.named_parameters()))
    print(plan, plan.names)
    state = nm.init(params, plan)
    state = nm.init(plan, params)
    peak = nm.Hyper.of(params, lr=0.02, adamw_lr=0.002, weight_decay=0.1, adamw_betas=(0.9, 0.95))
    hyper = peak.scaled(0.0)
    monitor = nm.SkipMonitor(plan, max_consecutive=20)
    graphed = nm.GraphedStep(plan)
    for k, batch in enumerate(batches):
        peak.scaled(min((k + 1) / 4, 1.0), out=hyper)
        peak.scaled(torch.tensor(0.5), out=hyper)
        grads, loss = torch.func.grad_and_value(loss_fn)(params, batch)
        print(loss)
        result = nm.step(params, grads, state, hyper, plan)
        params, state = dict(result.params), dict(result.state)
        skipped: bool = nm.check(result, plan, max_consecutive=3, grads=grads, hyper=hyper)
        file: Path = nm.capture(result, grads, plan, "faults", hyper=hyper)
        flags: Tensor = result.flags
        print(skipped, file, flags, result.skipped)
        late = {name: p.grad for name, p in model.named_parameters()}
        result = nm.step_(params, late, state, hyper, plan, found_inf=torch.tensor(0.0))
        result = nm.update(params, late, state, hyper, plan)
        result = graphed(params, late, state, hyper)
        monitor(result)
        # A result goes into the next step as it is.
        result = nm.step(result.params, grads, result.state, hyper, plan)
    monitor.wait()
    graphed.release()


def watched(
    model: nn.Module,
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    measured: nm.MeasuredResult,
) -> None:
    plan = nm.make_plan(model, nm.Config(metrics=True))
    state, peak = nm.init(params, plan), nm.Hyper.of(params, lr=0.02)
    schedule = nm.Schedule(total=100, warmup=10, final=0.1, shape="linear")
    hyper = peak.scaled(schedule(state["guard.step"]))
    numbers: dict[str, float] = nm.report_metrics(nm.step(params, grads, state, hyper, plan), plan)
    print(numbers, measured.metrics, nm.NorMuon(model).metrics())
    torch.optim.lr_scheduler.LambdaLR(nm.NorMuon(model, lr=0.02), schedule)
    nm.qk_clip_(params, {"attn": torch.zeros(4)}, plan, 100.0, state=state)
    params, state = nm.qk_clip(params, {"attn": torch.zeros(4)}, plan, 100.0, state=state)
    nm.offload_(state)
    nm.reload_(state, plan)


def hypers(params: dict[str, Tensor]) -> None:
    plan = nm.make_plan(params, hyper_of={"head.*": 1, "*": 0})
    one, two = nm.Hyper.of(params, lr=0.01), nm.Hyper.of(params, lr=0.02)
    stacked = nm.Hyper.stack([one, two])
    stacked._replace(lr=torch.tensor([0.1, 0.2]))
    print(plan, stacked.lr.shape)


def routes(model: nn.Module, params: dict[str, Tensor]) -> None:
    nm.make_plan(
        params,
        routes={
            "*.attn.qkv.weight": nm.Route(splits=(768, 256, 256), heads=(12, 4, 4)),
            "stem.conv.weight": nm.Route(flatten=True),
            "*.gate.weight": nm.Route("adamw", lr_mul=0.1),
            "frozen.*": nm.Route("frozen"),
            "*.c_attn.weight": nm.Route(splits=[16, 16, 16], heads=[2, 2, 2], transposed=True),
        },
    )

    def wide(name: str, tensor: Tensor) -> bool:
        return tensor.ndim == 2 and "wide" in name

    nm.make_plan(params, routes={wide: nm.Route("adamw")})
    nm.make_plan(params, routes={lambda name, tensor: tensor.ndim > 2: nm.Route(flatten=True)})
    nm.make_plan(params, routes={wide: nm.Route("adamw"), "head.*": nm.Route("adamw", wd_mul=0.0)})
    mine = {wide: nm.Route("adamw"), "*.bias": nm.Route("adamw")}
    nm.make_plan(params, routes=mine)
    by_name = {"head.weight": nm.Route("adamw")}
    nm.make_plan(params, routes=by_name)
    table: nm.RouteTable = nm.routes_for(model, {"2.weight": nm.Route(lr_mul=0.5)})
    nm.routes_for(model, {wide: nm.Route("adamw")})
    nm.routes_for(model, mine)
    nm.make_plan(params, nm.Config(), routes=table)
    nm.NorMuon(model, routes={wide: nm.Route("adamw")})
    nm.NorMuon(model, routes=mine)
    nm.NorMuon(model.parameters(), routes=table)


def configs() -> None:
    nm.Config(coefficients="polar_express", steps=5)
    nm.Config(coefficients=[(3.4445, -4.7750, 2.0315)] * 5)
    nm.Config(coefficients=((3.4445, -4.7750, 2.0315),))
    nm.Config(coefficients=[[3.4445, -4.7750, 2.0315]])
    rows = [(3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)]
    nm.Config(coefficients=rows, safety_factor=1.02)
    nm.Config.preset("dion", guard="output")
    nm.Config.preset("paper")
    nm.Config(orthogonalizer=lambda x: x, momentum_dtype=torch.bfloat16, master="mantissa")
    nm.Config(coefficients=nm.COEFFICIENTS["simple"].rows[:5])
    for name in nm.COEFFICIENTS:
        print(name)
    nm.Config.preset("adamuon", guard="full")
    nm.Config(other="lion", replicas="share")
    nm.check_stage(lambda x: x / x.norm(dim=(-2, -1), keepdim=True), rows=4, cols=6)


def heard(skip: nm.Skip) -> None:
    print(skip.step, skip.consecutive, skip.skipped, skip.names, skip.message)


def after(result: nm.StepResult, plan: nm.Plan) -> dict[str, Tensor]:
    try:
        nm.SkipMonitor(plan, on_skip=heard)(result)
    except nm.NonFiniteStepError as error:
        print(error)
    return nm.gather_state(dict(result.state), plan)


def orthogonal(x: Tensor) -> Tensor:
    nm.orthogonalize(x, method="gram", dtype=torch.float16)
    nm.orthogonalize(x, coefficients=[(3.4445, -4.7750, 2.0315)] * 5)
    return nm.orthogonalize(x, coefficients="quintic", steps=5, safety_factor=1.0)


def optimizer(model: nn.Module) -> None:
    optimizer = nm.NorMuon(model, lr=0.02, weight_decay=0.1, guard="full", graphed=False)
    optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, guard="full", on_skip="raise")
    optimizer = nm.NorMuon(model.parameters(), lr=torch.tensor(0.02), adamw_lr=0.002)
    groups: list[dict[str, Any]] = [  # torch.optim.AdamW wants this annotation too
        {"params": model.parameters(), "lr": 0.02},
        {"params": [nn.Parameter(torch.zeros(2))], "algorithm": "adamw"},
    ]
    optimizer = nm.NorMuon(
        groups,
        guard="full",
        on_skip=lambda skip: print(skip.step, skip.names, skip.message),
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=10)
    optimizer.step()
    loss: float = optimizer.step(lambda: 0.5)
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    nm.SkipMonitor(optimizer)()
    if optimizer.result is not None and optimizer.plan is not None:
        nm.check(optimizer.result, optimizer.plan)
    optimizer.load_state_dict(optimizer.state_dict())
    print(loss)


def lists(weights: list[Tensor], gradients: list[Tensor]) -> None:
    momentums = [torch.zeros_like(w) for w in weights]
    variances = [w.new_zeros(w.shape[0], 1) for w in weights]
    result: nm.ForeachResult = nm.foreach_step_(
        weights, gradients, momentums, variances,
        lr=0.02, momentum=0.95, beta2=torch.tensor(0.95), weight_decay=0.1,
        config=nm.Config(guard="full"), routes=[nm.Route(), nm.Route(heads=2)],
    )  # fmt: skip
    print(result.flags, result.skipped)


def files(params: dict[str, Tensor], state: dict[str, Tensor], plan: nm.Plan) -> None:
    nm.save("run.safetensors", params, state, plan, extra={"step": 20})
    run: nm.Checkpoint = nm.load(Path("run.safetensors"), plan)
    nm.load("run.safetensors", plan, params=params, state=state)
    kept: dict[str, Tensor] = run.params
    print(kept, run.state, run.extra["step"])
    try:
        nm.load("run.safetensors")
    except nm.CheckpointError as error:
        print(error)


def moving(model: nn.Module, old: torch.optim.Optimizer, plan: nm.Plan) -> dict[str, Tensor]:
    names = nm.names_in(old, model.named_parameters())
    names = nm.names_in(old, dict(model.named_parameters()))
    state = nm.convert_state(old.state_dict(), plan, names, missing="zeros")
    nm.put_state_(nm.NorMuon(model), state)
    nm.put_state_(nm.NorMuon(model), state, model)
    nm.put_state_(nm.NorMuon(model), state, model.named_parameters())
    return state


def trainers(model: nn.Module) -> tuple[Any, ...]:
    return (
        nm.for_trainer(model, lr=0.002, weight_decay=0.1),
        nm.trainer_callback(prefix="optimizer/"),
        nm.lightning_callback(),
    )
