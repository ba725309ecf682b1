"""How the kernels of the products cut their work into tiles, by product, size and device."""

from __future__ import annotations

import functools
import importlib
from typing import Literal, NamedTuple

import torch


class TileConfig(NamedTuple):
    """How a kernel cuts a product. For a symmetric result, block_n is block_m or twice that.

    ``variant``: "pointers" loads from any strides; "tma" loads by tensor descriptors; "persistent"
    does so too, in one program per SM. ``ends``: with these two, c is loaded and the result is
    stored by descriptors too. "specialized" is persistent, with ends, and one warp more that loads;
    it has one consumer of 8 warps or two of 4, which ``num_warps`` says (warp_specialized.py).
    ``group``: how many tile rows are worked on together, or squares of block_n in a symmetric
    result; of a specialized one, always tile rows.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    variant: Literal["pointers", "tma", "persistent", "specialized"] = "pointers"
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


def _one_consumer(group: int) -> TileConfig:
    return TileConfig(128, 256, 64, group, 8, 3, "specialized", ends=True)


def _two_consumers(group: int, num_stages: int) -> TileConfig:
    return TileConfig(128, 128, 64, group, 4, num_stages, "specialized", ends=True)


# On 9, in the place of those, where Triton's Gluon is known to be right: see `has_measured_gluon`.
# In ms at the clock that a GPU holds under load, with `CONFIGS` in parentheses (H200, torch 2.11,
# triton 3.6, 2026-11-29).
WARP_SPECIALIZED: Configs = {
    # 0.0517 for 48 x 768 x 768 (0.0591); 0.0783 for 50 x 648 x 888 (0.0784)
    ("symmetric_matmul", "small"): _two_consumers(8, 5),
    # 1.422 for 96 x 2048 x 2048 (1.520); 0.106 for 48 x 1024 x 1024 (0.128)
    ("symmetric_matmul", "large"): _two_consumers(4, 5),
    # 0.891 for 8 x 4096 x 4096 (0.941); 3.21 for 12008 x 14336 (3.32)
    ("symmetric_matmul", "huge"): _two_consumers(8, 5),
    # 0.0536 for 48 x 768 x 768 (0.0653); 0.0577 for 39 x 664 x 2056 (0.0628)
    ("symmetric_addmm", "small"): _two_consumers(4, 5),
    # 1.467 for 96 x 2048 x 2048 (1.658); 0.100 for 61 x 864 x 920 (0.123)
    ("symmetric_addmm", "large"): _two_consumers(8, 4),
    # 0.914 for 8 x 4096 x 4096 (0.971); 3.08 for 12008 x 14336 (3.18)
    ("symmetric_addmm", "huge"): _one_consumer(8),
    # 0.0866 for 48 x 768 x 768 (0.0905); 0.206 for 39 x 664 x 2056 (0.232)
    ("addmm", "small"): _one_consumer(8),
    # 2.659 for 96 x 2048 x 2048 (2.828); 5.32 for 48 x 2048 x 8192 (5.94)
    ("addmm", "large"): _one_consumer(8),
    # 1.687 for 8 x 4096 x 4096 (1.772); 6.17 for 12008 x 14336 (6.47)
    ("addmm", "huge"): _one_consumer(8),
}
MEASURED_GLUON = {("3", "6")}
# On 9 and 10, for inputs that no descriptor takes.
WITHOUT_DESCRIPTORS: dict[Size, TileConfig] = {
    "small": TileConfig(128, 128, 64, 8, 4, 3),
    "large": TileConfig(128, 256, 64, 8, 8, 3),
    "huge": TileConfig(128, 256, 64, 8, 8, 3),
}


def config_for(
    device: torch.device,
    symmetric: bool,
    has_c: bool,
    rows: int,
    fits_descriptor: bool,
    ends_fit: bool,  # c and the result fit one too
) -> TileConfig:
    """The configuration for a product; the interpreter on the CPU takes that of generation 9."""
    kind = "addmm" if not symmetric else "symmetric_addmm" if has_c else "symmetric_matmul"
    generation = 9 if device.type == "cpu" else _generation(device.index)
    size: Size = "small" if rows < _LARGE_FROM else "large" if rows < _HUGE_FROM else "huge"
    on_hopper = generation == 9 and device.type == "cuda"
    if on_hopper and fits_descriptor and ends_fit and has_measured_gluon():
        return WARP_SPECIALIZED[kind, size]
    config = CONFIGS[generation][kind, size]
    if config.variant != "pointers" and not fits_descriptor:
        return WITHOUT_DESCRIPTORS[size]
    return config._replace(ends=config.ends and ends_fit)


@functools.cache
def has_measured_gluon() -> bool:
    """Whether Triton's version is one with which the warp-specialized kernel ran, and was right.

    Gluon is experimental: another version may compile the same source to something else, and nobody
    has looked. There `CONFIGS` stays in force, which has the same bits.
    """
    version: str = importlib.import_module("triton").__version__
    return tuple(version.split(".")[:2]) in MEASURED_GLUON


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


def first_entries(symmetric: bool, rows: int, cols: int, config: TileConfig) -> list[list[int]]:
    """Row and column of the first entry of every tile of one matrix, in the order of the work.

    ``config.group`` tile rows at a time, column by column, so that they share L2. If symmetric, the
    tiles that meet the lower triangle.
    """
    found = []
    for start in range(0, rows, config.group * config.block_m):
        end = min(rows, start + config.group * config.block_m)
        for j0 in range(0, cols, config.block_n):
            for i0 in range(start, end, config.block_m):
                if not symmetric or j0 < i0 + config.block_m:
                    found.append([i0, j0])
    return found
