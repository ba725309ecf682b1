"""`NorMuon`: make_plan, init and step_ as a `torch.optim.Optimizer`. The algorithm is in step.py, nothing of it here.

param_groups -> names, routes, one Hyper entry a group -> a plan of what has gradients -> step_, or GraphedStep
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..compat import Ranks
from ..distributed import placements as ranks_of
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..routing.resolve import Routes
from ..runtime.compiled import step_
from ..runtime.graphed import GraphedStep
from ..types import Config, Guard, StepResult
from . import groups as groups_of

LateGradients = Literal["replan", "error"]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_COUNTERS = ("step", "skipped", "consecutive")
_KEPT = (
    "config", "late_gradients", "graphed", "_routes", "_mesh", "_guard_mesh", "_added", "_counters", "_stepped",
    "_constructed",
)  # fmt: skip


@dataclass
class _Stage:
    """Everything of a step but the gradients' values, for one choice of parameters."""

    plan: Plan
    at: list[int]  # where its parameters are among all
    params: dict[str, Tensor]
    state: dict[str, Tensor]
    kept: list[
        tuple[Tensor, list[tuple[str, Tensor]]]
    ]  # the tensors of the state of each parameter
    stepped: bool = False
    graphed: GraphedStep | None = None


class NorMuon(torch.optim.Optimizer):
    """NorMuon for matrices and AdamW for the rest, as one compiled graph a step.

    >>> optimizer = nm.NorMuon(model.named_parameters(), lr=0.02, weight_decay=0.1, guard="full")

    Pass ``model.named_parameters()``: without names, embeddings and output heads are matrices like any other. A parameter
    group may have its own ``lr``, ``momentum``, ``beta2``, ``weight_decay``, ``algorithm``, ``adamw_betas``, ``adamw_eps`` and
    ``routes`` (`make_plan`; they go before the optimizer's). ``algorithm="adamw"`` gives AdamW to what ``routes`` of the group
    leave open; under ``"normuon"`` what is no matrix gets AdamW with the group's ``lr``.

    **One step is one graph and one decision of the guard**, whatever the groups: each has an entry of its own in `Hyper`'s
    tensors. A bad matrix in one group skips all (``guard_scope="step"``), or with ``"bucket"`` only the matrices of one shape
    in one group. Matrices of different groups are not orthogonalized as one stack: prefer few groups. Values of a group may be
    floats or tensors of one element (of a tensor that several groups are given, each after the first has a clone); a scheduler
    changes them without a recompile, and a value that cannot be stepped with raises at the step. All parameters lie on one
    device.

    **Gradients.** A step is planned for the parameters that have one, at the first step and whenever others have: each such set
    of parameters is compiled once (and captured once). A parameter without gradient keeps its values and state. With
    ``late_gradients="error"`` a parameter whose first gradient comes later is refused. Where ranks share parameters, they must
    have the same gradients; with ``Config(missing_grads="zeros")`` a missing one counts as zeros and all is one plan. Planning
    is a collective of the ranks of ``mesh`` and ``guard_mesh``: a gradient that comes late on one of them alone makes them wait
    for each other. ``missing_grads="zeros"`` plans once; ``late_gradients="error"`` raises on the rank that has it.

    **State** exists from construction for all that requires a gradient: ``momentum``, ``variance`` or ``exp_avg``,
    ``exp_avg_sq``, in the dtypes of `init`, and for every parameter the guard's counters ``step``, ``skipped``, ``consecutive``
    (the same three tensors). With ``Config.master`` also ``mantissa`` or ``master``, which follows its parameter until the
    first step of it. `load_state_dict` copies into the tensors that are there; others that somebody puts in their place in
    ``optimizer.state``, counters too, are taken at the next step; what was taken out starts anew.

    AdamW's bias correction counts ``step``, also for a parameter whose own first step comes later or that starts anew. After
    many steps nothing corrects its zero moments: with a constant gradient its n-th step is (1 - beta1^n) / sqrt(1 - beta2^n)
    times ``lr``. With (0.9, 0.95) that is 0.45 at first and never more than 1.1; with (0.9, 0.999) 3.2 and up to 6.6: give such
    a group a lower ``lr``, or an optimizer of its own.

    ``torch.amp.GradScaler`` works without a host sync: gradients are unscaled in place, ``found_inf`` skips the step.
    ``torch.compile(optimizer.step)`` leaves the graph for the step, which is compiled already; ``fullgraph=True`` raises.
    ``plan`` and ``result`` are those of the last step, for `check`.

    Args:
        lr: as for `Hyper`: of an update with RMS 0.2, so AdamW's learning rates carry over; see ``Config.scale``.
        config, routes, mesh, guard_mesh: as for `make_plan`, for all groups.
        guard: ``Config.guard``.
        nan_guard_fallback: as in microsoft/dion PR #79, ``guard="output"`` with ``guard_scope="bucket"``, AdamW included.
        graphed: captures the step (`GraphedStep`, CUDA). `zero_grad` then keeps the gradients allocated.

    Raises:
        TypeError, ValueError: as `make_plan` and `Hyper.of`, at construction and from `add_param_group`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        *,
        algorithm: Literal["normuon", "adamw"] = "normuon",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        config: Config | None = None,
        guard: Guard | None = None,
        nan_guard_fallback: bool = False,
        routes: Routes | None = None,
        mesh: Ranks | None = None,
        guard_mesh: Ranks | None = None,
        late_gradients: LateGradients = "replan",
        graphed: bool = False,
    ) -> None:
        if late_gradients not in get_args(LateGradients):
            raise ValueError(
                f"late_gradients: expected one of {get_args(LateGradients)}, got {late_gradients!r}"
            )
        self.config = groups_of.guarded(config, guard, nan_guard_fallback)
        self.late_gradients, self.graphed = late_gradients, graphed
        self._routes, self._mesh, self._guard_mesh = routes, mesh, guard_mesh
        self._added: list[groups_of.Added] = []
        self._counters: dict[str, Tensor] = {}
        self._stepped: set[str] = set()  # whose masters no longer follow their parameters
        self._constructed = False
        self._forget()
        defaults = {
            "lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "algorithm": algorithm,
            "adamw_betas": adamw_betas, "adamw_eps": adamw_eps,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._constructed = True
        self._settle()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True for a GradScaler that asks: it leaves `grad_scale` and `found_inf` to the step, and does not wait.

        False for anybody else: Lightning refuses to clip where it is True, in bf16-mixed too. Where not, it has the gradients
        unscaled, clips them, and steps through its GradScaler.
        """
        return isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler)

    def _forget(self) -> None:
        """What follows from parameters, groups and state, and is made again at the next step."""
        for stage in getattr(self, "_stages", {}).values():
            if stage.graphed is not None:
                stage.graphed.release()
        self._stages: dict[tuple[bool, ...], _Stage] = {}
        self._looks: list[Any] = []
        self._had: set[str] | None = None  # who had a gradient so far
        self.plan: Plan | None = None
        self.result: StepResult | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss, if ``closure`` computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    @torch.compiler.disable(
        reason="NorMuon.step is one compiled graph already: call it outside of torch.compile, or without fullgraph=True. "
        "For a graph of your own there is normuon_fn.update"
    )
    @torch.no_grad()
    def _advance(self) -> None:
        params = self._resettle()
        grads = [p.grad for p in params]
        if self.config.missing_grads == "zeros":
            among = tuple(p.requires_grad for p in params)
        else:
            among = tuple([grad is not None for grad in grads])
        if not any(among):
            return
        stage = self._stages.get(among)
        if stage is None or not stage.stepped:
            stage = self._first(among)
        else:
            held = [(self.state[p], kept) for p, kept in stage.kept]
            if any([now.get(kind) is not own for now, kept in held for kind, own in kept]):  # noqa: C419 - a list is faster
                self._adopt(stage)
        fresh = stage.params.keys() - self._stepped
        if fresh:  # their masters follow them until here: they may have been loaded meanwhile
            groups_of.refresh({name: stage.params[name] for name in fresh}, stage.state)
        self._hyper.follow(self.param_groups)
        given = dict(zip(stage.params, [grads[k] for k in stage.at], strict=True))
        found_inf = self._unscale(given)
        if stage.graphed is not None:
            result = stage.graphed(
                stage.params, given, stage.state, self._hyper.hyper, found_inf=found_inf
            )
        else:
            result = step_(
                stage.params, given, stage.state, self._hyper.hyper, stage.plan, found_inf=found_inf
            )
        self.plan, self.result, stage.stepped = stage.plan, result, True
        self._stepped |= fresh

    def _unscale(self, grads: Mapping[str, Tensor | None]) -> Tensor | None:
        """What `torch.amp.GradScaler` left for the step. ``found_inf``, in a tensor that stays."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            inverse = scale.double().reciprocal().float().reshape(())
            torch._foreach_mul_(
                [ranks_of.local(grad) for grad in grads.values() if grad is not None], inverse
            )
        return (
            None
            if found_inf is None
            else self._found_inf.copy_(found_inf.reshape(()), non_blocking=True)
        )

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """As every optimizer's; ``set_to_none`` is True unless the step is ``graphed``."""
        super().zero_grad(not self.graphed if set_to_none is None else set_to_none)

    def release(self) -> None:
        """Frees captured graphs: before ``torch.distributed.destroy_process_group()``."""
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Another group, with the defaults of the constructor. The next step is planned and compiled anew."""
        if isinstance(param_group, dict):
            groups_of.check_keys(param_group, self.defaults)
            routes = param_group.get("routes")
            param_group = {key: value for key, value in param_group.items() if key != "routes"}
        super().add_param_group(param_group)
        self._added.append(groups_of.added(self.param_groups, {} if routes is None else routes))
        try:
            groups_of.settle_values(self.param_groups[-1])
            if self._constructed:
                self._settle()
        except BaseException:
            self.param_groups.pop()
            self._added.pop()
            self._forget()
            raise

    def _settle(self) -> None:
        """Names, routes, hyperparameters and state of the parameters that there are now."""
        self._forget()
        self._added = groups_of.named_again(self.param_groups, self._added)
        self._named, self._hyper_of = groups_of.names_of(self._added)
        params = list(self._named.values())
        self._routed = groups_of.route(self._added, self._routes, self._named)
        device = ranks_of.local(params[0]).device if params else torch.device("cpu")
        self._hyper = groups_of.GroupHyper(1 + max(self._hyper_of.values(), default=0), device)
        self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        here = set(map(id, params))
        for p in [p for p in self.state if id(p) not in here]:
            del self.state[p]
        self._looks = groups_of.looks_of(self.param_groups)
        among = tuple(p.requires_grad for p in params)
        if any(among):
            self._stages[among] = self._made(among)

    def _resettle(self) -> list[Tensor]:
        """All parameters; settled again if they are not those that were."""
        if self._looks != groups_of.looks_of(self.param_groups):
            self._settle()
        return [p for group in self.param_groups for p in group["params"]]

    def _first(self, among: tuple[bool, ...]) -> _Stage:
        """The stage of a set of parameters that has not been stepped before."""
        names = {name for name, here in zip(self._named, among, strict=True) if here}
        late = (
            [] if self._had is None else [name for name in self._named if name in names - self._had]
        )
        if late and self.late_gradients == "error":
            raise ValueError(
                f"{late[:8]}: first gradient after the first step, which means another plan and another compilation. "
                "Give zeros from the start, freeze it (requires_grad_(False)), or take late_gradients='replan'"
            )
        if among in self._stages:
            stage = self._stages[among]
            self._adopt(stage)
        else:
            stage = self._made(among)
        if self.graphed:
            groups_of.check_device(stage.plan.device, GraphedStep._device_type)
            stage.graphed = GraphedStep(stage.plan)
        self._had = names | (self._had or set())
        self._stages[among] = stage
        return stage

    def _made(self, among: tuple[bool, ...]) -> _Stage:
        params = {
            name: p for (name, p), here in zip(self._named.items(), among, strict=True) if here
        }
        devices = {str(ranks_of.local(p).device): name for name, p in params.items()}
        if len(devices) > 1:
            raise ValueError(
                f"params: expected one device, got {devices}; make one optimizer a device"
            )
        plan = make_plan(
            params, self.config, routes={name: route for name, route in self._routed.items() if name in params},
            mesh=self._mesh, guard_mesh=self._guard_mesh, hyper_of=self._hyper_of if self._hyper.several else None,
        )  # fmt: skip
        for group in plan.shared_by:
            ranks_of.check_alike(plan.summary, group)
        stage = _Stage(plan, [k for k, here in enumerate(among) if here], params, {}, [])
        self._adopt(stage)
        return stage

    def _adopt(self, stage: _Stage) -> None:
        """Takes a stage's state from where everybody sees it: frameworks move it to the host, and back as other tensors."""
        self._recount()
        for key, spec in stage.plan.state.items():
            name, _, kind = key.rpartition(".")
            param = None if name == "guard" and kind in _COUNTERS else stage.params[name]
            owner = self._counters if param is None else self.state[param]
            stage.state[key] = groups_of.keep(
                owner, name, kind, spec, stage.plan.device, name in self._stepped, param
            )
        for name, p in stage.params.items():
            for kind in {"mantissa", "master"} & self.state[p].keys():
                if f"{name}.{kind}" not in stage.plan.state:  # of a parameter that was bfloat16
                    del self.state[p][kind]
        for p in [*stage.params.values(), *(p for p, kept in self.state.items() if kept)]:
            self.state[p].update(self._counters)
        stage.kept = [(p, [*self.state[p].items()]) for p in stage.params.values()]

    def _recount(self) -> None:
        """The counters of all parameters are the same tensors: what somebody put in their place is copied into them."""
        for kind, own in self._counters.items():
            seen = [kept[kind] for kept in self.state.values() if kind in kept]
            if not seen:
                own.zero_()
            for other in [x for x in seen if x is not own][:1]:
                own.copy_(torch.as_tensor(other).reshape(()))

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; hyperparameters as plain numbers."""
        self._resettle()
        packed = super().state_dict()
        if "param_groups" in packed:  # unless a hook made something else of it
            packed["param_groups"] = [*map(groups_of.plain, packed["param_groups"])]
        return packed

    @torch.compiler.disable
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies a `state_dict` into this optimizer's tensors, whose dtypes stay. Nothing is written if anything does not fit.

        A parameter that has no state in it, because it was frozen, starts anew.

        Raises:
            ValueError, TypeError: other groups, algorithms or values, or a state of another kind or shape; by the name of the
                parameter or the group.
        """
        given: Any = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        self._resettle()
        self._recount()
        groups = groups_of.saved_groups(self.param_groups, given)
        keys = [key for group in given["param_groups"] for key in group["params"]]
        names = [name for group in given["param_groups"] for name in group.get("param_names", ())]
        if (
            set(names) != self._named.keys()
        ):  # without names, or of a wrapped model: in the order that they are in
            names = [*self._named]
        found = {name: given["state"].get(key) or {} for name, key in zip(names, keys, strict=True)}
        theirs = {name: found[name] for name in self._named}
        lacks = tuple(
            bool(theirs[name]) and not self.state.get(p) for name, p in self._named.items()
        )
        try:
            if any(lacks):
                self._made(lacks)
            copies = [
                groups_of.pairs(name, self.state[p], theirs[name])
                for name, p in self._named.items()
                if theirs[name]
            ]
        except BaseException:
            for p in compress(self._named.values(), lacks):
                self.state.pop(p, None)
            raise
        with torch.no_grad():
            for into, value in chain.from_iterable(copies):
                into.copy_(value)
            for p in [p for name, p in self._named.items() if not theirs[name] and p in self.state]:
                del self.state[p]
            for stage in self._stages.values():
                self._adopt(stage)
        groups_of.take(self.param_groups, groups)
        begun = (
            self._named.keys() if self._counters and self._counters["step"] > 0 else self._stepped
        )
        self._stepped = {name for name in begun if theirs.get(name)}
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
