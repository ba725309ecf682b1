"""The kernels over lists against their twins, on a CUDA device or else in Triton's interpreter.

The interpreter is chosen when triton is imported, so on a machine without CUDA test_interpreted.py
runs this file in a process of its own. The interpreter truncates where it casts float32 to
bfloat16, and a device rounds to nearest even: in the interpreter this file cannot vouch for how the
kernels round to bfloat16. `test_bfloat16_is_rounded_to_nearest_even` does, on a CUDA device alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from normuon_fn import ops
from normuon_fn.ops import adamw_reference, coded, codes, launch, lists, reference

orient = importlib.import_module("normuon_fn.ops.orient")  # the package names the function the same

RUNS_HERE = torch.cuda.is_available() or launch.INTERPRETED
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
here = pytest.mark.skipif(
    not RUNS_HERE, reason="needs a CUDA device; without one, runs in the interpreter's process"
)

KINDS = {  # rows, cols, and how every tensor lies in memory
    "even": (32, 64, "plain"),
    "odd": (5, 7, "plain"),
    "ragged": (70, 133, "plain"),
    "tall": (96, 64, "plain"),
    "views": (9, 16, "views"),
    "stacks": (6, 24, "stacks"),
    "row": (1, 40, "plain"),
    "column": (40, 1, "plain"),
}
DTYPES = [torch.float32, torch.bfloat16]


def pairs(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Kinds and dtypes: all with all, or in the interpreter, which is slow, each kind with one
    dtype and "ragged" with all.
    """
    if not launch.INTERPRETED:
        return [(kind, dtype) for kind in KINDS for dtype in dtypes]
    one = [(kind, dtypes[k % len(dtypes)]) for k, kind in enumerate(KINDS) if kind != "ragged"]
    return [*one, *(("ragged", dtype) for dtype in dtypes)]


def turns(kind: str, every: Sequence[Any]) -> Sequence[Any]:
    """All; in the interpreter all for "ragged", and one that has its turn for each other kind."""
    if not launch.INTERPRETED or kind == "ragged":
        return every
    return every[list(KINDS).index(kind) % len(every) :][:1]


def tensors(kind: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    rows, cols, lie = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    if lie == "views":  # a column slice, a transpose, every other row: no two strides alike
        return [
            make(rows, 3 * cols)[:, cols : 2 * cols],
            make(cols, rows).mT,
            make(2 * rows, cols)[::2],
        ]
    if lie == "stacks":  # heads cut along the columns, one of its own, a plain stack
        return [make(rows, 2, cols).transpose(0, 1), make(rows, cols), make(2, rows, cols)]
    return [make(rows, cols) for _ in range(3)]


def close(a: Any, b: Any, dtype: torch.dtype) -> None:
    # In the interpreter a cast to bfloat16 truncates: one ulp. Seen there: float32 2.1e-6,
    # bfloat16 7.8e-3, float16 0.
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 5e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-7, equal_nan=True)


def both(name: str, dtype: torch.dtype, *arguments: Any, writes: int = 0) -> Any:
    """The operator, pure and in place, against the twin; the pure result."""
    whole = name.startswith("adamw")
    function = getattr(adamw_reference if whole else reference, name, None)
    if function is None:
        whole, function = True, getattr(coded, name).twin
    found = getattr(torch.ops.normuon_fn, name)(*arguments)
    expected = packed(
        function(*((lists.unstack,) if writes and not whole else ()), *arguments),
        writes,
    )
    if not writes:
        close(found, expected, dtype)
        return found
    results = [found] if isinstance(found[0], Tensor) else list(found)
    for new, wanted in zip(results[:writes], expected, strict=False):
        close(list(new), list(wanted), dtype)
    copies = [[torch.empty_like(x).copy_(x) for x in given] for given in arguments[:writes]]
    rest = getattr(torch.ops.normuon_fn, f"{name}_")(*copies, *arguments[writes:])
    for copy, new in zip(copies, results, strict=False):
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            for a, b in zip(copy, new, strict=True)
        )
    if len(results) > writes:
        close(found[writes], expected[writes], torch.float32)
        assert torch.equal(rest.nan_to_num(7.0), found[writes].nan_to_num(7.0))
    return found


