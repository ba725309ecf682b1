"""The Triton kernels of a step, compiled by a thread while dynamo traces the step."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..ops.compiling import beforehand
from ..planning.make_plan import plan_of
from ..planning.plan import Plan
from ..routing.routes import Decision
from ..step import init
from ..types import Hyper
from . import streams
from .eager import StepFunction

logger = logging.getLogger("normuon_fn")


@contextlib.contextmanager
def compiling_kernels_beside(plan: Plan, function: StepFunction) -> Iterator[None]:
    """A thread compiles the Triton kernels of a step while dynamo traces it here.

    It takes a step of one parameter of each kind in `beforehand`: the first step then finds its
    kernels. Where matrices have rates of their own it takes two, because kernels for one are
    others. At the end it is done: a capture that the user begins after the first step would fail
    if another thread were at work on the device.
    """
    if plan.config.orthogonalizer is not None:  # the user's function may not expect another thread
        yield
        return
    thread = threading.Thread(
        target=_compile_kernels, args=(plan, function), name="normuon_fn kernels"
    )
    with contextlib.suppress(RuntimeError):  # no thread can be had: the step compiles by itself
        thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:  # it began
            thread.join()


def _compile_kernels(plan: Plan, function: StepFunction) -> None:
    kinds: dict[Any, dict[Any, Any]] = {}
    for p in plan.parameters:
        kind = p.spec, p.route.algorithm, tuple((b.count, b.param) for b in p.blocks)
        alike, rates = kinds.setdefault(kind, {}), (p.hyper, p.route.lr_mul, p.route.wd_mul)
        if len(alike) < (1 if plan.own_rates is None else 2):
            alike.setdefault(rates, p)
    some = [p for alike in kinds.values() for p in alike.values()]
    try:
        with (
            torch.cuda.device(plan.device),
            torch.cuda.stream(streams.beside(plan.device)),
            beforehand(plan.device),
        ):
            params = {
                p.name: torch.ones(p.spec.shape, dtype=p.spec.dtype, device=plan.device)
                for p in some
            }
            decisions = {p.name: Decision(p.route, p.reason) for p in some}
            hyper, hyper_of = Hyper.of(params, lr=0.0), None
            if plan.hypers:
                hyper, hyper_of = (
                    Hyper.stack([hyper] * len(some)),
                    {p.name: k for k, p in enumerate(some)},
                )
            few = plan_of(params, decisions, plan.config, hyper_of=hyper_of)
            function(params, params, init(params, few), hyper, few)
    except Exception:  # the step itself raises what is wrong with it
        logger.debug("The first step compiles its kernels by itself", exc_info=True)
