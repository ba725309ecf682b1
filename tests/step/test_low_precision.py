"""`Config.master`: bfloat16 parameters that keep updates smaller than their last bit."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import normuon_fn as nm
from normuon_fn.ops.rounding import joined_with, noise, parted, places, rounded_by_chance
from normuon_fn.step import local_update_
from tests import guides
from tests.inputs import gaussian

MASTERS = ["none", "mantissa", "fp32", "stochastic"]
SHAPES = {
    "up": (12, 8),
    "down": (8, 12),
    "qkv": (24, 8),
    "experts": (2, 4, 6),
    "bias": (8,),
    "wte": (40, 8),
    "fixed": (4, 4),
}
ROUTES = {"qkv": nm.Route(splits=(8, 8, 8)), "fixed": nm.Route("frozen")}
NAN, INF = float("nan"), float("inf")


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def tensors(
    seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> dict[str, Tensor]:
    made = {
        name: gaussian(*shape, seed=seed + k).bfloat16() * scale
        for k, (name, shape) in enumerate(SHAPES.items())
    }
    return {name: x.to(dtype) for name, x in made.items()}


def setup(master: str, dtype: torch.dtype = torch.bfloat16, lr: float = 1e-5, **options):
    params = tensors(0, dtype)
    plan = nm.make_plan(params, nm.Config(master=master, **options), routes=ROUTES)
    return params, nm.init(plan, params), nm.Hyper.of(params, lr=lr, weight_decay=1e-4), plan


def whole(params: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 masters."""
    rests = {name: state.get(f"{name}.mantissa", state.get(f"{name}.master")) for name in params}
    return {
        name: x.float() if rests[name] is None else joined_with(x, rests[name])
        for name, x in params.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


# --------------------------------------------------------------------------------- the 16 more bits


def floats() -> Tensor:
    """Every high half of a float32 that is finite, each with low halves at and around what decides
    the rounding.
    """
    high = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] * 65536
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234, 0xABCD])
    x = (high + low).to(torch.int32).view(torch.float32).flatten()
    return x[x.isfinite()]


def test_mantissa_and_parameter_are_the_float32_bit_for_bit() -> None:
    x = floats()
    param, rest = parted(x, torch.bfloat16, torch.int16)
    assert rest.dtype == torch.int16 and torch.equal(bits(joined_with(param, rest)), bits(x))


def test_the_parameter_is_the_master_rounded_to_nearest_and_ties_go_away_from_zero() -> None:
    x = floats()
    param, rest = parted(x, torch.bfloat16, torch.int16)
    tie = bits(x) & 0xFFFF == 0x8000
    assert torch.equal(bits(param)[~tie], bits(x.bfloat16())[~tie]) and (rest == -0x8000).equal(tie)
    finite = param.isfinite() & tie
    assert (param[finite].double().abs() > x[finite].double().abs()).all()


def test_special_values_of_the_master() -> None:
    every_nan = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000, -0x400000], dtype=torch.int32
    )
    param, rest = parted(every_nan.view(torch.float32), torch.bfloat16, torch.int16)
    assert param.isnan().all() and not rest.any() and joined_with(param, rest).isnan().all()
    x = torch.tensor([INF, -INF, 0.0, -0.0, torch.finfo(torch.float32).max, 1e-45, -1e-45])
    param, rest = parted(x, torch.bfloat16, torch.int16)
    assert torch.equal(bits(joined_with(param, rest)), bits(x))
    assert (
        param.tolist()[:2] == [INF, -INF]
        and param[4] == INF
        and torch.equal(param.signbit(), x.signbit())
    )


def test_a_parameter_that_was_set_to_zero_by_hand_stays_next_to_zero() -> None:
    rests = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for zero in (0.0, -0.0):
        assert (
            joined_with(torch.full(rests.shape, zero, dtype=torch.bfloat16), rests).abs().max()
            < 1e-38
        )  # never NaN


# ---------------------------------------------------------------------------------------- by chance