def packed(result: Any, writes: int) -> Any:
    """What a twin gives as the operator gives it: measures as one tensor."""
    if not writes:
        return torch.stack(result) if isinstance(result, tuple) else result
    return (*result[:writes], *(torch.stack(rest) for rest in result[writes : writes + 1]))


def scalar(x: float) -> Tensor:
    return torch.tensor(x, device=DEVICE)


def flag(x: bool | None) -> Tensor | None:
    return None if x is None else torch.tensor(x, device=DEVICE)


@here
def test_the_kernels_are_what_runs() -> None:
    assert launch.has_kernel(tensors("even", torch.float32, 0))
    assert not launch.has_kernel(tensors("even", torch.float64, 0))


@here
@pytest.mark.parametrize(("kind", "dtype"), pairs(*DTYPES))
def test_advance(kind: str, dtype: torch.dtype) -> None:
    momentums, grads = tensors(kind, torch.float32, 0), tensors(kind, dtype, 1)
    sizes = [1, len(grads) - 1]
    forms = (("ema", False, None), ("sum", True, False), ("ema", True, True))
    for form, nesterov, keep in turns(kind, forms):
        new, *_ = both(
            "advance",
            torch.float32,
            momentums,
            grads,
            scalar(0.9),
            flag(keep),
            sizes,
            form,
            nesterov,
            writes=1,
        )
        assert all(torch.equal(a, b) == (keep is True) for a, b in zip(new, momentums, strict=True))
        both("lookahead", torch.float32, momentums, grads, scalar(0.9), sizes, form, nesterov)
    both("measure", torch.float32, grads, sizes)
    both("largest", torch.float32, grads, [len(grads)])


def as_codes(momentums: list[Tensor], lie: str) -> tuple[list[Tensor], list[Tensor]]:
    """Codes that lie in memory as the momentums do, and their scales."""
    found = [codes.quantized(x) for x in momentums]
    laid = [torch.empty_like(x, dtype=torch.int8) for x in momentums]
    if lie == "views":
        laid = [
            torch.empty(x.shape[0], 3 * x.shape[1], dtype=torch.int8, device=DEVICE)[
                :, x.shape[1] : 2 * x.shape[1]
            ]
            for x in momentums
        ]
    for into, (new, _) in zip(laid, found, strict=True):
        into.copy_(new)
    return laid, [scales for _, scales in found]


