"""AdamW for what is not a matrix, in the same step, behind the same guard."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import ops
from ..planning.plan import AdamWBucket
from ..planning.run import Run
from .guard import Decision


class Moments(NamedTuple):
    """AdamW's lists for one bucket: the parameters that have a gradient."""

    names: tuple[str, ...]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grads: list[Tensor]
    rests: list[Tensor]  # with masters
    salts: list[int]  # where parameters are rounded by chance
    rates: ops.AdamWRates
    bad: Tensor  # [2, n] bool


def read_moments(run: Run, bucket: AdamWBucket) -> Moments:
    names = tuple(name for name in bucket.names if run.grads[name] is not None)
    hyper, state = run.hyper_of(bucket), run.state
    wide = run.plan.state[f"{bucket.members[0]}.exp_avg"].dtype
    # Bias correction counts accepted steps. With the guard's scope a bucket, others' skips must not count, so all steps do.
    step = state["guard.step"] + 1
    if run.plan.config.guard_scope == "step":
        step = step - state["guard.skipped"]
    betas = (hyper.adamw_beta1, hyper.adamw_beta2)
    corrections = ((1 - beta.double() ** step.double()).to(wide) for beta in betas)
    rates = ops.AdamWRates(*betas, hyper.adamw_eps, *corrections)
    lists = (
        [run.params[name] for name in names],
        [state[f"{name}.exp_avg"] for name in names],
        [state[f"{name}.exp_avg_sq"] for name in names],
        [run.grad(name) for name in names],
    )
    rests = [state[name + bucket.rest] for name in names] if bucket.rest else []
    salts = [salt for name, salt in zip(bucket.names, bucket.salts, strict=False) if name in names]
    operators = run.operators(bucket)
    bad = operators.adamw_flags(*lists[1:], rates) if names else run.no_flags(2, 0)
    return Moments(names, *lists, rests, salts, rates, bad)


def apply_adamw(run: Run, bucket: AdamWBucket, lists: Moments, skip: Decision) -> None:
    if not lists.names:
        return
    hyper = run.hyper_of(bucket)
    lr, decay = run.rates(bucket, hyper.adamw_lr, hyper.adamw_weight_decay, lists.exp_avgs[0].dtype)
    operators, moments = run.operators(bucket), (lists.exp_avgs, lists.exp_avg_sqs, lists.grads)
    suffixes = ["", *([bucket.rest] if bucket.rest else []), ".exp_avg", ".exp_avg_sq"]
    new: tuple[list[Tensor], ...]
    if bucket.rest:
        new = operators.adamw_wide(
            lists.params, lists.rests, *moments, lr, decay, lists.rates, skip
        )
    else:
        new = operators.adamw(
            lists.params, *moments, lr, decay, lists.rates, skip, *run.chances(lists.salts)
        )
    for suffix, parts in zip(suffixes, new, strict=True):
        for name, part in zip(lists.names, parts, strict=True):
            run.new[name + suffix] = [(None, part)]
