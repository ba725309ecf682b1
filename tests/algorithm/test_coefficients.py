"""The coefficient tables against those typed in again from the papers, and what is done with
them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normuon_fn as nm
from normuon_fn.algorithm.coefficients import COEFFICIENTS, resolve
from tests import oracle

NAMES = ["polar_express", *oracle.TABLES]
OWN = ((2.0, -1.5, 0.5), (1.875, -1.25, 0.375))
LINE = np.concatenate([np.linspace(0, 1, 20001), np.logspace(-8, 0, 2001)])


def as_polynomial(sigma: np.ndarray, **options: object) -> np.ndarray:
    """What `orthogonalize` does to singular values, seen through a diagonal matrix of unit
    Frobenius norm.
    """
    assert abs(np.linalg.norm(sigma) - 1) < 1e-12
    x = torch.diag(torch.from_numpy(sigma))
    return nm.orthogonalize(x, method="standard", dtype=torch.float64, **options).diagonal().numpy()


SIGMA = np.logspace(-6, 0, 40) / np.linalg.norm(np.logspace(-6, 0, 40))


# --- the tables ---


def test_every_named_set_is_known_to_the_oracle_and_the_other_way_round() -> None:
    assert set(COEFFICIENTS) == set(NAMES)


@pytest.mark.parametrize("name", oracle.TABLES)
def test_the_table_is_the_published_one(name: str) -> None:
    assert tuple(COEFFICIENTS[name].rows) == tuple(oracle.TABLES[name])
    assert COEFFICIENTS[name].source


def test_the_polar_express_table_is_the_papers_base_list() -> None:
    assert tuple(COEFFICIENTS["polar_express"].rows) == tuple(oracle.POLAR_EXPRESS_BASE)
    assert COEFFICIENTS["polar_express"].source


@pytest.mark.parametrize("safety_factor", [1.0, 1.01, 1.02, 1.05, 1.2])
def test_the_safety_factor_divides_every_row_but_the_last_by_its_odd_powers(
    safety_factor: float,
) -> None:
    got = resolve("polar_express", 8, safety_factor).rows
    np.testing.assert_allclose(got, oracle.polar_express(safety_factor), rtol=1e-14)
    np.testing.assert_allclose(resolve("polar_express", 5, safety_factor).rows, got[:5], rtol=0)


@pytest.mark.parametrize(
    ("safety_factor", "first", "sixth"),
    [
        (
            1.01,
            (8.2051, -22.9019, 16.4607),
            (1.8726, -1.2307, 0.3585),
        ),  # Emerging-Optimizers, HeavyBall
        (1.05, (7.8926, -20.3830, 13.5553), None),  # gram-newton-schulz
    ],
)
def test_polar_express_has_the_rows_that_others_print(
    safety_factor: float, first: oracle.Row, sixth: oracle.Row | None
) -> None:
    rows = resolve("polar_express", 8, safety_factor).rows
    np.testing.assert_allclose(
        rows[0], first, atol=1e-4
    )  # EO prints some digits cut off, not rounded
    if sixth is not None:
        np.testing.assert_allclose(
            rows[5], sixth, atol=1e-4
        )  # EO prints some digits cut off, not rounded


# The printed gain for tiny singular values: it catches a mistyped leading coefficient in the
# package and in the oracle.
@pytest.mark.parametrize(
    ("name", "steps", "safety_factor", "gain"),
    [
        ("simple", 5, None, 485),
        ("quintic", 5, None, 493),
        ("you", 5, None, 493),
        ("polar_express", 5, 1.01, 976),
        ("polar_express", 8, 1.01, 6364),
        ("polar_express", 5, 1.05, 804),
        ("polar_express_cushioned", 5, None, 990),
        ("cans", 5, None, 1049),
        ("aol", 4, None, 147),
        ("deepseekv4", 10, None, 7.9e4),
        ("cubic5", 5, None, 119),
    ],
)
def test_the_gain_for_tiny_singular_values_is_the_published_one(
    name: str, steps: int, safety_factor: float | None, gain: float
) -> None:
    options = {} if safety_factor is None else {"safety_factor": safety_factor}
    rows = resolve(name, steps, **options).rows
    assert math.prod(a for a, _, _ in rows) == pytest.approx(gain, rel=5e-3)


# Where a 1:4 Gaussian has its singular values (sigma / norm within 1/32 .. 3/32 at 256x1024) the
# output lies in the published range; 2e-3 of room, because an infinite Gaussian reaches the ends
# and a sampled one does not.
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("simple", 0.682, 1.136),
        ("quintic", 0.976, 1.033),
        ("polar_express", 0.846, 1.124),
        ("polar_express_cushioned", 0.858, 1.142),
        ("cubic5", 0.771, 1.300),
    ],
)
def test_gaussian_singular_values_end_in_the_published_range(
    name: str, low: float, high: float
) -> None:
    sigma = np.linspace(1 / 32, 3 / 32, 235)
    sigma = np.append(sigma, math.sqrt(1 - (sigma**2).sum()))  # one large value makes the norm 1
    got = as_polynomial(
        sigma,
        coefficients=name,
        steps=5,
        **({"safety_factor": 1.05} if name == "polar_express" else {}),
    )
    assert low - 2e-3 <= got[:-1].min()
    assert got[:-1].max() <= high + 2e-3
    assert got[:-1].max() - got[:-1].min() >= 0.5 * (high - low)  # the gate is not slack


# --- how a set is used ---


@pytest.mark.parametrize("safety_factor", [1.0, 1.01, 1.05])
@pytest.mark.parametrize("steps", [1, 3, 5, 8, 10])
def test_polar_express_maps_singular_values_by_its_rows(steps: int, safety_factor: float) -> None:
    got = as_polynomial(
        SIGMA, coefficients="polar_express", steps=steps, safety_factor=safety_factor
    )
    want = oracle.polynomial(SIGMA, oracle.schedule("polar_express", steps, safety_factor))
    np.testing.assert_allclose(got, want, rtol=2e-12)  # observed: 5e-13


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 12])
@pytest.mark.parametrize("name", [n for n in oracle.TABLES if n not in ("aol", "cubic5")])
def test_steps_beyond_the_table_repeat_or_start_over_as_published(name: str, steps: int) -> None:
    got = as_polynomial(SIGMA, coefficients=name, steps=steps)
    norm = oracle.NORM_FACTOR.get(name, 1.0)
    np.testing.assert_allclose(
        got, oracle.polynomial(SIGMA / norm, oracle.schedule(name, steps)), rtol=2e-12
    )


def test_quintic_starts_over_and_polar_express_stays_on_its_last_row() -> None:
    assert tuple(resolve("quintic", 10).rows) == tuple(oracle.QUINTIC * 2)
    assert tuple(resolve("polar_express", 12).rows[8:]) == (oracle.POLAR_EXPRESS_BASE[-1],) * 4
    assert tuple(resolve("deepseekv4", 12).rows[8:]) == ((2.0, -1.5, 0.5),) * 4
    assert tuple(resolve("cans", 7).rows[5:]) == (oracle.CANS[-1],) * 2


@pytest.mark.parametrize("steps", [1, 4, 6, 10])
def test_cubic5_takes_five_steps_and_no_other_number(steps: int) -> None:
    got = as_polynomial(SIGMA, coefficients="cubic5", steps=5)
    np.testing.assert_allclose(got, oracle.polynomial(SIGMA, oracle.CUBIC5), rtol=2e-12)
    with pytest.raises(ValueError, match="5"):
        resolve("cubic5", steps)
    with pytest.raises(ValueError, match="5"):
        nm.orthogonalize(torch.eye(4), coefficients="cubic5", steps=steps)
    with pytest.raises(ValueError, match="5"):
        nm.Config(coefficients="cubic5", steps=steps)


def test_ones_own_rows_are_used_as_given() -> None:
    got = as_polynomial(SIGMA, coefficients=OWN, steps=2)
    np.testing.assert_allclose(got, oracle.polynomial(SIGMA, OWN), rtol=2e-13)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_ones_own_copy_of_a_named_set_gives_its_bits(method: str) -> None:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    own = nm.orthogonalize(x, method=method, coefficients=tuple(oracle.QUINTIC), steps=5)
    assert torch.equal(own, nm.orthogonalize(x, method=method, coefficients="quintic", steps=5))


def test_a_config_steps_by_its_coefficients() -> None:
    """steps=1 of the rows (1, 0, 0): the update is the normalised gradient itself."""
    params = {"w": torch.zeros(6, 9, dtype=torch.float64)}
    grad = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = nm.Config(coefficients=((1.0, 0.0, 0.0),), steps=1, normalize=False, scale="none",
                       orthogonalize_dtype=torch.float64)  # fmt: skip
    plan = nm.make_plan(params, config)
    result = nm.update(
        params, {"w": grad}, nm.init(plan, params), nm.Hyper.of(params, lr=1.0), plan
    )
    torch.testing.assert_close(result.params["w"], -grad / grad.norm(), rtol=1e-14, atol=0)


def test_polar_express_default_never_overshoots_its_published_maximum() -> None:
    """For any safety factor the composed polynomial keeps [0, 1] within 1.1236: bf16 has room."""
    rows = resolve("polar_express", 5).rows
    assert 1.12 <= oracle.polynomial(LINE, rows).max() <= 1.1236


@pytest.mark.parametrize(
    ("coefficients", "steps", "safety_factor"),
    [
        ("unheard_of", 5, None),
        ("", 5, None),
        ((), 5, None),
        (((1.0, 2.0),), 5, None),
        (((1.0, 2.0, 3.0, 4.0),), 5, None),
        (((1.0, math.nan, 0.0),), 5, None),
        (((math.inf, 0.0, 0.0),), 5, None),
        ((("a", 0.0, 0.0),), 5, None),
        ((1.0, 2.0, 3.0), 5, None),
        ("quintic", 0, None),
        ("quintic", -1, None),
        ("quintic", 2.5, None),
        ("polar_express", 5, 0.0),
        ("polar_express", 5, -1.0),
        ("polar_express", 5, math.nan),
        ("polar_express", 5, math.inf),
    ],
)
def test_malformed_coefficients_are_refused(
    coefficients: object, steps: int, safety_factor: float | None
) -> None:
    options = {"coefficients": coefficients, "steps": steps, "safety_factor": safety_factor}
    with pytest.raises((TypeError, ValueError)):
        nm.Config(**options)
    with pytest.raises((TypeError, ValueError)):
        nm.orthogonalize(torch.eye(4), **options)


def test_rows_may_be_lists_wherever_they_may_be_tuples() -> None:
    rows, x = [[3.0, -4.0, 2.0], [2.0, -1.5, 0.5]], torch.randn(8, 12)
    of_tuples = nm.orthogonalize(x, coefficients=tuple(map(tuple, rows)), steps=2)
    assert torch.equal(nm.orthogonalize(x, coefficients=rows, steps=2), of_tuples)  # type: ignore[arg-type]
    ends = []
    for coefficients in (rows, tuple(map(tuple, rows))):
        config, w = nm.Config(coefficients=coefficients, steps=2), x.clone()  # type: ignore[arg-type]
        nm.foreach_step_(
            [w], [torch.ones(8, 12)], [torch.zeros(8, 12)], [torch.zeros(8, 1)],
            lr=0.1, momentum=0.9, beta2=0.9, weight_decay=0.0, config=config, compiled=False,
        )  # fmt: skip
        ends.append(w)
    assert torch.equal(*ends)
