"""What can be wrong with the arguments of a step, found without looking at a value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..compat import has_own_dispatch, is_subclass
from ..distributed.placements import describe, has_layout, local
from ..types import Grads, Hyper, Tensors
from .memory import check_apart, in_one_storage
from .plan import Plan, Spec, check_plan
from .streaming import check_pinned, check_unmapped


def check_step(
    plan: Plan,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    found_inf: Tensor | None,
) -> None:
    """Everything that can be wrong with a step's arguments, found without looking at a value."""
    check_plan(plan)
    specs = {p.name: p.spec for p in plan.parameters}
    check_tensors(plan, "params", params, specs)
    check_tensors(plan, "grads", grads, specs, optional=True)
    check_order(params, grads)
    check_tensors(plan, "state", state, plan.state)
    if plan.streaming is not None:
        check_unmapped({"params": params, "grads": grads, "state": state})
    if not isinstance(hyper, Hyper):
        raise TypeError(_no_hyper(hyper))
    for name, value in zip(Hyper._fields, hyper, strict=True):
        shape = (plan.hypers,) if plan.hypers else ()
        if not isinstance(value, Tensor) or value.shape != shape:
            what = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            kind = (
                f"a tensor of shape {shape}, one value for each set of hyper_of"
                if shape
                else "a 0-d tensor"
            )
            raise TypeError(
                f"hyper.{name}: expected {kind}, got {what}; "
                + ("Hyper.stack([Hyper.of(...), ...])" if shape else "Hyper.of")
                + " makes them from numbers"
            )
    missing = [
        block.name
        for bucket in plan.buckets
        if bucket.shared_by
        for block in bucket.blocks
        if grads[block.name] is None
    ]
    if missing and plan.config.missing_grads == "skip":
        raise ValueError(
            f"grads: None for {missing[:8]}, whose matrices are shared between ranks: a rank that "
            "has no gradient would keep "
            "the others waiting. Give zeros on every rank that lacks it: "
            "Config(missing_grads='zeros')"
        )
    if found_inf is not None and not (isinstance(found_inf, Tensor) and found_inf.numel() == 1):
        raise TypeError(f"found_inf: expected None or a tensor with one element, got {found_inf!r}")


def _no_hyper(given: object) -> str:
    several = isinstance(given, (tuple, list)) and all(isinstance(h, Hyper) for h in given)
    write = "nm.Hyper.stack(...) of them" if several else "nm.Hyper.of(params, lr=...)"
    return f"hyper: expected a Hyper, got {type(given).__name__}; write {write}"


def check_placements(plan: Plan, params: Tensors, grads: Grads, state: Tensors) -> None:
    """That DTensors are placed as the plan says; a compiled step sees only their local parts."""
    of_params = {p.name: p.spec for p in plan.parameters}
    for what, given, specs in (
        ("params", params, of_params),
        ("grads", grads, of_params),
        ("state", state, plan.state),
    ):
        for name, tensor in given.items():
            if tensor is not None and name in specs:
                _check_placement(f"{what}[{name!r}]", tensor, specs[name])


def _check_placement(what: str, tensor: Tensor, spec: Spec) -> None:
    if not has_layout(tensor, spec.sharded):
        expected = (
            "a plain tensor"
            if spec.sharded is None
            else f"{spec.sharded.placements} on {spec.sharded.mesh}"
        )
        raise ValueError(f"{what}: expected {expected}, got {describe(tensor)}; redistribute it")


def check_tensors(
    plan: Plan,
    what: str,
    given: Grads,
    specs: Mapping[str, Spec],
    optional: bool = False,
    anywhere: bool = False,
) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(_no_dict(what, given))
    missing, extra = [k for k in specs if k not in given], [k for k in given if k not in specs]
    if missing or extra:
        hint = "was it made for another plan?"
        if optional and missing:
            hint = "give None for a parameter without a gradient"
        elif optional:
            hint = "leave these out"
        raise ValueError(f"{what}: missing {missing[:8]}, not in the plan {extra[:8]}; {hint}")
    for name, spec in specs.items():
        tensor = given[name]
        if optional and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}[{name!r}]: expected a Tensor, got {type(tensor).__name__}")
        _check_placement(f"{what}[{name!r}]", tensor, spec)
        tensor = local(tensor)
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"{what}[{name!r}]: expected shape {spec.shape}, got {tuple(tensor.shape)}"
            )
        # Megatron and DeepSpeed hand over float32 gradients of parameters in 16 bits.
        wider = optional and spec.dtype.itemsize == 2 and tensor.dtype == torch.float32
        if (tensor.dtype != spec.dtype and not wider) or tensor.layout != torch.strided:
            write = ""
            if tensor.layout != torch.strided:
                write = "; write nn.Embedding(..., sparse=False), or to_dense()"
            elif optional:
                write = f"; write grads[{name!r}].to({spec.dtype})"
            raise ValueError(
                f"{what}[{name!r}]: expected dense {spec.dtype}, got {tensor.dtype} "
                f"{tensor.layout}{write}"
            )
        if tensor.device != spec.on(plan.device) and not anywhere:
            offloaded = what == "state" and tensor.device.type == "cpu"
            hint = "; if it was offloaded, write nm.reload_(state, plan)" if offloaded else ""
            raise ValueError(
                f"{what}[{name!r}]: expected device {spec.on(plan.device)}, "
                f"got {tensor.device}{hint}"
            )
        if spec.host and not anywhere:
            check_pinned(f"{what}[{name!r}]", tensor, plan.device)


