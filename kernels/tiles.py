"""Tile shapes of the attention kernels: a pure function of the call over committed data.

The table holds, for each kernel, architecture and padded head width, the largest tile found to
compile without spilling at three levels of features. `python -m fasttx.kernels.compile_check`
compiles every entry. What was tuned by running stands in tuned.json, with its measurement, and
comes first; `python -m benchmarks.gpu --only tune` makes it.
"""

import contextlib
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FEATURES = frozenset({"band", "mask", "pairs", "alibi", "table", "softcap", "dropout"})

# Shared memory that one block may use, in bytes.
SHARED_BYTES = {
    "sm80": 163 << 10,
    "sm86": 99 << 10,
    "sm87": 163 << 10,
    "sm89": 99 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm103": 227 << 10,
    "sm120": 99 << 10,
    "sm121": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
_UNKNOWN_SHARED_BYTES = 64 << 10

# The architecture whose matrix instructions, hence register use, are alike.
_LIKE = {
    "sm90": "sm90",
    "sm100": "sm100",
    "sm103": "sm100",
    "gfx90a": "gfx942",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
}

_INTERPRETER = Tile(64, 64, 4, 1)

# 16-bit operands: kernel -> architecture -> head width -> tiles of the levels light, dropout and
# heavy, each (block_m, block_n, num_warps, num_stages); one tile stands for all three.
_TILES_16 = {
    "fwd": {
        "sm80": {
            64: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
            128: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
        },
        "sm90": {
            64: ((128, 64, 8, 2),),
            128: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 2),),
        },
        "sm100": {
            64: ((64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
        },
        "gfx942": {
            64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
            128: ((128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
            256: ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        },
    },
    "rows": {
        "sm80": {
            64: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
            128: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        "sm90": {
            64: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 2), (32, 16, 8, 2), (32, 32, 8, 1)),
        },
        "sm100": {
            64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
            128: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        "gfx942": {
            64: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
            128: ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
            256: ((32, 16, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
    },
    "rows_table": {
        "sm80": {
            64: ((32, 32, 4, 2),),
            128: ((32, 32, 8, 1),),
            256: ((32, 32, 8, 1),),
        },
        "sm90": {
            64: ((64, 64, 8, 2),),
            128: ((32, 32, 8, 2),),
            256: ((32, 32, 8, 1),),
        },
        "sm100": {
            64: ((64, 64, 8, 1),),
            128: ((32, 32, 8, 1),),
            256: ((32, 32, 8, 1),),
        },
        "gfx942": {
            64: ((64, 64, 4, 2),),
            128: ((32, 32, 4, 1),),
            256: ((16, 16, 4, 1),),
        },
    },
    "columns": {
        "sm80": {
            64: ((32, 64, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
            128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
            256: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        },
        "sm90": {
            64: ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
            128: ((32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 1)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
        },
        "sm100": {
            64: ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 4, 2)),
            128: ((64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
            256: ((32, 32, 8, 2), (16, 32, 8, 1), (16, 32, 8, 1)),
        },
        "gfx942": {
            64: ((32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
            128: ((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
            256: ((16, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
    },
    "mask": {
        "sm80": {
            64: ((64, 32, 8, 1),),
            128: ((64, 32, 8, 1),),
            256: ((32, 16, 8, 1),),
        },
        "sm90": {
            64: ((64, 64, 8, 1),),
            128: ((64, 64, 8, 1),),
            256: ((32, 32, 8, 1),),
        },
        "sm100": {
            64: ((64, 32, 8, 1),),
            128: ((64, 32, 8, 1),),
            256: ((32, 32, 8, 1),),
        },
        "gfx942": {
            64: ((64, 32, 8, 1),),
            128: ((64, 32, 8, 1),),
            256: ((32, 32, 8, 1),),
        },
    },
}

# fp32 operands, on any architecture: kernel -> head width -> tiles of the levels.
_TILES_32 = {
    "fwd": {
        64: ((32, 32, 8, 1), (16, 16, 8, 1)),
        128: ((16, 16, 4, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1),),
    },
    "rows": {
        64: ((32, 32, 8, 1), (16, 16, 8, 1)),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "rows_table": {
        64: ((16, 16, 8, 1),),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "columns": {
        64: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "mask": {
        64: ((16, 16, 4, 1),),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
}

# Where such a tile spills on one architecture: (kernel, head width, level) -> the tile there. Two
# levels more: "none" is light without any feature, "table" is heavy without pairs and softcap.
_TILES_32_ON = {
    "sm80": {
        ("rows", 128, "none"): (32, 16, 8, 1),
        ("rows", 128, "light"): (32, 16, 8, 1),
        ("rows", 256, "none"): (32, 16, 8, 1),
        ("rows", 256, "light"): (32, 16, 8, 1),
        ("rows_table", 128, "table"): (32, 32, 8, 1),
        ("columns", 64, "heavy"): (16, 32, 8, 1),
        ("columns", 256, "none"): (64, 16, 8, 1),
        ("mask", 256, "heavy"): (32, 16, 8, 1),
    },
    "sm90": {
        ("columns", 256, "table"): (16, 16, 16, 1),
    },
    "sm100": {
        ("rows", 64, "light"): (32, 16, 8, 1),
        ("columns", 128, "none"): (32, 32, 8, 1),
        ("columns", 128, "table"): (32, 16, 8, 1),
    },
}


def level(features: frozenset) -> str:
    """How much a tile must hold besides its products."""
    if features & {"pairs", "table", "softcap"}:
        return "heavy"
    return "dropout" if "dropout" in features else "light"


def shared_bytes(
    kernel: str, arch: str, tile: Tile, itemsize: int, width: int, features: frozenset
) -> int:
    """Shared memory a kernel may take with this tile: a bound over what compilers were seen to use.

    Operands that stay (in registers on AMD and where fp32 is multiplied), operands that stream
    through num_stages buffers, and bytes for each pair of a tile where its values change layout.
    """
    m, n = tile.block_m, tile.block_n
    stays, streams = {
        "fwd": (m, 2 * n),
        "rows": (2 * m, 2 * n),
        "rows_table": (2 * m, 2 * n),
        "columns": (2 * n, 2 * m),
        "mask": (m + n, m + n),
    }[kernel]
    streams *= tile.num_stages
    like = _LIKE.get(arch, "sm80")
    together = itemsize == 2 and like != "gfx942"
    operands = (stays + streams if together else max(stays, streams)) * width * itemsize
    pair = 8 if level(features) == "heavy" else 5 if like == "sm100" else 2
    return operands + m * n * pair + 1024


def _power_of_2_from(length: int, least: int) -> int:
    return max(least, 1 << max(length - 1, 0).bit_length())


def tile_key(kernel: str, itemsize: int, width: int, features: frozenset) -> str:
    """The entry of tuned.json that a call belongs to: kernel/bits/head width/level."""
    return f"{kernel}/{8 * itemsize}/{max(64, width)}/{level(features)}"


@functools.cache
def tuned() -> dict[str, dict[str, dict]]:
    """arch -> tile_key -> {"tile": [...], and how it was measured}."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text())


_trials: dict[str, Tile] = {}


@contextlib.contextmanager
def trial(key: str, tile: Tile):
    """Calls of this tile_key run with this tile, to measure it."""
    _trials[key] = tile
    pick_tile.cache_clear()
    try:
        yield
    finally:
        del _trials[key]
        pick_tile.cache_clear()


def _compiled(kernel: str, arch: str, itemsize: int, width: int, features: frozenset) -> tuple:
    like, load = _LIKE.get(arch, "sm80"), level(features)
    tiles = _TILES_32[kernel][width] if itemsize == 4 else _TILES_16[kernel][like][width]
    chosen = tiles[min(("light", "dropout", "heavy").index(load), len(tiles) - 1)]
    if itemsize != 4:
        return chosen
    if not features:
        load = "none"
    elif "table" in features and not features & {"pairs", "softcap"}:
        load = "table"
    return _TILES_32_ON.get(like, {}).get((kernel, width, load), chosen)


@functools.lru_cache(maxsize=4096)
def pick_tile(
    kernel: str,
    arch: str,
    itemsize: int,
    width: int,
    queries: int,
    keys: int,
    features: frozenset = frozenset(),
) -> Tile:
    """The tile of a kernel ("fwd", "rows", "rows_table", "columns", "mask").

    width is the head size padded to a power of two, of keys or values, the greater; queries and
    keys are the lengths, or at least the longest possible, and features is from FEATURES.
    """
    key = tile_key(kernel, itemsize, width, features)
    if arch == "interpreter":
        tile = _INTERPRETER
    elif key in _trials:
        tile = _trials[key]
    elif key in (measured := tuned().get(arch, {})):
        tile = Tile(*measured[key]["tile"])
    else:
        tile = Tile(*_compiled(kernel, arch, itemsize, max(64, width), features))
    if kernel == "rows_table":
        side = min(tile.block_m, tile.block_n)
        tile = replace(tile, block_m=side, block_n=side)
    else:
        tile = replace(
            tile,
            block_m=min(tile.block_m, _power_of_2_from(queries, 32)),
            block_n=min(tile.block_n, _power_of_2_from(keys, 32)),
        )
    return _fit(kernel, arch, itemsize, width, features, tile)


def _fit(kernel, arch, itemsize, width, features, tile):
    """The tile with fewer stages, then smaller blocks, until it fits the architecture."""
    limit = SHARED_BYTES.get(arch, _UNKNOWN_SHARED_BYTES)
    while shared_bytes(kernel, arch, tile, itemsize, width, features) > limit:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif kernel == "rows_table":
            tile = replace(tile, block_m=tile.block_m // 2, block_n=tile.block_n // 2)
        elif tile.block_m >= tile.block_n:
            tile = replace(tile, block_m=tile.block_m // 2)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile
