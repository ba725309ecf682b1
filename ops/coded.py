"""The front pass and `gather` over momentums in one byte an entry: see codes.py.

The kernels are those of advance.py and gather.py, which restore codes as they load them and
quantize before they store. What is measured and orthogonalized is what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .advance import launch_front, measure_fake
from .codes import blocks_of, quantized, restored
from .gather import gather_fake, launch_gather
from .implementations import with_kernel
from .lists import chained, stack, total
from .reference import Measures, Write
from .registration import Lists

# ------------------------------------------------------------------------------------------ twins


def _advanced(
    codes: list[Tensor], scales: list[Tensor], grad: Tensor, beta: Tensor, form: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The old codes and scales as stacks, and the new ones."""
    old = stack(codes), stack(scales)
    return old, quantized(reference.advanced(restored(*old), grad, beta, form))


def _advance_twin(
    write: Write,
    codes: list[Tensor],
    scales: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    keep: Tensor | None,
    sizes: list[int],
    form: str,
    nesterov: bool,
    *,
    norms: bool = False,
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...], list[Tensor]]:
    """With ``norms``, those of gradients and of the restored new codes follow the measures."""
    new_codes, new_scales, found, stacks = [], [], [], []
    rest: list[tuple[Tensor, Tensor]] = []
    for part, matrices in reference.runs(sizes, codes):
        grad, own = stack(grads[part]), reference.part_of(beta, matrices)
        old, new = _advanced(codes[part], scales[part], grad, own, form)
        if keep is not None:
            new = torch.where(keep, old[0], new[0]), torch.where(keep, old[1], new[1])
        x = restored(*new)
        found.append(reference.measures(grad, reference.update_of(x, grad, own, form, nesterov)))
        if norms:
            rest.append((reference.norm(grad, x.dtype), reference.norm(x, x.dtype)))
        stacks.append(x)
        new_codes.append(write(codes[part], new[0]))
        new_scales.append(write(scales[part], new[1]))
    more = [reference.joined(list(parts), 0) for parts in zip(*rest, strict=True)]
    measures = (*reference.together(found), *more) if norms else reference.together(found)
    return chained(new_codes), chained(new_scales), measures, stacks


def _lookahead_twin(
    codes: list[Tensor],
    scales: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Measures:
    found = []
    for part, matrices in reference.runs(sizes, codes):
        grad, own = stack(grads[part]), reference.part_of(beta, matrices)
        x = restored(*_advanced(codes[part], scales[part], grad, own, form)[1])
        found.append(reference.measures(grad, reference.update_of(x, grad, own, form, nesterov)))
    return reference.together(found)


def _gather_twin(
    codes: list[Tensor],
    scales: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    power: Tensor,
    inverse: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
    ahead: bool,
    dtype: torch.dtype,
    transpose: list[bool],
) -> Tensor:
    stacks = []
    for part, matrices in reference.runs(sizes, codes):
        if ahead:
            grad, own = stack(grads[part]), reference.part_of(beta, matrices)
            now = _advanced(codes[part], scales[part], grad, own, form)[1]
        else:
            now = stack(codes[part]), stack(scales[part])
        stacks.append(restored(*now))
    return reference.gather(
        codes, grads, beta, power, inverse, sizes, form, nesterov, False, dtype, transpose, stacks
    )


# ---------------------------------------------------------------------------------------- kernels


def _launch_advance(
    into: Lists,
    codes: list[Tensor],
    scales: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    keep: Tensor | None,
    sizes: list[int],
    form: str,
    nesterov: bool,
    *,
    norms: bool = False,
) -> Tensor:
    lists = (codes, into[0], grads)
    return launch_front(
        lists, sizes, write=True, beta=beta, keep=keep, form=form, nesterov=nesterov,
        norms=norms, scales=(scales, into[1]),
    )  # fmt: skip


def _launch_lookahead(
    codes: list[Tensor],
    scales: list[Tensor],
    grads: list[Tensor],
    beta: Tensor,
    sizes: list[int],
    form: str,
    nesterov: bool,
) -> Tensor:
    lists = (codes, grads)
    return launch_front(lists, sizes, beta=beta, form=form, nesterov=nesterov, scales=(scales,))


def _launch_gather(codes: list[Tensor], scales: list[Tensor], *rest: Any) -> Tensor:
    return launch_gather(codes, *rest, scales)  # type: ignore[call-arg]


def _gather_fake(codes: list[Tensor], scales: list[Tensor], *rest: Any) -> Tensor:
    return gather_fake(codes, *rest)


# --------------------------------------------------------------------------------- what is refused


def _check(operator: str, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    checks.of_dtype(operator, "codes", codes[0], torch.int8)
    checks.of_dtype(operator, "scales", scales[0], torch.uint8)
    expected = [
        torch.Size((*shape[:-1], blocks_of(shape[-1]))) for shape in map(Tensor.size, codes)
    ]
    found = list(map(Tensor.size, scales))
    if found != expected:
        raise ValueError(
            f"{operator}: expected scales of shapes {list(map(list, expected[:8]))}, got "
            f"{list(map(list, found[:8]))}"
        )


def _check_advance(codes: list[Tensor], scales: list[Tensor], *rest: Any) -> None:
    _check("advance_coded", codes, scales)
    checks.advance(codes, *rest)


def _check_lookahead(codes: list[Tensor], scales: list[Tensor], *rest: Any) -> None:
    _check("lookahead_coded", codes, scales)
    checks.lookahead(codes, *rest)


def _check_gather(codes: list[Tensor], scales: list[Tensor], *rest: Any) -> None:
    _check("gather_coded", codes, scales)
    checks.gather(codes, *rest)


_RULE = "int[] sizes, str form, bool nesterov"
_ADVANCE = (
    "(Tensor[] codes, Tensor[] scales, Tensor[] grads, Tensor beta, Tensor? keep, "
    f"{_RULE}) -> (Tensor[], Tensor[], Tensor)"
)
advance_coded = with_kernel(
    "advance_coded",
    _ADVANCE,
    _launch_advance,
    measure_fake,
    check=_check_advance,
    writes=("codes", "scales"),
    twin=_advance_twin,
)
# The same, and norms: see measured.py.
advance_coded_measured = with_kernel(
    "advance_coded_measured",
    _ADVANCE,
    partial(_launch_advance, norms=True),
    lambda codes, *rest: codes[0].new_empty((5, total(codes)), dtype=torch.float32),
    check=_check_advance,
    writes=("codes", "scales"),
    twin=partial(_advance_twin, norms=True),
)
lookahead_coded = with_kernel(
    "lookahead_coded",
    f"(Tensor[] codes, Tensor[] scales, Tensor[] grads, Tensor beta, {_RULE}) -> Tensor",
    _launch_lookahead,
    measure_fake,
    check=_check_lookahead,
    twin=_lookahead_twin,
)
gather_coded = with_kernel(
    "gather_coded",
    "(Tensor[] codes, Tensor[] scales, Tensor[] grads, Tensor beta, Tensor power, Tensor inverse, "
    f"{_RULE}, bool ahead, ScalarType dtype, bool[] transpose) -> Tensor",
    _launch_gather,
    _gather_fake,
    check=_check_gather,
    twin=_gather_twin,
)
