"""``Config(replicas="share")``: which rank keeps the state of which matrix, decided once, alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import normuon_fn as nm
from compile_tests import graphs

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without torch.distributed"
)
SHARE = nm.Config(replicas="share")
SHAPES = {f"{k}.{name}": (8, 8 * n) for k in range(6) for n, name in ((1, "q"), (4, "up"))}


def plan_of(rank: int, world: int = 4, config: nm.Config = SHARE) -> nm.Plan:
    with graphs.fake_ranks(world, rank=rank) as ranks:
        params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        return nm.make_plan(params | {"bias": torch.zeros(8)}, config, mesh=ranks)


def test_every_matrix_has_one_owner_of_whom_all_ranks_think_alike() -> None:
    plans = [plan_of(rank) for rank in range(4)]
    assert len({tuple(plan.owned.owners.items()) for plan in plans}) == 1
    momentums = [key for plan in plans for key in plan.state if key.endswith(".momentum")]
    assert sorted(momentums) == sorted(f"{name}.momentum" for name in SHAPES)
    for k, plan in enumerate(plans):
        assert {n for n, owner in plan.owned.owners.items() if owner == k} == {
            key.rpartition(".")[0] for key in plan.state if key.endswith(".variance")
        }
        assert {"bias.exp_avg", "guard.step"} <= plan.state.keys()
        assert list(plan.whole_state) == list(plan_of(k, config=nm.Config()).state)
        assert f"of {len(SHAPES)} parameters with matrices is on this rank" in str(plan)


def test_owners_have_like_work() -> None:
    owners = plan_of(0).owned.owners
    of_each = [[name for name, owner in owners.items() if owner == rank] for rank in range(4)]
    assert sorted(sum("up" in name for name in names) for names in of_each) == [1, 1, 2, 2]
    assert max(map(len, of_each)) <= 5


def test_a_rank_without_others_keeps_all_of_it() -> None:
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    plan, each = (nm.make_plan(params, config) for config in (SHARE, nm.Config()))
    assert list(plan.state) == list(each.state) and not plan.owned.elsewhere
    state = nm.init(params, plan)
    assert all(x is state[key] for key, x in nm.gather_state(state, plan).items())


def test_gather_state_wants_a_plan_and_its_state() -> None:
    params = {"w": torch.zeros(4, 4)}
    plan = nm.make_plan(params, SHARE)
    with pytest.raises(TypeError, match="expected a Plan"):
        nm.gather_state({}, params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w\.momentum"):
        nm.gather_state({}, plan)


@pytest.mark.parametrize("kind", ["1-D mesh", "2-D mesh"])
def test_replicas_that_are_dtensors_are_refused_by_name(kind: str) -> None:
    with graphs.fake_ranks(4, kind) as mesh:
        assert isinstance(mesh, DeviceMesh)
        placements = [Replicate(), Shard(0)][: mesh.ndim]
        params = {"layer.weight": graphs.sharded((8, 8), mesh, placements)}
        with pytest.raises(ValueError, match=r"'layer.weight'.*leave out replicas='share'"):
            nm.make_plan(params, SHARE)
        plan = nm.make_plan(params)
        assert "layer.weight.momentum" in plan.state


def test_shards_have_no_replicas_to_share_with() -> None:
    with graphs.fake_ranks(4, "1-D mesh") as mesh:
        assert isinstance(mesh, DeviceMesh)
        params = {"w": graphs.sharded((8, 8), mesh, [Shard(0)])}
        assert list(nm.make_plan(params, SHARE).state) == list(nm.make_plan(params).state)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Config.replicas: expected one of \('each', 'share'\)"):
        nm.Config(replicas="both")  # type: ignore[arg-type]


def layers(count: int) -> nn.ModuleDict:
    return nn.ModuleDict({f"l{k}": nn.Linear(8, 8 * (1 + k % 3), bias=False) for k in range(count)})


@pytest.mark.parametrize("rank", [0, 1])
def test_an_owner_stays_when_groups_are_added_or_others_have_gradients(rank: int) -> None:
    with graphs.fake_ranks(2, rank=rank) as ranks:
        model, more = layers(5), layers(3)
        routes = {"*": nm.Route("normuon")}
        given = list(model.named_parameters())
        optimizer = nm.NorMuon(given, lr=0.1, config=SHARE, mesh=ranks, routes=routes)
        before = {
            name: p for name, p in model.named_parameters() if "momentum" in optimizer.state[p]
        }
        assert 0 < len(before) < 5
        held = {name: optimizer.state[p]["momentum"] for name, p in before.items()}
        optimizer.add_param_group({"params": [(f"m.{n}", p) for n, p in more.named_parameters()]})
        assert {
            name: id(optimizer.state[p]["momentum"])
            for name, p in model.named_parameters()
            if "momentum" in optimizer.state[p]
        } == {name: id(x) for name, x in held.items()}
        assert any("momentum" in optimizer.state[p] for p in more.parameters())
        model["l0"].weight.requires_grad_(False)
        planner = optimizer._settle()
        owners = planner.owners
        plans = [planned.plan for planned in planner.steps.values()]
        assert plans and "l0.weight" not in plans[0].owned.owners
        assert all(owners[name] == k for name, k in plans[0].owned.owners.items())
        assert all((owners[name] == rank) == (name in held) for name, _ in model.named_parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_of_another_optimizer_is_converted_to_what_the_rank_owns(rank: int) -> None:
    model = layers(4)
    other = torch.optim.Muon(model.parameters(), lr=0.1)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    other.step()
    params = {name: p.detach() for name, p in model.named_parameters()}
    with graphs.fake_ranks(2, rank=rank) as ranks:
        config = nm.Config(replicas="share", normalize=False)
        plan = nm.make_plan(params, config, mesh=ranks, routes={"*": nm.Route("normuon")})
        found = nm.convert_state(other.state_dict(), plan, names=list(params))
    assert found.keys() == plan.state.keys()
    assert 0 < sum(key.endswith(".momentum") for key in found) < 4
