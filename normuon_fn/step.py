"""The step. Start reading here: data moves down this file, nothing looks back up.

    read -> momentum -> orthogonalize -> normalize -> guard -> apply -> StepResult

`update` is the step as a pure function, for your own graph; `step` is `update` compiled; `step_` the same in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import guard, ops
from .compat import compile_whole
from .layout import View, join
from .normalize import normalize
from .orthogonalize import carry, iterate, to_unit_norm
from .plan import AdamWBucket, Bucket, Group, Plan, Spec
from .types import Hyper, StepResult

Tensors = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]


def init(plan: Plan, params: Tensors) -> dict[str, Tensor]:
    """All state of all parameters: zeros, by name, on the plan's device.

    Shapes: ``"<name>.momentum"`` as the parameter; ``"<name>.variance"`` as ``param[..., :1]`` (one a row; heads and splits
    their own); ``"<name>.exp_avg"``, ``"<name>.exp_avg_sq"`` as the parameter; ``"guard.step"``, ``"guard.skipped"``,
    ``"guard.consecutive"`` 0-d int32.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: ``params`` are not those of the plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    _check(plan, "params", params, {p.name: p.spec for p in plan.parameters})
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=plan.device) for name, spec in plan.state.items()}


def update(
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    *,
    found_inf: Tensor | None = None,  # 0-d or [1]; > 0 skips the step, as in torch.amp.GradScaler
) -> StepResult:
    """One NorMuon step, pure: new parameters and state, the old ones untouched. Not compiled: for your own ``torch.compile``.

    A gradient of ``None`` leaves that parameter and its state as they are; which ones are ``None`` is static.

    Raises (while tracing, so at no cost per step):
        TypeError: Python floats in ``hyper``, or something that is not a tensor.
        ValueError: names, shapes, dtypes or devices other than the plan's.
    """
    with torch.no_grad():
        return _advance(params, grads, state, hyper, plan, found_inf, ops.PURE)


