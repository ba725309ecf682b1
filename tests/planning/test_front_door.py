"""What `make_plan` takes, says once, and refuses: a model, doubts, flattened parameters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import normuon_fn as nm

LIKELY = {"body.0.w": (16, 16), "body.1.w": (16, 16), "stem.weight": (8, 3, 3, 3)}


class Small(nn.Module):
    """An embedding and a head whose names say nothing, around two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(40, 16)
        self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16)
        self.fourth = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.fourth(self.third(self.second(self.first(x)).tanh()))


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def rules(plan: nm.Plan) -> dict[str, str]:
    return {p.name: p.route.algorithm for p in plan.parameters}


def test_a_plan_of_a_model_reads_its_modules() -> None:
    model = Small()
    plan = nm.make_plan(model, nm.Config(guard="full"))
    assert [p.name for p in plan.parameters] == [name for name, _ in model.named_parameters()]
    assert rules(plan)["first.weight"] == rules(plan)["fourth.weight"] == "adamw"
    assert rules(plan)["second.weight"] == "normuon"


def test_routes_beside_a_model_go_first_and_its_modules_decide_about_the_rest() -> None:
    plan = nm.make_plan(Small(), routes={"second.*": nm.Route("frozen")})
    assert rules(plan)["second.weight"] == rules(plan)["second.bias"] == "frozen"
    assert rules(plan)["first.weight"] == "adamw" and rules(plan)["third.weight"] == "normuon"


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with parameters, got a Tanh"):
        nm.make_plan(nn.Tanh())


def test_names_alone_are_doubted_once_at_the_callers_line() -> None:
    shapes = {**LIKELY, "other.weight": (8, 3, 3, 3)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        nm.make_plan(tensors(shapes))
    (warning,) = seen
    assert (warning.filename, warning.lineno) == (__file__, line)
    text = str(warning.message)
    for name in ("stem.weight", "other.weight"):
        assert f"{name}: got normuon flatten" in text and f'"{name}": nm.Route("adamw")' in text
    assert "body.0.w" not in text


@pytest.mark.parametrize(
    "routes", [{"*": nm.Route(flatten=True)}, {lambda name, t: True: nm.Route("adamw")}]
)
def test_what_is_asked_for_is_not_doubted(routes: Any) -> None:
    nm.make_plan(tensors({"stem.weight": (8, 3, 3, 3)}), routes=routes)


def test_a_window_that_is_asked_for_as_matrices_is_said_with_the_line_that_flattens() -> None:
    params = tensors({"a": (8, 3, 3, 3), "b": (8, 3, 5, 5)})
    with pytest.warns(UserWarning, match="read as 24 matrices of 3x3") as seen:
        nm.make_plan(params, routes={"*": nm.Route()})
    assert len(seen) == 1 and '"b": nm.Route(flatten=True)' in str(seen[0].message)


def marked(**attributes: Any) -> Tensor:
    tensor = nn.Parameter(torch.zeros(attributes.pop("entries", 64)))
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


FLAT = {
    "FSDP1": (lambda: marked(_fsdp_flattened=True), "flattened by FSDP1"),
    "an FSDP1 shard without entries": (
        lambda: marked(_fsdp_flattened=True, entries=0), "flattened by FSDP1"
    ),
    "ZeRO": (lambda: marked(ds_id=3, ds_shape=(8, 8), entries=0), "DeepSpeed ZeRO"),
    "an unknown placeholder": (lambda: marked(entries=0), "empty vectors"),
    "an unknown flat buffer": (lambda: marked(entries=2**20), "one flat buffer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAT)
def test_a_flattened_or_empty_parameter_is_refused_by_name_with_the_cure(kind: str) -> None:
    make, text = FLAT[kind]
    params = {"ok": torch.zeros(4, 4), "blocks.0.flat": make()}
    with pytest.raises(ValueError, match=r"'blocks\.0\.flat'.*" + text + ".*fully_shard"):
        nm.make_plan(params)
    with pytest.raises(ValueError, match=text):
        nm.NorMuon(list(params.items()))


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_what_fsdp1_makes_of_a_model_is_refused(two_ranks: None, use_orig_params: bool) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model = FullyShardedDataParallel(
        layers, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    makes: list[Callable[[], object]] = [
        lambda: nm.make_plan(model), lambda: nm.NorMuon(model),
        lambda: nm.NorMuon(model.named_parameters()),
        lambda: nm.NorMuon(model.parameters(), routes=nm.routes_for(model)),
    ]  # fmt: skip
    for make in makes:
        with pytest.raises(ValueError, match=r"flattened by FSDP1.*fully_shard"):
            make()


@pytest.mark.parametrize("kind", ["FSDP1", "an unknown flat buffer"])
def test_a_flat_parameter_that_is_routed_to_adamw_in_so_many_words_is_taken(kind: str) -> None:
    params = {"ok": torch.zeros(4, 4), "flat": FLAT[kind][0]()}
    assert rules(nm.make_plan(params, routes={"flat": nm.Route("adamw")}))["flat"] == "adamw"


def test_what_resembles_a_flattened_parameter_is_taken() -> None:
    params = {
        "w": torch.zeros(4, 4), "no rows": nn.Parameter(torch.zeros(0, 4)),
        "buffer": torch.zeros(0), "long": torch.zeros(2**20 - 1),
    }  # fmt: skip
    assert rules(nm.make_plan(params)) == {
        "w": "normuon", "no rows": "frozen", "buffer": "frozen", "long": "adamw"
    }  # fmt: skip


def test_a_long_bias_of_a_model_is_a_vector_and_a_flat_parameter_of_it_is_refused() -> None:
    with torch.device("meta"):
        layer = nn.Linear(1, 2**20)
        wrapper = nn.Module()
        wrapper.flat = nn.Parameter(torch.zeros(2**20))
    assert set(rules(nm.make_plan(layer)).values()) == {"adamw"}
    with pytest.raises(ValueError, match=r"'flat'.*one flat buffer"):
        nm.make_plan(wrapper)
