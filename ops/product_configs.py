"""How the kernels of the products cut their work into tiles, by product, size and device."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch


class TileConfig(NamedTuple):
    """How a kernel cuts a product. For a symmetric result, block_n is block_m or twice that.

    ``variant``: "pointers" loads from any strides; "tma" loads by tensor descriptors; "persistent"
    does so too, in one program per SM. ``ends``: with these two, c is loaded and the result is
    stored by descriptors too.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    variant: Literal["pointers", "tma", "persistent"] = "pointers"
    ends: bool = False


_SMALL, _LARGE = False, True
_LARGE_FROM = 1025  # rows
KINDS = ("symmetric_matmul", "symmetric_addmm", "addmm")
Configs = dict[tuple[str, bool], TileConfig]  # by product, and whether the matrices are large


def _for_all(small: TileConfig, large: TileConfig) -> Configs:
    by_size = ((_SMALL, small), (_LARGE, large))
    return {(kind, size): config for kind in KINDS for size, config in by_size}


# By the device's generation: shared memory is 227 KiB on 9 and 10, 163 KiB on 8, and 99 KiB on
# "lean" ones (8.6, 8.9, 12). For 9, the fastest that `python examples/benchmarks/tune.py` found;
# the TFLOP/s count a full product (H100, torch 2.11, triton 3.6, 2026-11-22). The others are not
# measured.
CONFIGS: dict[int | str, Configs] = {
    "lean": _for_all(TileConfig(128, 128, 32, 8, 8, 3), TileConfig(128, 128, 32, 8, 8, 3)),
    8: _for_all(TileConfig(128, 128, 32, 8, 8, 4), TileConfig(128, 128, 64, 8, 8, 4)),
    9: {
        # 683 for 48 x 768 x 768 in bfloat16 (cuBLAS 649); 999 for 12 x 768 x 3072 in float16 (642)
        ("symmetric_matmul", _SMALL): TileConfig(128, 128, 64, 8, 8, 3, "tma"),
        # 1257 for 96 x 2048 x 2048 in bfloat16 (786); 1253 for 48 x 2048 x 8192 in float16 (H200,
        # 2026-11-28, like the other two with ends; stored by pointers 1127 and 1191)
        ("symmetric_matmul", _LARGE): TileConfig(128, 256, 64, 8, 8, 3, "persistent", ends=True),
        # 606 for 48 x 768 x 768 in bfloat16 (341); 645 for 12 of them in float16 (363).
        # With 8 warps 493 and 690.
        ("symmetric_addmm", _SMALL): TileConfig(128, 128, 64, 8, 4, 3, "tma"),
        # 1216 for 96 x 2048 x 2048 in bfloat16 (638); 1130 for 48 of them in float16. Without ends,
        # in persistent programs, 1091 and 1046.
        ("symmetric_addmm", _LARGE): TileConfig(128, 128, 64, 16, 4, 3, "tma", ends=True),
        # 484 for 48 x 768 x 768 in bfloat16 (316); 503 for 12 x 768 x 3072 in float16 (334)
        ("addmm", _SMALL): TileConfig(128, 256, 64, 8, 8, 4, "persistent"),
        # 696 for 96 x 2048 x 2048 in bfloat16 (630); 660 for 48 x 2048 x 8192 in float16. Without
        # ends 688 and 586.
        ("addmm", _LARGE): TileConfig(128, 256, 64, 16, 8, 3, "persistent", ends=True),
    },
    10: _for_all(
        TileConfig(128, 128, 64, 8, 8, 3, "tma"), TileConfig(128, 128, 64, 8, 8, 3, "tma")
    ),
}
# On 9 and 10, for inputs that no descriptor takes.
WITHOUT_DESCRIPTORS = {
    _SMALL: TileConfig(128, 128, 64, 8, 4, 3),
    _LARGE: TileConfig(128, 256, 64, 8, 8, 3),
}


def config_for(
    device: torch.device, symmetric: bool, has_c: bool, rows: int, fits_descriptor: bool
) -> TileConfig:
    """The configuration for a product; the interpreter on the CPU takes that of generation 9."""
    kind = "addmm" if not symmetric else "symmetric_addmm" if has_c else "symmetric_matmul"
    generation = 9 if device.type == "cpu" else _generation(device.index)
    large = rows >= _LARGE_FROM
    config = CONFIGS[generation][kind, large]
    if config.variant != "pointers" and not fits_descriptor:
        return WITHOUT_DESCRIPTORS[large]
    return config


@functools.cache
def _generation(device: int) -> int | str:
    """The key into `CONFIGS`."""
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or major == 12 or (major == 8 and minor > 0) or major < 8:
        return "lean"
    return min(major, 10)


def tile_count(symmetric: bool, rows: int, cols: int, config: TileConfig) -> int:
    """How many tiles of one matrix are computed: if symmetric, those in its lower triangle."""
    tile_rows = -(-rows // config.block_m)
    if not symmetric:
        return tile_rows * -(-cols // config.block_n)
    per_square = config.block_n // config.block_m
    squares, left_over = divmod(tile_rows, per_square)
    return per_square * (squares * (squares + 1) // 2) + left_over * (squares + 1)