def _update_(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    with torch.no_grad():
        return _advance(params, grads, state, hyper, plan, found_inf, ops.IN_PLACE)


def step(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    """`update` as one compiled graph (``torch.compile(fullgraph=True, dynamic=False)``), compiled once for every plan.

    Pass detached parameters: a result fed back then meets the graph it came from.
    """
    return _compiled(update, params, grads, state, hyper, plan, found_inf)


def step_(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, *, found_inf: Tensor | None = None
) -> StepResult:
    """`step` in place: ``params`` and ``state`` are written, nothing else is. The result holds the same tensors."""
    return _compiled(_update_, params, grads, state, hyper, plan, found_inf)


_cache: WeakKeyDictionary[Plan, dict[Callable[..., StepResult], Callable[..., StepResult]]] = WeakKeyDictionary()


def _compiled(
    function: Callable[..., StepResult],
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    if torch.compiler.is_compiling():  # inside the caller's own graph
        return function(params, grads, state, hyper, plan, found_inf=found_inf)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    own = _cache.setdefault(plan, {})
    if function not in own:
        own[function] = compile_whole(function)
    try:
        return own[function](params, grads, state, hyper, plan, found_inf=found_inf)
    except Exception:
        check_step(plan, params, grads, state, hyper, found_inf)  # tracing stumbled over it: say it in plain words
        raise


class _Run(NamedTuple):
    """What every stage reads, and where it leaves new values: by name, the parts of a tensor with their places in it."""

    params: Tensors
    grads: Grads
    state: Tensors
    hyper: Hyper
    plan: Plan
    found_inf: Tensor | None
    writes: ops.Writes
    new: dict[str, list[tuple[View | None, Tensor]]]

    @property
    def holds_momentum(self) -> bool:
        """Whether momentum may have to keep its bits, which is known only after the guard's decision."""
        return self.plan.config.guard == "full" or self.found_inf is not None

    def read(self, group: Group, suffix: str) -> list[Tensor]:
        """A view [rows, cols] or [count, rows, cols] for each of the group's blocks."""
        if suffix == ".grad":
            return [block.param.read(_given(self.grads[block.name]), writable=False) for block in group.blocks]
        source = self.state if suffix else self.params
        return [block.view(suffix).read(source[block.name + suffix]) for block in group.blocks]

    def put(self, group: Group, suffix: str, parts: list[Tensor]) -> None:
        for block, part in zip(group.blocks, parts, strict=True):
            self.new.setdefault(block.name + suffix, []).append((block.view(suffix), part))

    def rates(
        self, group: Group | AdamWBucket, lr: Tensor, weight_decay: Tensor, dtype: torch.dtype, power: int = 1
    ) -> tuple[Tensor, Tensor]:
        """``(lr, decay)`` in the dtype of the arithmetic: the learning rate, and by what share a parameter decays."""
        lr, weight_decay = lr.to(dtype) * group.lr_mul, weight_decay.to(dtype)
        return lr, (lr * lr if power == 2 else lr) * weight_decay * group.wd_mul

    def result(self, flags: Tensor, skipped: Tensor) -> StepResult:
        if self.writes is ops.IN_PLACE:
            return StepResult(dict(self.params), dict(self.state), flags, skipped)
        return StepResult(
            {name: self._joined(name, old) for name, old in self.params.items()},
            {name: self._joined(name, old) for name, old in self.state.items()},
            flags,
            skipped,
        )

    def _joined(self, name: str, old: Tensor) -> Tensor:
        parts = self.new.get(name)
        return old if parts is None else join(parts)


class _Front(NamedTuple):
    """One group after the momentum: what is to be orthogonalized."""

    group: Group  # its blocks that have a gradient
    grads: list[Tensor]
    momentums: list[Tensor]
    update: Tensor  # [n, rows, cols] float32 (float64 for float64 parameters)
    largest: Tensor  # [n], the largest entry of every gradient: not finite if any entry is not


class _Back(NamedTuple):
    """One group before the guard's decision: the parameters change by ``-lr * factor * update``."""

    front: _Front
    update: Tensor  # [n, rows, cols], orthogonalized
    factor: Tensor  # [n, rows, 1] or [n, 1, cols]
    variance: Tensor | None  # the new one
    bad: Tensor  # [2, n] bool: non-finite update, non-finite gradient


class _Moments(NamedTuple):
    """AdamW's lists for one bucket: the parameters that have a gradient."""

    names: tuple[str, ...]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grads: list[Tensor]
    hyper: tuple[Tensor, ...]  # beta1, beta2, eps, step
    bad: Tensor  # [2, n] bool


def _advance(
    params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, plan: Plan, found_inf: Tensor | None, writes: ops.Writes
) -> StepResult:
    check_step(plan, params, grads, state, hyper, found_inf)
    run = _Run(params, grads, state, hyper, plan, found_inf, writes, {})

    backs = []
    for bucket in plan.buckets:
        fronts = [_momentum(run, group) for group in bucket.with_grad(grads)]
        updates = _orthogonalize(run, bucket, fronts)
        backs.append([_normalize(run, bucket, front, update) for front, update in zip(fronts, updates, strict=True)])
    moments = [_moments(run, bucket) for bucket in plan.adamw]

    flags = guard.agree(guard.flags(_by_matrix(run, backs, moments), plan.matrix_of), plan.guard_group)
    decisions, skipped = guard.decide(plan.config, flags, plan.bucket_has, found_inf)

    for parts, decision in zip(backs, decisions, strict=False):
        for back in parts:
            _apply(run, back, decision)
    for adamw, lists, decision in zip(plan.adamw, moments, decisions[len(backs) :], strict=True):
        _apply_adamw(run, adamw, lists, decision)
    _count(run, skipped)
    return run.result(flags, skipped)


def _momentum(run: _Run, group: Group) -> _Front:
    """The new momentum is written here, unless a non-finite gradient must leave the old one: then in `_apply`."""
    config = run.plan.config
    grads, momentums = run.read(group, ".grad"), run.read(group, ".momentum")
    arguments = (run.hyper.momentum, config.momentum_form, config.nesterov)
    if run.holds_momentum:
        update, largest = ops.lookahead(grads, momentums, *arguments)
    else:
        new, update, largest = run.writes.advance(momentums, grads, *arguments)
        run.put(group, ".momentum", new)
    return _Front(group, grads, momentums, update, largest)


def _orthogonalize(run: _Run, bucket: Bucket, fronts: list[_Front]) -> list[Tensor]:
    """The groups' updates, tall ones transposed, as one stack [n, rows <= cols]; cut and transposed back."""
    if not fronts:
        return []
    stacks = [front.update.mT if front.group.tall else front.update for front in fronts]
    own = run.plan.config.orthogonalizer
    if own is None:
        stacks = [to_unit_norm(stack, bucket.coefficients, bucket.form.dtype) for stack in stacks]
        whole = iterate(_cat(stacks), bucket.coefficients, bucket.form)
    else:
        whole = own(_cat(stacks))
        if whole.shape[1:] != (bucket.rows, bucket.cols):
            raise ValueError(f"Config.orthogonalizer: expected [n, {bucket.rows}, {bucket.cols}], got {tuple(whole.shape)}")
    parts = whole.split([front.group.count for front in fronts])
    return [part.mT if front.group.tall else part for front, part in zip(fronts, parts, strict=True)]


def _normalize(run: _Run, bucket: Bucket, front: _Front, update: Tensor) -> _Back:
    config = run.plan.config
    variance = ops.stack(run.read(front.group, ".variance")) if config.normalize else None
    carried = 1.0 if config.orthogonalizer else carry(bucket.form.dtype)
    factor, variance, finite = normalize(update, variance, run.hyper.beta2, config, carried)
    return _Back(front, update, factor, variance, torch.stack([~finite, ~front.largest.isfinite()]))


def _moments(run: _Run, bucket: AdamWBucket) -> _Moments:
    names = tuple(name for name in bucket.names if run.grads[name] is not None)
    hyper, state = run.hyper, run.state
    # Bias correction counts accepted steps. With the guard's scope a bucket, others' skips must not count, so all steps do.
    step = state["guard.step"] + 1
    if run.plan.config.guard_scope == "step":
        step = step - state["guard.skipped"]
    shared = (hyper.adamw_beta1, hyper.adamw_beta2, hyper.adamw_eps, step.to(torch.float32))
    lists = (
        [run.params[name] for name in names],
        [state[f"{name}.exp_avg"] for name in names],
        [state[f"{name}.exp_avg_sq"] for name in names],
        [_given(run.grads[name]) for name in names],
    )
    bad = ops.adamw_flags(lists[3], lists[1], lists[2], *shared) if names else _none_bad(run, 0)
    return _Moments(names, *lists, shared, bad)


def _by_matrix(run: _Run, backs: list[list[_Back]], moments: list[_Moments]) -> Tensor:
    """[2, n_matrices + 1] bool in the plan's order; False where there is no gradient, and in the last column."""
    columns = []
    for bucket, parts in zip(run.plan.buckets, backs, strict=True):
        left = list(parts)
        for group in bucket.groups:
            found = left.pop(0).bad if any(run.grads[block.name] is not None for block in group.blocks) else None
            columns.append(_spread(run, found, [(block.name, block.count) for block in group.blocks]))
    for adamw, lists in zip(run.plan.adamw, moments, strict=True):
        columns.append(_spread(run, lists.bad, [(name, 1) for name in adamw.names]))
    return torch.cat([*columns, _none_bad(run, 1)], 1)


def _spread(run: _Run, bad: Tensor | None, owners: list[tuple[str, int]]) -> Tensor:
    if bad is not None and all(run.grads[name] is not None for name, _ in owners):
        return bad
    pieces, at = [], 0
    for name, count in owners:
        if bad is None or run.grads[name] is None:
            pieces.append(_none_bad(run, count))
        else:
            pieces.append(bad[:, at : at + count])
            at += count
    return torch.cat(pieces, 1)


def _none_bad(run: _Run, count: int) -> Tensor:
    return torch.zeros((2, count), dtype=torch.bool, device=run.plan.device)


def _apply(run: _Run, back: _Back, decision: guard.Decision) -> None:
    config, front, hyper = run.plan.config, back.front, run.hyper
    group = front.group
    lr, decay = run.rates(group, hyper.lr, hyper.weight_decay, front.update.dtype, config.weight_decay_lr_power)
    cautious = config.weight_decay_form == "cautious"
    new = run.writes.apply(run.read(group, ""), back.update, back.factor * lr, decay, decision.skip, cautious)
    run.put(group, "", new)
    if run.holds_momentum:
        new = run.writes.hold(front.momentums, front.grads, hyper.momentum, decision.hold, config.momentum_form)
        run.put(group, ".momentum", new)
    if back.variance is not None:
        run.put(group, ".variance", run.writes.unstack(run.read(group, ".variance"), back.variance, decision.skip))


def _apply_adamw(run: _Run, bucket: AdamWBucket, lists: _Moments, decision: guard.Decision) -> None:
    if not lists.names:
        return
    lr, decay = run.rates(bucket, run.hyper.adamw_lr, run.hyper.adamw_weight_decay, lists.exp_avgs[0].dtype)
    new = run.writes.adamw(*lists[1:5], lr, decay, *lists.hyper, decision.skip)
    for suffix, parts in zip(("", ".exp_avg", ".exp_avg_sq"), new, strict=True):
        for name, part in zip(lists.names, parts, strict=True):
            run.new[name + suffix] = [(None, part)]


def _count(run: _Run, skipped: Tensor) -> None:
    """The guard's counters: steps so far, skipped ones, skipped ones in a row."""
    step, total, in_a_row = (run.state[f"guard.{name}"] for name in ("step", "skipped", "consecutive"))
    counted = {
        "guard.step": step + 1,
        "guard.skipped": total + skipped.to(total.dtype),
        "guard.consecutive": torch.where(skipped, in_a_row + 1, 0),
    }
    for name, value in counted.items():
        run.new[name] = [(None, value)]
        if run.writes is ops.IN_PLACE:
            run.state[name].copy_(value)


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None  # Bucket.with_grad and _moments leave the others out
    return grad


def _cat(stacks: list[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)


def check_step(plan: Plan, params: Tensors, grads: Grads, state: Tensors, hyper: Hyper, found_inf: Tensor | None) -> None:
    """Everything that can be wrong with a step's arguments, found without looking at a value."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {type(plan).__name__}")
    specs = {p.name: p.spec for p in plan.parameters}
    _check(plan, "params", params, specs)
    _check(plan, "grads", grads, specs, optional=True)
    _check(plan, "state", state, plan.state)
    if not isinstance(hyper, Hyper):
        raise TypeError(f"hyper: expected a Hyper (see Hyper.of), got {type(hyper).__name__}")
    for name, value in zip(Hyper._fields, hyper, strict=True):
        if not isinstance(value, Tensor) or value.ndim != 0:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"hyper.{name}: expected a 0-d tensor, got {what}; Hyper.of makes them from numbers")
    if found_inf is not None and not (isinstance(found_inf, Tensor) and found_inf.numel() == 1):
        raise TypeError(f"found_inf: expected None or a tensor with one element, got {found_inf!r}")


def _check(plan: Plan, what: str, given: Grads, specs: Mapping[str, Spec], optional: bool = False) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected a dict of name -> tensor, got {type(given).__name__}")
    missing, extra = [k for k in specs if k not in given], [k for k in given if k not in specs]
    if missing or extra:
        hint = "; give None for a parameter without a gradient" if optional else "; was it made for another plan?"
        raise ValueError(f"{what}: missing {missing[:8]}, not in the plan {extra[:8]}{hint}")
    for name, spec in specs.items():
        tensor = given[name]
        if optional and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}[{name!r}]: expected a Tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{what}[{name!r}]: expected shape {spec.shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != spec.dtype or tensor.layout != torch.strided:
            raise ValueError(f"{what}[{name!r}]: expected dense {spec.dtype}, got {tensor.dtype} {tensor.layout}")
        if tensor.device != plan.device:
            raise ValueError(f"{what}[{name!r}]: expected device {plan.device}, got {tensor.device}")
