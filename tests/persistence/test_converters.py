"""`convert_state`: a run continues where another optimizer stopped.

The other optimizer continues beside it, by the oracle's float64 formulas. The state dicts have the
layouts of microsoft/dion 0a059a4, KellerJordan/Muon 00ba60d and zichongli5/NorMuon e5aaaf4; torch's
own optimizers run themselves.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.ops.rounding import joined_with
from tests import oracle

Tensors = dict[str, Tensor]
SHAPES = {"z": (12, 8), "a": (8, 12), "b": (10,)}  # "b" is Adam's
LR, BETA, BETA2, DECAY = 2**-5, 0.9, 0.8, 0.25  # exact in float32
ADAM = {"lr": 2**-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 2**-4}
THEN = 3  # steps of both after the change

MUON = {"normalize": False, "nesterov": True, "coefficients": "simple", "scale": "muon"}
KELLER_JORDAN = oracle.Rule(normalize=False, nesterov=True, scale="muon", rows=oracle.SIMPLE * 5)
PEERS: dict[str, tuple[Any, nm.Config]] = {
    "dion": (lambda *a: oracle.peer_dion(*a, 1e-8), nm.Config.preset("dion")),
    "author": (oracle.peer_author, nm.Config.preset("author")),
    "muon": (
        lambda w, g, m, v, lr, beta, beta2, wd: oracle.normuon_matrix(
            KELLER_JORDAN, w, g, m, v, lr=lr, beta=beta, beta2=beta2, weight_decay=wd
        ),
        nm.Config(**MUON),
    ),
}


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


class Peer:
    """Another optimizer's run, by the formulas of the oracle: ``w``, ``m`` and ``v`` by name."""

    def __init__(self, kind: str) -> None:
        self.step_of, self.config = PEERS[kind]
        self.w, self.steps = arrays(0), 0
        self.m: dict[str, Any] = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.v: dict[str, Any] = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.v |= {name: np.zeros((len(self.w[name]), 1)) for name in "za"}

    def run(self, steps: int) -> Peer:
        for _ in range(steps):
            self.steps += 1
            for name, grad in arrays(self.steps).items():
                now = self.w[name], grad, self.m[name], self.v[name]
                if name == "b":
                    self.w[name], self.m[name], self.v[name] = oracle.adamw(
                        *now, self.steps, **ADAM
                    )
                else:
                    self.w[name], self.m[name], self.v[name] = self.step_of(
                        *now, LR, BETA, BETA2, DECAY
                    )
        return self

    def tensors(self, of: str) -> Tensors:
        return {
            name: torch.from_numpy(np.array(value)) for name, value in getattr(self, of).items()
        }


def dion(peer: Peer) -> tuple[dict[str, Any], list[str]]:
    m, v = peer.tensors("m"), peer.tensors("v")
    state = {0: {"momentum": m["b"], "variance": v["b"]}}
    state |= {
        k: {"momentum": m[name], "variance_neuron": v[name]} for k, name in ((1, "z"), (2, "a"))
    }
    groups = [
        {"params": [0], "algorithm": "adamw", "step": peer.steps, "mu": BETA},
        {"params": [1, 2], "algorithm": "normuon", "step": peer.steps, "mu": BETA},
    ]
    return {"state": state, "param_groups": groups}, ["b", "z", "a"]


def author(peer: Peer) -> tuple[dict[str, Any], list[str]]:
    m, v = peer.tensors("m"), peer.tensors("v")
    state: dict[int, Any] = {
        k: {"momentum_buffer": m[n], "second_momentum_buffer": v[n]} for k, n in enumerate("az")
    }
    state[2] = {"exp_avg": m["b"], "exp_avg_sq": v["b"], "step": peer.steps}
    groups = [
        {"params": [0, 1], "use_muon": True, "momentum": BETA, "beta2": BETA2},
        {"params": [2], "use_muon": False, "betas": (0.9, 0.95)},
    ]
    return {"state": state, "param_groups": groups}, ["a", "z", "b"]


def muon(peer: Peer) -> tuple[dict[str, Any], list[str]]:
    given, names = author(peer)
    for own in given["state"].values():
        own.pop("second_momentum_buffer", None)
    return given, names


LAYOUTS = {"dion": dion, "author": author, "muon": muon}


