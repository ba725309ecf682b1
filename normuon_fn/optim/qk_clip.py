"""QK-clip: queries and keys are made smaller where their product has become too large.

largest logit of every head -> gamma = min(1, tau / logit) -> rows of the projections, in place

Source: MuonClip, arXiv 2507.20534, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed import placements
from ..ops.rounding import joined_with, parted
from ..planning.plan import Parameter, Plan
from ..routing.given_projections import check_projections
from ..routing.queries_and_keys import Known, Projection, Rows, projections_of
from ..types import Tensors, check_number

Projections = Mapping[str, Mapping[str, str]]


def qk_clip_(
    params: Tensors,
    max_logits: Tensors,
    plan: Plan,
    tau: float = 100.0,
    *,
    state: Tensors | None = None,
    alpha: float = 0.5,
    projections: Projections | None = None,
) -> None:
    """Scales the projections of queries and keys in place, so that no logit exceeds ``tau``.

    Call it after the step, with the largest attention logit (before softmax, after its scale) that
    each head had in the forward pass. With gamma = min(1, tau / max_logit), the query's rows of a
    head are multiplied by gamma^alpha and its key's by gamma^(1 - alpha), biases included.

    - Heads of queries that share a key (GQA, MQA) share a gamma: that of the largest of their
      logits. No row ever grows.
    - MLA: the query's part without rotation and the key's by gamma^alpha and gamma^(1 - alpha), the
      query's rotary part by gamma. The rotary key, which all heads share, stays as it is.
    - A maximum that is not finite, or at most ``tau``, leaves every bit of its head as it is.

    Everything stays on the device and nothing waits for it, so it may be part of a graph of your
    own and of a CUDA-graph capture. Ranks that have parts or copies of a layer must give the same
    maxima: ``torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)`` before.

    >>> result = nm.step_(params, grads, state, hyper, plan)
    >>> nm.qk_clip_(params, {"layers.0.attn": maximum}, plan, tau=100.0, state=state)

    Args:
        max_logits: name of the module of an attention -> one number per head of its queries. Its
            projections are found by their names; of fused ones the plan's routes know the sizes.
        tau: in logits; the source has 100.
        state: of the step; needed where parameters have float32 masters (`Config.master`), which
            are what is scaled.
        alpha: which share of the scaling the queries take.
        projections: name of the module -> role ("q", "gated_q", "k", "qkv", "kv", "latent",
            "latent_down") -> name of a weight, where the names do not tell. Every module must be
            one of ``max_logits``.

    Shapes: ``max_logits[layer]`` is [heads]. Of DTensors each rank scales the rows that it has.

    Raises:
        TypeError, ValueError: naming the layer or parameter: projections that cannot be told, a
            number of heads that does not fit, frozen ones, ones that a norm follows (QK-norm), or
            masters without ``state``. Nothing is written then.
    """
    new = _clipped(params, max_logits, plan, tau, state, alpha, projections)
    with torch.no_grad():
        for given, changed in ((params, new[0]), (state or {}, new[1])):
            for name, x in changed.items():
                placements.local(given[name]).copy_(x)


def qk_clip(
    params: Tensors,
    max_logits: Tensors,
    plan: Plan,
    tau: float = 100.0,
    *,
    state: Tensors | None = None,
    alpha: float = 0.5,
    projections: Projections | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(params, state)`` after `qk_clip_`, as new tensors where something is scaled.

    Everything else comes back as the tensors that were given. Raises as `qk_clip_`.
    """
    new = _clipped(params, max_logits, plan, tau, state, alpha, projections)
    specs = {p.name: p.spec for p in plan.parameters}
    return (
        {**params, **{k: placements.to_dtensor(x, specs[k].sharded) for k, x in new[0].items()}},
        {
            **(state or {}),
            **{k: placements.to_dtensor(x, plan.state[k].sharded) for k, x in new[1].items()},
        },
    )


