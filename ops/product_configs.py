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


Size = Literal["small", "large", "huge"]  # of matrices, by rows
SIZES: tuple[Size, ...] = ("small", "large", "huge")
_LARGE_FROM, _HUGE_FROM = 769, 4000  # huge: two matrices are more than L2 holds (50 MB)
KINDS = ("symmetric_matmul", "symmetric_addmm", "addmm")
Configs = dict[tuple[str, Size], TileConfig]  # by product and size


def _for_all(small: TileConfig, large: TileConfig) -> Configs:
    by_size: tuple[tuple[Size, TileConfig], ...] = (
        ("small", small),
        ("large", large),
        ("huge", large),
    )
    return {(kind, size): config for kind in KINDS for size, config in by_size}


# By the device's generation: shared memory is 227 KiB on 9 and 10, 163 KiB on 8, and 99 KiB on
# "lean" ones (8.6, 8.9, 12). For 9, the fastest that `python examples/benchmarks/tune.py` found, at
# the clock that a GPU holds under load; in TFLOP/s of a full product, with cuBLAS in parentheses
# (H200, torch 2.11, triton 3.6, 2026-11-29). The others are not measured.
CONFIGS: dict[int | str, Configs] = {
    "lean": _for_all(TileConfig(128, 128, 32, 8, 8, 3), TileConfig(128, 128, 32, 8, 8, 3)),
    8: _for_all(TileConfig(128, 128, 32, 8, 8, 4), TileConfig(128, 128, 64, 8, 8, 4)),
    9: {
        # 760 for 48 x 768 x 768 in bfloat16 (575); 470 for 50 x 648 x 888 (369)
        ("symmetric_matmul", "small"): TileConfig(128, 128, 64, 8, 4, 3, "tma", ends=True),
        # 1065 for 96 x 2048 x 2048 (673); 624 for 61 x 864 x 920 (479); 1128 for 48 x 2048 x 8192
        # in float16 (668)
        ("symmetric_matmul", "large"): TileConfig(128, 256, 64, 16, 8, 3, "persistent", ends=True),
        # 1314 for 12008 x 14336 (701), 1219 for 8 x 4096 x 4096 (682)
        ("symmetric_matmul", "huge"): TileConfig(128, 256, 64, 4, 8, 3, "persistent", ends=True),
        # 670 for 48 x 768 x 768 (362); 374 for 50 x 648 x 888 (219)
        ("symmetric_addmm", "small"): TileConfig(128, 128, 64, 8, 4, 3, "tma", ends=True),
        # 1034 for 96 x 2048 x 2048 (558); 636 for 61 x 864 x 920 (274)
        ("symmetric_addmm", "large"): TileConfig(128, 128, 64, 16, 4, 3, "tma", ends=True),
        # 1138 for 12008 x 14336 (618); in tiles of 128 x 128, 851. 1138 for 8 x 4096 x 4096 (621)
        ("symmetric_addmm", "huge"): TileConfig(128, 256, 64, 4, 8, 3, "persistent", ends=True),
        # 483 for 48 x 768 x 768 (347); 285 for 50 x 648 x 888 (212)
        ("addmm", "small"): TileConfig(128, 256, 64, 4, 8, 3, "persistent", ends=True),
        # 594 for 96 x 2048 x 2048 (538); 398 for 61 x 864 x 920 (302)
        ("addmm", "large"): TileConfig(128, 256, 64, 16, 8, 3, "persistent", ends=True),
        # 670 for 12008 x 14336 (642)
        ("addmm", "huge"): TileConfig(128, 256, 64, 4, 8, 3, "persistent", ends=True),
    },
    10: _for_all(
        TileConfig(128, 128, 64, 8, 8, 3, "tma"), TileConfig(128, 128, 64, 8, 8, 3, "tma")
    ),
}
# On 9 and 10, for inputs that no descriptor takes.
WITHOUT_DESCRIPTORS: dict[Size, TileConfig] = {
    "small": TileConfig(128, 128, 64, 8, 4, 3),
    "large": TileConfig(128, 256, 64, 8, 8, 3),
    "huge": TileConfig(128, 256, 64, 8, 8, 3),
}


def config_for(
    device: torch.device, symmetric: bool, has_c: bool, rows: int, fits_descriptor: bool
) -> TileConfig:
    """The configuration for a product; the interpreter on the CPU takes that of generation 9."""
    kind = "addmm" if not symmetric else "symmetric_addmm" if has_c else "symmetric_matmul"
    generation = 9 if device.type == "cpu" else _generation(device.index)
    size: Size = "small" if rows < _LARGE_FROM else "large" if rows < _HUGE_FROM else "huge"
    config = CONFIGS[generation][kind, size]
    if config.variant != "pointers" and not fits_descriptor:
        return WITHOUT_DESCRIPTORS[size]
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
