"""Every cell of the guard's table: what went wrong x `Config.guard` x `Config.guard_scope`, against
`oracle.GUARD_KEEPS`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from tests import oracle

HUGE = 1e8
SHAPES = {"bad": (6, 8), "twin": (6, 8), "other": (12, 20), "embed": (7, 4)}
GROUPS = [{"bad", "twin"}, {"other"}, {"embed"}]  # equal shapes share a bucket; AdamW has its own


def fails_on_huge(x: Tensor) -> Tensor:
    """A Newton-Schulz that returns NaN for a finite input, as in dion#76."""
    huge = x.abs().amax((-2, -1), keepdim=True) > HUGE / 100
    return torch.where(huge, torch.full_like(x, torch.nan), x / x.norm(dim=(-2, -1), keepdim=True))


def tensors_of(name: str, params: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """-> {"param", "momentum", "variance"}; AdamW's two moments stand in for the last two."""
    kept = {"momentum": "exp_avg", "variance": "exp_avg_sq"} if name == "embed" else {}
    state_of = {k: state[f"{name}.{kept.get(k, k)}"] for k in ("momentum", "variance")}
    return {"param": params[name], **state_of}


@pytest.mark.parametrize("scope", ["step", "bucket"])
@pytest.mark.parametrize("guard", ["off", "output", "full"])
@pytest.mark.parametrize("wrong", ["update", "gradient"])
def test_what_keeps_its_bits_is_what_the_table_says(wrong: str, guard: str, scope: str) -> None:
    g = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=g) for k, s in SHAPES.items()}
    config = nm.Config(guard=guard, guard_scope=scope, orthogonalizer=fails_on_huge)
    plan = nm.make_plan(params, config)
    hyper = nm.Hyper.of(params, lr=0.1, weight_decay=0.1)

    def grads() -> dict[str, Tensor]:
        return {k: torch.randn(s, generator=g) for k, s in SHAPES.items()}

    clean = nm.update(params, grads(), nm.init(plan, params), hyper, plan)
    assert not clean.skipped
    assert clean.flags.sum() == 0

    poisoned = grads()
    poisoned["bad"][2, 3] = HUGE if wrong == "update" else torch.nan
    result = nm.update(clean.params, poisoned, clean.state, hyper, plan)

    skipped = oracle.guard_skips(scope, {"bad"}, GROUPS) if guard != "off" else set()
    for name in SHAPES:
        before, after = (
            tensors_of(name, clean.params, clean.state),
            tensors_of(name, result.params, result.state),
        )
        keeps = oracle.GUARD_KEEPS[guard][wrong] if name in skipped else frozenset()
        for kind in ("param", "variance", "momentum"):
            if name == "embed" and kind != "param" and "momentum" not in keeps:
                continue  # of AdamW's moments the table speaks only where everything is kept
            assert torch.equal(before[kind], after[kind]) == (kind in keeps), (name, kind)
            poisoned_by = (
                name == "bad" and kind not in keeps and (wrong == "gradient" or kind != "momentum")
            )
            assert after[kind].isfinite().all() != poisoned_by, (name, kind)
    assert bool(result.skipped) == (guard != "off")
    if guard != "off":
        assert bool(result.flags[0 if wrong == "update" or guard == "output" else 1].any())
        assert not (wrong == "update" and result.flags[1].any())
        assert result.flags.any(0).sum() == 1