def drawn(count: int, salt: int = 7, step: int = 0) -> Tensor:
    return noise(
        torch.tensor(salt),
        places(torch.Size([count]), torch.device("cpu")),
        torch.tensor(step, dtype=torch.int32),
    )


def test_chances_are_uniform_and_those_of_salts_steps_and_places_are_independent() -> None:
    n = 1 << 16
    x = drawn(n)
    assert x.dtype == torch.int32 and int(x.min()) >= 0 and int(x.max()) < 65536
    counts = torch.bincount(x >> 8, minlength=256).double()
    chi_square = float(((counts - n / 256).square() / (n / 256)).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)  # seen: 1.0 deviations of its 22.6
    others = [
        drawn(n, salt=8),
        drawn(n, salt=7 + (1 << 30)),
        drawn(n, step=1),
        drawn(n, step=2**31 - 1),
    ]
    others += [x.roll(1), x.roll(256)]
    for other in others:  # correlation of n pairs: 1 / sqrt(n) is one deviation
        assert abs(float(torch.corrcoef(torch.stack([x, other]).double())[0, 1])) < 5 / math.sqrt(n)
    each = torch.stack(
        [drawn(16, step=k)[3] for k in range(4096)]
    ).double()  # one place, over the steps
    assert abs(float(each.mean()) / 65535 - 0.5) < 5 / math.sqrt(12 * 4096)
    assert abs(float(torch.corrcoef(torch.stack([each[1:], each[:-1]]))[0, 1])) < 5 / math.sqrt(
        4096
    )


def test_a_float_is_rounded_to_its_neighbours_and_to_itself_in_the_mean() -> None:
    n = 1 << 14
    for x in (1.0 + 2**-9, -(1.0 + 2**-9), 3.14159, 1e-3, -1e-40, 1.0 + 2**-7 - 2**-20):
        master = torch.full((n,), x)
        found = rounded_by_chance(master, torch.bfloat16, drawn(n)).double()
        high = bits(master) & -0x10000
        near, far = (
            high.view(torch.float32)[0].double(),
            (high + 0x10000).view(torch.float32)[0].double(),
        )
        assert set(found.tolist()) <= {float(near), float(far)}
        share = (float(master[0]) - float(near)) / float(far - near)
        deviation = math.sqrt(max(share * (1 - share), 1e-9) / n)
        assert abs(float((found == far).double().mean()) - share) < 5 * deviation + 2**-16


def test_what_bfloat16_has_is_never_changed_by_chance_and_special_values_stay() -> None:
    exact = (
        (torch.arange(-(2**15), 2**15, dtype=torch.int64) * 65536)
        .to(torch.int32)
        .view(torch.float32)
    )
    most = torch.full(exact.shape, 65535, dtype=torch.int32)
    found = rounded_by_chance(exact, torch.bfloat16, most)
    kept = ~exact.isnan()
    assert (
        torch.equal(bits(found)[kept], bits(exact.bfloat16())[kept]) and found[~kept].isnan().all()
    )
    every_nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert rounded_by_chance(every_nan, torch.bfloat16, most[:3]).isnan().all()


# --------------------------------------------------------------------------------- a thousand steps


@functools.cache
@functools.cache  # nobody writes what it returns
def trained(
    master: str, dtype: torch.dtype, form: str = "decoupled", seed: int = 0, steps: int = 1000
):
    """1000 steps at lr 1e-5 and weight decay 1e-4, with gradients that mostly agree from step to
    step.
    """
    params, state, hyper, plan = setup(
        master, dtype, weight_decay_form=form, seed=seed, method="standard", steps=3
    )
    mean, noises = tensors(100), [tensors(200 + 10 * k, scale=0.5) for k in range(7)]
    grads = [
        {name: (mean[name] + own[name]).to(dtype) for name in mean} for own in noises
    ]  # the same values in every dtype
    for k in range(steps):
        local_update_(params, grads[k % 7], state, hyper, plan)
    return params, state


