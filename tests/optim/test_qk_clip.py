"""QK-clip: the logits that a float64 attention has afterwards, layout by layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from compile_tests import graphs
from normuon_fn.ops.rounding import joined_with

INF, NAN = float("inf"), float("nan")
TAU, WIDTH, HEADS, SIZE = 5.0, 24, 4, 6
Tensors = dict[str, Tensor]
FROZEN = nm.Route("frozen")


def of(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [x.double() @ w.double().mT for w in weights]


def largest(q: Tensor, k: Tensor) -> Tensor:
    """[heads]: the largest logit of queries [t, heads, d] and keys [t, kv, d], in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("thd,shd->hts", q, k).amax((1, 2)) / q.shape[-1] ** 0.5


def heads_of(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def made(*shapes: tuple[int, ...], scale: float = 1.5) -> list[Tensor]:
    """Weights whose second head has large logits and whose other heads do not."""
    torch.manual_seed(0)
    return [torch.randn(shape) * 0.1 * scale for shape in shapes]


def mha(kv: int) -> tuple[Tensors, dict[str, nm.Route], Callable[[Tensors, Tensor], Tensor]]:
    q, k = made((HEADS * SIZE, WIDTH), (kv * SIZE, WIDTH))
    params = {"a.q_proj.weight": q, "a.q_proj.bias": torch.randn(HEADS * SIZE) * 0.1,
              "a.k_proj.weight": k, "a.k_proj.bias": torch.randn(kv * SIZE) * 0.1,
              "a.v_proj.weight": torch.randn(kv * SIZE, WIDTH)}  # fmt: skip

    def logits(p: Tensors, x: Tensor) -> Tensor:
        q, k = of(x, p["a.q_proj.weight"], p["a.k_proj.weight"])
        q, k = q + p["a.q_proj.bias"].double(), k + p["a.k_proj.bias"].double()
        return largest(heads_of(q, HEADS), heads_of(k, kv))

    return params, {}, logits


def fused(kv: int, transposed: bool) -> Any:
    sizes = (HEADS * SIZE, kv * SIZE, kv * SIZE)
    (w,) = made((sum(sizes), WIDTH))
    route = nm.Route(splits=sizes, dim=int(transposed), transposed=transposed)

    def logits(p: Tensors, x: Tensor) -> Tensor:
        w = p["a.c_attn.weight"]
        q, k, _ = (of(x, w.mT if transposed else w)[0] + p["a.c_attn.bias"]).split(sizes, -1)
        return largest(heads_of(q, HEADS), heads_of(k, kv))

    weight = w.mT.contiguous() if transposed else w
    params = {"a.c_attn.weight": weight, "a.c_attn.bias": torch.randn(sum(sizes)) * 0.1}
    return params, {"a.c_attn.weight": route}, logits


def turns() -> Any:
    (w,) = made((3 * HEADS * SIZE, WIDTH))

    def logits(p: Tensors, x: Tensor) -> Tensor:
        q, k, _ = of(x, p["a.query_key_value.weight"])[0].unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        return largest(q, k)

    route = nm.Route(heads=3 * HEADS)
    return {"a.query_key_value.weight": w}, {"a.query_key_value.weight": route}, logits


def gated() -> Any:
    q, k = made((2 * HEADS * SIZE, WIDTH), (HEADS * SIZE, WIDTH))

    def logits(p: Tensors, x: Tensor) -> Tensor:
        q, k = of(x, p["a.q_proj.weight"], p["a.k_proj.weight"])
        return largest(q.unflatten(-1, (HEADS, 2, -1))[..., 0, :], heads_of(k, HEADS))

    params = {"a.q_proj.weight": q, "a.k_proj.weight": k}
    return params, {"a.q_proj.weight": nm.Route(heads=2 * HEADS)}, logits


def key_value() -> Any:
    q, kv = made((HEADS * SIZE, WIDTH), (4 * SIZE, WIDTH))
    route = nm.Route(splits=(2 * SIZE, 2 * SIZE))

    def logits(p: Tensors, x: Tensor) -> Tensor:
        q, kv = of(x, p["a.wq.weight"], p["a.wkv.weight"])
        return largest(heads_of(q, HEADS), heads_of(kv[:, : 2 * SIZE], 2))

    return {"a.wq.weight": q, "a.wkv.weight": kv}, {"a.wkv.weight": route}, logits


def latent() -> Any:
    nope, rope, value, rank = 6, 2, 5, 10
    q, up, down = made((HEADS * (nope + rope), WIDTH), (HEADS * (nope + value), rank),
                       (rank + rope, WIDTH), scale=3.0)  # fmt: skip

    def logits(p: Tensors, x: Tensor) -> Tensor:
        q = heads_of(of(x, p["a.q_proj.weight"])[0], HEADS)
        c, shared = of(x, p["a.kv_a_proj_with_mqa.weight"])[0].split((rank, rope), -1)
        k = heads_of(of(c, p["a.kv_b_proj.weight"])[0], HEADS)[..., :nope]
        shared = shared[:, None].expand(-1, HEADS, -1)
        return largest(q, torch.cat([k, shared], -1))

    params = {"a.q_proj.weight": q, "a.kv_a_proj_with_mqa.weight": down, "a.kv_b_proj.weight": up}
    return params, {}, logits


CASES: dict[str, Any] = {
    "MHA": lambda: mha(HEADS),
    "GQA": lambda: mha(2),
    "MQA": lambda: mha(1),
    "fused": lambda: fused(HEADS, False),
    "fused GQA": lambda: fused(2, False),
    "Conv1D": lambda: fused(HEADS, True),
    "turns": turns,
    "gated query": gated,
    "key and value in one": key_value,
    "MLA": latent,
}


def plan_of(params: Tensors, routes: dict[str, nm.Route], **options: Any) -> nm.Plan:
    rest = {"*.weight": nm.Route(), "*": nm.Route("adamw")}
    return nm.make_plan(params, nm.Config(**options), routes={**routes, **rest})


def inputs() -> Tensor:
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize("case", CASES)
def test_the_largest_logit_of_every_head_is_tau_afterwards_or_what_it_was(case: str) -> None:
    params, routes, logits = CASES[case]()
    plan, x = plan_of(params, routes), inputs()
    before = logits(params, x)
    assert (before > TAU).any() and (before < 1000).all()
    tau = before.sort().values[1].item() + 1e-3  # some heads are above it and some are not
    assert (before > tau).any() and (before < tau).any()
    old = {name: w.clone() for name, w in params.items()}
    names = {"a": {"gated_q": "a.q_proj.weight", "k": "a.k_proj.weight"}}
    how: Any = {"projections": names} if case == "gated query" else {}
    nm.qk_clip_(params, {"a": before.float()}, plan, tau, **how)
    after = logits(params, x)
    keys = {"GQA": 2, "fused GQA": 2, "MQA": 1, "key and value in one": 2}.get(case, HEADS)
    # Queries that share a key shrink together, by the largest logit among them.
    gamma = (tau / before.view(keys, -1).amax(1)).clamp(max=1.0).repeat_interleave(HEADS // keys)
    # float32 weights: 2e-7 of a logit was seen.
    torch.testing.assert_close(after, before * gamma, rtol=2e-6, atol=0)
    assert (after <= tau * (1 + 1e-6)).all()
    pure, _ = nm.qk_clip(old, {"a": before.float()}, plan, tau, **how)
    assert all(torch.equal(pure[name], params[name]) for name in params)
    for name in ("a.v_proj.weight", "a.kv_a_proj_with_mqa.weight"):
        assert name not in params or pure[name] is old[name]


def test_queries_and_keys_take_the_scaling_by_half_or_as_alpha_says() -> None:
    params, routes, _ = mha(HEADS)
    plan = plan_of(params, routes)
    maxima = torch.tensor([4 * TAU, TAU, 0.0, -3.0])
    for alpha, q, k in ((0.5, 0.5, 0.5), (1.0, 0.25, 1.0), (0.0, 1.0, 0.25)):
        new, _ = nm.qk_clip(params, {"a": maxima}, plan, TAU, alpha=alpha)
        for name, factor in (("q", q), ("k", k)):
            for kind in ("weight", "bias"):
                key = f"a.{name}_proj.{kind}"
                assert torch.equal(new[key][:SIZE], params[key][:SIZE] * factor)
                assert torch.equal(new[key][SIZE:], params[key][SIZE:])


@pytest.mark.parametrize("case", ["MHA", "fused GQA", "MLA"])
def test_a_maximum_that_is_not_finite_leaves_every_bit_of_its_head(case: str) -> None:
    params, routes, _ = CASES[case]()
    plan = plan_of(params, routes)
    old = {name: w.clone() for name, w in params.items()}
    nm.qk_clip_(params, {"a": torch.tensor([NAN, INF, -INF, 1.0])}, plan, TAU)
    assert all(torch.equal(params[name], old[name]) for name in params)
    nm.qk_clip_(params, {"a": torch.tensor([NAN, INF, 3e38, 2 * TAU])}, plan, TAU)
    assert all(w.isfinite().all() for w in params.values())


@pytest.mark.parametrize("master", ["mantissa", "fp32"])
def test_the_float32_master_is_what_is_scaled(master: str) -> None:
    params, routes, _ = mha(HEADS)
    params = {name: w.bfloat16() for name, w in params.items()}
    plan = plan_of(params, routes, master=master)
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.01)
    grads = {name: torch.randn_like(w) for name, w in params.items()}
    params, state = nm.update(params, grads, state, hyper, plan)[:2]
    kind = "mantissa" if master == "mantissa" else "master"
    maxima = {"a": torch.tensor([4 * TAU, TAU, TAU, TAU])}

    def masters(p: Tensors, s: Tensors) -> Tensors:
        return {n: joined_with(w, s[f"{n}.{kind}"]).clone() for n, w in p.items() if "_proj" in n}

    before = masters(params, state)
    with pytest.raises(ValueError, match=r"float32 master.*pass state=state"):
        nm.qk_clip_(params, maxima, plan, TAU)
    nm.qk_clip_(params, maxima, plan, TAU, state=state)
    after = masters(params, state)
    for name in ("a.q_proj.weight", "a.k_proj.bias"):
        assert torch.equal(after[name][:SIZE], before[name][:SIZE] * 0.5)
        assert torch.equal(after[name][SIZE:], before[name][SIZE:])
        assert torch.equal(params[name], after[name].bfloat16())


def test_it_is_part_of_a_graph_and_the_host_waits_for_nothing() -> None:
    for case in ("MHA", "fused GQA", "MLA"):
        params, routes, _ = CASES[case]()
        plan, maxima = plan_of(params, routes), torch.tensor([4 * TAU, NAN, TAU, 9 * TAU])
        expected, _ = nm.qk_clip(params, {"a": maxima}, plan, TAU)

        def clipped(params: Tensors, maxima: Tensor, plan: nm.Plan = plan) -> None:
            nm.qk_clip_(params, {"a": maxima}, plan, TAU)

        with graphs.no_host_sync():
            nm.qk_clip(params, {"a": maxima}, plan, TAU)
        torch._dynamo.reset()
        torch.compile(clipped, fullgraph=True, backend="aot_eager")(params, maxima)
        assert all(torch.equal(params[name], expected[name]) for name in params)


def test_it_is_part_of_a_graph_with_the_step() -> None:
    params, routes, _ = mha(2)
    plan = plan_of(params, routes, steps=1, method="standard")
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=0.01)
    grads = {name: torch.randn_like(w) for name, w in params.items()}

    def both(params: Tensors, state: Tensors, maxima: Tensor) -> tuple[Tensors, Tensors]:
        result = nm.update(params, grads, state, hyper, plan)
        return nm.qk_clip(result.params, {"a": maxima}, plan, TAU, state=result.state)

    maxima = torch.full((HEADS,), 4 * TAU)
    torch._dynamo.reset()
    found, _ = torch.compile(both, fullgraph=True, backend="aot_eager")(params, state, maxima)
    expected, _ = both(params, state, maxima)
    assert all(torch.equal(found[name], expected[name]) for name in params)


