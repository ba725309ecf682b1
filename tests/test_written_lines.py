"""An error says what to write, in the words of what was written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normuon_fn as nm

pytestmark = pytest.mark.usefixtures("eager")


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 16)


MODEL = GPT()
PLAN = nm.make_plan(MODEL)
PARAMS = dict(MODEL.named_parameters())


def adamw_of(model: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


SAVED = adamw_of(GPT()).state_dict()
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {  # of any type, as somebody writes them
    "convert_state of a model": (
        lambda nm: nm.convert_state(SAVED, MODEL, [*PARAMS]),
        r"plan: expected a Plan from make_plan, got GPT; write nm\.make_plan\(model\)",
    ),
    "convert_state of an optimizer": (
        lambda nm: nm.convert_state(adamw_of(GPT()), PLAN),
        r"source: expected an optimizer's .*, got AdamW; write optimizer\.state_dict\(\)",
    ),
    "names_in of a model": (
        lambda nm: nm.names_in(MODEL, PARAMS),
        r"got GPT; write nm\.names_in\(optimizer, model\.named_parameters\(\)\)",
    ),
    "make_plan with a guard": (
        lambda nm: nm.make_plan(MODEL, guard="full"),
        r"make_plan: 'guard' is a field of Config; write config=Config\(guard=\.\.\.\)",
    ),
    "make_plan of nothing": (lambda nm: nm.make_plan(), r"write nm\.make_plan\(model\)"),
    "a route with a rate": (lambda nm: nm.Route(lr=0.1), "no argument 'lr'; write lr_mul="),
    "a route with a decay": (lambda nm: nm.Route(weight_decay=0.0), "write wd_mul="),
    "a Hyper of a number": (lambda nm: nm.Hyper(lr=0.1), r"write nm\.Hyper\.of\(params, lr"),
    "a Hyper of nothing": (lambda nm: nm.Hyper.of(lr=0.1), r"lacks params; write nm\.Hyper\.of"),
    "a plan in a file": (lambda nm: pickle.dumps(PLAN), r"make it again with .*nm\.make_plan"),
    "NorMuon of a rate": (
        lambda nm: nm.NorMuon(lr=1e-3),
        r"NorMuon: lacks params; write nm\.NorMuon\(model, lr=0\.01\)",
    ),
    "init of a model": (
        lambda nm: nm.init(MODEL, PLAN),
        r"params: expected a dict .*, got GPT; write dict\(model\.named_parameters\(\)\)",
    ),
    "step of a model": (
        lambda nm: nm.update(MODEL, {}, {}, nm.Hyper.of(PARAMS, lr=0.1), PLAN),
        r"params: expected a dict .*, got GPT; write dict\(model\.named_parameters\(\)\)",
    ),
    "init with a model for a plan": (
        lambda nm: nm.init(PARAMS, MODEL),
        r"got GPT; write nm\.make_plan\(model\)",
    ),
    "Hyper.of a model": (
        lambda nm: nm.Hyper.of(MODEL, lr=0.1),
        r"got GPT; of a model write dict\(model\.named_par",
    ),
    "routes_for parameters": (
        lambda nm: nm.routes_for(PARAMS),
        r"got dict; where there is no model, nm\.make_plan\(par",
    ),
    "a word for a route": (
        lambda nm: nm.NorMuon(MODEL, routes={"head.*": "adamw"}),
        r"^routes\['head\.\*'\]: expected a Route, got 'adamw'; write nm\.Route\('adamw'\)$",
    ),
    "a word for a route of a plan": (
        lambda nm: nm.make_plan(PARAMS, routes={"head.*": "Muon"}),
        r"write nm\.Route\('adamw'\) or",
    ),
    "a rate for a route": (
        lambda nm: nm.make_plan(MODEL, routes={"head.*": 0.1}),
        r"^routes\['head\.\*'\]: .* got float; .*nm\.Route\(lr_mul=\.\.\.\)",
    ),
    "a class for a route": (
        lambda nm: nm.routes_for(MODEL, {"head.*": nm.Route}),
        r"^overrides\[.*call it: nm\.Route\(\)",
    ),
    "a route that matches nothing": (
        lambda nm: nm.NorMuon(MODEL, routes={"haed.*": nm.Route("adamw")}),
        r"^routes: \['haed\.\*'\] match no parameter",
    ),
    "betas by place": (
        lambda nm: nm.NorMuon(MODEL, 3e-4, (0.9, 0.95)),
        r"got tuple .*; AdamW's betas are adamw_betas=\(0\.9, 0\.95\)",
    ),
    "a momentum of a Config": (
        lambda nm: nm.Config(momentum=0.9),
        r"Config: 'momentum' .*; write nm\.NorMuon\(model, momentum=\.\.\.\), or nm\.Hyper\.of\(",
    ),
    "betas of a preset": (
        lambda nm: nm.Config.preset("dion", betas=(0.9, 0.99)),
        r"write nm\.NorMuon\(model, adamw_b",
    ),
    "normuon as a preset": (
        lambda nm: nm.Config.preset("normuon"),
        r"got 'normuon'; NorMuon itself is nm\.Config\(\)",
    ),
    "NorMuon of a plan": (
        lambda nm: nm.NorMuon(PLAN),
        r"got Plan; write nm\.NorMuon\(model, config=plan\.config\), which plans by itself$",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_that_python_would_refuse_is_refused_with_the_line_to_write(kind: str) -> None:
    call, text = CALLS[kind]
    with pytest.raises((TypeError, ValueError), match=text):
        call(nm)


def test_a_plan_that_is_copied_is_the_same_plan() -> None:
    import copy

    assert copy.deepcopy({"plan": PLAN})["plan"] is PLAN and copy.copy(PLAN) is PLAN


@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_group_without_names_beside_named_ones_is_refused_with_the_line(as_iterator: Any) -> None:
    base, head = nn.Linear(4, 4), nn.Linear(4, 2)

    def given(named: bool, module: nn.Module) -> Any:
        found = module.named_parameters(prefix="head") if named else module.parameters()
        return {"params": found if as_iterator else [*found], "algorithm": "adamw"}

    for named, text in (
        (True, r"named parameters, as the other .* got a Parameter; .*named_parameters\(prefix="),
        (False, r"without names, as .*, got 'head.weight' .* write {'params': module.parameters"),
    ):
        optimizer = nm.NorMuon([given(named, base)])
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group(given(not named, head))
        with pytest.raises(ValueError, match=text):
            nm.NorMuon([given(named, base), given(not named, head)])
        assert len(optimizer.param_groups) == 1
    for params in ([*base.named_parameters(), head.weight], [head.weight, ("b", head.bias)]):
        with pytest.raises(ValueError, match="named parameters, as others of this group have them"):
            nm.NorMuon([{"params": params, "algorithm": "adamw"}])
    optimizer = nm.NorMuon([given(True, nn.Sequential(base))])
    optimizer.add_param_group({"params": [("out", head.weight)], "algorithm": "adamw"})


# --- from another optimizer


def test_names_are_found_in_a_state_dict_of_one_group_by_order_and_said() -> None:
    with pytest.warns(UserWarning, match="the state_dict has no names; its 7 parameters are taken"):
        assert nm.names_in(SAVED, MODEL) == [*PARAMS]  # type: ignore[arg-type]


def test_names_that_a_state_dict_has_are_taken_without_a_word() -> None:
    named = torch.optim.AdamW(reversed([*MODEL.named_parameters()])).state_dict()
    assert nm.names_in(named, MODEL.named_parameters()) == [*reversed(PARAMS)]


def test_names_that_a_state_dict_cannot_tell_are_refused_with_what_to_write() -> None:
    model = GPT()
    rest = [model.norm, model.embed, model.head]  # norm and layer both have vectors of 8
    groups = [
        {"params": [p for part in rest for p in part.parameters()]},
        {"params": list(model.layer.parameters())},
    ]
    stepped = torch.optim.AdamW(groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    stepped.step()
    turned = adamw_of(nn.Sequential(*reversed([*GPT().children()]))).state_dict()
    for given, why in (
        (torch.optim.AdamW(groups).state_dict(), "it has 2 groups"),
        (stepped.state_dict(), "it has 2 groups"),
        (torch.optim.AdamW(MODEL.head.parameters()).state_dict(), "it has 2 parameters where"),
        (turned, r"its state has shape \(16,\) where 'layer.weight' has \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=rf"no names, and {why}.*nm\.names_in\(optimizer"):
            nm.names_in(given, MODEL)
    with pytest.raises(ValueError, match="a checkpoint has it under one of its keys"):
        nm.names_in({"optimizer": SAVED}, MODEL)


def lines_of(text: str) -> str:
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


@pytest.mark.filterwarnings("ignore:names_in. the state_dict has no names")
@pytest.mark.parametrize("master", ["none", "fp32"])
def test_the_lines_of_the_error_bring_adamws_state_into_the_optimizer(master: Any) -> None:
    model = GPT().bfloat16()
    state_dict = adamw_of(model).state_dict()
    optimizer = nm.NorMuon(
        model, lr=0.02, config=nm.Config(guard="full", normalize=False, master=master)
    )
    with pytest.raises(ValueError, match="was saved by another optimizer") as raised:
        optimizer.load_state_dict(state_dict)
    exec(lines_of(str(raised.value)), {"nm": nm} | locals())
    kinds = optimizer.state[model.norm.weight]
    assert torch.equal(kinds["exp_avg"].bfloat16(), state_dict["state"][3]["exp_avg"])
    assert int(kinds["step"]) == 1
    optimizer.step()


@pytest.mark.filterwarnings("ignore:names_in. the state_dict has no names")
def test_the_error_says_that_routes_go_into_the_plan_and_that_the_scheduler_is_made_anew() -> None:
    model, routes = GPT(), {"layer.weight": nm.Route("adamw")}
    optimizer = nm.NorMuon(model, routes=routes)
    state_dict = adamw_of(model).state_dict()
    with pytest.raises(
        ValueError, match=r"(?s)another optimizer.*Make the scheduler anew.*last_epoch"
    ) as raised:
        optimizer.load_state_dict(state_dict)
    lines = lines_of(str(raised.value))
    with pytest.raises(ValueError, match=r"other options or routes: write nm\.make_plan") as short:
        exec(lines, {"nm": nm} | locals())
    assert "param_names" not in str(short.value)
    told = "  # and routes=, where the optimizer has it"
    assert told in lines
    lines = lines.replace(f"optimizer.config){told}", "optimizer.config, routes=routes)")
    exec(lines, {"nm": nm} | locals())
    assert optimizer.state[model.layer.weight]["exp_avg"].any()


def test_the_lines_of_the_error_bring_in_two_groups_of_the_usual_split() -> None:
    model = GPT()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == on]} for on in (1, 0)]
    adamw = torch.optim.AdamW(groups)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k + 1.0)
    adamw.step()
    optimizer, state_dict = nm.NorMuon(model), adamw.state_dict()
    with pytest.raises(ValueError, match="was saved by another optimizer") as raised:
        optimizer.load_state_dict(state_dict)
    with pytest.warns(UserWarning, match="has no names; its 2 groups"):
        exec(lines_of(str(raised.value)), {"nm": nm} | locals())
    for p in model.parameters():
        if "exp_avg" in optimizer.state[p]:
            assert torch.equal(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"])


def test_a_flat_state_is_refused_with_the_line_that_puts_it_into_the_optimizer() -> None:
    model = GPT()
    optimizer = nm.NorMuon(model, lr=0.02)
    state = nm.convert_state(SAVED, nm.make_plan(model), [*PARAMS], missing="zeros")
    with pytest.raises(ValueError, match="the flat state of a plan") as raised:
        optimizer.load_state_dict(state)
    assert "It lacks" not in str(raised.value)
    exec(lines_of(str(raised.value)), {"nm": nm} | locals())
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], state["head.weight.exp_avg"])
    other = nm.NorMuon(model.bfloat16(), lr=0.02, config=nm.Config(master="fp32"))
    with pytest.raises(ValueError, match=r"(?s)It lacks .*layer.weight.master.*optimizer\.config"):
        other.load_state_dict(state)


def test_groups_that_differ_without_names_are_refused_with_what_to_do() -> None:
    model = GPT()
    split = [{"params": [p for p in model.parameters() if (p.ndim > 1) == on]} for on in (1, 0)]
    routes = nm.routes_for(model)
    one = nm.NorMuon(model.parameters(), lr=0.02, routes=routes)
    two = nm.NorMuon(split, lr=0.02, routes=routes)
    with pytest.raises(ValueError, match=r"\[3, 4\] parameters, got \[7\], .*named_parameters\(\)"):
        two.load_state_dict(one.state_dict())