@pytest.mark.parametrize(
    ("master", "form", "steps"),
    [("mantissa", "decoupled", 1000), ("mantissa", "cautious", 200), ("fp32", "decoupled", 200)],
)
def test_many_small_steps_are_those_of_float32_bit_for_bit(
    master: str, form: str, steps: int
) -> None:
    params, state = trained(master, torch.bfloat16, form, steps=steps)
    expected, _ = trained("none", torch.float32, form, steps=steps)
    assert same(whole(params, state), expected)
    for name, x in expected.items():
        rounded = (
            parted(x, torch.bfloat16, torch.int16)[0] if master == "mantissa" else x.bfloat16()
        )
        assert torch.equal(params[name], rounded)
        assert torch.equal(x, tensors(0, torch.float32)[name]) == (name == "fixed")


def test_without_a_master_small_steps_are_lost_and_by_chance_they_are_kept_in_the_mean() -> None:
    before, (expected, _) = (
        tensors(0, torch.float32),
        trained("none", torch.float32, "decoupled", steps=1000),
    )
    (nearest, _), (chance, _) = (
        trained(master, torch.bfloat16) for master in ("none", "stochastic")
    )
    for names in (("up", "down", "qkv", "experts"), ("bias", "wte")):  # NorMuon; AdamW
        went = torch.cat([(expected[name] - before[name]).flatten() for name in names]).double()
        last = torch.cat(
            [
                torch.ldexp(torch.tensor(1.0), x.abs().log2().floor() - 7).flatten()
                for x in map(before.get, names)
            ]
        )

        def off(params: dict[str, Tensor], names=names, went=went) -> float:
            """How far they are from where float32 went, along the way there, in the mean."""
            error = torch.cat(
                [(params[name].double() - expected[name]).flatten() for name in names]
            )
            return float((error * went.sign()).mean())

        # A step of d in units u of the last bit is a chance of d / u, of variance at most d u.
        # Twice: it goes back and forth.
        deviation = math.sqrt(float((2 * went.abs() * last.double()).sum())) / len(went)
        assert abs(off(chance)) < 4 * deviation  # seen: 0.2 and 0.9 deviations
        assert off(nearest) < -0.5 * float(went.abs().mean()) < -4 * deviation


def test_chances_are_reproducible_and_depend_on_the_seed() -> None:
    own = trained.__wrapped__
    first, again, other = (
        own("stochastic", torch.bfloat16, seed=k, steps=50)[0] for k in (0, 0, 1)
    )
    assert same(first, again)
    assert not any(
        torch.equal(first[name], other[name]) for name in first if name not in ("fixed", "bias")
    )


# ------------------------------------------------------------------------------------ in every step


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("guard", ["off", "full"])
def test_in_place_equals_pure_and_pure_writes_nothing(master: str, guard: str) -> None:
    params, state, hyper, plan = setup(master, lr=0.01, guard=guard)
    for seed in (1, 2):
        grads, before = tensors(seed), (copies(params), copies(state))
        result = nm.update(*map(copies, (params, grads, state)), hyper, plan)
        nm.update(params, grads, state, hyper, plan)
        assert same(params, before[0]) and same(state, before[1])
        local_update_(params, grads, state, hyper, plan)
        assert same(result.params, params) and same(result.state, state)
        moved = [
            not torch.equal(state[name], before[1][name])
            for name in state
            if name.endswith((".mantissa", ".master"))
        ]
        assert all(moved) and len(moved) == (len(SHAPES) - 1) * (master in ("mantissa", "fp32"))


