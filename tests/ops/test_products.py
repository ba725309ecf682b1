"""The three products against float64, on every path.

The paths are torch's products, the interpreted kernel and the kernel on CUDA.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normuon_fn.ops import product_configs, products
from normuon_fn.ops.product_launch import product
from normuon_fn.ops.products import addmm, symmetric_addmm, symmetric_matmul

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (3, 70, 45),
    (2, 130, 33),
    (1, 1, 1),
    (2, 1, 7),
    (2, 7, 1),
    (0, 4, 5),
    (2, 0, 3),
    (2, 3, 0),
]
NAMES = ["symmetric_matmul", "symmetric_addmm", "addmm"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def integers(*shape: int, seed: int = 0, largest: int = 2) -> Tensor:
    return torch.randint(
        -largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)
    ).double()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(
    name: str, n: int, rows: int, cols: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Integers whose products are integers below 2^8, and matrices that commute.

    The latter are sums of permutations r and r^T.
    """
    x = integers(n, rows, cols).clamp(-1, 1) if cols > 60 else integers(n, rows, cols, largest=1)
    cycle = (
        torch.eye(rows, dtype=torch.float64).roll(1, 0)
        if rows
        else torch.zeros(0, 0, dtype=torch.float64)
    )
    ring = (cycle + cycle.mT).expand(n, rows, rows)
    given: dict[str, tuple[Any, ...]] = {
        "symmetric_matmul": (x, 0.5),
        "symmetric_addmm": (3 * ring, ring, 2 * ring + ring @ ring, 2.0, -1.0),
        "addmm": (
            integers(n, rows, cols, seed=1),
            integers(n, rows, rows, seed=2, largest=1),
            x,
            3.0,
        ),
    }
    return tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in given[name])


def expected(name: str, *given: Any) -> Tensor:
    """The product in float64."""
    wide = [v.double() if isinstance(v, Tensor) else v for v in given]
    if name == "symmetric_matmul":
        return wide[1] * (wide[0] @ wide[0].mT)
    c, a, b, beta = wide[:4]
    return beta * c + (wide[4] if len(wide) > 4 else 1.0) * (a @ b)


