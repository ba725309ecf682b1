"""Transposed matrices, parts of stacks, heads: each steps as the parameter would that it stands
for.
"""

from __future__ import annotations

import pytest
import torch

import normuon_fn as nm
from normuon_fn.planning.layout import part_of
from normuon_fn.planning.reading import matrices
from tests.routing.test_routes_for import TOLERANCE, gradients, stepped
from tests.routing.torchtitan_model import Transformer


@pytest.mark.parametrize("preset", ["paper", "dion", "modded_nanogpt", "emerging_optimizers"])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 16, 40), (24, 24)])
def test_a_transposed_matrix_steps_as_the_one_that_it_is_the_transpose_of(
    preset: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    config, params = nm.Config.preset(preset), {"w": torch.randn(shape)}
    grads = gradients(params)
    stored = stepped(params, {"w": nm.Route(transposed=True)}, config, grads)["w"]
    plain = stepped(
        {"w": params["w"].mT.contiguous()},
        None,
        config,
        [{"w": g["w"].mT.contiguous()} for g in grads],
    )["w"]
    torch.testing.assert_close(stored.mT, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:The rule of")  # a part of 16x16 could be a convolution's window
@pytest.mark.parametrize("preset", ["dion", "modded_nanogpt"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 24, 16), 0), ((3, 16, 24), 1), ((2, 2, 24, 16), 0), ((2, 2, 16, 24), 1)]
)
def test_parts_of_a_stack_step_as_stacks_of_their_own(
    preset: str, shape: tuple[int, ...], dim: int
) -> None:
    torch.manual_seed(0)
    config, params = nm.Config.preset(preset), {"w": torch.randn(shape)}
    grads, along = gradients(params), len(shape) - 2 + dim
    together = stepped(params, {"w": nm.Route(splits=(8, 16), dim=dim)}, config, grads)["w"]
    for start, length in ((0, 8), (8, 16)):
        cut = [
            p.narrow(along, start, length).contiguous()
            for p in (params["w"], grads[0]["w"], grads[1]["w"])
        ]
        alone = stepped({"w": cut[0]}, None, config, [{"w": cut[1]}, {"w": cut[2]}])["w"]
        torch.testing.assert_close(
            together.narrow(along, start, length), alone, rtol=0, atol=TOLERANCE
        )


def test_a_stack_with_heads_is_refused_and_adamw_takes_no_transposed() -> None:
    with pytest.raises(ValueError, match="a stack can have splits"):
        nm.make_plan({"w": torch.randn(2, 8, 8)}, routes={"w": nm.Route(heads=2)})
    with pytest.raises(ValueError, match="for 'normuon', not for 'adamw'"):
        nm.Route("adamw", transposed=True)


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_of_a_stack_with_splits_knows_which_part_of_each_split_it_has(
    cut: int, dim: int
) -> None:
    """Every rank's parts of the blocks, put where they say they lie, are the whole."""
    shape, splits, ranks = (4, 12, 9) if dim == 0 else (4, 9, 12), (5, 7), 4
    whole = torch.arange(432.0).reshape(shape)
    blocks = matrices(shape, flatten=False, heads=(None, None), splits=splits, dim=dim)
    for view, count, rows, cols in blocks:
        found = torch.full((count, rows, cols), float("nan"))
        for rank, piece in enumerate(whole.tensor_split(ranks, cut)):
            starts = [0, 0, 0]
            starts[cut] = sum(
                len(p.transpose(0, cut)) for p in whole.tensor_split(ranks, cut)[:rank]
            )
            here, n, rect = part_of(
                view, count, rows, cols, list(zip(starts, piece.shape, strict=True))
            )
            first = starts[0] if cut == 0 else 0
            part = here.read(piece.contiguous())
            assert part.shape == (n, rect.rows, rect.cols)
            if rect.size:
                found[
                    first : first + n,
                    rect.row : rect.row + rect.rows,
                    rect.col : rect.col + rect.cols,
                ] = part
        assert torch.equal(found, view.read(whole))


def test_heads_of_attention_step_alone_where_asked() -> None:
    torch.manual_seed(0)
    model = Transformer()
    table = nm.routes_for(model, per_head=True)
    assert table["layers.0.attention.wq.weight"] == nm.Route(heads=6)
    assert table["layers.0.attention.wk.weight"] == nm.Route(heads=2)
    assert table["layers.1.attention.wqkv.weight"] == nm.Route(splits=(24, 8, 8), heads=(6, 2, 2))
    assert table["layers.0.attention.wo.weight"] == nm.Route()