def check_order(params: Tensors, grads: Grads) -> None:
    """Refuses gradients in the place of parameters, as other libraries have them first."""
    swapped = (name for name, grad in grads.items() if isinstance(grad, nn.Parameter))
    name = next(swapped, None)
    if name is not None and not any(isinstance(p, nn.Parameter) for p in params.values()):
        raise ValueError(
            f"grads[{name!r}]: expected a gradient, got a Parameter, and params has none; the "
            "order is step(params, grads, state, hyper, plan)"
        )


def _no_dict(what: str, given: object) -> str:
    write = "; write dict(model.named_parameters())" if isinstance(given, nn.Module) else ""
    if what == "grads" and isinstance(given, (tuple, list)):
        write = "; write dict(zip(params, grads)) where they are in the order of params"
        if len(given) == 2 and isinstance(given[0], Mapping):
            write = "; of grad_and_value write grads, loss = ..."
    return f"{what}: expected a dict of name -> tensor, got {type(given).__name__}{write}"


def check_plain(params: Tensors, grads: Grads, state: Tensors) -> None:
    """That no tensor is of a subclass, which a graph that was made for plain tensors refuses."""
    for what, given in (("params", params), ("grads", grads), ("state", state)):
        for name, tensor in given.items():
            if tensor is not None and (is_subclass(tensor) or has_own_dispatch(tensor)):
                raise TypeError(
                    f"{what}[{name!r}]: expected a plain tensor, got a {type(tensor).__name__}; "
                    "pass its as_subclass(torch.Tensor)"
                )


def check_kind(name: str, tensor: Tensor) -> None:
    """That a parameter is a tensor with memory of its own.

    Raises:
        TypeError, ValueError: naming it, and what to do.
    """
    if is_lazy(tensor):
        raise ValueError(
            f"params[{name!r}]: is an UninitializedParameter, which has no shape yet; run the "
            "model on a batch first"
        )
    if has_own_dispatch(local(tensor)):
        raise TypeError(
            f"params[{name!r}]: expected a plain tensor or a DTensor, got a "
            f"{type(tensor).__name__}, a subclass with a __torch_dispatch__ of its own, whose "
            "memory cannot be written as a matrix; train a plain tensor, or leave it out of params"
        )


def check_params(params: Mapping[str, Tensor]) -> bool:
    """Whether some are parts of one storage."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params: expected a dict of name -> tensor, got {type(params).__name__}; write "
            "nm.make_plan(model), or dict(model.named_parameters())"
        )
    if not params:
        raise ValueError("params: expected at least one parameter, got an empty dict")
    device, first = None, ""
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"params[{name!r}]: expected str -> Tensor, got {type(tensor).__name__}"
            )
        check_kind(name, tensor)
        if (
            tensor.layout != torch.strided
            or not tensor.dtype.is_floating_point
            or tensor.dtype.itemsize < 2
        ):
            raise TypeError(
                f"params[{name!r}]: expected a dense float64, float32, bfloat16 or float16 "
                f"tensor, got {tensor.dtype} "
                f"{tensor.layout}; leave it out of params"
            )
        tensor = local(tensor)
        if device is not None and tensor.device != device:
            raise ValueError(
                f"params[{name!r}]: on {tensor.device}, but {first!r} is on {device}; make one "
                "plan a device"
            )
        device, first = tensor.device, first or name
    check_apart({"params": params}, "pass tied weights once, clone() slices")
    return in_one_storage(params.values())