def call(name: str, *given: Any) -> Tensor:
    return getattr(products, name)(*given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_integers_give_exact_products(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given = arguments(name, *shape, dtype)
    out = call(name, *given)
    assert out.dtype == dtype
    assert torch.equal(out, expected(name, *given).to(dtype))
    if name != "addmm":
        assert torch.equal(out, out.mT)


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    def sliced(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3), torch.nan, dtype=x.dtype)
        wide[:, 1:-1, 2:-1] = x
        return wide[:, 1:-1, 2:-1]

    given = arguments(name, 3, 12, 20)
    views = (
        sliced,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for view in views:
        assert torch.equal(
            call(name, *(view(v) if isinstance(v, Tensor) else v for v in given)),
            call(name, *given),
        )
    repeated = [v[:1].expand_as(v) if isinstance(v, Tensor) else v for v in given]
    assert torch.equal(call(name, *repeated), expected(name, *repeated).float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_entry_reaches_its_rows_and_no_other(bad: float) -> None:
    x = gaussian(2, 20, 30).float()
    x[1, 3, 5] = bad
    out = symmetric_matmul(x)
    assert not out[1, 3].isfinite().any() and not out[1, :, 3].isfinite().any()
    assert out[0].isfinite().all() and out[1, 4:, 4:].isfinite().all()
    a = torch.eye(20).repeat(2, 1, 1)
    assert not addmm(x, a, torch.zeros_like(x), 2.0)[1, 3, 5].isfinite()
    assert not symmetric_addmm(out, a, a, 2.0, 1.0)[1, 3].isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_members_of_vmap_are_more_matrices(name: str) -> None:
    given = arguments(name, 6, 5, 4)
    out = call(name, *given)
    tensors = [v for v in given if isinstance(v, Tensor)]
    rest = given[len(tensors) :]
    several = [v.unflatten(0, (2, 3)) for v in tensors]
    assert torch.equal(
        torch.vmap(lambda *t: call(name, *t, *rest))(*several), out.unflatten(0, (2, 3))
    )
    last = [v.movedim(0, -1) for v in several]
    assert torch.equal(
        torch.vmap(lambda *t: call(name, *t, *rest), in_dims=-1)(*last), out.unflatten(0, (2, 3))
    )
    nested = torch.vmap(torch.vmap(lambda *t: call(name, *t, *rest)))
    assert torch.equal(
        nested(*(v.unflatten(0, (2, 3, 1)) for v in tensors)), out.unflatten(0, (2, 3, 1))
    )
    compiled = torch.compile(
        torch.vmap(lambda *t: call(name, *t, *rest)), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*several), out.unflatten(0, (2, 3)))


def test_vmap_shares_what_has_no_member_dimension() -> None:
    c, a, x, beta = arguments("addmm", 6, 5, 4)
    each = torch.vmap(lambda c, x: addmm(c, a[:3], x, beta))(
        c.unflatten(0, (2, 3)), x.unflatten(0, (2, 3))
    )
    for k in range(2):
        assert torch.equal(each[k], addmm(c[3 * k : 3 * k + 3], a[:3], x[3 * k : 3 * k + 3], beta))
    outer = torch.vmap(lambda c: torch.vmap(lambda x: addmm(c, a[:1], x, beta))(x.unsqueeze(1)))(
        c.unsqueeze(1)
    )
    assert outer.shape == (6, 6, 1, 5, 4)
    assert torch.equal(outer[2, 4], addmm(c[2:3], a[:1], x[4:5], beta))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_it_is_one_torch_product_on_the_cpu(name: str) -> None:
    given = arguments(name, 2, 5, 4)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        return make_boxed_func(record(graph, example))

    with torch.no_grad():
        out = torch.compile(
            lambda *t: call(name, *t), backend=aot_autograd(fw_compiler=compiler), fullgraph=True
        )(*given)
    assert torch.equal(out, call(name, *given))
    ops = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    wanted = "aten.bmm.default" if name == "symmetric_matmul" else "aten.baddbmm.default"
    assert ops.count(wanted) == 1 and set(ops) <= {wanted, "aten.transpose.int", "aten.mul.Tensor"}


@pytest.mark.parametrize("name", NAMES)
def test_on_the_device_it_is_one_opaque_operator(name: str) -> None:
    """Traced with fake CUDA tensors: no device, no Triton code in the graph."""
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    real = arguments(name, 2, 5, 4, torch.float16)
    with FakeTensorMode():
        given = [
            torch.empty(v.shape, dtype=v.dtype, device="cuda") if isinstance(v, Tensor) else v
            for v in real
        ]
        graph = make_fx(lambda *t: call(name, *t))(*given).graph
    ops = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert ops == [f"normuon_fn.{name}.default"]


@pytest.mark.parametrize("name", NAMES)
def test_inductor_compiles_it(name: str) -> None:
    given = arguments(name, 2, 5, 4)
    torch._dynamo.reset()  # a shape and dtype each, all of one function
    with torch.no_grad():
        compiled = torch.compile(lambda *t: call(name, *t), fullgraph=True, dynamic=False)
        assert torch.equal(compiled(*given), call(name, *given))


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_what_it_says(name: str) -> None:
    for views in (False, True):
        given = arguments(name, 2, 5, 4)
        if views:
            given = tuple(v.mT.contiguous().mT if isinstance(v, Tensor) else v for v in given)
        outcome = torch.library.opcheck(getattr(torch.ops.normuon_fn, name).default, given)
        assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fake_tensors_have_the_shape_without_a_device(
    name: str, device: str, dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = arguments(name, 2, 5, 4, dtype)
    with FakeTensorMode():
        given = [
            torch.empty(v.shape, dtype=dtype, device=device) if isinstance(v, Tensor) else v
            for v in real
        ]
        out = call(name, *given)
    assert (
        out.shape == expected(name, *real).shape
        and out.device.type == device
        and out.dtype == dtype
    )
    assert out.is_contiguous()


def test_gradients_are_not_needed_and_do_no_harm() -> None:
    x = gaussian(2, 3, 4).requires_grad_()
    assert torch.equal(symmetric_matmul(x).detach(), symmetric_matmul(x.detach()))


def test_errors_name_the_argument() -> None:
    x, a = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "x: expected a stack", lambda: symmetric_matmul(x[0])),
        (TypeError, "x: expected a floating", lambda: symmetric_matmul(x.long())),
        (TypeError, "x: expected a floating", lambda: symmetric_matmul(None)),  # type: ignore[arg-type]
        (TypeError, "x: expected torch.float32 like c", lambda: addmm(x, a, x.double(), 1.0)),
        (ValueError, "a: expected to be on", lambda: addmm(x, a.to("meta"), x, 1.0)),
        (ValueError, "a: expected shape", lambda: addmm(x, x, x, 1.0)),
        (ValueError, "c: expected shape", lambda: addmm(x[:1], a, x, 1.0)),
        (ValueError, "a: expected shape", lambda: symmetric_addmm(a, x, a, 1.0, 1.0)),
        (ValueError, "b: expected shape", lambda: symmetric_addmm(a, a, x, 1.0, 1.0)),
        (ValueError, "c: expected shape", lambda: symmetric_addmm(x, a, a, 1.0, 1.0)),
    ]
    for error, message, function in cases:
        with pytest.raises(error, match=message):
            function()


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("ratio", [1, 2])
def test_the_tiles_of_a_symmetric_result_are_those_that_meet_its_lower_triangle(
    block_m: int, ratio: int
) -> None:
    config = product_configs.TileConfig(block_m, ratio * block_m, 64, 8, 4, 3)
    for rows in range(1, 12 * block_m, block_m // 4):
        below = sum(
            min(i + block_m, rows) - 1 >= j
            for i in range(0, rows, block_m)
            for j in range(0, rows, config.block_n)
        )
        assert product_configs.tile_count(True, rows, rows, config) == below
        places = product_configs.first_entries(True, rows, rows, config)
        assert len(places) == len(set(map(tuple, places))) == below
        assert all(
            j <= i + block_m - 1 and i % block_m == j % config.block_n == 0 for i, j in places
        )


def test_the_tiles_of_a_full_result_are_all_of_them_some_rows_at_a_time() -> None:
    config = product_configs.TileConfig(16, 32, 64, 2, 4, 3)
    for rows, cols in itertools.product((1, 16, 40, 100), (8, 64, 70)):
        places = product_configs.first_entries(False, rows, cols, config)
        every = itertools.product(range(0, rows, 16), range(0, cols, 32))
        assert sorted(map(tuple, places)) == sorted(every)
        assert len(places) == product_configs.tile_count(False, rows, cols, config)
        groups = [i // 32 for i, _ in places]
        assert groups == sorted(groups)


def test_every_config_fits_the_kernel() -> None:
    tables = {**product_configs.CONFIGS, "specialized": product_configs.WARP_SPECIALIZED}
    for generation, table in tables.items():
        assert set(table) == {
            (kind, size) for kind in product_configs.KINDS for size in product_configs.SIZES
        }
        for (kind, _), config in table.items():
            assert kind == "addmm" or config.block_n in (config.block_m, 2 * config.block_m), (
                generation
            )
            assert config.variant == "pointers" or generation in (9, 10, "specialized")
            assert (config.variant == "specialized") == (generation == "specialized")


# --------------------------------------------------------------------------------------------- CUDA

HALF = [torch.float16, torch.bfloat16]
MEASURED = [
    (48, 768, 768),
    (12, 768, 3072),
    (4, 2048, 2048),
    (3, 70, 45),
    (2, 130, 33),
    (1, 1, 1),
    (2, 1000, 1500),
    (2, 1409, 72),
    (2, 648, 888),
    (1, 5008, 80),
]


def polynomials(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices that commute: r = x x^T / |x|^2 and r^2, rounded to the dtype."""
    r = x.double() @ x.double().mT
    r /= r.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-30) / 8
    return r.to(x.dtype), (r @ r).to(x.dtype)


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def lower(out: Tensor) -> Tensor:
    return out.tril()


@cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", MEASURED)
@pytest.mark.parametrize("transposed", [False, True])
def test_on_cuda_the_error_is_that_of_cublas(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool
) -> None:
    n, rows, cols = shape
    x = gaussian(n, cols, rows).mT if transposed else gaussian(n, rows, cols)
    x = (x / cols**0.5).cuda().to(dtype)
    a, b = polynomials(x)
    square = expected("symmetric_matmul", x, 0.5)
    out = symmetric_matmul(x, 0.5)
    assert torch.equal(out, out.mT)
    assert error(out, square) <= 1.05 * error(torch.bmm(x, x.mT) * 0.5, square)
    inner = expected("symmetric_addmm", a, a, b, 2.0, -0.5)
    out = symmetric_addmm(a, a, b, 2.0, -0.5)
    assert torch.equal(out, out.mT)
    # Rounded to 16 bits, a and b commute only nearly: the upper triangle of the result is a copy of
    # the lower one.
    assert error(lower(out), lower(inner)) <= 1.05 * error(
        lower(torch.baddbmm(a, a, b, beta=2.0, alpha=-0.5)), lower(inner)
    )
    full = expected("addmm", x, a, x, 3.0)
    assert error(addmm(x, a, x, 3.0), full) <= 1.05 * error(torch.baddbmm(x, a, x, beta=3.0), full)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs an H100 or H200",
)
CONSUMERS = {  # of the warp-specialized kernel
    "one, wide tiles": product_configs.TileConfig(128, 256, 64, 4, 8, 3, "specialized", True),
    "one, square tiles": product_configs.TileConfig(128, 128, 64, 8, 8, 5, "specialized", True),
    "two": product_configs.TileConfig(128, 128, 64, 16, 4, 5, "specialized", True),
}


@hopper
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("consumers", CONSUMERS)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 2048, 2048),
        (48, 768, 768),  # many tiles a program
        (2, 1000, 1496),  # tiles and steps along k beyond the end
        (5, 648, 888),  # a row of tiles left over
        (1, 1160, 4104),
        (3, 1416, 72),  # two steps along k
        (2, 256, 64),  # one
        (4, 128, 8),
        (3, 72, 40),  # less than a tile
        (1, 5008, 80),
    ],
)
def test_the_warp_specialized_kernel_has_the_bits_of_the_other_one(
    shape: tuple[int, int, int], consumers: str, dtype: torch.dtype
) -> None:
    n, rows, cols = shape
    x = (gaussian(n, rows, cols) / cols**0.5).cuda().to(dtype)
    b, _ = polynomials(x)
    a, c = gaussian(n, rows, rows).cuda().to(dtype), gaussian(n, rows, cols).cuda().to(dtype)
    wide = torch.full((n, rows + 8, cols + 16), torch.nan, device="cuda", dtype=dtype)
    wide[:, 8:, 8:-8] = x
    view = wide[:, 8:, 8:-8]
    plain = product_configs.TileConfig(128, 256, 64, 8, 8, 3, "persistent", True)
    for given in (
        (x, x.mT, None, 0.5, 0.0, True),
        (view, view.mT, None, 0.5, 0.0, True),
        (b, b, b, 0.5, 2.0, True),
        (a, b, a, -0.5, 1.0, True),  # the lower triangle alone decides
        (b, x, c, 1.0, 3.0, False),
        (a, view, view, 1.0, 3.0, False),
        (b, x, None, 2.0, 0.0, False),
    ):
        expected_bits = product(*given, config=plain)
        for _ in range(3):
            out = product(*given, config=CONSUMERS[consumers])
            assert torch.equal(out, expected_bits)


@hopper
def test_the_warp_specialized_kernel_is_taken_where_it_was_measured() -> None:
    import triton

    device, measured = torch.device("cuda", 0), triton.__version__.startswith("3.6.")
    for symmetric, has_c, rows in itertools.product(
        (False, True), (False, True), (512, 2048, 4096)
    ):
        for fits, ends_fit in itertools.product((False, True), repeat=2):
            config = product_configs.config_for(device, symmetric, has_c, rows, fits, ends_fit)
            assert (config.variant == "specialized") == (measured and fits and ends_fit)


@cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_integers_give_exact_products(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given = tuple(v.cuda() if isinstance(v, Tensor) else v for v in arguments(name, *shape, dtype))
    assert torch.equal(call(name, *given), expected(name, *given).to(dtype))
    torch._dynamo.reset()  # a shape and dtype each, all of one function
    with torch.no_grad():
        compiled = torch.compile(lambda *t: call(name, *t), fullgraph=True, dynamic=False)
        assert torch.equal(compiled(*given), call(name, *given))


@cuda
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_the_operator_is_what_it_says(name: str) -> None:
    given = tuple(
        v.cuda() if isinstance(v, Tensor) else v for v in arguments(name, 2, 5, 4, torch.float16)
    )
    outcome = torch.library.opcheck(getattr(torch.ops.normuon_fn, name).default, given)
    assert set(outcome.values()) == {"SUCCESS"}


@cuda
def test_on_cuda_a_nan_beyond_the_end_stays_there() -> None:
    wide = torch.full((2, 200, 200), torch.nan, device="cuda", dtype=torch.float16)
    wide[:, :130, :33] = gaussian(2, 130, 33).cuda().half()
    x = wide[:, :130, :33]
    assert torch.equal(symmetric_matmul(x), symmetric_matmul(x.clone()))
    x[1, 3, 5] = torch.nan
    out = symmetric_matmul(x)
    assert (
        out[1, 3].isnan().all()
        and out[1, :, 3].isnan().all()
        and int(out.isnan().sum()) == 2 * 130 - 1
    )


@cuda
def test_on_cuda_a_stack_may_hold_more_than_2_to_the_31_entries() -> None:
    n, rows, cols = 1100, 1024, 2048
    if torch.cuda.mem_get_info()[0] < 2 * 2 * n * rows * (cols + rows):
        pytest.skip("needs 14 GB of GPU memory")
    assert n * rows * cols > 2**31
    x = torch.zeros(n, rows, cols, device="cuda", dtype=torch.float16)
    x[-1] = integers(rows, cols, largest=1).cuda()
    a = torch.eye(rows, device="cuda", dtype=torch.float16).expand(n, rows, rows)
    assert torch.equal(symmetric_matmul(x)[-1], (x[-1].double() @ x[-1].double().mT).half())
    assert torch.equal(addmm(x, a, x, 2.0)[-1], 3 * x[-1])
