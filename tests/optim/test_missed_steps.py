"""AdamW's bias correction counts the steps that a parameter took part in, as torch.optim.AdamW's.

The oracle is torch.optim.AdamW itself, with the same gradients.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import normuon_fn as nm

BETAS, EPS, DECAY, LR = (0.9, 0.999), 1e-8, 0.1, 0.01
NAMES = ("a", "b", "c")
ADAMW = {"w": nm.Route("normuon"), "*": nm.Route("adamw")}


class Model(nn.Module):
    """One matrix, and vectors that AdamW updates."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))
        for k, name in enumerate(NAMES):
            self.register_parameter(name, nn.Parameter(torch.full((3 + k,), 1.0)))


class Pair:
    """A model under NorMuon, and copies of its vectors under torch.optim.AdamW."""

    def __init__(self, frozen: str = "", plain: bool = False, **given: object) -> None:
        self.model = Model()
        for name in frozen:
            getattr(self.model, name).requires_grad_(False)
        options: dict[str, object] = {
            "lr": LR, "weight_decay": DECAY, "adamw_betas": BETAS, "adamw_eps": EPS,
            "routes": ADAMW, **given,
        }  # fmt: skip
        self.options = options
        given_as = [*self.model.named_parameters()] if plain else self.model
        self.own = nm.NorMuon(given_as, **options)  # type: ignore[arg-type]
        self.oracles = {n: getattr(self.model, n).detach().clone() for n in NAMES}
        self.of_torch = torch.optim.AdamW(
            [*self.oracles.values()], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
        )
        self.draws = torch.Generator().manual_seed(1)

    def steps(self, names: str, count: int = 1, bad: bool = False) -> None:
        """``bad``: NorMuon's guard skips it, so the oracle does not do it."""
        for _ in range(count):
            self.model.w.grad = torch.randn(4, 4, generator=self.draws) * (
                float("nan") if bad else 1
            )
            for name in NAMES:
                p, oracle = getattr(self.model, name), self.oracles[name]
                p.grad = oracle.grad = None
                if name in names:
                    p.grad = torch.randn(p.shape, generator=self.draws)
                    oracle.grad = p.grad.clone()
            self.own.step()
            if not bad:
                self.of_torch.step()

    def check(self) -> None:
        for name, oracle in self.oracles.items():
            # Observed at most: 1.1e-6, of parameters near 1.
            torch.testing.assert_close(getattr(self.model, name), oracle, rtol=1e-5, atol=1e-6)

    def resumed(self, load: Callable[[nn.Module, nm.NorMuon, nm.NorMuon], None]) -> None:
        """Goes on with another model and optimizer."""
        model = copy.deepcopy(self.model)
        fresh = nm.NorMuon(model, **self.options)  # type: ignore[arg-type]
        load(model, self.own, fresh)
        self.model, self.own = model, fresh


@pytest.fixture(autouse=True)
def _without_compiling(eager: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*4th set of parameters")
        yield


def test_a_parameter_that_is_unfrozen_later() -> None:
    pair = Pair(frozen="b")
    pair.steps("ac", 20)
    pair.model.b.requires_grad_(True)
    pair.steps("abc", 10)
    pair.check()


def test_parameters_that_have_a_gradient_in_some_steps() -> None:
    pair = Pair()
    pair.steps("abc", 2)
    for _ in range(8):
        pair.steps("ab")
        pair.steps("a", 2)
        pair.steps("bc")
    pair.check()


def test_a_first_gradient_that_comes_later_and_one_that_never_comes() -> None:
    pair = Pair()
    pair.steps("a", 12)
    pair.steps("ab", 5)
    pair.check()


@pytest.mark.parametrize("scope", ["step", "bucket"])
def test_skipped_steps_are_missed_by_nobody(scope: str) -> None:
    config = nm.Config(guard="full", guard_scope=scope)  # type: ignore[arg-type]
    pair = Pair(config=config, on_skip=None)
    if scope == "bucket":  # of the matrix alone: the vectors move, and all steps count
        pair.steps("ab", 5)
        pair.steps("abc", 7)
    else:
        pair.steps("ab", 5)
        pair.steps("ab", 2, bad=True)
        pair.steps("abc", 1, bad=True)
        pair.steps("abc", 4)
        pair.steps("a", 1, bad=True)
        pair.steps("b", 3)
        pair.steps("abc", 4)
    pair.check()


def test_a_group_that_is_added() -> None:
    pair = Pair(plain=True)
    pair.steps("abc", 15)
    new, oracle = nn.Parameter(torch.ones(2)), torch.ones(2)
    pair.own.add_param_group({"params": [("new", new)], "algorithm": "adamw", "lr": LR})
    pair.of_torch.add_param_group({"params": [oracle]})
    for _ in range(6):
        new.grad = torch.randn(2, generator=pair.draws)
        oracle.grad = new.grad.clone()
        pair.steps("abc")
    pair.check()
    torch.testing.assert_close(new.detach(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["one", "all"])
def test_state_that_is_removed_begins_anew(how: str) -> None:
    pair = Pair()
    pair.steps("ac", 5)
    pair.steps("abc", 10)
    for name in "b" if how == "one" else NAMES:
        del pair.own.state[getattr(pair.model, name)]
        del pair.of_torch.state[pair.oracles[name]]
    if how == "all":
        pair.own.state.clear()
    pair.steps("abc", 6)
    pair.check()


def test_saved_state_that_is_left_out_begins_anew() -> None:
    pair = Pair()
    pair.steps("abc", 15)

    def load(model: nn.Module, old: nm.NorMuon, new: nm.NorMuon) -> None:
        saved = copy.deepcopy(old.state_dict())
        (group,) = saved["param_groups"]
        del saved["state"][group["params"][group["param_names"].index("b")]]
        new.load_state_dict(saved)

    pair.resumed(load)
    del pair.of_torch.state[pair.oracles["b"]]
    pair.steps("abc", 6)
    pair.check()


def _by_state_dict(model: nn.Module, old: nm.NorMuon, new: nm.NorMuon) -> None:
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))


