"""Momentums of floats as codes with scales (ops/codes.py), and back: for state from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algorithm.momentum import MOMENTUM, SCALE
from ..distributed.placements import describe, has_layout, local, to_dtensor
from ..ops.codes import quantized, restored
from .layout import Block
from .plan import Plan, Spec


def fitted(plan: Plan, name: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter by kind, with its momentum as the plan keeps it.

    Floats become codes with scales, codes with scales become floats. What is neither, or has
    another shape than the parameter, comes back as it was given.

    Raises:
        ValueError: scales that are not those of the parameter, or sharded in another way.
    """
    own, specs = dict(kinds), plan.whole_state
    spec, coded = specs.get(f"{name}.{MOMENTUM.name}"), f"{name}.{SCALE.name}" in specs
    momentum, scales = own.get(MOMENTUM.name), own.get(SCALE.name)
    if spec is None or not isinstance(momentum, Tensor) or not _is_shaped(momentum, spec):
        return own
    blocks = next(p.blocks for p in plan.parameters if p.name == name)
    if coded and scales is None and momentum.is_floating_point():
        codes, of_codes = as_codes(_placed(momentum, spec), blocks)
        own[MOMENTUM.name] = to_dtensor(codes, spec.sharded)
        own[SCALE.name] = to_dtensor(of_codes, specs[f"{name}.{SCALE.name}"].sharded)
    elif not coded and isinstance(scales, Tensor) and momentum.dtype == torch.int8:
        del own[SCALE.name]
        codes, of_codes = _placed(momentum, spec), local(scales)
        expected = blocks[0].scale.base if blocks else of_codes.shape
        if tuple(of_codes.shape) != tuple(expected) or of_codes.dtype != torch.uint8:
            raise ValueError(
                f"{name}: expected a {SCALE.name} of shape {tuple(expected)}, torch.uint8, got "
                f"{describe(scales)} of local shape {tuple(of_codes.shape)}, {of_codes.dtype}"
            )
        own[MOMENTUM.name] = to_dtensor(as_floats(codes, of_codes, blocks, spec), spec.sharded)
    return own


def fitted_file(found: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The same of all parameters, from tensors that are named ``"state/<name>.<kind>"``.

    Raises:
        ValueError: as `fitted`.
    """
    new, changed = dict(found), False
    for p in plan.parameters:
        keys = {kind: f"state/{p.name}.{kind}" for kind in (MOMENTUM.name, SCALE.name)}
        own = {kind: found[key] for kind, key in keys.items() if key in found}
        fits = fitted(plan, p.name, own)
        if fits.keys() != own.keys():
            changed = True
            for kind in own:
                del new[keys[kind]]
            new |= {keys[kind]: x for kind, x in fits.items()}
    if not changed:
        return found
    order = {f"state/{key}": k for k, key in enumerate(plan.state)}
    return dict(sorted(new.items(), key=lambda item: order.get(item[0], -1)))


def as_codes(
    momentum: Tensor,  # of a parameter, or of what is local of it
    blocks: tuple[Block, ...],
) -> tuple[Tensor, Tensor]:
    """``(codes, scales)`` of a momentum of floats."""
    codes = torch.zeros(momentum.shape, dtype=torch.int8, device=momentum.device)
    shape = blocks[0].scale.base if blocks else (*momentum.shape[:-1], 0)
    scales = torch.zeros(shape, dtype=torch.uint8, device=momentum.device)
    wide = momentum.detach().float().contiguous()
    for block in blocks:
        new, of_new = quantized(block.param.read(wide))
        block.param.write(codes, new)
        block.scale.write(scales, of_new)
    return codes, scales


def as_floats(codes: Tensor, scales: Tensor, blocks: tuple[Block, ...], spec: Spec) -> Tensor:
    """The momentum that codes stand for, in the dtype of ``spec``."""
    momentum = torch.zeros(codes.shape, dtype=spec.dtype, device=codes.device)
    for block in blocks:
        block.param.write(momentum, read_codes(codes, scales, block).to(spec.dtype))
    return momentum


def read_codes(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """The momentum of the matrices of one block, float32, from the state of its parameter."""
    return restored(block.param.read(codes.contiguous()), block.scale.read(scales.contiguous()))


def _is_shaped(momentum: Tensor, spec: Spec) -> bool:
    return tuple(momentum.shape) == (spec.sharded.shape if spec.sharded else spec.shape)


def _placed(x: Tensor, spec: Spec) -> Tensor:
    """What is local of ``x`` in the layout of the plan."""
    if spec.sharded is not None and not has_layout(x, spec.sharded):
        x = x.redistribute(spec.sharded.mesh, spec.sharded.placements)  # type: ignore[attr-defined]
    return local(x)
