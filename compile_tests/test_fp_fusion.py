"""The bits of the kernels do not depend on Triton's default for fused multiply-adds.

Triton 3.9 fuses a product and a sum unless told otherwise, 3.10 does not, and the environment
variable TRITON_DEFAULT_FP_FUSION turns either round.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from compile_tests.test_operators import BASE, arguments
from normuon_fn import ops
from normuon_fn.ops import lazy, products

triton = pytest.importorskip("triton")
ahead_of_time = importlib.import_module("compile_tests.test_kernels_ahead_of_time")
CASES, compiled, pytestmark = (
    ahead_of_time.CASES,
    ahead_of_time.compiled,
    ahead_of_time.pytestmark,
)

FUSES = {"pointer_kernel", "descriptor_kernel"}  # ``beta c + alpha a b`` is rounded once
DEFAULTS = ["0", "1"]


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(ops.__path__):
        yield importlib.import_module(f"normuon_fn.ops.{found.name}")


lazy.load()
KERNELS = {
    value.__name__: value
    for module in modules()
    for name, value in vars(module).items()
    if isinstance(value, triton.JITFunction)
    and name.endswith("_kernel")
    and not value.is_gluon()  # test_kernels_ahead_of_time.py compiles that one by itself
}


@pytest.fixture(scope="module")
def launched() -> dict[str, list[dict[str, Any]]]:
    """The options of every launch, by kernel, when every operator is called. Nothing runs."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            found[kernel.__name__].append(options)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "__getitem__", launcher)
        for module in modules():
            if hasattr(module, "INTERPRETED"):  # then tensors on the CPU go to the kernels
                patch.setattr(module, "INTERPRETED", True)
        for name in BASE:
            given = arguments(name, "contiguous", torch.tensor(False))
            getattr(torch.ops.normuon_fn, name).default(*given)
        for rows in (8, 7):  # tensor descriptors, and none
            x = torch.ones(2, rows, rows, dtype=torch.float16)
            products.symmetric_matmul(x)
            products.symmetric_addmm(x, x, x, 1.0, 1.0)
            products.addmm(x, x, x, 1.0)
    return found


def test_every_kernel_is_launched_and_compiled_here(launched: dict[str, Any]) -> None:
    """The claims of the other tests are about every kernel."""
    assert set(KERNELS) == set(launched) == {case.kernel.__name__ for case in CASES.values()}


@pytest.mark.parametrize("name", KERNELS)
def test_every_launch_says_whether_products_and_sums_are_fused(
    name: str, launched: dict[str, list[dict[str, Any]]]
) -> None:
    assert {options.get("enable_fp_fusion") for options in launched[name]} == {name in FUSES}


@pytest.mark.parametrize("default", DEFAULTS)
def test_what_is_compiled_ahead_of_time_has_the_fusion_of_the_launches(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    for name, case in CASES.items():
        backend = make_backend(GPUTarget("cuda", case.architecture, 32))
        options = backend.parse_options(dict(case.options))
        assert options.enable_fp_fusion == (case.kernel.__name__ in FUSES), name


def of_each_kernel() -> dict[str, Any]:
    """One compilation of each kernel for Hopper; of the products, one that adds ``c``."""
    return {
        case.kernel.__name__: case
        for case in reversed(CASES.values())
        if case.architecture == 90 and case.constexprs.get("HAS_C", True)
    }


@pytest.mark.parametrize("name", KERNELS)
def test_the_code_is_the_same_under_both_defaults(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = of_each_kernel()[name]
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    texts = []
    for default in DEFAULTS:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        texts.append(compiled(case).asm["ptx"])
    assert texts[0] == texts[1]
    assert ("fma.rn" in texts[0]) == (name in FUSES)


def test_a_kernel_that_says_nothing_depends_on_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The claim of the test above can fail."""
    silent = {"num_warps": 4}
    case = of_each_kernel()["front_kernel"]._replace(options=silent)
    texts = []
    for default in DEFAULTS:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        texts.append(compiled(case).asm["ptx"])
    assert ["fma.rn" in text for text in texts] == [False, True]
