"""Tile choice: a pure function of the call, always within what the card has."""

import itertools
import subprocess
import sys

import pytest
from fasttx.kernels.tiles import FEATURES, SHARED_BYTES, Tile, pick_tile, shared_bytes

KERNELS = ["fwd", "rows", "rows_table", "columns", "mask"]
ARCHES = [*SHARED_BYTES, "sm75", "interpreter"]


def all_calls():
    yield from itertools.product(
        KERNELS, ARCHES, (2, 4), (16, 64, 128, 256), (1, 40, 4096), (33, 4096),
        (frozenset(), frozenset({"dropout"}), FEATURES),
    )  # fmt: skip


def power_of_2(n):
    return n > 0 and n & (n - 1) == 0


def test_every_tile_is_launchable():
    for call in all_calls():
        tile = pick_tile(*call)
        assert power_of_2(tile.block_m) and power_of_2(tile.block_n), call
        assert min(tile.block_m, tile.block_n) >= 16 and max(tile.block_m, tile.block_n) <= 128
        assert tile.num_warps in (4, 8) and tile.num_stages in (1, 2, 3, 4), call


def test_every_tile_fits_in_shared_memory():
    for kernel, arch, itemsize, width, queries, keys, features in all_calls():
        tile = pick_tile(kernel, arch, itemsize, width, queries, keys, features)
        limit = SHARED_BYTES.get(arch, 64 << 10)
        assert shared_bytes(kernel, arch, tile, itemsize, width, features) <= limit


def test_table_gradient_needs_square_tiles():
    for kernel, *call in all_calls():
        if kernel == "rows_table":
            tile = pick_tile(kernel, *call)
            assert tile.block_m == tile.block_n


def test_short_sequences_take_small_tiles():
    long = pick_tile("fwd", "sm90", 2, 64, 4096, 4096)
    short = pick_tile("fwd", "sm90", 2, 64, 20, 4096)
    assert short.block_m == 32 < long.block_m
    assert pick_tile("fwd", "sm90", 2, 64, 4096, 17).block_n == 32


def test_choice_is_pure():
    for call in itertools.islice(all_calls(), 0, None, 7):
        assert pick_tile(*call) == pick_tile(*call)
    assert isinstance(pick_tile("fwd", "sm90", 2, 64, 512, 512), Tile)


def test_unknown_kernel():
    with pytest.raises(KeyError):
        pick_tile("sideways", "sm90", 2, 64, 512, 512)


def test_the_package_imports_no_triton():
    code = "import sys, fasttx.kernels, fasttx.kernels.tiles; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