@pytest.mark.parametrize("scope", ["step", "bucket"])
@pytest.mark.parametrize("victim", ["up", "bias"])
@pytest.mark.parametrize("master", ["mantissa", "fp32", "stochastic"])
def test_a_skipped_step_keeps_the_bits_of_parameters_and_rests(
    master: str, victim: str, scope: str
) -> None:
    params, state, hyper, plan = setup(master, lr=0.01, guard="output", guard_scope=scope)
    local_update_(params, tensors(1), state, hyper, plan)
    before = copies(params), copies(state)
    grads = tensors(2)
    grads[victim].view(-1)[3] = NAN
    pure = nm.update(*map(copies, (params, grads, state)), hyper, plan)
    local_update_(params, grads, state, hyper, plan)
    assert same(pure.params, params) and all(
        torch.equal(pure.state[name], state[name]) for name in state if victim not in name
    )
    rests = [name for name in state if name.endswith((".mantissa", ".master"))]
    kept = {name for name in params if torch.equal(params[name], before[0][name])}
    assert kept == set(params) if scope == "step" else {victim, "fixed"} <= kept < set(params)
    for name in rests:
        assert torch.equal(state[name], before[1][name]) == (name.rpartition(".")[0] in kept)
    skip = nm.update(params, tensors(3), state, hyper, plan, found_inf=torch.tensor(1.0))
    assert same(skip.params, params) and all(
        torch.equal(skip.state[name], state[name]) for name in rests
    )


def test_without_a_guard_a_nan_is_a_nan_in_the_parameter() -> None:
    params, state, hyper, plan = setup("mantissa", guard="off")
    grads = tensors(1)
    grads["up"][0, 0] = NAN
    result = nm.update(params, grads, state, hyper, plan)
    assert result.params["up"].isnan().any() and not result.params["down"].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_that_need_no_master_get_none_and_the_same_bits(dtype: torch.dtype) -> None:
    found = []
    for master in MASTERS:
        params, state, hyper, plan = setup(master, dtype, lr=0.01)
        assert not any(name.endswith((".mantissa", ".master")) for name in state)
        found.append(nm.update(params, tensors(1, dtype), state, hyper, plan))
    assert all(same(result.params, found[0].params) for result in found[1:])


def test_float16_has_float32_masters_and_no_others() -> None:
    params, state, hyper, plan = setup("fp32", torch.float16, lr=1e-6)
    wide, wide_state, _, wide_plan = setup("none", torch.float32)
    for seed in range(1, 20):
        local_update_(params, tensors(seed, torch.float16), state, hyper, plan)
        local_update_(wide, tensors(seed, torch.float32), wide_state, hyper, wide_plan)
    assert same(whole(params, state) | {"fixed": wide["fixed"]}, wide)
    assert same(params, {name: x.half() for name, x in wide.items()})
    for master in ("mantissa", "stochastic"):
        with pytest.raises(
            ValueError, match=r"params\['up'\].*bfloat16, got torch.float16.*use 'fp32'"
        ):
            setup(master, torch.float16)


def test_parameters_of_several_dtypes_in_one_bucket() -> None:
    def problem(master: str):
        dtypes = {
            "a": torch.bfloat16,
            "b": torch.float32,
            "c": torch.bfloat16,
            "v": torch.bfloat16,
            "w": torch.float32,
        }
        shapes = {name: (6, 8) if name in "abc" else (5,) for name in dtypes}
        params, grads = (
            {n: gaussian(*shapes[n], seed=s).to(d) for n, d in dtypes.items()} for s in (0, 1)
        )
        plan = nm.make_plan(params, nm.Config(master=master))
        return params, grads, nm.init(plan, params), nm.Hyper.of(params, lr=1e-3), plan

    params, grads, state, hyper, plan = problem("mantissa")
    assert {k.split(".")[0] for k in state if k.endswith("mantissa")} == {"a", "c", "v"} and len(
        plan.buckets
    ) == 1
    local_update_(params, grads, state, hyper, plan)
    plain = problem("none")
    result = nm.update(*plain)
    assert all(torch.equal(params[name], result.params[name]) for name in "bw")
    assert all(
        torch.equal(whole(params, state)[name].bfloat16(), result.params[name]) for name in "acv"
    )  # the first step