def _by_torch(flat: bool) -> Callable[[nn.Module, nm.NorMuon, nm.NorMuon], None]:
    def load(model: nn.Module, old: nm.NorMuon, new: nm.NorMuon) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(_model_of(old), old, options=options)
        set_optimizer_state_dict(model, new, copy.deepcopy(saved), options=options)

    return load


def _model_of(optimizer: nm.NorMuon) -> nn.Module:
    """The model whose parameters an optimizer has."""
    model = Model()
    (group,) = optimizer.param_groups
    for name, p in zip(group["param_names"], group["params"], strict=True):
        setattr(model, name, p)
    return model


@pytest.mark.parametrize("load", [_by_state_dict, _by_torch(False), _by_torch(True)])
def test_a_run_that_is_resumed_goes_on_with_its_counts(
    load: Callable[[nn.Module, nm.NorMuon, nm.NorMuon], None],
) -> None:
    pair = Pair()
    pair.steps("a", 4)
    pair.steps("ab", 9)  # b came late, c never
    pair.steps("a", 3)  # and b is missing when it is saved
    pair.resumed(load)
    pair.steps("abc", 5)
    pair.check()
    pair.resumed(load)
    pair.steps("ac", 2)
    pair.steps("abc", 5)
    pair.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_with_its_counts(copied: Callable[..., object]) -> None:
    pair = Pair()
    pair.steps("a", 4)
    pair.steps("ab", 9)
    pair.steps("a", 3)
    pair.model, pair.own = copied((pair.model, pair.own))  # type: ignore[misc]
    pair.steps("abc", 5)
    pair.check()


def test_saved_text_says_what_was_missed_and_nothing_where_nothing_was() -> None:
    pair = Pair()
    pair.steps("abc", 3)
    assert "missed" not in pair.own.state_dict()["param_groups"][0]["state_form"]
    pair.steps("ab", 2)
    assert '"missed": "2"' in pair.own.state_dict()["param_groups"][0]["state_form"]
    broken = copy.deepcopy(pair.own.state_dict())
    form = broken["param_groups"][0]["state_form"]
    broken["param_groups"][0]["state_form"] = form.replace('"missed": "2"', '"missed": "two"')
    before = pair.own.state_dict()["param_groups"][0]["state_form"]
    with pytest.raises(ValueError, match="missed is 'two', expected a number"):
        pair.own.load_state_dict(broken)
    assert pair.own.state_dict()["param_groups"][0]["state_form"] == before


def test_a_set_that_stays_is_planned_once_and_reads_no_counts() -> None:
    pair = Pair()
    pair.steps("abc", 3)
    plan = pair.own.plan
    pair.steps("abc", 3)
    assert pair.own.plan is plan and plan is not None and plan.missed == ()
    pair.steps("ab", 2)
    first = pair.own.plan
    pair.steps("abc", 1)
    counted = pair.own.plan
    assert counted is not None and counted is not plan and "c" in counted.missed
    pair.steps("ab", 1)
    assert pair.own.plan is first
    pair.steps("abc", 1)
    assert pair.own.plan is counted  # planned anew once, and no more
    pair.check()