@here
@pytest.mark.parametrize("kind", [*KINDS, "long"])
def test_codes_are_advanced_and_gathered_with_the_bits_of_the_twin(kind: str) -> None:
    lie = KINDS[kind][2] if kind in KINDS else "plain"
    shapes = KINDS if kind in KINDS else {"long": (3, 1100, "plain")}
    generator = torch.Generator().manual_seed(2)
    spread = 2.0 ** torch.randint(-9, 9, shapes[kind][1:2], generator=generator).to(DEVICE)
    if kind in KINDS:
        momentums = [x * spread for x in tensors(kind, torch.float32, 0)]
        grads = tensors(kind, torch.bfloat16, 1)
    else:
        momentums = [torch.randn(shapes[kind][:2], generator=generator).to(DEVICE) * spread] * 3
        grads = [x.bfloat16() for x in momentums]
    of_codes, scales = as_codes(momentums, lie)
    sizes, n = [1, len(grads) - 1], sum(map(lists.count, grads))
    forms = (("ema", False, None), ("sum", True, False), ("ema", True, True))
    for form, nesterov, keep in turns(kind if kind in KINDS else "ragged", forms):
        given = (of_codes, scales, grads, scalar(0.9))
        how = (sizes, form, nesterov)
        new, of_new, _ = both("advance_coded", torch.float32, *given, flag(keep), *how, writes=2)
        wanted = coded.advance_coded.twin(*given, flag(keep), *how)
        same = zip([*new, *of_new], [*wanted[0], *wanted[1]], strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        if keep:
            held = zip([*new, *of_new], [*of_codes, *scales], strict=True)
            assert all(torch.equal(a, b) for a, b in held)
        both("lookahead_coded", torch.float32, *given, *how)
        power, inverse = torch.full((n,), 0.5, device=DEVICE), torch.ones(n, device=DEVICE)
        for ahead, turn in ((False, True), (True, False)):
            rest = (power, inverse, *how, ahead, torch.float32, [turn] * 2)
            both("gather_coded", torch.float32, *given, *rest)


@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_codes_of_special_values_have_the_bits_of_the_twin() -> None:
    x = torch.zeros(6, 70, device=DEVICE)
    x[0, 3], x[1, 66], x[2, 0] = float("nan"), float("inf"), 3.4e38
    x[3, 5], x[4, 64], x[5, 1] = 1e-42, 127.0, 127.1
    given = [torch.zeros_like(x, dtype=torch.int8)], [torch.zeros(6, 2, dtype=torch.uint8)]
    given = given[0], [given[1][0].to(DEVICE)]
    how = (scalar(0.0), None, [1], "sum", False)
    found = torch.ops.normuon_fn.advance_coded(*given, [x], *how)
    for new, wanted in zip((found[0][0], found[1][0]), codes.quantized(x), strict=True):
        assert torch.equal(new, wanted)


@here
@pytest.mark.parametrize("exponent", [-126, -60, 0, 100, 120])
def test_measures_of_a_scaled_matrix_are_the_same_bits(exponent: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(1, 9, (1, 70, 133), generator=generator).float().to(DEVICE)
    largest, power, squares = ops.measure(given)
    scaled = ops.measure(given * 2.0**exponent)
    assert scaled[0] == largest * 2.0**exponent and scaled[2] == squares
    assert scaled[1] * 2.0**exponent == power or scaled[1] in (2.0**-126, 2.0**127)


@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (69, 132), (33, 64)])
def test_what_is_not_finite_is_measured_and_gathered(value: float, where: tuple[int, int]) -> None:
    given = torch.ones(2, 70, 133, device=DEVICE)
    given[1][where] = value
    measures = torch.stack(ops.measure(given))
    assert measures.isfinite().all(0).tolist() == [True, False]
    assert measures[0, 0] == 1 and not measures[0, 1].isfinite() and measures[2, 1].isnan()
    out = ops.scale_and_cast(given, measures[1], measures[2], torch.bfloat16)
    assert out[0].isfinite().all() and out[1].isnan().all()


@here
@pytest.mark.parametrize(("kind", "dtype"), pairs(torch.float32, torch.bfloat16, torch.float16))
def test_gather(kind: str, dtype: torch.dtype) -> None:
    momentums, grads = tensors(kind, torch.float32, 0), tensors(kind, torch.bfloat16, 1)
    n = sum(map(lists.count, momentums))
    power, inverse = (
        torch.full((n,), 0.5, device=DEVICE),
        torch.linspace(0.1, 1.0, n, device=DEVICE),
    )
    turn = [KINDS[kind][0] > KINDS[kind][1]] * 2
    for form, nesterov, ahead in (
        ("ema", False, False),
        ("sum", True, False),
        ("ema", False, True),
        ("ema", True, True),
    ):
        both(
            "gather",
            dtype,
            momentums,
            grads,
            scalar(0.9),
            power,
            inverse,
            [1, 2],
            form,
            nesterov,
            ahead,
            dtype,
            turn,
        )


@here
def test_gather_joins_tall_and_wide_and_transposes_the_tall() -> None:
    wide, tall = (
        tensors("odd", torch.float32, 0),
        [x.mT.contiguous() for x in tensors("odd", torch.float32, 1)],
    )
    ones = torch.ones(6, device=DEVICE)
    given, turn = [*wide, *tall], [False, True]
    rule, dtype = ops.MomentumRule("ema", nesterov=False), torch.float32
    out = ops.Operators(kernels=True).gather(
        given, given, scalar(0.9), ones, ones, [3, 3],
        rule=rule, ahead=False, dtype=dtype, transpose=turn,
    )  # fmt: skip
    assert torch.equal(out, torch.stack([*wide, *(x.mT for x in tall)]))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transpose", [False, True])