def _clipped(
    params: Tensors,
    max_logits: Tensors,
    plan: Plan,
    tau: float,
    state: Tensors | None,
    alpha: float,
    projections: Projections | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The local parts of parameters and masters that are scaled."""
    _check(max_logits, plan, tau, alpha)
    check_projections(projections, max_logits)
    known = [Known(p.name, _whole_shape(p), p.route, p.reason) for p in plan.parameters]
    by_name = {p.name: p for p in plan.parameters}
    scales: dict[str, tuple[Tensor, int]] = {}
    for layer, maxima in max_logits.items():
        given = None if projections is None else projections.get(layer)
        found = projections_of(layer, maxima.shape[0], known, given)
        gamma = _gamma(maxima, tau, min(rows.heads for each in found for rows in each.rows))
        for each in found:
            for name in each.names:
                dim = each.dim if len(_whole_shape(by_name[name])) > 1 else 0
                size = _whole_shape(by_name[name])[dim]
                if name in scales:
                    raise ValueError(
                        f"max_logits[{layer!r}]: {name!r} is in an entry before it too; give one "
                        "entry for a weight, with the larger maximum of each head"
                    )
                scales[name] = _scale(each, gamma, alpha, size), dim
    new: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, (scale, dim) in scales.items():
            _scaled(params, state, plan, by_name[name], scale, dim, new, masters)
    return new, masters


def _scaled(
    params: Tensors,
    state: Tensors | None,
    plan: Plan,
    parameter: Parameter,
    scale: Tensor,
    dim: int,
    new: dict[str, Tensor],
    masters: dict[str, Tensor],
) -> None:
    """Adds the scaled parameter to ``new``, and its master, if it has one, to ``masters``."""
    name, layout = parameter.name, parameter.spec.sharded
    if name not in params:
        raise ValueError(f"params: expected {name!r}, which max_logits is about")
    own = placements.local(params[name]).detach()
    if layout is not None:
        start, length = layout.local_part[dim]
        scale = scale[start : start + length]
    scale = scale.view([-1 if k == dim else 1 for k in range(own.ndim)])
    key = next((k for k in (f"{name}.mantissa", f"{name}.master") if k in plan.state), None)
    if key is None:
        wide = torch.promote_types(own.dtype, scale.dtype)
        new[name] = (own.to(wide) * scale).to(own.dtype)
        return
    if state is None or key not in state:
        raise ValueError(
            f"state: {name!r} has a float32 master, {key!r}, which is what the next step begins "
            "with; pass state=state"
        )
    rest = placements.local(state[key])
    new[name], masters[key] = parted(joined_with(own, rest) * scale, own.dtype, rest.dtype)


def _gamma(
    maxima: Tensor,  # [heads]
    tau: float,
    keys: int,  # how many heads of keys there are
) -> Tensor:
    """[keys] float32: by how much the logits of the queries of each key shrink."""
    maxima = maxima.detach().float()
    over = maxima.isfinite() & (maxima > tau)
    gamma = torch.where(over, tau / torch.where(over, maxima, 1.0), 1.0)
    return gamma.view(keys, -1).amin(1)


def _scale(projection: Projection, gamma: Tensor, alpha: float, size: int) -> Tensor:
    """[size] float32: what each of the outputs of a projection is multiplied by."""
    powers = {"q": alpha, "k": 1.0 - alpha, "rope": 1.0}
    parts: list[Tensor] = []
    at = 0
    for rows in sorted(projection.rows):
        parts += _ones(gamma, rows.start - at)
        parts.append(_of_rows(rows, gamma, powers))
        at = rows.start + rows.heads * rows.each
    return torch.cat([*parts, *_ones(gamma, size - at)])


def _of_rows(rows: Rows, gamma: Tensor, powers: Mapping[str, float]) -> Tensor:
    heads = gamma.repeat_interleave(rows.heads // gamma.shape[0])[:, None]
    parts, at = [], 0
    for field in rows.fields:
        if field.offset > at:
            parts.append(torch.ones_like(heads).expand(-1, field.offset - at))
        parts.append(heads.pow(powers[field.kind]).expand(-1, field.size))
        at = field.offset + field.size
    if at < rows.each:
        parts.append(torch.ones_like(heads).expand(-1, rows.each - at))
    return torch.cat(parts, 1).flatten()


def _ones(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_ones(count)] if count else []


def _whole_shape(parameter: Parameter) -> tuple[int, ...]:
    layout = parameter.spec.sharded
    return parameter.spec.shape if layout is None else layout.shape


def _check(max_logits: Tensors, plan: Plan, tau: float, alpha: float) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected a Plan, got {type(plan).__name__}; an optimizer has it as .plan after "
            "its first step"
        )
    check_number("tau", tau)
    check_number("alpha", alpha)
    if tau == 0.0 or alpha > 1.0:
        raise ValueError(f"expected tau > 0 and alpha in [0, 1], got tau={tau!r}, alpha={alpha!r}")
    if not isinstance(max_logits, Mapping) or not max_logits:
        raise TypeError(
            "max_logits: expected a dict, name of the module of an attention -> [heads], got "
            f"{max_logits!r}"
        )
    for layer, maxima in max_logits.items():
        if not isinstance(maxima, Tensor) or not maxima.dtype.is_floating_point:
            raise TypeError(f"max_logits[{layer!r}]: expected a float tensor, got {maxima!r}")
        if placements.local(maxima) is not maxima:
            raise TypeError(
                f"max_logits[{layer!r}]: expected a plain tensor, got a DTensor; write "
                "maximum.full_tensor()"
            )
        if maxima.ndim != 1 or not maxima.shape[0]:
            raise ValueError(
                f"max_logits[{layer!r}]: expected one number per head, [heads], got shape "
                f"{tuple(maxima.shape)}; write logits.amax over batch and positions"
            )
        if maxima.device != plan.device:
            raise ValueError(
                f"max_logits[{layer!r}]: expected a tensor on {plan.device}, got {maxima.device}"
            )