def test_init_begins_with_the_parameters_as_masters_and_zeros_for_the_rest() -> None:
    for master, suffix, dtype in (
        ("mantissa", ".mantissa", torch.int16),
        ("fp32", ".master", torch.float32),
    ):
        params, state, _, _ = setup(master)
        rests = {name: x for name, x in state.items() if name.endswith(suffix)}
        assert rests.keys() == {name + suffix for name in SHAPES if name != "fixed"}
        assert all(
            x.dtype == dtype and x.shape == SHAPES[name.removesuffix(suffix)]
            for name, x in rests.items()
        )
        assert same(whole(params, state), {name: x.float() for name, x in params.items()})
        assert not any(x.any() for name, x in state.items() if not name.endswith(".master"))
    assert not any(name.endswith((".mantissa", ".master")) for name in setup("stochastic")[1])


def test_a_missing_gradient_leaves_parameter_and_mantissa() -> None:
    params, state, hyper, plan = setup("mantissa", lr=0.01)
    local_update_(params, tensors(1), state, hyper, plan)
    grads = {name: None if name in ("up", "wte") else x for name, x in tensors(2).items()}
    result = nm.update(params, grads, state, hyper, plan)
    for name in SHAPES:
        moved = name not in ("up", "wte", "fixed")
        assert torch.equal(result.params[name], params[name]) != moved
        if name != "fixed":
            assert torch.equal(result.state[f"{name}.mantissa"], state[f"{name}.mantissa"]) != moved


def test_chances_of_a_parameter_do_not_depend_on_the_others() -> None:
    params, state, hyper, plan = setup("stochastic", lr=0.01)
    result = nm.update(params, tensors(1), state, hyper, plan)
    alone = {name: params[name] for name in ("wte", "bias")}
    few = nm.make_plan(alone, plan.config)
    found = nm.update(
        alone, {name: tensors(1)[name] for name in alone}, nm.init(few, alone), hyper, few
    )
    assert all(torch.equal(found.params[name], result.params[name]) for name in alone)