def test_lion_has_no_bias_to_correct() -> None:
    pair = Pair(config=nm.Config(other="lion"))
    pair.steps("ab", 3)
    pair.steps("abc", 1)
    assert pair.own.plan is not None and pair.own.plan.missed == ()


# --- what must not count as missed


def test_moments_that_are_put_in_by_hand_are_no_new_ones() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = nm.NorMuon(
        [("p", p), ("q", q)], lr=LR, adamw_betas=BETAS, algorithm="adamw", weight_decay=0.0
    )
    for x in (p, q):
        ones = {kind: torch.ones(2) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[x].update(ones | {"step": torch.tensor(100_000)})
    p.grad = torch.ones(2)
    optimizer.step()
    q.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((2,), -LR), rtol=1e-4, atol=0)


def test_moments_that_are_removed_from_all_begin_anew() -> None:
    p, oracle = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    optimizer = nm.NorMuon([("p", p)], lr=LR, adamw_betas=BETAS, algorithm="adamw")
    of_torch = torch.optim.AdamW([oracle], lr=LR, betas=BETAS, weight_decay=0.0)
    for k in range(30):
        p.grad = oracle.grad = torch.ones(2) * (1 + k % 3)
        if k == 20:
            for kind in ("exp_avg", "exp_avg_sq"):
                del optimizer.state[p][kind]
            of_torch.state.clear()
        optimizer.step()
        of_torch.step()
    torch.testing.assert_close(p.detach(), oracle, rtol=1e-5, atol=1e-6)


def test_a_master_goes_on_where_moments_are_removed() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    config = nm.Config(master="fp32")
    optimizer = nm.NorMuon([("p", p)], lr=1e-4, algorithm="adamw", config=config)
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = optimizer.state[p]["master"].clone()
    del optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], before - 1e-4, rtol=0, atol=1e-6)


def test_each_set_is_planned_anew_once_at_most() -> None:
    names = [f"b{k}" for k in range(6)]
    named = [(name, nn.Parameter(torch.ones(3))) for name in names]
    optimizer = nm.NorMuon(named, lr=LR, adamw_betas=BETAS, algorithm="adamw")
    plans: set[int] = set()
    kept = []
    for _ in range(3):
        for k in range(6):
            for without in (None, k):
                for i, (_, p) in enumerate(named):
                    p.grad = None if i == without else torch.ones(3)
                optimizer.step()
                kept.append(optimizer.plan)
                plans.add(id(optimizer.plan))
    assert len(plans) <= 9  # of 7 sets


def test_nothing_of_a_plan_is_kept_when_it_is_forgotten() -> None:
    pair = Pair()
    pair.steps("abc")
    plan = weakref.ref(pair.own.plan)
    pair.own.release()
    gc.collect()
    assert plan() is None


def test_a_frozen_parameter_with_a_key_of_somebody_else_and_counters_as_numbers() -> None:
    pair = Pair(frozen="c")
    pair.steps("ab", 2)
    pair.steps("a", 1)
    pair.own.state[pair.model.c]["own"] = 1
    assert '"missed": "1"' in pair.own.state_dict()["param_groups"][0]["state_form"]
    for kind, count in (("step", 3), ("skipped", 0)):
        for own in pair.own.state.values():
            if kind in own:
                own[kind] = count
    assert '"missed": "1"' in pair.own.state_dict()["param_groups"][0]["state_form"]
    pair.steps("ab", 2)
    pair.check()


def test_state_that_is_left_out_of_a_run_with_counts_says_nothing_wrong() -> None:
    pair = Pair()
    pair.steps("ab", 2)
    pair.steps("abc", 2)
    saved = copy.deepcopy(pair.own.state_dict())
    (group,) = saved["param_groups"]
    del saved["state"][group["params"][group["param_names"].index("c")]]
    nm.NorMuon(Model(), **pair.options).load_state_dict(saved)  # type: ignore[arg-type]


@pytest.mark.parametrize(("betas", "most"), [((0.9, 0.95), 1.097), ((0.9, 0.999), 6.569)])
def test_a_functional_step_has_one_count_as_the_guide_says(
    betas: tuple[float, float], most: float
) -> None:
    params = {"b": torch.zeros(2)}
    plan, hyper = nm.make_plan(params), nm.Hyper.of(params, lr=1.0, adamw_betas=betas)
    state = nm.init(params, plan)
    state["guard.step"].fill_(1_000_000)
    moved = []
    for _ in range(40):
        result = nm.update(params, {"b": torch.ones(2)}, state, hyper, plan)
        moved.append(float((result.params["b"] - params["b"]).abs().max()))
        params, state = result.params, result.state
    assert max(moved) == pytest.approx(most, rel=1e-3)  # should be 1
