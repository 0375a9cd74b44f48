"""Tile shapes of the attention kernels: a pure function of the call over committed data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def pick_tile(kernel, arch, itemsize, width, queries, keys, features=frozenset()):
    return Tile(64, 64, 4, 2)


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