@pytest.mark.parametrize("master", ["mantissa", "stochastic"])
def test_an_ensemble_is_its_members(master: str) -> None:
    members = []
    for seed in (0, 40):
        _, state, hyper, plan = setup(master, lr=0.01, orthogonalize_dtype=torch.float32)
        given = tensors(seed), tensors(seed + 20), state
        members.append((nm.update(*given, hyper, plan), given))
    stacked = [
        {name: torch.stack([given[k][name] for _, given in members]) for name in members[0][1][k]}
        for k in range(3)
    ]

    def one(params, grads, state):
        result = nm.update(params, grads, state, hyper, plan)
        return result.params, result.state

    params, state = torch.vmap(one)(*stacked)
    for k, (result, _) in enumerate(members):
        for name in SHAPES:  # products of another batch size may round otherwise: seen 0
            torch.testing.assert_close(params[name][k], result.params[name], rtol=2**-7, atol=0)
        if master == "mantissa":
            one_whole = whole(
                {n: x[k] for n, x in params.items()}, {n: x[k] for n, x in state.items()}
            )
            for name, x in whole(result.params, result.state).items():
                torch.testing.assert_close(one_whole[name], x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("master", ["mantissa", "stochastic"])
def test_compiled_steps_are_the_eager_one(master: str) -> None:
    shapes = {"w": (4, 6), "bias": (8,)}
    params, grads = (
        {k: gaussian(*s, seed=n).bfloat16() for k, s in shapes.items()} for n in (0, 1)
    )
    plan = nm.make_plan(params, nm.Config(master=master, guard="full", method="standard", steps=1))
    state, hyper = nm.init(plan, params), nm.Hyper.of(params, lr=1e-3)
    eager = nm.update(params, grads, state, hyper, plan)
    nm.step_(params, grads, state, hyper, plan)
    for name, x in whole(eager.params, eager.state).items():  # seen 0
        torch.testing.assert_close(
            whole(params, state)[name], x, rtol=0, atol=1e-6 if master == "mantissa" else 0.0
        )


def test_a_run_goes_on_from_what_torch_and_safetensors_saved(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    params, state, hyper, plan = setup("mantissa", lr=1e-4)
    local_update_(params, tensors(1), state, hyper, plan)
    expected = nm.update(params, tensors(2), state, hyper, plan)
    torch.save((params, state), tmp_path / "run.pt")
    safetensors.save_file({**params, **state}, tmp_path / "run.safetensors")
    read = safetensors.load_file(tmp_path / "run.safetensors")
    for kept in (
        torch.load(tmp_path / "run.pt", weights_only=True),
        [{k: read[k] for k in part} for part in (params, state)],
    ):
        found = nm.update(kept[0], tensors(2), kept[1], hyper, plan)
        assert same(found.params, expected.params) and same(found.state, expected.state)


def test_on_two_ranks_masters_lie_like_parameters_and_are_float32_and_copies_stay_alike(
    tmp_path,
) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    from tests.distributed.low_precision import run

    ranks = run(tmp_path)
    for seen in ranks:
        wrong = [
            (kind, claim)
            for kind, claims in seen.items()
            for claim, held in claims.items()
            if not held
        ]
        assert not wrong and set(seen) == {"Shard(0)", "Shard(1)", "Replicate", "plain"}
    for kind in ("Replicate", "plain"):
        assert ranks[0][kind]["bits"] == ranks[1][kind]["bits"]


def memory() -> list[str]:
    """The table of fine-tuning-lora.md, from what a plan says of a matrix of 1024x1024."""

    def bytes_each(dtype: torch.dtype, **options) -> str:
        adamw = options.pop("adamw", False)
        params = {"w": torch.empty(1024, 1024, dtype=dtype)}
        plan = nm.make_plan(
            params, nm.Config(**options), routes={"w": nm.Route("adamw" if adamw else "normuon")}
        )
        state = [spec for name, spec in plan.state.items() if not name.startswith("guard.")]
        total = (
            dtype.itemsize
            + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in state) / 2**20
        )
        return f"{total:.3f}".rstrip("0").rstrip(".")

    rows = [(torch.float32, master) for master in MASTERS] + [
        (torch.bfloat16, master) for master in MASTERS
    ]
    lines: list[str] = []
    for dtype, master in [*rows, (torch.float16, "none"), (torch.float16, "fp32")]:
        cells = [
            bytes_each(dtype, master=master, momentum_dtype=momentum, normalize=normalize)
            for normalize in (True, False)
            for momentum in (None, torch.bfloat16)
        ]
        cells.append(bytes_each(dtype, master=master, adamw=True))
        label = "any" if dtype == torch.float32 else f'`"{master}"`'
        line = f"| {str(dtype).removeprefix('torch.')} | {label} | {' | '.join(cells)} |"
        lines += [] if line in lines else [line]
    return lines


def test_the_guide_says_how_many_bytes_a_parameter_takes() -> None:
    printed = (
        guides.text("fine-tuning-lora.md").partition("bytes per parameter")[2].split("\n\n")[1]
    )
    assert printed.splitlines()[2:] == memory()


def test_every_matrix_has_chances_of_its_own() -> None:
    of = []
    for seed in (0, 1):
        plan = setup("stochastic", seed=seed)[3]
        of += [salt for bucket in plan.buckets for block in bucket.blocks for salt in block.salts]
        of += [salt for bucket in plan.adamw for salt in bucket.salts]
    assert len(set(of)) == len(of) == 2 * (1 + 1 + 3 + 2 + 1 + 1) and all(
        0 <= salt < 2**31 for salt in of
    )
    assert not any(block.salts for bucket in setup("none")[3].buckets for block in bucket.blocks)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Config\.master: expected one of .*got 'bf16'"):
        nm.Config(master="bf16")
    with pytest.raises(TypeError, match=r"Config\.seed: expected an int, got 1\.0"):
        nm.Config(seed=1.0)
    params, state, hyper, plan = setup("mantissa")
    with pytest.raises(ValueError, match=r"state\['up\.mantissa'\]: expected dense torch.int16"):
        nm.update(params, tensors(1), {**state, "up.mantissa": torch.zeros(12, 8)}, hyper, plan)
