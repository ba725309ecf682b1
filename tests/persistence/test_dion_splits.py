"""`convert_state` from dion with ``split_sizes``, and other states that carry a factor.

Until its pull request #113 dion multiplied each orthogonalized block by its learning-rate scale
before the variance saw it; since then it does so after. The formulas of both are below, in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from tests import oracle

SIZES, COLS = (16, 4, 12), 8
LR, BETA, BETA2 = 2**-5, 0.9, 0.75  # exact in float32
SCALES: dict[str | None, tuple[Callable[[int, int], float], nm.Config]] = {
    "spectral_norm": (lambda m, n: math.sqrt(m / n), nm.Config.preset("dion")),
    "rms_norm": (
        lambda m, n: 0.2 * math.sqrt(max(m, n)),
        nm.Config.preset("dion", scale="rms", rms=0.2),
    ),
    None: (lambda m, n: 1.0, nm.Config.preset("dion", scale="none")),
}


def gradient(k: int) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((sum(SIZES), COLS))


class Dion:
    """A parameter of dion's NorMuon with split_sizes, before (``scaled``) or after #113."""

    def __init__(self, adjust: str | None, how: str) -> None:
        self.adjust, self.how, self.steps = adjust, how, 0
        self.w, self.m, self.v = gradient(0), np.zeros_like(gradient(0)), np.zeros((sum(SIZES), 1))

    def run(self, steps: int) -> Dion:
        adjust = SCALES[self.adjust][0]
        for _ in range(steps):
            self.steps += 1
            self.m = BETA * self.m + gradient(self.steps)
            at = 0
            for rows in SIZES:
                block = slice(at, at + rows)
                at += rows
                scale = adjust(rows, COLS) / adjust(sum(SIZES), COLS)
                u = oracle.newton_schulz(
                    self.m[block], oracle.POLAR_EXPRESS_CUSHIONED, norm_factor=1.02
                )
                u = u * scale if self.how == "scaled" else u
                self.v[block] += (1 - BETA2) * ((u * u).mean(-1, keepdims=True) - self.v[block])
                n = u / (np.sqrt(self.v[block]) + 1e-8)
                n = n * np.linalg.norm(u) / np.linalg.norm(n)
                n = n if self.how == "scaled" else n * scale
                self.w[block] -= LR * adjust(sum(SIZES), COLS) * n
        return self

    def state_dict(self, **group: Any) -> dict[str, Any]:
        own = {"momentum": torch.tensor(self.m), "variance_neuron": torch.tensor(self.v)}
        about = {"algorithm": "normuon", "step": self.steps, "mu": BETA, "adjust_lr": self.adjust}
        groups = [{"params": ["qkv"], "split_sizes": SIZES, **about, **group}]
        return {"state": {"qkv": own}, "param_groups": groups}


def goes_on(dion: Dion, how: Any, steps: int = 6) -> float:
    """How far a converted run is off after as many steps, relative to the way that it went."""
    params: dict[str, Tensor] = {"qkv": torch.tensor(dion.w)}
    start = params["qkv"]
    plan = nm.make_plan(
        params, SCALES[dion.adjust][1], routes={"qkv": nm.Route(splits=list(SIZES))}
    )
    state: Any = nm.convert_state(dion.state_dict(), plan, source_variance=how)
    hyper = nm.Hyper.of(params, lr=LR, momentum=BETA, beta2=BETA2)
    hyper = hyper._replace(momentum=torch.tensor(BETA, dtype=torch.float64))
    first = dion.steps + 1
    for k in range(first, first + steps):
        params, state, _, _ = nm.update(
            params, {"qkv": torch.from_numpy(gradient(k))}, state, hyper, plan
        )
    want = torch.from_numpy(dion.run(steps).w)
    return float((params["qkv"] - want).norm() / (want - start).norm())


@pytest.mark.parametrize("adjust", SCALES)
@pytest.mark.parametrize("how", ["scaled", "plain"])
def test_a_run_of_dion_with_splits_goes_on_whether_its_variance_was_scaled_or_not(
    adjust: str, how: str
) -> None:
    given = None if adjust is None else how  # without scales there is nothing to ask
    assert goes_on(Dion(adjust, how).run(4), given) < 5e-7  # seen 1e-7: dion's absolute eps, 1e-8


