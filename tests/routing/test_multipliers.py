"""Overriding one number keeps the rest: routes with multipliers alone, and globs in hyper_of."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normuon_fn as nm
from normuon_fn.routing.resolve import decide_routes

D, V = 16, 200
SLOW = nm.Route(lr_mul=0.5)


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


PARAMS = zeros(
    embed__weight=(V, D), blocks__0__q__weight=(3 * D, D), blocks__0__norm__weight=(D,),
    blocks__0__up__weight=(4 * D, D), blocks__1__up__weight=(4 * D, D),
)  # fmt: skip


def routes(**options: object) -> dict[str, nm.Route]:
    plan = nm.make_plan(PARAMS, **options)  # type: ignore[arg-type]
    return {p.name: p.route for p in plan.parameters}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 4, bias=False)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.register_buffer("scale", torch.ones(3))


# --- multipliers alone


@pytest.mark.parametrize("key", ["*", "embed.weight", lambda name, tensor: True])
def test_an_embedding_stays_adamw_with_the_multiplier(key: str | Callable) -> None:
    assert routes(routes={key: SLOW})["embed.weight"] == nm.Route("adamw", lr_mul=0.5)


def test_a_norm_does_not_fail_and_a_matrix_keeps_normuon() -> None:
    found = routes(routes={"blocks.0.*": nm.Route(lr_mul=0.5, wd_mul=0.0)})
    assert found == {
        "embed.weight": nm.Route("adamw"),
        "blocks.0.q.weight": nm.Route("normuon", lr_mul=0.5, wd_mul=0.0),
        "blocks.0.norm.weight": nm.Route("adamw", lr_mul=0.5, wd_mul=0.0),
        "blocks.0.up.weight": nm.Route("normuon", lr_mul=0.5, wd_mul=0.0),
        "blocks.1.up.weight": nm.Route(),
    }


def test_splits_and_heads_of_a_later_entry_are_kept() -> None:
    own = nm.Route(splits=(D, D, D), heads=2, wd_mul=0.1)
    found = routes(routes={"blocks.0.*": SLOW, "*.q.weight": own})["blocks.0.q.weight"]
    assert found == nm.Route(splits=(D, D, D), heads=2, lr_mul=0.5, wd_mul=0.1)


@pytest.mark.parametrize("overlay", ["argument", "or", "assigned"])
def test_what_the_modules_tell_is_kept(overlay: str) -> None:
    model, slow = Model(), {"blocks.0.attn.in_proj_weight": SLOW, "blocks.0.conv.weight": SLOW}
    before = nm.routes_for(model, per_head=True)
    if overlay == "argument":
        found = nm.routes_for(model, {"blocks.0.*": SLOW}, per_head=True)
        assert found["blocks.0.norm.weight"] == nm.Route("adamw", lr_mul=0.5)
        row = next(line for line in str(found).splitlines() if "0.conv" in line)
        assert "lr*=0.5" in row and "flattened" in row and "overrides['blocks.0.*']" in row
    elif overlay == "or":
        found = before | slow
    else:
        found = before
        found.update(slow)
    params = dict(model.named_parameters())
    resolved = {name: each.route for name, each in decide_routes(params, found).items()}
    assert resolved["blocks.0.attn.in_proj_weight"] == nm.Route(
        splits=(D, D, D), heads=(4, 4, 4), lr_mul=0.5
    )
    assert resolved["blocks.0.conv.weight"] == nm.Route(flatten=True, lr_mul=0.5)
    assert resolved["blocks.1.conv.weight"] == nm.Route(flatten=True)


def test_a_table_takes_names_on_its_right_and_refuses_what_it_could_not_apply() -> None:
    table = nm.routes_for(Model())
    for key in ("blocks.0.*", "blocks.0.conv.wieght", lambda name, tensor: True):
        with pytest.raises(ValueError, match=r"expected a name of the table.*nm.routes_for"):
            table | {key: SLOW}
    both = nm.routes_for(nn.Linear(4, 4)) | table
    assert list(both)[:2] == ["weight", "bias"] and both.entries.keys() == both.keys()
    assert table == nm.routes_for(Model())
    found = table | {"embed.weight": SLOW} | {"embed.weight": nm.Route(wd_mul=0.0)}
    assert found["embed.weight"] == nm.Route("adamw", lr_mul=0.5, wd_mul=0.0)
    assert found.decisions()["embed.weight"].reason == "embedding; routes; routes"
    found = table | {"embed.weight": nm.Route("normuon")} | {"embed.weight": SLOW}
    assert found["embed.weight"] == nm.Route("normuon", lr_mul=0.5)


def test_what_is_frozen_stays_frozen_and_has_the_multiplier_when_it_is_unfrozen() -> None:
    model = Model()
    model.blocks[0].requires_grad_(False)
    found = nm.routes_for(model, {"*": SLOW})
    for name, later in (("conv", nm.Route(flatten=True, lr_mul=0.5)), ("norm", "adamw")):
        route = found[f"blocks.0.{name}.weight"]
        assert route.algorithm == "frozen"
        expected = nm.Route("adamw", lr_mul=0.5) if later == "adamw" else later
        assert route.unfrozen == expected
    assert found["scale"] == nm.Route("frozen")
    assert found["blocks.1.norm.weight"] == nm.Route("adamw", lr_mul=0.5)
    assert routes(routes={"*": SLOW, "embed*": nm.Route("frozen")})["embed.weight"] == nm.Route(
        "frozen"
    )


def test_a_multiplier_that_is_not_written_is_kept_and_one_that_is_replaces() -> None:
    model = Model()
    found = nm.routes_for(model, {"blocks.0.*": SLOW}, decay_vectors=False)
    assert found["blocks.0.norm.weight"] == nm.Route("adamw", lr_mul=0.5, wd_mul=0.0)
    own = nm.Route("adamw", lr_mul=0.1, wd_mul=0.2)
    found = routes(routes={"embed*": nm.Route(lr_mul=1.0), "*": own})
    assert found["embed.weight"] == nm.Route("adamw", lr_mul=1.0, wd_mul=0.2)


def test_a_rate_of_1_is_multipliers_alone_too() -> None:
    found = routes(routes={f"blocks.{k}.*": nm.Route(lr_mul=0.9 ** (1 - k)) for k in range(2)})
    assert found["blocks.0.norm.weight"] == nm.Route("adamw", lr_mul=0.9)
    assert found["blocks.1.up.weight"] == nm.Route(lr_mul=1.0)
    only = zeros(blocks__1__norm__weight=(D,), blocks__1__up__weight=(D, D))
    found = decide_routes(only, {"*": nm.Route(lr_mul=1.0)})["blocks.1.norm.weight"].route
    assert found == nm.Route("adamw")


def test_the_multipliers_of_several_entries_apply_up_to_the_first_that_decides() -> None:
    found = decide_routes(
        PARAMS,
        {
            "blocks.0.up.weight": nm.Route(wd_mul=0.0),
            "blocks.0.*": SLOW,
            "blocks.*": nm.Route(lr_mul=0.7, wd_mul=0.3),
            "*up*": nm.Route("adamw", lr_mul=0.1),
            "*": nm.Route(lr_mul=9.0),
        },
    )
    assert found["blocks.0.up.weight"].route == nm.Route("adamw", lr_mul=0.5, wd_mul=0.0)
    assert found["blocks.1.up.weight"].route == nm.Route("adamw", lr_mul=0.7, wd_mul=0.3)
    assert found["blocks.0.q.weight"].route == nm.Route(lr_mul=0.5, wd_mul=0.3)
    assert found["embed.weight"].route == nm.Route("adamw", lr_mul=9.0)
    reason = found["blocks.0.up.weight"].reason
    assert reason.startswith("routes['*up*']") and reason.endswith("routes['blocks.0.up.weight']")


def test_layerwise_rates_are_one_line() -> None:
    model = Model(12)
    found = nm.routes_for(
        model, {f"blocks.{k}.*": nm.Route(lr_mul=0.9 ** (12 - k)) for k in range(12)}
    )
    for k in range(12):
        rate = 0.9 ** (12 - k)
        assert found[f"blocks.{k}.norm.weight"] == nm.Route("adamw", lr_mul=rate)
        assert found[f"blocks.{k}.conv.weight"] == nm.Route(flatten=True, lr_mul=rate)


@pytest.mark.usefixtures("eager")
def test_the_optimizer_keeps_rules_and_a_group_its_algorithm() -> None:
    named = [(name, nn.Parameter(t.clone())) for name, t in PARAMS.items()]
    groups = [
        {"params": named[:1], "algorithm": "adamw", "routes": {"*": nm.Route(wd_mul=0.0)}},
        {"params": named[1:4], "routes": {"*norm*": nm.Route(lr_mul=0.1)}},
        {"params": named[4:], "algorithm": "adamw"},
    ]
    optimizer = nm.NorMuon(groups, lr=0.02, routes={"*": SLOW, "*.q.*": nm.Route(heads=2)})
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.plan is not None
    assert {p.name: p.route for p in optimizer.plan.parameters} == {
        "embed.weight": nm.Route("adamw", lr_mul=0.5, wd_mul=0.0),
        "blocks.0.q.weight": nm.Route(heads=2, lr_mul=0.5),
        "blocks.0.norm.weight": nm.Route("adamw", lr_mul=0.1),
        "blocks.0.up.weight": nm.Route("normuon", lr_mul=0.5),
        "blocks.1.up.weight": nm.Route("adamw", lr_mul=0.5),
    }


def test_a_plan_and_a_checkpoint_tell_the_multiplier_and_the_rule(tmp_path: Path) -> None:
    plan = nm.make_plan(PARAMS, routes={"*": SLOW})
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    assert "adamw lr*=0.5" in lines["embed.weight"] and "by name" in lines["embed.weight"]
    assert "normuon lr*=0.5" in lines["blocks.0.up.weight"]
    assert "routes['*']" in lines["embed.weight"]
    for p in plan.parameters:  # a plan has plain values: no trace of what was not written
        assert p.route.decides
        assert {type(p.route.algorithm), type(p.route.lr_mul), type(p.route.wd_mul)} == {str, float}
    written = nm.make_plan(PARAMS, routes={p.name: p.route for p in plan.parameters})
    nm.save(tmp_path / "state", PARAMS, nm.init(PARAMS, plan), plan)
    nm.load(tmp_path / "state", written)


def test_a_list_of_routes_with_multipliers_alone_means_normuon() -> None:
    results = []
    for route in (SLOW, nm.Route("normuon", lr_mul=0.5)):
        lists = [[torch.full((4, 8), x)] for x in (1.0, 0.5, 0.0)]
        nm.foreach_step_(
            *lists, [torch.zeros(4, 1)], lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0,
            routes=[route], compiled=False,
        )  # fmt: skip
        results.append(lists[0][0])
    assert torch.equal(*results) and not torch.equal(results[0], torch.ones(4, 8))


# --- what a route knows of itself

COPIES: list[Callable[[nm.Route], nm.Route]] = [
    copy.copy, copy.deepcopy, dataclasses.replace, lambda r: pickle.loads(pickle.dumps(r)),
    lambda r: nm.Route(**{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}),
]  # fmt: skip


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_multipliers_alone_is_one(copied: Callable[[nm.Route], nm.Route]) -> None:
    for route in (SLOW, nm.Route(wd_mul=0.0), nm.Route(lr_mul=1.0)):
        again = copied(route)
        assert again == route and hash(again) == hash(route) and not again.decides
        assert again.over(nm.Route("adamw", wd_mul=0.5)) == route.over(
            nm.Route("adamw", wd_mul=0.5)
        )
    assert not dataclasses.replace(SLOW, lr_mul=0.1).decides
    assert dataclasses.replace(SLOW, algorithm="normuon").decides
    assert dataclasses.replace(SLOW, heads=2).decides
    assert copied(nm.Route()).decides


def test_a_route_that_says_anything_else_decides() -> None:
    for route in (
        nm.Route(), nm.Route("normuon"), nm.Route("normuon", lr_mul=0.5), nm.Route("normuon", 0.5),
        nm.Route(lr_mul=0.5, flatten=True), nm.Route(lr_mul=0.5, heads=2), nm.Route(heads=2, dim=1),
        nm.Route(lr_mul=0.5, transposed=True), nm.Route(splits=(1, 2)), nm.Route("adamw"),
    ):  # fmt: skip
        assert route.decides and route.over(nm.Route("adamw", wd_mul=0.0)) is route
    assert nm.Route("normuon", lr_mul=0.5) == SLOW and str(SLOW) == "lr*=0.5"
    assert "default" in repr(SLOW) and "default" not in repr(nm.Route("normuon", lr_mul=0.5))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        nm.make_plan(PARAMS, routes={"blocks.0.norm.weight": nm.Route("normuon", lr_mul=0.5)})


def test_multipliers_that_would_change_nothing_are_refused() -> None:
    params = dict(Model().named_parameters())
    table = {name: nm.routes_for(Model())[name] for name in params}
    for entries in ({"*": nm.Route("adamw"), "embed*": SLOW}, {**table, "embed*": SLOW}):
        with pytest.raises(ValueError, match=r"routes\['embed\*'\].*write it before them"):
            decide_routes(params, entries)
    with pytest.raises(ValueError, match=r"overrides\['embed.weight'\]"):
        nm.routes_for(Model(), {"embed*": nm.Route("adamw"), "embed.weight": SLOW})
    with pytest.raises(ValueError, match=r"\['nothing.\*'\] match no parameter"):
        routes(routes={"nothing.*": SLOW})


# --- hyper_of


def entries(hyper_of: dict) -> list[int]:
    return [p.hyper for p in nm.make_plan(PARAMS, hyper_of=hyper_of).parameters]


def test_hyper_of_takes_globs_after_exact_names() -> None:
    assert entries({"*": 0}) == [0, 0, 0, 0, 0]
    assert entries({"blocks.0.*": 1, "*": 0, "blocks.0.norm.weight": 2}) == [0, 1, 2, 1, 0]
    assert entries({"blocks.?.up.weight": 2, "blocks.*": 1, "embed.weight": 0}) == [0, 1, 1, 2, 2]
    assert nm.make_plan(PARAMS, hyper_of={"blocks.*": 3, "*": 0}).hypers == 4


def test_hyper_of_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'embed\.weight', 'blocks\.1\.up\.weight'; write"):
        entries({"blocks.0.*": 1})
    with pytest.raises(ValueError, match=r"hyper_of: \['block.0.\*'\] match no parameter"):
        entries({"block.0.*": 1, "*": 0})
    with pytest.raises(ValueError, match=r"hyper_of: \['embed.wieght'\] match no parameter"):
        entries({"embed.wieght": 1, "*": 0})
    for wrong in (-1, True, 0.5):
        with pytest.raises(ValueError, match=r"hyper_of\['\*'\]: expected an int >= 0"):
            entries({"*": wrong})
    with pytest.raises(TypeError, match="names or globs as keys, got 3"):
        entries({3: 0})


# --- time


def _calls(work: Callable[[], object]) -> int:
    """How many functions it calls: what it costs, whatever else the machine does."""
    count = 0

    def counted(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_four_times_the_parameters_take_at_most_five_times_the_calls() -> None:
    def asked(count: int) -> Callable[[], object]:
        params = {
            f"blocks.{k // 8}.{k % 8}.weight": torch.empty(8, 8, device="meta")
            for k in range(count)
        }
        wanted = {f"blocks.{k}.*": SLOW for k in range(24)} | dict.fromkeys(params, nm.Route())
        return lambda: decide_routes(params, wanted)

    def read(count: int) -> Callable[[], object]:
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(8, 32, bias=False) for _ in range(count)))
        return lambda: nm.routes_for(model, {f"{k}.*": SLOW for k in range(24)})

    assert _calls(asked(1000)) <= 5 * _calls(asked(250))
    assert _calls(read(1000)) <= 5 * _calls(read(250))


# --- multipliers that stand behind the route that decides


def said_of(routes: dict[str, nm.Route]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decide_routes(PARAMS, routes)
    texts = [str(w.message) for w in caught]
    return [text for text in texts if "does not reach" in text or "changes nothing" in text]


def test_multipliers_that_do_not_reach_a_parameter_are_said() -> None:
    pasted = {"blocks.0.q.weight": nm.Route(splits=(D, D, D)), "blocks.0.*": SLOW}
    (said,) = said_of(pasted)
    assert said.startswith(
        "routes['blocks.0.*']: lr*=0.5 does not reach blocks.0.q.weight, because"
    )
    assert "routes['blocks.0.q.weight'] stands before it" in said
    turned = dict(reversed(pasted.items()))
    assert said_of(turned) == []
    assert decide_routes(PARAMS, turned)["blocks.0.q.weight"].route.lr_mul == 0.5
    written = pasted | {"blocks.0.q.weight": nm.Route(splits=(D, D, D), lr_mul=1.0)}
    assert said_of(written) == []  # the number 1 is a number
    other = pasted | {"blocks.0.*": nm.Route(wd_mul=0.0), "blocks.0.q.weight": SLOW}
    assert said_of(other) == []  # two multipliers of one parameter, one after the other


def test_what_is_frozen_or_decided_by_another_rule_is_not_spoken_of() -> None:
    assert said_of({"embed.weight": nm.Route("frozen"), "*": SLOW}) == []
    assert said_of({"embed.weight": nm.Route("adamw"), "*": nm.Route("normuon", lr_mul=0.5)}) == []


def test_a_table_says_it_too() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(D, 4), "out": nn.Linear(D, D)})
    with pytest.warns(UserWarning, match=r"overrides\['attn.\*'\]: lr\*=0.5 does not reach"):
        nm.routes_for(model, {"attn.in_proj_weight": nm.Route(heads=12), "attn.*": SLOW})


def test_tied_names_with_two_routes_are_refused_and_with_one_are_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "head": nn.Linear(D, V, bias=False)})
    model["head"].weight = model["embed"].weight
    two = {"embed.weight": nm.Route("adamw"), "head.weight": nm.Route()}
    with pytest.raises(ValueError, match=r"\['embed.weight', 'head.weight'\] are one tensor"):
        nm.routes_for(model, two)
    both = dict.fromkeys(two, nm.Route("adamw", lr_mul=0.5))
    assert nm.routes_for(model, both)["embed.weight"] == nm.Route("adamw", lr_mul=0.5)
    for name in two:
        assert nm.routes_for(model, {name: SLOW})["embed.weight"].lr_mul == 0.5
    assert nm.routes_for(model, {"head.*": SLOW, "embed.weight": nm.Route("adamw")})


def test_names_for_parameters_without_names_are_refused_with_the_way_to_write_them() -> None:
    model = nn.Linear(D, D)
    with pytest.raises(ValueError, match=r"without names are found by routes=nm.routes_for\(model"):
        nm.NorMuon(model.parameters(), lr=0.1, routes={"weight": nm.Route()})
    table = nm.routes_for(model, {"weight": nm.Route(lr_mul=0.5)})
    assert nm.NorMuon(model.parameters(), lr=0.1, routes=table)


@pytest.mark.parametrize(
    ("routes", "vain"),
    [
        ({"*": SLOW, "embed.weight": nm.Route(lr_mul=2.0)}, "embed.weight"),
        ({"blocks.*": nm.Route("adamw"), "blocks.0.up.weight": nm.Route()}, "blocks.0.up.weight"),
        ({"blocks.*": nm.Route("adamw"), "*.q.weight": nm.Route(heads=3)}, "*.q.weight"),
        ({"*.q.weight": nm.Route(), "blocks.0.q.weight": nm.Route(heads=3)}, "blocks.0.q.weight"),
    ],
)
def test_an_entry_that_changes_nothing_is_said(routes: dict[str, nm.Route], vain: str) -> None:
    first = next(iter(routes))
    (said,) = said_of(routes)
    assert said.startswith(f"routes['{vain}']: ") and f"routes['{first}'] stands before it" in said
    assert said_of(dict(reversed(routes.items()))) == []


def test_an_entry_is_not_in_vain_that_changes_something_or_asks_for_what_is_so() -> None:
    some = {"blocks.0.*": nm.Route("adamw"), "blocks.*": nm.Route("normuon")}
    assert said_of({k: r for k, r in some.items() if k != "x"} | {"*": nm.Route("adamw")}) == []
    assert said_of({"blocks.*": nm.Route("adamw"), "blocks.0.q.weight": nm.Route("adamw")}) == []
    assert said_of({"blocks.*": nm.Route("adamw"), "embed.*": SLOW, "*": nm.Route("adamw")}) == []
    assert said_of({"*": nm.Route(lr_mul=0.5), "blocks.0.*": nm.Route(wd_mul=0.0)}) == []


# --- what is said of entries


def said(call: Callable[[], object], what: str) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return sum(what in str(w.message) for w in caught)


GENERAL_FIRST = {"*": SLOW, "embed.weight": nm.Route(lr_mul=0.1)}


def test_an_entry_without_effect_is_said_once_by_plans_and_optimizers() -> None:
    named = [(name, nn.Parameter(p.clone())) for name, p in PARAMS.items()]
    made: list[nm.NorMuon] = []
    assert said(lambda: nm.make_plan(PARAMS, routes=GENERAL_FIRST), "changes nothing") == 1
    of_optimizer = lambda: made.append(nm.NorMuon(named, routes=GENERAL_FIRST))  # noqa: E731
    of_group = lambda: made.append(  # noqa: E731
        nm.NorMuon([{"params": named, "routes": GENERAL_FIRST}])
    )
    for make in (of_optimizer, of_group):
        assert said(make, "changes nothing") == 1
        new = [("new.weight", nn.Parameter(torch.ones(8, 8)))]
        assert said(lambda new=new: made[-1].add_param_group({"params": new}), "nothing") == 0


def test_an_entry_that_asks_for_what_is_so_is_not_said() -> None:
    for given in (
        {"*": SLOW, "embed.weight": SLOW},
        {"embed.weight": nm.Route("adamw"), "*": nm.Route(lr_mul=1.0)},
    ):
        assert said(lambda given=given: nm.make_plan(PARAMS, routes=given), "because") == 0
    lost = {"embed.weight": nm.Route("adamw"), "*": SLOW}
    assert said(lambda: nm.make_plan(PARAMS, routes=lost), "does not reach") == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.emb.weight


@pytest.mark.parametrize(
    ("head", "emb", "fits"),
    [
        (SLOW, nm.Route("adamw"), True),
        (SLOW, nm.Route(wd_mul=0.0), True),
        (SLOW, SLOW, True),
        (nm.Route("normuon"), nm.Route("adamw"), False),
        (SLOW, nm.Route(lr_mul=0.2), False),
    ],
)
def test_tied_names_may_have_routes_that_fit_together(
    head: nm.Route, emb: nm.Route, fits: bool
) -> None:
    given = {"head.weight": head, "emb.weight": emb}
    if not fits:
        with pytest.raises(ValueError, match="are one tensor"):
            nm.routes_for(Tied(), given)
        return
    (found,) = {str(route) for route in nm.routes_for(Tied(), given).values()}
    assert found == str(head.over(emb.over(nm.Route("adamw"))))


def test_an_entry_of_hyper_of_that_no_parameter_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write 'embed\.\*' before '\*'"):
        nm.make_plan(PARAMS, hyper_of={"*": 0, "embed.*": 1})
    plan = nm.make_plan(PARAMS, hyper_of={"embed.*": 1, "*": 0})
    assert "adamw hyper 1" in str(plan) and "hyper 0" in str(plan)
    nm.make_plan(PARAMS, hyper_of={"embed.*": 1, "embed.weight": 0, "*": 0})  # a name goes first
    nm.make_plan(zeros(a__weight=(8, 8), b__weight=(8, 8)), hyper_of={"*.weight": 0, "*": 1})


def test_tied_names_with_options_that_contradict_each_other_are_refused() -> None:
    given = {
        "head.weight": nm.Route(weight_decay_form="cautious"),
        "emb.weight": nm.Route(weight_decay_form="hyperball"),
    }
    with pytest.raises(ValueError, match="are one tensor"):
        nm.routes_for(Tied(), given)