def plan_for(config: nm.Config, params: Tensors) -> tuple[nm.Plan, nm.Hyper]:
    hyper = nm.Hyper.of(
        params,
        lr=LR,
        momentum=BETA,
        beta2=BETA2,
        weight_decay=DECAY,
        adamw_lr=ADAM["lr"],
        adamw_weight_decay=ADAM["weight_decay"],
    )
    exact = {
        field: getattr(hyper, field)
        for field in ("momentum", "beta2", "adamw_beta1", "adamw_beta2", "adamw_eps")
    }
    wanted = {
        "momentum": BETA,
        "beta2": BETA2,
        "adamw_beta1": 0.9,
        "adamw_beta2": 0.95,
        "adamw_eps": 1e-8,
    }
    doubled = {field: torch.tensor(wanted[field], dtype=torch.float64) for field in exact}
    return nm.make_plan(params, config), hyper._replace(**doubled)


def goes_on(plan: nm.Plan, hyper: nm.Hyper, params: Tensors, state: Tensors, first: int) -> Tensors:
    for k in range(THEN):
        grads = {name: torch.from_numpy(grad) for name, grad in arrays(first + 1 + k).items()}
        params, state, _, _ = nm.update(params, grads, state, hyper, plan)
    return params


@pytest.mark.parametrize("form", [None, "sum", "ema"])
@pytest.mark.parametrize("kind", PEERS)
def test_a_run_goes_on_as_the_other_optimizer_would_have(kind: str, form: str | None) -> None:
    peer = Peer(kind).run(4)
    config = (
        peer.config
        if form is None
        else nm.Config.preset("dion", momentum_form=form)
        if kind == "dion"
        else None
    )
    if config is None:  # with nesterov too, a sum is the average times one number
        fields = {f: getattr(peer.config, f) for f in peer.config.__dataclass_fields__}
        config = nm.Config(**{**fields, "momentum_form": form})
    params = peer.tensors("w")
    plan, hyper = plan_for(config, params)
    given, names = LAYOUTS[kind](peer)
    state = nm.convert_state(given, plan, names)
    assert list(state) == list(nm.init(plan, params)) and int(state["guard.step"]) == 4
    got, want = goes_on(plan, hyper, params, state, 4), peer.run(THEN).tensors("w")
    for name in SHAPES:
        error = (got[name] - want[name]).norm() / (want[name] - params[name]).norm()
        assert error < 5e-11, (
            name,
            float(error),
        )  # seen 7e-12: the eps added to a norm by one of them


def test_the_start_from_zeros_is_another_run() -> None:
    """The comparison above can tell."""
    peer = Peer("dion").run(4)
    params = peer.tensors("w")
    plan, hyper = plan_for(peer.config, params)
    got, want = goes_on(plan, hyper, params, nm.init(plan, params), 4), peer.run(THEN).tensors("w")
    for name in SHAPES:
        assert (got[name] - want[name]).norm() / (want[name] - params[name]).norm() > 0.05


