"""What can be wrong with the arguments of a step, found without looking at a value."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ..algorithm.state import MASTERS
from ..compat import storage_key
from ..distributed.placements import describe, has_layout, local
from ..types import Grads, Hyper, Tensors
from .plan import Plan, Spec


def check_step(
    plan: Plan,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    found_inf: Tensor | None,
) -> None:
    """Everything that can be wrong with a step's arguments, found without looking at a value."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    specs = {p.name: p.spec for p in plan.parameters}
    check_tensors(plan, "params", params, specs)
    check_tensors(plan, "grads", grads, specs, optional=True)
    check_tensors(plan, "state", state, plan.state)
    # In a graph a view that fails ends the trace, whatever would catch it.
    if not torch.compiler.is_dynamo_compiling():
        _check_readable(plan, params, state)
    if not isinstance(hyper, Hyper):
        raise TypeError(f"hyper: expected a Hyper (see Hyper.of), got {type(hyper).__name__}")
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
                f"hyper.{name}: expected {kind}, got {what}; Hyper.of makes them from numbers"
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


def _check_readable(plan: Plan, params: Tensors, state: Tensors) -> None:
    """That views of what is written are its matrices.

    ``model.to(memory_format=...)`` changes strides after `make_plan`.
    """
    states = (*plan.stages.states, *MASTERS.values())
    for block in [block for p in plan.parameters for block in p.blocks]:
        views = {block.name: block.param}
        for kept in states:
            views[f"{block.name}.{kept.name}"] = block.line if kept.per == "line" else block.param
        for name, view in views.items():
            what, given = ("params", params) if name == block.name else ("state", state)
            if name not in given or local(given[name]).is_contiguous():
                continue
            try:
                view.read(local(given[name]))
            except RuntimeError as error:
                found = f"strides {given[name].stride()} do not let it be read as {view.shape}"
                raise ValueError(f"{what}[{name!r}]: {found}; make it contiguous()") from error


def check_tensors(
    plan: Plan,
    what: str,
    given: Grads,
    specs: Mapping[str, Spec],
    optional: bool = False,
    anywhere: bool = False,
) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected a dict of name -> tensor, got {type(given).__name__}")
    missing, extra = [k for k in specs if k not in given], [k for k in given if k not in specs]
    if missing or extra:
        hint = (
            "; give None for a parameter without a gradient"
            if optional
            else "; was it made for another plan?"
        )
        raise ValueError(f"{what}: missing {missing[:8]}, not in the plan {extra[:8]}{hint}")
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
        if tensor.dtype != spec.dtype or tensor.layout != torch.strided:
            raise ValueError(
                f"{what}[{name!r}]: expected dense {spec.dtype}, got {tensor.dtype} {tensor.layout}"
            )
        if tensor.device != plan.device and not anywhere:
            raise ValueError(
                f"{what}[{name!r}]: expected device {plan.device}, got {tensor.device}"
            )


def check_params(params: Mapping[str, Tensor]) -> bool:
    """Whether some are parts of one storage."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a dict of name -> tensor, got {type(params).__name__}")
    if not params:
        raise ValueError("params: expected at least one parameter, got an empty dict")
    by_storage: dict[object, list[tuple[int, int, str]]] = {}
    device, first = None, ""
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"params[{name!r}]: expected str -> Tensor, got {type(tensor).__name__}"
            )
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
        if tensor.numel():
            reach = 1 + sum(
                (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start, end = (int(tensor.storage_offset() + at) * tensor.itemsize for at in (0, reach))
            by_storage.setdefault(storage_key(tensor), []).append((start, end, name))
    for views in by_storage.values():  # of one storage, as cuDNN keeps the weights of an LSTM
        views.sort(key=lambda view: view[0])
        for (_, end, name), (start, _, other) in pairwise(views):
            if start < end:
                raise ValueError(
                    f"params[{other!r}]: shares memory with {name!r}; pass tied weights once, "
                    "clone() slices"
                )
    return any(len(views) > 1 for views in by_storage.values())
