"""Every Triton kernel, in every configuration that is shipped, compiled for its architecture without a GPU."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from normuon_fn.ops import products

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler, not its interpreter"
)

# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES: dict[int | str, int] = {"lean": 89, 8: 80, 9: 90, 10: 100}  # of the keys of `products.CONFIGS`


class Case(NamedTuple):
    """One compilation. A trailing ``!`` in the signature: divisible by 16, as aligned pointers and even sizes are."""

    kernel: Any
    architecture: int
    signature: dict[str, str]  # by parameter: "*fp16!", "i32", "fp32"
    constexprs: dict[str, Any]
    options: dict[str, int]
    wide: bool = True  # all global loads and stores are of 16 bytes
    matrix_unit: bool = True


def product_cases() -> Iterator[tuple[str, Case]]:
    kinds = {"symmetric_matmul": (True, False), "symmetric_addmm": (True, True), "addmm": (False, True)}
    for generation, table in products.CONFIGS.items():
        for (name, (symmetric, has_c)), large in itertools.product(kinds.items(), (False, True)):
            case = product_case(table[symmetric, large], ARCHITECTURES[generation], symmetric, has_c, transposed_b=not has_c)
            yield f"{name}-{generation}-{'large' if large else 'small'}", case
    hopper = products.CONFIGS[9][True, True]
    yield "addmm-float64-scalars", product_case(hopper, 90, False, True, scalar="fp64")  # as Inductor launches
    yield "symmetric_matmul-bf16", product_case(hopper, 90, True, False, transposed_b=True, dtype="bf16")
    yield "symmetric_matmul-of-transposed", product_case(hopper, 90, True, False, transposed_a=True)
    yield "symmetric_matmul-odd", product_case(hopper, 90, True, False, transposed_b=True, even=False)


def product_case(
    config: products.Config,
    architecture: int,
    symmetric: bool,
    has_c: bool,
    *,
    transposed_a: bool = False,
    transposed_b: bool = False,
    dtype: str = "fp16",
    even: bool = True,
    scalar: str = "fp32",
) -> Case:
    pointer, size = (f"*{dtype}!", "i32!") if even else (f"*{dtype}!", "i32")
    signature = {
        **dict.fromkeys(("a", "b", "c", "out"), pointer),
        **dict.fromkeys(("alpha", "beta"), scalar),
        **dict.fromkeys(("rows", "cols", "depth"), size),
        "tiles": "i32",
        **dict.fromkeys(("a_matrix", "a_row", "a_depth", "b_matrix", "b_depth", "b_col", "c_matrix", "c_row", "c_col"), size),
    }
    ones = ["a_row" if transposed_a else "a_depth", "b_depth" if transposed_b else "b_col", "c_col"]  # Triton specializes on 1
    constexprs = {
        **dict.fromkeys(ones, 1),
        "SYMMETRIC": symmetric,
        "HAS_C": has_c,
        "EVEN_K": even,
        "UPCAST": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(products._product_kernel, architecture, signature, constexprs, options, wide=even)


CASES = dict(product_cases())


def compiled(case: Case) -> Any:
    """PTX, cubin and metadata. ptxas comes with triton; without it this raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    assert set(names) == set(case.signature) | set(case.constexprs)
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name].rstrip("!") for name in names}
    divisible: dict[tuple[int, ...], Any] = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(names)
        if name not in case.constexprs and case.signature[name].endswith("!")
    }
    source = ASTSource(case.kernel, signature, case.constexprs, divisible)
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=case.options)


def global_accesses(ptx: str) -> list[int]:
    """Bytes of every load from and store to global memory."""
    found = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", ptx)]
    for vector, bits in re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfusd](\d+)", ptx):
        found.append(int(vector or 1) * int(bits) // 8)
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_fits(name: str) -> None:
    case = CASES[name]
    kernel = compiled(case)
    ptx = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 0
    assert kernel.metadata.shared <= SHARED_MEMORY[case.architecture]
    if case.matrix_unit:
        instruction = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[case.architecture]
        assert instruction in ptx
    sizes = global_accesses(ptx)
    assert sizes
    if case.wide:
        assert set(sizes) == {16}
    assert ".local" not in ptx
    assert not re.search(r"(mul|fma|add)\.(rn\.)?f64", ptx)  # Inductor passes alpha and beta in float64


def test_an_access_that_is_not_wide_is_seen() -> None:
    """Odd sizes leave single entries: the claim of the other test can fail."""
    assert min(global_accesses(compiled(CASES["symmetric_matmul-odd"]).asm["ptx"])) < 16