def q_and_k(**more: Tensor) -> Tensors:
    return {"a.q_proj.weight": torch.randn(8, 6), "a.k_proj.weight": torch.randn(4, 6), **more}


ERRORS: dict[str, tuple[Tensors, dict[str, nm.Route], Any, str]] = {
    "no such layer": (q_and_k(), {}, {"b": torch.ones(4)}, "write projections="),
    "no key": ({"a.q_proj.weight": torch.randn(8, 6)}, {}, {"a": torch.ones(4)}, "write projec"),
    "another number of heads": (q_and_k(), {}, {"a": torch.ones(3)}, "3 heads do not fit"),
    "heads of keys": (q_and_k(), {}, {"a": torch.ones(1)}, "not heads of that size"),
    "heads that the route knows": (
        q_and_k(), {"a.q_proj.weight": nm.Route(heads=4)}, {"a": torch.ones(2)}, "has 4 heads",
    ),
    "fused without sizes": (
        {"a.qkv.weight": torch.randn(12, 6)}, {}, {"a": torch.ones(2)}, r"nm.Route\(splits=",
    ),
    "frozen": (q_and_k(), {"a.k_proj.weight": FROZEN}, {"a": torch.ones(4)}, "is frozen"),
    "a frozen bias": (
        q_and_k(**{"a.k_proj.bias": torch.ones(8)}), {"a.k_proj.bias": FROZEN},
        {"a": torch.ones(4)}, "k_proj.bias'.*is frozen",
    ),
    "heads that the route of the keys knows": (
        q_and_k(), {"a.k_proj.weight": nm.Route(heads=4)}, {"a": torch.ones(2)}, "has 4 heads",
    ),
    "heads that the route of all three knows": (
        {"a.qkv.weight": torch.randn(24, 6)},
        {"a.qkv.weight": nm.Route(splits=(16, 4, 4), heads=(4, 2, 2))},
        {"a": torch.ones(4)}, "has 2 heads",
    ),
    "turns without heads": (
        {"a.query_key_value.weight": torch.randn(12, 6)}, {}, {"a": torch.ones(2)},
        r"take turns head by head, Route\(heads=3",
    ),
    "a norm behind it": (
        q_and_k(**{"a.q_norm.weight": torch.ones(2)}), {"a.q_norm.weight": nm.Route("adamw")},
        {"a": torch.ones(4)}, "takes back",
    ),
    "two attentions": (
        {f"a.{k}.{w}.weight": torch.randn(4, 4) for k in "xy" for w in ("q_proj", "k_proj")}, {},
        {"a": torch.ones(2)}, "expected one attention",
    ),
    "no dict": (q_and_k(), {}, torch.ones(4), "expected a dict"),
    "an integer": (q_and_k(), {}, {"a": torch.ones(4, dtype=torch.int64)}, "a float tensor"),
    "not reduced": (q_and_k(), {}, {"a": torch.ones(2, 4)}, "amax over batch"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_told_is_refused_by_name_before_anything_is_written(case: str) -> None:
    params, routes, maxima, text = ERRORS[case]
    plan = plan_of(params, routes)
    old = {name: w.clone() for name, w in params.items()}
    if isinstance(maxima, dict):
        maxima = {layer: 100 * x for layer, x in maxima.items()}
    with pytest.raises((TypeError, ValueError), match=text):
        nm.qk_clip_(params, maxima, plan, TAU)
    assert all(torch.equal(params[name], old[name]) for name in params)


def test_names_that_tell_nothing_are_given() -> None:
    params = {"a.x": torch.randn(8, 6), "a.y": torch.randn(8, 6)}
    plan = nm.make_plan(params, routes={"*": nm.Route()})
    maxima = {"anything": torch.tensor([4 * TAU, 1.0])}
    names = {"anything": {"q": "a.x", "k": "a.y"}}
    new, _ = nm.qk_clip(params, maxima, plan, TAU, projections=names)
    for name in params:
        assert torch.equal(new[name][:4], params[name][:4] * 0.5)
    with pytest.raises(ValueError, match="name of a parameter"):
        nm.qk_clip(params, maxima, plan, TAU, projections={"anything": {"q": "a.z", "k": "a.y"}})


def test_multihead_attention_of_torch_is_found_by_its_routes() -> None:
    model = torch.nn.Module()
    model.attn = torch.nn.MultiheadAttention(8, 2)
    plan, params = nm.make_plan(model), dict(model.named_parameters())
    old = {name: w.detach().clone() for name, w in params.items()}
    nm.qk_clip_(params, {"attn": torch.tensor([4 * TAU, 1.0])}, plan, TAU)
    expected = torch.ones(24, 1)
    expected[:4] = expected[8:12] = 0.5
    weight = "attn.in_proj_weight"
    assert torch.equal(params[weight], old[weight] * expected)


def test_a_convolution_of_one_place_is_clipped_as_the_linear_layer_of_the_same_numbers() -> None:
    (weight,) = made((3 * HEADS * SIZE, WIDTH))
    maxima = {"a": torch.tensor([1.0, 20.0, 2.0, 3.0])}
    splits, found = (HEADS * SIZE,) * 3, []
    for flatten in (False, True):
        params = {"a.qkv.weight": weight[:, :, None, None].clone() if flatten else weight.clone()}
        routes = {"a.qkv.weight": nm.Route(flatten=flatten, splits=splits)}
        plan = nm.make_plan(params, nm.Config(), routes=routes)
        new, _ = nm.qk_clip(params, maxima, plan, TAU)
        found.append(new["a.qkv.weight"].flatten(1))
    assert torch.equal(*found)
    assert not torch.equal(found[0], weight)


def test_a_weight_in_two_entries_is_refused() -> None:
    params = {f"a.{k}_proj.weight": torch.randn(32, 32) for k in "qk"}
    plan = nm.make_plan(params, routes={"*": nm.Route()})
    own = {"q": "a.q_proj.weight", "k": "a.k_proj.weight"}
    maxima = {"x": torch.full((4,), 16.0), "y": torch.ones(4)}
    with pytest.raises(ValueError, match=r"max_logits\['y'\]: 'a.q_proj.weight' is in an entry"):
        nm.qk_clip(params, maxima, plan, 1.0, projections={"x": own, "y": own})


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a tuple": ((("a", {"q": "a.x", "k": "a.y"}),), TypeError, r"projections: expected None or a"),
    "a list of names": (["a.x", "a.y"], TypeError, r"projections: expected None or a dict"),
    "a string": ("a.x", TypeError, r"projections: expected None or a dict"),
    "roles alone": ({"q": "a.x", "k": "a.y"}, TypeError, r"projections\['q'\]: expected a dict"),
    "pairs": ({"a": ("a.x", "a.y")}, TypeError, r"projections\['a'\]: expected a dict.*'q': "),
    "tensors": ({"a": {"q": torch.ones(8, 6), "k": "a.y"}}, TypeError, r"\['a'\].*the name of a"),
    "a list as a name": ({"a": {"q": ["a.x"], "k": "a.y"}}, TypeError, r"\['a'\].*the name of a"),
    "no role": ({"a": {}}, ValueError, r"projections\['a'\]: expected the names of a query and"),
    "another layer": (
        {"b": {"q": "a.x", "k": "a.y"}}, ValueError,
        r"projections: expected names of max_logits, \['a'\], got \['b'\]",
    ),
    "another layer too": (
        {"a": {"q": "a.x", "k": "a.y"}, "a.": {"q": "a.x"}}, ValueError, r"got \['a\.'\]",
    ),
    "two of one": (
        {"a": {"qkv": "a.x", "k": "a.y"}}, ValueError, r"projections\['a'\]: .*'k'.* and 'qkv'",
    ),
    "two queries": (
        {"a": {"q": "a.x", "gated_q": "a.x", "k": "a.y"}}, ValueError, r"'gated_q'.* and 'q'",
    ),
    "two keys": (
        {"a": {"q": "a.x", "k": "a.y", "kv": "a.y"}}, ValueError, r"'k'.* and 'kv'",
    ),
    "half of a key": (
        {"a": {"q": "a.x", "k": "a.y", "latent_down": "a.y"}}, ValueError, r"'latent_down'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_projections_of_another_form_are_refused_with_what_to_write(case: str) -> None:
    given, error, message = WRONG[case]
    params = {"a.x": torch.randn(8, 6), "a.y": torch.randn(8, 6)}
    old = {name: w.clone() for name, w in params.items()}
    plan = nm.make_plan(params, routes={"*": nm.Route()})
    with pytest.raises(error, match=message):
        nm.qk_clip_(params, {"a": torch.full((2,), 4 * TAU)}, plan, TAU, projections=given)
    assert all(torch.equal(params[name], old[name]) for name in params)
