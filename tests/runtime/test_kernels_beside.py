"""The thread that compiles kernels while the first step is traced asks for the right ones."""

from __future__ import annotations

import pytest
import torch

import normuon_fn as nm
from normuon_fn.runtime import compiled
from normuon_fn.step import local_update_


@pytest.mark.parametrize("own", [False, True])
def test_kernels_for_rates_of_their_own_are_compiled_beside_where_matrices_have_them(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {f"{k}.weight": torch.randn(8, 16) for k in range(6)}
    hyper_of = {name: k for k, name in enumerate(params)} if own else None
    plan = nm.make_plan(params, nm.Config(), hyper_of=hyper_of)
    seen: list[tuple[int, bool, torch.Size]] = []

    def function(p: object, g: object, s: object, hyper: nm.Hyper, few: nm.Plan) -> None:
        seen.append((len(few.parameters), few.own_rates is not None, hyper.lr.shape))
        local_update_(p, g, s, hyper, few)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    monkeypatch.setattr(compiled.streams, "beside", lambda _: None)
    compiled._step_on_zeros(plan, function)  # type: ignore[arg-type]
    assert seen == [(2, True, torch.Size([2])) if own else (1, False, torch.Size([]))]
