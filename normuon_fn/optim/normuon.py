"""`NorMuon`: `make_plan`, `init` and `step_` as a `torch.optim.Optimizer`, without an algorithm.

param_groups -> names, routes, a Hyper -> a plan for what has gradients -> step_ or GraphedStep
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..compat import Ranks, outside_inference_mode, read_by_grad_scaler
from ..compat.graphs import outside_graphs
from ..planning.before_ranks import check_ranks, is_before_ranks
from ..planning.deciding import Alone
from ..planning.plan import Plan
from ..routing.resolve import Routes
from ..runtime.compiled import step_
from ..types import Config, Guard, StepResult
from . import groups as groups_of
from . import hyper as hyper_of
from . import state as state_of
from .group_names import with_names_alike
from .metrics import metrics_of
from .missed_steps import MissedSteps
from .offloading import Offloading, wait_for_copies_sync
from .participation import with_missed_steps
from .planned import Planner
from .reports import OnSkip, Reports
from .routed import Params, decide_new, of_model
from .saved_meaning import routes_of, write_forms
from .saving import SavedOptimizer
from .scaled import forget_scale, unscaled

LateGradients = Literal["replan", "error"]
_SAVED = (  # what a pickle or a copy has besides what every optimizer has
    "config", "late_gradients", "graphed", "_routes", "_mesh", "_guard_mesh", "_added", "_begun",
    "_constructed", "_reports", "_owners", "_offloaded", "without_gradients", "_before_ranks",
    "_missed",
)  # fmt: skip


class NorMuon(Offloading, SavedOptimizer):
    """NorMuon for matrices and AdamW for all other parameters, one compiled graph per step.

    >>> optimizer = nm.NorMuon(model, lr=0.01, weight_decay=0.1, guard="full")

    Pass the model, whose modules tell every route (`routes_for`). Parameters or groups of them are
    taken too: with ``routes=nm.routes_for(model)`` they are found in the model; with names alone,
    what these cannot tell is said in one warning. All parameters are on one device. A group may
    have its own ``lr``, ``momentum``, ``beta2``, ``weight_decay``, ``algorithm``, ``adamw_*`` and
    ``routes`` (as for `make_plan`; they go before the optimizer's). With ``algorithm="adamw"`` a
    group's parameters get AdamW, at its ``lr``, unless its ``routes`` say otherwise. With
    ``"normuon"`` its matrices get NorMuon, and its other parameters AdamW. Routes are decided once,
    when a parameter is added.

    **Groups.** All groups are one graph with one decision of the guard: a bad matrix in one group
    skips the step of all groups (``guard_scope="step"``), or that of the matrices of its shape in
    its group (``"bucket"``). A hyperparameter is a float or a tensor of one element, which several
    groups may share. Schedulers change them without a recompilation.

    **Gradients.** A step is planned for the parameters that have a gradient: at the first step, and
    whenever the set of these parameters is new. Each set is compiled once (and captured once), and
    once more when a parameter of AdamW's in it has missed steps. A parameter without a gradient
    keeps its value and its state. Ranks that share parameters agree on a new set: one that lacks a
    gradient is named by an error. ``Config(missing_grads="zeros")`` takes a missing gradient as
    zeros and plans only once. ``late_gradients="error"`` raises when the first gradient of a
    parameter comes after the first step.

    **State** exists from construction for every parameter that requires a gradient: ``momentum``
    and ``variance``, or ``exp_avg`` and ``exp_avg_sq``, in the dtypes of `init`; all share the
    guard's ``step``, ``skipped`` and ``consecutive``. With ``Config.master`` there is ``mantissa``
    or ``master``, which follows its parameter until its first step. Tensors that are put into
    ``optimizer.state`` are used from the next step on. State that is removed starts anew.

    AdamW corrects its bias by the steps that a parameter took part in since its moments began, as
    torch.optim.AdamW does: ``step`` less those it missed, which ``state_dict`` has in the groups.

    ``torch.amp.GradScaler`` works without a host sync: the step unscales the gradients in place.
    ``torch.compile`` leaves its graph for the step, which is compiled already, and raises with
    ``fullgraph=True``. ``plan`` and ``result`` are of the last step; pass them to `check`.

    Args:
        lr: as in `Hyper`: the update has RMS 0.2 before ``lr`` (see ``Config.scale``), so AdamW's
            learning rates carry over.
        adamw_lr, adamw_weight_decay: AdamW's, ``None``: as for matrices. ``adamw_lr`` holds while
            ``lr`` is what its group was added with, and follows a scheduler in proportion.
        config, routes, mesh, guard_mesh: as for `make_plan`, for all groups.
        guard: as in ``config``. nan_guard_fallback: dion PR #79, ``"output"`` per bucket.
        graphed: captures the step (`GraphedStep`), and `zero_grad` keeps gradients allocated.
        on_skip, max_consecutive: as in `SkipMonitor`. ``"auto"``: ``"warn"`` with a guard.

    Raises:
        TypeError, ValueError: as `make_plan` and `Hyper.of`; if the model replaced parameters.
        NonFiniteStepError: from a step, as ``on_skip`` and ``max_consecutive`` ask for.
    """

    @groups_of.with_config_hints
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        algorithm: Literal["normuon", "adamw"] = "normuon",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        config: Config | None = None,
        guard: Guard | None = None,
        nan_guard_fallback: bool = False,
        routes: Routes | None = None,
        mesh: Ranks | Alone | None = None,
        guard_mesh: Ranks | None = None,
        late_gradients: LateGradients = "replan",
        graphed: bool = False,
        on_skip: OnSkip = "auto",
        max_consecutive: int | None = None,
    ) -> None:
        groups_of.check_choice("late_gradients", late_gradients, get_args(LateGradients))
        self.config = groups_of.with_guard(config, guard, nan_guard_fallback)
        self.late_gradients, self.graphed = late_gradients, graphed
        self._reports = Reports(self.config, on_skip, max_consecutive)
        self._mesh, self._guard_mesh = mesh, guard_mesh
        self._before_ranks = is_before_ranks(mesh, guard_mesh)
        self._added: list[groups_of.AddedGroup] = []
        self._owners: dict[str, int] = {}  # with Config(replicas="share")
        self._begun: set[str] = set()  # stepped, so that a master no longer follows its parameter
        self._missed = MissedSteps()
        self._constructed = self._offloaded = False
        self.without_gradients = False  # the last step, in which nothing was done
        self._planner: Planner | None = None
        self.plan: Plan | None = None  # of the last step
        self.result: StepResult | None = None  # of the last step
        defaults = {
            "lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay,
            "algorithm": algorithm, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps,
            "adamw_lr": adamw_lr, "adamw_weight_decay": adamw_weight_decay,
        }  # fmt: skip
        taken, self._routes = of_model(params, routes)
        super().__init__(taken, defaults)
        self._constructed = True
        self._settle().warn_if_alone()
        groups_of.check_used(self.defaults, self._added)
        hyper_of.say_if_nothing_decays(
            self.defaults, [*routes_of(self._added).values()], self.config
        )

    metrics = metrics_of

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True for a GradScaler, which then leaves `grad_scale` and `found_inf` to the step.

        False for others: Lightning refuses to clip gradients where it reads True, even without a
        GradScaler. Where it reads False it unscales, clips, and steps through its GradScaler.
        """
        return read_by_grad_scaler()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Does one step. Returns the loss if ``closure`` computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step_once()
        except BaseException:
            forget_scale(self)
            raise
        return loss

    @outside_graphs(
        "NorMuon.step is one compiled graph already: call it outside of torch.compile, or without "
        "fullgraph=True. For a graph of your own there is normuon_fn.update"
    )
    @torch.no_grad()
    def _step_once(self) -> None:
        self._reports.before_step(self.param_groups, self.defaults)
        planner = self._loaded()
        grads = [p.grad for p in planner.named.values()]
        if all(grad is None for grad in grads):
            self._reports.check_gradients(planner.named)
        if self.config.missing_grads == "zeros":
            chosen = tuple([p.requires_grad for p in planner.named.values()])
        else:
            chosen = tuple([grad is not None for grad in grads])
        planner.agree(chosen)
        self.without_gradients = not any(chosen)
        if self.without_gradients:
            return
        planned = planner.steps.get(chosen)
        if planned is None or not planned.stepped:
            self._reports.check_gradients(planner.named)
            how: Any = {"late": self.late_gradients, "graphed": self.graphed}
            planned = planner.first(chosen, self.state, self._begun, **how)
        elif not planned.is_current(self.state):
            planner.collect(planned, self.state, self._begun)
        fresh = planned.params.keys() - self._begun
        if planned is not self._missed.planned or self._missed.has_new(planned.params):
            planned = with_missed_steps(planner, chosen, planned, self.state, self._begun)
        check_ranks(planned.plan)
        if fresh:  # their parameters may have been loaded since construction
            params = {name: planned.params[name] for name in fresh}
            state_of.follow_parameters(params, planned.state)
        self._reports.look_at_models(self.param_groups)
        planner.follow(self.param_groups, planned)
        named_grads = dict(zip(planned.params, [grads[k] for k in planned.places], strict=True))
        arguments = planned.params, named_grads, planned.state, planner.hyper.hyper
        with unscaled(self, named_grads, planner.found_inf) as found_inf:
            if planned.graphed is not None:
                result = planned.graphed(*arguments, found_inf=found_inf)
            else:
                result = step_(*arguments, planned.plan, found_inf=found_inf)
        self.plan, self.result, planned.stepped = planned.plan, result, True
        self._begun |= fresh
        self._missed.stepped(planned.params)
        self._reports.after_step(result, planned.plan)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """As for every optimizer; by default ``set_to_none`` is True unless ``graphed``."""
        super().zero_grad(not self.graphed if set_to_none is None else set_to_none)

    def release(self) -> None:
        """Frees captured graphs. Call it before ``torch.distributed.destroy_process_group()``."""
        self._forget()

    # --- groups, and the plans that follow from them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with the constructor's defaults. The next step is planned and compiled."""
        if isinstance(written := param_group, dict):
            groups_of.check_keys(written, self.defaults)
            alike = with_names_alike(written, self.param_groups)
            param_group = {key: value for key, value in alike.items() if key != "routes"}
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "more than one parameter group" not in str(error):
                raise
            raise ValueError(
                "param_group: has parameters that the optimizer has already. Those that are frozen "
                "are in it too, and are stepped from when they require a gradient: leave them out"
            ) from error
        try:
            self._added.append(groups_of.remember_last(self.param_groups, written))
            hyper_of.check_hyperparameters(self.param_groups[-1])
            hyper_of.check_read(self.param_groups[-1], self.config)
            if self._constructed:
                self._settle()
        except BaseException:
            self.param_groups.pop()
            del self._added[len(self.param_groups) :]
            self._forget()
            raise

    def _settled(self) -> Planner:
        """The planner for the parameters that there are now."""
        planner = self._planner
        if planner is None or planner.fingerprint != groups_of.fingerprint_of(self.param_groups):
            planner = self._settle()
        return planner

    @outside_inference_mode
    def _settle(self) -> Planner:
        before = [] if self._planner is None else self._planner.fingerprint
        self._forget()
        named = groups_of.named_again(self.param_groups, self._added)
        self._added = decide_new(named, self._routes)
        self._reports.remember_models(self._added, self._routes)
        write_forms(self.param_groups, self._added, self.config)
        ranks = self._mesh, self._guard_mesh, self._owners
        planner = Planner(self.param_groups, self._added, self.config, *ranks)
        planner.before_ranks, planner.missed = self._before_ranks, self._missed
        present = set(map(id, planner.named.values()))
        for p in [p for p in self.state if isinstance(p, Tensor) and id(p) not in present]:
            del self.state[p]
        planner.prepare(self.state, self._begun, self._offloaded, before)
        self._planner = planner
        return planner

    def _forget(self) -> None:
        """Drops what follows from the groups. The next step makes it again."""
        if self._planner is not None:
            self._planner.release()
        self._planner = self.plan = self.result = self._missed.planned = None

    def __getstate__(self) -> dict[str, Any]:
        wait_for_copies_sync(self._planner)
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _SAVED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_missed", MissedSteps())  # of those pickled before there was any
        self._planner = self.plan = self.result = None