def test_scale_and_cast_is_one_product_after_the_other(dtype: torch.dtype, transpose: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-64, 65, (3, 70, 133), generator=generator).float().to(DEVICE)
    power, inverse = (torch.tensor(values, device=DEVICE) for values in ([0.5, 1, 4], [1, 2, 0.25]))
    out = ops.scale_and_cast(x, power, inverse, dtype, transpose=transpose)
    expected = (x * (power * inverse)[:, None, None]).to(dtype)
    assert torch.equal(out, expected.mT if transpose else expected) and out.is_contiguous()


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_square_matrices_and_their_transposes_are_turned_the_same_way(dtype: torch.dtype) -> None:
    if dtype == torch.float32 or not launch.INTERPRETED:
        large = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1)).to(
            DEVICE, dtype
        )
        large[1] = large[
            0
        ].mT  # more columns than a program looks at once, of which the first few do not tell
        large[:, 0, :280] = large[:, :280, 0]
        assert torch.equal(ops.orientation(large), orient.orientation_reference(large))
    x = torch.randn(6, 70, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[1] = x[0].mT
    x[2] += x[2].mT.clone()  # symmetric
    x[3, 0], x[3, 1, :5] = x[3, :, 0].clone(), x[3, :5, 1].clone()  # the first row does not tell
    x[4] = 0
    x[5, 2, 7] = float("nan")
    which = ops.orientation(x)
    assert (
        torch.equal(which, orient.orientation_reference(x))
        and which[2] == which[4] == 2
        and which[0] + which[1] == 1
    )
    views = (x, x.mT, x[:, :69, :69])
    if launch.INTERPRETED:  # a dtype each
        views = (views[(torch.float32, torch.bfloat16, torch.float16).index(dtype)],)
    for given in views:
        which = ops.orientation(given)
        out = ops.orient(given, which, torch.float32)
        assert torch.equal(
            out.nan_to_num(7.0),
            orient.orient_reference(given, which, torch.float32).nan_to_num(7.0),
        )
        scales = (
            torch.full((6,), 4.0, device=DEVICE),
            torch.rand(6, generator=torch.Generator().manual_seed(2)).to(DEVICE),
        )
        out = ops.orient(given, which, torch.float32, *scales)
        assert torch.equal(
            out.nan_to_num(7.0),
            orient.orient_reference(given, which, torch.float32, *scales).nan_to_num(7.0),
        )
    assert torch.equal(
        ops.orient(x.mT, ops.orientation(x.mT), dtype)[:5],
        ops.orient(x, ops.orientation(x), dtype)[:5],
    )


@here
@pytest.mark.parametrize(("kind", "dtype"), pairs(*DTYPES))
def test_apply(kind: str, dtype: torch.dtype) -> None:
    rows, cols, _ = KINDS[kind]
    params = tensors(kind, dtype, 0)
    n = sum(map(lists.count, params))
    generator = torch.Generator().manual_seed(2)
    update = torch.randn(n, rows, cols, generator=generator).to(DEVICE, torch.float16)
    for transposed in (False, True):
        given = update.mT.contiguous().mT if transposed else update
        for by_row, skip, cautious in (
            (True, None, False),
            (False, False, True),
            (True, True, False),
        ):
            factor = torch.rand(n, *((rows, 1) if by_row else (1, cols)), generator=generator).to(
                DEVICE
            )
            new = both(
                "apply", dtype, params, given, factor, scalar(0.01), flag(skip), cautious, writes=1
            )
            assert all(torch.equal(a, b) == bool(skip) for a, b in zip(new, params, strict=True))


def exactly(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rests(params: list[Tensor], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """As the parameters lie in memory."""
    torch.manual_seed(seed)
    made = [torch.randint(-(2**15), 2**15, x.shape).to(torch.int16) for x in params]
    if dtype == torch.float32:
        made = [reference.joined_with(x.cpu(), rest) for x, rest in zip(params, made, strict=True)]
    return [
        torch.empty_like(x, dtype=dtype).copy_(rest) for x, rest in zip(params, made, strict=True)
    ]


@here
@pytest.mark.parametrize(("kind", "of"), pairs(torch.int16, torch.float32))
def test_apply_with_masters(kind: str, of: torch.dtype) -> None:
    rows, cols, _ = KINDS[kind]
    params = tensors(kind, torch.bfloat16, 0)
    lacked, n = rests(params, of, 1), sum(map(lists.count, params))
    generator = torch.Generator().manual_seed(2)
    update = torch.randn(n, rows, cols, generator=generator).to(DEVICE, torch.float16)
    for by_row, skip, cautious in ((True, None, False), (False, False, True), (True, True, False)):
        factor = torch.rand(n, *((rows, 1) if by_row else (1, cols)), generator=generator).to(
            DEVICE
        )
        given = (params, lacked, update, factor, scalar(0.01), flag(skip), cautious)
        news, lacks = both("apply_wide", torch.bfloat16, *given, writes=2)
        for old, new in ((params, news), (lacked, lacks)):
            assert all(torch.equal(a, b) == bool(skip) for a, b in zip(new, old, strict=True))
        expected = reference.apply_wide(lists.unstack, *given)
        if of == torch.int16:  # all of it is integers, but for the sums
            assert exactly(news, expected[0]) and exactly(lacks, expected[1])
        else:
            close(lacks, expected[1], torch.float32)


@here
@pytest.mark.parametrize("kind", KINDS)
def test_apply_rounds_by_the_same_chances_as_the_twin(kind: str) -> None:
    rows, cols, _ = KINDS[kind]
    params = tensors(kind, torch.bfloat16, 0)
    n = sum(map(lists.count, params))
    update = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    factor = torch.full((n, rows, 1), 1e-3, device=DEVICE)
    found = []
    for step, skip in ((0, None), (1, False), (2**31 - 1, None), (5, True)):
        chances = (
            torch.tensor(step, dtype=torch.int32, device=DEVICE),
            [7, 2**31 - 1, 0, 12345, 5][:n],
        )
        given = (params, update, factor, scalar(0.01), flag(skip), False, *chances)
        found.append(both("apply", torch.bfloat16, *given, writes=1))
        assert exactly(found[-1], reference.apply(lists.unstack, *given)[0])
    assert exactly(found[3], params) and not any(
        exactly(a, b) for a, b in ((found[0], found[1]), (found[1], found[2]))
    )


@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_masters_that_are_special_are_parted_alike() -> None:
    values = torch.tensor(
        [1e-45, -1e-45, float("nan"), 0.0, -0.0, 3.4028234663852886e38, 1e-40, -1e-40]
    )
    nans = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, 1, 0x7FFF, 0x8000, 0x18000, -0x7FFF8000], dtype=torch.int32
    )
    masters = torch.cat([values, nans.view(torch.float32)]).to(DEVICE).reshape(2, 8)
    zero, one = torch.zeros(1, 2, 8, device=DEVICE), torch.ones(1, 2, 1, device=DEVICE)
    params = [torch.zeros(2, 8, device=DEVICE, dtype=torch.bfloat16)]
    new, rest = torch.ops.normuon_fn.apply_wide(
        params, [masters], zero, one, scalar(0.0), None, False
    )
    assert exactly([rest[0].nan_to_num(7.0)], [masters.nan_to_num(7.0)])
    param, lacked = reference.parted(masters, torch.bfloat16, torch.int16)
    new, rest = torch.ops.normuon_fn.apply_wide(
        [param], [lacked], zero, one, scalar(0.0), None, False
    )
    kept = ~masters.isnan()
    assert torch.equal(reference.joined_with(new[0], rest[0])[kept], masters[kept]) and torch.equal(
        rest[0], lacked
    )
    assert (
        torch.equal(new[0].view(torch.int16)[kept], param.view(torch.int16)[kept])
        and new[0][~kept].isnan().all()
    )
    every_nan = nans[[0, 1, 2] * 5 + [0]].view(torch.float32).to(DEVICE).reshape(1, 2, 8)
    new, rest = torch.ops.normuon_fn.apply_wide(
        params, [lacked], every_nan, one, scalar(0.0), None, False
    )
    assert new[0].isnan().all() and not rest[0].any()
    by_hand = [torch.full((2, 8), -32768, dtype=torch.int16, device=DEVICE)]
    new, rest = torch.ops.normuon_fn.apply_wide(
        params, by_hand, zero, one, scalar(0.0), None, False
    )
    assert not new[0].any() and not rest[0].any()


@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(dtype: torch.dtype) -> None:
    shapes = [(5,), (70, 133), (), (3, 4, 5), (17000,), (0,)]

    def make(seed: int, of: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(DEVICE, of) for shape in shapes]

    params, grads, first = make(0, dtype), make(1, dtype), make(2, torch.float32)
    second = [x.square() for x in make(3, torch.float32)]
    scalars = tuple(map(scalar, (0.9, 0.95, 1e-8, 0.2, 0.1)))
    for skip in (None, False, True):
        both(
            "adamw",
            dtype,
            params,
            first,
            second,
            grads,
            scalar(0.1),
            scalar(0.01),
            *scalars,
            flag(skip),
            writes=3,
        )
    for bad in (None, 1, 4):
        if bad is not None:
            grads[bad].view(-1)[-1] = float("inf")
        flags = both("adamw_flags", torch.float32, first, second, grads, *scalars)
    assert flags.tolist() == [[k in (1, 4) for k in range(6)]] * 2


@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_adamw_with_masters_and_by_chance() -> None:
    shapes = [(5,), (7, 13), (), (3, 4, 5), (17000,)]

    def make(seed: int, of: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(DEVICE, of) for shape in shapes]

    params, grads, first = make(0, torch.bfloat16), make(1, torch.bfloat16), make(2, torch.float32)
    second = [x.square() for x in make(3, torch.float32)]
    scalars = tuple(map(scalar, (0.001, 0.01, 0.9, 0.95, 1e-8, 0.2, 0.1)))
    for skip in (None, True):
        for of in (torch.int16, torch.float32):
            lacked = rests(params, of, 4)
            given = (params, lacked, first, second, grads, *scalars, flag(skip))
            news, lacks, *_ = (
                both("adamw_wide", torch.bfloat16, *given, writes=4)
                if of == torch.float32
                else wide(*given)
            )
            if skip:
                assert exactly(news, params) and exactly(lacks, lacked)
        chances = (torch.tensor(3, dtype=torch.int32, device=DEVICE), [7, 2**31 - 1, 0, 12345, 5])
        given = (params, first, second, grads, *scalars, flag(skip), *chances)
        found, expected = (
            both("adamw", torch.bfloat16, *given, writes=3),
            adamw_reference.adamw(*given),
        )
        # Where the sums round differently (the interpreter uses numpy's), one chance in a thousand
        # falls differently: seen 0 of 17157.
        others = sum(int((a != b).sum()) for a, b in zip(found[0], expected[0], strict=True))
        assert others <= 17
        assert skip or not exactly(found[0], adamw_reference.adamw(*given[:-2])[0])


def wide(*given: Any) -> Any:
    """Of mantissas: masters that are alike may lie on both sides of where the parameter changes."""
    found, expected = torch.ops.normuon_fn.adamw_wide(*given), adamw_reference.adamw_wide(*given)
    masters = [
        [reference.joined_with(x, rest) for x, rest in zip(*result[:2], strict=True)]
        for result in (found, expected)
    ]
    close(*masters, torch.float32)
    copies = [[x.clone() for x in part] for part in given[:4]]
    torch.ops.normuon_fn.adamw_wide_(*copies, *given[4:])
    assert all(exactly(a, b) for a, b in zip(copies, found, strict=True))
    return found


@here
def test_adamw_of_tensors_that_are_not_contiguous() -> None:
    params = [torch.randn(6, 10, device=DEVICE).mT, torch.randn(10, 12, device=DEVICE)[:, ::2]]
    others = [[torch.rand(10, 6, device=DEVICE) for _ in range(2)] for _ in range(3)]
    scalars = tuple(map(scalar, (0.1, 0.01, 0.9, 0.95, 1e-8, 0.2, 0.1)))
    expected, *_ = adamw_reference.adamw(params, *others, *scalars, None)
    torch.ops.normuon_fn.adamw_(params, *others, *scalars, None)
    close(params, expected, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter truncates to bfloat16")
def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """Every operator that casts to bfloat16, at and beside ties."""
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-9] * 16)
    x = torch.stack([x, -x]).reshape(1, 8, 16).to(DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert torch.equal(ops.scale_and_cast(x, one, one, torch.bfloat16), x.bfloat16())
    param, zero = torch.zeros(8, 16, device=DEVICE, dtype=torch.bfloat16), scalar(0.0)
    moved = torch.ops.normuon_fn.apply([param], -x, one.expand(1, 8, 1), zero, None, False)
    assert torch.equal(moved[0], x[0].bfloat16())
    new, _ = torch.ops.normuon_fn.advance([param], [x[0]], zero, None, [1], "ema", False)
    assert torch.equal(new[0], x[0].bfloat16())


@here
@pytest.mark.parametrize("kind", ["odd", "stacks"])
def test_every_matrix_may_have_rates_of_its_own(kind: str) -> None:
    """[n] in the place of a 0-d tensor: as if each matrix were in a list of its own."""
    momentums, grads = (tensors(kind, torch.float32, seed) for seed in (0, 1))
    sizes, n = [1, len(grads) - 1], lists.total(grads)
    beta, decay = (torch.linspace(low, 0.95, n, device=DEVICE) for low in (0.1, 0.01))
    for form, nesterov in (("ema", False), ("sum", True)):
        rule = (sizes, form, nesterov)
        both("advance", torch.float32, momentums, grads, beta, None, *rule, writes=1)
        both("lookahead", torch.float32, momentums, grads, beta, *rule)
        for ahead in (False, True):
            scale = (torch.full((n,), 2.0, device=DEVICE), torch.full((n,), 0.25, device=DEVICE))
            how = (*rule, ahead, torch.float32, [False, False])
            both("gather", torch.float32, momentums, grads, beta, *scale, *how)
    update = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in tensors(kind, torch.float32, 2)])
    factor = torch.ones(n, update.shape[1], 1, device=DEVICE)
    found = both("apply", torch.float32, momentums, update, factor, decay, None, True, writes=1)
    whole = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in found])
    last = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in momentums])[-1:]
    alone = [last.clone()], update[-1:], factor[-1:], decay[-1], None, True
    assert torch.equal(torch.ops.normuon_fn.apply(*alone)[0][0], whole[-1])


@here
def test_every_tensor_of_adamw_may_have_rates_of_its_own() -> None:
    shapes = [(5,), (7, 13), (), (64,)]

    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]

    params, grads, first, second = make(0), make(1), make(2), [x.square() for x in make(3)]
    lows = (0.1, 0.01, 0.5, 0.8, 1e-8, 0.2, 0.1)
    lr, decay, *rates = (torch.linspace(x, 2 * x, 4, device=DEVICE).clamp(max=0.99) for x in lows)
    for where in (slice(0, 4), slice(3, 4)):  # a list that is aligned, and one that is not
        given = [each[where] for each in (params, first, second, grads)]
        own = [x[where].contiguous() for x in (lr, decay, *rates)]
        found = both("adamw", torch.float32, *given, *own, None, writes=3)
        both("adamw_flags", torch.float32, *given[1:], *own[2:])
        alone = [x[-1] for x in own]
        one = torch.ops.normuon_fn.adamw(*([each[-1]] for each in given), *alone, None)
        close([x[0] for x in one], [x[-1] for x in found], torch.float32)