def test_torchs_muon_and_adamw_hand_over_to_one_state_and_the_run_goes_on() -> None:
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(48, 32)), nn.Parameter(torch.randn(32))
    of_w = torch.optim.Muon([("w", w)], lr=0.02, weight_decay=0.1, momentum=0.9)
    of_b = torch.optim.AdamW([("b", b)], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> Tensors:
        w.grad, b.grad = torch.randn(48, 32), torch.randn(32)
        grads = {"w": w.grad.clone(), "b": b.grad.clone()}
        of_w.step()
        of_b.step()
        return grads

    for _ in range(5):
        step()
    params = {"w": w.detach().clone(), "b": b.detach().clone()}
    before = {name: p.clone() for name, p in params.items()}
    config = nm.Config(**MUON, method="standard", orthogonalize_dtype=torch.bfloat16)
    plan = nm.make_plan(params, config)
    state = nm.convert_state([of_w.state_dict(), of_b.state_dict()], plan)  # which know the names
    assert (
        torch.equal(state["w.momentum"], of_w.state[w]["momentum_buffer"])
        and int(state["guard.step"]) == 5
    )
    assert torch.equal(state["b.exp_avg_sq"], of_b.state[b]["exp_avg_sq"])
    hyper = nm.Hyper.of(
        params, lr=0.02, momentum=0.9, weight_decay=0.1, adamw_lr=0.01, adamw_betas=(0.9, 0.95)
    )
    for _ in range(THEN):
        params, state, _, _ = nm.update(params, step(), state, hyper, plan)
    moved = {name: (p - before[name]).norm() for name, p in params.items()}
    assert (params["w"] - w.detach()).norm() / moved["w"] < 0.04  # seen 0.01: products in bfloat16
    assert (params["b"] - b.detach()).norm() / moved[
        "b"
    ] < 2e-5  # seen 5e-6: the bias correction, there in float64


def test_names_are_found_in_the_order_of_an_optimizer_that_sorts() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    optimizer = torch.optim.SGD(
        sorted(model.parameters(), key=lambda p: p.size(), reverse=True), lr=0.1
    )
    assert nm.names_in(optimizer, model.named_parameters()) == ["1.weight", "0.weight"]
    with pytest.raises(ValueError, match=r"got none for 1 of them, of shapes \[\(8, 4\)\]"):
        nm.names_in(optimizer, {"0.weight": model[0].weight})


def test_a_variance_by_kernel_rows_becomes_that_of_the_flattened_row() -> None:
    theirs = torch.rand(
        6, 4, 3, 1
    )  # of a convolution, param[..., :1]: means over the last dimension
    params = {"conv": torch.randn(6, 4, 3, 3)}
    plan = nm.make_plan(params, routes={"conv": nm.Route(flatten=True)})
    given = {
        "state": {
            0: {"momentum_buffer": torch.randn(6, 4, 3, 3), "second_momentum_buffer": theirs}
        },
        "param_groups": [{"params": [0], "momentum": 0.9}],
    }
    state = nm.convert_state(given, plan, ["conv"])
    assert state["conv.variance"].shape == (6, 1)
    torch.testing.assert_close(
        state["conv.variance"][:, 0], theirs.expand(6, 4, 3, 3).flatten(1).mean(1)
    )


def test_splits_heads_and_experts_keep_their_rows() -> None:
    params = {"qkv": torch.randn(24, 8), "experts": torch.randn(3, 8, 4)}
    routes = {"qkv": nm.Route(splits=(8, 8, 8), heads=2)}
    given = {
        "state": {
            name: {"momentum": torch.randn_like(p), "variance_neuron": torch.rand_like(p[..., :1])}
            for name, p in params.items()
        },
        "param_groups": [{"params": list(params), "algorithm": "normuon", "step": 3, "mu": 0.9}],
    }
    state = nm.convert_state(
        given, nm.make_plan(params, nm.Config.preset("dion"), routes=routes)
    )  # keyed by name, as DCP has it
    for name in params:
        assert torch.equal(state[f"{name}.variance"], given["state"][name]["variance_neuron"])
        assert torch.equal(state[f"{name}.momentum"], given["state"][name]["momentum"])


def test_low_precision_is_widened_and_never_shares_memory_with_the_source() -> None:
    params = {"w": torch.randn(8, 8).bfloat16()}
    given = {
        "state": {
            0: {
                "momentum": torch.randn(8, 8).bfloat16(),
                "variance_neuron": torch.rand(8, 1).bfloat16(),
            }
        },
        "param_groups": [{"params": [0], "algorithm": "normuon", "step": 3, "mu": 0.9}],
    }
    own = nm.make_plan(params, nm.Config.preset("dion", momentum_dtype=torch.bfloat16))
    state = nm.convert_state(given, own, ["w"])
    assert (
        state["w.variance"].dtype == torch.float32 and state["w.momentum"].dtype == torch.bfloat16
    )
    assert torch.equal(state["w.momentum"], given["state"][0]["momentum"])
    assert state["w.momentum"].data_ptr() != given["state"][0]["momentum"].data_ptr()


def test_ranks_that_each_have_a_part_are_put_together() -> None:
    params = {"z": torch.randn(12, 8), "a": torch.randn(8, 12)}
    plan = nm.make_plan(params, nm.Config(**MUON))
    group = {"params": [0, 1], "momentum": 0.9}
    parts = [
        {"state": {k: {"momentum_buffer": params[n] + 1}}, "param_groups": [group]}
        for k, n in enumerate("za")
    ]
    state = nm.convert_state(parts, plan, [["z", "a"]] * 2)
    assert all(torch.equal(state[f"{n}.momentum"], params[n] + 1) for n in "za")
    with pytest.raises(
        ValueError,
        match=r"no state for 'a': the source has none. missing='zeros' starts these anew",
    ):
        nm.convert_state(parts[0], plan, ["z", "a"])
    assert not nm.convert_state(parts[0], plan, ["z", "a"], missing="zeros")["a.momentum"].any()


def broken(**changes: Any) -> tuple[dict[str, Any], nm.Plan, list[str]]:
    peer = Peer("dion").run(1)
    given, names = dion(peer)
    plan, _ = plan_for(changes.get("config", peer.config), peer.tensors("w"))
    given["state"][1].update(changes.get("own", {}))
    given["param_groups"][1].update(changes.get("group", {}))
    return given, plan, changes.get("names", names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"names": ["b", "z"]},
            "names: expected 3 for the optimizer's parameters, in its order, got 2",
        ),
        ({"names": ["b", "z", "y"]}, r"expected parameters of the plan, got \['y'\]"),
        (
            {"names": ["z", "b", "a"]},
            "'z': the source has that of Adam, the plan routes it to normuon; "
            "'b': the source has that of Muon, the plan routes it to adamw",
        ),
        ({"names": ["b", "a", "z"]}, r"'z': expected momentum of shape \(12, 8\), got \(8, 12\)"),
        (
            {"group": {"mu": 1.0}, "config": nm.Config()},
            r"'z': expected a momentum coefficient in \[0, 1\) .* got 1.0",
        ),
        ({"group": {"algorithm": "lion"}}, "'z' has the state of Lion"),
        (
            {"config": nm.Config.preset("modded_nanogpt")},
            r"'a': its variance is \(8, 1\), the plan's \(1, 12\), along another axis",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    given, plan, names = broken(**changes)
    with pytest.raises(ValueError, match=message):
        nm.convert_state(given, plan, names)


@pytest.mark.parametrize("step", [None, 300])
def test_moments_of_fewer_steps_are_corrected_as_they_were(step: int | None) -> None:
    betas = (0.9, 0.999)
    oracle = {"b": torch.ones(4), "c": torch.ones(4)}
    own = torch.optim.AdamW([*oracle.values()], lr=0.1, betas=betas, weight_decay=0.0)
    draws = torch.Generator().manual_seed(0)
    for k in range(200):
        for name, p in oracle.items():
            p.grad = torch.randn(4, generator=draws) if name == "b" or k % 10 == 0 else None
        own.step()
    params = {name: p.detach().clone() for name, p in oracle.items()}
    plan = nm.make_plan(params)
    said = pytest.warns(UserWarning, match=r"c were in fewer steps than others \(\[20, 200\]\)")
    with said if step is None else contextlib.nullcontext():
        state = nm.convert_state(own.state_dict(), plan, ["b", "c"], step=step)
    assert int(state["guard.step"]) == (step or 200)
    hyper = nm.Hyper.of(params, lr=0.1, adamw_betas=betas)
    grads = {name: torch.zeros(4) for name in params}  # what the moments alone do
    moved = nm.update(params, grads, state, hyper, plan).params
    for p in oracle.values():
        p.grad = torch.zeros(4)
    before = {name: p.clone() for name, p in oracle.items()}
    own.step()
    for name, p in oracle.items():
        # The one count decays them a little less: by 0.9 and 0.999 of themselves at one step.
        rtol = 1e-4 if name == "b" and step is None else 0.15
        torch.testing.assert_close(
            moved[name] - params[name], p.detach() - before[name], rtol=rtol, atol=1e-6
        )


def test_counters_that_differ_and_unknown_states_are_refused() -> None:
    params = {"b": torch.randn(4), "c": torch.randn(4)}
    plan = nm.make_plan(params)
    own = {
        k: {
            "exp_avg": torch.zeros(4),
            "exp_avg_sq": torch.zeros(4),
            "step": torch.tensor(float(k + 1)),
        }
        for k in range(2)
    }
    given = {"state": own, "param_groups": [{"params": [0, 1]}]}
    with pytest.raises(
        ValueError,
        match=r"one number of steps for all parameters, got \[1, 2\]; say which with step=",
    ):
        nm.convert_state(given, plan, ["b", "c"])
    assert int(nm.convert_state(given, plan, ["b", "c"], step=2)["guard.step"]) == 2
    with pytest.raises(
        ValueError,
        match=r"'b' has \['sum'\], which is the state of no optimizer that is known here",
    ):
        nm.convert_state(
            {"state": {0: {"sum": torch.zeros(4)}}, "param_groups": [{"params": [0]}]}, plan, ["b"]
        )
    with pytest.raises(TypeError, match=r"expected an optimizer's state_dict\(\)"):
        nm.convert_state({"w": torch.zeros(4)}, plan, ["b"])


def run_of(
    optimizer: type[torch.optim.Optimizer], **options: Any
) -> tuple[dict[str, Any], nm.Plan]:
    w = nn.Parameter(torch.ones(8, 12))
    made = optimizer([w], lr=0.1, **options)
    w.grad = torch.ones(8, 12)
    made.step()
    return made.state_dict(), nm.make_plan({"w": w.detach()}, nm.Config(**MUON))


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (
            torch.optim.SGD,
            {"momentum": 0.9},
            "'w' has the state of torch.optim.SGD, whose momentum is not Muon's",
        ),
        (
            torch.optim.RMSprop,
            {"momentum": 0.9},
            "'w' has the state of torch.optim.RMSprop, whose momentum is not Muon's",
        ),
        (
            torch.optim.Adamax,
            {},
            r"'w' has \['exp_avg', 'exp_inf', 'step'\], which is the state of no optimizer",
        ),
        (
            nm.NorMuon,
            {"routes": {"*": nm.Route()}},
            "'w' has the state of normuon_fn.NorMuon, whose own load_state_dict",
        ),
        (
            nm.NorMuon,
            {"algorithm": "adamw"},
            "'w' has the state of normuon_fn.NorMuon, whose own load_state_dict",
        ),
    ],
)
@pytest.mark.usefixtures("eager")
def test_a_state_of_another_meaning_is_told_by_its_optimizer(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], message: str
) -> None:
    source, plan = run_of(optimizer, **options)
    with pytest.raises(ValueError, match=message):
        nm.convert_state(source, plan, ["w"])