def test_the_other_answer_is_another_run() -> None:
    """The comparison above can tell."""
    assert goes_on(Dion("spectral_norm", "scaled").run(4), "plain") > 1e-3
    assert goes_on(Dion("spectral_norm", "plain").run(4), "scaled") > 1e-3


def plan_of_qkv(**options: Any) -> nm.Plan:
    params = {"qkv": torch.zeros(sum(SIZES), COLS)}
    return nm.make_plan(
        params, nm.Config.preset("dion", **options), routes={"qkv": nm.Route(splits=list(SIZES))}
    )


def test_which_dion_saved_it_is_asked_for_where_the_state_does_not_say() -> None:
    source = Dion("spectral_norm", "scaled").run(1).state_dict()
    with pytest.raises(
        ValueError,
        match=r"'qkv' was trained by dion with split_sizes=\(16, 4, 12\).*source_variance='scaled' "
        r"for the version before, source_variance='plain' for the one after",
    ):
        nm.convert_state(source, plan_of_qkv())
    without = nm.convert_state(source, plan_of_qkv(normalize=False))  # nobody reads the variance
    assert "qkv.variance" not in without
    source["state"]["qkv"].pop("variance_neuron")  # dion's Muon has none
    assert not nm.convert_state(source, plan_of_qkv())["qkv.variance"].any()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"split_sizes": (16, 4)}, "sum up to its 32 rows, its group has"),
        ({"adjust_lr": "muon"}, "'qkv': expected a group with split_sizes to have adjust_lr"),
        ({"split_sizes": None}, "source_variance: 'scaled' is for dion's parameters"),
        ({"adjust_lr": None}, "source_variance: 'scaled' is for dion's parameters"),
        ({"algorithm": "nordion2"}, r"'qkv' has the state of NorDion2 \(Dion3\), whose momentum"),
        ({"algorithm": "dion2"}, "'qkv' has the state of Dion2, whose momentum is not Muon's"),
        ({"algorithm": "dion"}, "'qkv' has the state of Dion, whose momentum is not Muon's"),
    ],
)
def test_what_dion_did_otherwise_is_refused_by_name(group: dict[str, Any], message: str) -> None:
    source = Dion("spectral_norm", "scaled").run(1).state_dict(**group)
    with pytest.raises(ValueError, match=message):
        nm.convert_state(source, plan_of_qkv(), source_variance="scaled")


def test_an_unknown_answer_is_refused() -> None:
    source = Dion("spectral_norm", "scaled").run(1).state_dict()
    with pytest.raises(ValueError, match=r"source_variance: expected None or one of \('scaled', "):
        nm.convert_state(source, plan_of_qkv(), source_variance="old")  # type: ignore[arg-type]


def test_a_variance_with_an_unknown_factor_is_refused() -> None:
    own = {"momentum_buffer": torch.ones(8, 4), "moment2_buffer": torch.ones(8, 1)}
    source = {"state": {0: own}, "param_groups": [{"params": [0], "momentum": 0.9}]}
    params = {"w": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match=r"'w': its moment2_buffer .* may have the square"):
        nm.convert_state(source, nm.make_plan(params), ["w"])
    plan = nm.make_plan(params, nm.Config(normalize=False))
    assert torch.equal(nm.convert_state(source, plan, ["w"])["w.momentum"], own["momentum_buffer"])


def test_steps_of_a_replayed_dion_are_those_that_its_graph_counted() -> None:
    own = {"momentum": torch.ones(4), "variance": torch.ones(4), "step_dev": torch.tensor(7.0)}
    source = {
        "state": {0: own},
        "param_groups": [{"params": [0], "algorithm": "adamw", "step": 3}],
    }
    plan = nm.make_plan({"b": torch.zeros(4)})
    assert int(nm.convert_state(source, plan, ["b"])["guard.step"]) == 7
    own["step_dev"] = torch.tensor(0.0)  # it has had no gradient yet
    assert int(nm.convert_state(source, plan, ["b"])["guard.step"]) == 3


def test_what_has_no_counterpart_is_said_once() -> None:
    b = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([("b", b)], amsgrad=True)
    b.grad = torch.ones(4)
    optimizer.step()
    plan = nm.make_plan({"b": b.detach()})
    with pytest.warns(UserWarning, match=r"leaves out \['max_exp_avg_sq'\] .* \(of 'b'") as said:
        nm.convert_state(optimizer.state_dict(), plan)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.convert_state(torch.optim.AdamW([("b", b)]).state_dict(), plan, missing="zeros")