def test_options_that_make_no_sense_are_refused() -> None:
    source, plan = run_of(torch.optim.Muon)
    with pytest.raises(
        ValueError, match=r"source_momentum: expected None or one of \('ema', 'sum'\), got 'summ'"
    ):
        nm.convert_state(source, plan, ["w"], source_momentum="summ")  # type: ignore[arg-type]
    for step in (-3, 2**31, 1.5, True):
        with pytest.raises(
            ValueError, match=f"step: expected None or an int >= 0 that fits int32, got {step}"
        ):
            nm.convert_state(source, plan, ["w"], step=step)  # type: ignore[arg-type]
    source["state"][0]["momentum_buffer"] = None
    with pytest.raises(
        ValueError, match="source: 'w': expected a tensor as momentum, got NoneType"
    ):
        nm.convert_state(source, plan, ["w"])


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_masters_begin_as_the_parameters_that_the_other_optimizer_left(master: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 8, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    for k in range(2):
        model.weight.grad = torch.randn(
            8, 12, generator=torch.Generator().manual_seed(k)
        ).bfloat16()
        optimizer.step()
    params = {"weight": model.weight.detach()}
    source, wide = optimizer.state_dict(), {"weight": params["weight"].float()}
    moved = []
    for given, config in (
        (params, nm.Config(normalize=False, master=master)),
        (wide, nm.Config(normalize=False)),
    ):
        plan = nm.make_plan(given, config)
        state = nm.convert_state(source, plan, ["weight"], params=given)
        grads = {"weight": torch.ones(8, 12, dtype=given["weight"].dtype)}
        result = nm.update(given, grads, state, nm.Hyper.of(given, lr=1e-4), plan)
        key = {"mantissa": "weight.mantissa", "fp32": "weight.master"}[master]
        x = result.params["weight"]
        moved.append(joined_with(x, result.state[key]) if given is params else x)
    assert torch.equal(*moved) and not torch.equal(moved[0], wide["weight"])
    if master == "fp32":
        with pytest.raises(ValueError, match=r"params: \['weight'\] have float32 masters"):
            nm.convert_state(
                source, nm.make_plan(params, nm.Config(normalize=False, master=master)), ["weight"]
            )
